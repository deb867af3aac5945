//! Attention on a safetensors file, to check this crate against your own framework. `--help` lists the options.

mod support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use wgpu_flash_attention::{
    Causal, Context, ElementType, HeadlessOptions, Kernel, MAX_SEQLEN, PlanOptions, Problem, Shape, reference,
};

use support::{Errors, Inputs, Number, Outputs, Tensors};

/// What stops the command, in one line.
type Result<T> = std::result::Result<T, String>;

/// Queries, keys and values of a real model, with the expected o and lse.
const FIXTURE: &[u8] = include_bytes!("../tests/data/minilm_layer5.safetensors");

/// Attention on a safetensors file.
///
/// Reads q [B,Hq,Nq,D], k [B,Hkv,Nk,D] and v [B,Hkv,Nk,Dv] in F32, F16 or BF16 and, if there is one, seqlens_k [B] in
/// I32 or I64: how many keys of each batch entry count. Where the file also holds the expected o [B,Hq,Nq,Dv] or
/// lse [B,Hq,Nq], compares with them.
#[derive(Parser)]
#[command(
    after_help = "Exit code: 0 if all went well, 1 if the result is too far from the expected one, 2 for bad input."
)]
struct Args {
    /// The file; without it, one layer of all-MiniLM-L6-v2 on three short texts
    input: Option<PathBuf>,
    /// Writes o and lse to this file
    #[arg(short, value_name = "OUTPUT.safetensors")]
    output: Option<PathBuf>,
    /// What computes: a kernel, or the reference in f64 on the host
    #[arg(long, value_enum, default_value = "auto")]
    kernel: KernelName,
    /// Converts q, k and v to this type first; o gets it too [default: the file's]
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

/// q, k or v, with its four sizes.
fn input(file: &SafeTensors<'_>, name: &str) -> Result<(Floats, [u32; 4])> {
    let tensor = floats(file, name)?;
    let shape = &tensor.shape;
    if tensor.dtype == Dtype::F64 {
        return Err(format!("{name} is F64; it must be F32, F16 or BF16"));
    }
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
    if !tensor.shape.iter().eq(shape.iter().map(|&n| n as usize).collect::<Vec<_>>().iter()) {
        return Err(format!("the expected {name} has shape {:?}; q, k and v give {shape:?}", tensor.shape));
    }
    Ok(Some(tensor.values))
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
}

fn read(file: &SafeTensors<'_>, args: &Args) -> Result<Task> {
    let [(query, q), (key, k), (value, v)] = [input(file, "q")?, input(file, "k")?, input(file, "v")?];
    if [k[0], k[3]] != [q[0], q[3]] {
        return Err(format!("k has shape {k:?} and q has {q:?}; batch (first) and head dim (last) must be equal"));
    }
    if v[..3] != k[..3] {
        return Err(format!("v has shape {v:?} and k has {k:?}; all but the last size must be equal"));
    }
    if k[1] == 0 || q[1] % k[1] != 0 {
        return Err(format!("k and v have {} heads and q has {}; theirs must divide q's", k[1], q[1]));
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
    let problem = Problem {
        scale: args.scale,
        softcap: args.softcap,
        causal: args.causal.map(|diagonal| match diagonal {
            Diagonal::BottomRight => Causal::BottomRight,
            Diagonal::TopLeft => Causal::TopLeft,
        }),
        seqlens_k: seqlens_k.is_some(),
        lse: true,
        ..Problem::new(shape, element_type).window(window.left, window.right)
    };
    problem.validate().map_err(|error| error.to_string())?;
    Ok(Task {
        out: expected(file, "o", &[q[0], q[1], q[2], v[3]])?,
        lse: expected(file, "lse", &q[..3])?,
        problem,
        query: query.values,
        key: key.values,
        value: value.values,
        seqlens_k,
    })
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
    let (out, lse) = match args.kernel {
        KernelName::Reference => on_host(problem, &tensors),
        _ => on_device(args, problem, &tensors)?,
    };
    if let Some(path) = &args.output {
        write(path, problem, &out, &lse)?;
    }
    Ok(compare(task, &tensors, &out, &lse))
}

fn on_host<T: Number>(problem: &Problem, tensors: &Tensors<T>) -> (Vec<T>, Vec<f32>) {
    say("kernel", "the reference, in f64 on the host");
    let start = std::time::Instant::now();
    let Tensors { query, key, value, seqlens_k } = tensors;
    let result = reference::forward(problem, query, key, value, seqlens_k.as_deref());
    say("time", format!("{:.3} ms", start.elapsed().as_secs_f64() * 1e3));
    (result.out.iter().map(|&x| T::nearest(x as f32)).collect(), result.lse.iter().map(|&x| x as f32).collect())
}

fn on_device<T: Number>(args: &Args, problem: &Problem, tensors: &Tensors<T>) -> Result<(Vec<T>, Vec<f32>)> {
    let words = |error: wgpu_flash_attention::Error| error.to_string();
    let options = HeadlessOptions {
        adapter: args.adapter.clone(),
        checked: args.checked,
        cooperative_matrices: args.kernel == KernelName::Coop,
    };
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
    let options = PlanOptions { kernel, coop_form, ..Default::default() };
    let plan = context.plan_with(problem, &options).map_err(words)?;
    say("plan", &plan);
    let inputs = Inputs::upload(&context, tensors)?;
    let outputs = Outputs::poisoned(&context, &plan)?;
    let bound = support::bind(&plan, &inputs, &outputs).map_err(words)?;
    support::pass_times(&context, &bound, 1, 1).map_err(words)?;
    let result = outputs.read(&context, problem).map_err(words)?;
    let time = support::measure(&context, &bound).map_err(words)?;
    let (median, passes, clock) = (time.median * 1e3, time.passes, support::clock(&context));
    say("time", format!("{median:.3} ms ({clock}, median of {passes} measurements)"));
    Ok(result)
}

fn write<T: Number>(path: &Path, problem: &Problem, out: &[T], lse: &[f32]) -> Result<()> {
    let s = &problem.shape;
    let rows = [s.batch, s.heads_q, s.seqlen_q].map(|n| n as usize);
    let dtype = match T::TYPE {
        ElementType::F32 => Dtype::F32,
        ElementType::F16 => Dtype::F16,
        ElementType::BF16 => Dtype::BF16,
    };
    let full = [rows[0], rows[1], rows[2], s.head_dim_v as usize];
    let words = |error| format!("cannot write {}: {error}", path.display());
    let out = TensorView::new(dtype, full.to_vec(), bytemuck::cast_slice(out)).map_err(words)?;
    let lse = TensorView::new(Dtype::F32, rows.to_vec(), bytemuck::cast_slice(lse)).map_err(words)?;
    let bytes = safetensors::serialize([("o", out), ("lse", lse)], None).map_err(words)?;
    std::fs::write(path, bytes).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    say("wrote", format!("{}: o {dtype} {full:?}, lse F32 {rows:?}", path.display()));
    Ok(())
}

/// Compares with what the file expects, by the bounds that the crate's tests have.
fn compare<T: Number>(task: &Task, tensors: &Tensors<T>, out: &[T], lse: &[f32]) -> bool {
    let mut verdicts = vec![];
    // What the type costs the plain computation: lengths, masks and all, but never the expected values.
    let plain = (T::TYPE != ElementType::F32 && (task.out.is_some() || task.lse.is_some())).then(|| {
        let exact = reference::forward(&task.problem, &task.query, &task.key, &task.value, task.seqlens_k.as_deref());
        let (out, lse) = plain(&task.problem, tensors);
        (Errors::of(out, &exact.out), Errors::of(lse, &exact.lse))
    });
    if let Some(expected) = &task.out {
        let errors = Errors::of(out.iter().copied(), expected);
        let verdict = match plain {
            None => support::judge_relative(errors),
            Some((plain, _)) => support::judge_by_plain(errors, plain),
        };
        verdicts.push(("o", verdict));
    }
    if let Some(expected) = &task.lse {
        let verdict = match plain {
            None => support::judge_lse(lse, expected),
            // The expected lse may be that of the values before they were rounded.
            Some((_, plain)) => support::judge_by_plain(Errors::of(lse.iter().copied(), expected), plain),
        };
        verdicts.push(("lse", verdict));
    }
    for (name, verdict) in &verdicts {
        say(name, verdict);
    }
    let names = |holds: bool| {
        let named = verdicts.iter().filter(|(_, verdict)| verdict.holds == holds).map(|(name, _)| *name);
        named.collect::<Vec<_>>().join(" and ")
    };
    if verdicts.is_empty() {
        println!("DONE: the file holds no expected o or lse, so nothing was compared");
    } else if verdicts.iter().all(|(_, verdict)| verdict.holds) {
        println!("PASS: {}: what the file expects", names(true));
    } else {
        println!("FAIL: {}: not what the file expects; was it made with the same options?", names(false));
    }
    verdicts.iter().all(|(_, verdict)| verdict.holds)
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
    say("input", format!("{name}: q {q:?}, k {k:?}, v {v:?} in {ty}; {lengths}"));
    match task.problem.element_type {
        ElementType::F32 => attend::<f32>(args, &task),
        ElementType::F16 => attend::<half::f16>(args, &task),
        ElementType::BF16 => attend::<half::bf16>(args, &task),
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
