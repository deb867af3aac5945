//! What the tests share: devices, cases, and the comparison with the oracle.
//!
//! A case says what to compute and how its tensors lie in memory. Gaps in the inputs, and keys past their length, hold
//! NaN; outputs and workspace hold NaN before each run, and what is not the output's must hold it afterwards.
//!
//! `tests/web` runs cases in a browser, where nothing may wait: there [`Prepared::submit`] and [`Prepared::take`] stand for
//! [`Prepared::run`].
#![allow(dead_code)] // Each test binary uses a part.

pub mod backward;
pub mod cases;
#[cfg(not(target_arch = "wasm32"))]
pub mod coop;
#[cfg(not(target_arch = "wasm32"))]
mod devices;
pub mod loops;
#[cfg(not(target_arch = "wasm32"))]
pub mod skipped;
#[cfg(not(target_arch = "wasm32"))]
pub mod stores;
pub mod switched;

use std::fmt::Write;

#[cfg(not(target_arch = "wasm32"))]
#[allow(unused_imports)]
pub use devices::{every_kernel, full, webgpu, with_features, with_limits};
use half::{bf16, f16};
use wgpu_flash_attention::wgpu::{self, BufferBinding};
use wgpu_flash_attention::{
    Causal, Context, ElementType, ForwardBuffers, Kernel, Layout, Plan, PlanOptions, Problem, Shape, Tensor, reference,
    tune::Tile,
};

pub const TYPES: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::BF16];

pub fn naive() -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Naive)
}

pub fn tile() -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Tile)
}

/// The tile kernel with this tile: rows, keys, grid of threads (y, x), chunk, value_keys; its loops are written out, which those
/// of the table's tiles for software Vulkan are not.
pub fn tiled(rows: u32, keys: u32, grid: (u32, u32), chunk: u32, value_keys: u32) -> PlanOptions {
    let (threads_y, threads_x) = grid;
    let of_tile = Tile { rows, keys, threads_y, threads_x, chunk, value_keys, written_out: true };
    tile().tile(of_tile)
}

/// What q and k hold; v is random in either case.
#[derive(Clone, Copy, Debug)]
pub enum Inputs {
    Random,
    /// Integers up to this size, so that the scores are exact in f32 however large they are.
    Integers(i32),
    /// Random numbers times these, for q, k and v.
    Times([f32; 3]),
    /// Random columns, of which each row has the same: all scores are equal, and all values of a column.
    Alike,
    /// All scores are equal, values are random.
    EqualScores,
    /// Random columns times numbers that grow from row to row: each key's scores and values are larger than those before.
    Sorted,
}

/// How many queries and keys of each batch entry are valid, where a case has lengths.
#[derive(Clone, Debug, Default)]
pub struct Lengths {
    pub queries: Option<Vec<i32>>,
    pub keys: Option<Vec<i32>>,
}

impl Lengths {
    pub fn borrow(&self) -> reference::Lengths<'_> {
        reference::Lengths { queries: self.queries.as_deref(), keys: self.keys.as_deref() }
    }

    /// Those of queries, and those of keys.
    pub fn upload(&self, context: &Context) -> [Option<wgpu::Buffer>; 2] {
        let upload = |lengths: &Vec<i32>| context.upload(bytemuck::cast_slice(lengths)).unwrap();
        [&self.queries, &self.keys].map(|lengths| lengths.as_ref().map(upload))
    }
}

#[derive(Clone, Debug)]
pub struct Case {
    pub problem: Problem,
    pub lengths: Lengths,
    pub inputs: Inputs,
    /// q, k and v lie in one buffer.
    pub one_buffer: bool,
}

/// `case(batch, [heads_q, heads_kv], [seqlen_q, seqlen_k], [head_dim, head_dim_v])`: contiguous, unmasked, with lse.
pub const fn case(batch: u32, heads: [u32; 2], seqlens: [u32; 2], dims: [u32; 2]) -> Case {
    let shape = Shape {
        batch,
        heads_q: heads[0],
        heads_kv: heads[1],
        seqlen_q: seqlens[0],
        seqlen_k: seqlens[1],
        head_dim: dims[0],
        head_dim_v: dims[1],
    };
    let problem = Problem::new(shape, ElementType::F32).with_lse();
    Case { problem, lengths: Lengths { queries: None, keys: None }, inputs: Inputs::Random, one_buffer: false }
}

