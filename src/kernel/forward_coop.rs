//! Host side of `shaders/forward_coop.wgsl` and `shaders/forward_coop_workgroup.wgsl`.

use super::{FORWARD_BINDINGS, Pass, bindings, forward_coop_scaled, switches};
use crate::elements::{Bit, MatrixFormat, MatrixLayout, NoElementAccess};
use crate::plan::{Part, check_limits};
use crate::specialize::Specialization;
use crate::tune::{self, CoopTile};
use crate::{ElementType, Error, Kernel, PlanOptions, Problem};

/// Where the coop kernel keeps scores and probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CoopForm {
    /// In the registers where the matrices lie: faster, for devices that give access to the elements of matrices.
    Registers,
    /// They cross workgroup memory, which needs no such access.
    WorkgroupMemory,
}

impl std::fmt::Display for CoopForm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            CoopForm::Registers => "in registers",
            CoopForm::WorkgroupMemory => "through workgroup memory",
        })
    }
}

/// What a context knows of a device's matrices.
#[derive(Clone, Debug)]
pub(crate) struct Matrices {
    pub format: MatrixFormat,
    /// How accumulators and left operands lie in the lanes, or why there is no access to their elements.
    pub elements: Result<MatrixLayout, NoElementAccess>,
}

impl Matrices {
    /// The form that is asked for, or else the faster of those that the device allows, and why.
    pub fn form(&self, asked: Option<CoopForm>) -> (CoopForm, String) {
        match (asked, &self.elements) {
            (Some(form), _) => (form, "asked for".into()),
            (None, Ok(_)) => (CoopForm::Registers, "the device gives access to the elements of matrices".into()),
            (None, Err(why)) => (CoopForm::WorkgroupMemory, format!("no access to the elements of matrices: {why}")),
        }
    }

    /// Whether the kernels for f32 and bf16 can run, which have only the form in registers.
    pub fn in_registers(&self, asked: Option<CoopForm>) -> bool {
        self.form(asked).0 == CoopForm::Registers && self.elements.is_ok()
    }

    /// How a lane's numbers lie in this form; `None` where the device does not give it.
    pub fn layout(&self, form: CoopForm) -> Option<MatrixLayout> {
        match form {
            CoopForm::Registers => self.elements.clone().ok(),
            CoopForm::WorkgroupMemory => Some(MatrixLayout::rows(self.format)),
        }
    }
}

/// The switches of a form through workgroup memory.
pub(crate) fn workgroup_switches(size: u32) -> Vec<&'static str> {
    let mut on = vec!["NO_ELEMENT_ACCESS", "UNROLL"];
    // Metal has matrices of 8 by 8, and its functions take pointers to numbers only.
    on.extend((size == 8).then_some("SCALARS"));
    on
}

/// The elements of a matrix in a lane for which the kernels in registers are written.
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
    // The other bits of a column's number are lane bits.
    let column_bits = layout.column.len() - layout.row_shuffles().len();
    constants.push(("LANE_ROWS", 1 << row_bits.len()));
    constants.push(("LANE_COLUMNS", 1 << column_bits));
    constants.push(("ELEMENTS", 1 << (row_bits.len() + column_bits)));
    constants
}

/// Why a plan takes the coop kernel for a type.
pub(crate) const fn reason(element_type: ElementType) -> &'static str {
    match element_type {
        ElementType::F32 => "the device has cooperative matrices; f32 is multiplied in two parts of f16",
        ElementType::F16 => "the device has cooperative matrices for f16",
        ElementType::BF16 => "the device has cooperative matrices; bf16 is scaled to f16",
    }
}

/// Why a plan takes the tile kernel instead.
pub(crate) const HALF_WITHOUT_ACCESS: &str =
    "without access to the elements of matrices the coop kernel takes f16 only";
pub(crate) const LIMITS_TOO_SMALL: &str = "the device's limits are too small for the tile of the coop kernel";

/// Why a form does not do.
pub(crate) const NO_ACCESS: &str = "in registers it needs access to the elements of matrices";
pub(crate) const F16_ONLY: &str = "through workgroup memory it takes f16 only";

/// How a problem is computed on these matrices.
pub(crate) struct Chosen {
    pub form: CoopForm,
    /// Why this form.
    pub why: String,
    pub tile: CoopTile,
    pub passes: Vec<Pass>,
}

