//! Host slices in, host vectors out: for tests, tools and first steps.

use std::future::Future;

use wgpu::BufferUsages;

use crate::context::Context;
use crate::dropout::Dropout;
use crate::error::{Error, NoMatrices};
use crate::forward::ForwardBuffers;
use crate::matrices::{Bf16Matrices, MATRIX_FEATURES, passthrough};
use crate::names::ElementType;
use crate::problem::{Bias, Causal, Problem, ScoreLayout, Shape};
use crate::{faults, transfer};

/// An element type that host slices can have.
pub trait Element: bytemuck::Pod + sealed::Sealed {
    /// Its name in a [`Problem`].
    const TYPE: ElementType;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
}
impl Element for half::f16 {
    const TYPE: ElementType = ElementType::F16;
}
impl Element for half::bf16 {
    const TYPE: ElementType = ElementType::BF16;
}

/// A contiguous host tensor `[batch, heads, positions, dim]`. Plain data that stays as it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostTensor<'a, T> {
    /// The elements, the last index fastest.
    pub data: &'a [T],
    /// `[batch, heads, positions, dim]`.
    pub shape: [usize; 4],
}

/// PyTorch's `attn_mask`: a tensor `[B, Hq, Nq, Nk]`, of which each size may be 1 instead, for all. It always has four dimensions: PyTorch's
/// `[Nq, Nk]` is `[1, 1, Nq, Nk]` here.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum AttnMask<'a> {
    /// A key takes part where this is true.
    Bool(HostTensor<'a, bool>),
    /// Added to the scores, whatever the type of q, k and v. −∞ and numbers below −1e30 mask.
    F32(HostTensor<'a, f32>),
    /// Added to the scores of tensors in f16.
    F16(HostTensor<'a, half::f16>),
    /// Added to the scores of tensors in bf16.
    BF16(HostTensor<'a, half::bf16>),
}

impl AttnMask<'_> {
    /// Its shape, its elements, and how many they are.
    fn parts(&self) -> ([usize; 4], &[u8], usize) {
        match self {
            AttnMask::Bool(mask) => (mask.shape, bytemuck::cast_slice(mask.data), mask.data.len()),
            AttnMask::F32(mask) => (mask.shape, bytemuck::cast_slice(mask.data), mask.data.len()),
            AttnMask::F16(mask) => (mask.shape, bytemuck::cast_slice(mask.data), mask.data.len()),
            AttnMask::BF16(mask) => (mask.shape, bytemuck::cast_slice(mask.data), mask.data.len()),
        }
    }
}

/// The options of PyTorch's `scaled_dot_product_attention` that this crate has.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct SdpaOptions<'a> {
    /// What is added to the scores, or which of them count. As in PyTorch not together with `is_causal`.
    pub attn_mask: Option<AttnMask<'a>>,
    /// Query `i` sees keys `j ≤ i`: PyTorch's causal mask, aligned to the top left.
    pub is_causal: bool,
    /// PyTorch's `dropout_p`, with a seed and an offset: dropout of the probabilities after the softmax. PyTorch takes seed and offset from a
    /// global generator, which it moves on at each call. Here you give both, and count on with [`Dropout::next`] after each call: the
    /// options keep no state, so that equal ones drop alike. The mask is FlashAttention-2's.
    pub dropout: Option<Dropout>,
    /// Factor of the scores; `None` is `1/√dim`.
    pub scale: Option<f32>,
    /// Allows k and v to have fewer heads than q, each shared by a group of query heads.
    pub enable_gqa: bool,
}

/// Each method sets the field of its name.
impl<'a> SdpaOptions<'a> {
    /// What is added to the scores, or which of them count.
    pub fn attn_mask(mut self, attn_mask: impl Into<Option<AttnMask<'a>>>) -> Self {
        self.attn_mask = attn_mask.into();
        self
    }

    /// PyTorch's causal mask, aligned to the top left.
    pub const fn is_causal(mut self, is_causal: bool) -> Self {
        self.is_causal = is_causal;
        self
    }

    /// Dropout of the probabilities after the softmax; give each call another offset, by [`Dropout::next`].
    pub fn dropout(mut self, dropout: impl Into<Option<Dropout>>) -> Self {
        self.dropout = dropout.into();
        self
    }

    /// Factor of the scores; `None` is `1/√dim`.
    pub fn scale(mut self, scale: impl Into<Option<f32>>) -> Self {
        self.scale = scale.into();
        self
    }

    /// Allows k and v to have fewer heads than q.
    pub const fn enable_gqa(mut self, enable_gqa: bool) -> Self {
        self.enable_gqa = enable_gqa;
        self
    }
}

/// Which device [`Context::headless_with`] opens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeadlessOptions {
    /// Takes the first adapter whose name, driver or backend holds this text, without regard to case.
    pub adapter: Option<String>,
    /// See [`Context::checked`].
    pub checked: bool,
    /// Opens the device with [`COOPERATIVE_MATRIX_FEATURES`](crate::COOPERATIVE_MATRIX_FEATURES), which wgpu calls
    /// experimental: it may have bugs with undefined behaviour; with `PASSTHROUGH_SHADERS` where the adapter has it.
    /// And the context with [`Context::with_cooperative_matrices`] and, where the device has matrices of bf16 ([`Bf16Matrices`]), with
    /// [`Context::with_bf16_matrices`].
    pub cooperative_matrices: bool,
}

