//! Host side of `shaders/forward_coop_scaled.wgsl`.

use super::forward_coop::layout_constants;
use super::{FORWARD_BINDINGS, Pass, bindings, switches};
use crate::elements::{MatrixFormat, MatrixLayout};
use crate::problem::Tensor;
use crate::specialize::Specialization;
use crate::tune::CoopTile;
use crate::{ElementType, Problem, plan::Part};

/// Into how many f16 an element is split.
pub(crate) fn parts(element_type: ElementType) -> u32 {
    match element_type {
        ElementType::F32 => 2,
        ElementType::F16 | ElementType::BF16 => 1,
    }
}

pub(crate) fn pass(problem: &Problem, tile: CoopTile, format: MatrixFormat, layout: &MatrixLayout) -> Pass {
    let shape = problem.shape;
    let parts = parts(problem.element_type);
    let size = format.size;
    let rows = tile.rows(size);
    let mut on = switches(problem, 4);
    if size == 16 {
        on.push("MATRIX16");
    }
    if problem.element_type == ElementType::BF16 && !problem.is_aligned(&Tensor::FORWARD, 4) {
        on.push("SINGLE_BF16");
    }
    let mut constants = vec![
        ("PARTS", parts),
        ("HEAD_DIM", shape.head_dim),
        ("HEAD_DIM_V", shape.head_dim_v),
        ("KEYS", tile.keys),
        ("SUBGROUPS", tile.subgroups),
        ("ROW_MATRICES", tile.row_matrices),
    ];
    constants.extend(layout_constants(layout));
    Pass {
        specialization: Specialization { file: "forward_coop_scaled.wgsl", entry: "forward", switches: on, constants },
        bindings: bindings(problem, FORWARD_BINDINGS),
        element_access: true,
        rounds: None,
        threads: tile.subgroups * format.lanes,
        workgroup_bytes: tile.scaled_workgroup_bytes(size, parts, shape.head_dim, shape.head_dim_v),
        workgroups: Box::new(move |part: &Part| {
            [part.row_count().div_ceil(rows as u64), part.head_count(), part.batch_count()]
        }),
    }
}
