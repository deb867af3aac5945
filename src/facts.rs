//! What a device allows, as plain data. Choosing kernels needs nothing else of a device.

use crate::loops;
use crate::matrices::{MatrixFormat, MatrixLayout, NoElementAccess, ProbedLayouts};
use crate::names::CoopForm;

/// What a device allows.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Facts {
    /// Its limits.
    pub limits: wgpu::Limits,
    /// Lanes of the smallest subgroup there is, on devices that may use subgroup operations.
    pub lanes: Option<u32>,
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
        self.matrices = Some(Matrices { format, elements });
        self
    }
}

/// What is known of a device's matrices.
#[derive(Clone, Debug)]
pub struct Matrices {
    pub format: MatrixFormat,
    /// How accumulators and left operands lie in the lanes, or why there is no access to their elements.
    pub elements: Result<MatrixLayout, NoElementAccess>,
}

/// The elements of a matrix in a lane for which the kernels in registers are written.
const ELEMENTS: u32 = 8;

impl Matrices {
    /// What the probe found. Kernels in registers are written for scores that become left operands in place.
    pub fn new(format: MatrixFormat, probed: Result<ProbedLayouts, NoElementAccess>) -> Self {
        let elements = probed.and_then(|found| {
            let in_place = found.a == found.c && found.b == found.c.transposed();
            match in_place && format.elements() == ELEMENTS {
                true => Ok(found.c),
                false => Err(NoElementAccess::Roles),
            }
        });
        Matrices { format, elements }
    }

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
