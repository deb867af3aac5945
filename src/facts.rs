//! What a device allows, as plain data. Choosing kernels needs nothing else of a device.

use crate::loops;
use crate::matrices::{MatrixFormat, MatrixLayout, NoBf16Matrices, NoElementAccess, Operands, Probed, Rounding};
use crate::names::{CoopForm, ElementType};

/// What a device allows.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Facts {
    /// Its limits.
    pub limits: wgpu::Limits,
    /// Lanes of the smallest subgroup there is, on devices that may use subgroup operations.
    pub lanes: Option<u32>,
    /// Whether shaders may have integers of 64 bits.
    pub int64: bool,
    /// How many iterations of loops the driver grants a shader, if it ends them.
    pub loop_iterations: Option<u64>,
    /// Its matrices, where kernels may use them.
    pub matrices: Option<Matrices>,
}

impl Facts {
    /// Those of a device, without its matrices.
    pub fn of(device: &wgpu::Device) -> Self {
        let info = device.adapter_info();
        // A browser would want `enable subgroups`, which naga does not know.
        let subgroups =
            device.features().contains(wgpu::Features::SUBGROUP) && info.backend != wgpu::Backend::BrowserWebGpu;
        Facts {
            limits: device.limits(),
            lanes: subgroups.then_some(info.subgroup_min_size),
            int64: device.features().contains(wgpu::Features::SHADER_INT64),
            loop_iterations: loops::granted(&info),
            matrices: None,
        }
    }

    /// Those of a device that has these limits and nothing else.
    pub fn with_limits(limits: wgpu::Limits) -> Self {
        Facts { limits, ..Facts::default() }
    }

    /// With matrices whose elements lie like this or, without a layout, cannot be accessed.
    pub fn matrices(mut self, format: MatrixFormat, layout: Option<MatrixLayout>) -> Self {
        let elements = layout.ok_or(NoElementAccess::Roles);
        let (rounding, bf16) = (Rounding::Nearest, Err(NoBf16Matrices::NotGiven));
        self.matrices = Some(Matrices { format, elements, rounding, bf16 });
        self
    }

    /// With matrices of bf16 too, which lie like those of f16, on a device that rounds to them like this.
    pub fn bf16_matrices(mut self, rounding: Rounding) -> Self {
        self.matrices.as_mut().expect("`matrices` comes first").bf16 = Ok(rounding);
        self
    }
}

/// What is known of a device's matrices.
#[derive(Clone, Debug)]
pub struct Matrices {
    pub format: MatrixFormat,
    /// How accumulators and left operands lie in the lanes, or why there is no access to their elements.
    pub elements: Result<MatrixLayout, NoElementAccess>,
    /// How f32 become f16.
    pub rounding: Rounding,
    /// How f32 become bf16, where there are matrices of bf16 too that lie like those of f16; or why kernels do not use them.
    pub bf16: Result<Rounding, NoBf16Matrices>,
}

/// The elements of a matrix in a lane for which the kernels in registers are written.
const ELEMENTS: u32 = 8;

impl Matrices {
    /// What the probe found. Kernels in registers are written for scores that become left operands in place.
    pub fn new(format: MatrixFormat, probed: Result<Probed, NoElementAccess>) -> Self {
        let rounding = probed.as_ref().map_or(Rounding::Nearest, |found| found.rounding);
        let elements = probed.and_then(|found| {
            let in_place = found.a == found.c && found.b == found.c.transposed();
            match in_place && format.elements() == ELEMENTS {
                true => Ok(found.c),
                false => Err(NoElementAccess::Roles),
            }
        });
        Matrices { format, elements, rounding, bf16: Err(NoBf16Matrices::NotGiven) }
    }

    /// With what the probe found of matrices of bf16. Kernels are written for those that lie like matrices of f16.
    pub(crate) fn with_bf16(mut self, probed: Result<Probed, NoElementAccess>) -> Self {
        self.bf16 = match (&self.elements, probed) {
            (Err(why), _) => Err(why.clone().into()),
            (_, Err(why)) => Err(why.into()),
            (Ok(f16), Ok(found)) if found.a == *f16 && found.c == *f16 && found.b == f16.transposed() => {
                Ok(found.rounding)
            }
            _ => Err(NoBf16Matrices::Layout),
        };
        self
    }

    /// The operands that elements of this type are as they are, in a form; `None` where they have to be split or scaled to f16.
    pub(crate) fn operands(&self, element_type: ElementType, form: CoopForm) -> Option<Operands> {
        match (element_type, form, &self.bf16) {
            (ElementType::F16, CoopForm::WorkgroupMemory, _) => Some(Operands::F16),
            (ElementType::F16, CoopForm::Registers, _) => Some(self.f16()),
            (ElementType::BF16, CoopForm::Registers, &Ok(rounding)) => Some(Operands { bf16: true, rounding }),
            _ => None,
        }
    }

    /// Operands of f16 in registers, whatever elements they are made of.
    pub(crate) fn f16(&self) -> Operands {
        Operands { bf16: false, rounding: self.rounding }
    }

    /// The form that is asked for, or else the faster of those that the device allows, and why.
    pub fn form(&self, asked: Option<CoopForm>) -> (CoopForm, String) {
        match (asked, &self.elements) {
            (Some(form), _) => (form, "asked for".into()),
            (None, Ok(_)) => (CoopForm::Registers, "the device gives access to the elements of matrices".into()),
            (None, Err(why)) => (CoopForm::WorkgroupMemory, format!("no access to the elements of matrices: {why}")),
        }
    }

    /// Whether the kernels for f32 and scaled bf16 can run, which have only the form in registers.
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
