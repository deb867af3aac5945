//! What attention is: one text for the exact computation and for the one that rounds to an element type.
//!
//! They differ in two things: what they compute in, [`Real`], and what becomes of a value that attention in a 16-bit type would
//! hold in that type, [`Attention::round`].

use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use super::values::{Backward, Extras, Forward, Summed};
use crate::{Alibi, Causal, Problem};

/// What is computed in: f64 or f32.
pub(super) trait Real:
    Copy
    + PartialOrd
    + Into<f64>
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + Sum
{
    /// The nearest value.
    fn of(x: f64) -> Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn tanh(self) -> Self;
}

macro_rules! real {
    ($type:ident) => {
        impl Real for $type {
            fn of(x: f64) -> Self {
                x as $type
            }
            fn exp(self) -> Self {
                $type::exp(self)
            }
            fn ln(self) -> Self {
                $type::ln(self)
            }
            fn tanh(self) -> Self {
                $type::tanh(self)
            }
        }
    };
}
real!(f32);
real!(f64);

/// A query and a key: their batch entry, the query's head, and their positions.
#[derive(Clone, Copy)]
pub(super) struct Pair {
    pub b: u32,
    pub h: u32,
    pub i: u32,
    pub j: u32,
}

/// A lower bias masks a score; a lower sink is none.
const MASKS_BELOW: f32 = -1e30;

/// What a score is, and its derivative in `scale · q·k`.
struct Scored<N> {
    score: N,
    slope: N,
}

/// What a query and a key that it sees have in common in the backward pass.
struct PairGradient<N> {
    /// The probability after dropout, rounded.
    p: N,
    /// The loss' gradient in q·k.
    ddot: N,
    /// How large `ddot` would be if p·dp and p·delta did not cancel.
    size: f64,
    /// The loss' gradient in the score.
    dscore: N,
    /// How large `dscore` would be if p·dp and p·delta did not cancel.
    score_size: f64,
}

/// Some elements of a gradient.
pub(super) struct GradientRow<N> {
    /// The sums. Nothing has rounded them yet.
    pub values: Vec<N>,
    /// The squares of what was summed, added up.
    pub squares: f64,
}

/// q, k, v and do.
pub(super) type Tensors<'a, T> = [&'a [T]; 4];

/// A problem, and how to compute it.
pub(super) struct Attention<'a, N> {
    pub problem: &'a Problem,
    pub extras: Extras<'a>,
    /// Rounds what attention in the element type holds in that type: a probability, the gradient of a score, an element of o.
    pub round: &'a dyn Fn(N) -> N,
}

