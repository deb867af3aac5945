//! How far the results of a kernel may be from the exact ones. The bounds stand here and nowhere else:
//!
//! | | f32 | f16, bf16 |
//! |---|---|---|
//! | o | relative error at most 2e-6 | largest error at most twice that of plain computation, plus 1e-5, or as f32 |
//! | dq, dk, dv | relative error at most 5e-6 | as o |
//! | lse | each error at most 1e-5 + 1e-6 · \|lse\| | as f32: lse is f32 in each type |
//!
//! The relative error is `‖x − expected‖ / ‖expected‖`.
//!
//! The bound of 16-bit types is flash-attention's rule, with two additions:
//!
//! - The error of plain computation is that of [`rounded`](super::rounded), but at least half a unit in the last place of the largest value. Plain
//!   computation of a few values may have hardly any error, because all of them lie beside numbers of the type.
//! - What keeps the bound of f32 is exact enough for 16 bits. Plain computation of terms that cancel may have no error at all.

use std::fmt;

use crate::ElementType;

/// How far values are from what they should be, and how large that is. NaN counts as infinitely far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Errors {
    /// The largest difference.
    pub largest: f64,
    /// `‖x − expected‖ / ‖expected‖`.
    pub relative: f64,
    /// The largest of `|expected|` that is finite.
    pub size: f64,
}

impl Errors {
    /// Of as many values as are given.
    pub fn of(found: impl IntoIterator<Item = impl Into<f64>>, expected: &[f64]) -> Self {
        Self::of_sums(found, expected, 0.0)
    }

    /// Of sums that may cancel, with the norm of their terms: errors are relative to the larger of `‖expected‖` and this.
    pub fn of_sums(found: impl IntoIterator<Item = impl Into<f64>>, expected: &[f64], terms: f64) -> Self {
        let (mut largest, mut squares, mut norm, mut size) = (0.0f64, 0.0, 0.0, 0.0f64);
        for (found, &expected) in found.into_iter().zip(expected) {
            let error = difference(found.into(), expected);
            largest = largest.max(error);
            squares += error * error;
            norm += finite(expected).powi(2);
            size = size.max(finite(expected).abs());
        }
        let relative = if squares == 0.0 { 0.0 } else { squares.sqrt() / norm.sqrt().max(terms) };
        Errors { largest, relative, size }
    }
}

/// Flash-attention's rule: what a kernel may be off by, if plain computation is off by `plain`.
fn twice(plain: f64) -> f64 {
    2.0 * plain + 1e-5
}

/// Half a unit in the last place of `size`, a normal number: the most that rounding to the type costs a value of at most this size.
fn rounding(element_type: ElementType, size: f64) -> f64 {
    let digits = match element_type {
        ElementType::F32 => 24,
        ElementType::F16 => 11,
        ElementType::BF16 => 8,
    };
    if size == 0.0 { 0.0 } else { (size.log2().floor() - f64::from(digits)).exp2() }
}

fn difference(found: f64, expected: f64) -> f64 {
    let error = (found - expected).abs();
    if found == expected {
        0.0
    } else if error.is_nan() {
        f64::INFINITY
    } else {
        error
    }
}

/// −∞, the lse of a row without keys, has no size to be relative to.
fn finite(x: f64) -> f64 {
    if x.is_finite() { x } else { 0.0 }
}

/// What a kernel's errors must keep to.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Bound {
    /// The relative error is at most this.
    Relative(f64),
    /// The largest error is at most this.
    Largest(f64),
    /// One of the two: the largest error is at most `largest`, or the relative one at most `relative`.
    Either {
        /// See [`Largest`](Bound::Largest).
        largest: f64,
        /// See [`Relative`](Bound::Relative).
        relative: f64,
    },
}

impl Bound {
    /// For o. `plain` are the errors of [`rounded`](super::rounded), of use in 16-bit types.
    pub fn out(element_type: ElementType, plain: Errors) -> Self {
        Self::of_type(element_type, 2e-6, plain)
    }

    /// For dq, dk and dv, likewise.
    pub fn gradient(element_type: ElementType, plain: Errors) -> Self {
        Self::of_type(element_type, 5e-6, plain)
    }

