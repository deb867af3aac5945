//! Backward passes by cases: as for the forward pass, gaps and poison everywhere, and every gradient compared with the oracle.

use fastrand::Rng;
use wgpu_flash_attention::reference::accept::{Bound, Errors, Verdict};
use wgpu_flash_attention::reference::rounded::{self, nearest};
use wgpu_flash_attention::reference::{Backward, Summed};
use wgpu_flash_attention::tune::{BackwardTile, FusedTile};
use wgpu_flash_attention::wgpu::{self, BufferBinding};
use wgpu_flash_attention::{
    BackwardBuffers, Context, ElementType, ForwardBuffers, Kernel, Layout, Plan, PlanOptions, Problem, Tensor,
    reference,
};

use crate::case::tensor_dims;
use crate::forward::why_broken;
use crate::memory::{GUARD, end, from_bits, guarded, places, poison, row_places, to_bits, unguard};
use crate::{Case, Extras, Inputs, Prepared};

/// This kernel for the backward pass. A plan builds the pipelines of its forward pass, too, which no test of gradients runs: those of the naive
/// kernel are built soonest.
pub fn backward(kernel: Kernel) -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Naive).backward(kernel)
}

/// These options with the tile kernel for the forward pass: small bindings may not hold the scores of the naive one.
pub fn in_small_bindings(options: PlanOptions) -> PlanOptions {
    options.kernel(Kernel::Tile)
}

/// The tile kernels for each gradient, with a tile smaller than cases are, so that there are several; no size but the grid's is a power of
/// two. Its loops are written out, which those of the table's tiles for software Vulkan are not.
pub fn two_kernels() -> PlanOptions {
    let tile = BackwardTile { own: 12, step: 24, threads_y: 12, threads_x: 6, chunk: 12, block: 12, written_out: true };
    backward(Kernel::Tile).backward_tile(tile)
}

/// The tile kernel that computes all gradients at once, with this tile: keys and rows of a tile, threads of a side of the grid,
/// chunk, lines, keys and rows of a block.
pub fn fused([own, step]: [u32; 2], threads: u32, chunk: u32, lines: u32, blocks: [u32; 2]) -> PlanOptions {
    let ([block_keys, block_rows], threads_y, threads_x, written_out) = (blocks, threads, threads, false);
    let tile = FusedTile { own, step, threads_y, threads_x, chunk, lines, block_keys, block_rows, written_out };
    backward(Kernel::Tile).fused_tile(tile)
}

/// What is asked of the gradients besides the case.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask {
    /// lse has a gradient too.
    pub grad_lse: bool,
    /// The gradients are added to what is there.
    pub accumulate: bool,
}

/// A case's tensors in memory, and the gradients that are to come out.
pub struct PreparedBackward {
    pub problem: Problem,
    /// Guarded: q, k, v (or one buffer for all of them), o and do.
    inputs: Vec<Vec<u8>>,
    lse: Vec<f32>,
    grad_lse: Option<Vec<f32>>,
    extras: Extras,
    /// What dq, dk and dv hold before, contiguous, in the problem's type; where they accumulate.
    before: Option<[Vec<f32>; 3]>,
    pub expected: [Vec<f64>; 3],
    /// Of the plain computation in the problem's type, of each.
    plain: [Errors; 3],
    /// The norms of the terms of dq and dk. That of dv is 0: its terms do not cancel here, and without it the bound is tighter.
    terms: [f64; 3],
    /// The gradients of the bias, the sinks and ALiBi's slopes, of those that the problem asks for.
    shared: Vec<SharedGradient>,
    /// Whether a row of dq, or of dk and dv, has nothing to do with any key, or row.
    untouched: [Vec<bool>; 3],
}

