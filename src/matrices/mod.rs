//! Access to the elements of cooperative matrices, which SPIR-V has and WGSL has not.
//!
//! The lanes of a subgroup hold a cooperative matrix together, each the same number of its elements. A kernel is WGSL
//! that naga parses and validates like any other; it reaches a lane's elements through placeholder functions, whose
//! bodies are harmless:
//! - `coop_get_N(m)`, or `coop_get_…_N(m)`, is element N of what the lane holds of the matrix m,
//! - `coop_set…(m, e0, e1, …)` is m with the lane's first elements replaced by e0, e1, ….
//!
//! [`ElementModule::new`] has naga write the module as SPIR-V, where it then makes the functions do what they say.
//!
//! Which row and column the element n of lane i is in is the implementation's choice. [`probe()`] asks it once, and
//! [`MatrixLayout`] is the answer that kernels are specialised by. It asks as well how the device rounds what becomes an operand.
//!
//! Matrices of bf16 take the same WGSL: [`ElementModule::into_bf16`] makes its f16 bf16. What they need of a device is [`Bf16Matrices`].

pub mod access;
pub mod bf16;
#[cfg(not(target_arch = "wasm32"))]
mod bf16_words;
pub mod format;
pub mod layout;
pub mod operands;
pub(crate) mod passthrough;
pub mod probe;
pub mod rounding;
#[cfg(not(target_arch = "wasm32"))]
pub mod spirv;
#[cfg(not(target_arch = "wasm32"))]
mod words;
// Browsers have no cooperative matrices, and naga would be most of what they load.
#[cfg(target_arch = "wasm32")]
#[path = "spirv_web.rs"]
pub mod spirv;

pub use access::{FEATURES, ModuleError, NoElementAccess};
pub use bf16::{Bf16Matrices, NoBf16Matrices};
pub use format::{MATRIX_FEATURES, MatrixFormat};
pub use layout::{Bit, LayoutError, MatrixLayout};
pub(crate) use operands::Operands;
pub use probe::{Probed, probe, probe_text};
pub use rounding::Rounding;
pub use spirv::ElementModule;
