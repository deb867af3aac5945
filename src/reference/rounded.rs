//! Attention as one would write it in the problem's element type: sums, softmax and lse in f32; probabilities, gradients of
//! scores and results rounded to the type.
//!
//! Kernels of 16-bit types are held against its errors: see [`accept`](super::accept). All values here are f64, and are such as
//! f32 or the element type has.

use half::{bf16, f16};

use super::definition::Attention;
use super::values::{Backward, Extras, Forward};
use crate::{ElementType, Problem};

/// The nearest value of the element type.
pub fn nearest(element_type: ElementType, x: f32) -> f32 {
    match element_type {
        ElementType::F32 => x,
        ElementType::F16 => f16::from_f32(x).to_f32(),
        ElementType::BF16 => bf16::from_f32(x).to_f32(),
    }
}

/// Calls `compute` with the definition of attention in the problem's type.
fn rounded<R>(problem: &Problem, extras: Extras<'_>, compute: impl FnOnce(Attention<'_, f32>) -> R) -> R {
    compute(Attention { problem, extras, round: &|x| nearest(problem.element_type, x) })
}

/// The forward pass, as [`forward`](super::forward()) of the exact computation. lse is not rounded to the type: kernels give it in f32.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn forward<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    query: &[T],
    key: &[T],
    value: &[T],
    extras: impl Into<Extras<'a>>,
) -> Forward {
    rounded(problem, extras.into(), |attention| attention.forward([query, key, value]))
}

/// One row of the forward pass, at batch entry, query head and position `[b, h, i]`: o and lse.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn forward_row<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    query: &[T],
    key: &[T],
    value: &[T],
    extras: impl Into<Extras<'a>>,
    at: [u32; 3],
) -> (Vec<f64>, f64) {
    let (out, lse) = rounded(problem, extras.into(), |attention| attention.forward_row([query, key, value], at));
    (out.into_iter().map(Into::into).collect(), lse.into())
}

/// What the backward pass is given of the forward pass: of each row `[batch, heads_q, seqlen_q]` lse and delta, in f32.
#[derive(Clone, Debug)]
pub struct Rows {
    lse: Vec<f32>,
    delta: Vec<f32>,
    delta_sizes: Vec<f64>,
}

impl Rows {
    /// From o in the problem's type, and lse in f32, as a forward pass left them. `grad_out` and `grad_lse` are their gradients.
    ///
    /// # Panics
    /// If a slice is shorter than the problem's shape says.
    pub fn new<T: Copy + Into<f64>, O: Copy + Into<f64>>(
        problem: &Problem,
        grad_out: &[T],
        out: &[O],
        lse: &[f32],
        grad_lse: Option<&[f32]>,
    ) -> Self {
        let all = Extras::default();
        rounded(problem, all, |attention| Rows {
            lse: lse.to_vec(),
            delta: attention.deltas(grad_out, out, grad_lse),
            delta_sizes: attention.delta_sizes(grad_out, out, grad_lse),
        })
    }
}

/// Gradients, from q, k, v and do. They are sums in f32 still: what accumulates is added before [`nearest`] rounds them.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    tensors: [&[T]; 4],
    rows: &Rows,
    extras: impl Into<Extras<'a>>,
) -> Backward {
    rounded(problem, extras.into(), |attention| {
        attention.backward(tensors, [&rows.lse, &rows.delta], &rows.delta_sizes)
    })
}

/// Some rows of a gradient.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Gradient {
    /// The rows, in the problem's type.
    pub values: Vec<f64>,
    /// The norm of what was summed: see [`Backward::terms`].
    pub terms: f64,
}

impl Gradient {
    fn add(&mut self, problem: &Problem, values: Vec<f32>, squares: f64) {
        self.values.extend(values.into_iter().map(|x| f64::from(nearest(problem.element_type, x))));
        self.terms = (self.terms * self.terms + squares).sqrt();
    }
}

