//! The functions of WGSL on whole numbers and on bits.

use naga::MathFunction;

use super::number::Number;
use super::value::Value;

/// Functions of whole numbers.
pub(super) fn math(fun: MathFunction, x: &[&Value]) -> Value {
    use MathFunction as M;
    match (fun, x) {
        (M::Abs, [Value::Int(x)]) => Value::Int(x.wrapping_abs()),
        (M::Sign, [Value::Int(x)]) => Value::Int(x.signum()),
        (M::Min, [Value::Int(x), Value::Int(y)]) => Value::Int(*x.min(y)),
        (M::Max, [Value::Int(x), Value::Int(y)]) => Value::Int(*x.max(y)),
        (M::Clamp, [Value::Int(x), Value::Int(y), Value::Int(z)]) => Value::Int(*x.max(y).min(z)),
        (M::Min, [Value::Uint(x), Value::Uint(y)]) => Value::Uint(*x.min(y)),
        (M::Max, [Value::Uint(x), Value::Uint(y)]) => Value::Uint(*x.max(y)),
        (M::Clamp, [Value::Uint(x), Value::Uint(y), Value::Uint(z)]) => Value::Uint(*x.max(y).min(z)),
        (_, [Value::Int(n), rest @ ..]) => match of_bits(fun, *n as u32, true, rest) {
            Value::Uint(bits) => Value::Int(bits as i32),
            other => other,
        },
        (_, [Value::Uint(n), rest @ ..]) => of_bits(fun, *n, false, rest),
        (_, x) => x[0].clone(),
    }
}

fn of_bits(fun: MathFunction, n: u32, is_signed: bool, rest: &[&Value]) -> Value {
    use MathFunction as M;
    let uint = |n: usize| match rest.get(n) {
        Some(Value::Uint(n)) => *n,
        Some(Value::Int(n)) => *n as u32,
        _ => 0,
    };
    let mask = |offset: u32, count: u32| {
        let offset = offset.min(32);
        let count = count.min(32 - offset);
        (offset, count, if count == 0 { 0 } else { u32::MAX >> (32 - count) })
    };
    Value::Uint(match fun {
        M::Abs => n,
        M::CountTrailingZeros => n.trailing_zeros(),
        M::CountLeadingZeros => n.leading_zeros(),
        M::CountOneBits => n.count_ones(),
        M::ReverseBits => n.reverse_bits(),
        M::FirstTrailingBit => {
            if n == 0 {
                u32::MAX
            } else {
                n.trailing_zeros()
            }
        }
        M::FirstLeadingBit => {
            let n = if is_signed && (n as i32) < 0 { !n } else { n };
            if n == 0 { u32::MAX } else { 31 - n.leading_zeros() }
        }
        M::ExtractBits => {
            let (offset, count, mask) = mask(uint(0), uint(1));
            let bits = n.checked_shr(offset).unwrap_or(0) & mask;
            let is_negative = is_signed && count > 0 && bits >> (count - 1) & 1 == 1;
            if is_negative { bits | !mask } else { bits }
        }
        M::InsertBits => {
            let (offset, _, mask) = mask(uint(1), uint(2));
            let mask = mask.checked_shl(offset).unwrap_or(0);
            n & !mask | uint(0).checked_shl(offset).unwrap_or(0) & mask
        }
        _ => return unpacked(fun, n),
    })
}

/// Functions that unpack bits.
fn unpacked(fun: MathFunction, n: u32) -> Value {
    use MathFunction as M;
    let float = |x: f64| Value::Float(Number::new(x));
    let bytes = n.to_le_bytes();
    let halves = [n as u16, (n >> 16) as u16];
    Value::many(match fun {
        M::Unpack2x16float => halves.map(|bits| float(half::f16::from_bits(bits).to_f64())).into(),
        M::Unpack2x16unorm => halves.map(|bits| float(bits as f64 / 65535.0)).into(),
        M::Unpack2x16snorm => halves.map(|bits| float((bits as i16 as f64 / 32767.0).max(-1.0))).into(),
        M::Unpack4x8unorm => bytes.map(|byte| float(byte as f64 / 255.0)).into(),
        M::Unpack4x8snorm => bytes.map(|byte| float((byte as i8 as f64 / 127.0).max(-1.0))).into(),
        M::Unpack4xU8 => bytes.map(|byte| Value::Uint(byte.into())).into(),
        M::Unpack4xI8 => bytes.map(|byte| Value::Int((byte as i8).into())).into(),
        // The text has been checked: it has no others.
        _ => return Value::Uint(n),
    })
}
