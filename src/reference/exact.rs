//! Attention in f64.

use super::definition::{Attention, row};
use super::values::{Backward, Extras, Forward, Summed};
use crate::Problem;

fn exact<'a>(problem: &'a Problem, extras: Extras<'a>) -> Attention<'a, f64> {
    Attention { problem, extras, round: &|x| x }
}

/// Attention by its definition, for every row. q, k and v are contiguous, `[batch, heads, positions, dim]`, whatever layouts the problem has.
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
    exact(problem, extras.into()).forward([query, key, value])
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
    exact(problem, extras.into()).forward_row([query, key, value], at)
}

/// Gradients from that of o and, if the loss uses lse, that of lse. With `s = score(q·k)` and `p = exp(s − lse)`
/// (FlashAttention, Dao et al. 2022, section B.2):
///
/// ```text
/// dp_ij = do_i · v_j,   delta_i = do_i · o_i − dlse_i,   ds_ij = p_ij (dp_ij − delta_i)
/// dv_j = Σ_i p_ij do_i,   dq_i = Σ_j score'_ij ds_ij k_j,   dk_j = Σ_i score'_ij ds_ij q_i
/// ```
///
/// `grad_out` is `[batch, heads_q, seqlen_q, head_dim_v]`, `grad_lse` `[batch, heads_q, seqlen_q]`. Whether the problem says
/// that gradients accumulate makes no difference here.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    tensors: [&[T]; 4],
    grad_lse: Option<&[f32]>,
    extras: impl Into<Extras<'a>>,
) -> Backward {
    let extras = extras.into();
    let [query, key, value, grad_out] = tensors;
    let Forward { out, lse } = forward(problem, query, key, value, extras);
    let delta = delta(problem, grad_out, &out, grad_lse);
    let sizes = delta_sizes(problem, grad_out, &out, grad_lse);
    exact(problem, extras).backward(tensors, [&lse, &delta], &sizes)
}

/// One row of dq, at batch entry, query head and position `[b, h, i]`; otherwise as [`backward`].
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward_query_row<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    tensors: [&[T]; 4],
    grad_lse: Option<&[f32]>,
    extras: impl Into<Extras<'a>>,
    at: [u32; 3],
) -> Vec<f64> {
    let exact = exact(problem, extras.into());
    let [query, key, value, grad_out] = tensors;
    let (out, lse) = exact.forward_row([query, key, value], at);
    let n = exact.query_number(at);
    let grad_out = row(grad_out, n, problem.shape.head_dim_v);
    let delta = exact.delta(grad_out, &out, grad_lse.map_or(0.0, |grad| grad[n]));
    exact.query_gradient(tensors, [lse, delta], at).values
}

/// One row of dk and of dv, at batch entry, key-value head and position `[b, h, j]`.
///
/// `lse` and [`delta()`], `[batch, heads_q, seqlen_q]` each, are what [`backward`] works out for each query: with them given, one key
/// costs as much as one query.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward_key_row<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    tensors: [&[T]; 4],
    [lse, delta]: [&[f64]; 2],
    extras: impl Into<Extras<'a>>,
    at: [u32; 3],
) -> (Vec<f64>, Vec<f64>) {
    let [dk, dv] = exact(problem, extras.into()).key_gradients(tensors, [lse, delta], at);
    (dk.values, dv.values)
}

/// What rows of queries, each at batch entry, query head and position `[b, h, i]`, add to the gradients of the bias, of the sinks and of ALiBi's
/// slopes, of those that the problem asks for. All rows add up to what [`backward`] gives of them.
///
/// `lse` and [`delta()`] are those of every query, as for [`backward_key_row`], and so are [`delta_sizes`].
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward_shared_rows<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    tensors: [&[T]; 4],
    [lse, delta, delta_sizes]: [&[f64]; 3],
    extras: impl Into<Extras<'a>>,
    rows: &[[u32; 3]],
) -> [Option<Summed>; 3] {
    exact(problem, extras.into()).shared_gradients(tensors, [lse, delta], delta_sizes, rows)
}

