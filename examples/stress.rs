//! Random problems for minutes, on real hardware: every kernel against the oracle, twice for the same bits.
//! `--help` lists the options.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use half::{bf16, f16};
use wgpu_flash_attention::{
    Alibi, Bias, BlockIndices, BlockLists, BlockMask, Causal, Context, CoopForm, Dropout, ElementType, Error,
    HeadlessOptions, Kernel, Layout, Mods, Plan, PlanOptions, Problem, ScoreLayout, Shape, Tensor, wgpu,
};

use fastrand::Rng;
use flash_attention_testing::buffers::{
    GradientBuffers, Inputs, Number, Outputs, Shared, Tensors, Upstream, adapter_name, bind, place, random,
};
use flash_attention_testing::sample::{GRADIENTS, GradientSample, Sample, affordable_whole, sample_rows};
use flash_attention_testing::timing::pass_times;
use flash_attention_testing::{Extras, score_elements};
use wgpu_flash_attention::reference::accept::Verdict;

/// Random shapes, options, biases, masks, slopes, sinks, dropout, block lists, mods, strides and element types, through every kernel that takes them, forward and backward, against
/// the oracle in f64.
/// Case n is made from seed + n alone.
#[derive(Parser)]
#[command(name = "stress", version)]
struct Args {
    /// How long; at least one case is run
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// The first case's seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The adapter whose name holds this text
    #[arg(long)]
    adapter: Option<String>,
    /// Opens the device with cooperative matrices, which wgpu calls experimental, and runs the coop kernel too, in each
    /// form that the device allows
    #[arg(long)]
    coop: bool,
}

/// True once in n.
fn once_in(rng: &mut Rng, n: u32) -> bool {
    rng.u32(0..n) == 0
}

fn random_shape(rng: &mut Rng, most: u32) -> Shape {
    let head_dim = |rng: &mut Rng| if once_in(rng, 2) { rng.u32(1..=256) } else { 16 << rng.u32(0..=4) };
    loop {
        let heads_kv = rng.u32(1..=3);
        let dim = head_dim(rng);
        let shape = Shape {
            batch: rng.u32(1..=3),
            heads_q: heads_kv * rng.u32(1..=4),
            heads_kv,
            seqlen_q: if once_in(rng, 3) { rng.u32(1..=16) } else { rng.u32(1..=most) },
            seqlen_k: if once_in(rng, 4) { rng.u32(0..=40) } else { rng.u32(1..=most) },
            head_dim: dim,
            head_dim_v: if once_in(rng, 2) { dim } else { head_dim(rng) },
        };
        // Of a few elements even the plain computation in 16 bits may be exact, and the bound nearly 0.
        if shape.rows() * shape.head_dim_v as u64 >= 256 {
            return shape;
        }
    }
}

/// Rows in this order or that; for inputs also gaps, of multiples of eight elements or of any size.
fn random_layout(rng: &mut Rng, heads: u32, rows: u32, dim: u32, gaps: bool) -> Layout {
    match rng.u32(0..=if gaps { 3 } else { 1 }) {
        0 => Layout::bhnd(heads, rows, dim),
        1 => Layout { batch: (heads * rows * dim) as u64, ..Layout::bnhd(heads, rows, dim) },
        n => {
            let unit = if n == 2 { 8 } else { 1 };
            let mut gap = || unit * rng.u32(0..=3) as u64;
            let row = (dim as u64).next_multiple_of(unit) + gap();
            let head = rows as u64 * row + gap();
            Layout { offset: gap(), batch: heads as u64 * head + gap(), head, row }
        }
    }
}