/// Rows of dq, each at batch entry, query head and position `[b, h, i]`.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward_query_rows<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    tensors: [&[T]; 4],
    rows: &Rows,
    extras: impl Into<Extras<'a>>,
    at: &[[u32; 3]],
) -> Gradient {
    rounded(problem, extras.into(), |attention| {
        let mut result = Gradient::default();
        for &at in at {
            let n = attention.query_number(at);
            let dq = attention.query_gradient(tensors, [rows.lse[n], rows.delta[n]], at);
            result.add(problem, dq.values, dq.squares);
        }
        result
    })
}

/// Rows of dk and of dv, each at batch entry, key-value head and position `[b, h, j]`.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward_key_rows<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    tensors: [&[T]; 4],
    rows: &Rows,
    extras: impl Into<Extras<'a>>,
    at: &[[u32; 3]],
) -> [Gradient; 2] {
    rounded(problem, extras.into(), |attention| {
        let mut result = [Gradient::default(), Gradient::default()];
        for &at in at {
            let gradients = attention.key_gradients(tensors, [&rows.lse, &rows.delta], at);
            for (result, row) in result.iter_mut().zip(gradients) {
                result.add(problem, row.values, row.squares);
            }
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::super::definition::row;
    use super::*;
    use crate::Shape;
    use crate::reference::{self, accept::Errors};

    fn numbers(n: usize, seed: f64) -> Vec<f64> {
        (0..n).map(|n| f64::from(f16::from_f64(((n as f64 + 1.0) * seed).sin()))).collect()
    }

    /// In f32 it is exact but for f32; in the others it errs by about a rounding of the type.
    #[test]
    fn errors_are_those_of_the_type() {
        let shape = Shape { heads_q: 4, heads_kv: 2, seqlen_k: 9, head_dim_v: 6, ..Shape::square(2, 4, 7, 8) };
        for (element_type, [least, most]) in
            [(ElementType::F32, [1e-9, 2e-6]), (ElementType::F16, [1e-5, 1e-3]), (ElementType::BF16, [1e-4, 1e-2])]
        {
            let problem = Problem::new(shape, element_type).causal(crate::Causal::BottomRight).softcap(1.5);
            let lengths: Option<&[i32]> = Some(&[9, 4]);
            let [q, k, v, g] = [(448, 0.4), (288, 1.1), (216, 0.9), (336, 2.1)].map(|(n, seed)| numbers(n, seed));
            let exact = reference::forward(&problem, &q, &k, &v, lengths);
            let found = forward(&problem, &q, &k, &v, lengths);
            let check = |what: &str, found: &[f64], exact: &[f64], terms: f64| {
                let error = Errors::of_sums(found.iter().copied(), exact, terms).relative;
                assert!((least..most).contains(&error), "{what} in {element_type} is off by {error:e}");
            };
            check("o", &found.out, &exact.out, 0.0);
            let lse: Vec<f32> = found.lse.iter().map(|&x| x as f32).collect();
            let rows = Rows::new(&problem, &g, &found.out, &lse, None);
            let tensors = [&q[..], &k, &v, &g];
            let exact = reference::backward(&problem, tensors, None, lengths);
            let found = backward(&problem, tensors, &rows, lengths);
            check("dq", &found.query, &exact.query, exact.terms[0]);
            check("dk", &found.key, &exact.key, exact.terms[1]);
            check("dv", &found.value, &exact.value, exact.terms[2]);
            // Single rows are those of the whole.
            let some = [[0, 1, 2], [1, 0, 3]];
            let near = |x: &[f64]| -> Vec<f64> { x.iter().map(|&x| nearest(element_type, x as f32).into()).collect() };
            let dq = backward_query_rows(&problem, tensors, &rows, lengths, &some);
            assert_eq!(dq.values, near(&[row(&found.query, 9, 8), row(&found.query, 31, 8)].concat()));
            let [dk, dv] = backward_key_rows(&problem, tensors, &rows, lengths, &some);
            assert_eq!(dk.values, near(&[row(&found.key, 11, 8), row(&found.key, 21, 8)].concat()));
            assert_eq!(dv.values, near(&[row(&found.value, 11, 6), row(&found.value, 21, 6)].concat()));
        }
    }
}