/// `do · o − dlse` of each row, `[batch, heads_q, seqlen_q]`: what the backward pass needs of o.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn delta<T: Copy + Into<f64>, O: Copy + Into<f64>>(
    problem: &Problem,
    grad_out: &[T],
    out: &[O],
    grad_lse: Option<&[f32]>,
) -> Vec<f64> {
    exact(problem, Extras::default()).deltas(grad_out, out, grad_lse)
}

/// The norm of what [`delta()`] sums of each row, `[batch, heads_q, seqlen_q]`. Where the terms of that sum cancel, an error of delta is relative to this norm.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn delta_sizes<T: Copy + Into<f64>, O: Copy + Into<f64>>(
    problem: &Problem,
    grad_out: &[T],
    out: &[O],
    grad_lse: Option<&[f32]>,
) -> Vec<f64> {
    exact(problem, Extras::default()).delta_sizes(grad_out, out, grad_lse)
}

#[cfg(test)]
mod tests {
    use super::super::definition::Pair;
    use super::*;
    use crate::{Alibi, Bias, Causal, Dropout, ElementType, ScoreLayout, Shape};

    fn dot(x: &[f64], y: &[f64]) -> f64 {
        x.iter().zip(y).map(|(x, y)| x * y).sum()
    }

    /// Whether key `j` counts for query `i` when so many queries and keys are valid.
    fn keep(problem: &Problem, [queries, keys]: [u32; 2], i: u32, j: u32) -> bool {
        let [queries, keys] = [queries, keys].map(|length| [length as i32]);
        exact(problem, Extras::default().seqlens_q(&queries[..]).seqlens_k(&keys[..])).keep(Pair { b: 0, h: 0, i, j })
    }

    fn problem(seqlen_q: u32, seqlen_k: u32) -> Problem {
        let shape = Shape { seqlen_k, ..Shape::square(1, 1, seqlen_q, 1) };
        Problem::new(shape, ElementType::F32).scale(1.0)
    }

