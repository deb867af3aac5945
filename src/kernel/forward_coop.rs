//! Host side of `shaders/kernel/forward_coop.wgsl` and `shaders/kernel/forward_coop_workgroup.wgsl`.

use super::{FORWARD_BINDINGS, Part, Pass, score_bindings, switches};
use crate::matrices::{Bit, MatrixFormat, MatrixLayout, Operands};
use crate::specialize::Specialization;
use crate::tune::CoopTile;
use crate::{CoopForm, Problem};

/// The switches of a form through workgroup memory.
pub(crate) fn workgroup_switches(size: u32) -> Vec<&'static str> {
    let mut on = vec!["NO_ELEMENT_ACCESS", "UNROLL"];
    // Metal has matrices of 8 by 8, and its functions take pointers to numbers only.
    on.extend((size == 8).then_some("SCALARS"));
    on
}

/// For kernels with access to elements, whose bindings wgpu does not compare with the module's.
pub(crate) fn bias_switches(problem: &Problem, operands: Operands) -> Vec<&'static str> {
    match (problem.bias, operands.bf16) {
        (None, _) => vec![],
        (Some(_), true) => vec!["BIAS_AHEAD"],
        (Some(_), false) => vec!["BIAS_AHEAD", "SMALL_SCORES"],
    }
}

/// Whether ALiBi is added to products, divided by the scale, so that scores need no multiplication by the scale: where nothing else is done to
/// scores, and the scale is such that no sum comes near `EMPTY` of `shaders/attention/softmax.wgsl`.
fn adds_to_products(problem: &Problem) -> bool {
    let alone = problem.softcap.is_none() && problem.bias.is_none() && !problem.has_score_mod();
    problem.alibi.is_some() && alone && (1e-3..=1e3).contains(&problem.effective_scale())
}

/// How many steps without masked scores the kernel has written out. Drivers do so themselves with those of plain attention, but not with longer
/// ones. Where every tile may be masked such steps are few, and two of them made the kernel slower: documents at head dim 64 from 0.20 to 0.59 ms on
/// an H200.
fn steps(on: &[&str]) -> u32 {
    let long = ["ADDED", "SOFTCAP", "SCORE_MOD", "DROPOUT", "BLOCKS"].iter().any(|name| on.contains(name));
    if long && !on.contains(&"ANY_MASK") { 2 } else { 1 }
}

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
    // The other bits of a column's number are lane bits.
    let column_bits = layout.column.len() - layout.row_shuffles().len();
    constants.push(("LANE_ROWS", 1 << row_bits.len()));
    constants.push(("LANE_COLUMNS", 1 << column_bits));
    constants.push(("ELEMENTS", 1 << (row_bits.len() + column_bits)));
    constants
}

/// The constants of a tile that `shaders/matrix/coop_tiles.wgsl` moves, with matrices of `size` rows.
pub(crate) fn tile_constants(problem: &Problem, tile: CoopTile, size: u32) -> Vec<(&'static str, u32)> {
    let shape = problem.shape;
    vec![
        ("HEAD_DIM", shape.head_dim),
        ("HEAD_DIM_V", shape.head_dim_v),
        ("KEYS", tile.keys),
        ("BUFFERS", tile.buffers),
        ("SUBGROUPS", tile.subgroups),
        ("ROW_MATRICES", tile.row_matrices),
        // Matrices across the keys of a tile, the head dimension, and the values' dimension.
        ("ACROSS_KEYS", tile.keys / size),
        ("ACROSS_DIM", shape.head_dim.div_ceil(size)),
        ("ACROSS_DIM_V", shape.head_dim_v.div_ceil(size)),
    ]
}

/// With a smaller scale than this, kernels on matrices of bf16 hold scores instead of products: products may be so large that they matter all
/// the same, and `SMALLEST_FACTOR` of `shaders/attention/softmax.wgsl` would take the place of the factor.
const SMALL_SCALE: f32 = 1e-22;

/// In the form that has a layout of elements, or through workgroup memory, on matrices of these operands.
pub(crate) fn pass(
    problem: &Problem,
    form: CoopForm,
    tile: CoopTile,
    format: MatrixFormat,
    layout: &MatrixLayout,
    operands: Operands,
) -> Pass {
    let shape = problem.shape;
    let MatrixFormat { size, lanes } = format;
    let rows = tile.rows(size);
    let mut on = switches(problem, 8);
    on.extend(operands.switches());
    if operands.bf16 && problem.effective_scale() < SMALL_SCALE && !on.contains(&"SHAPED") {
        on.push("SHAPED");
    }
    if size == 16 {
        on.push("MATRIX16");
    }
    let file = match form {
        CoopForm::Registers => {
            on.push("UNROLL");
            on.extend((tile.query_in_memory > 0).then_some("QUERY_IN_MEMORY"));
            on.extend(bias_switches(problem, operands));
            if adds_to_products(problem) {
                on.retain(|&name| name != "SHAPED");
            }
            "kernel/forward_coop.wgsl"
        }
        CoopForm::WorkgroupMemory => {
            on.extend(workgroup_switches(size));
            "kernel/forward_coop_workgroup.wgsl"
        }
    };
    let mut constants = tile_constants(problem, tile, size);
    if form == CoopForm::Registers {
        let held = tile.held(size, shape.head_dim);
        let (q_blocks, q_block) = CoopTile::staged(size, held);
        let (o_blocks, o_block) = CoopTile::staged(size, shape.head_dim_v.div_ceil(size));
        constants.extend([
            ("STEPS", steps(&on)),
            ("TURNS", tile.turns),
            ("ACROSS_TURN", tile.keys / size / tile.turns),
            // Matrices of Q that registers hold, and the others.
            ("Q_HELD", held),
            ("Q_REST", tile.query_in_memory),
            ("Q_BLOCKS", q_blocks),
            ("Q_BLOCK", q_block),
            ("O_BLOCKS", o_blocks),
            ("O_BLOCK", o_block),
        ]);
    }
    constants.extend(layout_constants(layout));
    Pass::new(
        Specialization { file, entry: "forward", switches: on, constants },
        score_bindings(problem, FORWARD_BINDINGS),
        tile.subgroups * lanes,
        tile.workgroup_bytes(form, size, shape.head_dim, shape.head_dim_v),
        Box::new(move |part: &Part| [part.row_count().div_ceil(rows as u64), part.head_count(), part.batch_count()]),
    )
    .with_element_access(form == CoopForm::Registers)
}

#[cfg(test)]
mod tests {
    use super::adds_to_products;
    use crate::{Alibi, Bias, ElementType, Problem, ScoreLayout, Shape};

    #[test]
    fn alibi_is_added_to_products_where_it_stands_alone() {
        let plain = Problem::new(Shape::square(1, 1, 8, 64), ElementType::F16);
        let alibi = plain.clone().with_alibi(Alibi::PerHead);
        assert!(adds_to_products(&alibi) && !adds_to_products(&plain));
        let scales = [(1e-3, true), (1e3, true), (9e-4, false), (1.1e3, false), (0.0, false), (-0.1, false)];
        for (scale, expected) in scales {
            assert_eq!(adds_to_products(&alibi.clone().scale(scale)), expected, "{scale}");
        }
        let bias = Bias::new(ElementType::F16, ScoreLayout::contiguous([1, 1, 8, 8]));
        assert!(!adds_to_products(&alibi.clone().softcap(30.0)) && !adds_to_products(&alibi.with_bias(bias)));
    }
}