/// Each method sets the field of its name.
impl HeadlessOptions {
    /// The adapter whose name, driver or backend holds this text.
    pub fn adapter(mut self, text: impl Into<String>) -> Self {
        self.adapter = Some(text.into());
        self
    }

    /// Bounds checks in every kernel.
    pub const fn checked(mut self, checked: bool) -> Self {
        self.checked = checked;
        self
    }

    /// Kernels on cooperative matrices.
    pub const fn cooperative_matrices(mut self, cooperative_matrices: bool) -> Self {
        self.cooperative_matrices = cooperative_matrices;
        self
    }
}

impl Context {
    /// Opens the system's fastest adapter with all its limits, without a window. Blocks; not on the web.
    ///
    /// The backends are those of the environment variable `WGPU_BACKEND`, or Vulkan, Metal, DX12 and WebGPU.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn headless() -> Result<Context, Error> {
        pollster::block_on(Self::headless_async(&HeadlessOptions::default()))
    }

    /// As [`Context::headless`], with a choice of adapter.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn headless_with(options: &HeadlessOptions) -> Result<Context, Error> {
        pollster::block_on(Self::headless_async(options))
    }

    /// As [`Context::headless_with`], without blocking.
    pub async fn headless_async(options: &HeadlessOptions) -> Result<Context, Error> {
        let instance = instance();
        let adapter = match &options.adapter {
            None => instance
                .request_adapter(&wgpu::RequestAdapterOptions {
                    power_preference: wgpu::PowerPreference::HighPerformance,
                    ..Default::default()
                })
                .await
                .map_err(|error| Error::Adapter(format!("{error}. {NO_DRIVER}")))?,
            Some(wanted) => {
                let all = instance.enumerate_adapters(wgpu::Backends::all()).await;
                let name = |adapter: &wgpu::Adapter| {
                    let info = adapter.get_info();
                    format!("{} {} {}", info.name, info.driver, info.backend)
                };
                let names: Vec<_> = all.iter().map(name).collect();
                let found = names.iter().position(|name| name.to_lowercase().contains(&wanted.to_lowercase()));
                match found.and_then(|n| all.into_iter().nth(n)) {
                    Some(adapter) => adapter,
                    None if names.is_empty() => return Err(Error::Adapter(format!("there is none. {NO_DRIVER}"))),
                    None => return Err(Error::Adapter(format!("none of {names:?} has {wanted:?} in its name"))),
                }
            }
        };
        let mut useful = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::SUBGROUP | wgpu::Features::SHADER_INT64;
        let (mut wanted, mut experimental) = (wgpu::Features::empty(), wgpu::ExperimentalFeatures::disabled());
        if options.cooperative_matrices {
            useful |= wgpu::Features::PASSTHROUGH_SHADERS;
            wanted = MATRIX_FEATURES;
            experimental = passthrough::experimental_features();
        }
        let name = || adapter.get_info().name;
        let missing = wanted - adapter.features();
        if !missing.is_empty() {
            return Err(Error::Matrices { adapter: name(), why: NoMatrices::AdapterFeatures(missing) });
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("wgpu-flash-attention"),
            required_features: (adapter.features() & useful) | wanted,
            experimental_features: experimental,
            required_limits: adapter.limits(),
            ..Default::default()
        };
        let refused = |error| Error::Adapter(format!("{}: {error}", name()));
        let context = if options.cooperative_matrices {
            let (device, queue, bf16) = Bf16Matrices::request_device(&adapter, &descriptor).await.map_err(refused)?;
            let with = Context::new(&device, &queue).with_cooperative_matrices(&adapter).await;
            let context = with.map_err(|why| Error::Matrices { adapter: name(), why })?;
            match bf16 {
                Ok(bf16) => {
                    let with = context.clone().with_bf16_matrices(&bf16).await;
                    with.unwrap_or_else(|why| context.without_bf16_matrices(why))
                }
                Err(why) => context.without_bf16_matrices(why),
            }
        } else {
            let (device, queue) = adapter.request_device(&descriptor).await.map_err(refused)?;
            Context::new(&device, &queue)
        };
        Ok(if options.checked { context.checked() } else { context })
    }

    /// PyTorch's `scaled_dot_product_attention`: q `[B, Hq, Nq, D]`, k `[B, Hkv, Nk, D]`, v `[B, Hkv, Nk, Dv]` on the
    /// host to o `[B, Hq, Nq, Dv]` on the host. Uploads, computes, downloads and waits; not on the web.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn scaled_dot_product_attention<T: Element>(
        &self,
        query: HostTensor<'_, T>,
        key: HostTensor<'_, T>,
        value: HostTensor<'_, T>,
        options: &SdpaOptions<'_>,
    ) -> Result<Vec<T>, Error> {
        let submit = || self.submit_sdpa(query, key, value, options);
        match faults::caught(self.device(), "attention", submit)? {
            Some((out, bytes)) => Ok(bytemuck::pod_collect_to_vec(&self.download(&out, 0, bytes)?)),
            None => Ok(vec![]),
        }
    }

    /// As [`Context::scaled_dot_product_attention`], without waiting for the device: polls it each time that the future is
    /// polled. (Pipelines are compiled at the first use of a shape, and off the web that blocks.)
    pub async fn scaled_dot_product_attention_async<T: Element>(
        &self,
        query: HostTensor<'_, T>,
        key: HostTensor<'_, T>,
        value: HostTensor<'_, T>,
        options: &SdpaOptions<'_>,
    ) -> Result<Vec<T>, Error> {
        let submit = || self.submit_sdpa(query, key, value, options);
        match faults::caught_async(self.device(), "attention", submit).await? {
            Some((out, bytes)) => Ok(bytemuck::pod_collect_to_vec(&self.download_async(&out, 0, bytes).await?)),
            None => Ok(vec![]),
        }
    }

    /// Submits the pass; returns o's buffer and its bytes, or nothing where o has no element.
    fn submit_sdpa<T: Element>(
        &self,
        query: HostTensor<'_, T>,
        key: HostTensor<'_, T>,
        value: HostTensor<'_, T>,
        options: &SdpaOptions<'_>,
    ) -> Result<Option<(wgpu::Buffer, u64)>, Error> {
        let problem = sdpa_problem(&query, &key, &value, options)?;
        let plan = self.plan(&problem)?;
        let out_bytes = problem.shape.rows() * problem.shape.head_dim_v as u64 * size_of::<T>() as u64;
        if out_bytes == 0 {
            return Ok(None);
        }
        let limit = self.limits().max_buffer_size;
        let bytes = |data: &[T]| size_of_val(data) as u64;
        let mask = options.attn_mask.as_ref().map(|mask| mask.parts().1);
        let sizes = [
            ("query", bytes(query.data)),
            ("key", bytes(key.data)),
            ("value", bytes(value.data)),
            ("attn_mask", mask.map_or(0, |mask| mask.len() as u64)),
            ("out", out_bytes),
        ];
        if let Some(&(argument, bytes)) = sizes.iter().find(|(_, bytes)| *bytes > limit) {
            return Err(Error::BindingTooLarge { argument, bytes, limit });
        }
        let upload = |data: &[T]| self.upload(bytemuck::cast_slice(data));
        let (q, k, v) = (upload(query.data)?, upload(key.data)?, upload(value.data)?);
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
        let mask = mask.map(|mask| self.upload(mask)).transpose()?;
        let out = faults::buffer(self.device(), "out", out_bytes.next_multiple_of(4), usage)?;
        let workspace = plan.create_workspace()?;
        let mut encoder = self.device().create_command_encoder(&Default::default());
        let mut buffers = ForwardBuffers::new(&q, &k, &v, &out).workspace(workspace.as_ref());
        if problem.mask.is_some() {
            buffers = buffers.mask(mask.as_ref());
        } else {
            buffers = buffers.bias(mask.as_ref());
        }
        let rng_state = options.dropout.map(|dropout| self.upload(&dropout.rng_state())).transpose()?;
        plan.forward(&mut encoder, &buffers.rng_state(rng_state.as_ref()))?;
        self.queue().submit([encoder.finish()]);
        Ok(Some((out, out_bytes)))
    }

    /// A storage buffer with these bytes, padded with zeros to a multiple of 4, which is copyable both ways and can be bound as a uniform.
    pub fn upload(&self, bytes: &[u8]) -> Result<wgpu::Buffer, Error> {
        transfer::upload(self.device(), bytes)
    }

    /// Bytes of a buffer with `COPY_SRC`, from `offset`, which is a multiple of 4; waits for what was submitted before.
    /// Blocks; not on the web.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn download(&self, buffer: &wgpu::Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>, Error> {
        let data = self.download_async(buffer, offset, bytes);
        // Waits for the device first, so that the future is ready at once.
        self.device().poll(wgpu::PollType::wait_indefinitely()).map_err(|error| Error::Device(error.to_string()))?;
        pollster::block_on(data)
    }

    /// As [`Context::download`], without blocking: polls the device each time that the future is polled. The copy is submitted
    /// before this returns, so that it holds what was submitted before, whenever the future is awaited.
    pub fn download_async(
        &self,
        buffer: &wgpu::Buffer,
        offset: u64,
        bytes: u64,
    ) -> impl Future<Output = Result<Vec<u8>, Error>> + use<> {
        transfer::download(self.device(), self.queue(), buffer, offset, bytes)
    }
}

