//! The same mathematics in f64, in loops one can read: the oracle that the kernels are tested against.
//!
//! Tensors are contiguous `[batch, head, position, dim]` here, whatever the problem's layouts say.

use crate::Problem;

/// What the forward pass computes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Forward {
    /// o `[batch, heads_q, seqlen_q, head_dim_v]`.
    pub out: Vec<f64>,
    /// lse `[batch, heads_q, seqlen_q]`, −∞ for a row that sees no key.
    pub lse: Vec<f64>,
}

/// How many queries and keys of each batch entry are valid, of a problem with lengths.
///
/// Where a function here takes it, key lengths alone may be given as `Option<&[i32]>`, and `None` says that all are valid. Lengths count
/// whether or not the problem has `seqlens_q` and `seqlens_k`; its layouts and its element type are not looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lengths<'a> {
    /// Valid queries, `[batch]`.
    pub queries: Option<&'a [i32]>,
    /// Valid keys, `[batch]`.
    pub keys: Option<&'a [i32]>,
}

impl<'a> From<Option<&'a [i32]>> for Lengths<'a> {
    fn from(keys: Option<&'a [i32]>) -> Self {
        Lengths { queries: None, keys }
    }
}

impl Lengths<'_> {
    /// The valid queries and keys of a batch entry; lengths past the ends act as the ends.
    pub fn of(&self, problem: &Problem, b: u32) -> (u32, u32) {
        let valid = |lengths: Option<&[i32]>, all: u32| {
            lengths.map_or(all, |lengths| lengths[b as usize].clamp(0, all as i32) as u32)
        };
        (valid(self.queries, problem.shape.seqlen_q), valid(self.keys, problem.shape.seqlen_k))
    }
}

/// Attention by its definition, for every row.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn forward<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    query: &[T],
    key: &[T],
    value: &[T],
    lengths: impl Into<Lengths<'a>>,
) -> Forward {
    let lengths = lengths.into();
    let mut result = Forward { out: vec![], lse: vec![] };
    for (b, h, i) in rows(problem) {
        let (out, lse) = forward_row(problem, query, key, value, lengths, [b, h, i]);
        result.out.extend(out);
        result.lse.push(lse);
    }
    result
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
    lengths: impl Into<Lengths<'a>>,
    [b, h, i]: [u32; 3],
) -> (Vec<f64>, f64) {
    let s = &problem.shape;
    let (d, dv) = (s.head_dim as usize, s.head_dim_v as usize);
    let valid = lengths.into().of(problem, b);
    let row = |n: u32, heads: u32, head: u32, position: u32| {
        (b as usize * heads as usize + head as usize) * n as usize + position as usize
    };
    let q = &query[row(s.seqlen_q, s.heads_q, h, i) * d..][..d];
    let head_kv = h / s.group();

    // The scores that count, with their keys.
    let mut scores = vec![];
    for j in 0..s.seqlen_k {
        if keep(problem, valid, i, j) {
            let k = &key[row(s.seqlen_k, s.heads_kv, head_kv, j) * d..][..d];
            scores.push((j, score(problem, dot(q, k))));
        }
    }
    if scores.is_empty() {
        return (vec![0.0; dv], f64::NEG_INFINITY);
    }
    let max = scores.iter().map(|&(_, x)| x).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|&(_, x)| (x - max).exp()).sum();
    let mut out = vec![0.0; dv];
    for (j, x) in scores {
        let p = (x - max).exp() / sum;
        let v = &value[row(s.seqlen_k, s.heads_kv, head_kv, j) * dv..][..dv];
        for (o, &v) in out.iter_mut().zip(v) {
            *o += p * v.into();
        }
    }
    (out, max + sum.ln())
}

/// What the backward pass computes: the gradients of a loss in q, k and v.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Backward {
    /// dq `[batch, heads_q, seqlen_q, head_dim]`.
    pub query: Vec<f64>,
    /// dk `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share a key-value head.
    pub key: Vec<f64>,
    /// dv `[batch, heads_kv, seqlen_k, head_dim_v]`, summed likewise.
    pub value: Vec<f64>,
}