impl Case {
    pub fn element_type(mut self, element_type: ElementType) -> Self {
        self.problem.element_type = element_type;
        self
    }

    pub fn no_lse(mut self) -> Self {
        self.problem.lse = false;
        self
    }

    pub fn causal(mut self, causal: Causal) -> Self {
        self.problem.causal = Some(causal);
        self
    }

    /// A negative side is open.
    pub fn window(mut self, left: i32, right: i32) -> Self {
        self.problem = self.problem.window(u32::try_from(left).ok(), u32::try_from(right).ok());
        self
    }

    pub fn seqlens(mut self, lengths: &[i32]) -> Self {
        assert_eq!(lengths.len(), self.problem.shape.batch as usize);
        self.problem.seqlens_k = true;
        self.lengths.keys = Some(lengths.to_vec());
        self
    }

    /// Lengths of queries.
    pub fn seqlens_q(mut self, lengths: &[i32]) -> Self {
        assert_eq!(lengths.len(), self.problem.shape.batch as usize);
        self.problem.seqlens_q = true;
        self.lengths.queries = Some(lengths.to_vec());
        self
    }

    pub fn scale(mut self, scale: f32) -> Self {
        self.problem.scale = Some(scale);
        self
    }

    pub fn softcap(mut self, softcap: f32) -> Self {
        self.problem.softcap = Some(softcap);
        self
    }

    pub fn integers(mut self, largest: i32) -> Self {
        self.inputs = Inputs::Integers(largest);
        self
    }

    pub fn alike(mut self) -> Self {
        self.inputs = Inputs::Alike;
        self
    }

    pub fn equal_scores(mut self) -> Self {
        self.inputs = Inputs::EqualScores;
        self
    }

    pub fn sorted(mut self) -> Self {
        self.inputs = Inputs::Sorted;
        self
    }

    /// Random q, k and v times these.
    pub fn times(mut self, factors: [f32; 3]) -> Self {
        self.inputs = Inputs::Times(factors);
        self
    }

    /// Each tensor's layout from its batch, heads, rows and dim, and its number (q, k, v, o).
    pub fn layouts(mut self, layout: impl Fn([u32; 4], u64) -> Layout) -> Self {
        let [q, k, v, o] = tensor_dims(&self.problem.shape);
        self.problem = self
            .problem
            .with_layout(Tensor::Query, layout(q, 0))
            .with_layout(Tensor::Key, layout(k, 1))
            .with_layout(Tensor::Value, layout(v, 2))
            .with_layout(Tensor::Out, layout(o, 3));
        self
    }

    pub fn bnhd(mut self) -> Self {
        self.problem = self.problem.bnhd();
        self
    }

    /// `[position, batch, head, dim]`.
    pub fn nbhd(self) -> Self {
        self.layouts(|[batch, heads, _, dim], _| {
            let (batch, heads, dim) = (batch as u64, heads as u64, dim as u64);
            Layout { offset: 0, batch: heads * dim, head: dim, row: batch * heads * dim }
        })
    }

    /// Nothing is a multiple of 2; rows of 16-bit types share words with their neighbours and with gaps.
    pub fn odd(self) -> Self {
        self.layouts(|[_, heads, rows, dim], n| {
            let row = (dim as u64 + n) | 1;
            let head = (rows as u64 * row + 2) | 1;
            Layout { offset: 2 * n + 1, batch: (heads as u64 * head) | 1, head, row }
        })
    }

    /// Gaps of four elements, so that groups of four stay together where the head dims allow.
    pub fn gaps(self) -> Self {
        self.layouts(|[_, heads, rows, dim], n| {
            let row = dim as u64 + 4;
            let head = rows as u64 * row + 4 * n;
            Layout { offset: 4 * n, batch: heads as u64 * head + 8, head, row }
        })
    }

    /// Odd strides of dimensions of one, which nothing uses: groups of four stay together.
    pub fn unused_odd(self) -> Self {
        self.layouts(|[batch, heads, rows, dim], n| {
            let odd = |stride: u64, length: u32| if length == 1 { stride | 1 } else { stride };
            let row = dim as u64 + 4;
            let head = rows as u64 * row;
            let batch = odd(heads as u64 * head, batch);
            Layout { offset: 4 * n, batch, head: odd(head, heads), row: odd(row, rows) }
        })
    }

