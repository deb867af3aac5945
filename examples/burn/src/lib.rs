//! wgpu-flash-attention as a differentiable operation on [Burn](https://burn.dev)'s tensors.
//!
//! ```no_run
//! use burn::tensor::{Distribution, Tensor};
//! use flash_attention_burn::{AttentionOptions, FlashAttention};
//! use wgpu_flash_attention::Causal;
//!
//! let (device, attention) = FlashAttention::init().unwrap();
//! let device = device.autodiff();
//! let random = || Tensor::<4>::random([1, 8, 256, 64], Distribution::Default, &device).require_grad();
//! let (query, key, value) = (random(), random(), random());
//! let options = AttentionOptions { causal: Some(Causal::BottomRight), ..Default::default() };
//! let out = attention.forward(query.clone(), key, value, options);
//! let gradients = out.sum().backward();
//! println!("{}", query.grad(&gradients).unwrap());
//! ```
//!
//! Burn and the kernels have one device, queue and memory: tensors are read and written where they are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Autodiff, Backend, Dispatch, ExtensionType, backend_extension};
use burn::tensor::wgpu::{WgpuInitError, WgpuSetup};
use burn::tensor::{Bool, DType, Device, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::wgpu::{AutoCompiler, WgpuServer};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use wgpu_flash_attention::wgpu::{Buffer, BufferBinding, CommandEncoder};
use wgpu_flash_attention::{
    BackwardBuffers, Bias, Causal, Context, ElementType, Error, ForwardBuffers, Layout, Plan, Problem, ScoreLayout,
    Shape, Tensor as Part,
};

/// What attention has besides q, k and v. As in Burn's own `attention`, scores are scaled, then capped; then the bias is added, and what is masked
/// does not count. A query of which nothing counts has an o of 0.
#[derive(Clone, Debug, Default)]
pub struct AttentionOptions {
    /// Which keys a query does **not** see, Burn's sense of a mask: `[batch, heads_q, seqlen_q, seqlen_k]`, each size 1 or full.
    pub mask: Option<Tensor<4, Bool>>,
    /// What is added to scores, in f32 or the type of q, of sizes like the mask's. It has a gradient where Burn tracks one.
    pub bias: Option<Tensor<4>>,
    /// The causal mask: on the diagonal that ends at the last query and the last key, as Burn's `is_causal`, or on the one that starts at the first ones.
    pub causal: Option<Causal>,
    /// Factor of the scores; 1/√dim if there is none.
    pub scale: Option<f32>,
    /// Scores become `softcap · tanh(score / softcap)`.
    pub softcap: Option<f32>,
}

/// The options that are no tensors.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    causal: Option<Causal>,
    scale: Option<f32>,
    softcap: Option<f32>,
}

/// The kernels on Burn's device, and the plans made so far. Clones share everything.
#[derive(Clone, Debug)]
pub struct FlashAttention {
    context: Context,
    plans: Arc<Mutex<HashMap<Problem, Arc<Plan>>>>,
}

impl FlashAttention {
    /// Starts Burn's wgpu runtime on its default device.
    pub fn init() -> Result<(Device, Self), WgpuInitError> {
        let (device, setup) = Device::wgpu_options().init_with_setup()?;
        Ok((device, Self::new(&setup)))
    }

    /// On a device of Burn's. Its memory may be pooled: tensors that lie in one buffer are read and written there.
    pub fn new(setup: &WgpuSetup) -> Self {
        FlashAttention { context: Context::new(&setup.device, &setup.queue), plans: Arc::default() }
    }

