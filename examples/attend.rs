//! Attention on a safetensors file, to check this crate against your own framework. `--help` lists the options.

mod support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use wgpu_flash_attention::{
    BoundPass, Causal, Context, ElementType, HeadlessOptions, Kernel, MAX_SEQLEN, PlanOptions, Problem, Shape,
    reference,
};

use support::{
    Errors, Expected, GRADIENTS, GradientBuffers, Inputs, Number, Outputs, PlainGradients, Tensors, Upstream,
    sample_rows,
};

/// What stops the command, in one line.
type Result<T> = std::result::Result<T, String>;

/// Queries, keys and values of a real model, with the expected o, lse and gradients.
const FIXTURE: &[u8] = include_bytes!("../tests/data/minilm_layer5.safetensors");

/// Attention on a safetensors file.
///
/// Reads q [B,Hq,Nq,D], k [B,Hkv,Nk,D] and v [B,Hkv,Nk,Dv] in F32, F16 or BF16 and, if there is one, seqlens_k [B] in
/// I32 or I64: how many keys of each batch entry count. Where the file also holds the expected o [B,Hq,Nq,Dv] or
/// lse [B,Hq,Nq], compares with them; with --backward also with dq, dk and dv.
#[derive(Parser)]
#[command(
    after_help = "Exit code: 0 if all went well, 1 if the result is too far from the expected one, 2 for bad input."
)]
struct Args {
    /// The file; without it, one layer of all-MiniLM-L6-v2 on three short texts
    input: Option<PathBuf>,
    /// Computes gradients too: reads do [B,Hq,Nq,Dv], that of o, and, if there is one, dlse [B,Hq,Nq], that of lse; gives dq,
    /// dk and dv
    #[arg(long)]
    backward: bool,
    /// Writes o and lse, and gradients, to this file
    #[arg(short, value_name = "OUTPUT.safetensors")]
    output: Option<PathBuf>,
    /// What computes: a kernel, or the reference in f64 on the host
    #[arg(long, value_enum, default_value = "auto")]
    kernel: KernelName,
    /// Converts q, k, v and do to this type first; o and gradients get it too [default: the file's]
    #[arg(long, value_enum)]
    dtype: Option<Type>,
    /// Masks keys after the query, counted from the last or from the first query and key
    #[arg(long, value_enum)]
    causal: Option<Diagonal>,
    /// Masks keys further than this before and after the query; -1 is open
    #[arg(long, value_name = "LEFT,RIGHT", value_parser = parse_window, allow_hyphen_values = true)]
    window: Option<Window>,
    /// Factor of the scores [default: 1/sqrt(D)]
    #[arg(long, allow_negative_numbers = true)]
    scale: Option<f32>,
    /// Scores become softcap · tanh(score / softcap)
    #[arg(long, allow_negative_numbers = true)]
    softcap: Option<f32>,
    /// Where the coop kernel keeps scores and probabilities; without it, the faster of what the device allows
    #[arg(long, value_enum)]
    coop_form: Option<support::Form>,
    /// The adapter whose name holds this text
    #[arg(long, value_name = "SUBSTRING")]
    adapter: Option<String>,
    /// Runs the kernels with bounds checks
    #[arg(long)]
    checked: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum KernelName {
    Auto,
    Naive,
    Tile,
    /// Opens the device with cooperative matrices, which wgpu calls experimental
    Coop,
    Decode,
    Reference,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum Diagonal {
    BottomRight,
    TopLeft,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    left: Option<u32>,
    right: Option<u32>,
}

fn parse_window(text: &str) -> Result<Window> {
    let side = |text: &str| match text.trim().parse::<i64>() {
        Ok(-1) => Ok(None),
        Ok(n) if (0..=MAX_SEQLEN as i64).contains(&n) => Ok(Some(n as u32)),
        _ => Err(format!("{text:?} is not a whole number from 0 to {MAX_SEQLEN}, nor -1 for an open side")),
    };
    let (left, right) = text.split_once(',').ok_or("two numbers separated by a comma are expected")?;
    Ok(Window { left: side(left)?, right: side(right)? })
}

/// A tensor of floats, whatever their type in the file.
struct Floats {
    values: Vec<f64>,
    shape: Vec<usize>,
    dtype: Dtype,
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Result<Floats> {
    let view = file.tensor(name).map_err(|_| {
        let mut names = file.names();
        names.sort();
        format!("the file has no tensor {name}; it has: {}", names.join(", "))
    })?;
    let data = view.data();
    let values = match view.dtype() {
        Dtype::F64 => bytemuck::pod_collect_to_vec(data),
        Dtype::F32 => decode::<f32>(data),
        Dtype::F16 => decode::<half::f16>(data),
        Dtype::BF16 => decode::<half::bf16>(data),
        other => return Err(format!("{name} is {other}; it must be F32, F16 or BF16")),
    };
    Ok(Floats { values, shape: view.shape().to_vec(), dtype: view.dtype() })
}

fn decode<T: Number>(data: &[u8]) -> Vec<f64> {
    bytemuck::pod_collect_to_vec::<u8, T>(data).into_iter().map(T::into).collect()
}

/// A tensor to compute with.
fn input(file: &SafeTensors<'_>, name: &str) -> Result<Floats> {
    let tensor = floats(file, name)?;
    if tensor.dtype == Dtype::F64 {
        return Err(format!("{name} is F64; it must be F32, F16 or BF16"));
    }
    Ok(tensor)
}

/// q, k or v, with its four sizes.
fn input_and_sizes(file: &SafeTensors<'_>, name: &str) -> Result<(Floats, [u32; 4])> {
    let tensor = input(file, name)?;
    let shape = &tensor.shape;
    let sizes: [usize; 4] = shape[..].try_into().map_err(|_| {
        format!("{name} has {} dimensions, {shape:?}; it must have four: [batch, heads, positions, dim]", shape.len())
    })?;
    let small = |n: usize| u32::try_from(n).map_err(|_| format!("{name} has shape {shape:?}; a size is above 2^32"));
    let [b, h, n, d] = sizes.map(small);
    let sizes = [b?, h?, n?, d?];
    Ok((tensor, sizes))
}

/// The key lengths, if the file has any.
fn lengths(file: &SafeTensors<'_>, batch: u32, seqlen_k: u32) -> Result<Option<Vec<i32>>> {
    let Ok(view) = file.tensor("seqlens_k") else {
        return Ok(None);
    };
    let values: Vec<i64> = match view.dtype() {
        Dtype::I32 => bytemuck::pod_collect_to_vec::<u8, i32>(view.data()).into_iter().map(i64::from).collect(),
        Dtype::I64 => bytemuck::pod_collect_to_vec(view.data()),
        other => return Err(format!("seqlens_k is {other}; it must be I32 or I64")),
    };
    if view.shape() != [batch as usize] {
        return Err(format!("seqlens_k has shape {:?}; q and k need [{batch}]", view.shape()));
    }
    if let Some(n) = values.iter().position(|length| !(0..=seqlen_k as i64).contains(length)) {
        let length = values[n];
        return Err(format!("seqlens_k[{n}] is {length}; it must be from 0 to {seqlen_k}, the number of keys"));
    }
    Ok(Some(values.into_iter().map(|length| length as i32).collect()))
}

/// An expected result, if the file has it.
fn expected(file: &SafeTensors<'_>, name: &str, shape: &[u32]) -> Result<Option<Vec<f64>>> {
    if !file.names().contains(&name) {
        return Ok(None);
    }
    let tensor = floats(file, name)?;
    if !has_shape(&tensor, shape) {
        return Err(format!("the expected {name} has shape {:?}; q, k and v give {shape:?}", tensor.shape));
    }
    Ok(Some(tensor.values))
}

fn has_shape(tensor: &Floats, shape: &[u32]) -> bool {
    tensor.shape.iter().copied().eq(shape.iter().map(|&n| n as usize))
}

/// What the file asks for.
struct Task {
    problem: Problem,
    query: Vec<f64>,
    key: Vec<f64>,
    value: Vec<f64>,
    seqlens_k: Option<Vec<i32>>,
    out: Option<Vec<f64>>,
    lse: Option<Vec<f64>>,
    backward: Option<BackwardTask>,
}

struct BackwardTask {
    grad_out: Floats,
    grad_lse: Option<Vec<f32>>,
    /// dq, dk and dv.
    expected: [Option<Vec<f64>>; 3],
}

fn read_backward(file: &SafeTensors<'_>, q: &[u32; 4], k: &[u32; 4], v: &[u32; 4]) -> Result<BackwardTask> {
    let given = |name, shape: &[u32]| -> Result<Floats> {
        let tensor = input(file, name)?;
        if !has_shape(&tensor, shape) {
            return Err(format!("{name} has shape {:?}; q, k and v need {shape:?}", tensor.shape));
        }
        Ok(tensor)
    };
    let grad_out = given("do", &[q[0], q[1], q[2], v[3]])?;
    let grad_lse = file.names().contains(&"dlse").then(|| given("dlse", &q[..3])).transpose()?;
    let [name_q, name_k, name_v] = GRADIENTS;
    Ok(BackwardTask {
        grad_out,
        grad_lse: grad_lse.map(|tensor| tensor.values.into_iter().map(|x| x as f32).collect()),
        expected: [expected(file, name_q, q)?, expected(file, name_k, k)?, expected(file, name_v, v)?],
    })
}

fn read(file: &SafeTensors<'_>, args: &Args) -> Result<Task> {
    let [query, key, value] = ["q", "k", "v"].map(|name| input_and_sizes(file, name));
    let ((query, q), (key, k), (value, v)) = (query?, key?, value?);
    if [k[0], k[3]] != [q[0], q[3]] {
        return Err(format!("k has shape {k:?} and q has {q:?}; batch (first) and head dim (last) must be equal"));
    }
    if v[..3] != k[..3] {
        return Err(format!("v has shape {v:?} and k has {k:?}; all but the last size must be equal"));
    }
    if k[1] == 0 || q[1] % k[1] != 0 {
        return Err(format!("k and v have {} heads and q has {}; theirs must divide q's", k[1], q[1]));
    }
    let backward = args.backward.then(|| read_backward(file, &q, &k, &v)).transpose()?;
    if let (Some(backward), None) = (&backward, args.dtype) {
        let (q, grad_out) = (query.dtype, backward.grad_out.dtype);
        if grad_out != q {
            return Err(format!("q is {q} and do is {grad_out}; --dtype converts them to one type"));
        }
    }
    let element_type = match (args.dtype, query.dtype) {
        (Some(Type::F32), _) => ElementType::F32,
        (Some(Type::F16), _) => ElementType::F16,
        (Some(Type::Bf16), _) => ElementType::BF16,
        (None, dtype) if [key.dtype, value.dtype] != [dtype, dtype] => {
            let (k, v) = (key.dtype, value.dtype);
            return Err(format!("q is {dtype}, k is {k} and v is {v}; --dtype converts them to one type"));
        }
        (None, Dtype::F16) => ElementType::F16,
        (None, Dtype::BF16) => ElementType::BF16,
        (None, _) => ElementType::F32,
    };
    let shape = Shape {
        batch: q[0],
        heads_q: q[1],
        heads_kv: k[1],
        seqlen_q: q[2],
        seqlen_k: k[2],
        head_dim: q[3],
        head_dim_v: v[3],
    };
    let seqlens_k = lengths(file, q[0], k[2])?;
    let window = args.window.unwrap_or(Window { left: None, right: None });
    let mut problem = Problem::new(shape, element_type).window(window.left, window.right).with_lse();
    (problem.scale, problem.softcap, problem.seqlens_k) = (args.scale, args.softcap, seqlens_k.is_some());
    problem.causal = args.causal.map(|diagonal| match diagonal {
        Diagonal::BottomRight => Causal::BottomRight,
        Diagonal::TopLeft => Causal::TopLeft,
    });
    if let Some(backward) = &backward {
        problem = if backward.grad_lse.is_some() { problem.with_grad_lse() } else { problem.with_gradients() };
    }
    problem.validate().map_err(|error| error.to_string())?;
    Ok(Task {
        out: expected(file, "o", &[q[0], q[1], q[2], v[3]])?,
        lse: expected(file, "lse", &q[..3])?,
        problem,
        query: query.values,
        key: key.values,
        value: value.values,
        seqlens_k,
        backward,
    })
}

/// What is computed.
struct Results<T> {
    out: Vec<T>,
    lse: Vec<f32>,
    /// dq, dk and dv.
    gradients: Option<[Vec<T>; 3]>,
}

/// Computes, prints what there is to say about it, writes the output. Whether the result is as expected.
fn attend<T: Number>(args: &Args, task: &Task) -> Result<bool> {
    let problem = &task.problem;
    let convert = |values: &[f64]| -> Vec<T> { values.iter().map(|&x| T::nearest(x as f32)).collect() };
    let tensors = Tensors {
        query: convert(&task.query),
        key: convert(&task.key),
        value: convert(&task.value),
        seqlens_k: task.seqlens_k.clone(),
    };
    let upstream = task
        .backward
        .as_ref()
        .map(|backward| Upstream { out: convert(&backward.grad_out.values), lse: backward.grad_lse.clone() });
    let results = match args.kernel {
        KernelName::Reference => on_host(problem, &tensors, upstream.as_ref()),
        _ => on_device(args, problem, &tensors, upstream.as_ref())?,
    };
    if let Some(path) = &args.output {
        write(path, problem, &results)?;
    }
    Ok(compare(task, &tensors, upstream.as_ref(), &results))
}

fn on_host<T: Number>(problem: &Problem, tensors: &Tensors<T>, upstream: Option<&Upstream<T>>) -> Results<T> {
    say("kernel", "the reference, in f64 on the host");
    let start = std::time::Instant::now();
    let Tensors { query, key, value, seqlens_k } = tensors;
    let rounded = |values: Vec<f64>| -> Vec<T> { values.into_iter().map(|x| T::nearest(x as f32)).collect() };
    let result = reference::forward(problem, query, key, value, seqlens_k.as_deref());
    let gradients = upstream.map(|upstream| {
        let all = [&query[..], key, value, &upstream.out];
        let result = reference::backward(problem, all, upstream.lse.as_deref(), seqlens_k.as_deref());
        [result.query, result.key, result.value].map(rounded)
    });
    say("time", format!("{:.3} ms", start.elapsed().as_secs_f64() * 1e3));
    let lse = result.lse.iter().map(|&x| x as f32).collect();
    Results { out: rounded(result.out), lse, gradients }
}

fn on_device<T: Number>(
    args: &Args,
    problem: &Problem,
    tensors: &Tensors<T>,
    upstream: Option<&Upstream<T>>,
) -> Result<Results<T>> {
    let words = |error: wgpu_flash_attention::Error| error.to_string();
    let coop = args.kernel == KernelName::Coop;
    let mut options = HeadlessOptions::default().checked(args.checked).cooperative_matrices(coop);
    options.adapter = args.adapter.clone();
    let context = Context::headless_with(&options).map_err(words)?;
    say("adapter", support::adapter_name(&context));
    let kernel = match args.kernel {
        KernelName::Naive => Some(Kernel::Naive),
        KernelName::Tile => Some(Kernel::Tile),
        KernelName::Coop => Some(Kernel::Coop),
        KernelName::Decode => Some(Kernel::Decode),
        KernelName::Auto | KernelName::Reference => None,
    };
    let coop_form = args.coop_form.map(Into::into);
    let options = PlanOptions::default().kernel(kernel).backward(kernel).coop_form(coop_form);
    let plan = context.plan_with(problem, &options).map_err(words)?;
    say("plan", &plan);
    let inputs = Inputs::upload(&context, tensors)?;
    let outputs = Outputs::poisoned(&context, &plan)?;
    let bound = [support::bind(&plan, &inputs, &outputs).map_err(words)?];
    support::pass_times(&context, &bound, 1, 1).map_err(words)?;
    let (out, lse) = outputs.read(&context, problem).map_err(words)?;
    let time = |pass: &str, bound: &[BoundPass]| -> Result<()> {
        let time = support::measure(&context, bound).map_err(words)?;
        let (median, passes, clock) = (time.median * 1e3, time.passes, support::clock(&context));
        say("time", format!("{pass}: {median:.3} ms ({clock}, median of {passes} measurements)"));
        Ok(())
    };
    time("forward", &bound)?;
    let mut results = Results { out, lse, gradients: None };
    if let Some(upstream) = upstream {
        let gradients = GradientBuffers::poisoned(&context, &plan, upstream)?;
        let bound = [gradients.bind(&plan, &inputs, &outputs).map_err(words)?];
        support::pass_times(&context, &bound, 1, 1).map_err(words)?;
        results.gradients = Some(gradients.read(&context, problem).map_err(words)?);
        time("backward", &bound)?;
    }
    Ok(results)
}

fn write<T: Number>(path: &Path, problem: &Problem, results: &Results<T>) -> Result<()> {
    let s = &problem.shape;
    let sizes = |sizes: &[u32]| -> Vec<usize> { sizes.iter().map(|&n| n as usize).collect() };
    let dtype = match T::TYPE {
        ElementType::F32 => Dtype::F32,
        ElementType::F16 => Dtype::F16,
        ElementType::BF16 => Dtype::BF16,
        other => return Err(format!("no type of {other} is known to safetensors")),
    };
    let rows = [s.batch, s.heads_q, s.seqlen_q];
    let keys = [s.batch, s.heads_kv, s.seqlen_k];
    let mut all: Vec<(&str, Dtype, Vec<usize>, &[u8])> = vec![
        ("o", dtype, sizes(&[&rows[..], &[s.head_dim_v]].concat()), bytemuck::cast_slice(&results.out)),
        ("lse", Dtype::F32, sizes(&rows), bytemuck::cast_slice(&results.lse)),
    ];
    if let Some(gradients) = &results.gradients {
        let shapes = [(rows, s.head_dim), (keys, s.head_dim), (keys, s.head_dim_v)];
        for ((name, values), (rows, dim)) in GRADIENTS.iter().zip(gradients).zip(shapes) {
            all.push((name, dtype, sizes(&[&rows[..], &[dim]].concat()), bytemuck::cast_slice(values)));
        }
    }
    let words = |error| format!("cannot write {}: {error}", path.display());
    let mut views = vec![];
    for (name, dtype, shape, bytes) in &all {
        views.push((*name, TensorView::new(*dtype, shape.clone(), bytes).map_err(words)?));
    }
    let bytes = safetensors::serialize(views, None).map_err(words)?;
    std::fs::write(path, bytes).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    let named: Vec<_> = all.iter().map(|(name, dtype, shape, _)| format!("{name} {dtype} {shape:?}")).collect();
    say("wrote", format!("{}: {}", path.display(), named.join(", ")));
    Ok(())
}

/// Compares with what the file expects, by the bounds that the crate's tests have.
fn compare<T: Number>(task: &Task, tensors: &Tensors<T>, upstream: Option<&Upstream<T>>, results: &Results<T>) -> bool {
    let mut verdicts = vec![];
    // What the type costs the plain computation: lengths, masks and all, but never the expected values.
    let plain = (T::TYPE != ElementType::F32 && (task.out.is_some() || task.lse.is_some())).then(|| {
        let exact = reference::forward(&task.problem, &task.query, &task.key, &task.value, task.seqlens_k.as_deref());
        let (out, lse) = plain(&task.problem, tensors);
        (Errors::of(out, &exact.out), Errors::of(lse, &exact.lse))
    });
    if let Some(expected) = &task.out {
        let errors = Errors::of(results.out.iter().copied(), expected);
        let verdict = match plain {
            None => support::judge_relative(errors, 2e-6),
            Some((plain, _)) => support::judge_by_plain(errors, plain),
        };
        verdicts.push(("o", verdict));
    }
    if let Some(expected) = &task.lse {
        let verdict = match plain {
            None => support::judge_lse(&results.lse, expected),
            // The expected lse may be that of the values before they were rounded.
            Some((_, plain)) => support::judge_by_plain(Errors::of(results.lse.iter().copied(), expected), plain),
        };
        verdicts.push(("lse", verdict));
    }
    if let (Some(backward), Some(upstream), Some(found)) = (&task.backward, upstream, &results.gradients) {
        for (n, expected) in expected_gradients(task, backward, tensors, upstream).into_iter().enumerate() {
            let verdict = expected.map(|expected| expected.judge(found[n].iter().copied()));
            verdicts.extend(verdict.map(|verdict| (GRADIENTS[n], verdict)));
        }
    }
    for (name, verdict) in &verdicts {
        say(name, verdict);
    }
    let names = |holds: bool| {
        let named = verdicts.iter().filter(|(_, verdict)| verdict.holds == holds).map(|(name, _)| *name);
        list(&named.collect::<Vec<_>>(), "and")
    };
    if verdicts.is_empty() {
        let all: &[&str] = if results.gradients.is_some() { &["o", "lse", "dq", "dk", "dv"] } else { &["o", "lse"] };
        println!("DONE: the file holds no expected {}, so nothing was compared", list(all, "or"));
    } else if verdicts.iter().all(|(_, verdict)| verdict.holds) {
        println!("PASS: {}: what the file expects", names(true));
    } else {
        println!("FAIL: {}: not what the file expects; was it made with the same options?", names(false));
    }
    verdicts.iter().all(|(_, verdict)| verdict.holds)
}

/// "o, lse and dq"
fn list(names: &[&str], conjunction: &str) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} {conjunction} {last}", first.join(", ")),
        _ => names.concat(),
    }
}