/// A gradient that is a sum over scores which share an element.
struct SharedGradient {
    name: &'static str,
    /// In memory.
    element_type: ElementType,
    /// What the buffer holds before, in gaps too; where gradients accumulate, and otherwise nothing.
    before: Option<Vec<f32>>,
    /// By place in the buffer; what lies between the elements has none.
    expected: Vec<Option<f64>>,
    terms: f64,
}

impl SharedGradient {
    /// Those that the problem asks for, from what is computed exactly.
    fn all(problem: &Problem, exact: &Backward, accumulate: bool) -> Vec<SharedGradient> {
        let bias_type = problem.bias.map_or(ElementType::F32, |bias| bias.element_type);
        let all = [
            ("dbias", bias_type, &exact.bias),
            ("dsinks", ElementType::F32, &exact.sinks),
            ("dalibi_slopes", ElementType::F32, &exact.alibi_slopes),
        ];
        let mut rng = Rng::with_seed(0xbef0);
        let one = |(name, element_type, exact): (_, _, &Option<Summed>)| {
            let exact = exact.as_ref()?;
            // Exact in every type.
            let number = |_| rng.i32(-8..8) as f32 / 4.0;
            let before: Option<Vec<f32>> = accumulate.then(|| exact.values.iter().map(number).collect());
            let sum = |n: usize, x: f64| x + before.as_ref().map_or(0.0, |before| before[n].into());
            let sums: Vec<f64> = exact.values.iter().enumerate().map(|(n, &x)| sum(n, x)).collect();
            let used: Vec<bool> = match name {
                "dbias" => {
                    let mut used = vec![false; sums.len()];
                    places_of_bias(problem).into_iter().for_each(|place| used[place] = true);
                    used
                }
                _ => vec![true; sums.len()],
            };
            let expected = sums.into_iter().zip(used).map(|(x, used)| used.then_some(x)).collect();
            Some(SharedGradient { name, element_type, before, expected, terms: exact.terms })
        };
        all.into_iter().filter_map(one).collect()
    }

    /// The bits in its buffer before the pass: poison in gaps, and where nothing accumulates.
    fn before(&self, round: u32) -> Vec<u32> {
        let nan = poison(self.element_type, round);
        let bits = |n: usize| match (&self.before, self.expected[n]) {
            (Some(before), Some(_)) => to_bits(self.element_type, before[n]),
            _ => nan,
        };
        (0..self.expected.len()).map(bits).collect()
    }
}

/// Where the bias' layout puts its elements.
fn places_of_bias(problem: &Problem) -> Vec<usize> {
    let s = &problem.shape;
    let Some(bias) = problem.bias else { return vec![] };
    let pairs = (0..s.seqlen_q).flat_map(|i| (0..s.seqlen_k).map(move |j| [i, j]));
    let heads = (0..s.batch).flat_map(|b| (0..s.heads_q).map(move |h| [b, h]));
    let place = |[b, h]: [u32; 2], [i, j]: [u32; 2]| bias.layout.place([b, h, i, j]) as usize;
    heads.flat_map(|head| pairs.clone().map(move |pair| place(head, pair))).collect()
}

/// `[batch, heads, rows, dim]` of q, k, v, o and do, in the order of the bindings.
fn input_dims(problem: &Problem) -> [[u32; 4]; 5] {
    let [q, k, v, o] = tensor_dims(&problem.shape);
    [q, k, v, o, o]
}