impl<N: Real> Attention<'_, N> {
    /// Every row of the forward pass.
    pub fn forward<T: Copy + Into<f64>>(&self, tensors: [&[T]; 3]) -> Forward {
        let s = &self.problem.shape;
        let mut result = Forward { out: vec![], lse: vec![] };
        for at in rows(s.batch, s.heads_q, s.seqlen_q) {
            let (out, lse) = self.forward_row(tensors, at);
            result.out.extend(out.into_iter().map(Into::into));
            result.lse.push(lse.into());
        }
        result
    }

    /// Every row of the backward pass, from lse and delta of every row of queries, and the sizes of delta. Nothing rounds the sums.
    pub fn backward<T: Copy + Into<f64>>(
        &self,
        tensors: Tensors<'_, T>,
        [lse, delta]: [&[N]; 2],
        delta_sizes: &[f64],
    ) -> Backward {
        let s = &self.problem.shape;
        let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|_| GradientRow::zeros(0));
        for at in rows(s.batch, s.heads_q, s.seqlen_q) {
            let n = self.query_number(at);
            dq.append(self.query_gradient(tensors, [lse[n], delta[n]], at));
        }
        for at in rows(s.batch, s.heads_kv, s.seqlen_k) {
            let [of_key, of_value] = self.key_gradients(tensors, [lse, delta], at);
            dk.append(of_key);
            dv.append(of_value);
        }
        let terms = [&dq, &dk, &dv].map(|gradient| gradient.squares.sqrt());
        let all: Vec<_> = rows(s.batch, s.heads_q, s.seqlen_q).collect();
        let [bias, sinks, alibi_slopes] = self.shared_gradients(tensors, [lse, delta], delta_sizes, &all);
        let [query, key, value] = [dq, dk, dv].map(|gradient| gradient.values.into_iter().map(Into::into).collect());
        Backward { query, key, value, terms, bias, sinks, alibi_slopes }
    }

    /// `delta` of every row.
    pub fn deltas<T: Copy + Into<f64>, O: Copy + Into<f64>>(
        &self,
        grad_out: &[T],
        out: &[O],
        grad_lse: Option<&[f32]>,
    ) -> Vec<N> {
        self.of_rows(grad_out, out, grad_lse, |grad_out, out, grad_lse| self.delta(grad_out, out, grad_lse))
    }

    /// How large `delta` of every row would be if the columns of o did not cancel: the norm of what it sums. Each element of o is rounded by itself.
    pub fn delta_sizes<T: Copy + Into<f64>, O: Copy + Into<f64>>(
        &self,
        grad_out: &[T],
        out: &[O],
        grad_lse: Option<&[f32]>,
    ) -> Vec<f64> {
        self.of_rows(grad_out, out, grad_lse, |grad_out, out, grad_lse| {
            let squares = grad_out.iter().zip(out).map(|(&x, &y)| (x.into() * y.into()).powi(2));
            (squares.sum::<f64>() + f64::from(grad_lse).powi(2)).sqrt()
        })
    }

    /// What `of_row` makes of do, o and dlse of each row.
    fn of_rows<T, O, R>(
        &self,
        grad_out: &[T],
        out: &[O],
        grad_lse: Option<&[f32]>,
        of_row: impl Fn(&[T], &[O], f32) -> R,
    ) -> Vec<R> {
        let s = &self.problem.shape;
        let dim = s.head_dim_v;
        let of_number = |n| of_row(row(grad_out, n, dim), row(out, n, dim), grad_lse.map_or(0.0, |grad| grad[n]));
        (0..s.rows() as usize).map(of_number).collect()
    }

    /// The number of the row of query `[b, h, i]`, of q, o, lse and their gradients.
    pub fn query_number(&self, [b, h, i]: [u32; 3]) -> usize {
        let s = &self.problem.shape;
        (b as usize * s.heads_q as usize + h as usize) * s.seqlen_q as usize + i as usize
    }

    /// The number of the row of key `[b, h, j]`, of k, v and their gradients; `h` is a key-value head.
    fn key_number(&self, [b, h, j]: [u32; 3]) -> usize {
        let s = &self.problem.shape;
        (b as usize * s.heads_kv as usize + h as usize) * s.seqlen_k as usize + j as usize
    }

    /// What a score is: `scale · dot`, then `softcap · tanh(s / softcap)`, then `score_mod`, then ALiBi, then the bias.
    fn scored(&self, dot: N, pair: Pair) -> Scored<N> {
        let mut x = Scored { score: self.scale() * dot, slope: N::of(1.0) };
        if let Some(cap) = self.problem.softcap {
            let cap = N::of(cap.into());
            let tanh = (x.score / cap).tanh();
            x = Scored { score: cap * tanh, slope: N::of(1.0) - tanh * tanh };
        }
        if let Some(mods) = self.problem.mods.as_ref().filter(|mods| mods.has_score_mod()) {
            let [score, slope] = mods.score(x.score.into(), self.position(pair), self.extras.mod_buffers);
            x = Scored { score: N::of(score), slope: x.slope * N::of(slope) };
        }
        if self.problem.alibi.is_some() {
            x.score += N::of(self.slope(pair.b, pair.h).into()) * N::of(-self.distance(pair));
        }
        if let Some(bias) = self.bias(pair) {
            x.score += N::of(bias.into());
        }
        x
    }

    /// The numbers of a `Position`.
    fn position(&self, Pair { b, h, i, j }: Pair) -> [u32; 6] {
        let (queries, keys) = self.extras.lengths(self.problem, b);
        [b, h, i, j, queries, keys]
    }

    /// The slope of ALiBi of a head.
    fn slope(&self, b: u32, h: u32) -> f32 {
        self.extras.alibi_slopes.expect("the problem has alibi_slopes")[self.slope_number(b, h)]
    }

    fn slope_number(&self, b: u32, h: u32) -> usize {
        let batch = if self.problem.alibi == Some(Alibi::PerBatchAndHead) { b * self.problem.shape.heads_q } else { 0 };
        (batch + h) as usize
    }

    /// How far the key is from the query's diagonal.
    fn distance(&self, Pair { b, i, j, .. }: Pair) -> f64 {
        let (queries, keys) = self.extras.lengths(self.problem, b);
        (i as i64 + keys as i64 - queries as i64 - j as i64).unsigned_abs() as f64
    }

    /// What is added to the score.
    fn bias(&self, Pair { b, h, i, j }: Pair) -> Option<f32> {
        let layout = self.problem.bias?.layout;
        Some(self.extras.bias.expect("the problem has a bias")[layout.place([b, h, i, j]) as usize])
    }

    /// The score of no key that a row of a head has in its denominator.
    fn sink(&self, h: u32) -> Option<N> {
        if !self.problem.sinks {
            return None;
        }
        let sink = self.extras.sinks.expect("the problem has sinks")[h as usize];
        (sink >= MASKS_BELOW).then(|| N::of(sink.into()))
    }

    fn scale(&self) -> N {
        N::of(self.problem.effective_scale().into())
    }

    /// Whether the key counts for the query: each mask by its own definition.
    pub fn keep(&self, pair: Pair) -> bool {
        let Pair { b, h, i, j } = pair;
        if self.bias(pair).is_some_and(|bias| bias < MASKS_BELOW) {
            return false;
        }
        if let Some(layout) = self.problem.mask
            && !self.extras.mask.expect("the problem has a mask")[layout.place([b, h, i, j]) as usize]
        {
            return false;
        }
        if self.problem.probe.is_some_and(|probe| !probe.keeps([h, i, j])) {
            return false;
        }
        if !self.extras.is_listed(self.problem, [b, h, i, j]) {
            return false;
        }
        let (queries, keys) = self.extras.lengths(self.problem, b);
        let (i, j) = (i as i64, j as i64);
        let diagonal = i + keys as i64 - queries as i64;
        let causal = match self.problem.causal {
            None => true,
            Some(Causal::BottomRight) => j <= diagonal,
            Some(Causal::TopLeft) => j <= i,
        };
        i < queries as i64
            && j < keys as i64
            && causal
            && self.problem.window_left.is_none_or(|left| j >= diagonal - left as i64)
            && self.problem.window_right.is_none_or(|right| j <= diagonal + right as i64)
            && (self.problem.mods.as_ref()).is_none_or(|mods| mods.keep(self.position(pair), self.extras.mod_buffers))
    }

    /// What dropout multiplies a probability by: 0 if it drops it.
    fn dropout(&self, Pair { b, h, i, j }: Pair) -> N {
        let factor =
            self.extras.dropout.map_or(1.0, |dropout| match dropout.keeps(self.problem.shape.heads_q, [b, h, i, j]) {
                true => dropout.scale(),
                false => 0.0,
            });
        N::of(factor.into())
    }

    /// One row of the forward pass, at batch entry, query head and position `[b, h, i]`: o and lse.
    pub fn forward_row<T: Copy + Into<f64>>(&self, [query, key, value]: [&[T]; 3], at: [u32; 3]) -> (Vec<N>, N) {
        let s = &self.problem.shape;
        let [b, h, i] = at;
        let q = row(query, self.query_number(at), s.head_dim);
        // The scores that count, with the rows of their keys and the factors of dropout.
        let mut scores = vec![];
        for j in 0..s.seqlen_k {
            let pair = Pair { b, h, i, j };
            if self.keep(pair) {
                let n = self.key_number([b, h / s.group(), j]);
                scores.push((n, self.dropout(pair), self.scored(dot(q, row(key, n, s.head_dim)), pair).score));
            }
        }
        let mut out = vec![N::of(0.0); s.head_dim_v as usize];
        let least = N::of(f64::NEG_INFINITY);
        let sink = self.sink(h);
        if scores.is_empty() {
            return (out, sink.unwrap_or(least));
        }
        let in_denominator = || scores.iter().map(|&(_, _, score)| score).chain(sink);
        let max = in_denominator().fold(least, |max, score| if score > max { score } else { max });
        let sum: N = in_denominator().map(|score| (score - max).exp()).sum();
        for (n, factor, score) in scores {
            let p = (self.round)((score - max).exp() / sum * factor);
            add(&mut out, p, row(value, n, s.head_dim_v));
        }
        (out.into_iter().map(self.round).collect(), max + sum.ln())
    }

    /// `delta = do · o − dlse` of a row.
    pub fn delta<T: Copy + Into<f64>, O: Copy + Into<f64>>(&self, grad_out: &[T], out: &[O], grad_lse: f32) -> N {
        dot::<N, _, _>(grad_out, out) - N::of(grad_lse.into())
    }

    /// The row of dq at `[b, h, i]`, from lse and delta of that row.
    pub fn query_gradient<T: Copy + Into<f64>>(
        &self,
        tensors: Tensors<'_, T>,
        [lse, delta]: [N; 2],
        at: [u32; 3],
    ) -> GradientRow<N> {
        let s = &self.problem.shape;
        let [b, h, i] = at;
        let mut dq = GradientRow::zeros(s.head_dim);
        for pair in (0..s.seqlen_k).map(|j| Pair { b, h, i, j }).filter(|&pair| self.keep(pair)) {
            let key = self.key_number([b, h / s.group(), pair.j]);
            let pair = self.pair_gradient(tensors, pair, [self.query_number(at), key], [lse, delta]);
            dq.add(pair.ddot, pair.size, row(tensors[1], key, s.head_dim));
        }
        dq
    }

    /// The rows of dk and of dv at `[b, h, j]`, from lse and delta of every row.
    pub fn key_gradients<T: Copy + Into<f64>>(
        &self,
        tensors: Tensors<'_, T>,
        [lse, delta]: [&[N]; 2],
        at: [u32; 3],
    ) -> [GradientRow<N>; 2] {
        let s = &self.problem.shape;
        let [b, h, j] = at;
        let (mut dk, mut dv) = (GradientRow::zeros(s.head_dim), GradientRow::zeros(s.head_dim_v));
        for head in h * s.group()..(h + 1) * s.group() {
            for pair in (0..s.seqlen_q).map(|i| Pair { b, h: head, i, j }).filter(|&pair| self.keep(pair)) {
                let n = self.query_number([b, head, pair.i]);
                let pair = self.pair_gradient(tensors, pair, [n, self.key_number(at)], [lse[n], delta[n]]);
                dk.add(pair.ddot, pair.size, row(tensors[0], n, s.head_dim));
                dv.add(pair.p, pair.p.into(), row(tensors[3], n, s.head_dim_v));
            }
        }
        [dk, dv]
    }

    /// What rows of queries `[b, h, i]` add to the gradients of the bias, of the sinks and of ALiBi's slopes, of those that the problem asks
    /// for. They are sums over all scores that share an element.
    ///
    /// ```text
    /// dbias = Σ p_ij (dp_ij − delta_i),   dslope = − Σ |i + keys − queries − j| p_ij (dp_ij − delta_i),
    /// dsink = − Σ exp(sink − lse_i) delta_i
    /// ```
    pub fn shared_gradients<T: Copy + Into<f64>>(
        &self,
        tensors: Tensors<'_, T>,
        [lse, delta]: [&[N]; 2],
        delta_sizes: &[f64],
        rows: &[[u32; 3]],
    ) -> [Option<Summed>; 3] {
        let (problem, s) = (self.problem, &self.problem.shape);
        let asked = problem.gradients.unwrap_or_default();
        let sums = |asked: bool, given: Option<&[f32]>| {
            given.filter(|_| asked).map(|given| GradientRow::<N>::zeros(given.len() as u32))
        };
        let mut bias = sums(asked.bias, self.extras.bias);
        let mut sinks = sums(asked.sinks, self.extras.sinks);
        let mut slopes = sums(asked.alibi_slopes, self.extras.alibi_slopes);
        for &[b, h, i] in rows {
            let n = self.query_number([b, h, i]);
            if let (Some(sums), Some(sink)) = (&mut sinks, self.sink(h))
                && i < self.extras.lengths(problem, b).0
            {
                let of_sink = (sink - lse[n]).exp();
                // What lse is off by costs a share of the whole delta, and what o is off by a share of what delta sums.
                let whole: f64 = delta[n].into();
                let size = delta_sizes[n].max(whole.abs());
                sums.add_one(h as usize, of_sink * delta[n] * N::of(-1.0), size * of_sink.into());
            }
            if bias.is_none() && slopes.is_none() {
                continue;
            }
            // Scores of a row have one lse and one delta, and what these are off by: what they add to one element counts as one term.
            let (mut bias_size, mut slope_size) = (0.0, 0.0);
            for pair in (0..s.seqlen_k).map(|j| Pair { b, h, i, j }).filter(|&pair| self.keep(pair)) {
                let m = self.key_number([b, h / s.group(), pair.j]);
                let of_pair = self.pair_gradient(tensors, pair, [n, m], [lse[n], delta[n]]);
                if let (Some(sums), Some(bias)) = (&mut bias, problem.bias) {
                    let place = bias.layout.place([b, h, i, pair.j]) as usize;
                    let size = of_pair.score_size;
                    let (of_row, own) = if bias.layout.column == 0 { (size, 0.0) } else { (0.0, size) };
                    bias_size += of_row;
                    sums.add_one(place, of_pair.dscore, own);
                }
                if let Some(sums) = &mut slopes {
                    let distance = self.distance(pair);
                    slope_size += of_pair.score_size * distance;
                    sums.add_one(self.slope_number(b, h), of_pair.dscore * N::of(-distance), 0.0);
                }
            }
            for (sums, size) in [(&mut bias, bias_size), (&mut slopes, slope_size)] {
                sums.iter_mut().for_each(|sums| sums.squares += size * size);
            }
        }
        [bias, sinks, slopes].map(|sums| {
            sums.map(|GradientRow { values, squares }| Summed {
                values: values.into_iter().map(Into::into).collect(),
                terms: squares.sqrt(),
            })
        })
    }

    /// With `s = score(q·k)` and `r`, the factor of dropout (FlashAttention, Dao et al. 2022, sections B.2 and B.4):
    ///
    /// ```text
    /// p_ij = exp(s_ij − lse_i),   dp_ij = do_i · v_j,   ds_ij = p_ij (r_ij dp_ij − delta_i)
    /// dv_j = Σ_i r_ij p_ij do_i,   dq_i = Σ_j score'_ij ds_ij k_j,   dk_j = Σ_i score'_ij ds_ij q_i
    /// ```
    fn pair_gradient<T: Copy + Into<f64>>(
        &self,
        [query, key, value, grad_out]: Tensors<'_, T>,
        pair: Pair,
        [n, m]: [usize; 2],
        [lse, delta]: [N; 2],
    ) -> PairGradient<N> {
        let s = &self.problem.shape;
        let Scored { score, slope } = self.scored(dot(row(query, n, s.head_dim), row(key, m, s.head_dim)), pair);
        let p = (score - lse).exp();
        let kept = self.dropout(pair);
        let dp = kept * dot(row(grad_out, n, s.head_dim_v), row(value, m, s.head_dim_v));
        let factor = p * slope * self.scale();
        let both = dp.into().abs() + delta.into().abs();
        PairGradient {
            p: (self.round)(p * kept),
            ddot: (self.round)(p * (dp - delta) * slope) * self.scale(),
            size: factor.into() * both,
            dscore: (self.round)(p * (dp - delta)),
            score_size: p.into() * both,
        }
    }
}

