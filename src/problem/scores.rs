//! What is given of each score or head: bias, boolean mask, ALiBi.

use super::shape::{Layout, Shape};
use crate::names::ElementType;

/// Where what is given of each score lies in its buffer, in elements: that of batch entry `b`, query head `h`, query `i` and key `j` is at
/// `offset + b·batch + h·head + i·row + j·column`.
///
/// A stride of 0 broadcasts: one element then serves all batch entries, say. This is plain data that stays as it is.
///
/// ```
/// use wgpu_flash_attention::{Bias, ElementType, Problem, ScoreLayout, Shape};
///
/// // A bias `[heads, queries, keys]` for all batch entries, as T5's; a mask of keys, `[batch, keys]`, for all heads and queries.
/// let bias = Bias::new(ElementType::F32, ScoreLayout::contiguous([1, 8, 512, 512]));
/// let mask = ScoreLayout::contiguous([2, 1, 1, 512]);
/// let problem = Problem::new(Shape::square(2, 8, 512, 64), ElementType::F16).with_bias(bias).with_grad_bias().with_mask(mask);
/// assert_eq!(bias.layout.batch, 0);
/// assert_eq!(mask.place([1, 7, 300, 5]), 512 + 5);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScoreLayout {
    /// First element.
    pub offset: u64,
    /// From one batch entry to the next.
    pub batch: u64,
    /// From one query head to the next.
    pub head: u64,
    /// From one query to the next.
    pub row: u64,
    /// From one key to the next.
    pub column: u64,
    /// The sizes that [`ScoreLayout::contiguous`] was given, which have to suit the problem. `None` where there are none to compare with the
    /// problem's: of strides that the caller found.
    pub sizes: Option<[u32; 4]>,
}

impl ScoreLayout {
    /// Contiguous `[batch, heads_q, seqlen_q, seqlen_k]`, of which a size of 1 broadcasts, as in PyTorch. In a problem of other sizes it is an
    /// [`Error::ScoreSizes`](crate::Error::ScoreSizes).
    pub const fn contiguous([batch, heads, queries, keys]: [u32; 4]) -> Self {
        const fn stride(size: u32, inner: u64) -> u64 {
            if size == 1 { 0 } else { inner }
        }
        let of_queries = (queries as u64).saturating_mul(keys as u64);
        ScoreLayout {
            offset: 0,
            batch: stride(batch, of_queries.saturating_mul(heads as u64)),
            head: stride(heads, of_queries),
            row: stride(queries, keys as u64),
            column: stride(keys, 1),
            sizes: Some([batch, heads, queries, keys]),
        }
    }

    /// Strides from one batch entry, query head, query and key to the next, from element `offset` on.
    pub const fn strided(offset: u64, [batch, head, row, column]: [u64; 4]) -> Self {
        ScoreLayout { offset, batch, head, row, column, sizes: None }
    }

    /// The same layout, `elements` further into the buffer.
    pub const fn at(mut self, elements: u64) -> Self {
        self.offset = self.offset.saturating_add(elements);
        self
    }

    /// The place of the element of batch entry, query head, query and key `[b, h, i, j]`.
    pub const fn place(&self, [b, h, i, j]: [u32; 4]) -> u64 {
        self.offset + b as u64 * self.batch + h as u64 * self.head + i as u64 * self.row + j as u64 * self.column
    }

    /// Whether two keys, of which the first is even, lie side by side from an even element on.
    pub(crate) const fn is_paired(&self) -> bool {
        self.is_in_vectors(2)
    }

    /// Whether four keys, of which the first is a multiple of four, lie side by side from a multiple of four elements on.
    pub(crate) const fn is_in_quads(&self) -> bool {
        self.is_in_vectors(4)
    }

    /// Whether keys lie side by side, and each row begins at a multiple of so many elements, a power of two.
    const fn is_in_vectors(&self, elements: u64) -> bool {
        let places = self.offset | self.batch | self.head | self.row;
        self.column == 1 && places.is_multiple_of(elements)
    }

    /// Its first three strides, and how many elements a row spans. A row of `keys` keys begins where key 0 has its element.
    pub(crate) const fn rows(&self, keys: u32) -> (Layout, u64) {
        let layout = Layout { offset: self.offset, batch: self.batch, head: self.head, row: self.row };
        let span = match keys {
            0 => 0,
            keys => (keys as u64 - 1).saturating_mul(self.column).saturating_add(1),
        };
        (layout, span)
    }

    /// The sizes of what it holds: 1 where it broadcasts.
    pub(crate) const fn sizes_in(&self, shape: &Shape) -> [u32; 4] {
        const fn size(stride: u64, all: u32) -> u32 {
            if stride == 0 && all > 1 { 1 } else { all }
        }
        [
            size(self.batch, shape.batch),
            size(self.head, shape.heads_q),
            size(self.row, shape.seqlen_q),
            size(self.column, shape.seqlen_k),
        ]
    }
}

/// A number that is added to each score: `score + bias`, after softcap and before masks.
///
/// A key whose bias is −∞ or below −1e30 does not count for the query: both are used as masks. All other numbers are added, up to ±1e7 on
/// cooperative matrices, as scores are there ([`Kernel::Coop`](crate::Kernel::Coop)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Bias {
    /// Type of its elements in memory: f32, or that of the problem.
    pub element_type: ElementType,
    /// Where they lie.
    pub layout: ScoreLayout,
}

impl Bias {
    /// A bias whose elements of this type lie so.
    pub const fn new(element_type: ElementType, layout: ScoreLayout) -> Self {
        Bias { element_type, layout }
    }
}

/// Which slopes ALiBi has (Press, Smith and Lewis 2022): scores become `score − slope · |i + keys − queries − j|`, with the batch entry's
/// lengths where the problem has them. For causal attention the paper adds `slope · (j − i)`, which is equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Alibi {
    /// One of each query head, f32 `[heads_q]`.
    PerHead,
    /// One of each batch entry and query head, f32 `[batch, heads_q]`.
    PerBatchAndHead,
}

impl Alibi {
    /// How many slopes there are.
    pub(crate) const fn slopes(self, shape: &Shape) -> u64 {
        match self {
            Alibi::PerHead => shape.heads_q as u64,
            Alibi::PerBatchAndHead => shape.batch as u64 * shape.heads_q as u64,
        }
    }
}

/// The slopes of the ALiBi paper for so many heads: `2^(−8/n), 2^(−16/n), …` for a power of two `n`. For other counts those of the next
/// smaller power of two, then every second one of twice that power, as in the paper's code.
pub fn alibi_slopes(heads: u32) -> Vec<f32> {
    let geometric = |n: u32, k: u32| (-8.0 * f64::from(k) / f64::from(n)).exp2() as f32;
    let power = match heads {
        0 => return vec![],
        heads => 1 << heads.ilog2(),
    };
    let first = (1..=power).map(|k| geometric(power, k));
    first.chain((0..heads - power).map(|k| geometric(2 * power, 2 * k + 1))).collect()
}

/// Whether two elements of what lies so would be in one place, other than by broadcasting.
pub(super) fn score_layout_overlaps(layout: &ScoreLayout, shape: &Shape) -> bool {
    let strides = [layout.batch, layout.head, layout.row, layout.column];
    let mut axes: Vec<_> = strides.into_iter().zip(layout.sizes_in(shape)).filter(|&(_, n)| n > 1).collect();
    axes.sort();
    let mut span = 1u64;
    axes.into_iter().any(|(stride, n)| {
        let overlaps = stride < span;
        span = span.saturating_add(stride.saturating_mul(n as u64 - 1));
        overlaps
    })
}