    /// o `[batch, heads_q, seqlen_q, dim_v]` for q `[batch, heads_q, seqlen_q, dim]`, k `[batch, heads_kv, seqlen_k,
    /// dim]` and v `[batch, heads_kv, seqlen_k, dim_v]` in one of f32, f16 and bf16. Views are read where they are if
    /// their last dimension is contiguous, a mask and a bias in any case.
    ///
    /// # Panics
    /// As Burn's operations do, if the shapes do not go together, or the device is another than the kernels'.
    pub fn forward(&self, query: Tensor<4>, key: Tensor<4>, value: Tensor<4>, options: AttentionOptions) -> Tensor<4> {
        let [query, key, value] = [query, key, value].map(Tensor::into_dispatch);
        let AttentionOptions { mask, bias, causal, scale, softcap } = options;
        // The kernels' masks say which keys a query sees.
        let seen = mask.map_or(Seen::All, |mask| Seen::Where(mask.bool_not().into_dispatch()));
        let bias = bias.map_or(Added::Nothing, |bias| Added::Bias(bias.into_dispatch()));
        let settings = Settings { causal, scale, softcap };
        Tensor::from_dispatch(<Dispatch as Attention>::attention(query, key, value, seen, bias, self.clone(), settings))
    }

    /// The plan for a problem, made at its first use.
    fn plan(&self, problem: &Problem) -> Result<Arc<Plan>, Error> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(problem) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(self.context.plan(problem)?);
        plans.insert(problem.clone(), plan.clone());
        Ok(plan)
    }

    fn submit(&self, record: impl FnOnce(&mut CommandEncoder) -> Result<(), Error>) -> Result<(), Error> {
        let mut encoder = self.context.device().create_command_encoder(&Default::default());
        record(&mut encoder)?;
        self.context.queue().submit([encoder.finish()]);
        Ok(())
    }
}

/// Which keys queries see. Burn's macro for operations by backend takes enums of tensors, and no `Option` of them.
#[derive(Clone, Debug, ExtensionType)]
pub enum Seen<B: Backend> {
    /// All of them.
    All,
    /// Those where this is true.
    Where(BoolTensor<B>),
}

/// What is added to scores.
#[derive(Clone, Debug, ExtensionType)]
pub enum Added<B: Backend> {
    /// Nothing.
    Nothing,
    /// A bias.
    Bias(FloatTensor<B>),
}

/// The operation, by backend.
#[backend_extension(Cube, Autodiff)]
pub trait Attention: Backend {
    /// See [`FlashAttention::forward`].
    fn attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        #[extension_type] seen: Seen<Self>,
        #[extension_type] bias: Added<Self>,
        kernels: FlashAttention,
        settings: Settings,
    ) -> FloatTensor<Self>;
}

/// What both passes are given.
#[derive(Clone, Debug)]
pub struct Inputs<B: Backend> {
    /// q, k and v.
    tensors: [FloatTensor<B>; 3],
    seen: Seen<B>,
    bias: Added<B>,
    kernels: FlashAttention,
    settings: Settings,
}

impl<B: Backend> Inputs<B> {
    fn seen(&self) -> Option<&BoolTensor<B>> {
        match &self.seen {
            Seen::All => None,
            Seen::Where(seen) => Some(seen),
        }
    }

    fn bias(&self) -> Option<&FloatTensor<B>> {
        match &self.bias {
            Added::Nothing => None,
            Added::Bias(bias) => Some(bias),
        }
    }
}

/// Both passes, on a backend without gradients of its own.
pub trait AttentionKernels: Backend {
    /// o and, for the backward pass, lse.
    fn forward(inputs: Inputs<Self>) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of q, k and v, and of the bias if that is asked for, from o, lse and the gradient of o.
    fn backward(inputs: Inputs<Self>, results: [FloatTensor<Self>; 3], of_bias: bool) -> Vec<FloatTensor<Self>>;
}

impl Attention for CubeBackend {
    fn attention(
        query: CubeTensor,
        key: CubeTensor,
        value: CubeTensor,
        seen: Seen<Self>,
        bias: Added<Self>,
        kernels: FlashAttention,
        settings: Settings,
    ) -> CubeTensor {
        <Self as AttentionKernels>::forward(Inputs { tensors: [query, key, value], seen, bias, kernels, settings }).0
    }
}

#[derive(Debug)]
struct AttentionBackward;