fn random_problem(rng: &mut Rng, most: u32, element_type: ElementType) -> Problem {
    let s = random_shape(rng, most);
    let mut problem = Problem::new(s, element_type)
        .with_lse()
        .with_layout(Tensor::Query, random_layout(rng, s.heads_q, s.seqlen_q, s.head_dim, true))
        .with_layout(Tensor::Key, random_layout(rng, s.heads_kv, s.seqlen_k, s.head_dim, true))
        .with_layout(Tensor::Value, random_layout(rng, s.heads_kv, s.seqlen_k, s.head_dim_v, true))
        .with_layout(Tensor::Out, random_layout(rng, s.heads_q, s.seqlen_q, s.head_dim_v, false));
    problem.scale = once_in(rng, 3).then(|| (3.0 * rng.f32() - 1.5) / (s.head_dim as f32).sqrt());
    problem.softcap = once_in(rng, 4).then(|| 0.5 + 20.0 * rng.f32());
    let diagonal = if once_in(rng, 2) { Causal::BottomRight } else { Causal::TopLeft };
    problem.causal = once_in(rng, 3).then_some(diagonal);
    let mut side = || once_in(rng, 4).then(|| rng.u32(0..=s.seqlen_k));
    (problem.window_left, problem.window_right) = (side(), side());
    problem.seqlens_k = once_in(rng, 3);
    problem.seqlens_q = once_in(rng, 4);
    problem
}

/// Bias, mask, ALiBi, sinks and dropout, each or not.
fn add_extras(rng: &mut Rng, problem: &mut Problem, extras: &mut Extras) {
    let s = problem.shape;
    // Each size is 1 or full.
    let layout = |rng: &mut Rng| {
        let sizes = [s.batch, s.heads_q, s.seqlen_q, s.seqlen_k].map(|n| if once_in(rng, 2) { 1 } else { n });
        ScoreLayout::contiguous(sizes).at(rng.u64(0..=3))
    };
    if once_in(rng, 3) {
        let element_type = if once_in(rng, 2) { ElementType::F32 } else { problem.element_type };
        let bias = Bias::new(element_type, layout(rng));
        let numbers = |rng: &mut Rng| match rng.u32(0..16) {
            0 => f32::NEG_INFINITY,
            1 => f32::MIN,
            // Exact in every type.
            _ => rng.i32(-32..32) as f32 / 8.0,
        };
        extras.bias = Some((0..score_elements(problem, &bias.layout)).map(|_| numbers(rng)).collect());
        problem.bias = Some(bias);
    }
    if once_in(rng, 4) {
        let layout = layout(rng);
        extras.mask = Some((0..score_elements(problem, &layout)).map(|_| !once_in(rng, 4)).collect());
        problem.mask = Some(layout);
    }
    if once_in(rng, 4) {
        let (alibi, heads) = match once_in(rng, 2) {
            true => (Alibi::PerHead, s.heads_q),
            false => (Alibi::PerBatchAndHead, s.batch * s.heads_q),
        };
        // Of both signs. Terms stay below 20, and lse with them, whose rounding gradients have.
        let most = 20.0 / (s.seqlen_q + s.seqlen_k) as f32;
        extras.alibi_slopes = Some((0..heads).map(|_| most * (1.5 * rng.f32() - 0.5)).collect());
        problem.alibi = Some(alibi);
    }
    if once_in(rng, 4) {
        let sink = |rng: &mut Rng| if once_in(rng, 6) { f32::NEG_INFINITY } else { 8.0 * rng.f32() - 4.0 };
        extras.sinks = Some((0..s.heads_q).map(|_| sink(rng)).collect());
        problem.sinks = true;
    }
    if once_in(rng, 4) {
        let dropout = Dropout { probability: 0.9 * rng.f32(), seed: rng.u64(..), offset: rng.u64(..) };
        problem.dropout = Some(dropout.probability);
        extras.dropout = Some(dropout);
    }
}

