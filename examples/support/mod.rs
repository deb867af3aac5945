//! What the command, the benchmark and the bench share: inputs, buffers, device time, and the bounds of a check.
#![allow(dead_code)] // Each of the three uses a part of it.

use std::time::Instant;

use wgpu_flash_attention::{BoundForward, Context, CoopForm, Element, Error, ForwardBuffers, Plan, Problem, wgpu};

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
    pub seqlens_k: Option<Vec<i32>>,
}

/// The same on the device.
pub struct Inputs {
    query: wgpu::Buffer,
    key: wgpu::Buffer,
    value: wgpu::Buffer,
    seqlens_k: Option<wgpu::Buffer>,
}

impl Inputs {
    pub fn upload<T: Number>(context: &Context, tensors: &Tensors<T>) -> Result<Self, String> {
        let limit = context.device().limits().max_buffer_size;
        let upload = |name, data: &[T]| match size_of_val(data) as u64 {
            bytes if bytes > limit => {
                Err(format!("{name} takes {bytes} bytes; the device's largest buffer is {limit}"))
            }
            _ => Ok(context.upload(bytemuck::cast_slice(data))),
        };
        Ok(Inputs {
            query: upload("q", &tensors.query)?,
            key: upload("k", &tensors.key)?,
            value: upload("v", &tensors.value)?,
            seqlens_k: tensors.seqlens_k.as_ref().map(|lengths| context.upload(bytemuck::cast_slice(lengths))),
        })
    }
}

/// o and lse, filled with NaN, and the plan's workspace.
pub struct Outputs {
    out: wgpu::Buffer,
    lse: wgpu::Buffer,
    workspace: Option<wgpu::Buffer>,
}

impl Outputs {
    pub fn poisoned(context: &Context, plan: &Plan) -> Result<Self, String> {
        let limit = context.device().limits().max_buffer_size;
        let (out, lse) = output_bytes(plan.problem());
        if out > limit {
            return Err(format!("o takes {out} bytes; the device's largest buffer is {limit}"));
        }
        let nan = |bytes: u64| context.upload(&vec![0xff; bytes as usize]);
        Ok(Outputs { out: nan(out), lse: nan(lse), workspace: plan.create_workspace() })
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
pub fn bind<'p>(plan: &'p Plan, inputs: &Inputs, outputs: &Outputs) -> Result<BoundForward<'p>, Error> {
    plan.bind_forward(&ForwardBuffers {
        query: inputs.query.as_entire_buffer_binding(),
        key: inputs.key.as_entire_buffer_binding(),
        value: inputs.value.as_entire_buffer_binding(),
        out: outputs.out.as_entire_buffer_binding(),
        lse: Some(outputs.lse.as_entire_buffer_binding()),
        seqlens_k: inputs.seqlens_k.as_ref().map(|buffer| buffer.as_entire_buffer_binding()),
        workspace: outputs.workspace.as_ref().map(|buffer| buffer.as_entire_buffer_binding()),
    })
}

/// What [`pass_times`] measures on this device, in words.
pub fn clock(context: &Context) -> &'static str {
    if has_timestamps(context) { "device time" } else { "host time of submit and wait" }
}

fn has_timestamps(context: &Context) -> bool {
    context.device().features().contains(wgpu::Features::TIMESTAMP_QUERY)
}

/// Seconds that each of `passes` compute passes takes, every one of `runs` forward passes in a row. With timestamps
/// all of them are queued before the host waits for anything, so that the device does not idle in between.
pub fn pass_times(context: &Context, bound: &BoundForward<'_>, runs: u32, passes: u32) -> Result<Vec<f64>, Error> {
    let (device, queue) = (context.device(), context.queue());
    let wait =
        || device.poll(wgpu::PollType::wait_indefinitely()).map(drop).map_err(|error| Error::Device(error.to_string()));
    let submit = |timestamp_writes| {
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
        for _ in 0..runs {
            bound.record(&mut pass);
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

/// Seconds of one forward pass.
pub struct Time {
    pub median: f64,
    pub min: f64,
    pub passes: usize,
}

/// Times a forward pass on a busy device: an idle GPU lowers its clock within moments, so the timed passes follow
/// without a gap on at least 250 ms of the same work, and each takes at least 2 ms.
pub fn measure(context: &Context, bound: &BoundForward<'_>) -> Result<Time, Error> {
    // A processor needs no warming up, and takes its time as it is.
    let software = context.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
    // Somewhat more of both, since the estimate may come from a device that was still getting faster.
    let (warm_up, passes) = if software { (0.0, 5) } else { (0.4, 15) };
    let times = |estimate: f64, passes| -> Result<Vec<f64>, Error> {
        let runs = (0.003 / estimate).ceil();
        let warm = (warm_up / (runs * estimate)).ceil() as u32;
        let all = pass_times(context, bound, runs as u32, warm + passes)?;
        Ok(all[warm as usize..].iter().map(|seconds| seconds / runs).collect())
    };
    // No forward pass is that short; a clock may be that coarse.
    let shortest = 1e-6;
    let cold = pass_times(context, bound, 1, 1)?[0].max(shortest);
    let estimate = times(cold, 1)?[0].max(shortest);
    let mut times = times(estimate, passes)?;
    times.sort_by(f64::total_cmp);
    Ok(Time { median: times[times.len() / 2], min: times[0], passes: times.len() })
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
    let keys = tensors.seqlens_k.as_ref().map_or(s.seqlen_k, |lengths| lengths[b as usize] as u32);
    let (first, end) = problem.key_interval(i, keys);
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
        let (mut largest, mut squares, mut norm) = (0.0f64, 0.0, 0.0);
        for (found, &expected) in found.into_iter().zip(expected) {
            let error = difference(found.into(), expected);
            largest = largest.max(error);
            squares += error * error;
            // −∞ in lse has no size to be relative to.
            norm += if expected.is_finite() { expected * expected } else { 0.0 };
        }
        let relative = if squares == 0.0 { 0.0 } else { (squares / norm).sqrt() };
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

/// For o in f32: the relative error.
pub fn judge_relative(errors: Errors) -> Verdict {
    let ratio = errors.relative / 2e-6;
    Verdict { errors, bound: "relative error at most 2.0e-6".into(), ratio, holds: ratio <= 1.0 }
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
