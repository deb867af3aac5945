//! Backward passes by cases: as for the forward pass, gaps and poison everywhere, and every gradient compared with the oracle.

use wgpu_flash_attention::tune::FusedTile;
use wgpu_flash_attention::wgpu::{self, BufferBinding};
use wgpu_flash_attention::{
    BackwardBuffers, Context, ElementType, ForwardBuffers, Kernel, Layout, Plan, PlanOptions, Problem, Tensor,
    reference,
};

use super::{
    Case, GUARD, Inputs, Lengths, Measured, Prepared, Rng, end, from_bits, guarded, places, poison, tensor_dims,
    to_bits, unguard,
};

/// The plan's own choice of forward kernel, and this one for the backward pass.
pub fn backward(kernel: Kernel) -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Tile).backward(kernel)
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
    lengths: Lengths,
    /// What dq, dk and dv hold before, contiguous, in the problem's type; where they accumulate.
    before: Option<[Vec<f32>; 3]>,
    pub expected: [Vec<f64>; 3],
    /// The largest error of the plain computation in the problem's type, of each; of use in 16-bit types.
    plain_error: [f64; 3],
    /// The norm of the terms of each, added in squares: what would be left if p·dp and p·delta did not cancel.
    terms: [f64; 3],
    /// Whether a row of dq, or of dk and dv, has nothing to do with any key, or row.
    untouched: [Vec<bool>; 3],
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
        }
        // Keys that share a place have gradients of their own.
        if problem.layout(Tensor::Key).batch == 0 {
            problem = problem
                .with_layout(Tensor::GradKey, Layout::bhnd(shape.heads_kv, shape.seqlen_k, shape.head_dim))
                .with_layout(Tensor::GradValue, Layout::bhnd(shape.heads_kv, shape.seqlen_k, shape.head_dim_v));
        }
        let mut rng = Rng(0x9ad);
        let mut numbers =
            |n: usize, low: f32, high: f32| -> Vec<f32> { (0..n).map(|_| low + (high - low) * rng.unit()).collect() };
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
        let lengths = forward.lengths.borrow();
        let exact = reference::backward(problem, [&q, &k, &v, &grad_out], grad_lse.as_deref(), lengths);
        let exact = [exact.query, exact.key, exact.value];
        let (plain, terms) = plain(problem, [&q, &k, &v, &out, &grad_out], &lse, grad_lse.as_deref(), lengths);
        let sum = |n: usize, place: usize, x: f64| x + before.as_ref().map_or(0.0, |before| before[n][place] as f64);
        let expected: [Vec<f64>; 3] =
            [0, 1, 2].map(|n| exact[n].iter().enumerate().map(|(place, &x)| sum(n, place, x)).collect());
        let plain_error = [0, 1, 2].map(|n| {
            let rounded =
                |place: usize| from_bits(ty, to_bits(ty, sum(n, place, plain[n][place] as f64) as f32)) as f64;
            error(ty, (0..plain[n].len()).map(rounded), &expected[n], terms[n])
        });
        let untouched = match before {
            Some(_) => [vec![], vec![], vec![]],
            None => untouched(problem, &lse, lengths),
        };

        let mut inputs = forward.inputs;
        for (tensor, n, elements) in [(Tensor::Out, 3, &out), (Tensor::GradOut, 4, &grad_out)] {
            let layout = &problem.layout(tensor);
            let mut buffer = vec![poison(ty, 0); end(layout, dims[n])];
            for ((place, b, i), &x) in places(layout, dims[n]).zip(elements) {
                // Nothing is read of the gradient of a row that is no query.
                if tensor == Tensor::Out || i < lengths.of(problem, b).0 {
                    buffer[place] = to_bits(ty, x);
                }
            }
            inputs.push(guarded(ty, &buffer, poison(ty, 0)));
        }
        let (problem, lengths) = (problem.clone(), forward.lengths.clone());
        PreparedBackward { problem, inputs, lse, grad_lse, lengths, before, expected, plain_error, terms, untouched }
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

    /// The bits of dq, dk and dv, contiguous, of one run on freshly poisoned outputs.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn run(&self, context: &Context, plan: &Plan, round: u32) -> Result<[Vec<u32>; 3], String> {
        self.take(&super::download(context, &self.submit(context, plan, round)?)?, round)
    }

    /// Submits one run on freshly poisoned outputs; the buffers of dq, dk and dv.
    pub fn submit(&self, context: &Context, plan: &Plan, round: u32) -> Result<Vec<wgpu::Buffer>, String> {
        let (problem, ty) = (&self.problem, self.problem.element_type);
        let dims = input_dims(problem);
        let nan = poison(ty, round);
        let layouts = [Tensor::GradQuery, Tensor::GradKey, Tensor::GradValue].map(|tensor| problem.layout(tensor));
        let layouts = layouts.each_ref();
        let inputs: Vec<_> = self.inputs.iter().map(|bytes| context.upload(bytes).unwrap()).collect();
        let outputs = [0, 1, 2].map(|n| {
            let mut elements = vec![nan; end(layouts[n], dims[n])];
            if let Some(before) = &self.before {
                places(layouts[n], dims[n])
                    .zip(&before[n])
                    .for_each(|((place, ..), &x)| elements[place] = to_bits(ty, x));
            }
            context.upload(&guarded(ty, &elements, nan)).unwrap()
        });
        let of_rows = |numbers: &[f32]| context.upload(bytemuck::cast_slice(numbers)).unwrap();
        let (lse, grad_lse) = (of_rows(&self.lse), self.grad_lse.as_deref().map(of_rows));
        let [seqlens_q, seqlens_k] = self.lengths.upload(context);
        let words = plan.backward_workspace_bytes() as usize / 4;
        let nan32 = poison(ElementType::F32, round);
        let workspace =
            (words > 0).then(|| context.upload(&guarded(ElementType::F32, &vec![nan32; words], nan32)).unwrap());
        // As few bytes as the layouts say.
        fn bind(buffer: &wgpu::Buffer, bytes: u64) -> BufferBinding<'_> {
            BufferBinding { buffer, offset: GUARD, size: wgpu::BufferSize::new(bytes.next_multiple_of(4).max(4)) }
        }
        let tensor = |buffer, tensor, n: usize| bind(buffer, end(&problem.layout(tensor), dims[n]) as u64 * ty.bytes());
        let [.., out, grad_out] = &inputs[..] else { unreachable!() };
        let input = |n: usize| if inputs.len() == 3 { &inputs[0] } else { &inputs[n] };
        let [q, k, v] = [(Tensor::Query, 0), (Tensor::Key, 1), (Tensor::Value, 2)].map(|(t, n)| tensor(input(n), t, n));
        let forward = ForwardBuffers::new(q, k, v, tensor(out, Tensor::Out, 3)).lse(&lse);
        let forward = forward.seqlens_q(seqlens_q.as_ref()).seqlens_k(seqlens_k.as_ref());
        let results = [(Tensor::GradQuery, 0), (Tensor::GradKey, 1), (Tensor::GradValue, 2)]
            .map(|(t, n)| tensor(&outputs[n], t, n));
        let buffers = BackwardBuffers::new(&forward, tensor(grad_out, Tensor::GradOut, 4), results)
            .grad_lse(grad_lse.as_ref())
            .workspace(workspace.as_ref().map(|workspace| bind(workspace, plan.backward_workspace_bytes())));
        let mut encoder = context.device().create_command_encoder(&Default::default());
        plan.backward(&mut encoder, &buffers).map_err(|error| error.to_string())?;
        context.queue().submit([encoder.finish()]);
        Ok(outputs.into())
    }

    /// What the buffers of [`PreparedBackward::submit`] hold, if nothing else in them was written.
    pub fn take(&self, outputs: &[Vec<u8>], round: u32) -> Result<[Vec<u32>; 3], String> {
        let (problem, ty) = (&self.problem, self.problem.element_type);
        let dims = input_dims(problem);
        let layouts = [Tensor::GradQuery, Tensor::GradKey, Tensor::GradValue].map(|tensor| problem.layout(tensor));
        let read = |n: usize| {
            unguard(&outputs[n], ty, poison(ty, round), |end| {
                let mut taken = vec![false; end];
                let places: Vec<_> = places(&layouts[n], dims[n]).map(|(place, ..)| place).collect();
                places.iter().for_each(|&place| taken[place] = true);
                (places, taken)
            })
            .map_err(|error| format!("{}: {error}", NAMES[n]))
        };
        Ok([read(0)?, read(1)?, read(2)?])
    }

    /// Compares with the oracle, under the bounds of the design.
    pub fn compare(&self, found: &[Vec<u32>; 3]) -> Result<Vec<Measured>, String> {
        let ty = self.problem.element_type;
        let (mut problems, mut measured) = (vec![], vec![]);
        // lse is given in f32, and so are scores: where they are huge, this is how well a probability can be known.
        let largest_lse = self.lse.iter().filter(|x| x.is_finite()).fold(0.0, |most, x| f32::max(most, x.abs()));
        let lse_error = f32::EPSILON as f64 * largest_lse as f64;
        for n in 0..3 {
            let expected = &self.expected[n];
            if found[n].len() != expected.len() {
                return Err(format!("{} elements of {}, {} expected", found[n].len(), NAMES[n], expected.len()));
            }
            let values: Vec<f64> = found[n].iter().map(|&bits| from_bits(ty, bits) as f64).collect();
            let error = error(ty, values.iter().copied(), expected, self.terms[n]);
            let (measure, bound) = match ty {
                ElementType::F32 => ("relative", f64::max(5e-6, lse_error)),
                _ => {
                    let largest = expected.iter().fold(0.0, |most, e| f64::max(most, e.abs()));
                    ("largest", 2.0 * self.plain_error[n] + 1e-5 + lse_error * largest)
                }
            };
            measured.push(Measured { name: NAMES[n], error, bound });
            // Written so that NaN does not pass.
            if !matches!(error.partial_cmp(&bound), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
                let off = |place: &usize| (values[*place] - expected[*place]).abs();
                let worst = (0..values.len()).max_by(|a, b| off(a).total_cmp(&off(b))).unwrap_or(0);
                let (name, x, e) = (NAMES[n], values[worst], expected[worst]);
                problems.push(format!(
                    "{name}: {measure} error {error:e} > {bound:e}, worst at {worst}: {x}, {e} expected"
                ));
            }
            let dim = values.len() / self.untouched[n].len().max(1);
            for (row, _) in self.untouched[n].iter().enumerate().filter(|(_, untouched)| **untouched) {
                if values[row * dim..][..dim].iter().any(|&x| x != 0.0) {
                    problems.push(format!("row {row} of {} is not 0, though nothing is seen", NAMES[n]));
                }
            }
        }
        if problems.is_empty() { Ok(measured) } else { Err(problems.join("; ")) }
    }
}

