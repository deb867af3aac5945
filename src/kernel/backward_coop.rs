//! Host side of `shaders/kernel/backward_dkdv_coop.wgsl` and `shaders/kernel/backward_dq_coop.wgsl`, of those through workgroup memory,
//! `shaders/kernel/backward_dkdv_coop_workgroup.wgsl` and `shaders/kernel/backward_dq_coop_workgroup.wgsl`, and of those for f32 and
//! bf16, `shaders/kernel/backward_dkdv_coop_scaled.wgsl` and `shaders/kernel/backward_dq_coop_scaled.wgsl`.

use super::backward_tile::{DKDV_BINDINGS, DQ_BINDINGS, workgroups_by_keys, workgroups_by_rows};
use super::forward_coop::{bias_switches, layout_constants, workgroup_switches};
use super::forward_coop_scaled::{self, parts};
use super::{Access, Part, Pass, Slot, backward_switches, score_bindings};
use crate::matrices::{MatrixFormat, MatrixLayout, Operands};
use crate::problem::Tensor;
use crate::specialize::Specialization;
use crate::tune::CoopBackwardTile;
use crate::{CoopForm, Problem};

/// Whether bf16 is moved four elements at a time only. Modules with matrices cannot have the atomics that `write.wgsl` stores
/// single ones with: see `forward_coop_scaled.wgsl`.
pub(crate) fn bf16_in_vectors(problem: &Problem) -> bool {
    problem.is_aligned(&Tensor::BACKWARD, 4)
}

/// The switches of a kernel that moves `vector` elements at a time, on matrices of this size.
fn switches(
    problem: &Problem,
    vector: u32,
    size: u32,
    tile: CoopBackwardTile,
    operands: Operands,
) -> Vec<&'static str> {
    let mut on = backward_switches(problem, vector);
    on.extend(operands.switches());
    on.extend((size == 16).then_some("MATRIX16"));
    on.extend(tile.ahead.then_some("AHEAD"));
    on
}

/// Left to itself a driver keeps the loop over the calls of the random numbers that a lane makes, and their bytes in memory.
fn dropout_switches(problem: &Problem) -> Option<&'static str> {
    problem.dropout_in_use().map(|_| "UNROLL")
}

/// The gradients of keys and values, then that of queries, of elements that are made f16. These kernels have one form.
pub(crate) fn scaled_passes(
    problem: &Problem,
    [dkdv, dq]: [CoopBackwardTile; 2],
    format: MatrixFormat,
    layout: &MatrixLayout,
    f16: Operands,
) -> Vec<Pass> {
    let shape = problem.shape;
    let parts = parts(problem.element_type);
    let size = format.size;
    let pass =
        |file, entry, tile: CoopBackwardTile, used: &[(Slot, Access)], workgroup_bytes, workgroups, by_rows: bool| {
            let mut switches = switches(problem, 4, size, tile, f16);
            switches.push("GRADIENTS");
            switches.extend(dropout_switches(problem));
            switches.extend(by_rows.then_some("BY_ROWS"));
            let mut constants = vec![
                ("PARTS", parts),
                ("HEAD_DIM", shape.head_dim),
                ("HEAD_DIM_V", shape.head_dim_v),
                ("SUBGROUPS", tile.subgroups),
                ("MATRICES", tile.matrices),
                ("STEP", tile.step),
            ];
            constants.extend(layout_constants(layout));
            Pass::new(
                Specialization { file, entry, switches, constants },
                score_bindings(problem, used),
                tile.subgroups * format.lanes,
                workgroup_bytes,
                workgroups,
            )
            .with_element_access(true)
        };
    // What finds out about each head, then the kernels for most of them, and those for heads whose numbers are far apart.
    let mut passes = Vec::from(forward_coop_scaled::ranges(problem, true));
    passes.extend([false, true].into_iter().flat_map(|by_rows| {
        [
            pass(
                "kernel/backward_dkdv_coop_scaled.wgsl",
                "dkdv",
                dkdv,
                DKDV_BINDINGS,
                dkdv.scaled_dkdv_bytes(size, parts, shape.head_dim, shape.head_dim_v),
                workgroups_by_keys(problem, dkdv.scaled_own(size)),
                by_rows,
            ),
            pass(
                "kernel/backward_dq_coop_scaled.wgsl",
                "dq",
                dq,
                DQ_BINDINGS,
                dq.scaled_dq_bytes(size, parts, shape.head_dim, shape.head_dim_v),
                workgroups_by_rows(dq.scaled_own(size)),
                by_rows,
            ),
        ]
    }));
    passes
}

