//! Host side of `shaders/kernel/backward_delta.wgsl`.

use super::{
    Access, Part, Pass, Slot, backward_switches, bindings, forward_coop_scaled, without_blocks, without_dropout,
};
use crate::Problem;
use crate::specialize::Specialization;

/// Bytes of the pairs of lse and delta and, behind them, of the numbers of queries and keys of each batch entry, and of what
/// `coop_ranges.wgsl` finds out about each head.
pub(crate) fn workspace_bytes(problem: &Problem, part: &Part, has_ranges: bool) -> u64 {
    let behind = match has_ranges {
        true => forward_coop_scaled::workspace_bytes(problem, part),
        false => part.length_count(problem).saturating_mul(8),
    };
    // Gradients of sinks and slopes are written where there is no row, too.
    part.rows_of_heads().saturating_mul(8).saturating_add(behind).max(if problem.has_head_gradients() { 8 } else { 0 })
}

/// With `clear`, the gradient of queries is set to 0.
pub(crate) fn pass(problem: &Problem, clear: bool) -> Pass {
    const THREADS: u32 = 256;
    const ROW_THREADS: u32 = 16;
    const ROWS: u64 = (THREADS / ROW_THREADS) as u64;
    let mut on = without_blocks(without_dropout(backward_switches(problem, 4)));
    // Here they come from their own buffers.
    on.retain(|&name| name != "LENGTHS_IN_ROWS");
    on.extend(problem.has_lengths().then_some("LENGTHS"));
    on.extend(problem.seqlens_q.then_some("SEQLENS_Q"));
    on.extend(problem.seqlens_k.then_some("SEQLENS_K"));
    if problem.gradients.is_some_and(|gradients| gradients.lse) {
        on.push("GRAD_LSE");
    }
    let mut used = vec![
        (Slot::Out, Access::Read),
        (Slot::GradOut, Access::Read),
        (Slot::Lse, Access::Read),
        (Slot::GradLse, Access::Read),
        (Slot::SeqlensQ, Access::Read),
        (Slot::SeqlensK, Access::Read),
        (Slot::Workspace, Access::ReadWrite),
    ];
    let mut constants =
        vec![("HEAD_DIM_V", problem.shape.head_dim_v), ("THREADS", THREADS), ("ROW_THREADS", ROW_THREADS)];
    if clear {
        constants.push(("HEAD_DIM", problem.shape.head_dim));
        on.push("CLEAR");
        used.push((Slot::GradQuery, Access::ReadWrite));
    }
    Pass::new(
        Specialization { file: "kernel/backward_delta.wgsl", entry: "delta", switches: on, constants },
        bindings(problem, &used),
        THREADS,
        4 * THREADS,
        Box::new(|part: &Part| [part.row_count().div_ceil(ROWS), part.head_count(), part.batch_count()]),
    )
}
