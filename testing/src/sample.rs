//! Rows of large tensors, and what they should be: the oracle would take hours for all of them.

use wgpu_flash_attention::reference::accept::{self, Bound, Errors, Verdict};
use wgpu_flash_attention::reference::rounded::{self, Gradient};
use wgpu_flash_attention::{Bias, Context, ElementType, Error, Kernel, PlanOptions, Problem, Tensor, reference};

use crate::buffers::{Inputs, Number, Outputs, Tensors, Upstream, bind, place};
use crate::timing::pass_times;

/// Rows of o and lse as they should be.
pub struct Sample {
    rows: Vec<[u32; 3]>,
    out: Vec<f64>,
    lse: Vec<f64>,
    /// Of the plain computation in the same type.
    plain: Errors,
}

impl Sample {
    pub fn of<T: Number>(problem: &Problem, tensors: &Tensors<T>, rows: Vec<[u32; 3]>) -> Self {
        let Tensors { query, key, value, extras } = tensors;
        let (mut out, mut lse, mut plain) = (vec![], vec![], vec![]);
        for &row in &rows {
            let (o, l) = reference::forward_row(problem, query, key, value, extras.borrow(), row);
            out.extend(o);
            lse.push(l);
            plain.extend(rounded::forward_row(problem, query, key, value, extras.borrow(), row).0);
        }
        Sample { rows, plain: Errors::of(plain, &out), out, lse }
    }

    /// Judges o, laid out as the problem says, and lse.
    pub fn judge<T: Number>(&self, problem: &Problem, out: &[T], lse: &[f32]) -> [Verdict; 2] {
        let s = &problem.shape;
        let layout = problem.layout(Tensor::Out);
        let found = self.rows.iter().flat_map(|&at| out[place(&layout, at)..][..s.head_dim_v as usize].iter().copied());
        let of_out = Bound::out(T::TYPE, self.plain).judge(Errors::of(found, &self.out));
        let number = |[b, h, i]: [u32; 3]| ((b * s.heads_q + h) as usize) * s.seqlen_q as usize + i as usize;
        [of_out, accept::lse(self.rows.iter().map(|&at| lse[number(at)]), &self.lse)]
    }
}

/// A gradient, or rows of it, as it should be.
pub struct Expected {
    pub values: Vec<f64>,
    /// Errors of the plain computation in the same type.
    plain: Errors,
    terms: f64,
}

impl Expected {
    /// `exact` is what the plain computation is held against.
    pub fn new(values: Vec<f64>, exact: &[f64], plain: Gradient) -> Self {
        Expected { plain: Errors::of(plain.values, exact), terms: plain.terms, values }
    }

    pub fn judge<T: Number>(&self, found: impl IntoIterator<Item = T>) -> Verdict {
        let errors = Errors::of_sums(found, &self.values, self.terms);
        Bound::gradient(T::TYPE, self.plain).judge(errors)
    }
}

pub const GRADIENTS: [&str; 3] = ["dq", "dk", "dv"];

/// Rows of dq, dk and dv as they should be.
pub struct GradientSample {
    queries: Vec<[u32; 3]>,
    keys: Vec<[u32; 3]>,
    expected: [Expected; 3],
}

impl GradientSample {
    /// Rows of dq by the oracle alone. Rows of dk and dv depend on o and lse of every query, which would take the oracle
    /// N² D: they come from a forward pass by the tile kernel in f32 on the same values, checked on the rows of dq. They are
    /// not those that the kernel in question is given, whose o is rounded to its type.
    pub fn of<T: Number>(
        context: &Context,
        problem: &Problem,
        tensors: &Tensors<T>,
        upstream: &Upstream<T>,
        queries: Vec<[u32; 3]>,
        keys: Vec<[u32; 3]>,
    ) -> Result<Self, String> {
        let s = &problem.shape;
        let extras = tensors.extras.borrow();
        let (out, lse) = forward_f32(context, problem, tensors)?;
        let Tensors { query: q, key: k, value: v, .. } = tensors;
        let (mut exact_out, mut exact_lse, mut found_out, mut found_lse) = (vec![], vec![], vec![], vec![]);
        let mut dq = vec![];
        for &at in &queries {
            let (o, l) = reference::forward_row(problem, q, k, v, extras, at);
            exact_out.extend(o);
            exact_lse.push(l);
            let [b, h, i] = at.map(|n| n as usize);
            let n = (b * s.heads_q as usize + h) * s.seqlen_q as usize + i;
            let dim = s.head_dim_v as usize;
            found_out.extend_from_slice(&out[n * dim..][..dim]);
            found_lse.push(lse[n]);
            let all = [&q[..], k, v, &upstream.out];
            dq.extend(reference::backward_query_row(problem, all, upstream.lse.as_deref(), extras, at));
        }
        let of_out = Errors::of(found_out, &exact_out);
        let verdicts = [Bound::out(ElementType::F32, of_out).judge(of_out), accept::lse(found_lse, &exact_lse)];
        if let Some(verdict) = verdicts.iter().find(|verdict| !verdict.holds) {
            return Err(format!("the forward pass in f32 that gradients were to be checked with: {verdict}"));
        }

        let delta = reference::delta(problem, &upstream.out, &out, upstream.lse.as_deref());
        let lse_f64: Vec<f64> = lse.iter().map(|&x| x as f64).collect();
        let (mut dk, mut dv) = (vec![], vec![]);
        let all = [&q[..], k, v, &upstream.out];
        for &at in &keys {
            let (of_key, of_value) = reference::backward_key_row(problem, all, [&lse_f64, &delta], extras, at);
            dk.extend(of_key);
            dv.extend(of_value);
        }

        let out: Vec<T> = out.into_iter().map(T::nearest).collect();
        let rows = rounded::Rows::new(problem, &upstream.out, &out, &lse, upstream.lse.as_deref());
        let plain_dq = rounded::backward_query_rows(problem, all, &rows, extras, &queries);
        let [plain_dk, plain_dv] = rounded::backward_key_rows(problem, all, &rows, extras, &keys);
        let expected = |exact: Vec<f64>, plain| Expected::new(exact.clone(), &exact, plain);
        let expected = [expected(dq, plain_dq), expected(dk, plain_dk), expected(dv, plain_dv)];
        Ok(GradientSample { queries, keys, expected })
    }

