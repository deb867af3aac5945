//! What the examples and the bench share: inputs, buffers, device time, and the bounds of a check.
#![allow(dead_code)] // Each of them uses a part of it.

pub mod output;
pub mod terminal;

use std::time::Instant;

use wgpu_flash_attention::{
    BackwardBuffers, BoundPass, Context, CoopForm, Element, ElementType, Error, ForwardBuffers, Kernel, Layout, Plan,
    PlanOptions, Problem, Tensor, reference, wgpu,
};

/// The forms of the coop kernel, as options name them.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Form {
    Registers,
    WorkgroupMemory,
}

impl From<Form> for CoopForm {
    fn from(form: Form) -> Self {
        match form {
            Form::Registers => CoopForm::Registers,
            Form::WorkgroupMemory => CoopForm::WorkgroupMemory,
        }
    }
}

/// An element type that one can compute with on the host.
pub trait Number: Element + Into<f64> {
    /// The nearest value of the type.
    fn nearest(x: f32) -> Self;
}

impl Number for f32 {
    fn nearest(x: f32) -> Self {
        x
    }
}
impl Number for half::f16 {
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
}
impl Number for half::bf16 {
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// The adapter in words.
pub fn adapter_name(context: &Context) -> String {
    let info = context.device().adapter_info();
    format!("{} ({}, {} {})", info.name, info.backend, info.driver, info.driver_info)
}

/// Normally distributed values. They repeat after a prime number of elements, so that large inputs cost little and
/// no two rows or heads are equal.
pub fn random<T: Number>(elements: usize, seed: u64) -> Vec<T> {
    const PERIOD: usize = 1_048_583;
    let mut state = seed;
    // SplitMix64, the upper bits; never 0, whose logarithm is taken below.
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let a = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let b = (a ^ (a >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((b ^ (b >> 31)) >> 40) as f32 + 0.5) / (1 << 24) as f32
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos();
    let block: Vec<T> = (0..elements.min(PERIOD)).map(|_| T::nearest(normal())).collect();
    let mut all = Vec::with_capacity(elements);
    while all.len() < elements {
        all.extend_from_slice(&block[..block.len().min(elements - all.len())]);
    }
    all
}

/// q, k, v and the key lengths on the host: contiguous `[batch, head, position, dim]`.
pub struct Tensors<T> {
    pub query: Vec<T>,
    pub key: Vec<T>,
    pub value: Vec<T>,
    pub lengths: Lengths,
}

/// How many queries and keys of each batch entry are valid, of a problem with lengths.
#[derive(Clone, Debug, Default)]
pub struct Lengths {
    pub queries: Option<Vec<i32>>,
    pub keys: Option<Vec<i32>>,
}

impl Lengths {
    pub fn borrow(&self) -> reference::Lengths<'_> {
        reference::Lengths { queries: self.queries.as_deref(), keys: self.keys.as_deref() }
    }
}

/// What the backward pass is given besides: the gradients of o and, where the loss uses it, of lse; contiguous.
pub struct Upstream<T> {
    pub out: Vec<T>,
    pub lse: Option<Vec<f32>>,
}

/// q, k, v and the key lengths on the device.
pub struct Inputs {
    query: wgpu::Buffer,
    key: wgpu::Buffer,
    value: wgpu::Buffer,
    seqlens_q: Option<wgpu::Buffer>,
    seqlens_k: Option<wgpu::Buffer>,
}

impl Inputs {
    pub fn upload<T: Number>(context: &Context, tensors: &Tensors<T>) -> Result<Self, String> {
        let lengths = |name: &str, lengths: &Option<Vec<i32>>| {
            lengths.as_deref().map(|lengths| upload(context, name, lengths)).transpose()
        };
        Ok(Inputs {
            query: upload(context, "q", &tensors.query)?,
            key: upload(context, "k", &tensors.key)?,
            value: upload(context, "v", &tensors.value)?,
            seqlens_q: lengths("seqlens_q", &tensors.lengths.queries)?,
            seqlens_k: lengths("seqlens_k", &tensors.lengths.keys)?,
        })
    }
}

fn upload<T: bytemuck::Pod>(context: &Context, name: &str, data: &[T]) -> Result<wgpu::Buffer, String> {
    fits(context, name, size_of_val(data) as u64)?;
    context.upload(bytemuck::cast_slice(data)).map_err(|error| format!("{name}: {error}"))
}

fn fits(context: &Context, name: &str, bytes: u64) -> Result<(), String> {
    match context.device().limits().max_buffer_size {
        limit if bytes > limit => Err(format!("{name} takes {bytes} bytes; the device's largest buffer is {limit}")),
        _ => Ok(()),
    }
}

/// A buffer full of NaN.
fn poisoned(context: &Context, name: &str, bytes: u64) -> Result<wgpu::Buffer, String> {
    fits(context, name, bytes)?;
    context.upload(&vec![0xff; bytes as usize]).map_err(|error| format!("{name}: {error}"))
}

/// o and lse, filled with NaN, and the plan's workspace.
pub struct Outputs {
    out: wgpu::Buffer,
    lse: wgpu::Buffer,
    workspace: Option<wgpu::Buffer>,
}

impl Outputs {
    pub fn poisoned(context: &Context, plan: &Plan) -> Result<Self, String> {
        let (out, lse) = output_bytes(plan.problem());
        Ok(Outputs {
            out: poisoned(context, "o", out)?,
            lse: poisoned(context, "lse", lse)?,
            workspace: plan.create_workspace().map_err(|error| error.to_string())?,
        })
    }

