//! Numbers in f64 with their slopes, and the functions of WGSL on them: the definition that kernels are tested against.

use std::f64::consts::{LN_2, LOG2_E, PI};
use std::ops::{Add, Div, Mul, Neg, Rem, Sub};

use naga::MathFunction;

/// A number, and how much it changes with the score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Number {
    pub value: f64,
    pub slope: f64,
}

impl Number {
    pub fn new(value: f64) -> Self {
        Number { value, slope: 0.0 }
    }

    /// `value`, which changes with this number by `factor`.
    fn by(self, value: f64, factor: f64) -> Self {
        // A slope of 0 stays 0, even where the factor is infinite.
        Number { value, slope: if self.slope == 0.0 { 0.0 } else { self.slope * factor } }
    }
}

impl Add for Number {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Number { value: self.value + other.value, slope: self.slope + other.slope }
    }
}

impl Sub for Number {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Number { value: self.value - other.value, slope: self.slope - other.slope }
    }
}

impl Mul for Number {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let slope = self.slope * other.value + self.value * other.slope;
        Number { value: self.value * other.value, slope }
    }
}

impl Div for Number {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let value = self.value / other.value;
        Number { value, slope: (self.slope - value * other.slope) / other.value }
    }
}

impl Rem for Number {
    type Output = Self;
    fn rem(self, other: Self) -> Self {
        let whole = (self.value / other.value).trunc();
        Number { value: self.value % other.value, slope: self.slope - whole * other.slope }
    }
}

impl Neg for Number {
    type Output = Self;
    fn neg(self) -> Self {
        Number { value: -self.value, slope: -self.slope }
    }
}

pub(super) fn sqrt(x: Number) -> Number {
    let root = x.value.sqrt();
    x.by(root, 0.5 / root)
}

/// A function, component by component; `None` of one that is not so, or that mods may not call.
pub(super) fn math(fun: MathFunction, x: &[Number]) -> Option<Number> {
    use MathFunction as M;
    let number = Number::new;
    let v = |n: usize| x[n].value;
    let step = |value: f64| Some(number(value));
    // The one of two that is less, or more; the middle of both slopes where they are equal.
    let taken = |a: Number, b: Number, first: bool| match (a.value == b.value, first) {
        (true, _) => Number { value: a.value, slope: (a.slope + b.slope) / 2.0 },
        (false, true) => a,
        (false, false) => b,
    };
    // x[0] between two numbers. At a bound it counts.
    let clamped = |low: Number, high: Number| match x[0] {
        x if x.value > high.value => high,
        x if x.value < low.value => low,
        x => x,
    };
    Some(match fun {
        M::Abs => x[0].by(v(0).abs(), sign(v(0))),
        M::Min => taken(x[0], x[1], v(0) < v(1)),
        M::Max => taken(x[0], x[1], v(0) > v(1)),
        M::Clamp => clamped(x[1], x[2]),
        M::Saturate => clamped(number(0.0), number(1.0)),
        M::Sign => return step(sign(v(0))),
        M::Floor => return step(v(0).floor()),
        M::Ceil => return step(v(0).ceil()),
        M::Round => return step(v(0).round_ties_even()),
        M::Trunc => return step(v(0).trunc()),
        M::Step => return step(if v(0) <= v(1) { 1.0 } else { 0.0 }),
        M::Fract => x[0].by(v(0) - v(0).floor(), 1.0),
        M::QuantizeToF16 => x[0].by(half::f16::from_f64(v(0)).to_f64(), 1.0),
        M::Cos => x[0].by(v(0).cos(), -v(0).sin()),
        M::Sin => x[0].by(v(0).sin(), v(0).cos()),
        M::Cosh => x[0].by(v(0).cosh(), v(0).sinh()),
        M::Sinh => x[0].by(v(0).sinh(), v(0).cosh()),
        M::Tan => x[0].by(v(0).tan(), 1.0 + v(0).tan().powi(2)),
        M::Tanh => x[0].by(v(0).tanh(), 1.0 - v(0).tanh().powi(2)),
        M::Acos => x[0].by(v(0).acos(), -1.0 / (1.0 - v(0) * v(0)).sqrt()),
        M::Asin => x[0].by(v(0).asin(), 1.0 / (1.0 - v(0) * v(0)).sqrt()),
        M::Atan => x[0].by(v(0).atan(), 1.0 / (1.0 + v(0) * v(0))),
        M::Asinh => x[0].by(v(0).asinh(), 1.0 / (v(0) * v(0) + 1.0).sqrt()),
        M::Acosh => x[0].by(v(0).acosh(), 1.0 / (v(0) * v(0) - 1.0).sqrt()),
        M::Atanh => x[0].by(v(0).atanh(), 1.0 / (1.0 - v(0) * v(0))),
        M::Atan2 => {
            let squares = v(0) * v(0) + v(1) * v(1);
            let of_y = x[0].by(v(0).atan2(v(1)), v(1) / squares);
            of_y + x[1].by(0.0, -v(0) / squares)
        }
        M::Radians => x[0].by(v(0) * (PI / 180.0), PI / 180.0),
        M::Degrees => x[0].by(v(0) * (180.0 / PI), 180.0 / PI),
        M::Exp => x[0].by(v(0).exp(), v(0).exp()),
        M::Exp2 => x[0].by(v(0).exp2(), v(0).exp2() * LN_2),
        M::Log => x[0].by(v(0).ln(), 1.0 / v(0)),
        M::Log2 => x[0].by(v(0).log2(), LOG2_E / v(0)),
        M::Pow => {
            let power = v(0).powf(v(1));
            let of_exponent = if v(0) > 0.0 { power * v(0).ln() } else { 0.0 };
            x[0].by(power, v(1) * v(0).powf(v(1) - 1.0)) + x[1].by(0.0, of_exponent)
        }
        M::Sqrt => sqrt(x[0]),
        M::InverseSqrt => {
            let inverse = 1.0 / v(0).sqrt();
            x[0].by(inverse, -0.5 * inverse * inverse * inverse)
        }
        M::Fma => x[0] * x[1] + x[2],
        M::Mix => x[0] * (number(1.0) - x[2]) + x[1] * x[2],
        M::SmoothStep => {
            let t = math(M::Saturate, &[(x[2] - x[0]) / (x[1] - x[0])])?;
            t * t * (number(3.0) - number(2.0) * t)
        }
        _ => return None,
    })
}

/// WGSL's: 0 of 0.
fn sign(x: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

pub(super) fn dot(x: &[Number], y: &[Number]) -> Number {
    x.iter().zip(y).map(|(&x, &y)| x * y).fold(Number::new(0.0), |sum, product| sum + product)
}

/// The length of a vector. Where it is 0 it does not change.
pub(super) fn length(x: &[Number]) -> Number {
    let squares = dot(x, x);
    if squares.value == 0.0 { Number::new(0.0) } else { sqrt(squares) }
}
