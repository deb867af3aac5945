//! Host side of `shaders/backward_dkdv_coop.wgsl` and `shaders/backward_dq_coop.wgsl`.

use super::backward_tile::{DKDV_BINDINGS, DQ_BINDINGS};
use super::forward_coop::layout_constants;
use super::{Pass, backward_switches, bindings};
use crate::elements::{MatrixFormat, MatrixLayout};
use crate::specialize::Specialization;
use crate::tune::CoopBackwardTile;
use crate::{Problem, plan::Part};

/// The gradients of keys and values, then that of queries.
pub(crate) fn passes(
    problem: &Problem,
    [dkdv, dq]: [CoopBackwardTile; 2],
    format: MatrixFormat,
    layout: &MatrixLayout,
) -> Vec<Pass> {
    let shape = problem.shape;
    let group = shape.group() as u64;
    let size = format.size;
    let specialization = |file, entry, names: [&'static str; 2], tile: CoopBackwardTile| {
        let mut switches = backward_switches(problem, 8);
        if size == 16 {
            switches.push("MATRIX16");
        }
        if tile.ahead {
            switches.push("AHEAD");
        }
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