/// `N` inputs may have gradients: q, k, v and, if there is one, the bias.
impl<B: AttentionKernels, const N: usize> Backward<B, N> for AttentionBackward {
    /// And o and lse.
    type State = (Inputs<B>, [FloatTensor<B>; 2]);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (inputs, [out, lse]) = ops.state;
        let of_bias = ops.parents.get(3).is_some_and(Option::is_some);
        let results = [out, lse, grads.consume::<B>(&ops.node)];
        for (node, gradient) in ops.parents.into_iter().zip(B::backward(inputs, results, of_bias)) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

/// The forward pass, and what Burn keeps of it for the gradients of `N` inputs.
fn tracked<B: AttentionKernels, C: CheckpointStrategy, const N: usize>(
    inputs: Inputs<B>,
    guards: [NodeGuard; N],
) -> FloatTensor<Autodiff<B, C>> {
    let (out, lse) = B::forward(inputs.clone());
    match AttentionBackward.prepare::<C>(guards).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((inputs, [out.clone(), lse]), out),
        OpsKind::UnTracked(prep) => prep.finish(out),
    }
}

impl<B: AttentionKernels, C: CheckpointStrategy> Attention for Autodiff<B, C> {
    fn attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        seen: Seen<Self>,
        bias: Added<Self>,
        kernels: FlashAttention,
        settings: Settings,
    ) -> FloatTensor<Self> {
        let [(query, q), (key, k), (value, v)] = [query, key, value].map(|tensor| tensor.into_parts());
        let tensors = [query, key, value];
        let seen = match seen {
            Seen::All => Seen::All,
            Seen::Where(seen) => Seen::Where(seen),
        };
        match bias {
            Added::Nothing => {
                tracked::<B, C, 3>(Inputs { tensors, seen, bias: Added::Nothing, kernels, settings }, [q, k, v])
            }
            Added::Bias(bias) => {
                let (bias, b) = bias.into_parts();
                tracked::<B, C, 4>(Inputs { tensors, seen, bias: Added::Bias(bias), kernels, settings }, [q, k, v, b])
            }
        }
    }
}

/// A tensor of Burn's as the kernels see it.
struct Operand {
    buffer: Buffer,
    /// Where it is bound: the last aligned place before its first element.
    offset: u64,
    /// Bytes from there to its first element, and of an element.
    start: u64,
    element_bytes: u64,
    shape: [u32; 4],
    strides: [u64; 4],
}

impl Operand {
    fn new(tensor: &CubeTensor, alignment: u64) -> Self {
        // This also runs what Burn has queued on the tensor, up to its own encoder; `submit_pending` does the rest.
        let resource = tensor.client.get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone());
        let resource = resource.unwrap_or_else(|error| panic!("attention runs on Burn's wgpu devices: {error:?}"));
        let resource = resource.resource();
        let offset = resource.offset / alignment * alignment;
        let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
        Operand {
            buffer: resource.buffer.clone(),
            offset,
            start: resource.offset - offset,
            element_bytes: tensor.dtype.size() as u64,
            shape: [0, 1, 2, 3].map(|n| shape[n] as u32),
            strides: [0, 1, 2, 3].map(|n| strides[n] as u64),
        }
    }

    fn layout(&self) -> Layout {
        let [batch, head, row, _] = self.strides;
        Layout { offset: self.start / self.element_bytes, batch, head, row }
    }

    /// Of what is given of each score, in units of so many bytes.
    fn score_layout(&self, unit: u64) -> ScoreLayout {
        let mut strides = self.strides.map(|stride| stride * self.element_bytes / unit);
        strides.iter_mut().zip(self.shape).filter(|(_, size)| *size == 1).for_each(|(stride, _)| *stride = 0);
        let [batch, head, row, column] = strides;
        ScoreLayout::strided(self.start / unit, [batch, head, row, column])
    }

    fn binding(&self) -> BufferBinding<'_> {
        BufferBinding { buffer: &self.buffer, offset: self.offset, size: None }
    }
}

/// The same tensor with a contiguous last dimension.
fn with_rows(tensor: CubeTensor) -> CubeTensor {
    if tensor.meta.strides()[3] == 1 { tensor } else { into_contiguous(tensor) }
}

fn empty_like(tensor: &CubeTensor, shape: [usize; 4], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(tensor.client.clone(), tensor.device.clone(), shape.into(), dtype)
}

