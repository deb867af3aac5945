//! The kernels on cooperative matrices, forward and backward: their form and their tiles.

use super::candidate::{ANYWHERE, block, check_blocks};
use crate::error::Error;
use crate::facts::{Facts, Matrices};
use crate::kernel::{Pass, backward_bias_coop, backward_coop, check_limits, forward_coop, forward_coop_scaled};
use crate::matrices::{MatrixFormat, MatrixLayout, Operands};
use crate::names::{CoopForm, ElementType, Kernel};
use crate::options::PlanOptions;
use crate::problem::Problem;
use crate::tune::{self, CoopBackwardTile, CoopTile};

/// Why a plan takes the coop kernel.
pub(super) fn reason(problem: &Problem, facts: &Facts, options: &PlanOptions) -> &'static str {
    match (problem.element_type, is_scaled(problem, facts, options)) {
        (ElementType::F32, _) => "the device has cooperative matrices; f32 is multiplied in two parts of f16",
        (ElementType::F16, _) => "the device has cooperative matrices for f16",
        (ElementType::BF16, true) => "the device has cooperative matrices; bf16 is scaled to f16",
        (ElementType::BF16, false) => "the device has cooperative matrices for bf16",
    }
}

/// What elements of the problem are as they are in this form; `None` where they have to be split or scaled to f16.
fn operands(problem: &Problem, matrices: &Matrices, options: &PlanOptions, form: CoopForm) -> Option<Operands> {
    let operands = matrices.operands(problem.element_type, form)?;
    (!(operands.bf16 && options.scaled_bf16)).then_some(operands)
}

/// Whether the coop kernel would split or scale the problem's elements to f16.
pub(super) fn is_scaled(problem: &Problem, facts: &Facts, options: &PlanOptions) -> bool {
    let scaled =
        |matrices: &Matrices| operands(problem, matrices, options, matrices.form(options.coop_form).0).is_none();
    facts.matrices.as_ref().map_or(problem.element_type != ElementType::F16, scaled)
}

/// Why a plan does not take it.
const HALF_WITHOUT_ACCESS: &str = "without access to the elements of matrices the coop kernel takes f16 only";
const BLOCKS_DO_NOT_DIVIDE: &str = "blocks of the block lists do not divide into tiles of the coop kernel";
const LIMITS_TOO_SMALL: &str = "the device's limits are too small for the tile of the coop kernel";

/// Why a form does not do.
const NO_ACCESS: &str = "in registers it needs access to the elements of matrices";
const F16_ONLY: &str = "through workgroup memory it takes f16 only";

/// The passes of a problem on a device's matrices.
pub(super) struct Coop {
    pub form: CoopForm,
    /// Why this form and, of bf16, why these matrices.
    pub why: String,
    /// Whether elements are split or scaled to f16, which takes ranges of each head.
    pub scaled: bool,
    pub passes: Vec<Pass>,
    /// Queries and keys of a tile of the forward pass.
    pub rows_and_keys: Option<(u32, u32)>,
}

impl Coop {
    /// How many elements are moved at a time.
    pub const fn vector(&self) -> u32 {
        if self.scaled { 4 } else { 8 }
    }
}

/// Form, why this one, and how its elements lie.
fn form(
    problem: &Problem,
    matrices: &Matrices,
    options: &PlanOptions,
) -> Result<(CoopForm, String, MatrixLayout), Error> {
    let (form, mut why) = matrices.form(options.coop_form);
    let layout = matrices.layout(form).ok_or(unsupported(problem, NO_ACCESS))?;
    if problem.element_type == ElementType::BF16 {
        why += &match &matrices.bf16 {
            Ok(_) if options.scaled_bf16 => "; bf16 is scaled to f16 as asked for".into(),
            Ok(_) => "; it has matrices of bf16".into(),
            Err(why) => format!("; bf16 is scaled to f16: {why}"),
        };
    }
    Ok((form, why, layout))
}

fn unsupported(problem: &Problem, why: &'static str) -> Error {
    Error::Unsupported { kernel: Kernel::Coop, element_type: problem.element_type, why }
}

fn matrices_of<'a>(problem: &Problem, facts: &'a Facts) -> Result<&'a Matrices, Error> {
    facts.matrices.as_ref().ok_or(unsupported(problem, "the context was made without with_cooperative_matrices"))
}

