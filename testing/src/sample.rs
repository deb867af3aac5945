//! Rows of large tensors, and what they should be: the oracle would take hours for all of them.

use wgpu_flash_attention::reference::Summed;
use wgpu_flash_attention::reference::accept::{self, Bound, Errors, Verdict};
use wgpu_flash_attention::reference::rounded::{self, Gradient};
use wgpu_flash_attention::{
    Bias, Context, ElementType, Error, Gradients, Kernel, PlanOptions, Problem, Shape, Tensor, reference,
};

use crate::buffers::{Inputs, Number, Outputs, SHARED, Shared, Tensors, Upstream, bind, place};
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

/// Elements of a gradient that scores share, as they should be.
struct SharedSample {
    places: Vec<usize>,
    expected: Vec<f64>,
    terms: f64,
}

/// Scores times dimensions that the oracle computes in a moment.
const AFFORDABLE: u64 = 400_000_000;

/// Whether [`GradientSample::of`] can compute what every score adds to.
pub fn affordable_whole(shape: &Shape) -> bool {
    shape.rows() * shape.seqlen_k as u64 * (shape.head_dim + shape.head_dim_v) as u64 <= AFFORDABLE
}

/// Rows of dq, dk and dv as they should be, and elements of the gradients of bias, sinks and slopes, of those that the problem asks for.
pub struct GradientSample {
    queries: Vec<[u32; 3]>,
    keys: Vec<[u32; 3]>,
    expected: [Expected; 3],
    shared: [Option<SharedSample>; 3],
}

impl GradientSample {
    /// Rows of dq by the oracle alone. Rows of dk and dv depend on o and lse of every query, which would take the oracle
    /// N² D: they come from a forward pass by the tile kernel in f32 on the same values (by the naive one where blocks are smaller than tiles), checked on the rows of dq. They are
    /// not those that the kernel in question is given, whose o is rounded to its type.
    ///
    /// The gradients of bias, sinks and slopes likewise: whole if [`affordable_whole`], else those of sinks whole, of a bias with rows of
    /// its own some rows, and an error for others.
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

        let sizes = reference::delta_sizes(problem, &upstream.out, &out, upstream.lse.as_deref());
        let shared = shared_samples(problem, all, [&lse_f64, &delta, &sizes], extras)?;
        let out: Vec<T> = out.into_iter().map(T::nearest).collect();
        let rows = rounded::Rows::new(problem, &upstream.out, &out, &lse, upstream.lse.as_deref());
        let plain_dq = rounded::backward_query_rows(problem, all, &rows, extras, &queries);
        let [plain_dk, plain_dv] = rounded::backward_key_rows(problem, all, &rows, extras, &keys);
        let expected = |exact: Vec<f64>, plain| Expected::new(exact.clone(), &exact, plain);
        let expected = [expected(dq, plain_dq), expected(dk, plain_dk), expected(dv, plain_dv)];
        Ok(GradientSample { queries, keys, expected, shared })
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

    /// Judges the other gradients that the problem asks for.
    pub fn judge_shared(&self, problem: &Problem, found: &Shared) -> Result<Vec<(&'static str, Verdict)>, String> {
        let mut verdicts = vec![];
        for ((sample, found), name) in self.shared.iter().zip(found).zip(SHARED) {
            let (Some(sample), Some(found)) = (sample, found) else { continue };
            let SharedSample { places, expected, terms } = sample;
            // A bias has no gaps but one before it.
            let gap = problem.bias.filter(|_| name == SHARED[0]).map_or(0, |bias| bias.layout.offset as usize);
            if found.iter().skip(gap).any(|x| x.is_nan()) {
                return Err(format!("{name}: some elements were not written or are NaN"));
            }
            let errors = Errors::of_sums(places.iter().map(|&place| found[place]), expected, *terms);
            verdicts.push((name, Bound::shared(problem.element_type).judge(errors)));
        }
        Ok(verdicts)
    }
}

