//! The derivatives of what WGSL computes, as expressions. What they are where a function has a corner or none is in docs/mods.md.

use naga::{BinaryOperator, MathFunction, VectorSize};

use super::build::{Builder, Value};

/// An operand: its value and, if it depends on the score, its slope.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub value: Value,
    pub slope: Option<Value>,
}

/// The slope of a sum, difference, product, quotient or remainder, of which an operand depends on the score.
pub(super) fn binary(b: &mut Builder, op: BinaryOperator, [x, y]: [Operand; 2], result: Value) -> Option<Value> {
    use BinaryOperator as B;
    match op {
        B::Add => sum(b, x.slope, y.slope),
        B::Subtract => {
            let of_right = y.slope.map(|slope| b.negative(slope));
            sum(b, x.slope, of_right)
        }
        B::Multiply => {
            // In the order of the operands, for one may be a matrix.
            let of_left = x.slope.map(|slope| b.times(slope, y.value));
            let of_right = y.slope.map(|slope| b.times(x.value, slope));
            sum(b, of_left, of_right)
        }
        B::Divide => {
            let of_right = y.slope.map(|slope| {
                let product = b.times(result, slope);
                b.negative(product)
            });
            let numerator = sum(b, x.slope, of_right)?;
            Some(b.over(numerator, y.value))
        }
        B::Modulo => {
            let of_right = y.slope.map(|slope| {
                let quotient = b.over(x.value, y.value);
                let whole = b.math(MathFunction::Trunc, &[quotient]);
                let product = b.times(whole, slope);
                b.negative(product)
            });
            sum(b, x.slope, of_right)
        }
        _ => None,
    }
}

fn sum(b: &mut Builder, x: Option<Value>, y: Option<Value>) -> Option<Value> {
    match (x, y) {
        (Some(x), Some(y)) => Some(b.plus(x, y)),
        (x, y) => x.or(y),
    }
}

/// The slope of a built-in function of which an argument depends on the score. `size` is that of its first argument.
pub(super) fn math(
    b: &mut Builder,
    fun: MathFunction,
    arguments: &[Operand],
    size: Option<VectorSize>,
    result: Value,
) -> Option<Value> {
    use MathFunction as M;
    match fun {
        M::Dot | M::Cross => {
            let [x, y] = [arguments[0], arguments[1]];
            let of_left = x.slope.map(|slope| b.math(fun, &[slope, y.value]));
            let of_right = y.slope.map(|slope| b.math(fun, &[x.value, slope]));
            sum(b, of_left, of_right)
        }
        M::Length => Some(length(b, arguments[0].value, arguments[0].slope?, size, result)),
        M::Distance => {
            let [x, y] = [arguments[0], arguments[1]];
            let difference = b.minus(x.value, y.value);
            let slope = binary(b, BinaryOperator::Subtract, [x, y], difference)?;
            Some(length(b, difference, slope, size, result))
        }
        M::Normalize => Some(normalize(b, arguments[0].value, arguments[0].slope?, size, result)),
        // Linear, and the exponent is a whole number.
        M::Ldexp => Some(b.math(M::Ldexp, &[arguments[0].slope?, arguments[1].value])),
        _ => {
            let values: Vec<_> = arguments.iter().map(|argument| argument.value).collect();
            let mut total = None;
            for (n, argument) in arguments.iter().enumerate() {
                if let Some(slope) = argument.slope {
                    let term = match partial(b, fun, &values, n, size, result)? {
                        Partial::One => slope,
                        Partial::Factor(factor) => b.times(factor, slope),
                    };
                    total = sum(b, total, Some(term));
                }
            }
            total
        }
    }
}

/// x · slope / |x|, and 0 where x is 0.
fn length(b: &mut Builder, x: Value, slope: Value, size: Option<VectorSize>, length: Value) -> Value {
    let product = match size {
        Some(_) => b.math(MathFunction::Dot, &[x, slope]),
        None => b.times(x, slope),
    };
    let zero = b.number(0.0, None);
    let one = b.number(1.0, None);
    let is_zero = b.binary(BinaryOperator::Equal, length, zero);
    let divisor = b.select(is_zero, one, length);
    b.over(product, divisor)
}

