//! Host side of `shaders/kernel/backward_dkdv_tile.wgsl` and `shaders/kernel/backward_dq_tile.wgsl`.

use super::{Access, Part, Pass, Slot, Workgroups, backward_switches, dropout_bytes, score_bindings};
use crate::specialize::Specialization;
use crate::tune::BackwardTile;
use crate::{ElementType, Problem};

/// What the gradients of keys and values bind, on any kernel, besides what they ask about scores.
pub(crate) const DKDV_BINDINGS: &[(Slot, Access)] = &[
    (Slot::Query, Access::Read),
    (Slot::Key, Access::Read),
    (Slot::Value, Access::Read),
    (Slot::Workspace, Access::Read),
    (Slot::GradOut, Access::Read),
    (Slot::GradKey, Access::ReadWrite),
    (Slot::GradValue, Access::ReadWrite),
    (Slot::RngState, Access::Read),
];

/// What the gradient of queries binds, on any kernel, besides what it asks about scores.
pub(crate) const DQ_BINDINGS: &[(Slot, Access)] = &[
    (Slot::Query, Access::Read),
    (Slot::Key, Access::Read),
    (Slot::Value, Access::Read),
    (Slot::Workspace, Access::Read),
    (Slot::GradOut, Access::Read),
    (Slot::GradQuery, Access::ReadWrite),
    (Slot::RngState, Access::Read),
];

/// Workgroups of a kernel that owns so many keys, and of one that owns so many rows.
pub(crate) fn workgroups_by_keys(problem: &Problem, own: u32) -> Workgroups {
    let (seqlen_k, group) = (problem.shape.seqlen_k, problem.shape.group() as u64);
    Box::new(move |part: &Part| [seqlen_k.div_ceil(own).into(), part.head_count() / group, part.batch_count()])
}

pub(crate) fn workgroups_by_rows(own: u32) -> Workgroups {
    Box::new(move |part: &Part| [part.row_count().div_ceil(own as u64), part.head_count(), part.batch_count()])
}

/// Whether each step has sums of its own, in f32. One sum over n rows that are alike has a relative error of about 8e-9 · n: 3e-5 at
/// 4,096, where f32 promises 5e-6. The sums take as many registers again as the gradients. On an H200 they cost less than 1 % where a
/// thread has up to 32 registers for a gradient, and 11 % with 64 (a head dim of 256).
fn has_step_sums(problem: &Problem, tile: BackwardTile) -> bool {
    let widest = problem.shape.head_dim.max(problem.shape.head_dim_v);
    let registers = tile.own * widest.next_multiple_of(4 * tile.threads_x) / tile.threads();
    problem.element_type == ElementType::F32 && registers <= 32
}

/// Workgroup memory that dropout takes in each of the two kernels.
pub(crate) fn dropout_bytes_of(problem: &Problem, dkdv: BackwardTile, dq: BackwardTile) -> [u32; 2] {
    [dropout_bytes(problem, dkdv.step, dkdv.own, dkdv.threads()), dropout_bytes(problem, dq.own, dq.step, dq.threads())]
}

/// The constants of a kernel with `tile/products.wgsl`.
pub(crate) fn constants(problem: &Problem, tile: BackwardTile) -> Vec<(&'static str, u32)> {
    vec![
        ("HEAD_DIM", problem.shape.head_dim),
        ("HEAD_DIM_V", problem.shape.head_dim_v),
        ("OWN", tile.own),
        ("STEP", tile.step),
        ("THREADS_Y", tile.threads_y),
        ("THREADS_X", tile.threads_x),
        ("CHUNK", tile.chunk),
        ("BLOCK", tile.block),
        // Trips of the loops that are written out.
        ("CHUNK4", tile.chunk / 4),
        ("BLOCK4", tile.block / 4),
    ]
}

pub(crate) fn passes(problem: &Problem, dkdv: BackwardTile, dq: BackwardTile) -> Vec<Pass> {
    let shape = problem.shape;
    let of_dropout = dropout_bytes_of(problem, dkdv, dq);
    let pass = |file, entry, tile: BackwardTile, used, dropout_bytes, workgroups| {
        let mut on = backward_switches(problem, 4);
        if tile.written_out {
            on.push("UNROLL");
        }
        on.extend(has_step_sums(problem, tile).then_some("STEP_SUMS"));
        Pass::new(
            Specialization { file, entry, switches: on, constants: constants(problem, tile) },
            score_bindings(problem, used),
            tile.threads(),
            tile.workgroup_bytes(shape.head_dim, shape.head_dim_v) + dropout_bytes,
            workgroups,
        )
    };
    vec![
        pass(
            "kernel/backward_dkdv_tile.wgsl",
            "dkdv",
            dkdv,
            DKDV_BINDINGS,
            of_dropout[0],
            workgroups_by_keys(problem, dkdv.own),
        ),
        pass("kernel/backward_dq_tile.wgsl", "dq", dq, DQ_BINDINGS, of_dropout[1], workgroups_by_rows(dq.own)),
    ]
}
