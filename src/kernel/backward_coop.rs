//! Host side of `shaders/backward_dkdv_coop.wgsl` and `shaders/backward_dq_coop.wgsl`, and of those for f32 and bf16,
//! `shaders/backward_dkdv_coop_scaled.wgsl` and `shaders/backward_dq_coop_scaled.wgsl`.

use super::backward_tile::{DKDV_BINDINGS, DQ_BINDINGS, workgroups_by_keys, workgroups_by_rows};
use super::forward_coop::layout_constants;
use super::forward_coop_scaled::parts;
use super::{Pass, backward_switches, bindings};
use crate::elements::{MatrixFormat, MatrixLayout};
use crate::problem::Tensor;
use crate::specialize::Specialization;
use crate::tune::{self, CoopBackwardTile};
use crate::{ElementType, Problem, plan::Part};

/// The tiles for a problem, by the size of the device's matrices.
pub(crate) fn tiles(problem: &Problem, size: u32) -> [CoopBackwardTile; 2] {
    let shape = &problem.shape;
    match problem.element_type {
        ElementType::F16 => tune::coop_backward_tiles(size, shape.head_dim, shape.head_dim_v),
        other => tune::coop_scaled_backward_tiles(size, other, shape.head_dim, shape.head_dim_v),
    }
}

/// Why not, if these kernels do not compute the problem. Modules with matrices cannot have the atomics that `write.wgsl`
/// stores single bf16 with: see `forward_coop_scaled.wgsl`.
pub(crate) fn cannot(problem: &Problem) -> Option<&'static str> {
    let single = problem.element_type == ElementType::BF16 && !problem.is_aligned(&Tensor::BACKWARD, 4);
    single.then_some("its backward pass in bf16 takes rows that begin and end at multiples of 4 elements")
}

/// The gradients of keys and values, then that of queries.
pub(crate) fn passes(
    problem: &Problem,
    tiles: [CoopBackwardTile; 2],
    format: MatrixFormat,
    layout: &MatrixLayout,
) -> Vec<Pass> {
    match problem.element_type {
        ElementType::F16 => half_passes(problem, tiles, format, layout),
        ElementType::F32 | ElementType::BF16 => scaled_passes(problem, tiles, format, layout),
    }
}

/// The switches of a kernel that moves `vector` elements at a time, on matrices of this size.
fn switches(problem: &Problem, vector: u32, size: u32, tile: CoopBackwardTile) -> Vec<&'static str> {
    let mut on = backward_switches(problem, vector);
    on.extend((size == 16).then_some("MATRIX16"));
    on.extend(tile.ahead.then_some("AHEAD"));
    on
}

fn scaled_passes(
    problem: &Problem,
    [dkdv, dq]: [CoopBackwardTile; 2],
    format: MatrixFormat,
    layout: &MatrixLayout,
) -> Vec<Pass> {
    let shape = problem.shape;
    let parts = parts(problem.element_type);
    let size = format.size;
    let pass = |file, entry, tile: CoopBackwardTile, used, workgroup_bytes, workgroups| {
        let switches = switches(problem, 4, size, tile);
        let mut constants = vec![
            ("PARTS", parts),
            ("HEAD_DIM", shape.head_dim),
            ("HEAD_DIM_V", shape.head_dim_v),
            ("SUBGROUPS", tile.subgroups),
            ("MATRICES", tile.matrices),
            ("STEP", tile.step),
        ];
        constants.extend(layout_constants(layout));
        Pass {
            specialization: Specialization { file, entry, switches, constants },
            bindings: bindings(problem, used),
            element_access: true,
            threads: tile.subgroups * format.lanes,
            workgroup_bytes,
            workgroups,
        }
    };
    vec![
        pass(
            "backward_dkdv_coop_scaled.wgsl",
            "dkdv",
            dkdv,
            DKDV_BINDINGS,
            dkdv.scaled_dkdv_bytes(size, parts, shape.head_dim, shape.head_dim_v),
            workgroups_by_keys(problem, dkdv.scaled_own(size)),
        ),
        pass(
            "backward_dq_coop_scaled.wgsl",
            "dq",
            dq,
            DQ_BINDINGS,
            dq.scaled_dq_bytes(size, parts, shape.head_dim, shape.head_dim_v),
            workgroups_by_rows(dq.scaled_own(size)),
        ),
    ]
}

fn half_passes(
    problem: &Problem,
    [dkdv, dq]: [CoopBackwardTile; 2],
    format: MatrixFormat,
    layout: &MatrixLayout,
) -> Vec<Pass> {
    let shape = problem.shape;
    let group = shape.group() as u64;
    let size = format.size;
    let specialization = |file, entry, names: [&'static str; 2], tile: CoopBackwardTile| {
        let mut switches = switches(problem, 8, size, tile);
        if file == "backward_dkdv_coop.wgsl" && tile.holds_value(shape.head_dim, shape.head_dim_v) {
            switches.push("HOLD_VALUE");
        }
        let mut constants = vec![
            ("HEAD_DIM", shape.head_dim),
            ("HEAD_DIM_V", shape.head_dim_v),
            ("SUBGROUPS", tile.subgroups),
            (names[0], tile.matrices),
            (names[1], tile.step),
            ("COLUMNS", tile.columns),
        ];
        constants.extend(layout_constants(layout));
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
        Pass {
            specialization: specialization("backward_dkdv_coop.wgsl", "dkdv", ["KEY_MATRICES", "ROWS"], dkdv),
            bindings: bindings(problem, DKDV_BINDINGS),
            element_access: true,
            threads: dkdv.subgroups * format.lanes,
            workgroup_bytes: dkdv.dkdv_bytes(size, shape.head_dim, shape.head_dim_v),
            workgroups: Box::new(of_keys),
        },
        Pass {
            specialization: specialization("backward_dq_coop.wgsl", "dq", ["ROW_MATRICES", "KEYS"], dq),
            bindings: bindings(problem, DQ_BINDINGS),
            element_access: true,
            threads: dq.subgroups * format.lanes,
            workgroup_bytes: dq.dq_bytes(size, shape.head_dim, shape.head_dim_v),
            workgroups: Box::new(of_rows),
        },
    ]
}