    /// `[batch, position, q heads | k heads | v heads, dim]` in one buffer, o contiguous.
    pub fn packed(mut self) -> Self {
        let s = self.problem.shape;
        let (q, k, v) = (s.heads_q * s.head_dim, s.heads_kv * s.head_dim, s.heads_kv * s.head_dim_v);
        let row = (q + k + v) as u64;
        let view = |offset: u32, dim: u32, rows: u32| Layout {
            offset: offset as u64,
            batch: rows as u64 * row,
            head: dim as u64,
            row,
        };
        assert_eq!(s.seqlen_q, s.seqlen_k);
        self.problem = self
            .problem
            .with_layout(Tensor::Query, view(0, s.head_dim, s.seqlen_q))
            .with_layout(Tensor::Key, view(q, s.head_dim, s.seqlen_k))
            .with_layout(Tensor::Value, view(q + k, s.head_dim_v, s.seqlen_k));
        self.one_buffer = true;
        self
    }

    /// All batch entries and heads share one k and one v.
    pub fn shared_kv(mut self) -> Self {
        for tensor in [Tensor::Key, Tensor::Value] {
            let layout = Layout { batch: 0, head: 0, ..self.problem.layout(tensor) };
            self.problem = self.problem.with_layout(tensor, layout);
        }
        self
    }

    pub fn prepare(&self) -> Prepared {
        let mut rng = Rng(0x5eed);
        let dims = tensor_dims(&self.problem.shape);
        let mut tensor = |n: usize, integers: Option<i32>, low: f32, high: f32| -> Vec<f32> {
            let len = dims[n].iter().map(|&d| d as usize).product();
            let one = |rng: &mut Rng| match integers {
                Some(most) => (rng.next() % (2 * most + 1) as u64) as i64 as f32 - most as f32,
                None => low + (high - low) * rng.unit(),
            };
            (0..len).map(|_| one(&mut rng)).collect()
        };
        let (integers, [q, k, v]) = match self.inputs {
            Inputs::Random | Inputs::Alike | Inputs::EqualScores | Inputs::Sorted => (None, [1.0; 3]),
            Inputs::Integers(most) => (Some(most), [1.0; 3]),
            Inputs::Times(factors) => (None, factors),
        };
        let mut inputs = [
            tensor(0, integers, -1.5 * q, 2.0 * q),
            tensor(1, integers, -2.0 * k, 1.5 * k),
            tensor(2, None, -v, 2.0 * v),
        ];
        if !matches!(self.inputs, Inputs::Random | Inputs::Integers(_) | Inputs::Times(_)) {
            let tensors = if matches!(self.inputs, Inputs::EqualScores) { 2 } else { 3 };
            for (tensor, dims) in inputs.iter_mut().zip(dims).take(tensors) {
                let (rows, dim) = (dims[2] as usize, dims[3] as usize);
                let columns: Vec<f32> = tensor.iter().copied().take(dim).collect();
                let grown = |row: usize| (row % rows + 1) as f32 / rows as f32;
                for (n, row) in tensor.chunks_mut(dim).enumerate() {
                    let factor = if matches!(self.inputs, Inputs::Sorted) { grown(n) } else { 1.0 };
                    row.iter_mut().zip(&columns).for_each(|(x, column)| *x = factor * column);
                }
            }
        }
        Prepared::new(&self.problem, inputs, self.lengths.clone(), self.one_buffer)
    }
}

/// splitmix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e3779b97f4a7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d049bb133111eb);
        x ^ (x >> 31)
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }
}

/// `[batch, heads, rows, dim]` of q, k, v and o.
fn tensor_dims(s: &Shape) -> [[u32; 4]; 4] {
    [
        [s.batch, s.heads_q, s.seqlen_q, s.head_dim],
        [s.batch, s.heads_kv, s.seqlen_k, s.head_dim],
        [s.batch, s.heads_kv, s.seqlen_k, s.head_dim_v],
        [s.batch, s.heads_q, s.seqlen_q, s.head_dim_v],
    ]
}

