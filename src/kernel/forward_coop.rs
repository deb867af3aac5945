//! Host side of `shaders/forward_coop.wgsl`.

use super::{FORWARD_BINDINGS, Pass, bindings, switches};
use crate::elements::{Bit, MatrixFormat, MatrixLayout};
use crate::specialize::Specialization;
use crate::tune::CoopTile;
use crate::{Problem, plan::Part};

/// What a context knows of a device's matrices: their format, and how accumulators and left operands lie in the lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matrices {
    pub format: MatrixFormat,
    pub layout: MatrixLayout,
}

/// The elements that a lane holds; the shader spells them out.
pub(crate) const ELEMENTS: u32 = 8;

/// The names of the constants for each bit of a row's and of a column's number.
const ROW_BITS: [&str; 4] = ["ROW_BIT_0", "ROW_BIT_1", "ROW_BIT_2", "ROW_BIT_3"];
const COLUMN_BITS: [&str; 4] = ["COLUMN_BIT_0", "COLUMN_BIT_1", "COLUMN_BIT_2", "COLUMN_BIT_3"];

pub(crate) fn layout_constants(layout: &MatrixLayout) -> Vec<(&'static str, u32)> {
    let source = |bit: &Bit| match *bit {
        Bit::Lane(n) => n,
        Bit::Element(n) => 8 + n,
    };
    let mut constants: Vec<_> = ROW_BITS.into_iter().zip(layout.row.iter().map(source)).collect();
    constants.extend(COLUMN_BITS.into_iter().zip(layout.column.iter().map(source)));
    let row_bits = layout.row_element_bits();
    constants.push(("ELEMENT_ROW_BITS", row_bits.iter().map(|n| 1 << n).sum()));
    constants.push(("LANE_COLUMN_BITS", layout.row_shuffles().iter().sum()));
    constants.push(("LANE_ROWS", 1 << row_bits.len()));
    constants.push(("LANE_COLUMNS", ELEMENTS >> row_bits.len()));
    constants
}

pub(crate) fn pass(problem: &Problem, tile: CoopTile, matrices: &Matrices) -> Pass {
    let shape = problem.shape;
    let size = matrices.format.size;
    let rows = tile.rows(size);
    let mut on = switches(problem, 8);
    if size == 16 {
        on.push("MATRIX16");
    }
    let mut constants = vec![
        ("HEAD_DIM", shape.head_dim),
        ("HEAD_DIM_V", shape.head_dim_v),
        ("KEYS", tile.keys),
        ("BUFFERS", tile.buffers),
        ("SUBGROUPS", tile.subgroups),
        ("ROW_MATRICES", tile.row_matrices),
    ];
    constants.extend(layout_constants(&matrices.layout));
    Pass {
        specialization: Specialization { file: "forward_coop.wgsl", entry: "forward", switches: on, constants },
        bindings: bindings(problem, FORWARD_BINDINGS),
        element_access: true,
        threads: tile.subgroups * matrices.format.lanes,
        workgroup_bytes: tile.workgroup_bytes(size, shape.head_dim, shape.head_dim_v),
        workgroups: Box::new(move |part: &Part| {
            [part.row_count().div_ceil(rows as u64), part.head_count(), part.batch_count()]
        }),
    }
}
