//! Tensors of any size on the host, and a plan's buffers on the device.

use fastrand::Rng;
use wgpu_flash_attention::{
    Alibi, BackwardBuffers, BoundPass, Context, Element, ElementType, Error, ForwardBuffers, Layout, Plan, Problem,
    wgpu,
};

use crate::{DeviceExtras, Extras, from_bits, score_elements};

/// The adapter in words.
pub fn adapter_name(context: &Context) -> String {
    let info = context.device().adapter_info();
    format!("{} ({}, {} {})", info.name, info.backend, info.driver, info.driver_info)
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

/// Normally distributed values. They repeat after a prime number of elements, so that large inputs cost little and
/// no two rows or heads are equal.
pub fn random<T: Number>(elements: usize, seed: u64) -> Vec<T> {
    const PERIOD: usize = 1_048_583;
    let mut rng = Rng::with_seed(seed);
    // From above 0 to 1: the first one's logarithm is taken.
    let mut uniform = || 1.0 - rng.f32();
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos();
    let block: Vec<T> = (0..elements.min(PERIOD)).map(|_| T::nearest(normal())).collect();
    let mut all = Vec::with_capacity(elements);
    while all.len() < elements {
        all.extend_from_slice(&block[..block.len().min(elements - all.len())]);
    }
    all
}

/// q, k, v and what a problem has besides, on the host: contiguous `[batch, head, position, dim]`.
pub struct Tensors<T> {
    pub query: Vec<T>,
    pub key: Vec<T>,
    pub value: Vec<T>,
    pub extras: Extras,
}

/// What the backward pass is given besides: the gradients of o and, where the loss uses it, of lse; contiguous.
pub struct Upstream<T> {
    pub out: Vec<T>,
    pub lse: Option<Vec<f32>>,
}

/// The same on the device.
pub struct Inputs {
    query: wgpu::Buffer,
    key: wgpu::Buffer,
    value: wgpu::Buffer,
    extras: DeviceExtras,
}

impl Inputs {
    pub fn upload<T: Number>(context: &Context, problem: &Problem, tensors: &Tensors<T>) -> Result<Self, String> {
        Ok(Inputs {
            query: upload(context, "q", &tensors.query)?,
            key: upload(context, "k", &tensors.key)?,
            value: upload(context, "v", &tensors.value)?,
            extras: tensors.extras.upload(context, problem)?,
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
    let buffers = ForwardBuffers::new(&inputs.query, &inputs.key, &inputs.value, &outputs.out).lse(&outputs.lse);
    inputs.extras.add_to(buffers)
}

/// The gradients that are sums over scores which share an element.
pub const SHARED: [&str; 3] = ["dbias", "dsinks", "dalibi_slopes"];

/// Those that a problem asks for, in this order. That of the bias lies as the bias does.
pub type Shared = [Option<Vec<f32>>; 3];

/// Of each that the problem asks for, its type in memory and how many elements its buffer has.
pub fn shared_buffers(problem: &Problem) -> [Option<(ElementType, u64)>; 3] {
    let (asked, s) = (problem.gradients.unwrap_or_default(), &problem.shape);
    let bias = problem.bias.filter(|_| asked.bias);
    let slopes = problem.alibi.filter(|_| asked.alibi_slopes).map(|alibi| match alibi {
        Alibi::PerBatchAndHead => s.batch as u64 * s.heads_q as u64,
        _ => s.heads_q.into(),
    });
    [
        bias.map(|bias| (bias.element_type, score_elements(problem, &bias.layout))),
        asked.sinks.then_some((ElementType::F32, s.heads_q.into())),
        slopes.map(|slopes| (ElementType::F32, slopes)),
    ]
}

/// The buffers of a backward pass that its forward pass has no use for; gradients are filled with NaN.
pub struct GradientBuffers {
    out: wgpu::Buffer,
    lse: Option<wgpu::Buffer>,
    /// dq, dk, dv.
    results: [wgpu::Buffer; 3],
    /// In the order of [`SHARED`].
    shared: [Option<wgpu::Buffer>; 3],
    workspace: Option<wgpu::Buffer>,
}

impl GradientBuffers {
    pub fn poisoned<T: Number>(context: &Context, plan: &Plan, upstream: &Upstream<T>) -> Result<Self, String> {
        let [query, key, value] = gradient_bytes(plan.problem());
        let mut shared = [None, None, None];
        for ((buffer, of), name) in shared.iter_mut().zip(shared_buffers(plan.problem())).zip(SHARED) {
            let bytes = |(element_type, n): (ElementType, u64)| (n * element_type.bytes()).next_multiple_of(4).max(4);
            *buffer = of.map(|of| poisoned(context, name, bytes(of))).transpose()?;
        }
        Ok(GradientBuffers {
            out: upload(context, "do", &upstream.out)?,
            lse: upstream.lse.as_deref().map(|lse| upload(context, "dlse", lse)).transpose()?,
            results: [poisoned(context, "dq", query)?, poisoned(context, "dk", key)?, poisoned(context, "dv", value)?],
            shared,
            workspace: plan.create_backward_workspace().map_err(|error| error.to_string())?,
        })
    }

    /// Binds the backward pass of a plan, over what its forward pass has been given and has left.
    pub fn bind(&self, plan: &Plan, inputs: &Inputs, outputs: &Outputs) -> Result<BoundPass, Error> {
        let forward = forward_buffers(inputs, outputs);
        let buffers = BackwardBuffers::new(&forward, &self.out, self.results.each_ref());
        let [bias, sinks, slopes] = self.shared.each_ref().map(Option::as_ref);
        let buffers = buffers.grad_bias(bias).grad_sinks(sinks).grad_alibi_slopes(slopes);
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

    /// The other gradients that the problem asks for.
    pub fn read_shared(&self, context: &Context, problem: &Problem) -> Result<Shared, Error> {
        let mut all = [None, None, None];
        for ((values, buffer), of) in all.iter_mut().zip(&self.shared).zip(shared_buffers(problem)) {
            let (Some(buffer), Some((element_type, elements))) = (buffer, of) else { continue };
            let size = element_type.bytes() as usize;
            let bytes = context.download(buffer, 0, (elements * size as u64).next_multiple_of(4).max(4))?;
            let number = |bytes: &[u8]| {
                let mut word = [0; 4];
                word[..size].copy_from_slice(bytes);
                from_bits(element_type, u32::from_le_bytes(word))
            };
            *values = Some(bytes.chunks_exact(size).take(elements as usize).map(number).collect());
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

/// Where element (b, h, i, 0) lies.
pub fn place(layout: &Layout, [b, h, i]: [u32; 3]) -> usize {
    (layout.offset + b as u64 * layout.batch + h as u64 * layout.head + i as u64 * layout.row) as usize
}