/// (slope - n (n · slope)) / |x|, and 0 where x is 0.
fn normalize(b: &mut Builder, x: Value, slope: Value, size: Option<VectorSize>, result: Value) -> Value {
    let along = b.math(MathFunction::Dot, &[result, slope]);
    let along = b.times(result, along);
    let across = b.minus(slope, along);
    let length = b.math(MathFunction::Length, &[x]);
    let zero = b.number(0.0, None);
    let one = b.number(1.0, None);
    let is_zero = b.binary(BinaryOperator::Equal, length, zero);
    let divisor = b.select(is_zero, one, length);
    let inverse = b.over(one, divisor);
    let inverse = b.select(is_zero, zero, inverse);
    let inverse = b.widen(inverse, size);
    b.times(across, inverse)
}

/// How much a function changes with one of its arguments.
enum Partial {
    One,
    Factor(Value),
}

/// The derivative of a function, component by component, in its n-th argument.
fn partial(
    b: &mut Builder,
    fun: MathFunction,
    x: &[Value],
    n: usize,
    size: Option<VectorSize>,
    result: Value,
) -> Option<Partial> {
    use BinaryOperator as B;
    use MathFunction as M;
    let factor = match (fun, n) {
        (M::Fract | M::QuantizeToF16, 0) | (M::Fma, 2) => return Some(Partial::One),
        (M::Fma, _) => x[1 - n],
        (M::Abs, _) => b.math(M::Sign, &[x[0]]),
        // Of two that are equal each counts half.
        (M::Min | M::Max, _) => {
            let (this, other) = (x[n], x[1 - n]);
            let is_taken = if fun == M::Min { B::Less } else { B::Greater };
            let [zero, half, one] = [0.0, 0.5, 1.0].map(|number| b.number(number, size));
            let equal = b.binary(B::Equal, this, other);
            let taken = b.binary(is_taken, this, other);
            let otherwise = b.select(equal, half, zero);
            b.select(taken, one, otherwise)
        }
        // At a bound the argument counts.
        (M::Clamp, 0) => between(b, x[1], x[0], x[2], size),
        (M::Clamp, _) => {
            let beyond = if n == 1 { B::Less } else { B::Greater };
            let [zero, one] = [0.0, 1.0].map(|number| b.number(number, size));
            let condition = b.binary(beyond, x[0], x[n]);
            b.select(condition, one, zero)
        }
        (M::Saturate, _) => {
            let [zero, one] = [0.0, 1.0].map(|number| b.number(number, size));
            between(b, zero, x[0], one, size)
        }
        (M::Cos, _) => {
            let sin = b.math(M::Sin, x);
            b.negative(sin)
        }
        (M::Sin, _) => b.math(M::Cos, x),
        (M::Cosh, _) => b.math(M::Sinh, x),
        (M::Sinh, _) => b.math(M::Cosh, x),
        (M::Tan, _) => {
            let square = b.times(result, result);
            let one = b.number(1.0, size);
            b.plus(one, square)
        }
        (M::Tanh, _) => {
            let square = b.times(result, result);
            let one = b.number(1.0, size);
            b.minus(one, square)
        }
        (M::Asin | M::Acos, _) => {
            let square = b.times(x[0], x[0]);
            let one = b.number(1.0, size);
            let rest = b.minus(one, square);
            let inverse = b.math(M::InverseSqrt, &[rest]);
            if fun == M::Asin { inverse } else { b.negative(inverse) }
        }
        (M::Atan | M::Atanh, _) => {
            let square = b.times(x[0], x[0]);
            let one = b.number(1.0, size);
            let rest = if fun == M::Atan { b.plus(one, square) } else { b.minus(one, square) };
            b.over(one, rest)
        }
        (M::Asinh | M::Acosh, _) => {
            let square = b.times(x[0], x[0]);
            let one = b.number(1.0, size);
            let rest = if fun == M::Asinh { b.plus(square, one) } else { b.minus(square, one) };
            b.math(M::InverseSqrt, &[rest])
        }
        // atan2(y, x): x / (x² + y²) and -y / (x² + y²).
        (M::Atan2, _) => {
            let squares = [x[0], x[1]].map(|x| b.times(x, x));
            let squares = b.plus(squares[0], squares[1]);
            let numerator = if n == 0 { x[1] } else { b.negative(x[0]) };
            b.over(numerator, squares)
        }
        (M::Radians, _) => b.number(std::f32::consts::PI / 180.0, size),
        (M::Degrees, _) => b.number(180.0 / std::f32::consts::PI, size),
        (M::Exp, _) => result,
        (M::Exp2, _) => {
            let ln_2 = b.number(std::f32::consts::LN_2, size);
            b.times(result, ln_2)
        }
        (M::Log, _) => {
            let one = b.number(1.0, size);
            b.over(one, x[0])
        }
        (M::Log2, _) => {
            let log2_e = b.number(std::f32::consts::LOG2_E, size);
            b.over(log2_e, x[0])
        }
        (M::Sqrt, _) => {
            let half = b.number(0.5, size);
            b.over(half, result)
        }
        (M::InverseSqrt, _) => {
            let square = b.times(result, result);
            let cube = b.times(square, result);
            let factor = b.number(-0.5, size);
            b.times(factor, cube)
        }
        (M::Pow, 0) => {
            let one = b.number(1.0, size);
            let exponent = b.minus(x[1], one);
            let power = b.math(M::Pow, &[x[0], exponent]);
            b.times(x[1], power)
        }
        // 0 where the base is 0: the power is 0 there, whatever the exponent.
        (M::Pow, _) => {
            let [zero, one] = [0.0, 1.0].map(|number| b.number(number, size));
            let positive = b.binary(B::Greater, x[0], zero);
            let base = b.select(positive, x[0], one);
            let logarithm = b.math(M::Log, &[base]);
            b.times(result, logarithm)
        }
        // 1 - x[2], which may be a number where the others are vectors.
        (M::Mix, 0) => {
            let [one, zero] = [1.0, 0.0].map(|number| b.number(number, size));
            b.math(M::Mix, &[one, zero, x[2]])
        }
        (M::Mix, 1) => x[2],
        (M::Mix, _) => b.minus(x[1], x[0]),
        (M::SmoothStep, _) => smooth_step(b, x, n, size),
        _ => return None,
    };
    Some(Partial::Factor(factor))
}