    /// o and lse as they are now.
    pub fn read<T: Number>(&self, context: &Context, problem: &Problem) -> Result<(Vec<T>, Vec<f32>), Error> {
        let (out, lse) = output_bytes(problem);
        if lse == 0 {
            return Ok((vec![], vec![]));
        }
        let out = bytemuck::pod_collect_to_vec(&context.download(&self.out, 0, out)?);
        let lse = bytemuck::pod_collect_to_vec(&context.download(&self.lse, 0, lse)?);
        Ok((out, lse))
    }
}

fn output_bytes(problem: &Problem) -> (u64, u64) {
    let rows = problem.shape.rows();
    (rows * problem.shape.head_dim_v as u64 * problem.element_type.bytes(), rows * 4)
}

/// Binds the buffers of a plan with lse.
pub fn bind(plan: &Plan, inputs: &Inputs, outputs: &Outputs) -> Result<BoundPass, Error> {
    plan.bind_forward(&forward_buffers(inputs, outputs).workspace(outputs.workspace.as_ref()))
}

/// The tensors of a plan with lse, without a workspace.
fn forward_buffers<'a>(inputs: &'a Inputs, outputs: &'a Outputs) -> ForwardBuffers<'a> {
    ForwardBuffers::new(&inputs.query, &inputs.key, &inputs.value, &outputs.out)
        .lse(&outputs.lse)
        .seqlens_q(inputs.seqlens_q.as_ref())
        .seqlens_k(inputs.seqlens_k.as_ref())
}

/// The buffers of a backward pass that its forward pass has no use for; dq, dk and dv are filled with NaN.
pub struct GradientBuffers {
    out: wgpu::Buffer,
    lse: Option<wgpu::Buffer>,
    /// dq, dk, dv.
    results: [wgpu::Buffer; 3],
    workspace: Option<wgpu::Buffer>,
}

impl GradientBuffers {
    pub fn poisoned<T: Number>(context: &Context, plan: &Plan, upstream: &Upstream<T>) -> Result<Self, String> {
        let [query, key, value] = gradient_bytes(plan.problem());
        Ok(GradientBuffers {
            out: upload(context, "do", &upstream.out)?,
            lse: upstream.lse.as_deref().map(|lse| upload(context, "dlse", lse)).transpose()?,
            results: [poisoned(context, "dq", query)?, poisoned(context, "dk", key)?, poisoned(context, "dv", value)?],
            workspace: plan.create_backward_workspace().map_err(|error| error.to_string())?,
        })
    }