/// dq, dk and dv, those that the file has.
fn expected_gradients<T: Number>(
    task: &Task,
    backward: &BackwardTask,
    tensors: &Tensors<T>,
    upstream: &Upstream<T>,
) -> [Option<Expected>; 3] {
    if backward.expected.iter().all(Option::is_none) {
        return [None, None, None];
    }
    let (problem, s) = (&task.problem, &task.problem.shape);
    let inputs = [&task.query[..], &task.key, &task.value, &backward.grad_out.values];
    let exact = reference::backward(problem, inputs, backward.grad_lse.as_deref(), task.seqlens_k.as_deref());
    let (out, lse) = plain(problem, tensors);
    let plain = PlainGradients { problem, tensors, upstream, out, lse };
    let all_rows = |heads, positions| sample_rows([s.batch, heads, positions], u64::MAX);
    let dq = plain.query_rows(&all_rows(s.heads_q, s.seqlen_q));
    let [dk, dv] = plain.key_rows(&all_rows(s.heads_kv, s.seqlen_k));
    let [query, key, value] = backward.expected.each_ref().map(Option::as_ref);
    let expected = |values: Option<&Vec<f64>>, exact: &[f64], plain| {
        values.map(|values| Expected::new(values.clone(), exact, plain))
    };
    [expected(query, &exact.query, dq), expected(key, &exact.key, dk), expected(value, &exact.value, dv)]
}