/// The gradients of keys and values, then that of queries, of elements that are operands of the matrices as they are.
pub(crate) fn passes(
    problem: &Problem,
    form: CoopForm,
    [dkdv, dq]: [CoopBackwardTile; 2],
    format: MatrixFormat,
    layout: &MatrixLayout,
    operands: Operands,
) -> Vec<Pass> {
    let shape = problem.shape;
    let group = shape.group() as u64;
    let size = format.size;
    let specialization = |[registers, workgroup]: [_; 2], entry, names: [_; 2], tile: CoopBackwardTile| {
        let mut switches = switches(problem, 8, size, tile, operands);
        let mut constants = vec![
            ("HEAD_DIM", shape.head_dim),
            ("HEAD_DIM_V", shape.head_dim_v),
            ("SUBGROUPS", tile.subgroups),
            (names[0], tile.matrices),
            (names[1], tile.step),
            ("COLUMNS", tile.columns),
        ];
        constants.extend(layout_constants(layout));
        let file = match form {
            CoopForm::Registers => {
                // Only this kernel has V for the whole loop.
                if entry == "dkdv" && tile.holds_value(shape.head_dim, shape.head_dim_v) {
                    switches.push("HOLD_VALUE");
                }
                switches.extend(dropout_switches(problem));
                switches.extend(bias_switches(problem, operands));
                registers
            }
            CoopForm::WorkgroupMemory => {
                switches.extend(workgroup_switches(size));
                let matrices = |dim: u32| dim.div_ceil(size);
                constants.extend([
                    // Matrices across the step, the head dimension, the values' dimension, and a block of each.
                    ("ACROSS_STEP", tile.step / size),
                    ("ACROSS_DIM", matrices(shape.head_dim)),
                    ("ACROSS_DIM_V", matrices(shape.head_dim_v)),
                    ("ACROSS_DIM_BLOCK", matrices(shape.head_dim.min(tile.columns))),
                    ("ACROSS_DIM_V_BLOCK", matrices(shape.head_dim_v.min(tile.columns))),
                ]);
                workgroup
            }
        };
        Specialization { file, entry, switches, constants }
    };
    let of_keys = move |part: &Part| {
        let tiles = shape.seqlen_k.div_ceil(dkdv.own(size)) as u64;
        let blocks = dkdv.blocks(shape.head_dim.max(shape.head_dim_v)) as u64;
        [tiles * blocks, part.head_count() / group, part.batch_count()]
    };
    let of_rows = move |part: &Part| {
        let tiles = part.row_count().div_ceil(dq.own(size) as u64);
        [tiles * dq.blocks(shape.head_dim) as u64, part.head_count(), part.batch_count()]
    };
    vec![
        Pass::new(
            specialization(
                ["kernel/backward_dkdv_coop.wgsl", "kernel/backward_dkdv_coop_workgroup.wgsl"],
                "dkdv",
                ["KEY_MATRICES", "ROWS"],
                dkdv,
            ),
            score_bindings(problem, DKDV_BINDINGS),
            dkdv.subgroups * format.lanes,
            dkdv.dkdv_bytes(form, size, shape.head_dim, shape.head_dim_v),
            Box::new(of_keys),
        )
        .with_element_access(form == CoopForm::Registers),
        Pass::new(
            specialization(
                ["kernel/backward_dq_coop.wgsl", "kernel/backward_dq_coop_workgroup.wgsl"],
                "dq",
                ["ROW_MATRICES", "KEYS"],
                dq,
            ),
            score_bindings(problem, DQ_BINDINGS),
            dq.subgroups * format.lanes,
            dq.dq_bytes(form, size, shape.head_dim, shape.head_dim_v),
            Box::new(of_rows),
        )
        .with_element_access(form == CoopForm::Registers),
    ]
}