/// Texts of `score_mod`, smooth where scores are, so that errors stay small.
const SCORE_MODS: [&str; 6] = [
    "fn score_mod(score: f32, at: Position) -> f32 { return score; }",
    "fn score_mod(score: f32, at: Position) -> f32 { return 4.0 * tanh(score / 4.0); }",
    "fn score_mod(score: f32, at: Position) -> f32 { return select(score, 0.5 * score, at.j % 2u == 0u); }",
    // The derivative by hand.
    "fn score_mod(score: f32, at: Position) -> f32 { return score + 0.05 * score * abs(score); }
     fn score_mod_slope(score: f32, at: Position) -> f32 { return 1.0 + 0.1 * abs(score); }",
    "var<storage, read> slopes: array<f32>;
     fn score_mod(score: f32, at: Position) -> f32 {
         return score - slopes[at.h] * f32(abs(i32(at.i) + at.shift - i32(at.j)));
     }",
    "var<storage, read> table: array<f32>;
     fn score_mod(score: f32, at: Position) -> f32 {
         return score + table[clamp(i32(at.i) + at.shift - i32(at.j), -16, 15) + 16];
     }",
];

/// Texts of `mask_mod`.
const MASK_MODS: [&str; 4] = [
    "fn mask_mod(at: Position) -> bool { return (at.i + at.j + at.h) % 3u != 1u; }",
    "fn mask_mod(at: Position) -> bool { return at.j <= at.i + 7u; }",
    "var<storage, read> document: array<u32>;
     fn mask_mod(at: Position) -> bool { return document[at.i] == document[at.j]; }",
    "var<storage, read> prefix: array<i32>;
     fn mask_mod(at: Position) -> bool { return i32(at.j) < prefix[at.b] || i32(at.j) <= i32(at.i) + at.shift; }",
];

/// A `score_mod`, a `mask_mod`, or both, with what their buffers hold.
fn add_mods(rng: &mut Rng, problem: &mut Problem, extras: &mut Extras) {
    let s = problem.shape;
    let which = rng.u32(1..=3);
    let of_scores = if which & 1 > 0 { *rng.choice(&SCORE_MODS).unwrap_or(&"") } else { "" };
    let of_masks = if which & 2 > 0 { *rng.choice(&MASK_MODS).unwrap_or(&"") } else { "" };
    let mods = Mods::parse(&format!("{of_scores}\n{of_masks}")).unwrap_or_else(|error| panic!("{error}"));
    let most = 20.0 / (s.seqlen_q + s.seqlen_k) as f32;
    let mut contents = |name: &str| -> Vec<u8> {
        let floats = |values: &mut dyn Iterator<Item = f32>| values.flat_map(f32::to_le_bytes).collect();
        match name {
            "slopes" => floats(&mut (0..s.heads_q).map(|_| most * (1.5 * rng.f32() - 0.5))),
            "table" => floats(&mut (0..32).map(|_| rng.i32(-16..16) as f32 / 8.0)),
            "prefix" => (0..s.batch).flat_map(|_| rng.i32(0..=s.seqlen_k as i32).to_le_bytes()).collect(),
            // Past the end the last document goes on.
            _ => {
                let (positions, length) = (rng.u32(1..=s.seqlen_q.max(s.seqlen_k)), rng.u32(1..=s.seqlen_q));
                (0..positions).flat_map(|n| (n / length).to_le_bytes()).collect()
            }
        }
    };
    extras.mod_buffers = mods.buffers().map(|name| (name.to_string(), contents(name))).collect();
    problem.mods = Some(mods);
}