impl Case {
    pub fn prepare_backward(&self, ask: Ask) -> PreparedBackward {
        let mut problem = self.problem.clone().with_gradients();
        let shape = problem.shape;
        if let Some(gradients) = &mut problem.gradients {
            gradients.lse = ask.grad_lse;
            gradients.accumulate = ask.accumulate;
            gradients.bias = self.problem.bias.is_some();
            gradients.sinks = self.problem.sinks;
            gradients.alibi_slopes = self.problem.alibi.is_some();
        }
        // Keys that share a place have gradients of their own.
        if problem.layout(Tensor::Key).batch == 0 {
            problem = problem
                .with_layout(Tensor::GradKey, Layout::bhnd(shape.heads_kv, shape.seqlen_k, shape.head_dim))
                .with_layout(Tensor::GradValue, Layout::bhnd(shape.heads_kv, shape.seqlen_k, shape.head_dim_v));
        }
        // Where all values are alike, dp is delta, and a gradient of 0 is what their rounding leaves: nothing in 16 bits may be off
        // by more than 1e-5 then. These numbers are such that dp and delta round alike in whatever order they are summed.
        let seed = if matches!(self.inputs, Inputs::Alike) { 4 } else { 0x9ad };
        let mut rng = Rng::with_seed(seed);
        let mut numbers =
            |n: usize, low: f32, high: f32| -> Vec<f32> { (0..n).map(|_| low + (high - low) * rng.f32()).collect() };
        let len = |n: usize| input_dims(&problem)[n].iter().map(|&d| d as usize).product::<usize>();
        let mut grad_out = numbers(len(3), -1.0, 1.5);
        let mut grad_lse = ask.grad_lse.then(|| numbers(shape.rows() as usize, -1.0, 1.0));
        if matches!(self.inputs, Inputs::Alike) {
            // Each column has one number, and so has lse's gradient.
            let dim = shape.head_dim_v as usize;
            (dim..grad_out.len()).for_each(|n| grad_out[n] = grad_out[n - dim]);
            grad_lse.iter_mut().for_each(|grad| grad.fill(0.3));
        }
        let before = ask.accumulate.then(|| [0, 1, 2].map(|n| numbers(len(n), -1.0, 1.0)));
        PreparedBackward::new(&problem, self.prepare(), grad_out, grad_lse, before)
    }
}

impl PreparedBackward {
    /// From the forward pass of the same problem. `grad_out` and `before` are contiguous; they are rounded to the problem's type.
    pub fn new(
        problem: &Problem,
        forward: Prepared,
        grad_out: Vec<f32>,
        grad_lse: Option<Vec<f32>>,
        before: Option<[Vec<f32>; 3]>,
    ) -> Self {
        let ty = problem.element_type;
        let dims = input_dims(problem);
        let round = |x: Vec<f32>| -> Vec<f32> { x.into_iter().map(|x| from_bits(ty, to_bits(ty, x))).collect() };
        let grad_out = round(grad_out);
        let before = before.map(|before| before.map(round));
        let out = round(forward.expected.out.iter().map(|&x| x as f32).collect());
        let lse: Vec<f32> = forward.expected.lse.iter().map(|&x| x as f32).collect();

        let [q, k, v] = forward.seen();
        let extras = forward.extras.borrow();
        let tensors = [&q[..], &k, &v, &grad_out];
        let exact = reference::backward(problem, tensors, grad_lse.as_deref(), extras);
        let rows = rounded::Rows::new(problem, &grad_out, &out, &lse, grad_lse.as_deref());
        let plain = rounded::backward(problem, tensors, &rows, extras);
        let shared = SharedGradient::all(problem, &exact, before.is_some());
        let terms = [exact.terms[0], exact.terms[1], 0.0];
        // With what was there before, where gradients accumulate.
        let sums = |n: usize, sums: Vec<f64>| -> Vec<f64> {
            let before = |place: usize| before.as_ref().map_or(0.0, |before| f64::from(before[n][place]));
            sums.into_iter().enumerate().map(|(place, x)| x + before(place)).collect()
        };
        let expected = [sums(0, exact.query), sums(1, exact.key), sums(2, exact.value)];
        // Kernels on matrices, like PyTorch, add a gradient that is rounded already to what is there.
        let near = |x: Vec<f64>| -> Vec<f64> { x.into_iter().map(|x| nearest(ty, x as f32).into()).collect() };
        let plain = [sums(0, near(plain.query)), sums(1, near(plain.key)), sums(2, near(plain.value))];
        let plain = [0, 1, 2].map(|n| Errors::of(plain[n].iter().map(|&x| nearest(ty, x as f32)), &expected[n]));
        let untouched = match before {
            Some(_) => [vec![], vec![], vec![]],
            None => untouched(problem, &lse, extras),
        };

        let mut inputs = forward.inputs;
        for (tensor, n, elements) in [(Tensor::Out, 3, &out), (Tensor::GradOut, 4, &grad_out)] {
            let mut buffer = vec![poison(ty, 0); end(problem, tensor, dims[n])];
            for ((place, b, i), &x) in places(problem, tensor, dims[n]).zip(elements) {
                // Nothing is read of the gradient of a row that is no query.
                if tensor == Tensor::Out || i < extras.lengths(problem, b).0 {
                    buffer[place] = to_bits(ty, x);
                }
            }
            inputs.push(guarded(ty, &buffer, poison(ty, 0)));
        }
        let (problem, extras) = (problem.clone(), forward.extras.clone());
        PreparedBackward { problem, inputs, lse, grad_lse, extras, before, expected, plain, terms, shared, untouched }
    }