/// Gradients from that of o and, if the loss uses lse, that of lse. With `s = score(q·k)` and `p = exp(s − lse)`
/// (FlashAttention, Dao et al. 2022, section B.2):
///
/// ```text
/// dp_ij = do_i · v_j,   delta_i = Σ_j p_ij dp_ij − dlse_i,   ds_ij = p_ij (dp_ij − delta_i)
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
    [query, key, value, grad_out]: [&[T]; 4],
    grad_lse: Option<&[f32]>,
    lengths: impl Into<Lengths<'a>>,
) -> Backward {
    let s = &problem.shape;
    let (d, dv) = (s.head_dim as usize, s.head_dim_v as usize);
    let lengths = lengths.into();
    let keys = s.batch as usize * s.heads_kv as usize * s.seqlen_k as usize;
    let mut result =
        Backward { query: vec![0.0; s.rows() as usize * d], key: vec![0.0; keys * d], value: vec![0.0; keys * dv] };
    for (n, (b, h, i)) in rows(problem).enumerate() {
        let q = &query[n * d..][..d];
        let grad = &grad_out[n * dv..][..dv];
        for pair in row_gradients(problem, [query, key, value, grad_out], grad_lse, lengths, [b, h, i]) {
            let m =
                (b as usize * s.heads_kv as usize + (h / s.group()) as usize) * s.seqlen_k as usize + pair.j as usize;
            add(&mut result.query[n * d..][..d], pair.ddot, &key[m * d..][..d]);
            add(&mut result.key[m * d..][..d], pair.ddot, q);
            add(&mut result.value[m * dv..][..dv], pair.p, grad);
        }
    }
    result
}

/// One row of dq, at batch entry, query head and position `[b, h, i]`; otherwise as [`backward`].
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward_query_row<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    [query, key, value, grad_out]: [&[T]; 4],
    grad_lse: Option<&[f32]>,
    lengths: impl Into<Lengths<'a>>,
    [b, h, i]: [u32; 3],
) -> Vec<f64> {
    let s = &problem.shape;
    let d = s.head_dim as usize;
    let lengths = lengths.into();
    let mut dq = vec![0.0; d];
    for pair in row_gradients(problem, [query, key, value, grad_out], grad_lse, lengths, [b, h, i]) {
        let m = (b as usize * s.heads_kv as usize + (h / s.group()) as usize) * s.seqlen_k as usize + pair.j as usize;
        add(&mut dq, pair.ddot, &key[m * d..][..d]);
    }
    dq
}

/// One row of dk and of dv, at batch entry, key-value head and position `[b, h, j]`.
///
/// `lse` and `delta`, `[batch, heads_q, seqlen_q]` each, are what [`backward`] works out for each query: with them given, one key
/// costs as much as one query. `delta` is `do · o − dlse`.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn backward_key_row<'a, T: Copy + Into<f64>>(
    problem: &Problem,
    [query, key, value, grad_out]: [&[T]; 4],
    [lse, delta]: [&[f64]; 2],
    lengths: impl Into<Lengths<'a>>,
    [b, h, j]: [u32; 3],
) -> (Vec<f64>, Vec<f64>) {
    let s = &problem.shape;
    let (d, dv) = (s.head_dim as usize, s.head_dim_v as usize);
    let valid = lengths.into().of(problem, b);
    let m = (b as usize * s.heads_kv as usize + h as usize) * s.seqlen_k as usize + j as usize;
    let (k, v) = (&key[m * d..][..d], &value[m * dv..][..dv]);
    let (mut dk, mut dv_row) = (vec![0.0; d], vec![0.0; dv]);
    for head in h * s.group()..(h + 1) * s.group() {
        for i in (0..s.seqlen_q).filter(|&i| keep(problem, valid, i, j)) {
            let n = (b as usize * s.heads_q as usize + head as usize) * s.seqlen_q as usize + i as usize;
            let (q, grad) = (&query[n * d..][..d], &grad_out[n * dv..][..dv]);
            let product = dot(q, k);
            let p = (score(problem, product) - lse[n]).exp();
            add(&mut dk, p * (dot(grad, v) - delta[n]) * score_slope(problem, product), q);
            add(&mut dv_row, p, grad);
        }
    }
    (dk, dv_row)
}

/// What a query and a key that it sees have in common.
struct Pair {
    j: u32,
    p: f64,
    /// The loss' gradient in q·k.
    ddot: f64,
}