/// Block lists: by chance, or those that the device makes of the other masks.
fn add_blocks(rng: &mut Rng, context: &Context, problem: &mut Problem, extras: &mut Extras) -> Result<(), String> {
    let s = problem.shape;
    // In large problems none that are smaller than tiles: only the naive kernel takes these.
    let sizes = if s.seqlen_q.max(s.seqlen_k) > 300 { 6..=8 } else { 4..=7 };
    let lists = BlockLists::new().size(1 << rng.u32(sizes.clone()), 1 << rng.u32(sizes));
    if once_in(rng, 3) {
        problem.blocks = Some(lists);
        let mask =
            extras.upload(context, problem)?.blocks_of_masks(context, problem).map_err(|error| error.to_string())?;
        let all = problem.block_counts().iter().map(|&n| n as usize).product();
        extras.blocks = Some((vec![true; all], mask));
        return Ok(());
    }
    let lists = if once_in(rng, 2) { lists.per_batch() } else { lists };
    let lists = if once_in(rng, 2) { lists.per_head() } else { lists };
    problem.blocks = Some(lists);
    let [batch, heads, down, across] = problem.block_counts();
    let of_eight = rng.u32(3..=8);
    let (mut listed, mut counts, mut indices) = (vec![], [vec![], vec![]], [vec![], vec![]]);
    for _ in 0..batch * heads * down {
        // Of each row the partial blocks and the full ones.
        let mut rows = [vec![], vec![]];
        for block in 0..across as i32 {
            let is_listed = rng.u32(0..8) < of_eight;
            listed.push(is_listed);
            if is_listed {
                rows[rng.usize(0..2)].push(block);
            }
        }
        for (n, mut row) in rows.into_iter().enumerate() {
            counts[n].push(row.len() as i32);
            row.resize(across as usize, -1);
            indices[n].extend(row);
        }
    }
    let full = Some([&counts[1][..], &indices[1]]);
    let lists = BlockIndices { kv_num_blocks: &counts[0], kv_indices: &indices[0], full };
    let mask = BlockMask::from_lists(problem, &lists).map_err(|error| error.to_string())?;
    extras.blocks = Some((listed, mask));
    Ok(())
}

/// A contiguous tensor in another layout, NaN in the gaps and in rows from `count(batch entry)` on.
fn lay_out<T: Number>(
    data: &[T],
    layout: &Layout,
    [batch, heads, rows, dim]: [u32; 4],
    count: impl Fn(u32) -> u32,
) -> Vec<T> {
    let dim = dim as usize;
    let mut out = vec![];
    let all = (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..rows).map(move |i| [b, h, i])));
    for (row, at) in data.chunks(dim).zip(all) {
        let start = place(layout, at);
        out.resize(out.len().max(start + dim), T::nearest(f32::NAN));
        if at[2] < count(at[0]) {
            out[start..][..dim].copy_from_slice(row);
        }
    }
    out
}

/// Whether a plan may fail so: kernels do not take all problems, devices not all bindings, and tiles of the tables divide blocks of 128.
fn is_no_failure(error: &Error, problem: &Problem) -> bool {
    match error {
        Error::Unsupported { .. } | Error::StorageBuffers { .. } => true,
        Error::BlockTile { .. } => {
            problem.blocks.is_some_and(|lists| !lists.queries.is_multiple_of(128) || !lists.keys.is_multiple_of(128))
        }
        _ => false,
    }
}

/// Runs of each kernel, and its worst error as a part of what is allowed.
type Totals = BTreeMap<String, (u32, f64)>;