/// Why a plan does not take the coop kernel by itself, if it does not. `coop` is what the plan would take; `rows` is why the kernel is not for
/// rows of this problem, if it is not.
pub(super) fn refusal(
    problem: &Problem,
    facts: &Facts,
    options: &PlanOptions,
    coop: &Result<Coop, Error>,
    rows: Option<&'static str>,
) -> Option<&'static str> {
    let Some(matrices) = &facts.matrices else {
        return Some(ANYWHERE);
    };
    if problem.element_type != ElementType::F16 && !matrices.in_registers(options.coop_form) {
        return Some(HALF_WITHOUT_ACCESS);
    }
    if rows.is_some() {
        return rows;
    }
    match coop {
        Ok(coop) => check_limits(Kernel::Coop, &coop.passes, &facts.limits).err().map(|_| LIMITS_TOO_SMALL),
        Err(Error::Unsupported { why, .. }) => Some(why),
        Err(Error::BlockTile { backward, .. }) => {
            let asked = if *backward { options.coop_backward_tiles.is_some() } else { options.coop_tile.is_some() };
            (!asked).then_some(BLOCKS_DO_NOT_DIVIDE)
        }
        // A tile that was asked for is wrong. The plan takes this kernel, and with it the error that says so.
        Err(_) => None,
    }
}

