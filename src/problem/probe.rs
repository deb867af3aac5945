//! What only tests ask for.

/// Variants of attention that only tests compute, each through one seam between what attention is and how kernels compute it
/// (`shaders/attention/probe.wgsl`). [`mod@crate::reference`] computes them too.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Probe {
    /// Queries lie in memory in another order, and keys in a third one: where rows are. The reference knows nothing of it.
    Rows,
    /// Some squares of scores do not count, others in half, differently in each head: which tiles are visited.
    Tiles,
}

impl Probe {
    /// All of them.
    pub const ALL: [Probe; 2] = [Probe::Rows, Probe::Tiles];

    /// The name by which shaders know it.
    pub(crate) fn switch(self) -> &'static str {
        match self {
            Probe::Rows => "PROBE_ROWS",
            Probe::Tiles => "PROBE_TILES",
        }
    }

    /// Whether a score counts.
    pub(crate) fn keeps(self, [h, i, j]: [u32; 3]) -> bool {
        const SQUARE: u32 = 48;
        let kind = (i / SQUARE + 2 * (j / SQUARE) + h) % 4;
        self != Probe::Tiles || kind > 1 || (kind == 1 && (i + j).is_multiple_of(2))
    }

    /// In which row of its tensor query `i` of `queries`, or key `j` of `keys`, lies.
    pub fn query_row(self, i: u32, queries: u32) -> u32 {
        if self == Probe::Rows && i ^ 1 < queries { i ^ 1 } else { i }
    }

    /// As [`Probe::query_row`] for a key.
    pub fn key_row(self, j: u32, keys: u32) -> u32 {
        if self == Probe::Rows { keys - 1 - j } else { j }
    }
}
