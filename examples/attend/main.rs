//! Attention on a safetensors file, to check this crate against your own framework. `--help` lists the options.

mod source;
mod sparse;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use wgpu_flash_attention::reference::accept::{self, Bound, Errors, Verdict};
use wgpu_flash_attention::reference::{Backward, Forward, rounded};
use wgpu_flash_attention::{
    Alibi, Bias, BoundPass, Causal, Context, Dropout, ElementType, HeadlessOptions, Kernel, MAX_SEQLEN, PlanOptions,
    Problem, ScoreLayout, Shape, alibi_slopes, reference,
};

use flash_attention_testing::buffers::{
    GradientBuffers, Inputs, Number, Outputs, SHARED, Shared, Tensors, Upstream, adapter_name, bind, shared_buffers,
};
use flash_attention_testing::output::OutputFile;
use flash_attention_testing::sample::{Expected, GRADIENTS, sample_rows};
use flash_attention_testing::terminal::{Form, Progress, arguments, cut, first_few, harmless};
use flash_attention_testing::timing::{clock, measure, pass_times};
use flash_attention_testing::{Extras, bytes_of};

use source::{Floats, MaskValues, Source, refuse_ignored, warn_of_unknown};
use sparse::{describe_blocks, describe_mods, parse_mods, read_blocks, read_mod_buffers};

/// What stops the command, in one line.
type Result<T> = std::result::Result<T, String>;

/// Queries, keys and values of a real model, with the expected o, lse and gradients.
const FIXTURE: &[u8] = include_bytes!("../../tests/data/minilm_layer5.safetensors");

/// Attention on a safetensors file.
///
/// Reads q [B,Hq,Nq,D], k [B,Hkv,Nk,D] and v [B,Hkv,Nk,Dv] in F32, F16 or BF16 and, if they are there, seqlens_k [B]
/// and seqlens_q [B] in I32 or I64: how many keys and queries of each batch entry count; attn_mask [B,Hq,Nq,Nk], of which each
/// size may be 1: in BOOL, of which true takes part, or in F32 or the type of q, which is added to the scores; alibi_slopes [Hq] or
/// [B,Hq] in F32; sinks [Hq] in F32; FlexAttention's block lists in I32, kv_num_blocks [B,Hq,R] and kv_indices [B,Hq,R,C], of which batch and heads
/// may be 1, and full_kv_num_blocks and full_kv_indices. Where the file also holds the expected o [B,Hq,Nq,Dv] or
/// lse [B,Hq,Nq], compares with them; with --backward also with dq, dk and dv, and dbias, dsinks and dalibi_slopes. A tensor of any other name is
/// named in a warning, since a result that leaves it out may answer another question.
#[derive(Parser)]
#[command(
    name = "attend",
    version,
    after_help = "Exit code: 0 if all went well, 1 if the result is too far from the expected one, 2 for bad input."
)]
struct Args {
    /// The file; without it, one layer of all-MiniLM-L6-v2 on three short texts
    input: Option<PathBuf>,
    /// Computes gradients too: reads do [B,Hq,Nq,Dv], that of o, and, if there is one, dlse [B,Hq,Nq], that of lse; gives dq,
    /// dk and dv, and of what the file has dbias, of a float attn_mask, dsinks and dalibi_slopes
    #[arg(long)]
    backward: bool,
    /// Writes o and lse, and gradients, to this file
    #[arg(short, value_name = "OUTPUT.safetensors")]
    output: Option<PathBuf>,
    /// The order of the dimensions of q, k, v and do, and of o and their gradients: batch, heads, positions, dim, or batch,
    /// positions, heads, dim as flash-attention has them. lse and dlse are [B,Hq,Nq] in both, attn_mask is [B,Hq,Nq,Nk]
    #[arg(long, value_enum, default_value = "bhnd")]
    layout: Order,
    /// Leaves this tensor of the file out, without a warning; may be repeated
    #[arg(long, value_name = "NAME")]
    ignore: Vec<String>,
    /// Goes on where inputs hold NaN or infinity, of which no kernel promises anything
    #[arg(long)]
    allow_non_finite: bool,
    /// What computes: a kernel, or the reference in f64 on the host
    #[arg(long, value_enum, default_value = "auto")]
    kernel: KernelName,
    /// Converts q, k, v and do to this type first, and an attn_mask in F16 or BF16; o and gradients get it too [default: the file's]
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
    /// Adds ALiBi's terms with the slopes of its paper: scores become score - slope · |i + Nk - Nq - j|
    #[arg(long)]
    alibi: bool,
    /// Drops probabilities after the softmax, each as likely as this, from 0 to below 1, by FlashAttention-2's mask of the seed and the offset
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    dropout: Option<f32>,
    /// The seed of dropout
    #[arg(long, requires = "dropout", default_value_t = 0)]
    seed: u64,
    /// The offset of dropout in the stream of random numbers
    #[arg(long, requires = "dropout", default_value_t = 0)]
    offset: u64,
    /// Queries and keys of a block of the file's block lists [default: 128,128]
    #[arg(long, value_name = "BQ,BK", value_parser = parse_block)]
    block: Option<Block>,
    /// Changes scores by the score_mod, and masks them by the mask_mod, of this WGSL; its buffers are tensors of the file by their names, in F32, I32
    /// or U32 as they are declared
    #[arg(long, value_name = "FILE.wgsl")]
    mods: Option<PathBuf>,
    /// Where the coop kernel keeps scores and probabilities; without it, the faster of what the device allows
    #[arg(long, value_enum)]
    coop_form: Option<Form>,
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

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Order {
    Bhnd,
    Bnhd,
}

impl Order {
    /// Sizes in this order of a tensor of `[batch, heads, positions, dim]`, or the other way round.
    fn of<T: Copy>(self, sizes: [T; 4]) -> [T; 4] {
        match self {
            Order::Bhnd => sizes,
            Order::Bnhd => [sizes[0], sizes[2], sizes[1], sizes[3]],
        }
    }

