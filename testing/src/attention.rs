//! A transformer's attention on a device: with gradients for training, with a cache of keys and values for generating.

use std::marker::PhantomData;

use wgpu_flash_attention::wgpu::{self, BufferBinding, BufferUsages};
use wgpu_flash_attention::{
    BackwardBuffers, Causal, Context, Dropout, Error, ForwardBuffers, Kernel, Plan, PlanOptions, Problem, Shape,
};

use crate::buffers::Number;
use crate::transformer::{Attention, Differentiable, Matrix, Real};

/// A buffer that can be written, used and read.
fn buffer(context: &Context, argument: &'static str, bytes: u64) -> Result<wgpu::Buffer, Error> {
    let limit = context.device().limits().max_buffer_size;
    let size = bytes.next_multiple_of(4);
    if size > limit {
        return Err(Error::BindingTooLarge { argument, bytes, limit });
    }
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
    let label = Some(argument);
    Ok(context.device().create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false }))
}

fn write<T: Number>(context: &Context, buffer: &wgpu::Buffer, offset: u64, matrix: &Matrix<impl Real>, factor: f64) {
    let value = |x: f64| T::nearest((x * factor) as f32);
    let values: Vec<T> = matrix.iter().map(|&x| value(x.into())).collect();
    context.queue().write_buffer(buffer, offset, bytemuck::cast_slice(&values));
}

/// Elements of a buffer, times a factor.
fn matrix<T: Number, R: Real>(bytes: &[u8], shape: (usize, usize), factor: f64) -> Matrix<R> {
    let value = |x: T| -> f64 { x.into() };
    let mut values = bytemuck::pod_collect_to_vec::<u8, T>(bytes).into_iter();
    Matrix::from_shape_simple_fn(shape, || values.next().map_or(R::zero(), |x| R::of(value(x) * factor)))
}

/// Attention over whole sequences, with gradients. Planned once; each block has buffers of its own, so that what
/// `backward` needs stays on the device.
pub struct DeviceAttention<T> {
    context: Context,
    plan: Plan,
    /// Bytes of a tensor; the three of a buffer begin at multiples of `step`.
    bytes: u64,
    step: u64,
    /// Of the next forward pass.
    dropout: Option<Dropout>,
    blocks: Vec<Saved>,
    grad_out: wgpu::Buffer,
    /// dq, dk and dv.
    gradients: wgpu::Buffer,
    workspace: Option<wgpu::Buffer>,
    backward_workspace: Option<wgpu::Buffer>,
    element: PhantomData<T>,
}

struct Saved {
    /// q, k and v.
    inputs: wgpu::Buffer,
    out: wgpu::Buffer,
    lse: wgpu::Buffer,
    rng_state: wgpu::Buffer,
}

impl<T: Number> DeviceAttention<T> {
    /// For this many blocks of causal self-attention; `kernel` is that of both passes. With dropout each forward pass draws other numbers.
    pub fn new(
        context: &Context,
        shape: Shape,
        layers: usize,
        kernel: Option<Kernel>,
        dropout: Option<Dropout>,
    ) -> Result<Self, Error> {
        let mut problem = Problem::new(shape, T::TYPE).bnhd().causal(Causal::BottomRight).with_gradients();
        problem.dropout = dropout.map(|dropout| dropout.probability);
        let plan = context.plan_with(&problem, &PlanOptions::default().kernel(kernel).backward(kernel))?;
        let bytes = shape.rows() * shape.head_dim as u64 * T::TYPE.bytes();
        let step = bytes.next_multiple_of(context.device().limits().min_storage_buffer_offset_alignment as u64);
        let saved = |_| {
            Ok(Saved {
                inputs: buffer(context, "q, k and v", 3 * step)?,
                out: buffer(context, "o", bytes)?,
                lse: buffer(context, "lse", shape.rows() * 4)?,
                rng_state: context.upload(&[0; 16])?,
            })
        };
        Ok(DeviceAttention {
            dropout,
            blocks: (0..layers).map(saved).collect::<Result<_, Error>>()?,
            grad_out: buffer(context, "do", bytes)?,
            gradients: buffer(context, "dq, dk and dv", 3 * step)?,
            workspace: plan.create_workspace()?,
            backward_workspace: plan.create_backward_workspace()?,
            context: context.clone(),
            plan,
            bytes,
            step,
            element: PhantomData,
        })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The three tensors in a buffer.
    fn thirds<'a>(&self, buffer: &'a wgpu::Buffer) -> [BufferBinding<'a>; 3] {
        let size = wgpu::BufferSize::new(self.bytes.next_multiple_of(4));
        [0, 1, 2].map(|n| BufferBinding { buffer, offset: n * self.step, size })
    }

    /// Records and submits a pass.
    fn submit(&self, record: impl FnOnce(&mut wgpu::CommandEncoder) -> Result<(), Error>) -> Result<(), Error> {
        let mut encoder = self.context.device().create_command_encoder(&Default::default());
        record(&mut encoder)?;
        self.context.queue().submit([encoder.finish()]);
        Ok(())
    }
}

