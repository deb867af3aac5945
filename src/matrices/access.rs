//! What access to the elements of matrices needs, and why a device or a module does without it.

use super::format::MATRIX_FEATURES;
use super::layout::LayoutError;
use crate::error::features;

/// [`MATRIX_FEATURES`] with what access to their elements needs.
pub const FEATURES: wgpu::Features = MATRIX_FEATURES.union(wgpu::Features::PASSTHROUGH_SHADERS);

/// Why a device gives no access to the elements of its matrices.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NoElementAccess {
    /// The device was created without features that are needed.
    #[error("the device was created without {}", features(*.0))]
    Features(wgpu::Features),
    /// Only Vulkan takes SPIR-V.
    #[error("the backend is {0}, not Vulkan")]
    Backend(wgpu::Backend),
    /// The probe's module was refused.
    #[error("the probe: {0}")]
    Module(#[from] ModuleError),
    /// The driver or wgpu refused the probe, or the device failed while it ran.
    #[error("the probe failed: {0}")]
    Probe(String),
    /// Left operands do not lie as accumulators do, right ones not as their transpose, or a lane holds more or fewer
    /// than eight elements.
    #[error("the roles of a matrix lie in the lanes in ways that no kernel is written for")]
    Roles,
    /// The elements lie in a way that no kernel is written for.
    #[error("role {role}: {error}")]
    Layout {
        /// `C`, `A` or `B`.
        role: &'static str,
        /// What is unexpected.
        error: LayoutError,
    },
}

/// Why a module was refused. The library's own modules are not: a test makes each of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// naga refused the text, or could not write it as SPIR-V.
    #[error("{0}")]
    Naga(String),
    /// A matrix that the format does not have.
    #[error("{found} is not a matrix of f16 (A, B) or f32 (C) with {size} rows and columns")]
    Matrix {
        /// The type, as WGSL writes it.
        found: String,
        /// The format's size.
        size: u32,
    },
    /// A function whose name starts with `coop_` and that means nothing.
    #[error("unknown placeholder {function}: it must start with coop_get_ or coop_set")]
    UnknownPlaceholder {
        /// Its name.
        function: String,
    },
    /// A placeholder with the wrong parameters, result or name.
    #[error("placeholder {function}: {expected}")]
    Signature {
        /// Its name.
        function: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A placeholder for an element that a lane may not hold.
    #[error("placeholder {function} is for element {element}; a lane holds {elements}")]
    Element {
        /// Its name.
        function: String,
        /// The highest element that it accesses.
        element: u32,
        /// How many there are.
        elements: u32,
    },
    /// A workgroup in which lanes of a subgroup are missing: only whole subgroups can share matrices.
    #[error("entry point {entry_point} has workgroups of {width} in x; a multiple of {lanes} is needed")]
    Workgroup {
        /// Its name.
        entry_point: String,
        /// The workgroup's size in x.
        width: u32,
        /// The lanes of a subgroup.
        lanes: u32,
    },
    /// A module that cannot be one on bf16, which has no arithmetic.
    #[error("SPIR-V instruction {opcode} takes or gives a number of 16 bits; bf16 is only moved and converted")]
    Bf16Arithmetic {
        /// The instruction's opcode.
        opcode: u32,
    },
    /// A placeholder that the SPIR-V does not name, so that its harmless body would run.
    #[error("placeholder {function} is not in the SPIR-V that naga wrote")]
    Lost {
        /// Its name.
        function: String,
    },
}