impl<N: Real> GradientRow<N> {
    fn zeros(dim: u32) -> Self {
        GradientRow { values: vec![N::of(0.0); dim as usize], squares: 0.0 }
    }

    /// Adds x to one of the values; it counts as `size`.
    fn add_one(&mut self, place: usize, x: N, size: f64) {
        self.values[place] += x;
        self.squares += size * size;
    }

    /// Adds the rows after these.
    fn append(&mut self, other: Self) {
        self.values.extend(other.values);
        self.squares += other.squares;
    }

    /// Adds `factor · x`; its terms count as `size · x`.
    fn add<T: Copy + Into<f64>>(&mut self, factor: N, size: f64, x: &[T]) {
        add(&mut self.values, factor, x);
        self.squares += size * size * x.iter().map(|&x| x.into() * x.into()).sum::<f64>();
    }
}

fn rows(batch: u32, heads: u32, positions: u32) -> impl Iterator<Item = [u32; 3]> {
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..positions).map(move |i| [b, h, i])))
}

/// Row `n` of a contiguous tensor.
pub(super) fn row<T>(tensor: &[T], n: usize, dim: u32) -> &[T] {
    &tensor[n * dim as usize..][..dim as usize]
}

fn dot<N: Real, T: Copy + Into<f64>, U: Copy + Into<f64>>(x: &[T], y: &[U]) -> N {
    x.iter().zip(y).map(|(&x, &y)| N::of(x.into()) * N::of(y.into())).sum()
}

/// sum += factor · x
fn add<N: Real, T: Copy + Into<f64>>(sum: &mut [N], factor: N, x: &[T]) {
    sum.iter_mut().zip(x).for_each(|(sum, &x)| *sum += factor * N::of(x.into()));
}