    /// For gradients that are sums over scores which share an element: of a bias, of sinks, of slopes. Errors are relative to the norm of
    /// what is summed ([`Errors::of_sums`]). In 16-bit types that is what it costs to round each term once: o is rounded, from which
    /// every term has its delta.
    pub fn shared(element_type: ElementType) -> Self {
        Bound::Relative(match element_type {
            ElementType::F32 => 5e-6,
            ElementType::F16 => 1.0 / 2048.0,
            ElementType::BF16 => 1.0 / 256.0,
        })
    }

    /// Flash-attention's rule for 16-bit types, for what is not rounded to the type.
    pub fn by_plain(plain: Errors) -> Self {
        Bound::Largest(twice(plain.largest))
    }

    fn of_type(element_type: ElementType, relative: f64, plain: Errors) -> Self {
        match element_type {
            ElementType::F32 => Bound::Relative(relative),
            _ => Bound::Either { largest: twice(plain.largest.max(rounding(element_type, plain.size))), relative },
        }
    }

    /// The bound for gradients where scores are huge: an lse of f32 is known to `|lse| · 2⁻²³`, and so are probabilities. The
    /// largest |lse| and the largest |gradient| say what that makes.
    pub fn with_huge_scores(self, largest_lse: f64, largest_gradient: f64) -> Self {
        let lost = f64::from(f32::EPSILON) * largest_lse;
        match self {
            Bound::Relative(most) => Bound::Relative(most.max(lost)),
            Bound::Largest(most) => Bound::Largest(most + lost * largest_gradient),
            Bound::Either { largest, relative } => {
                Bound::Either { largest: largest + lost * largest_gradient, relative }
            }
        }
    }

    /// Whether these errors keep the bound.
    pub fn judge(self, errors: Errors) -> Verdict {
        let ratio = match self {
            Bound::Relative(most) => errors.relative / most,
            Bound::Largest(most) => errors.largest / most,
            Bound::Either { largest, relative } => (errors.largest / largest).min(errors.relative / relative),
        };
        Verdict::new(errors, Rule::Bound(self), ratio)
    }
}

/// Judges lse, computed from the very values that the expected one was computed from.
pub fn lse(found: impl IntoIterator<Item = impl Into<f64>>, expected: &[f64]) -> Verdict {
    let found: Vec<f64> = found.into_iter().map(Into::into).collect();
    let ratio = |(&x, &y): (&f64, &f64)| difference(x, y) / (1e-5 + 1e-6 * finite(y).abs());
    let worst = found.iter().zip(expected).map(ratio).fold(0.0, f64::max);
    Verdict::new(Errors::of(found, expected), Rule::Lse, worst)
}

/// Errors, and whether they keep their bound.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Verdict {
    /// What was found.
    pub errors: Errors,
    /// What they were held against.
    pub rule: Rule,
    /// The error that the rule is for, as a part of what it may be.
    pub ratio: f64,
    /// Whether the rule is kept.
    pub holds: bool,
}

/// What errors are held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// One bound for all values.
    Bound(Bound),
    /// A bound for each value, that of lse.
    Lse,
}

