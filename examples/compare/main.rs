//! Times the kernels beside each other, after checking what they computed. `--help` lists the options.

mod arguments;
mod feature;
mod plot;
mod report;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use wgpu_flash_attention::{Context, HeadlessOptions, PlanOptions, Problem, Shape};

use flash_attention_testing::Extras;
use flash_attention_testing::buffers::{
    GradientBuffers, Inputs, Number, Outputs, Shared, Tensors, Upstream, adapter_name, bind, random, shared_buffers,
};
use flash_attention_testing::output::OutputFile;
use flash_attention_testing::sample::{GRADIENTS, GradientSample, Sample, sample_rows};
use flash_attention_testing::terminal::{bytes, harmless};
use flash_attention_testing::timing::{clock, measure, pass_times};

use arguments::{Args, Candidate, KernelName, Mask, Masks, Op, Type, candidates, refuse_idle};
use feature::Featured;
use plot::draw;
use report::{Figure, Report, Task, label};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What is wrong with a result, if anything.
fn check<T: Number>(sample: &Sample, problem: &Problem, out: &[T], lse: &[f32]) -> std::result::Result<(), String> {
    let is_nan = |&x: &T| -> bool { x.into().is_nan() };
    if out.iter().any(is_nan) || lse.iter().any(|x| x.is_nan()) {
        return Err("WRONG: some elements were not written or are NaN".into());
    }
    let broken = ["o", "lse"].into_iter().zip(sample.judge(problem, out, lse)).find(|(_, verdict)| !verdict.holds);
    broken.map_or(Ok(()), |(name, verdict)| Err(format!("WRONG: {name}: {verdict}")))
}

/// A problem, what every kernel is given of it, and what its outputs are checked with.
struct Subject {
    task: Task,
    inputs: Inputs,
    sample: Sample,
    /// Where the operations need it.
    gradients: Option<GradientSample>,
}

/// Checks and times one kernel on one problem.
fn compare_one<T: Number>(
    context: &Context,
    candidate: Candidate,
    op: Op,
    subject: &Subject,
    upstream: &Upstream<T>,
    // Bytes of what all kernels are given.
    given: u64,
    report: &mut Report,
) -> Result<()> {
    let name = candidate.to_string();
    let options = PlanOptions::default()
        .kernel(candidate.kernel)
        .tile(candidate.tile)
        .coop_tile(candidate.coop_tile)
        .coop_form(candidate.coop_form)
        .scaled_bf16(candidate.scaled_bf16)
        .coop_backward_tiles(candidate.coop_backward_tiles)
        .decode_tile(candidate.decode_tile)
        .splits(candidate.splits)
        .backward(candidate.kernel)
        .backward_tile(candidate.backward_tile)
        .fused_tile(candidate.fused_tile);
    let mut task = subject.task.clone();
    if op == Op::Forward {
        task.problem.gradients = None;
    }
    let problem = &task.problem;
    let plan = match context.plan_with(problem, &options) {
        Ok(plan) => plan,
        Err(error) => {
            report.refuse(&name, op, &task, &format!("refused: {error}"));
            return Ok(());
        }
    };
    let mut taken = given + output_bytes(problem) + plan.workspace_bytes();
    if op != Op::Forward {
        let shared = shared_buffers(problem).into_iter().flatten();
        taken += shared.map(|(element_type, n)| n * element_type.bytes()).sum::<u64>();
        taken += input_bytes(problem) + plan.backward_workspace_bytes();
    }
    report.most_bytes = report.most_bytes.max(taken);
    let outputs = Outputs::poisoned(context, &plan)?;
    let mut bound = vec![bind(&plan, &subject.inputs, &outputs)?];
    pass_times(context, &bound, 1, 1)?;
    let (out, lse) = outputs.read::<T>(context, problem)?;
    let mut checked = check(&subject.sample, problem, &out, &lse);
    let mut extra_bytes = 4 * problem.shape.rows();
    if op != Op::Backward {
        extra_bytes += plan.workspace_bytes();
    }
    if let (Ok(()), Some(sample), true) = (&checked, &subject.gradients, op != Op::Forward) {
        let gradients = GradientBuffers::poisoned(context, &plan, upstream)?;
        let backward = [gradients.bind(&plan, &subject.inputs, &outputs)?];
        pass_times(context, &backward, 1, 1)?;
        let found = gradients.read::<T>(context, problem)?;
        checked = check_gradients(sample, problem, &found, &gradients.read_shared(context, problem)?);
        extra_bytes += plan.backward_workspace_bytes();
        if op == Op::Backward {
            bound.clear();
        }
        bound.extend(backward);
    }
    if let Err(wrong) = checked {
        report.refuse(&name, op, &task, &wrong);
        report.all_right = false;
        return Ok(());
    }
    let time = measure(context, &bound)?;
    report.add(Figure { name, op, task, time, extra_bytes })
}