/// A kernel's backward pass, after its forward pass: twice for the same bits, and against the oracle.
fn run_backward<T: Number>(
    context: &Context,
    plan: &Plan,
    inputs: &Inputs,
    upstream: &Upstream<T>,
    sample: &GradientSample,
) -> Result<Vec<(&'static str, Verdict)>, String> {
    let words = |error: Error| error.to_string();
    let outputs = Outputs::poisoned(context, plan)?;
    pass_times(context, &[bind(plan, inputs, &outputs).map_err(words)?], 1, 1).map_err(words)?;
    let run = || -> Result<([Vec<T>; 3], Shared), String> {
        let gradients = GradientBuffers::poisoned(context, plan, upstream)?;
        let bound = gradients.bind(plan, inputs, &outputs).map_err(words)?;
        pass_times(context, &[bound], 1, 1).map_err(words)?;
        let (tensors, shared) =
            (gradients.read(context, plan.problem()), gradients.read_shared(context, plan.problem()));
        Ok((tensors.map_err(words)?, shared.map_err(words)?))
    };
    let [first, second] = [run()?, run()?];
    let bytes = |(tensors, shared): &([Vec<T>; 3], Shared)| {
        let shared = shared.iter().flatten().map(|values| bytemuck::cast_slice::<f32, u8>(values));
        let tensors = tensors.iter().map(|values| bytemuck::cast_slice::<T, u8>(values));
        tensors.chain(shared).map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    if bytes(&first) != bytes(&second) {
        return Err("two backward runs gave different bits".into());
    }
    let (tensors, shared) = first;
    let verdicts = GRADIENTS.into_iter().zip(sample.judge(plan.problem(), &tensors)?);
    Ok(verdicts.chain(sample.judge_shared(plan.problem(), &shared)?).collect())
}

fn run_case<T: Number>(context: &Context, seed: u64, totals: &mut Totals) -> Result<(), String> {
    let software = context.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
    let mut rng = Rng::with_seed(seed);
    let large = once_in(&mut rng, 4);
    let mut problem = random_problem(
        &mut rng,
        if software {
            100
        } else if large {
            3000
        } else {
            300
        },
        T::TYPE,
    );
    let shape = problem.shape;
    let s = &shape;
    let mut some = |all: u32| (0..s.batch).map(|_| rng.u32(0..=all) as i32).collect::<Vec<_>>();
    let keys = problem.seqlens_k.then(|| some(s.seqlen_k));
    let queries = problem.seqlens_q.then(|| some(s.seqlen_q));
    let mut extras = Extras { seqlens_q: queries, seqlens_k: keys, ..Default::default() };
    add_extras(&mut rng, &mut problem, &mut extras);
    if once_in(&mut rng, 4) {
        add_mods(&mut rng, &mut problem, &mut extras);
    }
    if once_in(&mut rng, 4) {
        add_blocks(&mut rng, context, &mut problem, &mut extras)?;
    }
    // Of the others nobody reads so many.
    let lengths = [&extras.seqlens_q, &extras.seqlens_k].map(Option::clone);
    let valid = |b: u32| extras.borrow().lengths(&problem, b);
    let q = [s.batch, s.heads_q, s.seqlen_q, s.head_dim];
    let [k, v] = [s.head_dim, s.head_dim_v].map(|dim| [s.batch, s.heads_kv, s.seqlen_k, dim]);
    let tensor = |dims: [u32; 4], n: u64| random::<T>(dims.iter().map(|&d| d as usize).product(), seed ^ n << 60);
    // Values of a mean other than 0: a relative error says nothing of sums that cancel.
    let value: Vec<T> = tensor(v, 3).into_iter().map(|x| T::nearest(0.7 + 0.5 * x.into() as f32)).collect();
    let tensors = Tensors { query: tensor(q, 1), key: tensor(k, 2), value, extras: extras.clone() };
    let laid_out = Tensors {
        query: lay_out(&tensors.query, &problem.layout(Tensor::Query), q, |b| valid(b).0),
        key: lay_out(&tensors.key, &problem.layout(Tensor::Key), k, |b| valid(b).1),
        value: lay_out(&tensors.value, &problem.layout(Tensor::Value), v, |b| valid(b).1),
        extras: extras.clone(),
    };
    let inputs = Inputs::upload(context, &problem, &laid_out)?;

    // All rows, or as many as the oracle computes in a moment.
    // A mod takes as long on the host as some hundred dimensions.
    let of_mods = if problem.mods.is_some() { 400 } else { 0 };
    let affordable = 20_000_000 / (s.seqlen_k as u64 * (s.head_dim + s.head_dim_v + of_mods) as u64).max(1);
    let step = s.rows().div_ceil(affordable.max(32)) as usize;
    let row = |n: u32| [n / s.seqlen_q / s.heads_q, n / s.seqlen_q % s.heads_q, n % s.seqlen_q];
    let rows = (0..s.rows() as u32).step_by(step).map(row).collect();
    let forward_sample = Sample::of(&problem, &tensors, rows);

    // Gradients of q, k and v have layouts of their own; that of o is laid out as inputs are.
    let mut with_gradients = problem
        .clone()
        .with_gradients()
        .with_layout(Tensor::GradOut, random_layout(&mut rng, s.heads_q, s.seqlen_q, s.head_dim_v, true))
        .with_layout(Tensor::GradQuery, random_layout(&mut rng, s.heads_q, s.seqlen_q, s.head_dim, false))
        .with_layout(Tensor::GradKey, random_layout(&mut rng, s.heads_kv, s.seqlen_k, s.head_dim, false))
        .with_layout(Tensor::GradValue, random_layout(&mut rng, s.heads_kv, s.seqlen_k, s.head_dim_v, false));
    let of_lse = once_in(&mut rng, 2);
    if of_lse {
        with_gradients = with_gradients.with_grad_lse();
    }
    if let Some(gradients) = &mut with_gradients.gradients {
        // Those that the oracle computes in a moment, in most cases.
        let (whole, mut ask) = (affordable_whole(s), || !once_in(&mut rng, 4));
        let with_mods = problem.mods.is_none() || s.rows() * s.seqlen_k as u64 <= 1 << 18;
        gradients.sinks = problem.sinks && ask();
        gradients.alibi_slopes = problem.alibi.is_some() && whole && with_mods && ask();
        gradients.bias = problem.bias.is_some_and(|bias| whole || bias.layout.row > 0) && with_mods && ask();
    }
    let o = [s.batch, s.heads_q, s.seqlen_q, s.head_dim_v];
    let grad_lse = of_lse.then(|| (0..s.rows()).map(|_| 2.0 * rng.f32() - 1.0).collect());
    let upstream = Upstream { out: tensor(o, 4), lse: grad_lse };
    let upstream_laid_out = Upstream {
        out: lay_out(&upstream.out, &with_gradients.layout(Tensor::GradOut), o, |b| valid(b).0),
        lse: upstream.lse.clone(),
    };
    let queries = sample_rows([s.batch, s.heads_q, s.seqlen_q], affordable.clamp(32, 512) / 4);
    let group_rows = s.group() as u64 * s.seqlen_q as u64 * (s.head_dim + s.head_dim_v + of_mods) as u64;
    let affordable_keys = (20_000_000 / group_rows).clamp(32, 512) / 4;
    let keys = sample_rows([s.batch, s.heads_kv, s.seqlen_k], affordable_keys);
    let sample = GradientSample::of(context, &with_gradients, &tensors, &upstream, queries, keys)
        .map_err(|what| format!("seed {seed}: {what}\n{problem:?}\n{lengths:?}"))?;

    let mut kernels = vec![(Kernel::Tile, None)];
    kernels.extend((s.rows() * s.seqlen_k as u64 <= 1 << 20).then_some((Kernel::Naive, None)));
    kernels.extend((s.seqlen_q <= 16 || s.group() as u64 * s.seqlen_q as u64 <= 64).then_some((Kernel::Decode, None)));
    kernels.extend([CoopForm::Registers, CoopForm::WorkgroupMemory].map(|form| (Kernel::Coop, Some(form))));
    let mut kernels: Vec<_> = kernels.into_iter().map(|(kernel, form)| (kernel, form, false)).collect();
    let has_bf16 = context.facts().matrices.as_ref().is_some_and(|matrices| matrices.bf16.is_ok());
    if T::TYPE == ElementType::BF16 && has_bf16 {
        kernels.push((Kernel::Coop, Some(CoopForm::Registers), true));
    }
    for (kernel, coop_form, scaled) in kernels {
        let name = coop_form.map_or(kernel.to_string(), |form| format!("{kernel} {form}"));
        let name = if scaled { format!("{name}, scaled") } else { name };
        let name = match (&problem.blocks, &problem.mods) {
            (None, None) => name,
            (Some(_), None) => format!("{name} by blocks"),
            (None, Some(_)) => format!("{name} with mods"),
            (Some(_), Some(_)) => format!("{name} by blocks with mods"),
        };
        let failed = |what: String| format!("seed {seed}: {name}: {what}\n{problem:?}\n{lengths:?}");
        let options = PlanOptions::default().kernel(kernel).coop_form(coop_form).scaled_bf16(scaled);
        let plan = match context.plan_with(&problem, &options) {
            Err(error) if is_no_failure(&error, &problem) => continue,
            plan => plan.map_err(|error| failed(error.to_string()))?,
        };
        let run = || -> Result<(Vec<T>, Vec<f32>), String> {
            let outputs = Outputs::poisoned(context, &plan)?;
            let bound = bind(&plan, &inputs, &outputs).map_err(|error| error.to_string())?;
            pass_times(context, &[bound], 1, 1).map_err(|error| error.to_string())?;
            outputs.read(context, &problem).map_err(|error| error.to_string())
        };
        let [first, second] = [run().map_err(failed)?, run().map_err(failed)?];
        let bytes =
            |(o, l): &(Vec<T>, Vec<f32>)| [bytemuck::cast_slice(o), bytemuck::cast_slice::<f32, u8>(l)].concat();
        if bytes(&first) != bytes(&second) {
            return Err(failed("two runs gave different bits".into()));
        }
        let verdicts = forward_sample.judge(&problem, &first.0, &first.1);
        for (what, verdict) in ["o", "lse"].into_iter().zip(verdicts) {
            if !verdict.holds {
                return Err(failed(format!("{what}: {verdict}")));
            }
            let (count, worst) = totals.entry(format!("{name}, {}, {what}", T::TYPE)).or_default();
            (*count, *worst) = (*count + 1, worst.max(verdict.ratio));
        }

        let options = options.backward(kernel);
        let plan = match context.plan_with(&with_gradients, &options) {
            Err(error) if is_no_failure(&error, &problem) => continue,
            plan => plan.map_err(|error| failed(error.to_string()))?,
        };
        let verdicts = run_backward(context, &plan, &inputs, &upstream_laid_out, &sample)
            .map_err(|what| failed(format!("{what}\n{with_gradients:?}")))?;
        for (what, verdict) in verdicts {
            if !verdict.holds {
                return Err(failed(format!("{what}: {verdict}\n{with_gradients:?}")));
            }
            let (count, worst) = totals.entry(format!("{name}, {}, {what}", T::TYPE)).or_default();
            (*count, *worst) = (*count + 1, worst.max(verdict.ratio));
        }
    }
    Ok(())
}

fn run(args: &Args) -> Result<bool, Box<dyn std::error::Error>> {
    let mut options = HeadlessOptions::default().cooperative_matrices(args.coop);
    options.adapter = args.adapter.clone();
    let context = Context::headless_with(&options)?;
    println!("adapter: {}", adapter_name(&context));
    if let Some(matrices) = &context.facts().matrices {
        let (f16, bf16) = (matrices.rounding, &matrices.bf16);
        match bf16 {
            Ok(bf16) => println!("matrices of f16, to which it rounds: {f16:?}; of bf16: {bf16:?}"),
            Err(why) => println!("matrices of f16, to which it rounds: {f16:?}; none of bf16: {why}"),
        }
    }
    let (start, mut totals, mut seed) = (Instant::now(), Totals::new(), args.seed);
    let failure = loop {
        let result = match seed % 3 {
            0 => run_case::<f32>(&context, seed, &mut totals),
            1 => run_case::<f16>(&context, seed, &mut totals),
            _ => run_case::<bf16>(&context, seed, &mut totals),
        };
        seed += 1;
        if result.is_err() || start.elapsed() >= Duration::from_secs_f64(60.0 * args.minutes) {
            break result.err();
        }
    };
    println!("{} cases, seeds {} to {}, {:.0} s", seed - args.seed, args.seed, seed - 1, start.elapsed().as_secs_f64());
    for (name, (count, worst)) in &totals {
        println!("{name:<48} {count:>6} runs, each twice; worst error {worst:.2} of what is allowed");
    }
    match &failure {
        None => println!("PASS"),
        Some(what) => println!("FAIL: {what}\nrepeat it with --minutes 0 --seed {}", seed - 1),
    }
    Ok(failure.is_none())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("stress: {error}");
            ExitCode::from(2)
        }
    }
}
