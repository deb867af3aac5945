//! What kernels multiply, and how f32 become that.

use super::rounding::Rounding;

/// What the operands of a kernel's matrices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operands {
    /// bf16, not f16.
    pub bf16: bool,
    /// How the device rounds f32 to them.
    pub rounding: Rounding,
}

impl Operands {
    /// f16, in a module without access to elements: nobody has asked the device how it rounds.
    pub(crate) const F16: Operands = Operands { bf16: false, rounding: Rounding::Nearest };

    /// The switches of a module on them, and of what `shaders/matrix/matrices.wgsl` does so that it rounds to nearest.
    pub(crate) fn switches(self) -> Vec<&'static str> {
        let mut on = vec![];
        on.extend(self.bf16.then_some("BF16_MATRICES"));
        on.extend(match (self.rounding, self.bf16) {
            (Rounding::Nearest, _) => &[][..],
            (_, false) => &["ROUND", "ROUND_F16"],
            (_, true) => &["ROUND", "ROUND_BF16"],
        });
        on
    }
}