/// 1 from `low` to `high`, both included, and 0 elsewhere.
fn between(b: &mut Builder, low: Value, x: Value, high: Value, size: Option<VectorSize>) -> Value {
    use BinaryOperator as B;
    let [zero, one] = [0.0, 1.0].map(|number| b.number(number, size));
    let above = b.binary(B::GreaterEqual, x, low);
    let below = b.binary(B::LessEqual, x, high);
    let inside = b.binary(B::And, above, below);
    b.select(inside, one, zero)
}

/// smoothstep(e0, e1, x) = t² (3 - 2 t), t = (x - e0) / (e1 - e0) between 0 and 1.
fn smooth_step(b: &mut Builder, x: &[Value], n: usize, size: Option<VectorSize>) -> Value {
    let width = b.minus(x[1], x[0]);
    let beyond = b.minus(x[2], x[0]);
    let t = b.over(beyond, width);
    let t = b.math(MathFunction::Saturate, &[t]);
    let [one, six] = [1.0, 6.0].map(|number| b.number(number, size));
    let rest = b.minus(one, t);
    let product = b.times(t, rest);
    let in_t = b.times(six, product);
    // dt/dx = 1 / width; dt/de1 = -t / width; dt/de0 = (t - 1) / width.
    let numerator = match n {
        0 => b.negative(rest),
        1 => b.negative(t),
        _ => one,
    };
    let of_t = b.over(numerator, width);
    b.times(in_t, of_t)
}

/// `tanh_exact` of shaders/attention/score.wgsl, to the last bit.
pub(super) fn tanh_exact(b: &mut Builder, x: Value, size: Option<VectorSize>) -> Value {
    use MathFunction as M;
    let mut number = |x: f32| b.number(x, size);
    let [two_log2_e, largest, one, two, half] = [2.0 * std::f32::consts::LOG2_E, 126.0, 1.0, 2.0, 0.5].map(&mut number);
    let series = [-0.333_331_48, 0.133_259_87, -0.053_052_92, 0.017_256_93].map(&mut number);
    let exponent = b.times(x, two_log2_e);
    let bounded = b.math(M::Min, &[exponent, largest]);
    let e = b.math(M::Exp2, &[bounded]);
    let denominator = b.plus(one, e);
    let rest = b.over(two, denominator);
    let large = b.minus(one, rest);
    let y = b.times(x, x);
    let mut sum = series[3];
    for coefficient in [series[2], series[1], series[0]] {
        sum = b.math(M::Fma, &[y, sum, coefficient]);
    }
    let xy = b.times(x, y);
    let small = b.math(M::Fma, &[xy, sum, x]);
    let size_of_x = b.math(M::Abs, &[x]);
    let is_small = b.binary(BinaryOperator::Less, size_of_x, half);
    b.select(is_small, small, large)
}