/// Every row of the plain computation.
fn plain<T: Number>(problem: &Problem, tensors: &Tensors<T>) -> (Vec<T>, Vec<f32>) {
    let s = &problem.shape;
    let (mut out, mut lse) = (vec![], vec![]);
    for b in 0..s.batch {
        for h in 0..s.heads_q {
            for i in 0..s.seqlen_q {
                let (o, l) = support::plain_row(problem, tensors, [b, h, i]);
                out.extend(o);
                lse.push(l);
            }
        }
    }
    (out, lse)
}

/// A line with its subject in front; further lines of the same subject are indented.
fn say(subject: &str, text: impl std::fmt::Display) {
    println!("{subject:<8} {}", text.to_string().replace('\n', "\n         "));
}

fn run(args: &Args) -> Result<bool> {
    let name = args.input.as_ref().map_or("the fixture".to_string(), |path| path.display().to_string());
    let bytes = match &args.input {
        None => FIXTURE.into(),
        Some(path) => std::fs::read(path).map_err(|error| format!("cannot read {name}: {error}"))?,
    };
    let file = SafeTensors::deserialize(&bytes).map_err(|error| format!("{name} is no safetensors file: {error}"))?;
    let task = read(&file, args)?;
    let (ty, s) = (task.problem.element_type, &task.problem.shape);
    let q = [s.batch, s.heads_q, s.seqlen_q, s.head_dim];
    let k = [s.batch, s.heads_kv, s.seqlen_k, s.head_dim];
    let v = [s.batch, s.heads_kv, s.seqlen_k, s.head_dim_v];
    let lengths = task.seqlens_k.as_ref().map_or("all keys".into(), |lengths| format!("key lengths {lengths:?}"));
    let upstream = match &task.backward {
        None => "",
        Some(BackwardTask { grad_lse: None, .. }) => "; gradients from do",
        Some(_) => "; gradients from do and dlse",
    };
    say("input", format!("{name}: q {q:?}, k {k:?}, v {v:?} in {ty}; {lengths}{upstream}"));
    match task.problem.element_type {
        ElementType::F32 => attend::<f32>(args, &task),
        ElementType::F16 => attend::<half::f16>(args, &task),
        ElementType::BF16 => attend::<half::bf16>(args, &task),
        other => Err(format!("{other} is no type of numbers on the host")),
    }
}

fn main() -> ExitCode {
    let result = match Args::try_parse() {
        Ok(args) => run(&args),
        Err(error) if !error.use_stderr() => error.exit(),
        // What is wrong, without the pages on usage that follow it.
        Err(error) => {
            let text = error.to_string();
            let wrong: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
            Err(wrong.join(" ").trim_start_matches("error: ").to_string())
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("attend: {error}");
            ExitCode::from(2)
        }
    }
}
