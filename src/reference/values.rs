//! What the reference takes and gives.

use crate::{Dropout, Problem};

/// What the forward pass computes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Forward {
    /// o `[batch, heads_q, seqlen_q, head_dim_v]`.
    pub out: Vec<f64>,
    /// lse `[batch, heads_q, seqlen_q]`, −∞ for a row that sees no key.
    pub lse: Vec<f64>,
}

/// What the backward pass computes: the gradients of a loss in q, k and v.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Backward {
    /// dq `[batch, heads_q, seqlen_q, head_dim]`.
    pub query: Vec<f64>,
    /// dk `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share a key-value head.
    pub key: Vec<f64>,
    /// dv `[batch, heads_kv, seqlen_k, head_dim_v]`, summed likewise.
    pub value: Vec<f64>,
    /// The norms of what was summed for dq, dk and dv, with p·dp and p·delta apart. Where terms cancel, an error is relative to
    /// this: a row with one key has a dq of 0, which no computation in f32 finds.
    pub terms: [f64; 3],
    /// The gradient of the bias, where the bias' layout puts its elements; if the problem asks for it.
    pub bias: Option<Summed>,
    /// The gradient of the sinks, `[heads_q]`; if the problem asks for it.
    pub sinks: Option<Summed>,
    /// The gradient of ALiBi's slopes, `[heads_q]` or `[batch, heads_q]`; if the problem asks for it.
    pub alibi_slopes: Option<Summed>,
}

/// A gradient of what many scores share.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Summed {
    /// The sums.
    pub values: Vec<f64>,
    /// The norm of what was summed, with p·dp and p·delta apart. What scores of one row add to one element is one term: they have one
    /// delta and one lse, and what the rounding of these costs. A term of a sink is a multiple of delta. It counts with the norm of what delta sums, if that is larger.
    pub terms: f64,
}

/// What a problem has besides q, k and v: of each input that it says it has, the contents.
///
/// Where a function here takes it, key lengths alone may be given as `Option<&[i32]>`, and `None` says that there is nothing. Lengths
/// count whether or not the problem has `seqlens_q` and `seqlens_k`; its layouts are not looked at.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Extras<'a> {
    /// Valid queries, `[batch]`.
    pub seqlens_q: Option<&'a [i32]>,
    /// Valid keys, `[batch]`.
    pub seqlens_k: Option<&'a [i32]>,
    /// Dropout. Its probability counts here, whatever the problem's [`dropout`](Problem::dropout) is; without it nothing is dropped.
    pub dropout: Option<Dropout>,
    /// Which blocks are listed, of a problem with block lists, `[B|1, Hq|1, R, C]` ([`Problem::block_counts`]); `None`: all of them.
    pub blocks: Option<&'a [bool]>,
    /// The bias, where the problem's layout of it says.
    pub bias: Option<&'a [f32]>,
    /// The boolean mask, likewise.
    pub mask: Option<&'a [bool]>,
    /// ALiBi's slopes, `[heads_q]` or `[batch, heads_q]`.
    pub alibi_slopes: Option<&'a [f32]>,
    /// The sinks, `[heads_q]`.
    pub sinks: Option<&'a [f32]>,
    /// What the buffers of the problem's mods hold, by name: f32, i32 or u32, four bytes each, the lowest first.
    pub mod_buffers: &'a [(String, Vec<u8>)],
}

impl<'a> From<Option<&'a [i32]>> for Extras<'a> {
    fn from(seqlens_k: Option<&'a [i32]>) -> Self {
        Extras { seqlens_k, ..Default::default() }
    }
}

/// Each method sets the field of its name.
impl<'a> Extras<'a> {
    /// Valid queries, `[batch]`.
    pub fn seqlens_q(mut self, seqlens_q: impl Into<Option<&'a [i32]>>) -> Self {
        self.seqlens_q = seqlens_q.into();
        self
    }

    /// Valid keys, `[batch]`.
    pub fn seqlens_k(mut self, seqlens_k: impl Into<Option<&'a [i32]>>) -> Self {
        self.seqlens_k = seqlens_k.into();
        self
    }

    /// Dropout: probability, seed and offset. The problem's probability is not looked at.
    pub fn dropout(mut self, dropout: impl Into<Option<Dropout>>) -> Self {
        self.dropout = dropout.into();
        self
    }

    /// Which blocks are listed, `[B|1, Hq|1, R, C]`.
    pub fn blocks(mut self, blocks: impl Into<Option<&'a [bool]>>) -> Self {
        self.blocks = blocks.into();
        self
    }

    /// Whether the block of query i and key j is listed, for batch entry b and query head h.
    pub(super) fn is_listed(&self, problem: &Problem, [b, h, i, j]: [u32; 4]) -> bool {
        let (Some(lists), Some(listed)) = (problem.blocks, self.blocks) else {
            return true;
        };
        let [_, heads, down, across] = problem.block_counts().map(|n| n as usize);
        let b = if lists.per_batch { b as usize } else { 0 };
        let h = if lists.per_head { h as usize } else { 0 };
        listed[((b * heads + h) * down + (i / lists.queries) as usize) * across + (j / lists.keys) as usize]
    }

    /// The bias.
    pub fn bias(mut self, bias: impl Into<Option<&'a [f32]>>) -> Self {
        self.bias = bias.into();
        self
    }

    /// The boolean mask.
    pub fn mask(mut self, mask: impl Into<Option<&'a [bool]>>) -> Self {
        self.mask = mask.into();
        self
    }

    /// ALiBi's slopes.
    pub fn alibi_slopes(mut self, alibi_slopes: impl Into<Option<&'a [f32]>>) -> Self {
        self.alibi_slopes = alibi_slopes.into();
        self
    }

    /// The sinks.
    pub fn sinks(mut self, sinks: impl Into<Option<&'a [f32]>>) -> Self {
        self.sinks = sinks.into();
        self
    }

    /// The buffers of the problem's mods.
    pub fn mod_buffers(mut self, mod_buffers: &'a [(String, Vec<u8>)]) -> Self {
        self.mod_buffers = mod_buffers;
        self
    }

    /// The valid queries and keys of a batch entry; lengths past the ends act as the ends.
    pub fn lengths(&self, problem: &Problem, b: u32) -> (u32, u32) {
        let valid = |lengths: Option<&[i32]>, all: u32| {
            lengths.map_or(all, |lengths| lengths[b as usize].clamp(0, all as i32) as u32)
        };
        (valid(self.seqlens_q, problem.shape.seqlen_q), valid(self.seqlens_k, problem.shape.seqlen_k))
    }
}