    /// Computes the case twice and compares with the oracle.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn check(&self, context: &Context, options: &PlanOptions) -> Result<(), String> {
        let plan = context.plan_with(&self.problem, options).map_err(|error| error.to_string())?;
        let bits = self.run(context, &plan, 0)?;
        if self.run(context, &plan, 1)? != bits {
            return Err("two runs gave different bits".into());
        }
        self.compare(&bits).map(drop)
    }

    /// The bits of dq, dk and dv, contiguous, and of the gradients that scores share, of one run on freshly poisoned outputs.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn run(&self, context: &Context, plan: &Plan, round: u32) -> Result<Vec<Vec<u32>>, String> {
        self.take(&crate::forward::download(context, &self.submit(context, plan, round)?)?, round)
    }

    /// Submits one run on freshly poisoned outputs; the buffers of dq, dk and dv, then of the gradients that scores share.
    pub fn submit(&self, context: &Context, plan: &Plan, round: u32) -> Result<Vec<wgpu::Buffer>, String> {
        let (problem, ty) = (&self.problem, self.problem.element_type);
        let dims = input_dims(problem);
        let nan = poison(ty, round);
        let gradients = [Tensor::GradQuery, Tensor::GradKey, Tensor::GradValue];
        let inputs: Vec<_> = self.inputs.iter().map(|bytes| context.upload(bytes).unwrap()).collect();
        let outputs = [0, 1, 2].map(|n| {
            let mut elements = vec![nan; end(problem, gradients[n], dims[n])];
            if let Some(before) = &self.before {
                places(problem, gradients[n], dims[n])
                    .zip(&before[n])
                    .for_each(|((place, ..), &x)| elements[place] = to_bits(ty, x));
            }
            context.upload(&guarded(ty, &elements, nan)).unwrap()
        });
        let of_rows = |numbers: &[f32]| {
            let mut placed = vec![0.0; numbers.len()];
            row_places(problem).into_iter().zip(numbers).for_each(|(place, &x)| placed[place] = x);
            context.upload(bytemuck::cast_slice(&placed)).unwrap()
        };
        let (lse, grad_lse) = (of_rows(&self.lse), self.grad_lse.as_deref().map(of_rows));
        let extras = self.extras.upload(context, problem)?;
        let words = plan.backward_workspace_bytes() as usize / 4;
        let nan32 = poison(ElementType::F32, round);
        let workspace =
            (words > 0).then(|| context.upload(&guarded(ElementType::F32, &vec![nan32; words], nan32)).unwrap());
        // As few bytes as the layouts say.
        fn bind(buffer: &wgpu::Buffer, bytes: u64) -> BufferBinding<'_> {
            BufferBinding { buffer, offset: GUARD, size: wgpu::BufferSize::new(bytes.next_multiple_of(4).max(4)) }
        }
        let tensor = |buffer, tensor, n: usize| bind(buffer, end(problem, tensor, dims[n]) as u64 * ty.bytes());
        let [.., out, grad_out] = &inputs[..] else { unreachable!() };
        let input = |n: usize| if inputs.len() == 3 { &inputs[0] } else { &inputs[n] };
        let [q, k, v] = [(Tensor::Query, 0), (Tensor::Key, 1), (Tensor::Value, 2)].map(|(t, n)| tensor(input(n), t, n));
        let forward = ForwardBuffers::new(q, k, v, tensor(out, Tensor::Out, 3)).lse(&lse);
        let forward = extras.add_to(forward);
        let shared: Vec<_> = self
            .shared
            .iter()
            .map(|gradient| {
                let nan = poison(gradient.element_type, round);
                context.upload(&guarded(gradient.element_type, &gradient.before(round), nan)).unwrap()
            })
            .collect();
        let shared_at = |name: &str| {
            let n = self.shared.iter().position(|gradient| gradient.name == name)?;
            let gradient = &self.shared[n];
            Some(bind(&shared[n], gradient.expected.len() as u64 * gradient.element_type.bytes()))
        };
        let results = [(Tensor::GradQuery, 0), (Tensor::GradKey, 1), (Tensor::GradValue, 2)]
            .map(|(t, n)| tensor(&outputs[n], t, n));
        let buffers = BackwardBuffers::new(&forward, tensor(grad_out, Tensor::GradOut, 4), results)
            .grad_lse(grad_lse.as_ref())
            .grad_bias(shared_at("dbias"))
            .grad_sinks(shared_at("dsinks"))
            .grad_alibi_slopes(shared_at("dalibi_slopes"))
            .workspace(workspace.as_ref().map(|workspace| bind(workspace, plan.backward_workspace_bytes())));
        let mut encoder = context.device().create_command_encoder(&Default::default());
        plan.backward(&mut encoder, &buffers).map_err(|error| error.to_string())?;
        context.queue().submit([encoder.finish()]);
        Ok(outputs.into_iter().chain(shared).collect())
    }

    /// What the buffers of [`PreparedBackward::submit`] hold, if nothing else in them was written.
    pub fn take(&self, outputs: &[Vec<u8>], round: u32) -> Result<Vec<Vec<u32>>, String> {
        let (problem, ty) = (&self.problem, self.problem.element_type);
        let dims = input_dims(problem);
        let gradients = [Tensor::GradQuery, Tensor::GradKey, Tensor::GradValue];
        let read = |n: usize| {
            unguard(&outputs[n], ty, poison(ty, round), |end| {
                let mut taken = vec![false; end];
                let places: Vec<_> = places(problem, gradients[n], dims[n]).map(|(place, ..)| place).collect();
                places.iter().for_each(|&place| taken[place] = true);
                (places, taken)
            })
            .map_err(|error| format!("{}: {error}", NAMES[n]))
        };
        let read_shared = |n: usize| {
            let SharedGradient { name, element_type, expected, .. } = &self.shared[n];
            unguard(&outputs[3 + n], *element_type, poison(*element_type, round), |end| {
                let there = |place: &usize| expected.get(*place).is_some_and(|x| x.is_some());
                ((0..end).filter(there).collect(), (0..end).map(|place| there(&place)).collect())
            })
            .map_err(|error| format!("{name}: {error}"))
        };
        (0..3).map(read).chain((0..self.shared.len()).map(read_shared)).collect()
    }

    /// Compares with the oracle: what was found of dq, dk and dv.
    pub fn compare(&self, found: &[Vec<u32>]) -> Result<Vec<(&'static str, Verdict)>, String> {
        let ty = self.problem.element_type;
        let largest = |x: &mut dyn Iterator<Item = f64>| x.map(f64::abs).fold(0.0, f64::max);
        let largest_lse = largest(&mut self.lse.iter().filter(|x| x.is_finite()).map(|&x| x.into()));
        let (mut verdicts, mut broken) = (vec![], vec![]);
        for (n, name) in NAMES.into_iter().enumerate() {
            let expected = &self.expected[n];
            if found[n].len() != expected.len() {
                return Err(format!("{} elements of {name}, {} expected", found[n].len(), expected.len()));
            }
            let values: Vec<f64> = found[n].iter().map(|&bits| from_bits(ty, bits).into()).collect();
            let bound = Bound::gradient(ty, self.plain[n]);
            let bound = bound.with_huge_scores(largest_lse, largest(&mut expected.iter().copied()));
            let verdict = bound.judge(Errors::of_sums(values.iter().copied(), expected, self.terms[n]));
            verdicts.push((name, verdict));
            broken.extend(why_broken(name, &verdict, &values, expected, |place| format!("[{place}]")));
            let dim = values.len() / self.untouched[n].len().max(1);
            for (row, _) in self.untouched[n].iter().enumerate().filter(|(_, untouched)| **untouched) {
                if values[row * dim..][..dim].iter().any(|&x| x != 0.0) {
                    broken.push(format!("row {row} of {name} is not 0, though nothing is seen"));
                }
            }
        }
        for (gradient, found) in self.shared.iter().zip(&found[3..]) {
            let SharedGradient { name, element_type, expected, terms, .. } = gradient;
            let expected: Vec<f64> = expected.iter().copied().flatten().collect();
            let values: Vec<f64> = found.iter().map(|&bits| from_bits(*element_type, bits).into()).collect();
            if values.len() != expected.len() {
                return Err(format!("{} elements of {name}, {} expected", values.len(), expected.len()));
            }
            let bound = Bound::shared(ty);
            let bound = bound.with_huge_scores(largest_lse, largest(&mut expected.iter().copied()));
            let verdict = bound.judge(Errors::of_sums(values.iter().copied(), &expected, *terms));
            verdicts.push((name, verdict));
            broken.extend(why_broken(name, &verdict, &values, &expected, |place| format!("[{place}]")));
        }
        if broken.is_empty() { Ok(verdicts) } else { Err(broken.join("; ")) }
    }
}