/// Of q, k and v, and so of their gradients.
fn input_bytes(problem: &Problem) -> u64 {
    let s = &problem.shape;
    let keys = s.batch as u64 * s.heads_kv as u64 * s.seqlen_k as u64;
    let elements = s.rows() * s.head_dim as u64 + keys * (s.head_dim + s.head_dim_v) as u64;
    elements * problem.element_type.bytes()
}

/// Of what the problem has besides.
fn extra_bytes(problem: &Problem, extras: &Extras) -> u64 {
    fn count<T>(values: &Option<Vec<T>>) -> u64 {
        values.as_ref().map_or(0, |values| values.len() as u64)
    }
    let bias = problem.bias.map_or(0, |bias| bias.element_type.bytes());
    let of_mods: u64 = extras.mod_buffers.iter().map(|(_, contents)| contents.len() as u64).sum();
    let of_heads = 4 * (count(&extras.alibi_slopes) + count(&extras.sinks));
    bias * count(&extras.bias) + count(&extras.mask) + of_heads + of_mods + problem.blocks_bytes()
}

/// Of o and lse.
fn output_bytes(problem: &Problem) -> u64 {
    problem.shape.rows() * (problem.shape.head_dim_v as u64 * problem.element_type.bytes() + 4)
}

/// What is wrong with the gradients, if anything.
fn check_gradients<T: Number>(
    sample: &GradientSample,
    problem: &Problem,
    found: &[Vec<T>; 3],
    shared: &Shared,
) -> std::result::Result<(), String> {
    let wrong = |wrong| format!("WRONG: {wrong}");
    let verdicts = GRADIENTS.into_iter().zip(sample.judge(problem, found).map_err(wrong)?);
    let shared = sample.judge_shared(problem, shared).map_err(wrong)?;
    let broken = verdicts.chain(shared).find(|(_, verdict)| !verdict.holds);
    broken.map_or(Ok(()), |(name, verdict)| Err(format!("WRONG: {name}: {verdict}")))
}

/// Every kernel on one shape in one element type.
fn compare_all<T: Number>(
    context: &Context,
    args: &Args,
    shape: Shape,
    masks: &[Mask],
    report: &mut Report,
) -> Result<()> {
    let problem = Problem::new(shape, T::TYPE).with_lse();
    problem.validate()?;
    let needed = args.op.iter().any(|&op| op != Op::Forward);
    let (inputs, outputs) = (input_bytes(&problem), output_bytes(&problem));
    let gradients = if needed { inputs + problem.shape.rows() * shape.head_dim_v as u64 * T::TYPE.bytes() } else { 0 };
    report.note(&format!(
        "{} {}: q, k and v take {} on the device and as much on the host, o and lse {}{}; workspaces come on top",
        label(&shape),
        T::TYPE,
        bytes(inputs),
        bytes(outputs),
        if needed { format!(", gradients {}", bytes(gradients)) } else { String::new() },
    ));
    let making = report.progress("making random inputs".into());
    let elements =
        |heads: u32, rows: u32| shape.batch as usize * heads as usize * rows as usize * shape.head_dim as usize;
    let mut tensors = Tensors::<T> {
        query: random(elements(shape.heads_q, shape.seqlen_q), 1),
        key: random(elements(shape.heads_kv, shape.seqlen_k), 2),
        value: random(elements(shape.heads_kv, shape.seqlen_k), 3),
        extras: Extras::default(),
    };
    let upstream = Upstream { out: random(elements(shape.heads_q, shape.seqlen_q), 4), lse: None };
    drop(making);
    for &mask in masks {
        let mut without = mask.add_to(problem.clone());
        if needed {
            without = without.with_gradients();
        }
        let (mut subjects, mut given) = (vec![], size_of_val(&upstream.out[..]) as u64);
        for feature in [None].into_iter().chain(args.feature.iter().copied().map(Some)) {
            let name = feature.map_or(String::new(), |feature| format!(" with {}", feature.name()));
            let checking = report.progress(format!("computing rows of {}{name} in f64, to check with", label(&shape)));
            report.bar.set_message(format!("rows of {}{name} in f64, to check with", label(&shape)));
            let Featured { mut problem, extras, share } = match feature {
                None => Featured::without(without.clone()),
                Some(feature) => feature.add_to(context, without.clone())?,
            };
            if let Some(gradients) = &mut problem.gradients {
                (gradients.bias, gradients.sinks) = (problem.bias.is_some(), problem.sinks);
            }
            tensors.extras = extras;
            let inputs = Inputs::upload(context, &problem, &tensors)?;
            given += input_bytes(&problem) + extra_bytes(&problem, &tensors.extras);
            let rows = sample_rows([shape.batch, shape.heads_q, shape.seqlen_q], args.checked_rows);
            let sample = Sample::of(&problem, &tensors, rows.clone());
            let keys = sample_rows([shape.batch, shape.heads_kv, shape.seqlen_k], args.checked_rows);
            let gradients = needed.then(|| GradientSample::of(context, &problem, &tensors, &upstream, rows, keys));
            let task = Task { problem, mask, feature, share };
            subjects.push(Subject { task, inputs, sample, gradients: gradients.transpose()? });
            drop(checking);
        }
        for &op in &args.op {
            for candidate in candidates(args, op) {
                for subject in &subjects {
                    let feature = subject.task.feature_name();
                    let what = format!("{candidate} {op} {} {} {feature}", T::TYPE, label(&shape));
                    report.bar.set_message(what.clone());
                    let _progress = report.progress(what);
                    compare_one(context, candidate, op, subject, &upstream, given, report)?;
                    report.bar.inc(1);
                }
            }
        }
    }
    Ok(())
}

