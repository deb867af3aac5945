//! Host side of `shaders/kernel/naive_backward_*.wgsl`.

use super::{
    Access, Part, Pass, Slot, backward_switches, bindings, by_pair, score_bindings, without_blocks, without_dropout,
};
use crate::Problem;
use crate::specialize::Specialization;

/// Bytes of the probabilities and the score gradients of a part.
pub(crate) fn workspace_bytes(problem: &Problem, part: &Part) -> u64 {
    super::naive::workspace_bytes(problem, part).saturating_mul(2)
}

pub(crate) fn passes(problem: &Problem) -> Vec<Pass> {
    let shape = problem.shape;
    let (group, seqlen_k) = (shape.group() as u64, shape.seqlen_k as u64);
    let [head_dim, head_dim_v] = [shape.head_dim, shape.head_dim_v].map(u64::from);
    let pass = |file, entry, used: &[(Slot, Access)], workgroups| {
        let on = backward_switches(problem, 4);
        let (switches, bindings) = match entry {
            "scores_of" => (by_pair(on), score_bindings(problem, used)),
            _ => {
                let mut used = bindings(problem, used);
                // The second and the third kernel read only lengths from the workspace, so they bind it only if there are any.
                used.retain(|&(slot, _)| slot != Slot::Workspace || problem.has_lengths());
                (without_blocks(without_dropout(on)), used)
            }
        };
        let constants = vec![("HEAD_DIM", shape.head_dim), ("HEAD_DIM_V", shape.head_dim_v)];
        Pass::new(Specialization { file, entry, switches, constants }, bindings, 256, 0, workgroups)
    };
    let heads = |part: &Part| part.batch_count() * part.head_count();
    vec![
        pass(
            "kernel/naive_backward_scores.wgsl",
            "scores_of",
            &[
                (Slot::Query, Access::Read),
                (Slot::Key, Access::Read),
                (Slot::Value, Access::Read),
                (Slot::GradOut, Access::Read),
                (Slot::Workspace, Access::ReadWrite),
                (Slot::WorkspaceScores, Access::ReadWrite),
                (Slot::RngState, Access::Read),
            ],
            Box::new(move |part| [seqlen_k.div_ceil(16), part.row_count().div_ceil(16), heads(part)]),
        ),
        pass(
            "kernel/naive_backward_key_value.wgsl",
            "gradients_of",
            &[
                (Slot::Query, Access::Read),
                (Slot::GradOut, Access::Read),
                (Slot::Workspace, Access::Read),
                (Slot::WorkspaceScores, Access::Read),
                (Slot::GradKey, Access::ReadWrite),
                (Slot::GradValue, Access::ReadWrite),
            ],
            Box::new(move |part| [head_dim.max(head_dim_v).div_ceil(64), seqlen_k.div_ceil(16), heads(part) / group]),
        ),
        pass(
            "kernel/naive_backward_query.wgsl",
            "gradient_of",
            &[
                (Slot::Key, Access::Read),
                (Slot::Workspace, Access::Read),
                (Slot::WorkspaceScores, Access::Read),
                (Slot::GradQuery, Access::ReadWrite),
            ],
            Box::new(move |part| [head_dim.div_ceil(64), part.row_count().div_ceil(16), heads(part)]),
        ),
    ]
}