/// Rows that see no key, and keys that no row sees (of k, and of v): their gradients are exactly 0.
fn untouched(problem: &Problem, lse: &[f32], extras: reference::Extras) -> [Vec<bool>; 3] {
    let s = &problem.shape;
    let mut keys = vec![];
    for b in 0..s.batch {
        let (queries, valid) = extras.lengths(problem, b);
        let sees = |i: u32, j: u32| {
            let (first, end) = problem.key_interval_of(i, queries, valid);
            (first..end).contains(&j)
        };
        let seen = |&j: &u32| (0..s.seqlen_q).any(|i| sees(i, j));
        let of_head: Vec<bool> = (0..s.seqlen_k).map(|j| !seen(&j)).collect();
        (0..s.heads_kv).for_each(|_| keys.extend(&of_head));
    }
    [lse.iter().map(|&x| x == f32::NEG_INFINITY).collect(), keys.clone(), keys]
}

const NAMES: [&str; 3] = ["dq", "dk", "dv"];

/// Runs every case in every way and reports all that fail.
#[cfg(not(target_arch = "wasm32"))]
pub fn check_all(cases: &[(String, PreparedBackward)], ways: &[(&str, &Context, PlanOptions)]) {
    crate::forward::check_each(cases, ways, PreparedBackward::check);
}

/// Inputs and expected gradients of cases in an element type.
pub fn prepare(
    cases: impl IntoIterator<Item = (String, Case)>,
    element_type: ElementType,
    ask: Ask,
) -> Vec<(String, PreparedBackward)> {
    cases
        .into_iter()
        .map(|(name, case)| (format!("{name}, {element_type}"), case.element_type(element_type).prepare_backward(ask)))
        .collect()
}
