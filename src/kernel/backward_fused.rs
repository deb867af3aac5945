//! Host side of `shaders/kernel/backward_fused_tile.wgsl`.

use super::backward_tile::{DKDV_BINDINGS, workgroups_by_keys};
use super::{Access, Pass, Rounds, Slot, backward_delta, backward_switches, dropout_bytes, score_bindings};
use crate::Problem;
use crate::specialize::Specialization;
use crate::tune::FusedTile;

/// How many rows gradients of keys and values are summed over in registers before they are added to memory. Where gradients are
/// alike, one f32 sum over n rows has a relative error of about 8e-9 · n: 3e-6 here, where f32 promises 5e-6.
const ROWS_OF_ONE_SUM: u32 = 384;

/// Deltas, dQ being set to 0 unless it is to be added to, and the kernel.
pub(crate) fn passes(problem: &Problem, tile: FusedTile) -> Vec<Pass> {
    let accumulate = problem.gradients.is_some_and(|gradients| gradients.accumulate);
    vec![backward_delta::pass(problem, !accumulate), pass(problem, tile, accumulate)]
}

fn pass(problem: &Problem, tile: FusedTile, accumulate: bool) -> Pass {
    let shape = problem.shape;
    let mut on = backward_switches(problem, 4);
    // It adds to memory by itself, if only from the second round on.
    on.retain(|&name| name != "ACCUMULATE");
    on.push("UNROLL");
    on.extend(accumulate.then_some("ADD_AT_FIRST"));
    if tile.written_out {
        on.extend(["WRITTEN_OUT", "SERPENTINE"]);
    }
    Pass::new(
        Specialization {
            file: "kernel/backward_fused_tile.wgsl",
            entry: "fused",
            switches: on,
            constants: vec![
                ("HEAD_DIM", shape.head_dim),
                ("HEAD_DIM_V", shape.head_dim_v),
                ("OWN", tile.own),
                ("STEP", tile.step),
                ("FOLD_ROWS", (ROWS_OF_ONE_SUM / tile.step).max(1) * tile.step),
                ("THREADS_Y", tile.threads_y),
                ("THREADS_X", tile.threads_x),
                ("CHUNK4", tile.chunk / 4),
                ("ROW_PIECES", tile.step / (4 * tile.threads_x)),
                // Trips of the loops that are written out.
                ("CHUNK", tile.chunk),
                ("LINES", tile.lines),
                ("KEY_PIECES", tile.own / (4 * tile.threads_y)),
            ],
        },
        score_bindings(problem, &[DKDV_BINDINGS, &[(Slot::GradQuery, Access::ReadWrite)]].concat()),
        tile.threads(),
        tile.workgroup_bytes(shape.head_dim, shape.head_dim_v)
            + dropout_bytes(problem, tile.step, tile.own, tile.threads()),
        workgroups_by_keys(problem, tile.block_keys),
    )
    .with_rounds(Rounds {
        block_keys: tile.block_keys,
        block_rows: tile.block_rows,
        count: tile.rounds(shape.seqlen_q, shape.seqlen_k),
    })
}