fn run(mut args: Args) -> Result<bool> {
    // The yardstick first: naive in f32.
    args.dtype.sort();
    args.kernels.sort();
    args.feature.sort();
    args.feature.dedup();
    refuse_idle(&args)?;
    if args.csv.is_some() && args.csv == args.plot {
        return Err("--csv and --plot name one file".into());
    }
    // Opened first: what cannot be written is better known before than after minutes of measuring.
    let csv = args.csv.as_ref().map(|path| OutputFile::open(path, &[])).transpose()?;
    let plot = args.plot.as_ref().map(|path| OutputFile::open(path, &[])).transpose()?;
    let on_matrices = |kernel| [KernelName::Coop, KernelName::CoopScaled].contains(kernel);
    let mut options = HeadlessOptions::default().cooperative_matrices(args.kernels.iter().any(on_matrices));
    options.adapter = args.adapter.clone();
    let context = Context::headless_with(&options)?;
    let masks: &[_] = match (args.window, args.causal) {
        (Some(keys), _) => &[Mask::Window(keys)],
        (None, Masks::None) => &[Mask::None],
        (None, Masks::Only) => &[Mask::Causal],
        (None, Masks::Both) => &[Mask::None, Mask::Causal],
    };
    let candidates: usize = args.op.iter().map(|&op| candidates(&args, op).len()).sum();
    let count = args.shapes.len() * args.dtype.len() * masks.len() * candidates * (1 + args.feature.len());
    let bar = ProgressBar::new(count as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}")?);
    let mut report = Report { bar, csv, most_bytes: 0, figures: vec![], all_right: true };
    println!("adapter: {}", adapter_name(&context));
    println!(
        "times: {}; TFLOP/s: of the scores that count; speed-up: over naive in f32 on the same op and shape; over without: time over that of the same kernel \
         without the feature; over share: that over the share of its scores that still count",
        clock(&context)
    );
    report.header()?;
    let measured = compare_shapes(&context, &args, masks, &mut report);
    report.bar.finish_and_clear();
    // What was measured before an error is kept.
    report.csv.take().map_or(Ok(()), OutputFile::finish)?;
    measured?;
    report.note(&format!("the most in buffers at one time: {}", bytes(report.most_bytes)));
    if let Some(mut plot) = plot.filter(|_| !report.figures.is_empty()) {
        let svg = draw(&report.figures, &adapter_name(&context))?;
        plot.write_all(svg.as_bytes()).map_err(|error| format!("{}: {error}", plot.path().display()))?;
        plot.finish()?;
    }
    Ok(report.all_right)
}

fn compare_shapes(context: &Context, args: &Args, masks: &[Mask], report: &mut Report) -> Result<()> {
    for &shape in &args.shapes {
        for &dtype in &args.dtype {
            match dtype {
                Type::F32 => compare_all::<f32>(context, args, shape, masks, report)?,
                Type::F16 => compare_all::<half::f16>(context, args, shape, masks, report)?,
                Type::Bf16 => compare_all::<half::bf16>(context, args, shape, masks, report)?,
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("compare: {}", harmless(&error.to_string(), true));
            ExitCode::from(2)
        }
    }
}