    /// Binds the backward pass of a plan, over what its forward pass has been given and has left.
    pub fn bind(&self, plan: &Plan, inputs: &Inputs, outputs: &Outputs) -> Result<BoundPass, Error> {
        let forward = forward_buffers(inputs, outputs);
        let buffers = BackwardBuffers::new(&forward, &self.out, self.results.each_ref());
        plan.bind_backward(&buffers.grad_lse(self.lse.as_ref()).workspace(self.workspace.as_ref()))
    }

    /// dq, dk and dv as they are now.
    pub fn read<T: Number>(&self, context: &Context, problem: &Problem) -> Result<[Vec<T>; 3], Error> {
        let mut all = [vec![], vec![], vec![]];
        for ((values, buffer), bytes) in all.iter_mut().zip(&self.results).zip(gradient_bytes(problem)) {
            if bytes > 0 {
                *values = bytemuck::pod_collect_to_vec(&context.download(buffer, 0, bytes)?);
            }
        }
        Ok(all)
    }
}

/// Of dq, dk and dv.
fn gradient_bytes(problem: &Problem) -> [u64; 3] {
    let s = &problem.shape;
    let keys = s.batch as u64 * s.heads_kv as u64 * s.seqlen_k as u64;
    [(s.rows(), s.head_dim), (keys, s.head_dim), (keys, s.head_dim_v)]
        .map(|(rows, dim)| rows * dim as u64 * problem.element_type.bytes())
}

/// What [`pass_times`] measures on this device, in words.
pub fn clock(context: &Context) -> &'static str {
    if has_timestamps(context) { "device time" } else { "host time of submit and wait" }
}

fn has_timestamps(context: &Context) -> bool {
    context.device().features().contains(wgpu::Features::TIMESTAMP_QUERY)
}

/// Seconds that each of `passes` compute passes takes, every one of them `bound` (a forward pass, say, and a backward one)
/// `runs` times in a row. With timestamps all are queued before the host waits for anything, so that the device does
/// not idle in between.
pub fn pass_times(context: &Context, bound: &[BoundPass], runs: u32, passes: u32) -> Result<Vec<f64>, Error> {
    let (device, queue) = (context.device(), context.queue());
    let wait =
        || device.poll(wgpu::PollType::wait_indefinitely()).map(drop).map_err(|error| Error::Device(error.to_string()));
    let submit = |timestamp_writes| {
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
        for _ in 0..runs {
            bound.iter().for_each(|bound| bound.record(&mut pass));
        }
        drop(pass);
        queue.submit([encoder.finish()]);
    };
    wait()?;
    if !has_timestamps(context) {
        let timed = |_| {
            let start = Instant::now();
            submit(None);
            wait()?;
            Ok(start.elapsed().as_secs_f64())
        };
        return (0..passes).map(timed).collect();
    }
    let query_set = device.create_query_set(&wgpu::QuerySetDescriptor {
        label: None,
        ty: wgpu::QueryType::Timestamp,
        count: 2 * passes,
    });
    for n in 0..passes {
        submit(Some(wgpu::ComputePassTimestampWrites {
            query_set: &query_set,
            beginning_of_pass_write_index: Some(2 * n),
            end_of_pass_write_index: Some(2 * n + 1),
        }));
    }
    let bytes = 16 * passes as u64;
    let ticks = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: bytes,
        usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    encoder.resolve_query_set(&query_set, 0..2 * passes, &ticks, 0);
    queue.submit([encoder.finish()]);
    let ticks: Vec<[u64; 2]> = bytemuck::pod_collect_to_vec(&context.download(&ticks, 0, bytes)?);
    let period = queue.get_timestamp_period() as f64 * 1e-9;
    Ok(ticks.iter().map(|[begin, end]| end.saturating_sub(*begin) as f64 * period).collect())
}

/// Seconds of one run.
pub struct Time {
    pub median: f64,
    pub min: f64,
    pub passes: usize,
}

impl Time {
    /// How far the median lies above the minimum, in parts of it.
    fn spread(&self) -> f64 {
        self.median / self.min - 1.0
    }
}