    #[test]
    fn two_keys_by_hand() {
        let result = forward(&problem(1, 2), &[1.0f64], &[0.0, 3f64.ln()], &[4.0, 8.0], None);
        assert!((result.out[0] - 7.0).abs() < 1e-12, "(1·4 + 3·8) / 4");
        assert!((result.lse[0] - 4f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn sizes_of_delta_do_not_cancel() {
        let problem = Problem::new(Shape::square(1, 1, 1, 2), ElementType::F32).with_sinks().with_grad_sinks();
        let (grad_out, out) = ([3.0f64, -4.0], [1.0f64, 0.75]);
        assert_eq!(delta(&problem, &grad_out, &out, None), [0.0]);
        assert_eq!(delta_sizes(&problem, &grad_out, &out, None), [18f64.sqrt()]);
        assert_eq!(delta_sizes(&problem, &grad_out, &out, Some(&[2.0])), [22f64.sqrt()]);
        // A score and a sink of 0 share the row: o is half of v.
        let found = backward(
            &problem,
            [&[0.0; 2], &[0.0; 2], &[2.0, 1.5], &grad_out],
            None,
            Extras::default().sinks(&[0.0][..]),
        );
        let sinks = found.sinks.unwrap();
        assert_eq!(sinks.values, [0.0]);
        assert!((sinks.terms - 18f64.sqrt() / 2.0).abs() < 1e-12, "{}", sinks.terms);
    }

    #[test]
    fn softcap_bounds_the_scores() {
        let result = forward(&problem(1, 1).softcap(2.0), &[1e6f64], &[1.0], &[1.0], None);
        assert!((result.lse[0] - 2.0).abs() < 1e-12);
    }

    #[test]
    fn masks_by_hand() {
        let seen_by = |problem: &Problem, queries: u32, keys: u32| -> Vec<String> {
            let s = problem.shape;
            let mark = |i, j| if keep(problem, [queries, keys], i, j) { 'x' } else { '.' };
            (0..s.seqlen_q).map(|i| (0..s.seqlen_k).map(|j| mark(i, j)).collect()).collect()
        };
        let seen = |problem: &Problem, keys: u32| seen_by(problem, problem.shape.seqlen_q, keys);
        let wide = problem(2, 4);
        assert_eq!(seen(&wide.clone().causal(Causal::BottomRight), 4), ["xxx.", "xxxx"]);
        assert_eq!(seen(&wide.clone().causal(Causal::TopLeft), 4), ["x...", "xx.."]);
        assert_eq!(seen(&wide.clone().causal(Causal::BottomRight), 3), ["xx..", "xxx."]);
        assert_eq!(seen(&wide.clone().window(Some(1), Some(0)), 4), [".xx.", "..xx"]);
        assert_eq!(seen(&wide.window(None, Some(1)), 2), ["xx..", "xx.."]);
        let tall = problem(4, 2);
        assert_eq!(seen(&tall.clone().causal(Causal::BottomRight), 2), ["..", "..", "x.", "xx"]);
        assert_eq!(seen(&tall.clone().window(Some(0), Some(0)), 2), ["..", "..", "x.", ".x"]);
        // With lengths of both, diagonals end where both end.
        assert_eq!(seen_by(&tall.clone().causal(Causal::BottomRight), 2, 2), ["x.", "xx", "..", ".."]);
        assert_eq!(seen_by(&tall.window(Some(0), Some(0)), 3, 2), ["..", "x.", ".x", ".."]);
    }

    #[test]
    fn the_interval_of_keys_is_what_the_masks_keep() {
        for (n, m) in [(5, 5), (3, 8), (8, 3)] {
            for causal in [None, Some(Causal::BottomRight), Some(Causal::TopLeft)] {
                for (left, right) in
                    [(None, None), (Some(0), Some(0)), (Some(2), None), (None, Some(1)), (Some(9), Some(9))]
                {
                    let mut problem = problem(n, m).window(left, right);
                    problem.causal = causal;
                    for (queries, keys) in (0..=n).flat_map(|queries| (0..=m).map(move |keys| (queries, keys))) {
                        for i in 0..n {
                            let (first, end) = problem.key_interval_of(i, queries, keys);
                            for j in 0..m {
                                let kept = keep(&problem, [queries, keys], i, j);
                                let text = format!("{problem:?} queries {queries} keys {keys} i {i} j {j}");
                                assert_eq!(kept, (first..end).contains(&j), "{text}");
                            }
                        }
                    }
                }
            }
        }
    }

    /// Numbers between -1 and 1 without a pattern.
    fn numbers(n: usize, seed: f64) -> Vec<f64> {
        (0..n).map(|n| ((n as f64 + 1.0) * seed).sin()).collect()
    }

    /// Every gradient of every option, against differences of the forward pass.
    #[test]
    fn gradients_are_the_slopes_of_the_forward_pass() {
        let shape = Shape { heads_q: 4, heads_kv: 2, seqlen_k: 5, head_dim_v: 2, ..Shape::square(2, 4, 4, 3) };
        let plain = Problem::new(shape, ElementType::F32);
        let cases: [(Problem, Option<&[i32]>); 8] = [
            (plain.clone(), None),
            (plain.clone().scale(-0.7), None),
            (plain.clone().softcap(0.8), None),
            (plain.clone().causal(Causal::BottomRight), None),
            (plain.clone().causal(Causal::TopLeft), None),
            (plain.clone().window(Some(1), Some(0)), None),
            (plain.clone(), Some(&[0, 3])),
            (plain.causal(Causal::BottomRight).window(Some(2), None).softcap(1.5).scale(1.1), Some(&[4, 1])),
        ];
        let [nq, nk, nv, no] = [2 * 4 * 4 * 3, 2 * 2 * 5 * 3, 2 * 2 * 5 * 2, 2 * 4 * 4 * 2];
        let grad_out = numbers(no, 1.3);
        let grad_lse: Vec<f32> = numbers(no / 2, 2.9).into_iter().map(|x| x as f32).collect();
        let dropout = Dropout { probability: 0.4, seed: 5, offset: 3 };
        let cases = cases.iter().flat_map(|case| [None, Some(dropout)].map(|dropout| (case, dropout)));
        for ((problem, lengths), dropout) in cases {
            let extras = Extras::from(*lengths).dropout(dropout);
            let mut inputs = [numbers(nq, 0.7), numbers(nk, 1.9), numbers(nv, 2.3)];
            let loss = |[q, k, v]: &[Vec<f64>; 3]| {
                let result = forward(problem, q, k, v, extras);
                let of_lse = result.lse.iter().zip(&grad_lse).filter(|(x, _)| x.is_finite());
                dot(&result.out, &grad_out) + of_lse.map(|(x, &g)| x * g as f64).sum::<f64>()
            };
            let [q, k, v] = &inputs;
            let found = backward(problem, [q, k, v, &grad_out], Some(&grad_lse), extras);
            let found = [found.query, found.key, found.value];
            for n in 0..3 {
                for place in 0..found[n].len() {
                    let kept = inputs[n][place];
                    let step = 1e-5;
                    inputs[n][place] = kept + step;
                    let above = loss(&inputs);
                    inputs[n][place] = kept - step;
                    let slope = (above - loss(&inputs)) / (2.0 * step);
                    inputs[n][place] = kept;
                    let error = (found[n][place] - slope).abs();
                    assert!(error < 1e-8, "{problem:?}: gradient {n} at {place} is {}, not {slope}", found[n][place]);
                }
            }
        }
    }

    /// The gradients of the bias, the sinks and ALiBi's slopes, and those of q, k and v beside them.
    #[test]
    fn gradients_of_what_scores_share_are_slopes_too() {
        let shape = Shape { heads_q: 4, heads_kv: 2, seqlen_k: 5, head_dim_v: 2, ..Shape::square(2, 4, 4, 3) };
        let plain = Problem::new(shape, ElementType::F32).softcap(1.5).with_sinks();
        let plain = plain.with_grad_lse().with_grad_sinks();
        let [nq, nk, nv, no] = [2 * 4 * 4 * 3, 2 * 2 * 5 * 3, 2 * 2 * 5 * 2, 2 * 4 * 4 * 2];
        let [q, k, v, grad_out] = [(nq, 0.7), (nk, 1.9), (nv, 2.3), (no, 1.3)].map(|(n, seed)| numbers(n, seed));
        let grad_lse: Vec<f32> = numbers(no / 2, 2.9).into_iter().map(|x| x as f32).collect();
        // Of each element a multiple of an eighth, so that a step of 2^-10 is exact in f32.
        let eighths = |n: usize, seed: f64| -> Vec<f32> {
            numbers(n, seed).into_iter().map(|x| (x * 8.0).round() as f32 / 8.0).collect()
        };
        let alibis = [Alibi::PerHead, Alibi::PerBatchAndHead];
        let sizes = [[2, 4, 4, 5], [1, 4, 4, 1], [2, 1, 1, 5], [1, 1, 1, 1]];
        for (alibi, sizes) in alibis.into_iter().flat_map(|alibi| sizes.map(|sizes| (alibi, sizes))) {
            let bias = Bias::new(ElementType::F32, ScoreLayout::contiguous(sizes));
            let problem = plain.clone().with_bias(bias).with_alibi(alibi).with_grad_bias().with_grad_alibi_slopes();
            let problem = problem.causal(Causal::BottomRight);
            let slopes = if alibi == Alibi::PerHead { 4 } else { 8 };
            let mut given =
                [eighths(sizes.iter().product::<u32>() as usize, 0.9), eighths(4, 2.1), eighths(slopes, 0.4)];
            // Masks, and no sink.
            given[1][2] = f32::NEG_INFINITY;
            if sizes == [2, 4, 4, 5] {
                given[0][7] = f32::NEG_INFINITY;
                given[0][20] = -1e31;
            }
            fn extras([bias, sinks, slopes]: &[Vec<f32>; 3]) -> Extras<'_> {
                let lengths = Extras::default().seqlens_q(&[4, 3][..]).seqlens_k(&[5, 2][..]);
                lengths.bias(&bias[..]).sinks(&sinks[..]).alibi_slopes(&slopes[..])
            }
            let loss = |given: &[Vec<f32>; 3]| {
                let result = forward(&problem, &q, &k, &v, extras(given));
                // Of four rows a head, the second batch entry has three queries.
                let counts = |&(n, _): &(usize, _)| n < 16 || n % 4 < 3;
                let of_lse = result.lse.iter().zip(&grad_lse).enumerate().filter(counts).map(|(_, both)| both);
                let of_lse = of_lse.filter(|(x, _)| x.is_finite());
                dot(&result.out, &grad_out) + of_lse.map(|(x, &g)| x * g as f64).sum::<f64>()
            };
            let found = backward(&problem, [&q, &k, &v, &grad_out], Some(&grad_lse), extras(&given));
            let found = [found.bias, found.sinks, found.alibi_slopes].map(|gradient| gradient.unwrap().values);
            for n in 0..3 {
                for place in 0..found[n].len() {
                    let kept = given[n][place];
                    if kept < -1e30 {
                        assert_eq!(found[n][place], 0.0);
                        continue;
                    }
                    let step = 1.0 / 1024.0;
                    given[n][place] = kept + step;
                    let above = loss(&given);
                    given[n][place] = kept - step;
                    let slope = (above - loss(&given)) / (2.0 * f64::from(step));
                    given[n][place] = kept;
                    let error = (found[n][place] - slope).abs();
                    assert!(
                        error < 3e-5,
                        "{alibi:?} {sizes:?}: gradient {n} at {place} is {}, not {slope}",
                        found[n][place]
                    );
                }
            }
        }
    }

    #[test]
    fn one_row_of_the_gradient_of_queries() {
        let shape = Shape { heads_kv: 1, ..Shape::square(1, 2, 3, 2) };
        let problem = Problem::new(shape, ElementType::F32).causal(Causal::BottomRight);
        let [q, k, v, g] = [(12, 0.4), (6, 1.1), (6, 0.9), (12, 2.1)].map(|(n, seed)| numbers(n, seed));
        let all = backward(&problem, [&q, &k, &v, &g], None, None);
        let row = backward_query_row(&problem, [&q, &k, &v, &g], None, None, [0, 1, 2]);
        assert_eq!(row, all.query[5 * 2..]);
    }

    #[test]
    fn one_row_of_the_gradients_of_keys_and_values() {
        let shape = Shape { heads_q: 4, heads_kv: 2, seqlen_k: 5, head_dim_v: 2, ..Shape::square(2, 4, 4, 3) };
        let problem = Problem::new(shape, ElementType::F32).causal(Causal::BottomRight).softcap(1.5);
        let lengths: Option<&[i32]> = Some(&[4, 1]);
        let [q, k, v, g] = [(96, 0.4), (60, 1.1), (40, 0.9), (64, 2.1)].map(|(n, seed)| numbers(n, seed));
        let grad_lse: Vec<f32> = numbers(32, 2.9).into_iter().map(|x| x as f32).collect();
        let Forward { out, lse } = forward(&problem, &q, &k, &v, lengths);
        let delta = delta(&problem, &g, &out, Some(&grad_lse));
        let all = backward(&problem, [&q, &k, &v, &g], Some(&grad_lse), lengths);
        for m in 0..20 {
            let [b, h, j] = [m / 10, m / 5 % 2, m % 5];
            let (dk, dv) = backward_key_row(&problem, [&q, &k, &v, &g], [&lse, &delta], lengths, [b, h, j]);
            let m = m as usize;
            let close = |x: &[f64], y: &[f64]| x.iter().zip(y).all(|(x, y)| (x - y).abs() < 1e-12);
            assert!(close(&dk, &all.key[3 * m..][..3]) && close(&dv, &all.value[2 * m..][..2]), "key {m}");
        }
    }
}