    /// Judges dq, dk and dv, laid out as the problem says, without gaps.
    pub fn judge<T: Number>(&self, problem: &Problem, found: &[Vec<T>; 3]) -> Result<[Verdict; 3], String> {
        let s = &problem.shape;
        let nan = (0..3).find(|&n| found[n].iter().any(|&x| x.into().is_nan()));
        if let Some(n) = nan {
            return Err(format!("{}: some elements were not written or are NaN", GRADIENTS[n]));
        }
        let judge = |n: usize, tensor: Tensor, rows: &[[u32; 3]], dim: u32| {
            let layout = problem.layout(tensor);
            let of_row = |&at: &[u32; 3]| found[n][place(&layout, at)..][..dim as usize].iter().copied();
            self.expected[n].judge(rows.iter().flat_map(of_row))
        };
        Ok([
            judge(0, Tensor::GradQuery, &self.queries, s.head_dim),
            judge(1, Tensor::GradKey, &self.keys, s.head_dim),
            judge(2, Tensor::GradValue, &self.keys, s.head_dim_v),
        ])
    }
}

/// At most `count` rows of so many, from the first to the last; the step is no multiple of the length, so positions differ
/// between heads.
pub fn sample_rows([batch, heads, positions]: [u32; 3], count: u64) -> Vec<[u32; 3]> {
    let (heads, positions) = (heads as u64, positions as u64);
    let rows = batch as u64 * heads * positions;
    let count = count.min(rows);
    let row = |n: u64| {
        let row = (n as u128 * (rows - 1) as u128 / (count - 1).max(1) as u128) as u64;
        [(row / positions / heads) as u32, (row / positions % heads) as u32, (row % positions) as u32]
    };
    (0..count).map(row).collect()
}

/// o and lse of every row by the tile kernel in f32, whatever the type of the inputs.
fn forward_f32<T: Number>(
    context: &Context,
    problem: &Problem,
    tensors: &Tensors<T>,
) -> Result<(Vec<f32>, Vec<f32>), String> {
    // All but the layouts and the gradients.
    let mut of_f32 = Problem::new(problem.shape, ElementType::F32).window(problem.window_left, problem.window_right);
    (of_f32.scale, of_f32.softcap, of_f32.causal) = (problem.scale, problem.softcap, problem.causal);
    (of_f32.seqlens_q, of_f32.seqlens_k, of_f32.lse) = (problem.seqlens_q, problem.seqlens_k, problem.lse);
    of_f32.bias = problem.bias.map(|bias| Bias::new(ElementType::F32, bias.layout));
    (of_f32.mask, of_f32.alibi, of_f32.sinks) = (problem.mask, problem.alibi, problem.sinks);
    let problem = of_f32;
    let f32s = |values: &[T]| -> Vec<f32> { values.iter().map(|&x| x.into() as f32).collect() };
    let tensors = Tensors {
        query: f32s(&tensors.query),
        key: f32s(&tensors.key),
        value: f32s(&tensors.value),
        extras: tensors.extras.clone(),
    };
    let words = |error: Error| error.to_string();
    let options = PlanOptions::default().kernel(Kernel::Tile);
    let plan = context.plan_with(&problem, &options).map_err(words)?;
    let inputs = Inputs::upload(context, &problem, &tensors)?;
    let outputs = Outputs::poisoned(context, &plan)?;
    let bound = bind(&plan, &inputs, &outputs).map_err(words)?;
    pass_times(context, &[bound], 1, 1).map_err(words)?;
    outputs.read(context, &problem).map_err(words)
}