/// Times what is bound on a busy device: an idle GPU lowers its clock within moments, so the timed passes follow
/// without a gap on at least 250 ms of the same work, and each takes at least 2 ms and, on a GPU, two dispatches. Where the
/// median is more than 3 % above the minimum the clock has changed meanwhile; then once or twice again, and the steadiest
/// counts.
pub fn measure(context: &Context, bound: &[BoundPass]) -> Result<Time, Error> {
    // A processor needs no warming up, and takes its time as it is.
    let software = context.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
    // Somewhat more of both, since the estimate comes from a device that may still be getting faster. No more than that:
    // one at its limit of power soon slows down.
    let (warm_up, passes, least_runs) = if software { (0.0, 5, 1.0) } else { (0.3, 15, 2.0) };
    let times = |estimate: f64, warm_up: f64, passes| -> Result<Vec<f64>, Error> {
        let runs = (0.003 / estimate).ceil().max(least_runs);
        let warm = (warm_up / (runs * estimate)).ceil() as u32;
        let all = pass_times(context, bound, runs as u32, warm + passes)?;
        Ok(all[warm as usize..].iter().map(|seconds| seconds / runs).collect())
    };
    // No pass is that short; a clock may be that coarse.
    let shortest = 1e-6;
    let cold = pass_times(context, bound, 1, 1)?[0].max(shortest);
    let estimate = times(cold, warm_up / 6.0, 1)?[0].max(shortest);
    let once = || -> Result<Time, Error> {
        let mut times = times(estimate, warm_up, passes)?;
        times.sort_by(f64::total_cmp);
        Ok(Time { median: times[times.len() / 2], min: times[0], passes: times.len() })
    };
    let mut time = once()?;
    for _ in 0..if software { 0 } else { 2 } {
        if time.spread() > 0.03 {
            let again = once()?;
            time = if again.spread() < time.spread() { again } else { time };
        }
    }
    Ok(time)
}

/// One row as the plain computation in type `T` gives it: scores, softmax and products in f32, p and o rounded to
/// `T`. What 16-bit kernels are held against.
pub fn plain_row<T: Number>(problem: &Problem, tensors: &Tensors<T>, [b, h, i]: [u32; 3]) -> (Vec<T>, f32) {
    let s = &problem.shape;
    let f32_of = |x: T| -> f32 { x.into() as f32 };
    let row = |heads: u32, head: u32, positions: u32, position: u32, dim: u32| {
        let row = (b as usize * heads as usize + head as usize) * positions as usize + position as usize;
        row * dim as usize..(row + 1) * dim as usize
    };
    let (queries, keys) = tensors.lengths.borrow().of(problem, b);
    let (first, end) = problem.key_interval_of(i, queries, keys);
    let head_kv = h / s.group();
    let q = &tensors.query[row(s.heads_q, h, s.seqlen_q, i, s.head_dim)];
    let score = |j| {
        let k = &tensors.key[row(s.heads_kv, head_kv, s.seqlen_k, j, s.head_dim)];
        let dot: f32 = q.iter().zip(k).map(|(&x, &y)| f32_of(x) * f32_of(y)).sum();
        let x = problem.effective_scale() * dot;
        problem.softcap.map_or(x, |cap| cap * (x / cap).tanh())
    };
    let scores: Vec<f32> = (first..end).map(score).collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = scores.iter().map(|x| (x - max).exp()).sum();
    let mut out = vec![0.0; s.head_dim_v as usize];
    for (j, x) in (first..end).zip(scores) {
        let p = f32_of(T::nearest((x - max).exp() / sum));
        let v = &tensors.value[row(s.heads_kv, head_kv, s.seqlen_k, j, s.head_dim_v)];
        for (o, &v) in out.iter_mut().zip(v) {
            *o += p * f32_of(v);
        }
    }
    (out.into_iter().map(T::nearest).collect(), max + sum.ln())
}

/// The plain computation of gradients in type `T`: sums in f32; o, p, score gradients and results rounded to `T`.
pub struct PlainGradients<'a, T> {
    pub problem: &'a Problem,
    pub tensors: &'a Tensors<T>,
    pub upstream: &'a Upstream<T>,
    /// o and lse of every row.
    pub out: Vec<T>,
    pub lse: Vec<f32>,
}

