//! The numbers a launch is told: `struct Problem` of `shaders/attention/problem.wgsl`.

use crate::{Alibi, Causal, Problem, ScoreLayout, dropout};

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct TensorUniform {
    pub base: u32,
    pub batch: u32,
    pub head: u32,
    pub row: u32,
}

impl TensorUniform {
    /// What has been counted from the first batch entry, head and row of a part, counted from those of the problem. The sum wraps in
    /// the shader as it does here.
    pub(crate) fn counted_from(self, [batch, head, row]: [u32; 3]) -> Self {
        let before = [batch.wrapping_mul(self.batch), head.wrapping_mul(self.head), row.wrapping_mul(self.row)];
        TensorUniform { base: before.into_iter().fold(self.base, u32::wrapping_sub), ..self }
    }
}

/// How block lists lie in their buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct BlocksUniform {
    pub queries: u32,
    pub keys: u32,
    pub batch: u32,
    pub head: u32,
    pub down: u32,
    pub across: u32,
    pub entries: u32,
    pub columns: u32,
}

impl BlocksUniform {
    fn of(problem: &Problem) -> Self {
        let (Some(lists), Some(packing)) = (problem.blocks, problem.packing()) else {
            return BlocksUniform::default();
        };
        let [batch, head] = packing.strides(&lists);
        BlocksUniform {
            queries: lists.queries,
            keys: lists.keys,
            batch,
            head,
            down: packing.down,
            across: packing.across,
            // A buffer so large that this is cut off exceeds every binding.
            entries: packing.entries as u32,
            columns: packing.columns,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct ProblemUniform {
    pub query: TensorUniform,
    pub key: TensorUniform,
    pub value: TensorUniform,
    pub out: TensorUniform,
    pub lse: TensorUniform,
    pub grad_out: TensorUniform,
    pub grad_query: TensorUniform,
    pub grad_key: TensorUniform,
    pub grad_value: TensorUniform,
    pub rows: TensorUniform,
    pub blocks: BlocksUniform,
    pub bias: TensorUniform,
    pub mask: TensorUniform,
    pub seqlen_q: u32,
    pub seqlen_k: u32,
    pub row_begin: u32,
    pub row_end: u32,
    pub batch_begin: u32,
    pub head_begin: u32,
    pub heads: u32,
    pub batches: u32,
    pub group: u32,
    pub window_left: i32,
    pub window_right: i32,
    pub top_left: i32,
    pub scale: f32,
    pub softcap: f32,
    pub splits: u32,
    pub split_rows: u32,
    pub order: u32,
    pub block_keys: u32,
    pub block_rows: u32,
    pub round: u32,
    pub lengths_at: u32,
    pub ranges_at: u32,
    pub bias_column: u32,
    pub mask_column: u32,
    pub slopes_batch: u32,
    pub heads_q: u32,
    pub dropout_last: u32,
    pub dropout_scale: f32,
}

/// An open side of a window: past every key, and far enough from the ends of i32 that adding a position cannot wrap.
const OPEN: i32 = 1 << 30;

/// The bits of [`ProblemUniform::order`], as `in_order` in `shaders/attention/sequence.wgsl` takes them.
pub(crate) const TILES_LAST: u32 = 1;
pub(crate) const HEADS_ABREAST: u32 = 2;
pub(crate) const BATCHES_ABREAST: u32 = 4;

/// In which order workgroups start.
fn order(problem: &Problem) -> u32 {
    let given: Vec<_> = [problem.bias.map(|bias| bias.layout), problem.mask].into_iter().flatten().collect();
    // What has one row for all queries is small, and stays in the cache.
    let shared = |stride: fn(&ScoreLayout) -> u64| given.iter().any(|layout| layout.row > 0 && stride(layout) == 0);
    [
        (problem.rows_grow(), TILES_LAST),
        (shared(|layout| layout.head), HEADS_ABREAST),
        (shared(|layout| layout.batch), BATCHES_ABREAST),
    ]
    .iter()
    .filter_map(|&(set, bit)| set.then_some(bit))
    .sum()
}

impl ProblemUniform {
    /// The fields that are the same for every launch of a problem.
    pub(crate) fn of(problem: &Problem) -> Self {
        let side = |width: Option<u32>| width.map_or(OPEN, |w| w.min(OPEN as u32) as i32);
        let right = side(problem.window_right);
        ProblemUniform {
            blocks: BlocksUniform::of(problem),
            seqlen_q: problem.shape.seqlen_q,
            seqlen_k: problem.shape.seqlen_k,
            group: problem.shape.group(),
            window_left: side(problem.window_left),
            window_right: if problem.causal == Some(Causal::BottomRight) { 0 } else { right },
            top_left: if problem.causal == Some(Causal::TopLeft) { 0 } else { OPEN },
            scale: problem.effective_scale(),
            softcap: problem.softcap.unwrap_or(0.0),
            order: order(problem),
            heads_q: problem.shape.heads_q,
            dropout_last: problem.dropout.map_or(u32::MAX, dropout::last_word_kept),
            dropout_scale: problem.dropout.map_or(1.0, dropout::scale),
            slopes_batch: if problem.alibi == Some(Alibi::PerBatchAndHead) { problem.shape.heads_q } else { 0 },
            ..Default::default()
        }
    }
}
