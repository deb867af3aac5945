//! Host side of `shaders/kernel/backward_bias_coop.wgsl`: the gradient of the bias on cooperative matrices.

use super::backward_scores::{self, TILE_INPUTS, owners};
use super::forward_coop::{layout_constants, tile_constants};
use super::{Access, Part, Pass, Slot, backward_switches, by_pair, score_bindings};
use crate::matrices::{Bit, MatrixFormat, MatrixLayout, Operands};
use crate::specialize::Specialization;
use crate::tune::CoopTile;
use crate::{Bias, ElementType, Problem};

/// The bias whose gradient the kernel computes, or why it does not compute it.
pub(crate) fn bias(problem: &Problem, layout: &MatrixLayout) -> Result<Bias, &'static str> {
    let bias = problem.bias.ok_or("there is no bias")?;
    let [_, _, rows, keys] = backward_scores::shared(problem, &bias.layout);
    if rows || keys {
        return Err("queries or keys share its elements");
    }
    if bias.element_type == ElementType::F32 {
        return Ok(bias);
    }
    // A lane writes two elements of 16 bits at once, so that no other writes to their word.
    if !bias.layout.is_paired() {
        return Err("its keys do not lie side by side in rows that begin at even elements");
    }
    match layout.column.first() {
        Some(Bit::Element(_)) => Ok(bias),
        _ => Err("a lane of this device does not hold neighbouring keys"),
    }
}

/// Its pass, on matrices of these operands whose elements lie so.
pub(crate) fn pass(
    problem: &Problem,
    bias: &Bias,
    tile: CoopTile,
    format: MatrixFormat,
    layout: &MatrixLayout,
    operands: Operands,
) -> Pass {
    let shape = problem.shape;
    let size = format.size;
    let [batch, heads, ..] = backward_scores::shared(problem, &bias.layout);
    let mut switches = by_pair(backward_switches(problem, 8));
    switches.extend(operands.switches());
    switches.push("UNROLL");
    switches.extend((size == 16).then_some("MATRIX16"));
    switches.extend((bias.element_type == ElementType::F32).then_some("BIAS_WORDS"));
    let mut constants = tile_constants(problem, tile, size);
    constants.extend([("SHARED_BATCH", batch.into()), ("SHARED_HEADS", heads.into())]);
    constants.extend(layout_constants(layout));
    let mut used = TILE_INPUTS.to_vec();
    used.extend([(Slot::Workspace, Access::Read), (Slot::GradBias, Access::ReadWrite)]);
    Pass::new(
        Specialization { file: "kernel/backward_bias_coop.wgsl", entry: "bias_gradient", switches, constants },
        score_bindings(problem, &used),
        tile.subgroups * format.lanes,
        tile.bias_gradient_bytes(size, shape.head_dim, shape.head_dim_v),
        Box::new(move |part: &Part| {
            [
                shape.seqlen_k.div_ceil(tile.keys).into(),
                part.row_count().div_ceil(tile.rows(size).into()),
                owners(batch, part.batch_count()) * owners(heads, part.head_count()),
            ]
        }),
    )
    .with_element_access(true)
}