/// Some rows of a gradient.
pub struct PlainRows<T> {
    pub values: Vec<T>,
    /// Squares of what was summed, added up, with p·dp and p·delta apart: they may cancel.
    pub terms: f64,
}

impl<T: Number> PlainGradients<'_, T> {
    /// Rows of dq, each `[b, h, i]`.
    pub fn query_rows(&self, rows: &[[u32; 3]]) -> PlainRows<T> {
        let s = &self.problem.shape;
        let mut result = PlainRows { values: vec![], terms: 0.0 };
        for &[b, h, i] in rows {
            let n = number([s.heads_q, s.seqlen_q], [b, h, i]);
            let delta = self.delta(n);
            let (first, end) = self.key_interval(b, i);
            let mut dq = vec![0.0; s.head_dim as usize];
            for j in first..end {
                let m = number([s.heads_kv, s.seqlen_k], [b, h / s.group(), j]);
                let pair = self.pair(n, m, delta);
                result.terms += add(&mut dq, pair.ddot, pair.size, row(&self.tensors.key, m, s.head_dim));
            }
            result.values.extend(dq.into_iter().map(T::nearest));
        }
        result
    }

    /// Rows of dk and of dv, each `[b, h, j]` with a key-value head.
    pub fn key_rows(&self, rows: &[[u32; 3]]) -> [PlainRows<T>; 2] {
        let s = &self.problem.shape;
        let mut result = [0, 1].map(|_| PlainRows { values: vec![], terms: 0.0 });
        for &[b, h, j] in rows {
            let m = number([s.heads_kv, s.seqlen_k], [b, h, j]);
            let (mut dk, mut dv) = (vec![0.0; s.head_dim as usize], vec![0.0; s.head_dim_v as usize]);
            for head in h * s.group()..(h + 1) * s.group() {
                for i in 0..s.seqlen_q {
                    let (first, end) = self.key_interval(b, i);
                    if (first..end).contains(&j) {
                        let n = number([s.heads_q, s.seqlen_q], [b, head, i]);
                        let pair = self.pair(n, m, self.delta(n));
                        result[0].terms += add(&mut dk, pair.ddot, pair.size, row(&self.tensors.query, n, s.head_dim));
                        result[1].terms += add(&mut dv, pair.p, pair.p, row(&self.upstream.out, n, s.head_dim_v));
                    }
                }
            }
            result[0].values.extend(dk.into_iter().map(T::nearest));
            result[1].values.extend(dv.into_iter().map(T::nearest));
        }
        result
    }

    fn key_interval(&self, b: u32, i: u32) -> (u32, u32) {
        let (queries, keys) = self.tensors.lengths.borrow().of(self.problem, b);
        self.problem.key_interval_of(i, queries, keys)
    }

    fn delta(&self, n: usize) -> f32 {
        let dim = self.problem.shape.head_dim_v;
        dot(row(&self.upstream.out, n, dim), row(&self.out, n, dim))
            - self.upstream.lse.as_ref().map_or(0.0, |lse| lse[n])
    }

    fn pair(&self, n: usize, m: usize, delta: f32) -> PlainPair {
        let (s, scale) = (&self.problem.shape, self.problem.effective_scale());
        let scaled = scale * dot(row(&self.tensors.query, n, s.head_dim), row(&self.tensors.key, m, s.head_dim));
        let (score, slope) = self.problem.softcap.map_or((scaled, 1.0), |cap| {
            let tanh = (scaled / cap).tanh();
            (cap * tanh, 1.0 - tanh * tanh)
        });
        let p = (score - self.lse[n]).exp();
        let dp = dot(row(&self.upstream.out, n, s.head_dim_v), row(&self.tensors.value, m, s.head_dim_v));
        let round = |x: f32| -> f32 { T::nearest(x).into() as f32 };
        PlainPair {
            p: round(p),
            ddot: round(p * (dp - delta) * slope) * scale,
            size: p * (dp.abs() + delta.abs()) * slope * scale,
        }
    }
}

