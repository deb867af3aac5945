//! In the place of `spirv.rs` on the web, where no module with element access can be made: [`MatrixFormat::of`] finds no matrices
//! there, so that nothing asks for one.

use super::access::ModuleError;
use super::format::MatrixFormat;

/// A module in SPIR-V whose placeholder functions access elements; there is none here.
#[derive(Clone, Debug)]
pub enum ElementModule {}

impl ElementModule {
    /// Fails: browsers take no SPIR-V.
    pub fn new(
        _text: &str,
        _format: MatrixFormat,
        _bindings: &[u32],
        _checked: bool,
    ) -> Result<ElementModule, ModuleError> {
        Err(ModuleError::Naga("browsers take no SPIR-V".into()))
    }

    /// There is none to change.
    pub fn into_bf16(self) -> Result<ElementModule, ModuleError> {
        match self {}
    }

    /// The words of the module.
    pub fn spirv(&self) -> &[u32] {
        match *self {}
    }

    /// Names and workgroup sizes.
    pub fn entry_points(&self) -> &[(String, [u32; 3])] {
        match *self {}
    }
}