/// The forward pass.
pub(super) fn forward(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Coop, Error> {
    let matrices = matrices_of(problem, facts)?;
    let (form, why, layout) = form(problem, matrices, options)?;
    let (format, shape) = (matrices.format, problem.shape);
    let in_blocks = |tile: CoopTile| block(problem).map_or(tile, |block| tile.in_blocks(format.size, block));
    let check = |tile: CoopTile| check_blocks(Kernel::Coop, problem, [tile.rows(format.size), tile.keys], false);
    let operands = operands(problem, matrices, options, form);
    let (tile, passes) = match (operands, form) {
        (Some(operands), _) => {
            let table = || {
                let tile = tune::coop_tile(form, format.size, shape.head_dim, shape.head_dim_v);
                in_blocks(match form {
                    CoopForm::Registers => tile.in_limits(format, [shape.head_dim, shape.head_dim_v], &facts.limits),
                    CoopForm::WorkgroupMemory => tile,
                })
            };
            let large = || large_tile(problem, form, format, &layout, operands, &facts.limits);
            let tile = options.coop_tile.or_else(large).unwrap_or_else(table);
            tile.validate(form, format.size, shape.head_dim)?;
            check(tile)?;
            (tile, vec![forward_coop::pass(problem, form, tile, format, &layout, operands)])
        }
        (None, CoopForm::Registers) => {
            let element_type = problem.element_type;
            let table =
                || in_blocks(tune::coop_scaled_tile(format.size, element_type, shape.head_dim, shape.head_dim_v));
            let tile = options.coop_tile.unwrap_or_else(table);
            tile.validate_scaled(format.size, format.lanes)?;
            check(tile)?;
            (tile, forward_coop_scaled::passes(problem, tile, format, &layout, matrices.f16()))
        }
        (None, CoopForm::WorkgroupMemory) => return Err(unsupported(problem, F16_ONLY)),
    };
    let rows_and_keys = Some((tile.rows(format.size), tile.keys));
    Ok(Coop { form, why, scaled: operands.is_none(), passes, rows_and_keys })
}

/// The backward pass, but for the deltas before it.
pub(super) fn backward(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Coop, Error> {
    let matrices = matrices_of(problem, facts)?;
    let (form, why, layout) = form(problem, matrices, options)?;
    let (format, shape) = (matrices.format, problem.shape);
    let widest = shape.head_dim.max(shape.head_dim_v);
    let operands = operands(problem, matrices, options, form);
    let scaled = operands.is_none();
    let in_blocks = |[dkdv, dq]: [CoopBackwardTile; 2]| match block(problem) {
        Some([queries, keys]) => {
            [dkdv.in_blocks(format.size, scaled, [keys, queries]), dq.in_blocks(format.size, scaled, [queries, keys])]
        }
        None => [dkdv, dq],
    };
    let tiles = match (operands, form) {
        (Some(_), _) => {
            let table = || {
                let (size, dim, dim_v) = (format.size, shape.head_dim, shape.head_dim_v);
                let of_dkdv = |tile: &CoopBackwardTile| tile.dkdv_bytes(form, size, dim, dim_v);
                let of_dq = |tile: &CoopBackwardTile| tile.dq_bytes(form, size, dim, dim_v);
                let lean = tune::lean_coop_backward_tiles(form, size, dim, dim_v).filter(|[dkdv, _]| {
                    let in_sight = shape.seqlen_q.min(keys_of_last_row(problem));
                    has_lean_scores(problem)
                        && in_sight >= tune::LEAN_STEPS * dkdv.step
                        && dkdv.fits(format, &facts.limits, of_dkdv)
                });
                let [dkdv, dq] = lean.unwrap_or_else(|| tune::coop_backward_tiles(form, size, dim, dim_v));
                in_blocks(match form {
                    CoopForm::Registers => {
                        [dkdv.in_limits(format, &facts.limits, of_dkdv), dq.in_limits(format, &facts.limits, of_dq)]
                    }
                    CoopForm::WorkgroupMemory => [dkdv, dq],
                })
            };
            let tiles = options.coop_backward_tiles.unwrap_or_else(table);
            tiles.iter().try_for_each(|tile| tile.validate(format.size))?;
            tiles
        }
        (None, CoopForm::Registers) if in_single_bf16(problem) => {
            let why = "its backward pass in bf16 takes rows that begin and end at multiples of 4 elements, unless the device has matrices of bf16";
            return Err(unsupported(problem, why));
        }
        (None, CoopForm::Registers) => {
            let tiles = |element_type| {
                tune::coop_scaled_backward_tiles(format.size, element_type, shape.head_dim, shape.head_dim_v)
            };
            let table = || in_blocks(tiles(problem.element_type));
            let tiles = options.coop_backward_tiles.unwrap_or_else(table);
            tiles.iter().try_for_each(|tile| tile.validate_scaled(format.size, format.lanes, widest))?;
            tiles
        }
        (None, CoopForm::WorkgroupMemory) => return Err(unsupported(problem, F16_ONLY)),
    };
    let [dkdv, dq] = tiles;
    let own = |tile: CoopBackwardTile| if scaled { tile.scaled_own(format.size) } else { tile.own(format.size) };
    check_blocks(Kernel::Coop, problem, [dkdv.step, own(dkdv)], true)?;
    check_blocks(Kernel::Coop, problem, [own(dq), dq.step], true)?;
    let passes = match operands {
        Some(operands) => backward_coop::passes(problem, form, tiles, format, &layout, operands),
        None => backward_coop::scaled_passes(problem, tiles, format, &layout, matrices.f16()),
    };
    Ok(Coop { form, why, scaled, passes, rows_and_keys: None })
}

/// Whether bf16 lie so that they are moved one by one, which the kernels that scale them to f16 do not do in the backward pass.
pub(super) fn in_single_bf16(problem: &Problem) -> bool {
    problem.element_type == ElementType::BF16 && !backward_coop::bf16_in_vectors(problem)
}

/// The gradient of the bias, or why matrices do not compute it.
pub(super) fn bias_gradient(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Pass, &'static str> {
    let matrices = facts.matrices.as_ref().ok_or(ANYWHERE)?;
    let (form, _, layout) = form(problem, matrices, options).map_err(|_| NO_ACCESS)?;
    if form != CoopForm::Registers {
        return Err(NO_ACCESS);
    }
    let operands = operands(problem, matrices, options, form).ok_or("q, k and v are split or scaled to f16")?;
    let bias = backward_bias_coop::bias(problem, &layout)?;
    let tile = tune::bias_gradient_tile(matrices.format.size, problem.shape.head_dim, problem.shape.head_dim_v);
    let pass = backward_bias_coop::pass(problem, &bias, tile, matrices.format, &layout, operands);
    let fits = check_limits(Kernel::Coop, std::slice::from_ref(&pass), &facts.limits).is_ok();
    if fits { Ok(pass) } else { Err(LIMITS_TOO_SMALL) }
}

/// Whether nothing is read or drawn for each score, which would take registers.
fn has_lean_scores(problem: &Problem) -> bool {
    let given = problem.bias.is_some() || problem.mask.is_some() || problem.mods.is_some() || problem.blocks.is_some();
    !given && problem.dropout_in_use().is_none()
}

/// Whether scores are lean, and only the scale changes them.
fn has_plain_scores(problem: &Problem) -> bool {
    has_lean_scores(problem) && problem.softcap.is_none() && problem.alibi.is_none()
}

/// How many keys the last query sees, as far as the causal mask and the window say.
fn keys_of_last_row(problem: &Problem) -> u32 {
    let (first, end) = problem.key_interval(problem.shape.seqlen_q.saturating_sub(1), problem.shape.seqlen_k);
    end.saturating_sub(first)
}

/// The tile of 256 rows for long rows, or for wide heads, if the problem is such, it has enough rows, and the device's limits are large enough.
fn large_tile(
    problem: &Problem,
    form: CoopForm,
    format: MatrixFormat,
    layout: &MatrixLayout,
    operands: Operands,
    limits: &wgpu::Limits,
) -> Option<CoopTile> {
    let shape = &problem.shape;
    let table = |table: fn(CoopForm, u32, u32, u32) -> Option<CoopTile>| {
        table(form, format.size, shape.head_dim, shape.head_dim_v)
    };
    let in_sight = shape.seqlen_q.min(keys_of_last_row(problem));
    let is_long = in_sight >= tune::LONG;
    let wide = if problem.rows_grow() { 4 * tune::WIDE } else { tune::WIDE };
    let is_wide = in_sight >= wide && has_plain_scores(problem);
    let long = table(tune::long_coop_tile).filter(|_| is_long);
    let tile = long.or(table(tune::wide_coop_tile).filter(|_| is_wide))?;
    let blocks = shape.seqlen_q.div_ceil(tile.rows(format.size)) as u64;
    let divides = check_blocks(Kernel::Coop, problem, [tile.rows(format.size), tile.keys], false).is_ok();
    // FULL_DEVICE is two workgroups for each multiprocessor of a large device. Of these tiles one runs at a time. So there are two rounds at least.
    let suits = divides && blocks * shape.batch as u64 * shape.heads_q as u64 >= tune::FULL_DEVICE;
    let pass = || forward_coop::pass(problem, form, tile, format, layout, operands);
    let fits = || check_limits(Kernel::Coop, &[pass()], limits).is_ok();
    (suits && fits()).then_some(tile)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Alibi, Causal, Shape};

    #[test]
    fn long_rows_have_their_own_tile_where_it_fits() {
        let format = MatrixFormat { size: 16, lanes: 32 };
        let chosen = |problem: &Problem, format, limits| {
            large_tile(problem, CoopForm::Registers, format, &MatrixLayout::rows(format), Operands::F16, limits)
        };
        let large = wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..Default::default() };
        let problem = |heads, seqlen| Problem::new(Shape::square(1, heads, seqlen, 64), ElementType::F16);
        let long = problem(16, 16384);
        assert_eq!(chosen(&long, format, &large), tune::long_coop_tile(CoopForm::Registers, 16, 64, 64));
        assert!(chosen(&long, format, &large).is_some());
        assert!(chosen(&long.clone().causal(Causal::BottomRight), format, &large).is_some());
        assert!(chosen(&problem(16, 16383), format, &large).is_none());
        assert!(chosen(&long.clone().window(Some(1000), Some(0)), format, &large).is_none());
        assert!(chosen(&problem(4, 16384), format, &large).is_none(), "too few workgroups");
        let small = wgpu::Limits { max_compute_workgroup_storage_size: 16 << 10, ..Default::default() };
        assert!(chosen(&long, format, &small).is_none());
        assert!(chosen(&long, MatrixFormat { lanes: 64, ..format }, &large).is_none(), "too many invocations");
    }

    #[test]
    fn wide_heads_have_their_own_tile_where_scores_are_plain() {
        let format = MatrixFormat { size: 16, lanes: 32 };
        let limits = wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..Default::default() };
        let chosen = |problem: &Problem| {
            large_tile(problem, CoopForm::Registers, format, &MatrixLayout::rows(format), Operands::F16, &limits)
        };
        let problem = |heads, seqlen, dim| Problem::new(Shape::square(1, heads, seqlen, dim), ElementType::F16);
        let wide = problem(66, 1024, 128);
        assert_eq!(chosen(&wide), Some(CoopTile::new(8, 2, 32, 1).with_turns(2, 2)));
        assert_eq!(chosen(&problem(66, 1024, 96)), Some(CoopTile::new(8, 2, 32, 1).with_turns(1, 1)));
        assert_eq!(chosen(&problem(66, 1024, 72)), Some(CoopTile::new(8, 2, 32, 1)));
        assert!(chosen(&problem(66, 4096, 128).causal(Causal::BottomRight)).is_some());
        for (other, why) in [
            (problem(65, 1024, 128), "too few workgroups"),
            (problem(100, 1023, 128), "too few rows"),
            (problem(66, 1024, 64), "no wide heads"),
            (problem(66, 1024, 136), "no registers"),
            (problem(66, 4095, 128).causal(Causal::BottomRight), "few scores that count"),
            (problem(66, 4096, 128).window(Some(1000), Some(0)), "few keys in sight"),
            (wide.clone().softcap(30.0), "a softcap"),
            (wide.clone().with_alibi(Alibi::PerHead), "ALiBi"),
        ] {
            assert_eq!(chosen(&other), None, "{why}");
        }
        assert!(has_lean_scores(&wide.clone().softcap(30.0)) && !has_lean_scores(&wide.with_dropout(0.1)));
    }
}