struct PlainPair {
    p: f32,
    /// The loss' gradient in q·k.
    ddot: f32,
    /// How large it would be if nothing cancelled.
    size: f32,
}

/// Which row of all, of a contiguous tensor.
fn number([heads, positions]: [u32; 2], [b, h, i]: [u32; 3]) -> usize {
    (b as usize * heads as usize + h as usize) * positions as usize + i as usize
}

fn row<T>(data: &[T], n: usize, dim: u32) -> &[T] {
    &data[n * dim as usize..][..dim as usize]
}

fn dot<T: Number>(x: &[T], y: &[T]) -> f32 {
    x.iter().zip(y).map(|(&x, &y)| (x.into() as f32) * (y.into() as f32)).sum()
}

/// Adds `factor · x`; the square of `size · x`.
fn add<T: Number>(sum: &mut [f32], factor: f32, size: f32, x: &[T]) -> f64 {
    let mut squares = 0.0;
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum += factor * x.into() as f32;
        squares += x.into() * x.into();
    }
    squares * (size as f64).powi(2)
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
    pub fn new<T: Number>(values: Vec<f64>, exact: &[f64], plain: PlainRows<T>) -> Self {
        Expected { plain: Errors::of(plain.values, exact), terms: plain.terms, values }
    }

    pub fn judge<T: Number>(&self, found: impl IntoIterator<Item = T>) -> Verdict {
        let errors = Errors::of_sums(found, &self.values, self.terms);
        match T::TYPE {
            ElementType::F32 => judge_relative(errors, 5e-6),
            _ => judge_by_plain(errors, self.plain),
        }
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
        let lengths = tensors.lengths.borrow();
        let (out, lse) = forward_f32(context, problem, tensors)?;
        let Tensors { query: q, key: k, value: v, .. } = tensors;
        let (mut exact_out, mut exact_lse, mut found_out, mut found_lse) = (vec![], vec![], vec![], vec![]);
        let mut dq = vec![];
        for &at in &queries {
            let (o, l) = reference::forward_row(problem, q, k, v, lengths, at);
            exact_out.extend(o);
            exact_lse.push(l);
            let n = number([s.heads_q, s.seqlen_q], at);
            found_out.extend_from_slice(row(&out, n, s.head_dim_v));
            found_lse.push(lse[n]);
            let all = [&q[..], k, v, &upstream.out];
            dq.extend(reference::backward_query_row(problem, all, upstream.lse.as_deref(), lengths, at));
        }
        let verdicts = [judge_relative(Errors::of(found_out, &exact_out), 2e-6), judge_lse(&found_lse, &exact_lse)];
        if let Some(verdict) = verdicts.iter().find(|verdict| !verdict.holds) {
            return Err(format!("the forward pass in f32 that gradients were to be checked with: {verdict}"));
        }

        let delta = |n: usize| -> f64 {
            let products = row(&upstream.out, n, s.head_dim_v).iter().zip(row(&out, n, s.head_dim_v));
            let sum: f64 = products.map(|(&x, &y)| x.into() * y as f64).sum();
            sum - upstream.lse.as_ref().map_or(0.0, |lse| lse[n] as f64)
        };
        let delta: Vec<f64> = (0..lse.len()).map(delta).collect();
        let lse_f64: Vec<f64> = lse.iter().map(|&x| x as f64).collect();
        let (mut dk, mut dv) = (vec![], vec![]);
        for &at in &keys {
            let all = [&q[..], k, v, &upstream.out];
            let (of_key, of_value) = reference::backward_key_row(problem, all, [&lse_f64, &delta], lengths, at);
            dk.extend(of_key);
            dv.extend(of_value);
        }

        let out = out.into_iter().map(T::nearest).collect();
        let plain = PlainGradients { problem, tensors, upstream, out, lse };
        let plain_dq = plain.query_rows(&queries);
        let [plain_dk, plain_dv] = plain.key_rows(&keys);
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

/// Where element (b, h, i, 0) lies.
pub fn place(layout: &Layout, [b, h, i]: [u32; 3]) -> usize {
    (layout.offset + b as u64 * layout.batch + h as u64 * layout.head + i as u64 * layout.row) as usize
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
    let problem = of_f32;
    let f32s = |values: &[T]| -> Vec<f32> { values.iter().map(|&x| x.into() as f32).collect() };
    let tensors = Tensors {
        query: f32s(&tensors.query),
        key: f32s(&tensors.key),
        value: f32s(&tensors.value),
        lengths: tensors.lengths.clone(),
    };
    let words = |error: Error| error.to_string();
    let options = PlanOptions::default().kernel(Kernel::Tile);
    let plan = context.plan_with(&problem, &options).map_err(words)?;
    let inputs = Inputs::upload(context, &tensors)?;
    let outputs = Outputs::poisoned(context, &plan)?;
    let bound = bind(&plan, &inputs, &outputs).map_err(words)?;
    pass_times(context, &[bound], 1, 1).map_err(words)?;
    outputs.read(context, &problem).map_err(words)
}

/// How far values are from what they should be. NaN counts as infinitely far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Errors {
    /// The largest difference.
    pub largest: f64,
    /// `‖x − expected‖ / ‖expected‖`.
    pub relative: f64,
}

