//! Host side of `shaders/kernel/naive_*.wgsl`.

use super::{
    Access, Part, Pass, Slot, bindings, by_pair, score_bindings, switches, without_blocks, without_dropout,
    without_scores,
};
use crate::Problem;
use crate::specialize::Specialization;

/// The most queries and keys of a sequence with which plans for both passes take this kernel.
const SHORT: u32 = 16;

/// Whether sequences are so short that the tiles of other kernels are nearly empty. Scores then take at most 64 bytes a row, twice
/// that in the backward pass. On software Vulkan 7,000 sequences of one query and two keys take 146 ms backward, and the tile kernel
/// 5,720 ms.
pub(crate) fn suits(problem: &Problem) -> bool {
    let s = &problem.shape;
    problem.gradients.is_some() && (1..=SHORT).contains(&s.seqlen_q) && (1..=SHORT).contains(&s.seqlen_k)
}

/// Bytes of the scores of a part.
pub(crate) fn workspace_bytes(problem: &Problem, part: &Part) -> u64 {
    part.rows_of_heads().saturating_mul(problem.shape.seqlen_k as u64).saturating_mul(4).max(4)
}

pub(crate) fn passes(problem: &Problem) -> Vec<Pass> {
    let shape = problem.shape;
    let (seqlen_k, head_dim_v) = (shape.seqlen_k as u64, shape.head_dim_v as u64);
    let pass = |file, entry, constants, used: &[(Slot, Access)], threads, workgroup_bytes, workgroups| {
        let on = switches(problem, 4);
        // The first kernel asks of every pair whether it counts.
        let (switches, bindings) = match entry {
            "scores_of" => (by_pair(without_dropout(on)), score_bindings(problem, used)),
            "softmax" => (without_scores(on), bindings(problem, used)),
            _ => (without_blocks(without_dropout(on)), bindings(problem, used)),
        };
        let specialization = Specialization { file, entry, switches, constants };
        Pass::new(specialization, bindings, threads, workgroup_bytes, workgroups)
    };
    let heads = |part: &Part| part.batch_count() * part.head_count();
    vec![
        pass(
            "kernel/naive_scores.wgsl",
            "scores_of",
            vec![("HEAD_DIM", shape.head_dim)],
            &[
                (Slot::Query, Access::Read),
                (Slot::Key, Access::Read),
                (Slot::SeqlensQ, Access::Read),
                (Slot::SeqlensK, Access::Read),
                (Slot::Workspace, Access::ReadWrite),
            ],
            256,
            0,
            Box::new(move |part| [seqlen_k.div_ceil(16), part.row_count().div_ceil(16), heads(part)]),
        ),
        pass(
            "kernel/naive_softmax.wgsl",
            "softmax",
            vec![],
            &[
                (Slot::Lse, Access::ReadWrite),
                (Slot::Sinks, Access::Read),
                (Slot::RngState, Access::Read),
                (Slot::Workspace, Access::ReadWrite),
            ],
            64,
            256,
            Box::new(move |part| [part.row_count(), 1, heads(part)]),
        ),
        pass(
            "kernel/naive_output.wgsl",
            "output",
            vec![("HEAD_DIM_V", shape.head_dim_v)],
            &[
                (Slot::Value, Access::Read),
                (Slot::Out, Access::ReadWrite),
                (Slot::SeqlensQ, Access::Read),
                (Slot::SeqlensK, Access::Read),
                (Slot::Workspace, Access::Read),
            ],
            256,
            0,
            Box::new(move |part| [head_dim_v.div_ceil(64), part.row_count().div_ceil(16), heads(part)]),
        ),
    ]
}