/// Where each element of a contiguous `[batch, head, position, dim]` tensor lies, and its batch entry and position.
fn places(layout: &Layout, [batch, heads, rows, dim]: [u32; 4]) -> impl Iterator<Item = (usize, u32, u32)> + use<> {
    let layout = *layout;
    let at = move |b: u32, h: u32, i: u32, d: u32| {
        layout.offset + b as u64 * layout.batch + h as u64 * layout.head + i as u64 * layout.row + d as u64
    };
    (0..batch).flat_map(move |b| {
        (0..heads)
            .flat_map(move |h| (0..rows).flat_map(move |i| (0..dim).map(move |d| (at(b, h, i, d) as usize, b, i))))
    })
}

fn end(layout: &Layout, dims: [u32; 4]) -> usize {
    places(layout, dims).map(|(place, ..)| place + 1).max().unwrap_or(0)
}

/// The bits of x rounded to the type.
pub fn to_bits(element_type: ElementType, x: f32) -> u32 {
    match element_type {
        ElementType::F32 => x.to_bits(),
        ElementType::F16 => f16::from_f32(x).to_bits().into(),
        ElementType::BF16 => bf16::from_f32(x).to_bits().into(),
        other => unreachable!("{other}"),
    }
}

pub fn from_bits(element_type: ElementType, bits: u32) -> f32 {
    match element_type {
        ElementType::F32 => f32::from_bits(bits),
        ElementType::F16 => f16::from_bits(bits as u16).to_f32(),
        ElementType::BF16 => bf16::from_bits(bits as u16).to_f32(),
        other => unreachable!("{other}"),
    }
}

/// A NaN of the type that no computation makes; each round has its own.
fn poison(element_type: ElementType, round: u32) -> u32 {
    match element_type {
        ElementType::F32 => 0x7fc5_a5a5 + round,
        ElementType::F16 => 0xfe5a + round,
        ElementType::BF16 => 0xffda + round,
        other => unreachable!("{other}"),
    }
}

/// Elements in memory, after and before a guard of poison, padded with it to whole words.
fn guarded(element_type: ElementType, elements: &[u32], poison: u32) -> Vec<u8> {
    let bytes = element_type.bytes() as usize;
    let guard = GUARD as usize / bytes;
    let padding = (elements.len() * bytes).next_multiple_of(4) / bytes - elements.len();
    let all = std::iter::repeat_n(&poison, guard).chain(elements).chain(std::iter::repeat_n(&poison, padding + guard));
    all.flat_map(|bits| bits.to_le_bytes().into_iter().take(bytes)).collect()
}

/// Bytes before and after each tensor: the largest alignment that a device may ask of an offset.
const GUARD: u64 = 256;

/// A case's inputs in memory, and what is to come out.
pub struct Prepared {
    pub problem: Problem,
    /// Guarded: q, k and v, or one buffer for all of them.
    inputs: Vec<Vec<u8>>,
    lengths: Lengths,
    pub expected: reference::Forward,
    /// q, k and v as the kernels see them, contiguous.
    seen: [Vec<f32>; 3],
    /// The largest error of the plain computation in the problem's type.
    plain_error: f64,
}

/// The bits of o and lse, contiguous.
pub type Bits = (Vec<u32>, Vec<u32>);

impl Prepared {
    /// `inputs` are contiguous; they are rounded to the problem's type.
    pub fn new(problem: &Problem, inputs: [Vec<f32>; 3], lengths: Lengths, one_buffer: bool) -> Self {
        let (shape, ty) = (&problem.shape, problem.element_type);
        let dims = tensor_dims(shape);
        let layouts = [Tensor::Query, Tensor::Key, Tensor::Value].map(|tensor| problem.layout(tensor));
        let layouts = layouts.each_ref();
        let ends = [0, 1, 2].map(|n| end(layouts[n], dims[n]));
        let buffer_of = |n: usize| if one_buffer { 0 } else { n };
        let nan = poison(ty, 0);
        let mut buffers = match one_buffer {
            true => vec![vec![nan; ends.into_iter().max().unwrap_or(0)]],
            false => ends.map(|end| vec![nan; end]).into(),
        };
        for n in 0..3 {
            for ((place, b, i), &x) in places(layouts[n], dims[n]).zip(&inputs[n]) {
                let of_tensor = if n == 0 { &lengths.queries } else { &lengths.keys };
                let exists = of_tensor.as_ref().is_none_or(|lengths| (i as i32) < lengths[b as usize]);
                if exists {
                    buffers[buffer_of(n)][place] = to_bits(ty, x);
                }
            }
        }
        // What the kernels see: rounded, and the last write where strides are 0.
        let [q, k, v] = [0, 1, 2].map(|n| -> Vec<f32> {
            places(layouts[n], dims[n]).map(|(place, ..)| from_bits(ty, buffers[buffer_of(n)][place])).collect()
        });
        let expected = reference::forward(problem, &q, &k, &v, lengths.borrow());
        let plain = plain(problem, [&q, &k, &v], lengths.borrow());
        let plain_error = plain.iter().zip(&expected.out).map(|(&x, e)| (x as f64 - e).abs()).fold(0.0, f64::max);
        let inputs = buffers.iter().map(|elements| guarded(ty, elements, nan)).collect();
        Prepared { problem: problem.clone(), inputs, lengths, expected, seen: [q, k, v], plain_error }
    }