/// See [`GradientSample::of`].
fn shared_samples<T: Number>(
    problem: &Problem,
    tensors: [&[T]; 4],
    rows: [&[f64]; 3],
    extras: reference::Extras,
) -> Result<[Option<SharedSample>; 3], String> {
    let s = &problem.shape;
    let asked = problem.gradients.unwrap_or_default();
    let all = sample_rows([s.batch, s.heads_q, s.seqlen_q], u64::MAX);
    // Of the bias and the slopes, whose sums are over scores.
    let some: Vec<[u32; 3]> = match problem.bias {
        _ if affordable_whole(s) => all.clone(),
        Some(bias) if bias.layout.row > 0 && !asked.alibi_slopes => {
            // Of all batch entries, and of all heads where they share the rows.
            let (heads, sharing) = if bias.layout.head == 0 { (1, s.heads_q) } else { (s.heads_q, 1) };
            let of = |h: u32, i: u32| (0..s.batch).flat_map(move |b| (h..h + sharing).map(move |h| [b, h, i]));
            sample_rows([1, heads, s.seqlen_q], 16).into_iter().flat_map(|[_, h, i]| of(h, i)).collect()
        }
        _ if asked.bias || asked.alibi_slopes => {
            return Err("the gradients of slopes, and of a bias that all rows share, are too large to check".into());
        }
        _ => vec![],
    };
    let only = |change: fn(&mut Gradients)| {
        let mut problem = problem.clone();
        problem.gradients.iter_mut().for_each(change);
        problem
    };
    let of_scores = only(|gradients| gradients.sinks = false);
    let of_rows = only(|gradients| (gradients.bias, gradients.alibi_slopes) = (false, false));
    let [bias, _, slopes] = reference::backward_shared_rows(&of_scores, tensors, rows, extras, &some);
    let [_, sinks, _] = reference::backward_shared_rows(&of_rows, tensors, rows, extras, &all);
    let mut of_bias: Vec<usize> = match problem.bias.filter(|_| asked.bias) {
        None => vec![],
        Some(Bias { layout, .. }) => {
            let row = |&[b, h, i]: &[u32; 3]| (0..s.seqlen_k).map(move |j| layout.place([b, h, i, j]) as usize);
            some.iter().flat_map(row).collect()
        }
    };
    of_bias.sort();
    of_bias.dedup();
    let places = [of_bias, (0..s.heads_q as usize).collect(), (0..(s.batch * s.heads_q) as usize).collect()];
    let mut samples = places.into_iter().zip([bias, sinks, slopes]).map(|(mut places, sums)| {
        let Summed { values, terms, .. } = sums?;
        places.retain(|&place| place < values.len());
        Some(SharedSample { expected: places.iter().map(|&place| values[place]).collect(), places, terms })
    });
    Ok([0, 1, 2].map(|_| samples.next().flatten()))
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
    (of_f32.dropout, of_f32.blocks, of_f32.mods) = (problem.dropout, problem.blocks, problem.mods.clone());
    let problem = of_f32;
    let f32s = |values: &[T]| -> Vec<f32> { values.iter().map(|&x| x.into() as f32).collect() };
    let tensors = Tensors {
        query: f32s(&tensors.query),
        key: f32s(&tensors.key),
        value: f32s(&tensors.value),
        extras: tensors.extras.clone(),
    };
    let words = |error: Error| error.to_string();
    let plan_of = |kernel| context.plan_with(&problem, &PlanOptions::default().kernel(kernel));
    let plan = match plan_of(Kernel::Tile) {
        // Blocks that no tile divides.
        Err(Error::BlockTile { .. }) => plan_of(Kernel::Naive),
        plan => plan,
    };
    let plan = plan.map_err(words)?;
    let inputs = Inputs::upload(context, &problem, &tensors)?;
    let outputs = Outputs::poisoned(context, &plan)?;
    let bound = bind(&plan, &inputs, &outputs).map_err(words)?;
    pass_times(context, &[bound], 1, 1).map_err(words)?;
    outputs.read(context, &problem).map_err(words)
}