/// What helps where no adapter is found.
const NO_DRIVER: &str = "Install a driver for Vulkan, Metal or DirectX 12 (on Linux `scripts/vulkan COMMAND` of this crate's \
                         repository sees to one), and see that WGPU_BACKEND, if it is set, names that";

/// One for the process: wgpu numbers buffers within an instance, so that a buffer of another one could be taken for one of these.
/// On the web buffers are objects of the browser, which tells them apart.
fn instance() -> wgpu::Instance {
    let new = || {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        // OpenGL has no compute shaders on some systems, and its start-up complains where there is no display.
        descriptor.backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY);
        wgpu::Instance::new(descriptor)
    };
    #[cfg(target_arch = "wasm32")]
    return new();
    #[cfg(not(target_arch = "wasm32"))]
    {
        static INSTANCE: std::sync::OnceLock<wgpu::Instance> = std::sync::OnceLock::new();
        INSTANCE.get_or_init(new).clone()
    }
}

/// The problem of these tensors, if their shapes go together.
fn sdpa_problem<T: Element>(
    query: &HostTensor<'_, T>,
    key: &HostTensor<'_, T>,
    value: &HostTensor<'_, T>,
    options: &SdpaOptions<'_>,
) -> Result<Problem, Error> {
    for (argument, tensor) in [("query", query), ("key", key), ("value", value)] {
        let needed = tensor.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let (shape, found) = (tensor.shape, tensor.data.len());
        if needed != Some(found) {
            return Err(Error::SliceLength { argument, shape, needed: needed.unwrap_or(usize::MAX), found });
        }
        if shape.iter().any(|&n| n > u32::MAX as usize) {
            return Err(Error::HostShape { argument, found: shape, expected: "each size must be below 2^32" });
        }
    }
    let [q, k, v] = [query.shape, key.shape, value.shape];
    if k[0] != q[0] || k[3] != q[3] {
        let expected = "its batch and its last size must be those of query";
        return Err(Error::HostShape { argument: "key", found: k, expected });
    }
    if v[..3] != k[..3] {
        let expected = "its first three sizes must be those of key";
        return Err(Error::HostShape { argument: "value", found: v, expected });
    }
    if k[1] != q[1] && !options.enable_gqa {
        let expected = "it must have as many heads as query unless enable_gqa is set";
        return Err(Error::HostShape { argument: "key", found: k, expected });
    }
    let shape = Shape {
        batch: q[0] as u32,
        heads_q: q[1] as u32,
        heads_kv: k[1] as u32,
        seqlen_q: q[2] as u32,
        seqlen_k: k[2] as u32,
        head_dim: q[3] as u32,
        head_dim_v: v[3] as u32,
    };
    let mut problem = Problem::new(shape, T::TYPE);
    problem.scale = options.scale;
    problem.causal = options.is_causal.then_some(Causal::TopLeft);
    problem.dropout = options.dropout.map(|dropout| dropout.probability);
    let Some(mask) = &options.attn_mask else { return Ok(problem) };
    if options.is_causal {
        return Err(Error::CausalWithMask);
    }
    let (found, _, elements) = mask.parts();
    let needed = found.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    if needed != Some(elements) {
        let needed = needed.unwrap_or(usize::MAX);
        return Err(Error::SliceLength { argument: "attn_mask", shape: found, needed, found: elements });
    }
    let all = [q[0], q[1], q[2], k[2]];
    if found.iter().zip(all).any(|(&size, all)| size != 1 && size != all) {
        let expected = "each size must be 1 or that of [batch, query heads, queries, keys]";
        return Err(Error::HostShape { argument: "attn_mask", found, expected });
    }
    let layout = ScoreLayout::contiguous(found.map(|n| n as u32));
    Ok(match mask {
        AttnMask::Bool(_) => problem.with_mask(layout),
        AttnMask::F32(_) => problem.with_bias(Bias::new(ElementType::F32, layout)),
        AttnMask::F16(_) => problem.with_bias(Bias::new(ElementType::F16, layout)),
        AttnMask::BF16(_) => problem.with_bias(Bias::new(ElementType::BF16, layout)),
    })
}
