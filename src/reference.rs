//! The same mathematics in f64, in loops one can read: the oracle that the kernels are tested against.
//!
//! Tensors are contiguous `[batch, head, position, dim]` here, whatever the problem's layouts say.

use crate::Problem;

/// What the forward pass computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// o `[batch, heads_q, seqlen_q, head_dim_v]`.
    pub out: Vec<f64>,
    /// lse `[batch, heads_q, seqlen_q]`, −∞ for a row that sees no key.
    pub lse: Vec<f64>,
}

/// Attention by its definition, for every row.
///
/// `seqlens_k` holds a length for each batch entry; without it every key counts.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn forward<T: Copy + Into<f64>>(
    problem: &Problem,
    query: &[T],
    key: &[T],
    value: &[T],
    seqlens_k: Option<&[i32]>,
) -> Forward {
    let s = &problem.shape;
    let mut result = Forward { out: vec![], lse: vec![] };
    for b in 0..s.batch {
        for h in 0..s.heads_q {
            for i in 0..s.seqlen_q {
                let (out, lse) = forward_row(problem, query, key, value, seqlens_k, [b, h, i]);
                result.out.extend(out);
                result.lse.push(lse);
            }
        }
    }
    result
}

/// One row of the forward pass, at batch entry, query head and position `[b, h, i]`: o and lse.
///
/// # Panics
/// If a slice is shorter than the problem's shape says.
pub fn forward_row<T: Copy + Into<f64>>(
    problem: &Problem,
    query: &[T],
    key: &[T],
    value: &[T],
    seqlens_k: Option<&[i32]>,
    [b, h, i]: [u32; 3],
) -> (Vec<f64>, f64) {
    let s = &problem.shape;
    let (d, dv) = (s.head_dim as usize, s.head_dim_v as usize);
    let keys = seqlens_k.map_or(s.seqlen_k, |lengths| lengths[b as usize].clamp(0, s.seqlen_k as i32) as u32);
    let row = |n: u32, heads: u32, head: u32, position: u32| {
        (b as usize * heads as usize + head as usize) * n as usize + position as usize
    };
    let q = &query[row(s.seqlen_q, s.heads_q, h, i) * d..][..d];
    let head_kv = h / s.group();

    // The scores that count, with their keys.
    let mut scores = vec![];
    for j in 0..s.seqlen_k {
        if keep(problem, keys, i, j) {
            let k = &key[row(s.seqlen_k, s.heads_kv, head_kv, j) * d..][..d];
            let dot: f64 = q.iter().zip(k).map(|(&x, &y)| x.into() * y.into()).sum();
            scores.push((j, score(problem, dot)));
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

/// What a score is: `scale · dot`, then `softcap · tanh(s / softcap)`.
fn score(problem: &Problem, dot: f64) -> f64 {
    let s = problem.effective_scale() as f64 * dot;
    problem.softcap.map_or(s, |cap| cap as f64 * (s / cap as f64).tanh())
}

/// Whether key `j` counts for query `i` when `keys` of them are valid: each mask by its own definition.
fn keep(problem: &Problem, keys: u32, i: u32, j: u32) -> bool {
    use crate::Causal::{BottomRight, TopLeft};
    let (i, j) = (i as i64, j as i64);
    let diagonal = i + keys as i64 - problem.shape.seqlen_q as i64;
    let causal = match problem.causal {
        None => true,
        Some(BottomRight) => j <= diagonal,
        Some(TopLeft) => j <= i,
    };
    j < keys as i64
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
        let seen = |problem: &Problem, keys: u32| -> Vec<String> {
            let s = problem.shape;
            let mark = |i, j| if keep(problem, keys, i, j) { 'x' } else { '.' };
            (0..s.seqlen_q).map(|i| (0..s.seqlen_k).map(|j| mark(i, j)).collect()).collect()
        };
        let wide = problem(2, 4);
        assert_eq!(seen(&wide.clone().causal(Causal::BottomRight), 4), ["xxx.", "xxxx"]);
        assert_eq!(seen(&wide.clone().causal(Causal::TopLeft), 4), ["x...", "xx.."]);
        assert_eq!(seen(&wide.clone().causal(Causal::BottomRight), 3), ["xx..", "xxx."]);
        assert_eq!(seen(&wide.clone().window(Some(1), Some(0)), 4), [".xx.", "..xx"]);
        assert_eq!(seen(&wide.window(None, Some(1)), 2), ["xx..", "xx.."]);
        let tall = problem(4, 2);
        assert_eq!(seen(&tall.clone().causal(Causal::BottomRight), 2), ["..", "..", "x.", "xx"]);
        assert_eq!(seen(&tall.window(Some(0), Some(0)), 2), ["..", "..", "x.", ".x"]);
    }

    #[test]
    fn the_interval_of_keys_is_what_the_masks_keep() {
        for (n, m) in [(5, 5), (3, 8), (8, 3)] {
            for causal in [None, Some(Causal::BottomRight), Some(Causal::TopLeft)] {
                for (left, right) in
                    [(None, None), (Some(0), Some(0)), (Some(2), None), (None, Some(1)), (Some(9), Some(9))]
                {
                    let problem = Problem { causal, ..problem(n, m).window(left, right) };
                    for keys in 0..=m {
                        for i in 0..n {
                            let (first, end) = problem.key_interval(i, keys);
                            for j in 0..m {
                                let kept = keep(&problem, keys, i, j);
                                assert_eq!(kept, (first..end).contains(&j), "{problem:?} keys {keys} i {i} j {j}");
                            }
                        }
                    }
                }
            }
        }
    }
}
