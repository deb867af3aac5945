//! Forward passes by cases: gaps and poison everywhere, and every element compared with the oracle.

use wgpu_flash_attention::reference::accept::{self, Bound, Errors, Verdict};
use wgpu_flash_attention::tune::{DecodeTile, Tile};
use wgpu_flash_attention::wgpu::{self, BufferBinding};
use wgpu_flash_attention::{
    Context, ElementType, ForwardBuffers, Kernel, Plan, PlanOptions, Problem, Tensor, reference,
};

use crate::Extras;
use crate::case::tensor_dims;
use crate::memory::{GUARD, end, from_bits, guarded, places, poison, row_places, to_bits, unguard};

/// Every element type.
pub const TYPES: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::BF16];

pub fn naive() -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Naive)
}

pub fn tile() -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Tile)
}

/// The decode kernel with a small tile and so many splits of the keys.
pub fn decode(splits: u32) -> PlanOptions {
    let tile = DecodeTile { rows: 4, threads: 64, key_threads: 8, thread_keys: 2, lanes: 0 };
    PlanOptions::default().kernel(Kernel::Decode).decode_tile(tile).splits(splits)
}

/// The tile kernel with this tile: rows, keys, grid of threads (y, x), chunk, value_keys; its loops are written out, which those
/// of the table's tiles for software Vulkan are not.
pub fn tiled(rows: u32, keys: u32, grid: (u32, u32), chunk: u32, value_keys: u32) -> PlanOptions {
    let (threads_y, threads_x) = grid;
    let of_tile = Tile { rows, keys, threads_y, threads_x, chunk, value_keys, written_out: true };
    tile().tile(of_tile)
}

/// A case's inputs in memory, and what is to come out.
pub struct Prepared {
    pub problem: Problem,
    /// Guarded: q, k and v, or one buffer for all of them.
    pub(crate) inputs: Vec<Vec<u8>>,
    pub(crate) extras: Extras,
    pub expected: reference::Forward,
    /// q, k and v as the kernels see them, contiguous.
    seen: [Vec<f32>; 3],
    /// Of the plain computation in the problem's type.
    plain: Errors,
}

/// The bits of o and lse, contiguous.
pub type Bits = (Vec<u32>, Vec<u32>);

