//! wgpu-flash-attention as a differentiable operation on [Burn](https://burn.dev)'s tensors.
//!
//! ```no_run
//! use burn::tensor::{Distribution, Tensor};
//! use flash_attention_burn::FlashAttention;
//! use wgpu_flash_attention::Causal;
//!
//! let (device, attention) = FlashAttention::init().unwrap();
//! let device = device.autodiff();
//! let random = || Tensor::<4>::random([1, 8, 256, 64], Distribution::Default, &device).require_grad();
//! let (query, key, value) = (random(), random(), random());
//! let out = attention.forward(query.clone(), key, value, Some(Causal::BottomRight));
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
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::wgpu::{WgpuInitError, WgpuSetup};
use burn::tensor::{DType, Device, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::wgpu::{AutoCompiler, WgpuServer};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use wgpu_flash_attention::wgpu::{Buffer, BufferBinding, CommandEncoder};
use wgpu_flash_attention::{
    BackwardBuffers, Causal, Context, ElementType, Error, ForwardBuffers, Layout, Plan, Problem, Shape, Tensor as Part,
};

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
    /// their last dimension is contiguous.
    ///
    /// # Panics
    /// As Burn's operations do, if the shapes do not go together, or the device is another than the kernels'.
    pub fn forward(&self, query: Tensor<4>, key: Tensor<4>, value: Tensor<4>, causal: Option<Causal>) -> Tensor<4> {
        let [query, key, value] = [query, key, value].map(Tensor::into_dispatch);
        Tensor::from_dispatch(<Dispatch as Attention>::attention(query, key, value, self.clone(), causal))
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

/// The operation, by backend.
#[backend_extension(Cube, Autodiff)]
pub trait Attention: Backend {
    /// See [`FlashAttention::forward`].
    fn attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        kernels: FlashAttention,
        causal: Option<Causal>,
    ) -> FloatTensor<Self>;
}

/// Both passes, on a backend without gradients of its own.
pub trait AttentionKernels: Backend {
    /// o and, for the backward pass, lse.
    fn forward(
        kernels: &FlashAttention,
        causal: Option<Causal>,
        inputs: [FloatTensor<Self>; 3],
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of q, k and v from q, k, v, o, lse and the gradient of o.
    fn backward(
        kernels: &FlashAttention,
        causal: Option<Causal>,
        tensors: [FloatTensor<Self>; 6],
    ) -> [FloatTensor<Self>; 3];
}

impl Attention for CubeBackend {
    fn attention(
        query: CubeTensor,
        key: CubeTensor,
        value: CubeTensor,
        kernels: FlashAttention,
        causal: Option<Causal>,
    ) -> CubeTensor {
        <Self as AttentionKernels>::forward(&kernels, causal, [query, key, value]).0
    }
}

impl<B: AttentionKernels, C: CheckpointStrategy> Attention for Autodiff<B, C> {
    fn attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        kernels: FlashAttention,
        causal: Option<Causal>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct AttentionBackward;

        impl<B: AttentionKernels> Backward<B, 3> for AttentionBackward {
            /// q, k, v, o, lse.
            type State = ([FloatTensor<B>; 5], FlashAttention, Option<Causal>);

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let ([query, key, value, out, lse], kernels, causal) = ops.state;
                let tensors = [query, key, value, out, lse, grads.consume::<B>(&ops.node)];
                for (node, gradient) in ops.parents.into_iter().zip(B::backward(&kernels, causal, tensors)) {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        }

        let [(query, q), (key, k), (value, v)] = [query, key, value].map(|tensor| tensor.into_parts());
        let (out, lse) = B::forward(&kernels, causal, [query.clone(), key.clone(), value.clone()]);
        match AttentionBackward.prepare::<C>([q, k, v]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(([query, key, value, out.clone(), lse], kernels, causal), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}

/// A tensor of Burn's as the kernels see it.
struct Operand {
    buffer: Buffer,
    /// Where it is bound: the last aligned place before its first element.
    offset: u64,
    layout: Layout,
}

impl Operand {
    fn new(tensor: &CubeTensor, alignment: u64) -> Self {
        // This also runs what Burn has queued on the tensor, up to its own encoder; `submit_pending` does the rest.
        let resource = tensor.client.get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone());
        let resource = resource.unwrap_or_else(|error| panic!("attention runs on Burn's wgpu devices: {error:?}"));
        let resource = resource.resource();
        let offset = resource.offset / alignment * alignment;
        let strides = tensor.meta.strides();
        Operand {
            buffer: resource.buffer.clone(),
            offset,
            layout: Layout {
                offset: (resource.offset - offset) / tensor.dtype.size() as u64,
                batch: strides[0] as u64,
                head: strides[1] as u64,
                row: strides[2] as u64,
            },
        }
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

fn problem(inputs: [&CubeTensor; 3], causal: Option<Causal>) -> Problem {
    let [q, k, v] = inputs.map(|tensor| [0, 1, 2, 3].map(|n| tensor.meta.shape()[n]));
    assert!(k[0] == q[0] && k[3] == q[3], "attention: q is {q:?} and k {k:?}; batch and last size must be equal");
    assert!(v[..3] == k[..3], "attention: k is {k:?} and v {v:?}; all but the last size must be equal");
    let element_type = match inputs.map(|tensor| tensor.dtype) {
        [DType::F32, DType::F32, DType::F32] => ElementType::F32,
        [DType::F16, DType::F16, DType::F16] => ElementType::F16,
        [DType::BF16, DType::BF16, DType::BF16] => ElementType::BF16,
        other => panic!("attention: q, k and v are {other:?}; they must be one of f32, f16 and bf16"),
    };
    let shape = Shape {
        batch: q[0] as u32,
        heads_q: q[1] as u32,
        heads_kv: k[1] as u32,
        seqlen_q: q[2] as u32,
        seqlen_k: k[2] as u32,
        head_dim: q[3] as u32,
        head_dim_v: v[3] as u32,
    };
    let mut problem = Problem::new(shape, element_type).with_gradients();
    problem.causal = causal;
    problem
}

fn forward_layouts(problem: Problem, [q, k, v, o]: [&Operand; 4]) -> Problem {
    problem
        .with_layout(Part::Query, q.layout)
        .with_layout(Part::Key, k.layout)
        .with_layout(Part::Value, v.layout)
        .with_layout(Part::Out, o.layout)
}

impl AttentionKernels for CubeBackend {
    fn forward(kernels: &FlashAttention, causal: Option<Causal>, inputs: [CubeTensor; 3]) -> (CubeTensor, CubeTensor) {
        let [query, key, value] = inputs.map(with_rows);
        let problem = problem([&query, &key, &value], causal);
        let [batch, heads, rows, _] = [0, 1, 2, 3].map(|n| query.meta.shape()[n]);
        let out = empty_like(&query, [batch, heads, rows, value.meta.shape()[3]], query.dtype);
        let lse = empty_like(&query, [batch, heads, rows, 1], DType::F32);

        let alignment = kernels.context.device().limits().min_storage_buffer_offset_alignment as u64;
        let [q, k, v, o, l] = [&query, &key, &value, &out, &lse].map(|tensor| Operand::new(tensor, alignment));
        let problem = forward_layouts(problem, [&q, &k, &v, &o]);
        submit_pending(&query);
        let done = kernels.plan(&problem).and_then(|plan| {
            let workspace = plan.create_workspace()?;
            let buffers = ForwardBuffers::new(q.binding(), k.binding(), v.binding(), o.binding())
                .lse(l.binding())
                .workspace(workspace.as_ref());
            kernels.submit(|encoder| plan.forward(encoder, &buffers))
        });
        done.unwrap_or_else(|error| panic!("attention: {error}"));
        (out, lse)
    }

    fn backward(kernels: &FlashAttention, causal: Option<Causal>, tensors: [CubeTensor; 6]) -> [CubeTensor; 3] {
        let [query, key, value, out, lse, grad_out] = tensors.map(with_rows);
        let problem = problem([&query, &key, &value], causal);
        let results = [&query, &key, &value]
            .map(|tensor| empty_like(tensor, [0, 1, 2, 3].map(|n| tensor.meta.shape()[n]), tensor.dtype));

        let alignment = kernels.context.device().limits().min_storage_buffer_offset_alignment as u64;
        let operand = |tensor| Operand::new(tensor, alignment);
        let [q, k, v, o, l, g] = [&query, &key, &value, &out, &lse, &grad_out].map(operand);
        let [dq, dk, dv] = results.each_ref().map(operand);
        let problem = forward_layouts(problem, [&q, &k, &v, &o])
            .with_layout(Part::GradOut, g.layout)
            .with_layout(Part::GradQuery, dq.layout)
            .with_layout(Part::GradKey, dk.layout)
            .with_layout(Part::GradValue, dv.layout);
        submit_pending(&query);
        let done = kernels.plan(&problem).and_then(|plan| {
            let workspace = plan.create_backward_workspace()?;
            let forward = ForwardBuffers::new(q.binding(), k.binding(), v.binding(), o.binding()).lse(l.binding());
            let results = [dq.binding(), dk.binding(), dv.binding()];
            let buffers = BackwardBuffers::new(&forward, g.binding(), results).workspace(workspace.as_ref());
            kernels.submit(|encoder| plan.backward(encoder, &buffers))
        });
        done.unwrap_or_else(|error| panic!("attention: {error}"));
        results
    }
}
