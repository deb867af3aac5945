//! What kernels multiply, and how f32 become that.

use super::rounding::Rounding;

/// What the operands of a kernel's matrices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operands {
    /// bf16, not f16.
    pub bf16: bool,
    /// How the device rounds f32 to them.
    pub rounding: Rounding,
    /// How kernels round, where it was asked for.
    pub by_hand: Option<RoundByHand>,
}

/// Ways of `shaders/matrix/matrices.wgsl` to round f32 that become bf16, to be measured beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RoundByHand {
    /// Not at all: the device converts as it does.
    Not,
    /// Half of the last bit is added to the bits, and the device cuts off the rest.
    Add,
    /// The same by an fma, which keeps NaN.
    Fma,
    /// Half of the last bit is added to the bits, and those below are cleared.
    Mask,
    /// As `Mask`, and of what becomes an operand two numbers are packed as bits, so that nothing is converted.
    Pack,
}

impl Operands {
    /// f16, in a module without access to elements: nobody has asked the device how it rounds.
    pub(crate) const F16: Operands = Operands { bf16: false, rounding: Rounding::Nearest, by_hand: None };

    /// The switches of a module on them, and of what `shaders/matrix/matrices.wgsl` does so that it rounds to nearest.
    pub(crate) fn switches(self) -> Vec<&'static str> {
        let mut on = vec![];
        on.extend(self.bf16.then_some("BF16_MATRICES"));
        let by_hand = match (self.rounding, self.by_hand) {
            (_, Some(way)) if self.bf16 => way,
            (Rounding::Nearest, _) => RoundByHand::Not,
            (Rounding::Truncated, _) if self.bf16 => RoundByHand::Add,
            (Rounding::Truncated | Rounding::Other, _) => RoundByHand::Mask,
        };
        on.extend(match (self.bf16, by_hand) {
            (_, RoundByHand::Not) => &[][..],
            (false, _) => &["ROUND", "ROUND_F16"],
            (true, RoundByHand::Add) => &["ROUND", "ROUND_BF16_ADD"],
            (true, RoundByHand::Fma) => &["ROUND", "ROUND_BF16_FMA"],
            (true, RoundByHand::Mask) => &["ROUND", "ROUND_BF16"],
            (true, RoundByHand::Pack) => &["ROUND", "ROUND_BF16", "ROUND_BF16_PACK"],
        });
        on
    }
}