/// What Burn has recorded so far goes to the queue before what the kernels do with it.
fn submit_pending(tensor: &CubeTensor) {
    tensor.client.flush().unwrap_or_else(|error| panic!("attention: {error:?}"));
}

fn element_type(dtype: DType) -> Option<ElementType> {
    match dtype {
        DType::F32 => Some(ElementType::F32),
        DType::F16 => Some(ElementType::F16),
        DType::BF16 => Some(ElementType::BF16),
        _ => None,
    }
}

/// A problem without layouts.
fn problem(inputs: &Inputs<CubeBackend>) -> Problem {
    let [q, k, v] = inputs.tensors.each_ref().map(|tensor| [0, 1, 2, 3].map(|n| tensor.meta.shape()[n]));
    assert!(k[0] == q[0] && k[3] == q[3], "attention: q is {q:?} and k {k:?}; batch and last size must be equal");
    assert!(v[..3] == k[..3], "attention: k is {k:?} and v {v:?}; all but the last size must be equal");
    let types = inputs.tensors.each_ref().map(|tensor| tensor.dtype);
    let element_type = element_type(types[0]).filter(|_| types == [types[0]; 3]);
    let element_type = element_type
        .unwrap_or_else(|| panic!("attention: q, k and v are {types:?}; they must be one of f32, f16 and bf16"));
    let shape = Shape {
        batch: q[0] as u32,
        heads_q: q[1] as u32,
        heads_kv: k[1] as u32,
        seqlen_q: q[2] as u32,
        seqlen_k: k[2] as u32,
        head_dim: q[3] as u32,
        head_dim_v: v[3] as u32,
    };
    let of_scores = [q[0], q[1], q[2], k[2]];
    for (name, tensor) in [("mask", inputs.seen()), ("bias", inputs.bias())] {
        let Some(tensor) = tensor else { continue };
        let found = [0, 1, 2, 3].map(|n| tensor.meta.shape()[n]);
        let fits = found.iter().zip(of_scores).all(|(&size, full)| size == 1 || size == full);
        assert!(fits, "attention: the {name} is {found:?}; each size must be 1 or that of {of_scores:?}");
    }
    let Settings { causal, scale, softcap } = inputs.settings;
    let mut problem = Problem::new(shape, element_type).with_gradients();
    (problem.causal, problem.scale, problem.softcap) = (causal, scale, softcap);
    problem
}

/// What both passes bind, of `Inputs`.
struct Operands {
    tensors: [Operand; 3],
    seen: Option<Operand>,
    bias: Option<Operand>,
}

impl Operands {
    fn new(inputs: &Inputs<CubeBackend>, alignment: u64) -> Self {
        let operand = |tensor: &CubeTensor| Operand::new(tensor, alignment);
        Operands {
            tensors: inputs.tensors.each_ref().map(operand),
            seen: inputs.seen().map(operand),
            bias: inputs.bias().map(operand),
        }
    }

    /// The problem with the layouts of a forward pass.
    fn place(&self, mut problem: Problem, inputs: &Inputs<CubeBackend>, out: &Operand) -> Problem {
        let [q, k, v] = &self.tensors;
        if let Some(seen) = &self.seen {
            // Each of Burn's booleans is 1 or 0 in its first byte, however many it has.
            problem = problem.with_mask(seen.score_layout(1));
        }
        if let (Some(bias), Some(tensor)) = (&self.bias, inputs.bias()) {
            let of = element_type(tensor.dtype)
                .unwrap_or_else(|| panic!("attention: the bias is {:?}; it must be f32, f16 or bf16", tensor.dtype));
            problem = problem.with_bias(Bias::new(of, bias.score_layout(bias.element_bytes)));
        }
        problem
            .with_layout(Part::Query, q.layout())
            .with_layout(Part::Key, k.layout())
            .with_layout(Part::Value, v.layout())
            .with_layout(Part::Out, out.layout())
    }

    fn buffers<'a>(&'a self, out: &'a Operand, lse: &'a Operand) -> ForwardBuffers<'a> {
        let [q, k, v] = self.tensors.each_ref().map(Operand::binding);
        ForwardBuffers::new(q, k, v, out.binding())
            .lse(lse.binding())
            .mask(self.seen.as_ref().map(Operand::binding))
            .bias(self.bias.as_ref().map(Operand::binding))
    }
}