    /// q, k and v as the kernels see them, contiguous.
    pub fn seen(&self) -> [Vec<f32>; 3] {
        self.seen.clone()
    }

    /// Computes the case twice and compares with the oracle.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn check(&self, context: &Context, options: &PlanOptions) -> Result<(), String> {
        let plan = context.plan_with(&self.problem, options).map_err(|error| error.to_string())?;
        self.check_plan(context, &plan)
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub fn check_plan(&self, context: &Context, plan: &Plan) -> Result<(), String> {
        let bits = self.run(context, plan, 0)?;
        if self.run(context, plan, 1)? != bits {
            return Err("two runs gave different bits".into());
        }
        self.compare(&bits).map(drop)
    }

    /// One run on freshly poisoned outputs.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn run(&self, context: &Context, plan: &Plan, round: u32) -> Result<Bits, String> {
        self.take(&download(context, &self.submit(context, plan, round)?)?, round)
    }

    /// Submits one run on freshly poisoned outputs; the buffers of o and, if the problem has it, of lse.
    pub fn submit(&self, context: &Context, plan: &Plan, round: u32) -> Result<Vec<wgpu::Buffer>, String> {
        let (problem, ty) = (&self.problem, self.problem.element_type);
        let dims = tensor_dims(&problem.shape);
        let out_layout = problem.layout(Tensor::Out);
        let out_end = end(&out_layout, dims[3]);
        let rows = problem.shape.rows() as usize;
        let [nan, nan32] = [ty, ElementType::F32].map(|ty| poison(ty, round));
        let words = |n: usize| guarded(ElementType::F32, &vec![nan32; n], nan32);

        let inputs: Vec<_> = self.inputs.iter().map(|bytes| context.upload(bytes).unwrap()).collect();
        let out = context.upload(&guarded(ty, &vec![nan; out_end], nan)).unwrap();
        let lse = problem.lse.then(|| context.upload(&words(rows)).unwrap());
        let [seqlens_q, seqlens_k] = self.lengths.upload(context);
        let workspace_words = plan.workspace_bytes() as usize / 4;
        let workspace = (workspace_words > 0).then(|| context.upload(&words(workspace_words)).unwrap());
        // As few bytes as the layouts say.
        fn bind(buffer: &wgpu::Buffer, bytes: u64) -> BufferBinding<'_> {
            BufferBinding { buffer, offset: GUARD, size: wgpu::BufferSize::new(bytes.next_multiple_of(4).max(4)) }
        }
        let input = |n: usize, tensor| {
            let buffer = if inputs.len() == 1 { &inputs[0] } else { &inputs[n] };
            bind(buffer, end(&problem.layout(tensor), dims[n]) as u64 * ty.bytes())
        };
        let [q, k, v] = [input(0, Tensor::Query), input(1, Tensor::Key), input(2, Tensor::Value)];
        let buffers = ForwardBuffers::new(q, k, v, bind(&out, out_end as u64 * ty.bytes()))
            .lse(lse.as_ref().map(|lse| bind(lse, rows as u64 * 4)))
            .seqlens_q(seqlens_q.as_ref())
            .seqlens_k(seqlens_k.as_ref())
            .workspace(workspace.as_ref().map(|workspace| bind(workspace, plan.workspace_bytes())));
        let mut encoder = context.device().create_command_encoder(&Default::default());
        plan.forward(&mut encoder, &buffers).map_err(|error| error.to_string())?;
        context.queue().submit([encoder.finish()]);
        Ok(std::iter::once(out).chain(lse).collect())
    }

    /// What the buffers of [`Prepared::submit`] hold, if nothing else in them was written.
    pub fn take(&self, outputs: &[Vec<u8>], round: u32) -> Result<Bits, String> {
        let (problem, ty) = (&self.problem, self.problem.element_type);
        let dims = tensor_dims(&problem.shape);
        let rows = problem.shape.rows() as usize;
        let out = unguard(&outputs[0], ty, poison(ty, round), |end| {
            let mut taken = vec![false; end];
            let places: Vec<_> = places(&problem.layout(Tensor::Out), dims[3]).map(|(place, ..)| place).collect();
            places.iter().for_each(|&place| taken[place] = true);
            (places, taken)
        });
        let lse = outputs.get(1).map_or(Ok(vec![]), |lse| {
            unguard(lse, ElementType::F32, poison(ElementType::F32, round), |end| {
                ((0..rows).collect(), (0..end).map(|place| place < rows).collect())
            })
        });
        Ok((out.map_err(|e| format!("out: {e}"))?, lse.map_err(|e| format!("lse: {e}"))?))
    }

    /// Compares with the oracle, under the bounds of the design.
    pub fn compare(&self, (out, lse): &Bits) -> Result<Vec<Measured>, String> {
        let (shape, ty) = (&self.problem.shape, self.problem.element_type);
        let dim = shape.head_dim_v as usize;
        let element = |n: usize| {
            let row = n / dim;
            let (heads, rows) = (shape.heads_q as usize, shape.seqlen_q as usize);
            format!("[{}, {}, {}, {}]", row / rows / heads, row / rows % heads, row % rows, n % dim)
        };
        let (mut error2, mut norm2, mut worst) = (0.0, 0.0, (0.0, 0));
        if out.len() != self.expected.out.len() {
            return Err(format!("{} elements of out, {} expected", out.len(), self.expected.out.len()));
        }
        for (n, (&bits, &expected)) in out.iter().zip(&self.expected.out).enumerate() {
            let found = from_bits(ty, bits) as f64;
            if found.is_nan() {
                return Err(format!("out{} is NaN, {expected} expected", element(n)));
            }
            if self.expected.lse[n / dim] == f64::NEG_INFINITY && found != 0.0 {
                return Err(format!("out{} is {found} in a row without keys", element(n)));
            }
            let error = (found - expected).abs();
            error2 += error * error;
            norm2 += expected * expected;
            if error > worst.0 {
                worst = (error, n);
            }
        }
        let (measure, error, bound) = match ty {
            ElementType::F32 => ("relative", (error2 / f64::max(norm2, f64::MIN_POSITIVE)).sqrt(), 2e-6),
            _ => ("largest", worst.0, 2.0 * self.plain_error + 1e-5),
        };
        let mut problems = String::new();
        // Written so that NaN does not pass.
        if !matches!(error.partial_cmp(&bound), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
            let n = worst.1;
            let (found, expected) = (from_bits(ty, out[n]), self.expected.out[n]);
            let _ = write!(
                problems,
                "{measure} error {error:e} > {bound:e}, worst at out{}: {found}, {expected} expected; ",
                element(n)
            );
        }
        let mut measured = vec![Measured { name: "o", error, bound }];
        let mut worst = Measured { name: "lse", error: 0.0, bound: 1e-5 };
        for (row, (&bits, &expected)) in lse.iter().zip(&self.expected.lse).enumerate() {
            let found = f32::from_bits(bits) as f64;
            let of_row = Measured { name: "lse", error: (found - expected).abs(), bound: 1e-5 + 1e-6 * expected.abs() };
            if of_row.error / of_row.bound > worst.error / worst.bound {
                worst = of_row;
            }
            let good = found == expected || (found - expected).abs() <= 1e-5 + 1e-6 * expected.abs();
            if !good || (expected == f64::NEG_INFINITY && found != expected) {
                let _ = write!(problems, "lse at row {row} is {found}, {expected} expected; ");
                break;
            }
        }
        measured.extend(self.problem.lse.then_some(worst));
        if problems.is_empty() { Ok(measured) } else { Err(problems) }
    }
}