pub(crate) fn choose(
    problem: &Problem,
    matrices: &Matrices,
    options: &PlanOptions,
    limits: &wgpu::Limits,
) -> Result<Chosen, Error> {
    let unsupported = |why| Error::Unsupported { kernel: Kernel::Coop, element_type: problem.element_type, why };
    let (form, why) = matrices.form(options.coop_form);
    let layout = matrices.layout(form).ok_or(unsupported(NO_ACCESS))?;
    let (format, shape) = (matrices.format, problem.shape);
    let (tile, passes) = match (problem.element_type, form) {
        (ElementType::F16, _) => {
            let table = || tune::coop_tile(form, format.size, shape.head_dim, shape.head_dim_v);
            let long = || long_tile(problem, form, format, &layout, limits);
            let tile = options.coop_tile.or_else(long).unwrap_or_else(table);
            tile.validate(form, format.size)?;
            (tile, vec![pass(problem, form, tile, format, &layout)])
        }
        (other, CoopForm::Registers) => {
            let table = || tune::coop_scaled_tile(format.size, other, shape.head_dim, shape.head_dim_v);
            let tile = options.coop_tile.unwrap_or_else(table);
            tile.validate_scaled(format.size, format.lanes)?;
            (tile, forward_coop_scaled::passes(problem, tile, format, &layout))
        }
        (_, CoopForm::WorkgroupMemory) => return Err(unsupported(F16_ONLY)),
    };
    Ok(Chosen { form, why, tile, passes })
}

/// The tile for long rows, if the problem has such rows, and enough of them, and the device's limits are large enough.
fn long_tile(
    problem: &Problem,
    form: CoopForm,
    format: MatrixFormat,
    layout: &MatrixLayout,
    limits: &wgpu::Limits,
) -> Option<CoopTile> {
    let shape = &problem.shape;
    let tile = tune::long_coop_tile(form, format.size, shape.head_dim, shape.head_dim_v)?;
    let (first, end) = problem.key_interval(shape.seqlen_q.saturating_sub(1), shape.seqlen_k);
    let blocks = shape.seqlen_q.div_ceil(tile.rows(format.size)) as u64;
    let suits = shape.seqlen_q.min(end.saturating_sub(first)) >= tune::LONG
        && blocks * shape.batch as u64 * shape.heads_q as u64 >= tune::FULL_DEVICE;
    let fits = || check_limits(Kernel::Coop, &[pass(problem, form, tile, format, layout)], limits).is_ok();
    (suits && fits()).then_some(tile)
}

/// In the form that has a layout of elements, or through workgroup memory.
pub(crate) fn pass(
    problem: &Problem,
    form: CoopForm,
    tile: CoopTile,
    format: MatrixFormat,
    layout: &MatrixLayout,
) -> Pass {
    let shape = problem.shape;
    let MatrixFormat { size, lanes } = format;
    let rows = tile.rows(size);
    let mut on = switches(problem, 8);
    if size == 16 {
        on.push("MATRIX16");
    }
    let file = match form {
        CoopForm::Registers => {
            on.push("UNROLL");
            "forward_coop.wgsl"
        }
        CoopForm::WorkgroupMemory => {
            on.extend(workgroup_switches(size));
            "forward_coop_workgroup.wgsl"
        }
    };
    let mut constants = vec![
        ("HEAD_DIM", shape.head_dim),
        ("HEAD_DIM_V", shape.head_dim_v),
        ("KEYS", tile.keys),
        ("BUFFERS", tile.buffers),
        ("SUBGROUPS", tile.subgroups),
        ("ROW_MATRICES", tile.row_matrices),
        // Matrices across the keys of a tile, the head dimension, and the values' dimension.
        ("KM", tile.keys / size),
        ("DM", shape.head_dim.div_ceil(size)),
        ("VM", shape.head_dim_v.div_ceil(size)),
    ];
    constants.extend(layout_constants(layout));
    Pass {
        specialization: Specialization { file, entry: "forward", switches: on, constants },
        bindings: bindings(problem, FORWARD_BINDINGS),
        element_access: form == CoopForm::Registers,
        rounds: None,
        threads: tile.subgroups * lanes,
        workgroup_bytes: tile.workgroup_bytes(form, size, shape.head_dim, shape.head_dim_v),
        workgroups: Box::new(move |part: &Part| {
            [part.row_count().div_ceil(rows as u64), part.head_count(), part.batch_count()]
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Causal, Shape};

    #[test]
    fn long_rows_have_their_own_tile_where_it_fits() {
        let format = MatrixFormat { size: 16, lanes: 32 };
        let chosen = |problem: &Problem, format, limits| {
            long_tile(problem, CoopForm::Registers, format, &MatrixLayout::rows(format), limits)
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
        let small = wgpu::Limits { max_compute_workgroup_storage_size: 32 << 10, ..Default::default() };
        assert!(chosen(&long, format, &small).is_none());
        assert!(chosen(&long, MatrixFormat { lanes: 64, ..format }, &large).is_none(), "too many invocations");
    }
}
