//! A part of a problem: what one launch computes.

use std::ops::Range;

use crate::problem::Problem;

/// A box of the problem: what one launch computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub batch: Range<u32>,
    pub heads: Range<u32>,
    pub rows: Range<u32>,
}

impl Part {
    pub(crate) fn batch_count(&self) -> u64 {
        self.batch.len() as u64
    }

    pub(crate) fn head_count(&self) -> u64 {
        self.heads.len() as u64
    }

    /// Rows of all its heads and batch entries.
    pub(crate) fn rows_of_heads(&self) -> u64 {
        self.batch_count().saturating_mul(self.head_count()).saturating_mul(self.row_count())
    }

    pub(crate) fn row_count(&self) -> u64 {
        self.rows.len() as u64
    }

    /// Batch entries that have lengths of their own.
    pub(crate) fn length_count(&self, problem: &Problem) -> u64 {
        if problem.has_lengths() { self.batch_count() } else { 0 }
    }

    /// Two halves: of the batch, else of the heads (whole groups while there are several), else of the rows.
    pub(crate) fn halves(&self, group: u32, cut: Cut) -> Option<(Part, Part)> {
        let middle = |range: &Range<u32>, unit: u32| {
            let units = (range.end - range.start).div_ceil(unit);
            (units > 1).then(|| range.start + units / 2 * unit)
        };
        let (mut a, mut b) = (self.clone(), self.clone());
        if let Some(m) = middle(&self.batch, 1) {
            (a.batch.end, b.batch.start) = (m, m);
            return Some((a, b));
        }
        if let Some(m) = middle(&self.heads, group) {
            (a.heads.end, b.heads.start) = (m, m);
            return Some((a, b));
        }
        let Cut::HeadsAndRows(row_unit) = cut else { return None };
        if let Some(m) = middle(&self.heads, 1) {
            (a.heads.end, b.heads.start) = (m, m);
        } else {
            let m = middle(&self.rows, row_unit)?;
            (a.rows.end, b.rows.start) = (m, m);
        }
        Some((a, b))
    }
}

/// Where a problem may be cut into parts, besides between batch entries.
#[derive(Clone, Copy)]
pub(crate) enum Cut {
    /// Between heads, whole groups while there are several, then between multiples of so many rows.
    HeadsAndRows(u32),
    /// Between groups of heads that share a key-value head: their gradients of k and v are one sum.
    Groups,
}
