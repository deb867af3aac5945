//! Host side of `shaders/kernel/backward_scores_tile.wgsl` and of `shaders/kernel/backward_heads.wgsl`, which run after the kernels for dq, dk
//! and dv: the gradients of the bias, of ALiBi's slopes and of the sinks.

use super::{
    Access, Part, Pass, Slot, backward_switches, backward_tile, bindings, by_pair, dropout_bytes, score_bindings,
};
use crate::problem::{Alibi, ScoreLayout};
use crate::specialize::Specialization;
use crate::tune::BackwardTile;
use crate::{ElementType, Problem};

pub(crate) const HEAD_THREADS: u32 = 256;

/// What the gradients of single scores are made of, besides the workspace.
pub(crate) const TILE_INPUTS: [(Slot, Access); 5] = [
    (Slot::Query, Access::Read),
    (Slot::Key, Access::Read),
    (Slot::Value, Access::Read),
    (Slot::GradOut, Access::Read),
    (Slot::RngState, Access::Read),
];

/// Bytes of the sums of rows that the gradient of slopes is made of.
pub(crate) fn row_sums_bytes(part: &Part) -> u64 {
    // Without queries the sum of none is still a gradient to write.
    part.rows_of_heads().saturating_mul(4).max(4)
}

/// What batch entries, heads, rows and keys share an element of the bias.
pub(crate) fn shared(problem: &Problem, layout: &ScoreLayout) -> [bool; 4] {
    let s = &problem.shape;
    let all = [s.batch, s.heads_q, s.seqlen_q, s.seqlen_k];
    let sizes = layout.sizes_in(s);
    [0, 1, 2, 3].map(|n| sizes[n] != all[n])
}

/// How many workgroups sum over so many tiles, heads or batch entries: one, where these share elements of the result.
pub(crate) const fn owners(shared: bool, count: u64) -> u64 {
    if shared { 1 } else { count }
}

/// The passes of all gradients besides dq, dk and dv that the problem asks for. `on_matrices` is that of the bias, where it is not in tiles.
pub(crate) fn passes(problem: &Problem, tile: BackwardTile, on_matrices: Option<Pass>) -> Vec<Pass> {
    let Some(gradients) = problem.gradients else { return vec![] };
    let mut passes = vec![];
    if let Some(bias) = problem.bias.filter(|_| gradients.bias) {
        passes.push(on_matrices.unwrap_or_else(|| tiles(problem, tile, Some(&bias.layout))));
    }
    if gradients.sinks {
        passes.push(heads(problem, true));
    }
    if gradients.alibi_slopes {
        passes.extend([tiles(problem, tile, None), heads(problem, false)]);
    }
    passes
}

/// Of the bias that lies so, or of the slopes.
fn tiles(problem: &Problem, tile: BackwardTile, bias: Option<&ScoreLayout>) -> Pass {
    let shape = problem.shape;
    // A row of a head sums over its keys, as a bias does that has one key.
    let shared = bias.map_or([false, false, false, true], |layout| shared(problem, layout));
    let mut on = by_pair(backward_switches(problem, 4));
    on.extend(tile.written_out.then_some("UNROLL"));
    on.extend(bias.map(|_| "GRAD_BIAS"));
    on.extend(problem.bias.is_some_and(|bias| bias.element_type == ElementType::F32).then_some("BIAS_WORDS"));
    let mut constants = backward_tile::constants(problem, tile);
    let names = ["SHARED_BATCH", "SHARED_HEADS", "SHARED_ROWS", "SHARED_KEYS"];
    constants.extend(names.into_iter().zip(shared.map(u32::from)));
    let workspace = if bias.is_some() { Access::Read } else { Access::ReadWrite };
    let mut used = TILE_INPUTS.to_vec();
    used.push((Slot::Workspace, workspace));
    used.push((if bias.is_some() { Slot::GradBias } else { Slot::WorkspaceRowSums }, Access::ReadWrite));
    Pass::new(
        Specialization { file: "kernel/backward_scores_tile.wgsl", entry: "scores", switches: on, constants },
        score_bindings(problem, &used),
        tile.threads(),
        tile.workgroup_bytes(shape.head_dim, shape.head_dim_v)
            + dropout_bytes(problem, tile.own, tile.step, tile.threads())
            // Whether a tile may count.
            + 4,
        Box::new(move |part: &Part| {
            [
                owners(shared[3], shape.seqlen_k.div_ceil(tile.step).into()),
                owners(shared[2], part.row_count().div_ceil(tile.own.into())),
                owners(shared[0], part.batch_count()) * owners(shared[1], part.head_count()),
            ]
        }),
    )
}

/// Of the sinks, or of the slopes.
fn heads(problem: &Problem, sinks: bool) -> Pass {
    let per_batch = !sinks && problem.alibi == Some(Alibi::PerBatchAndHead);
    let of_rows = |name: &&str| ["LENGTHS_IN_ROWS", "QUERY_LENGTHS", "ACCUMULATE"].contains(name);
    let mut on: Vec<_> = backward_switches(problem, 4).into_iter().filter(of_rows).collect();
    on.extend(per_batch.then_some("PER_BATCH"));
    let used: &[_] = if sinks {
        on.extend(["OF_SINKS", "SINKS"]);
        &[(Slot::Sinks, Access::Read), (Slot::Workspace, Access::Read), (Slot::GradSinks, Access::ReadWrite)]
    } else {
        &[
            (Slot::Workspace, Access::ReadWrite),
            (Slot::WorkspaceRowSums, Access::ReadWrite),
            (Slot::GradAlibiSlopes, Access::ReadWrite),
        ]
    };
    let mut used = bindings(problem, used);
    // For the lengths alone.
    used.retain(|&(slot, _)| sinks || slot != Slot::Workspace || problem.has_lengths());
    Pass::new(
        Specialization {
            file: "kernel/backward_heads.wgsl",
            entry: "heads",
            switches: on,
            constants: vec![("THREADS", HEAD_THREADS)],
        },
        used,
        HEAD_THREADS,
        4 * HEAD_THREADS,
        Box::new(move |part: &Part| [part.head_count(), if per_batch { part.batch_count() } else { 1 }, 1]),
    )
}