/// How far a result is off, and how far it may be.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub name: &'static str,
    pub error: f64,
    pub bound: f64,
}

#[cfg(not(target_arch = "wasm32"))]
fn download(context: &Context, buffers: &[wgpu::Buffer]) -> Result<Vec<Vec<u8>>, String> {
    let one = |buffer: &wgpu::Buffer| context.download(buffer, 0, buffer.size()).map_err(|error| error.to_string());
    buffers.iter().map(one).collect()
}

/// The elements at the places that belong to a tensor, in its order; an error if anything else changed.
/// `owned(n)` gives those places, and for each of n whether it is one.
fn unguard(
    bytes: &[u8],
    element_type: ElementType,
    poison: u32,
    owned: impl FnOnce(usize) -> (Vec<usize>, Vec<bool>),
) -> Result<Vec<u32>, String> {
    let all: Vec<u32> = match element_type {
        ElementType::F32 => bytemuck::pod_collect_to_vec(bytes),
        _ => bytemuck::pod_collect_to_vec::<u8, u16>(bytes).into_iter().map(u32::from).collect(),
    };
    let guard = GUARD as usize / element_type.bytes() as usize;
    let (places, taken) = owned(all.len() - 2 * guard);
    for (n, &bits) in all.iter().enumerate() {
        let ours = n.checked_sub(guard).and_then(|n| taken.get(n)).is_some_and(|&taken| taken);
        if !ours && bits != poison {
            return Err(format!("element {} is not the tensor's and was written", n as i64 - guard as i64));
        }
        if ours && bits == poison {
            return Err(format!("element {} was not written", n - guard));
        }
    }
    Ok(places.into_iter().map(|place| all[guard + place]).collect())
}