/// The relative error in f32, the largest in other types; NaN if any value is. Gradients that cancel (a row with one key has
/// none) are nothing to be relative to; their terms are.
fn error(ty: ElementType, found: impl Iterator<Item = f64>, expected: &[f64], terms: f64) -> f64 {
    let errors = found.zip(expected).map(|(x, e)| (x - e).abs());
    match ty {
        ElementType::F32 => {
            let norm = expected.iter().map(|e| e * e).sum::<f64>().sqrt();
            errors.map(|e| e * e).sum::<f64>().sqrt() / norm.max(terms).max(f64::MIN_POSITIVE)
        }
        _ => errors.fold(0.0, |most, e| if e > most || e.is_nan() { e } else { most }),
    }
}

/// Rows that see no key, and keys that no row sees (of k, and of v): their gradients are exactly 0.
fn untouched(problem: &Problem, lse: &[f32], lengths: reference::Lengths) -> [Vec<bool>; 3] {
    let s = &problem.shape;
    let mut keys = vec![];
    for b in 0..s.batch {
        let (queries, valid) = lengths.of(problem, b);
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

/// What one would write in the type itself: scores, probabilities and sums in f32; p, the score gradients and the results rounded.
/// The results are not rounded here. Also the norms of the terms.
fn plain(
    problem: &Problem,
    [q, k, v, out, grad_out]: [&[f32]; 5],
    lse: &[f32],
    grad_lse: Option<&[f32]>,
    lengths: reference::Lengths,
) -> ([Vec<f32>; 3], [f64; 3]) {
    let s = &problem.shape;
    let ty = problem.element_type;
    let (d, dv) = (s.head_dim as usize, s.head_dim_v as usize);
    let round = |x: f32| from_bits(ty, to_bits(ty, x));
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    let add = |sum: &mut [f32], factor: f32, x: &[f32]| sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x);
    let squares = |x: &[f32]| x.iter().map(|&x| (x as f64).powi(2)).sum::<f64>();
    let mut result = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
    let mut terms = [0.0; 3];
    for n in 0..s.rows() as usize {
        let (i, head) = (n % s.seqlen_q as usize, n / s.seqlen_q as usize);
        let (b, h) = (head / s.heads_q as usize, head % s.heads_q as usize);
        let (queries, keys) = lengths.of(problem, b as u32);
        let (first, last) = problem.key_interval_of(i as u32, queries, keys);
        let grad = &grad_out[n * dv..][..dv];
        let delta = dot(grad, &out[n * dv..][..dv]) - grad_lse.map_or(0.0, |grad| grad[n]);
        for j in first..last {
            let m = (b * s.heads_kv as usize + h / s.group() as usize) * s.seqlen_k as usize + j as usize;
            let scaled = problem.effective_scale() * dot(&q[n * d..][..d], &k[m * d..][..d]);
            let (score, slope) = problem.softcap.map_or((scaled, 1.0), |cap| {
                let t = (scaled / cap).tanh();
                (cap * t, 1.0 - t * t)
            });
            let p = (score - lse[n]).exp();
            let dp = dot(grad, &v[m * dv..][..dv]);
            let ds = round(p * (dp - delta) * slope) * problem.effective_scale();
            let term = (p * (dp.abs() + delta.abs()) * slope * problem.effective_scale()) as f64;
            terms[0] += term.powi(2) * squares(&k[m * d..][..d]);
            terms[1] += term.powi(2) * squares(&q[n * d..][..d]);
            add(&mut result[0][n * d..][..d], ds, &k[m * d..][..d]);
            add(&mut result[1][m * d..][..d], ds, &q[n * d..][..d]);
            add(&mut result[2][m * dv..][..dv], round(p), grad);
        }
    }
    (result, terms.map(f64::sqrt))
}

/// Runs every case in every way and reports all that fail.
#[cfg(not(target_arch = "wasm32"))]
pub fn check_all(cases: &[(String, PreparedBackward)], ways: &[(&str, &Context, PlanOptions)]) {
    super::check_each(cases, ways, PreparedBackward::check);
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