    /// The names of the dimensions, where the third is positions of this name.
    fn names(self, positions: &str) -> [&str; 4] {
        self.of(["batch", "heads", positions, "head dim"])
    }

    /// Changes the order of elements that have these sizes to batch, heads, positions, dim, or, from these, back: both
    /// swap the two in the middle.
    fn reorder<T: Copy>(self, values: Vec<T>, sizes: [usize; 4]) -> Vec<T> {
        let [batch, outer, inner, dim] = sizes;
        if self == Order::Bhnd || values.is_empty() {
            return values;
        }
        let mut reordered = Vec::with_capacity(values.len());
        for b in 0..batch {
            for i in 0..inner {
                for o in 0..outer {
                    reordered.extend_from_slice(&values[((b * outer + o) * inner + i) * dim..][..dim]);
                }
            }
        }
        reordered
    }
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

/// Queries and keys of a block.
type Block = [u32; 2];

fn parse_block(text: &str) -> Result<Block> {
    let size = |text: &str| match text.trim().parse::<u32>() {
        Ok(n) if (1..=MAX_SEQLEN).contains(&n) => Ok(n),
        _ => Err(format!("{text:?} is not a whole number from 1 to {MAX_SEQLEN}")),
    };
    let (queries, keys) = text.split_once(',').ok_or("two numbers separated by a comma are expected")?;
    Ok([size(queries)?, size(keys)?])
}

/// What the file asks for. Tensors are in the order batch, heads, positions, dim.
struct Task {
    problem: Problem,
    order: Order,
    query: Vec<f64>,
    key: Vec<f64>,
    value: Vec<f64>,
    extras: Extras,
    /// The sizes of attn_mask: batch, query heads, queries, keys.
    mask_sizes: [u32; 4],
    out: Option<Vec<f64>>,
    lse: Option<Vec<f64>>,
    backward: Option<BackwardTask>,
}

struct BackwardTask {
    grad_out: Floats,
    grad_lse: Option<Vec<f64>>,
    /// dq, dk and dv.
    expected: [Option<Vec<f64>>; 3],
    /// dbias, dsinks and dalibi_slopes.
    shared: [Option<Vec<f64>>; 3],
}

fn read_backward(source: &Source<'_>, q: &[u32; 4], k: &[u32; 4], v: &[u32; 4]) -> Result<BackwardTask> {
    let given = |name, sizes: &[u32]| -> Result<Floats> { source.ordered(source.input(name)?, name, sizes) };
    let grad_out = given("do", &[q[0], q[1], q[2], v[3]])?;
    let grad_lse = source.tensor("dlse").map(|_| given("dlse", &q[..3])).transpose()?;
    let [name_q, name_k, name_v] = GRADIENTS;
    Ok(BackwardTask {
        grad_out,
        grad_lse: grad_lse.map(|tensor| tensor.values),
        expected: [source.expected(name_q, q)?, source.expected(name_k, k)?, source.expected(name_v, v)?],
        shared: [None, None, None],
    })
}

fn read(file: &SafeTensors<'_>, args: &Args) -> Result<Task> {
    let mods = args.mods.as_deref().map(parse_mods).transpose()?;
    refuse_ignored(file, &args.ignore)?;
    let source = Source { file, ignored: &args.ignore, order: args.layout };
    let [query, key, value] = ["q", "k", "v"].map(|name| source.input_and_sizes(name));
    let ((query, q), (key, k), (value, v)) = (query?, key?, value?);
    let in_file = |sizes: [u32; 4]| args.layout.of(sizes);
    if [k[0], k[3]] != [q[0], q[3]] {
        let (k, q) = (in_file(k), in_file(q));
        return Err(format!("k has shape {k:?} and q has {q:?}; batch (first) and head dim (last) must be equal"));
    }
    if v[..3] != k[..3] {
        let (k, v) = (in_file(k), in_file(v));
        return Err(format!("v has shape {v:?} and k has {k:?}; all but the last size must be equal"));
    }
    if k[1] == 0 || q[1] % k[1] != 0 {
        let hint = match args.layout {
            Order::Bhnd => "--layout bnhd is for files of [batch, positions, heads, dim]",
            Order::Bnhd => "without --layout bnhd the file would be read as [batch, heads, positions, dim]",
        };
        return Err(format!("k and v have {} heads and q has {}; theirs must divide q's; {hint}", k[1], q[1]));
    }
    let mut backward = args.backward.then(|| read_backward(&source, &q, &k, &v)).transpose()?;
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
    let seqlens_k = source.lengths("seqlens_k", q[0], k[2], "keys")?;
    let seqlens_q = source.lengths("seqlens_q", q[0], q[2], "queries")?;
    let window = args.window.unwrap_or(Window { left: None, right: None });
    let mut problem = Problem::new(shape, element_type).window(window.left, window.right).with_lse();
    (problem.scale, problem.softcap) = (args.scale, args.softcap);
    (problem.seqlens_q, problem.seqlens_k) = (seqlens_q.is_some(), seqlens_k.is_some());
    problem.causal = args.causal.map(|diagonal| match diagonal {
        Diagonal::BottomRight => Causal::BottomRight,
        Diagonal::TopLeft => Causal::TopLeft,
    });
    let mut extras = Extras { seqlens_q, seqlens_k, ..Default::default() };
    let attn_mask = source.attn_mask(&shape)?;
    let mask_sizes = attn_mask.as_ref().map_or([0; 4], |mask| mask.sizes);
    let layout = ScoreLayout::contiguous(mask_sizes);
    match attn_mask.map(|mask| mask.values) {
        None => {}
        Some(MaskValues::Bool(values)) => {
            problem = problem.with_mask(layout);
            extras.mask = Some(values);
        }
        Some(MaskValues::Float(values, dtype)) => {
            let bias_type = match dtype {
                Dtype::F32 => ElementType::F32,
                _ if args.dtype.is_some() || dtype == query.dtype => element_type,
                _ => {
                    let q = query.dtype;
                    let or = if q == Dtype::F32 { "BOOL or F32".into() } else { format!("BOOL, F32 or {q}") };
                    return Err(format!(
                        "q is {q} and attn_mask is {dtype}; it must be {or}; --dtype converts them to one type"
                    ));
                }
            };
            problem = problem.with_bias(Bias::new(bias_type, layout));
            if !args.allow_non_finite {
                refuse_bias(&values, bias_type, mask_sizes)?;
            }
            extras.bias = Some(values.into_iter().map(|x| rounded(bias_type, x) as f32).collect());
        }
    }
    problem = read_blocks(&source, args.block, problem, &mut extras)?;
    if let Some(mods) = mods {
        extras.mod_buffers = read_mod_buffers(&source, &mods, args.allow_non_finite)?;
        problem = problem.with_mods(mods);
    }
    let slopes = source.f32s("alibi_slopes", &[&q[1..2], &q[..2]])?;
    let sinks = source.f32s("sinks", &[&q[1..2]])?;
    if slopes.is_some() && args.alibi {
        return Err("the file holds alibi_slopes and --alibi takes those of the paper; --ignore alibi_slopes leaves the file's out".into());
    }
    if !args.allow_non_finite {
        for (name, values, may_be_none) in [("alibi_slopes", &slopes, false), ("sinks", &sinks, true)] {
            let values = values.iter().flat_map(|tensor| tensor.values.iter().enumerate());
            // A sink of −∞ is none.
            let mut bad = values.filter(|&(_, &x)| !(x.is_finite() || may_be_none && x == f64::NEG_INFINITY));
            if let Some((n, x)) = bad.next() {
                return Err(format!(
                    "{name} holds {x:?}, element {n}; --allow-non-finite goes on, with results of which nothing is promised"
                ));
            }
        }
    }
    problem.dropout = args.dropout;
    extras.dropout = args.dropout.map(|probability| Dropout { probability, seed: args.seed, offset: args.offset });
    let f32s = |tensor: &Floats| -> Vec<f32> { tensor.values.iter().map(|&x| x as f32).collect() };
    extras.sinks = sinks.as_ref().map(f32s);
    extras.alibi_slopes = if args.alibi { Some(alibi_slopes(shape.heads_q)) } else { slopes.as_ref().map(f32s) };
    problem.sinks = sinks.is_some();
    problem.alibi = extras.alibi_slopes.as_ref().map(|_| match &slopes {
        Some(tensor) if tensor.shape.len() == 2 => Alibi::PerBatchAndHead,
        _ => Alibi::PerHead,
    });
    if let Some(backward) = &mut backward {
        problem = if backward.grad_lse.is_some() { problem.with_grad_lse() } else { problem.with_gradients() };
        if let Some(gradients) = &mut problem.gradients {
            gradients.bias = problem.bias.is_some();
            (gradients.sinks, gradients.alibi_slopes) = (sinks.is_some(), slopes.is_some());
        }
        let of_mask = problem.bias.map(|_| mask_sizes.map(|n| n as usize));
        let shape = |tensor: &'_ Option<Floats>| tensor.as_ref().map(|tensor| tensor.shape.clone());
        backward.shared = [
            source.expected_shared("dbias", of_mask.as_ref().map(|sizes| &sizes[..]), "an attn_mask that is added")?,
            source.expected_shared("dsinks", shape(&sinks).as_deref(), "sinks")?,
            source.expected_shared("dalibi_slopes", shape(&slopes).as_deref(), "alibi_slopes")?,
        ];
    }
    problem.validate().map_err(|error| error.to_string())?;
    let task = Task {
        out: source.expected("o", &[q[0], q[1], q[2], v[3]])?,
        lse: source.expected("lse", &q[..3])?,
        problem,
        order: args.layout,
        query: query.values,
        key: key.values,
        value: value.values,
        extras,
        mask_sizes,
        backward,
    };
    if !args.allow_non_finite {
        refuse_non_finite(&task)?;
    }
    Ok(task)
}

/// An error if a kernel would be given NaN or infinity: WGSL leaves what follows undefined. Rows past the lengths are no
/// kernel's business, so anything may be there.
fn refuse_non_finite(task: &Task) -> Result<()> {
    let s = &task.problem.shape;
    let q = [s.batch, s.heads_q, s.seqlen_q, s.head_dim];
    let k = [s.batch, s.heads_kv, s.seqlen_k, s.head_dim];
    let v = [s.batch, s.heads_kv, s.seqlen_k, s.head_dim_v];
    let o = [s.batch, s.heads_q, s.seqlen_q, s.head_dim_v];
    let mut all = vec![("q", &task.query[..], q), ("k", &task.key, k), ("v", &task.value, v)];
    if let Some(backward) = &task.backward {
        all.push(("do", &backward.grad_out.values, o));
        all.extend(backward.grad_lse.as_deref().map(|values| ("dlse", values, [q[0], q[1], q[2], 1])));
    }
    for (name, values, sizes) in all {
        let element_type = if name == "dlse" { ElementType::F32 } else { task.problem.element_type };
        let lengths = if ["k", "v"].contains(&name) { &task.extras.seqlens_k } else { &task.extras.seqlens_q };
        let mut bad = NonFinite::default();
        for (n, &value) in values.iter().enumerate() {
            let at = place(sizes, n);
            let counts = lengths.as_ref().is_none_or(|lengths| (at[2] as i64) < lengths[at[0]] as i64);
            if counts && !rounded(element_type, value).is_finite() {
                bad.add(n, value);
            }
        }
        if bad.count > 0 {
            let at = task.order.of(place(sizes, bad.first)).to_vec();
            let at = &at[..if name == "dlse" { 3 } else { 4 }];
            let which = match bad.value.is_finite() {
                true => format!("values too large for {element_type}"),
                false => "values that are NaN or infinite".into(),
            };
            let (count, value) = (bad.count, bad.value);
            return Err(format!(
                "{name} holds {which}: {count} of {}, the first is {value:?} at {at:?}; --allow-non-finite goes on, with \
                 results of which nothing is promised",
                values.len()
            ));
        }
    }
    Ok(())
}

/// An error if a bias holds what is neither a number nor a mask.
fn refuse_bias(values: &[f64], element_type: ElementType, sizes: [u32; 4]) -> Result<()> {
    let mut bad = NonFinite::default();
    for (n, &value) in values.iter().enumerate() {
        // Lower ones mask, −∞ too.
        if !(rounded(element_type, value).is_finite() || value < -1e30) {
            bad.add(n, value);
        }
    }
    if bad.count == 0 {
        return Ok(());
    }
    let which = match bad.value.is_finite() {
        true => format!("values too large for {element_type}"),
        false => "values that are NaN or +infinity".into(),
    };
    let (count, value, at) = (bad.count, bad.value, place(sizes, bad.first));
    Err(format!(
        "attn_mask holds {which}: {count} of {}, the first is {value:?} at {at:?}; --allow-non-finite goes on, with results \
         of which nothing is promised",
        values.len()
    ))
}

/// As the kernels get it.
fn rounded(element_type: ElementType, value: f64) -> f64 {
    match element_type {
        ElementType::F16 => half::f16::nearest(value as f32).into(),
        ElementType::BF16 => half::bf16::nearest(value as f32).into(),
        _ => (value as f32).into(),
    }
}

/// Where the n-th element of a contiguous tensor of these sizes is.
fn place([_, heads, positions, dim]: [u32; 4], n: usize) -> [usize; 4] {
    let [heads, positions, dim] = [heads, positions, dim].map(|n| n as usize);
    [n / dim / positions / heads, n / dim / positions % heads, n / dim % positions, n % dim]
}

/// Elements that are not finite.
#[derive(Default)]
struct NonFinite {
    count: usize,
    first: usize,
    value: f64,
}

impl NonFinite {
    fn add(&mut self, n: usize, value: f64) {
        if self.count == 0 {
            (self.first, self.value) = (n, value);
        }
        self.count += 1;
    }
}

/// What is computed.
struct Results<T> {
    out: Vec<T>,
    lse: Vec<f32>,
    /// dq, dk and dv.
    gradients: Option<[Vec<T>; 3]>,
    shared: Shared,
}

/// Computes, prints what there is to say about it, writes the output. Whether the result is as expected.
fn attend<T: Number>(args: &Args, task: &Task) -> Result<bool> {
    let problem = &task.problem;
    let convert = |values: &[f64]| -> Vec<T> { values.iter().map(|&x| T::nearest(x as f32)).collect() };
    let tensors = Tensors {
        query: convert(&task.query),
        key: convert(&task.key),
        value: convert(&task.value),
        extras: task.extras.clone(),
    };
    let upstream = task.backward.as_ref().map(|backward| {
        let lse = backward.grad_lse.as_ref().map(|lse| lse.iter().map(|&x| x as f32).collect());
        Upstream { out: convert(&backward.grad_out.values), lse }
    });
    // Opened first: what cannot be written is better known before than after minutes of computing.
    let input = args.input.as_deref();
    let output = args.output.as_ref().map(|path| OutputFile::open(path, input.as_slice())).transpose()?;
    let results = match args.kernel {
        KernelName::Reference => on_host(problem, &tensors, upstream.as_ref()),
        _ => on_device(args, problem, &tensors, upstream.as_ref())?,
    };
    if let Some(output) = output {
        write(output, task, &results)?;
    }
    Ok(compare(args, task, &tensors, upstream.as_ref(), &results))
}

/// A line on stderr if what follows takes long.
fn progress(what: &str) -> Progress {
    Progress::of("attend", what)
}

fn on_host<T: Number>(problem: &Problem, tensors: &Tensors<T>, upstream: Option<&Upstream<T>>) -> Results<T> {
    say("kernel", "the reference, in f64 on the host");
    let start = std::time::Instant::now();
    let _progress = progress("computing in f64 on the host");
    let Tensors { query, key, value, extras } = tensors;
    let rounded = |values: Vec<f64>| -> Vec<T> { values.into_iter().map(|x| T::nearest(x as f32)).collect() };
    let result = reference::forward(problem, query, key, value, extras.borrow());
    let mut shared = [None, None, None];
    let gradients = upstream.map(|upstream| {
        let all = [&query[..], key, value, &upstream.out];
        let result = reference::backward(problem, all, upstream.lse.as_deref(), extras.borrow());
        let summed = [result.bias, result.sinks, result.alibi_slopes];
        for ((shared, summed), of) in shared.iter_mut().zip(summed).zip(shared_buffers(problem)) {
            let nearest = |x: f64| of.map_or(x as f32, |(element_type, _)| self::rounded(element_type, x) as f32);
            *shared = summed.map(|summed| summed.values.into_iter().map(nearest).collect());
        }
        [result.query, result.key, result.value].map(rounded)
    });
    say("time", format!("{:.3} ms", start.elapsed().as_secs_f64() * 1e3));
    let lse = result.lse.iter().map(|&x| x as f32).collect();
    Results { out: rounded(result.out), lse, gradients, shared }
}

fn on_device<T: Number>(
    args: &Args,
    problem: &Problem,
    tensors: &Tensors<T>,
    upstream: Option<&Upstream<T>>,
) -> Result<Results<T>> {
    let words = |error: wgpu_flash_attention::Error| error.to_string();
    let opening = progress("opening the device");
    let coop = args.kernel == KernelName::Coop;
    let mut options = HeadlessOptions::default().checked(args.checked).cooperative_matrices(coop);
    options.adapter = args.adapter.clone();
    let context = Context::headless_with(&options).map_err(words)?;
    drop(opening);
    say("adapter", adapter_name(&context));
    let kernel = match args.kernel {
        KernelName::Naive => Some(Kernel::Naive),
        KernelName::Tile => Some(Kernel::Tile),
        KernelName::Coop => Some(Kernel::Coop),
        KernelName::Decode => Some(Kernel::Decode),
        KernelName::Auto | KernelName::Reference => None,
    };
    let coop_form = args.coop_form.map(Into::into);
    let planning = progress("planning, the driver compiles the kernels");
    let options = PlanOptions::default().kernel(kernel).backward(kernel).coop_form(coop_form);
    let plan = context.plan_with(problem, &options).map_err(words)?;
    drop(planning);
    say("plan", &plan);
    let computing = progress("computing on the device");
    let inputs = Inputs::upload(&context, problem, tensors)?;
    let outputs = Outputs::poisoned(&context, &plan)?;
    let bound = [bind(&plan, &inputs, &outputs).map_err(words)?];
    pass_times(&context, &bound, 1, 1).map_err(words)?;
    let (out, lse) = outputs.read(&context, problem).map_err(words)?;
    drop(computing);
    let time = |pass: &str, bound: &[BoundPass]| -> Result<()> {
        let timing = progress(&format!("timing the {pass} pass"));
        let time = measure(&context, bound).map_err(words)?;
        drop(timing);
        let (median, passes, clock) = (time.median * 1e3, time.passes, clock(&context));
        say("time", format!("{pass}: {median:.3} ms ({clock}, median of {passes} measurements)"));
        Ok(())
    };
    time("forward", &bound)?;
    let mut results = Results { out, lse, gradients: None, shared: [None, None, None] };
    if let Some(upstream) = upstream {
        let computing = progress("computing gradients on the device");
        let gradients = GradientBuffers::poisoned(&context, &plan, upstream)?;
        let bound = [gradients.bind(&plan, &inputs, &outputs).map_err(words)?];
        pass_times(&context, &bound, 1, 1).map_err(words)?;
        results.gradients = Some(gradients.read(&context, problem).map_err(words)?);
        results.shared = gradients.read_shared(&context, problem).map_err(words)?;
        drop(computing);
        time("backward", &bound)?;
    }
    Ok(results)
}

fn write<T: Number>(mut output: OutputFile, task: &Task, results: &Results<T>) -> Result<()> {
    let s = &task.problem.shape;
    let dtype_of = |element_type| match element_type {
        ElementType::F32 => Ok(Dtype::F32),
        ElementType::F16 => Ok(Dtype::F16),
        ElementType::BF16 => Ok(Dtype::BF16),
        other => Err(format!("no type of {other} is known to safetensors")),
    };
    let dtype = dtype_of(T::TYPE)?;
    let rows = [s.batch, s.heads_q, s.seqlen_q];
    let keys = [s.batch, s.heads_kv, s.seqlen_k];
    let mut named = vec![("o", &results.out, rows, s.head_dim_v)];
    if let Some([query, key, value]) = &results.gradients {
        let [name_q, name_k, name_v] = GRADIENTS;
        named.push((name_q, query, rows, s.head_dim));
        named.push((name_k, key, keys, s.head_dim));
        named.push((name_v, value, keys, s.head_dim_v));
    }
    let sizes = |sizes: &[u32]| -> Vec<usize> { sizes.iter().map(|&n| n as usize).collect() };
    let mut all: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)> = vec![];
    for (name, values, [b, h, n], dim) in named {
        let in_memory = [b, h, n, dim].map(|n| n as usize);
        let values = task.order.reorder(values.clone(), in_memory);
        all.push((name, dtype, task.order.of(in_memory).to_vec(), bytemuck::cast_slice(&values).to_vec()));
    }
    let of_slopes: &[u32] = if task.problem.alibi == Some(Alibi::PerBatchAndHead) { &rows[..2] } else { &rows[1..2] };
    let shapes = [&task.mask_sizes[..], &rows[1..2], of_slopes];
    for (n, values) in results.shared.iter().enumerate() {
        let (Some(values), Some((element_type, elements))) = (values, shared_buffers(&task.problem)[n]) else {
            continue;
        };
        let mut bytes = bytes_of(element_type, values);
        bytes.truncate((elements * element_type.bytes()) as usize);
        all.push((SHARED[n], dtype_of(element_type)?, sizes(shapes[n]), bytes));
    }
    all.insert(1, ("lse", Dtype::F32, sizes(&rows), bytemuck::cast_slice(&results.lse).to_vec()));
    let path = output.path().display().to_string();
    let words = |error: &dyn std::fmt::Display| format!("cannot write {path}: {error}");
    let mut views = vec![];
    for (name, dtype, shape, bytes) in &all {
        views.push((*name, TensorView::new(*dtype, shape.clone(), bytes).map_err(|error| words(&error))?));
    }
    let bytes = safetensors::serialize(views, None).map_err(|error| words(&error))?;
    output.write_all(&bytes).map_err(|error| words(&error))?;
    output.finish()?;
    let named: Vec<_> = all.iter().map(|(name, dtype, shape, _)| format!("{name} {dtype} {shape:?}")).collect();
    say("wrote", format!("{}: {}", harmless(&path, false), named.join(", ")));
    Ok(())
}

/// Compares with what the file expects, by the bounds that the crate's tests have.
fn compare<T: Number>(
    args: &Args,
    task: &Task,
    tensors: &Tensors<T>,
    upstream: Option<&Upstream<T>>,
    results: &Results<T>,
) -> bool {
    let mut verdicts = vec![];
    let comparing = progress("computing in f64 on the host, to compare");
    // What the type costs the plain computation: lengths, masks and all, but never the expected values.
    let plain = (T::TYPE != ElementType::F32 && (task.out.is_some() || task.lse.is_some())).then(|| {
        let exact = reference::forward(&task.problem, &task.query, &task.key, &task.value, task.extras.borrow());
        let plain = plain(&task.problem, tensors);
        [Errors::of(plain.out, &exact.out), Errors::of(plain.lse, &exact.lse)]
    });
    // f32 has no use for it.
    let [plain_out, plain_lse] = plain.unwrap_or_default();
    if let Some(expected) = &task.out {
        let errors = Errors::of(results.out.iter().copied(), expected);
        verdicts.push(("o", Bound::out(T::TYPE, plain_out).judge(errors)));
    }
    if let Some(expected) = &task.lse {
        let found = results.lse.iter().copied();
        let verdict = match T::TYPE {
            ElementType::F32 => accept::lse(found, expected),
            // The expected lse may be that of the values before they were rounded.
            _ => Bound::by_plain(plain_lse).judge(Errors::of(found, expected)),
        };
        verdicts.push(("lse", verdict));
    }
    if let (Some(backward), Some(upstream), Some(found)) = (&task.backward, upstream, &results.gradients) {
        for (n, expected) in expected_gradients(task, backward, tensors, upstream).into_iter().enumerate() {
            let verdict = expected.map(|expected| expected.judge(found[n].iter().copied()));
            verdicts.extend(verdict.map(|verdict| (GRADIENTS[n], verdict)));
        }
        verdicts.extend(judge_shared(task, backward, tensors, upstream, &results.shared));
    }
    drop(comparing);
    for (name, verdict) in &verdicts {
        say(name, verdict);
    }
    let undefined = not_finite(results);
    let names = |holds: bool| {
        let named = verdicts.iter().filter(|(_, verdict)| verdict.holds == holds).map(|(name, _)| *name);
        list(&named.collect::<Vec<_>>(), "and")
    };
    if undefined && !args.allow_non_finite {
        println!("FAIL: the inputs are finite, and a result is not");
        return false;
    }
    if verdicts.is_empty() {
        let mut all = vec!["o", "lse"];
        if results.gradients.is_some() {
            all.extend(GRADIENTS);
            all.extend(
                SHARED.into_iter().zip(&results.shared).filter(|(_, found)| found.is_some()).map(|(name, _)| name),
            );
        }
        println!("DONE: the file holds no expected {}, so nothing was compared", list(&all, "or"));
    } else if verdicts.iter().all(|(_, verdict)| verdict.holds) {
        println!("PASS: {}: what the file expects", names(true));
    } else {
        println!("FAIL: {}: not what the file expects; was it made with the same options?", names(false));
    }
    verdicts.iter().all(|(_, verdict)| verdict.holds)
}

/// Says which results hold what no row of attention is, and whether any does. A row without keys has an lse of −∞, and a
/// gradient is a sum, which may be too large for 16 bits.
fn not_finite<T: Number>(results: &Results<T>) -> bool {
    fn of<T: Number>(name: &str, values: &[T], counts: impl Fn(f64) -> bool) -> bool {
        let count = values.iter().filter(|&&x| counts(x.into())).count();
        if count > 0 {
            say(name, format!("{count} of {} values are NaN or infinite", values.len()));
        }
        count > 0
    }
    let mut undefined = of("o", &results.out, |x| !x.is_finite());
    undefined |= of("lse", &results.lse, |x| !x.is_finite() && x != f64::NEG_INFINITY);
    for (name, values) in GRADIENTS.iter().zip(results.gradients.iter().flatten()) {
        of(name, values, f64::is_infinite);
        undefined |= of(name, values, f64::is_nan);
    }
    for (name, values) in SHARED.iter().zip(&results.shared) {
        let values = values.as_deref().unwrap_or_default();
        of(name, values, f64::is_infinite);
        undefined |= of(name, values, f64::is_nan);
    }
    undefined
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
    let exact = reference::backward(problem, inputs, upstream.lse.as_deref(), task.extras.borrow());
    let problem = &of_type::<T>(problem);
    let Forward { out, lse, .. } = plain(problem, tensors);
    let lse: Vec<f32> = lse.into_iter().map(|x| x as f32).collect();
    let rows = rounded::Rows::new(problem, &upstream.out, &out, &lse, upstream.lse.as_deref());
    let inputs = [&tensors.query[..], &tensors.key, &tensors.value, &upstream.out];
    let all_rows = |heads, positions| sample_rows([s.batch, heads, positions], u64::MAX);
    let (queries, keys) = (all_rows(s.heads_q, s.seqlen_q), all_rows(s.heads_kv, s.seqlen_k));
    let dq = rounded::backward_query_rows(problem, inputs, &rows, tensors.extras.borrow(), &queries);
    let [dk, dv] = rounded::backward_key_rows(problem, inputs, &rows, tensors.extras.borrow(), &keys);
    let [query, key, value] = backward.expected.each_ref().map(Option::as_ref);
    let expected = |values: Option<&Vec<f64>>, exact: &[f64], plain| {
        values.map(|values| Expected::new(values.clone(), exact, plain))
    };
    [expected(query, &exact.query, dq), expected(key, &exact.key, dk), expected(value, &exact.value, dv)]
}

/// Judges those of dbias, dsinks and dalibi_slopes that the file has.
fn judge_shared<T: Number>(
    task: &Task,
    backward: &BackwardTask,
    tensors: &Tensors<T>,
    upstream: &Upstream<T>,
    found: &Shared,
) -> Vec<(&'static str, Verdict)> {
    if backward.shared.iter().all(Option::is_none) {
        return vec![];
    }
    let (lse, extras) = (upstream.lse.as_deref(), task.extras.borrow());
    let given = [&task.query[..], &task.key, &task.value, &backward.grad_out.values];
    let exact = reference::backward(&task.problem, given, lse, extras);
    let converted = [&tensors.query[..], &tensors.key, &tensors.value, &upstream.out];
    // What it costs to convert the tensors to the type, where they are not in it.
    let of_converted =
        (T::TYPE != ElementType::F32).then(|| reference::backward(&task.problem, converted, lse, extras));
    let sums = |of: &Backward| [of.bias.clone(), of.sinks.clone(), of.alibi_slopes.clone()];
    let (exact, of_converted) = (sums(&exact), of_converted.as_ref().map(sums).unwrap_or_default());
    let mut verdicts = vec![];
    for (n, name) in SHARED.into_iter().enumerate() {
        let (Some(expected), Some(found), Some(exact)) = (&backward.shared[n], &found[n], &exact[n]) else { continue };
        let cost = of_converted[n].as_ref().map_or(0.0, |of_converted| {
            Errors::of_sums(of_converted.values.iter().copied(), &exact.values, exact.terms).relative
        });
        let bound = match Bound::shared(T::TYPE) {
            Bound::Relative(most) => Bound::Relative(most + cost),
            bound => bound,
        };
        verdicts.push((name, bound.judge(Errors::of_sums(found.iter().copied(), expected, exact.terms))));
    }
    verdicts
}

/// The plain computation in type `T`.
fn plain<T: Number>(problem: &Problem, tensors: &Tensors<T>) -> Forward {
    rounded::forward(&of_type::<T>(problem), &tensors.query, &tensors.key, &tensors.value, tensors.extras.borrow())
}

/// The problem in type `T`, whatever that of the file is.
fn of_type<T: Number>(problem: &Problem) -> Problem {
    let mut problem = problem.clone();
    problem.element_type = T::TYPE;
    problem
}

/// A line with its subject in front; further lines of the same subject are indented.
fn say(subject: &str, text: impl std::fmt::Display) {
    println!("{subject:<8} {}", harmless(&text.to_string(), true).replace('\n', "\n         "));
}

/// An error for an option that nothing would look at.
fn refuse_idle(args: &Args) -> Result<()> {
    if args.coop_form.is_some() && args.kernel != KernelName::Coop {
        return Err("--coop-form is for the coop kernel, which only --kernel coop takes".into());
    }
    let idle = [("--adapter", args.adapter.is_some()), ("--checked", args.checked)];
    match idle.iter().find(|(_, given)| *given && args.kernel == KernelName::Reference) {
        Some((option, _)) => Err(format!("{option} is for kernels, and --kernel reference computes on the host")),
        None => Ok(()),
    }
}

fn run(args: &Args) -> Result<bool> {
    refuse_idle(args)?;
    let name = match &args.input {
        None => "the fixture, a layer of all-MiniLM-L6-v2".to_string(),
        Some(path) => harmless(&path.display().to_string(), false),
    };
    let bytes = match &args.input {
        None => FIXTURE.into(),
        Some(path) => std::fs::read(path).map_err(|error| format!("cannot read {name}: {error}"))?,
    };
    let file =
        SafeTensors::deserialize(&bytes).map_err(|error| format!("{name} is no safetensors file: {}", cut(error)))?;
    let reading = progress("reading the file");
    let task = read(&file, args)?;
    drop(reading);
    if let Some(warning) = warn_of_unknown(&file, &args.ignore, task.problem.mods.as_ref()) {
        eprintln!("attend: warning: {}", harmless(&warning, false));
    }
    let (ty, s) = (task.problem.element_type, &task.problem.shape);
    let lengths = match (&task.extras.seqlens_q, &task.extras.seqlens_k) {
        (None, None) => "all keys count".into(),
        (None, Some(keys)) => format!("key lengths {}", first_few(keys)),
        (Some(queries), None) => format!("query lengths {}", first_few(queries)),
        (Some(queries), Some(keys)) => {
            format!("query lengths {}, key lengths {}", first_few(queries), first_few(keys))
        }
    };
    let upstream = match &task.backward {
        None => "",
        Some(BackwardTask { grad_lse: None, .. }) => "; gradients from do",
        Some(_) => "; gradients from do and dlse",
    };
    say("input", format!("{name}, in {ty}; {lengths}{upstream}"));
    // By name: a file of the other order would be read without complaint where as many heads as positions would do.
    let dims = |tensor, positions, sizes: [u32; 4]| {
        let named = args.layout.names(positions).into_iter().zip(args.layout.of(sizes));
        let named: Vec<_> = named.map(|(name, size)| format!("{name} {size}")).collect();
        say(tensor, named.join(", "));
    };
    dims("q", "queries", [s.batch, s.heads_q, s.seqlen_q, s.head_dim]);
    dims("k", "keys", [s.batch, s.heads_kv, s.seqlen_k, s.head_dim]);
    dims("v", "keys", [s.batch, s.heads_kv, s.seqlen_k, s.head_dim_v]);
    let [b, h, q, k] = task.mask_sizes;
    let of_mask = format!("batch {b}, heads {h}, queries {q}, keys {k}");
    match (&task.problem.mask, &task.problem.bias) {
        (Some(_), _) => say("mask", format!("attn_mask, true takes part: {of_mask}")),
        (_, Some(bias)) => say("bias", format!("attn_mask, added in {}: {of_mask}", bias.element_type)),
        (None, None) => {}
    }
    match (task.problem.alibi, args.alibi) {
        (None, _) => {}
        (Some(_), true) => say("ALiBi", "the slopes of its paper"),
        (Some(Alibi::PerBatchAndHead), false) => say("ALiBi", "alibi_slopes, one for each batch entry and head"),
        (Some(_), false) => say("ALiBi", "alibi_slopes, one a head"),
    }
    if task.problem.sinks {
        say("sinks", "one a head");
    }
    if let Some(text) = describe_blocks(&task.problem, &task.extras) {
        say("blocks", text);
    }
    if let Some(mods) = &task.problem.mods {
        say("mods", describe_mods(mods));
    }
    if let Some(Dropout { probability, seed, offset }) = task.extras.dropout {
        say("dropout", format!("{probability}, seed {seed}, offset {offset}"));
    }
    match task.problem.element_type {
        ElementType::F32 => attend::<f32>(args, &task),
        ElementType::F16 => attend::<half::f16>(args, &task),
        ElementType::BF16 => attend::<half::bf16>(args, &task),
        other => Err(format!("{other} is no type of numbers on the host")),
    }
}

fn main() -> ExitCode {
    match arguments().and_then(|args| run(&args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            let line: Vec<_> = error.lines().map(str::trim).collect();
            eprintln!("attend: {}", harmless(&line.join(" "), false));
            ExitCode::from(2)
        }
    }
}