impl<T: Number, R: Real> Attention<R> for DeviceAttention<T> {
    fn forward(
        &mut self,
        block: usize,
        query: &Matrix<R>,
        key: &Matrix<R>,
        value: &Matrix<R>,
    ) -> Result<Matrix<R>, Error> {
        let Saved { inputs, out, lse, rng_state } = &self.blocks[block];
        if let Some(dropout) = &mut self.dropout {
            self.context.queue().write_buffer(rng_state, 0, &dropout.rng_state());
            *dropout = dropout.next(&self.plan.problem().shape);
        }
        for (n, tensor) in (0..).zip([query, key, value]) {
            write::<T>(&self.context, inputs, n * self.step, tensor, 1.0);
        }
        let [q, k, v] = self.thirds(inputs);
        let rng_state = self.dropout.is_some().then_some(rng_state);
        let buffers =
            ForwardBuffers::new(q, k, v, out).lse(lse).rng_state(rng_state).workspace(self.workspace.as_ref());
        self.submit(|encoder| self.plan.forward(encoder, &buffers))?;
        Ok(matrix::<T, R>(&self.context.download(out, 0, self.bytes)?, query.dim(), 1.0))
    }
}

impl<T: Number, R: Real> Differentiable<R> for DeviceAttention<T> {
    fn backward(&mut self, block: usize, grad_out: &Matrix<R>) -> Result<[Matrix<R>; 3], Error> {
        // Gradients are linear in dO, and those of a mean over many tokens are small: the power of two that takes the
        // largest element of dO to between 1 and 2 keeps them all within the range of f16, and rounds nothing.
        let largest = grad_out.iter().fold(0.0, |largest: f64, &x| largest.max(x.into().abs()));
        let factor = if largest > 0.0 { (-largest.log2().floor()).exp2() } else { 1.0 };
        write::<T>(&self.context, &self.grad_out, 0, grad_out, factor);
        let Saved { inputs, out, lse, rng_state } = &self.blocks[block];
        let [q, k, v] = self.thirds(inputs);
        let rng_state = self.dropout.is_some().then_some(rng_state);
        let forward = ForwardBuffers::new(q, k, v, out).lse(lse).rng_state(rng_state);
        let buffers = BackwardBuffers::new(&forward, &self.grad_out, self.thirds(&self.gradients))
            .workspace(self.backward_workspace.as_ref());
        self.submit(|encoder| self.plan.backward(encoder, &buffers))?;
        let bytes = self.context.download(&self.gradients, 0, 2 * self.step + self.bytes)?;
        let tensor = |n| {
            matrix::<T, R>(&bytes[(n * self.step) as usize..][..self.bytes as usize], grad_out.dim(), factor.recip())
        };
        Ok([tensor(0), tensor(1), tensor(2)])
    }
}

/// Attention of one token after the other on the keys and values of those before it, which stay on the device: the
/// decode kernel, with one plan for every length.
pub struct CachedAttention<T> {
    context: Context,
    plan: Plan,
    /// The place of the present token.
    position: usize,
    blocks: Vec<Cache>,
    query: wgpu::Buffer,
    out: wgpu::Buffer,
    length: wgpu::Buffer,
    workspace: Option<wgpu::Buffer>,
    element: PhantomData<T>,
}

struct Cache {
    key: wgpu::Buffer,
    value: wgpu::Buffer,
}

impl<T: Number> CachedAttention<T> {
    /// For this many blocks, and at most `most` tokens.
    pub fn new(context: &Context, [heads, head_dim]: [u32; 2], most: u32, layers: usize) -> Result<Self, Error> {
        let shape = Shape { batch: 1, seqlen_q: 1, ..Shape::square(1, heads, most, head_dim) };
        // The length stands in for the causal mask.
        let problem = Problem::new(shape, T::TYPE).bnhd().with_seqlens_k();
        let plan = context.plan_with(&problem, &PlanOptions::default().kernel(Kernel::Decode))?;
        let row = (heads * head_dim) as u64 * T::TYPE.bytes();
        let cache = |_| {
            Ok(Cache {
                key: buffer(context, "the cache of keys", row * most as u64)?,
                value: buffer(context, "the cache of values", row * most as u64)?,
            })
        };
        Ok(CachedAttention {
            blocks: (0..layers).map(cache).collect::<Result<_, Error>>()?,
            query: buffer(context, "q", row)?,
            out: buffer(context, "o", row)?,
            length: buffer(context, "the length of the cache", 4)?,
            workspace: plan.create_workspace()?,
            context: context.clone(),
            plan,
            position: 0,
            element: PhantomData,
        })
    }

    /// The next token is at this place; it sees the tokens before.
    pub fn move_to(&mut self, position: usize) {
        self.position = position;
        self.context.queue().write_buffer(&self.length, 0, &(position as i32 + 1).to_ne_bytes());
    }
}

impl<T: Number, R: Real> Attention<R> for CachedAttention<T> {
    /// q, k and v are those of one token.
    fn forward(
        &mut self,
        block: usize,
        query: &Matrix<R>,
        key: &Matrix<R>,
        value: &Matrix<R>,
    ) -> Result<Matrix<R>, Error> {
        let cache = &self.blocks[block];
        let row = query.len() as u64 * T::TYPE.bytes();
        let offset = self.position as u64 * row;
        write::<T>(&self.context, &self.query, 0, query, 1.0);
        write::<T>(&self.context, &cache.key, offset, key, 1.0);
        write::<T>(&self.context, &cache.value, offset, value, 1.0);
        let buffers = ForwardBuffers::new(&self.query, &cache.key, &cache.value, &self.out)
            .seqlens_k(&self.length)
            .workspace(self.workspace.as_ref());
        let mut encoder = self.context.device().create_command_encoder(&Default::default());
        self.plan.forward(&mut encoder, &buffers)?;
        self.context.queue().submit([encoder.finish()]);
        Ok(matrix::<T, R>(&self.context.download(&self.out, 0, row)?, query.dim(), 1.0))
    }
}
