//! How a device rounds f32 that become f16 or bf16.

/// How a device rounds f32 that become f16 or bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To the nearest number, whichever it takes of two that are as near; or it keeps the f32 where it can, as software Vulkan does of operands.
    Nearest,
    /// It cuts off what is below the last bit.
    Truncated,
    /// In another way, or now in one and now in another.
    Other,
}

impl Rounding {
    /// How a device rounded `numbers` to `found`, for a type that lacks the last `cut` bits of an f32.
    pub(crate) fn of(numbers: &[f32], found: &[f32], cut: u32) -> Rounding {
        let unit = 1u32 << cut;
        let all = |is_right: &dyn Fn(u32, u32) -> bool| {
            numbers.iter().zip(found).all(|(x, found)| is_right(x.to_bits(), found.to_bits()))
        };
        let is_nearest = |bits: u32, found: u32| {
            let (below, down) = (bits % unit, bits - bits % unit);
            found == bits || found == down && below <= unit / 2 || found == down + unit && below >= unit / 2
        };
        if all(&|bits, found| found == bits - bits % unit) {
            Rounding::Truncated
        } else if all(&is_nearest) {
            Rounding::Nearest
        } else {
            Rounding::Other
        }
    }
}

/// Numbers to find it out with: of both signs, some powers of two about 1, with all kinds of bits above the `cut` last ones, and below them
/// 0, half of what the next bit is worth, a little and a lot more and less.
pub(crate) fn numbers(count: u32, cut: u32) -> Vec<f32> {
    let half = 1 << (cut - 1);
    let below = [1, half / 2, half - 1, half, half, half + 1, half + half / 2, 2 * half - 1, 0];
    let of_mantissa = 1 << (23 - cut);
    let number = |n: u32| {
        // Some have all bits set, so that the one that is carried reaches the exponent.
        let above = if n.is_multiple_of(5) { of_mantissa - 1 } else { n * 37 % of_mantissa };
        let exponent = 127 - 4 + n / 2 % 8;
        f32::from_bits((n % 2) << 31 | exponent << 23 | above << cut | below[n as usize % below.len()])
    };
    (0..count).map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_to_round_are_told_apart() {
        for (count, cut) in [(64, 13), (256, 13), (64, 16), (256, 16)] {
            let numbers = numbers(count, cut);
            let by = |round: &dyn Fn(u32) -> u32| {
                let found: Vec<f32> = numbers.iter().map(|x| f32::from_bits(round(x.to_bits()))).collect();
                Rounding::of(&numbers, &found, cut)
            };
            let (unit, half) = (1u32 << cut, 1u32 << (cut - 1));
            assert_eq!(by(&|x| x / unit * unit), Rounding::Truncated);
            assert_eq!(by(&|x| (x + half) / unit * unit), Rounding::Nearest);
            assert_eq!(by(&|x| (x + half - 1) / unit * unit), Rounding::Nearest);
            let even = |x| (x + half - 1 + x / unit % 2) / unit * unit;
            assert_eq!(by(&even), Rounding::Nearest);
            // Away from 0, and once in another way than else.
            assert_eq!(by(&|x| x.div_ceil(unit) * unit), Rounding::Other);
            let last = numbers.iter().rev().find(|x| x.to_bits() % unit > half).unwrap().to_bits();
            assert_eq!(by(&|x| if x == last { x / unit * unit } else { even(x) }), Rounding::Other);
            // Kept as it is, or lost.
            assert_eq!(by(&|x| x), Rounding::Nearest);
            assert_eq!(by(&|_| 0x7fc0_0000), Rounding::Other);
        }
        let (f16, bf16) = (numbers(256, 13), numbers(256, 16));
        let found: Vec<f32> = f16.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
        assert_eq!(Rounding::of(&f16, &found, 13), Rounding::Nearest);
        let found: Vec<f32> = bf16.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        assert_eq!(Rounding::of(&bf16, &found, 16), Rounding::Nearest);
    }
}