impl Prepared {
    /// `inputs` are contiguous; they are rounded to the problem's type.
    pub fn new(problem: &Problem, inputs: [Vec<f32>; 3], extras: Extras, one_buffer: bool) -> Self {
        let (shape, ty) = (&problem.shape, problem.element_type);
        let dims = tensor_dims(shape);
        let tensors = [Tensor::Query, Tensor::Key, Tensor::Value];
        let ends = [0, 1, 2].map(|n| end(problem, tensors[n], dims[n]));
        let buffer_of = |n: usize| if one_buffer { 0 } else { n };
        let nan = poison(ty, 0);
        let mut buffers = match one_buffer {
            true => vec![vec![nan; ends.into_iter().max().unwrap_or(0)]],
            false => ends.map(|end| vec![nan; end]).into(),
        };
        for n in 0..3 {
            for ((place, b, i), &x) in places(problem, tensors[n], dims[n]).zip(&inputs[n]) {
                let of_tensor = if n == 0 { &extras.seqlens_q } else { &extras.seqlens_k };
                let exists = of_tensor.as_ref().is_none_or(|lengths| (i as i32) < lengths[b as usize]);
                if exists {
                    buffers[buffer_of(n)][place] = to_bits(ty, x);
                }
            }
        }
        // What the kernels see: rounded, and the last write where strides are 0.
        let [q, k, v] = [0, 1, 2].map(|n| -> Vec<f32> {
            places(problem, tensors[n], dims[n])
                .map(|(place, ..)| from_bits(ty, buffers[buffer_of(n)][place]))
                .collect()
        });
        let expected = reference::forward(problem, &q, &k, &v, extras.borrow());
        let rounded = reference::rounded::forward(problem, &q, &k, &v, extras.borrow());
        let plain = Errors::of(rounded.out, &expected.out);
        let inputs = buffers.iter().map(|elements| guarded(ty, elements, nan)).collect();
        Prepared { problem: problem.clone(), inputs, extras, expected, seen: [q, k, v], plain }
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
        let out_end = end(problem, Tensor::Out, dims[3]);
        let rows = problem.shape.rows() as usize;
        let [nan, nan32] = [ty, ElementType::F32].map(|ty| poison(ty, round));
        let words = |n: usize| guarded(ElementType::F32, &vec![nan32; n], nan32);

        let inputs: Vec<_> = self.inputs.iter().map(|bytes| context.upload(bytes).unwrap()).collect();
        let out = context.upload(&guarded(ty, &vec![nan; out_end], nan)).unwrap();
        let lse = problem.lse.then(|| context.upload(&words(rows)).unwrap());
        let extras = self.extras.upload(context, problem)?;
        let workspace_words = plan.workspace_bytes() as usize / 4;
        let workspace = (workspace_words > 0).then(|| context.upload(&words(workspace_words)).unwrap());
        // As few bytes as the layouts say.
        fn bind(buffer: &wgpu::Buffer, bytes: u64) -> BufferBinding<'_> {
            BufferBinding { buffer, offset: GUARD, size: wgpu::BufferSize::new(bytes.next_multiple_of(4).max(4)) }
        }
        let input = |n: usize, tensor| {
            let buffer = if inputs.len() == 1 { &inputs[0] } else { &inputs[n] };
            bind(buffer, end(problem, tensor, dims[n]) as u64 * ty.bytes())
        };
        let [q, k, v] = [input(0, Tensor::Query), input(1, Tensor::Key), input(2, Tensor::Value)];
        let buffers = ForwardBuffers::new(q, k, v, bind(&out, out_end as u64 * ty.bytes()))
            .lse(lse.as_ref().map(|lse| bind(lse, rows as u64 * 4)))
            .workspace(workspace.as_ref().map(|workspace| bind(workspace, plan.workspace_bytes())));
        let buffers = extras.add_to(buffers);
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
            let places: Vec<_> = places(problem, Tensor::Out, dims[3]).map(|(place, ..)| place).collect();
            places.iter().for_each(|&place| taken[place] = true);
            (places, taken)
        });
        let lse = outputs.get(1).map_or(Ok(vec![]), |lse| {
            unguard(lse, ElementType::F32, poison(ElementType::F32, round), |end| {
                (row_places(problem), (0..end).map(|place| place < rows).collect())
            })
        });
        Ok((out.map_err(|e| format!("out: {e}"))?, lse.map_err(|e| format!("lse: {e}"))?))
    }

    /// Compares with the oracle: what was found of o and, if the problem has it, of lse.
    pub fn compare(&self, (out, lse): &Bits) -> Result<Vec<(&'static str, Verdict)>, String> {
        let (shape, ty) = (&self.problem.shape, self.problem.element_type);
        let dim = shape.head_dim_v as usize;
        let element = |n: usize| {
            let row = n / dim;
            let (heads, rows) = (shape.heads_q as usize, shape.seqlen_q as usize);
            format!("[{}, {}, {}, {}]", row / rows / heads, row / rows % heads, row % rows, n % dim)
        };
        let expected = &self.expected;
        if out.len() != expected.out.len() {
            return Err(format!("{} elements of out, {} expected", out.len(), expected.out.len()));
        }
        let out: Vec<f64> = out.iter().map(|&bits| from_bits(ty, bits).into()).collect();
        for (n, x) in out.iter().enumerate() {
            if x.is_nan() {
                return Err(format!("out{} is NaN, {} expected", element(n), expected.out[n]));
            }
            if expected.lse[n / dim] == f64::NEG_INFINITY && *x != 0.0 {
                return Err(format!("out{} is {x} in a row without keys", element(n)));
            }
        }
        let lse: Vec<f64> = lse.iter().map(|&bits| f32::from_bits(bits).into()).collect();
        let of_out = Bound::out(ty, self.plain).judge(Errors::of(out.iter().copied(), &expected.out));
        let mut verdicts = vec![("o", of_out)];
        let mut broken = vec![why_broken("o", &of_out, &out, &expected.out, element)];
        if self.problem.lse {
            let of_lse = accept::lse(lse.iter().copied(), &expected.lse);
            verdicts.push(("lse", of_lse));
            broken.push(why_broken("lse", &of_lse, &lse, &expected.lse, |row| format!(" of row {row}")));
        }
        let broken: Vec<_> = broken.into_iter().flatten().collect();
        if broken.is_empty() { Ok(verdicts) } else { Err(broken.join("; ")) }
    }
}

/// Where a verdict is none that holds: what it says, and the place that is furthest off.
pub(crate) fn why_broken(
    name: &str,
    verdict: &Verdict,
    found: &[f64],
    expected: &[f64],
    place: impl Fn(usize) -> String,
) -> Option<String> {
    let off = |&n: &usize| if found[n] == expected[n] { 0.0 } else { (found[n] - expected[n]).abs() };
    // NaN counts as the largest.
    let worst = (0..found.len().min(expected.len())).max_by(|a, b| off(a).total_cmp(&off(b)))?;
    let (x, e) = (found[worst], expected[worst]);
    (!verdict.holds).then(|| format!("{name}: {verdict}; worst at {name}{}: {x}, {e} expected", place(worst)))
}

#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn download(context: &Context, buffers: &[wgpu::Buffer]) -> Result<Vec<Vec<u8>>, String> {
    let one = |buffer: &wgpu::Buffer| context.download(buffer, 0, buffer.size()).map_err(|error| error.to_string());
    buffers.iter().map(one).collect()
}

/// Runs every case in every way and reports all that fail.
#[cfg(not(target_arch = "wasm32"))]
pub fn check_all(cases: &[(String, Prepared)], ways: &[(&str, &Context, PlanOptions)]) {
    check_each(cases, ways, Prepared::check);
}

#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn check_each<T>(
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