impl AttentionKernels for CubeBackend {
    fn forward(mut inputs: Inputs<Self>) -> (CubeTensor, CubeTensor) {
        inputs.tensors = inputs.tensors.map(with_rows);
        let problem = problem(&inputs);
        let (kernels, [query, _, value]) = (&inputs.kernels, &inputs.tensors);
        let [batch, heads, rows, _] = [0, 1, 2, 3].map(|n| query.meta.shape()[n]);
        let out = empty_like(query, [batch, heads, rows, value.meta.shape()[3]], query.dtype);
        let lse = empty_like(query, [batch, heads, rows, 1], DType::F32);

        let alignment = kernels.context.device().limits().min_storage_buffer_offset_alignment as u64;
        let operands = Operands::new(&inputs, alignment);
        let [o, l] = [&out, &lse].map(|tensor| Operand::new(tensor, alignment));
        let problem = operands.place(problem, &inputs, &o);
        submit_pending(query);
        let done = kernels.plan(&problem).and_then(|plan| {
            let workspace = plan.create_workspace()?;
            let buffers = operands.buffers(&o, &l).workspace(workspace.as_ref());
            kernels.submit(|encoder| plan.forward(encoder, &buffers))
        });
        done.unwrap_or_else(|error| panic!("attention: {error}"));
        (out, lse)
    }

    fn backward(mut inputs: Inputs<Self>, results: [CubeTensor; 3], of_bias: bool) -> Vec<CubeTensor> {
        let [out, lse, grad_out] = results.map(with_rows);
        inputs.tensors = inputs.tensors.map(with_rows);
        let mut problem = problem(&inputs);
        let alignment = inputs.kernels.context.device().limits().min_storage_buffer_offset_alignment as u64;
        if of_bias {
            problem = problem.with_grad_bias();
            // Its gradient lies as it does: without elements that it shares, and from the beginning of a binding on.
            if let Some(bias) = inputs.bias().cloned().map(into_contiguous) {
                let at_start = Operand::new(&bias, alignment).start == 0;
                inputs.bias = Added::Bias(if at_start { bias } else { bias.copy() });
            }
        }
        let with_gradients = inputs.tensors.iter().chain(inputs.bias().filter(|_| of_bias));
        let gradients: Vec<_> = with_gradients
            .map(|tensor| empty_like(tensor, [0, 1, 2, 3].map(|n| tensor.meta.shape()[n]), tensor.dtype))
            .collect();

        let operands = Operands::new(&inputs, alignment);
        let operand = |tensor: &CubeTensor| Operand::new(tensor, alignment);
        let [o, l, g] = [&out, &lse, &grad_out].map(operand);
        let of_gradients: Vec<_> = gradients.iter().map(operand).collect();
        let [dq, dk, dv] = [0, 1, 2].map(|n| &of_gradients[n]);
        let problem = operands
            .place(problem, &inputs, &o)
            .with_layout(Part::GradOut, g.layout())
            .with_layout(Part::GradQuery, dq.layout())
            .with_layout(Part::GradKey, dk.layout())
            .with_layout(Part::GradValue, dv.layout());
        let grad_bias = of_gradients.get(3);
        assert!(
            grad_bias.is_none_or(|operand| operand.start == 0),
            "attention: Burn's memory is not aligned as wgpu needs"
        );
        submit_pending(&out);
        let done = inputs.kernels.plan(&problem).and_then(|plan| {
            let workspace = plan.create_backward_workspace()?;
            let forward = operands.buffers(&o, &l);
            let results = [dq, dk, dv].map(Operand::binding);
            let buffers = BackwardBuffers::new(&forward, g.binding(), results)
                .grad_bias(grad_bias.map(Operand::binding))
                .workspace(workspace.as_ref());
            inputs.kernels.submit(|encoder| plan.backward(encoder, &buffers))
        });
        done.unwrap_or_else(|error| panic!("attention: {error}"));
        gradients
    }
}