/// The pairs of one row.
fn row_gradients<T: Copy + Into<f64>>(
    problem: &Problem,
    [query, key, value, grad_out]: [&[T]; 4],
    grad_lse: Option<&[f32]>,
    lengths: Lengths<'_>,
    [b, h, i]: [u32; 3],
) -> Vec<Pair> {
    let s = &problem.shape;
    let (d, dv) = (s.head_dim as usize, s.head_dim_v as usize);
    let (_, lse) = forward_row(problem, query, key, value, lengths, [b, h, i]);
    let valid = lengths.of(problem, b);
    let n = (b as usize * s.heads_q as usize + h as usize) * s.seqlen_q as usize + i as usize;
    let m = |j: u32| (b as usize * s.heads_kv as usize + (h / s.group()) as usize) * s.seqlen_k as usize + j as usize;
    let seen = (0..s.seqlen_k).filter(|&j| keep(problem, valid, i, j));
    // p and dp; then ds, which needs their sum.
    let all: Vec<(u32, f64, f64, f64)> = seen
        .map(|j| {
            let product = dot(&query[n * d..][..d], &key[m(j) * d..][..d]);
            let p = (score(problem, product) - lse).exp();
            (j, p, dot(&grad_out[n * dv..][..dv], &value[m(j) * dv..][..dv]), score_slope(problem, product))
        })
        .collect();
    let delta = all.iter().map(|(_, p, dp, _)| p * dp).sum::<f64>() - grad_lse.map_or(0.0, |grad| grad[n] as f64);
    all.into_iter().map(|(j, p, dp, slope)| Pair { j, p, ddot: p * (dp - delta) * slope }).collect()
}

fn rows(problem: &Problem) -> impl Iterator<Item = (u32, u32, u32)> + use<> {
    let s = problem.shape;
    (0..s.batch).flat_map(move |b| (0..s.heads_q).flat_map(move |h| (0..s.seqlen_q).map(move |i| (b, h, i))))
}

fn dot<T: Copy + Into<f64>>(x: &[T], y: &[T]) -> f64 {
    x.iter().zip(y).map(|(&x, &y)| x.into() * y.into()).sum()
}

/// sum += factor · x
fn add<T: Copy + Into<f64>>(sum: &mut [f64], factor: f64, x: &[T]) {
    sum.iter_mut().zip(x).for_each(|(sum, &x)| *sum += factor * x.into());
}

/// What a score is: `scale · dot`, then `softcap · tanh(s / softcap)`.
fn score(problem: &Problem, dot: f64) -> f64 {
    let s = problem.effective_scale() as f64 * dot;
    problem.softcap.map_or(s, |cap| cap as f64 * (s / cap as f64).tanh())
}

/// The derivative of [`score`] in `dot`.
fn score_slope(problem: &Problem, dot: f64) -> f64 {
    let scale = problem.effective_scale() as f64;
    problem.softcap.map_or(scale, |cap| scale * (1.0 - (scale * dot / cap as f64).tanh().powi(2)))
}

/// Whether key `j` counts for query `i` when so many queries and keys are valid: each mask by its own definition.
fn keep(problem: &Problem, (queries, keys): (u32, u32), i: u32, j: u32) -> bool {
    use crate::Causal::{BottomRight, TopLeft};
    let (i, j) = (i as i64, j as i64);
    let diagonal = i + keys as i64 - queries as i64;
    let causal = match problem.causal {
        None => true,
        Some(BottomRight) => j <= diagonal,
        Some(TopLeft) => j <= i,
    };
    i < queries as i64
        && j < keys as i64
        && causal
        && problem.window_left.is_none_or(|left| j >= diagonal - left as i64)
        && problem.window_right.is_none_or(|right| j <= diagonal + right as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Causal, ElementType, Shape};

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
    fn softcap_bounds_the_scores() {
        let result = forward(&problem(1, 1).softcap(2.0), &[1e6f64], &[1.0], &[1.0], None);
        assert!((result.lse[0] - 2.0).abs() < 1e-12);
    }

    #[test]
    fn masks_by_hand() {
        let seen_by = |problem: &Problem, queries: u32, keys: u32| -> Vec<String> {
            let s = problem.shape;
            let mark = |i, j| if keep(problem, (queries, keys), i, j) { 'x' } else { '.' };
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
                                let kept = keep(&problem, (queries, keys), i, j);
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
        for (problem, lengths) in cases {
            let mut inputs = [numbers(nq, 0.7), numbers(nk, 1.9), numbers(nv, 2.3)];
            let loss = |[q, k, v]: &[Vec<f64>; 3]| {
                let result = forward(&problem, q, k, v, lengths);
                let of_lse = result.lse.iter().zip(&grad_lse).filter(|(x, _)| x.is_finite());
                dot(&result.out, &grad_out) + of_lse.map(|(x, &g)| x * g as f64).sum::<f64>()
            };
            let [q, k, v] = &inputs;
            let found = backward(&problem, [q, k, v, &grad_out], Some(&grad_lse), lengths);
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
        let delta: Vec<f64> = (0..32).map(|n| dot(&g[2 * n..][..2], &out[2 * n..][..2]) - grad_lse[n] as f64).collect();
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