/// What one would write in the type itself: scores, softmax and products in f32, p and o rounded.
fn plain(problem: &Problem, [query, key, value]: [&[f32]; 3], lengths: reference::Lengths) -> Vec<f32> {
    let s = &problem.shape;
    let (d, dv) = (s.head_dim as usize, s.head_dim_v as usize);
    let round = |x: f32| from_bits(problem.element_type, to_bits(problem.element_type, x));
    let score = |q: &[f32], k: &[f32]| {
        let score = problem.effective_scale() * q.iter().zip(k).map(|(x, y)| x * y).sum::<f32>();
        problem.softcap.map_or(score, |cap| cap * (score / cap).tanh())
    };
    let mut out = vec![];
    for n in 0..s.rows() as usize {
        let (i, head) = (n % s.seqlen_q as usize, n / s.seqlen_q as usize);
        let (b, h) = (head / s.heads_q as usize, head % s.heads_q as usize);
        let first_key = (b * s.heads_kv as usize + h / s.group() as usize) * s.seqlen_k as usize;
        let (queries, keys) = lengths.of(problem, b as u32);
        let (first, end) = problem.key_interval_of(i as u32, queries, keys);
        let row =
            |x: &'_ [f32], j: u32, dim: usize| -> Vec<f32> { x[(first_key + j as usize) * dim..][..dim].to_vec() };
        let scores: Vec<f32> = (first..end).map(|j| score(&query[n * d..][..d], &row(key, j, d))).collect();
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = scores.iter().map(|x| (x - most).exp()).sum();
        let mut o = vec![0.0; dv];
        for (j, x) in (first..end).zip(&scores) {
            let p = round((x - most).exp() / sum);
            o.iter_mut().zip(row(value, j, dv)).for_each(|(o, v)| *o += p * v);
        }
        out.extend(o.into_iter().map(round));
    }
    out
}

/// Runs every case in every way and reports all that fail.
#[cfg(not(target_arch = "wasm32"))]
pub fn check_all(cases: &[(String, Prepared)], ways: &[(&str, &Context, PlanOptions)]) {
    check_each(cases, ways, Prepared::check);
}

#[cfg(not(target_arch = "wasm32"))]
fn check_each<T>(
    cases: &[(String, T)],
    ways: &[(&str, &Context, PlanOptions)],
    check: impl Fn(&T, &Context, &PlanOptions) -> Result<(), String>,
) {
    let mut failed = vec![];
    for (name, prepared) in cases {
        for (way, context, options) in ways {
            if let Err(error) = check(prepared, context, options) {
                failed.push(format!("{name}, {way}: {error}"));
            }
        }
    }
    assert!(failed.is_empty(), "{} failed\n{}", failed.len(), failed.join("\n"));
}