impl Errors {
    pub fn of(found: impl IntoIterator<Item = impl Into<f64>>, expected: &[f64]) -> Self {
        Self::of_sums(found, expected, 0.0)
    }

    /// The same for sums that may cancel, with the squares of their terms, added up: errors are relative to the larger.
    pub fn of_sums(found: impl IntoIterator<Item = impl Into<f64>>, expected: &[f64], terms: f64) -> Self {
        let (mut largest, mut squares, mut norm) = (0.0f64, 0.0, 0.0);
        for (found, &expected) in found.into_iter().zip(expected) {
            let error = difference(found.into(), expected);
            largest = largest.max(error);
            squares += error * error;
            // −∞ in lse has no size to be relative to.
            norm += if expected.is_finite() { expected * expected } else { 0.0 };
        }
        let relative = if squares == 0.0 { 0.0 } else { (squares / norm.max(terms)).sqrt() };
        Errors { largest, relative }
    }
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

/// A bound, and whether the values keep it.
pub struct Verdict {
    pub errors: Errors,
    pub bound: String,
    /// The error that the bound is for, as a part of it.
    pub ratio: f64,
    pub holds: bool,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Errors { largest, relative } = self.errors;
        let mark = if self.holds { "within" } else { "breaks" };
        write!(f, "largest error {largest:.1e}, relative error {relative:.1e}; {mark} the bound: {}", self.bound)
    }
}

/// For f32: the relative error, at most 2e-6 for o and 5e-6 for gradients.
pub fn judge_relative(errors: Errors, most: f64) -> Verdict {
    let ratio = errors.relative / most;
    Verdict { errors, bound: format!("relative error at most {most:.1e}"), ratio, holds: ratio <= 1.0 }
}

/// For 16-bit types flash-attention's rule: at most twice the largest error of the plain computation.
pub fn judge_by_plain(errors: Errors, plain: Errors) -> Verdict {
    let most = 2.0 * plain.largest + 1e-5;
    let bound = format!("largest error at most {most:.1e}, twice that of the plain computation in this type plus 1e-5");
    let ratio = errors.largest / most;
    Verdict { errors, bound, ratio, holds: ratio <= 1.0 }
}

/// For lse computed from the very values that the expected one was computed from.
pub fn judge_lse(found: &[f32], expected: &[f64]) -> Verdict {
    let one =
        |(&x, &y): (&f32, &f64)| difference(x.into(), y) / (1e-5 + 1e-6 * if y.is_finite() { y.abs() } else { 0.0 });
    let ratio = found.iter().zip(expected).map(one).fold(0.0, f64::max);
    Verdict {
        errors: Errors::of(found.iter().copied(), expected),
        bound: "each error at most 1e-5 + 1e-6 |lse|".into(),
        ratio,
        holds: ratio <= 1.0,
    }
}