impl Verdict {
    fn new(errors: Errors, rule: Rule, ratio: f64) -> Self {
        // NaN, of a bound of 0, does not hold.
        Verdict { errors, rule, ratio, holds: ratio <= 1.0 }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rule::Bound(Bound::Relative(most)) => write!(f, "relative error at most {most:.1e}"),
            Rule::Bound(Bound::Largest(most)) => {
                write!(f, "largest error at most {most:.1e}, by twice that of plain computation in this type plus 1e-5")
            }
            Rule::Bound(Bound::Either { largest, relative }) => {
                write!(f, "{}, or relative error at most {relative:.1e}", Rule::Bound(Bound::Largest(*largest)))
            }
            Rule::Lse => f.write_str("each error at most 1e-5 + 1e-6 |lse|"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Errors { largest, relative, .. } = self.errors;
        let mark = if self.holds { "within" } else { "breaks" };
        write!(f, "largest error {largest:.1e}, relative error {relative:.1e}; {mark} the bound: {}", self.rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_infinitely_far() {
        for found in [[f64::NAN, 1.0], [1.0, f64::NAN]] {
            let errors = Errors::of(found, &[1.0, 1.0]);
            assert_eq!(errors, Errors { largest: f64::INFINITY, relative: f64::INFINITY, size: 1.0 });
            for ty in [ElementType::F32, ElementType::F16] {
                assert!(
                    !Bound::out(ty, Errors::default()).judge(errors).holds
                        && !Bound::gradient(ty, Errors::default()).judge(errors).holds
                );
            }
            assert!(!lse(found, &[1.0, 1.0]).holds);
        }
    }

    #[test]
    fn bounds_hold_up_to_their_ends() {
        let off = |by: f64| Errors::of([1.0 + by], &[1.0]);
        let plain = Errors { largest: 1e-2, relative: 0.0, size: 1.0 };
        for (bound, most) in [
            (Bound::out(ElementType::F32, plain), 2e-6),
            (Bound::gradient(ElementType::F32, plain), 5e-6),
            (Bound::out(ElementType::F16, plain), 2.001e-2),
            (Bound::gradient(ElementType::BF16, plain), 2.001e-2),
            (Bound::gradient(ElementType::F32, plain).with_huge_scores(1e3, 1.0), 1e3 / 8388608.0),
            (Bound::gradient(ElementType::F32, plain).with_huge_scores(1.0, 1.0), 5e-6),
            (Bound::gradient(ElementType::F16, plain).with_huge_scores(1e4, 10.0), 2.001e-2 + 1e5 / 8388608.0),
        ] {
            assert!(bound.judge(off(0.999 * most)).holds && !bound.judge(off(1.001 * most)).holds, "{bound:?}");
        }
    }

    /// Values beside numbers of the type are no reason to expect such values of a kernel.
    #[test]
    fn plain_errors_are_no_smaller_than_rounding() {
        let bound = |ty, size| match Bound::out(ty, Errors { size, ..Default::default() }) {
            Bound::Either { largest, relative: 2e-6 } => largest - 1e-5,
            bound => panic!("{bound:?}"),
        };
        for (ty, size, unit) in [
            (ElementType::F16, 1.0, 1.0 / 1024.0),
            (ElementType::F16, 1.99, 1.0 / 1024.0),
            (ElementType::BF16, 2.0, 1.0 / 64.0),
            (ElementType::BF16, 0.0, 0.0),
        ] {
            assert!((bound(ty, size) - unit).abs() < 1e-15, "{ty} {size}");
        }
    }

    /// Plain computation of equal numbers has no error at all.
    #[test]
    fn what_is_exact_enough_for_f32_is_for_16_bits() {
        let bound = Bound::gradient(ElementType::F16, Errors::default());
        let errors = |found: f64| Errors::of_sums([found], &[0.0], 100.0);
        assert!(bound.judge(errors(4e-4)).holds && !bound.judge(errors(6e-4)).holds);
    }

    #[test]
    fn lse_has_a_bound_of_each_row() {
        let expected = [0.0, 1e3, f64::NEG_INFINITY];
        assert!(lse([0.9e-5, 1e3 + 1e-3, f64::NEG_INFINITY], &expected).holds);
        assert!(!lse([1.1e-5, 1e3, f64::NEG_INFINITY], &expected).holds);
        assert!(!lse([0.0, 1e3 + 1.1e-3, f64::NEG_INFINITY], &expected).holds);
        assert!(!lse([0.0, 1e3, -1e30], &expected).holds);
        assert!(!lse([f64::NEG_INFINITY, 1e3, f64::NEG_INFINITY], &expected).holds);
    }

    /// A sum that cancels has nothing to be relative to but its terms.
    #[test]
    fn errors_of_sums_are_relative_to_their_terms() {
        assert_eq!(Errors::of([1e-7], &[0.0]).relative, f64::INFINITY);
        assert_eq!(Errors::of_sums([0.5], &[0.0], 2.0).relative, 0.25);
        assert_eq!(Errors::of_sums([4.5], &[4.0], 2.0).relative, 0.125);
    }
}
