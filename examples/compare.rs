//! Times the kernels beside each other, after checking what they computed. `--help` lists the options.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use plotters::coord::Shift;
use plotters::prelude::*;
use wgpu_flash_attention::matrices::RoundByHand;
use wgpu_flash_attention::tune::{BackwardTile, CoopBackwardTile, CoopTile, DecodeTile, FusedTile, Tile};
use wgpu_flash_attention::{
    Alibi, Bias, Causal, Context, CoopForm, Dropout, ElementType, HeadlessOptions, Kernel, PlanOptions, Problem,
    ScoreLayout, Shape, alibi_slopes,
};

use flash_attention_testing::Extras;
use flash_attention_testing::buffers::{
    GradientBuffers, Inputs, Number, Outputs, Shared, Tensors, Upstream, adapter_name, bind, random, shared_buffers,
};
use flash_attention_testing::output::OutputFile;
use flash_attention_testing::sample::{GRADIENTS, GradientSample, Sample, sample_rows};
use flash_attention_testing::terminal::{Form, Progress, bytes, harmless};
use flash_attention_testing::timing::{Time, clock, measure, pass_times};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Times every kernel on a list of shapes. Rows of each output, gradients included, are checked against f64 first; a kernel
/// that fails gets no figure, and the exit code is 1.
#[derive(Parser)]
#[command(name = "compare", version)]
struct Args {
    /// Batch, heads (or query heads/key-value heads), sequence length, head dim and, where they are not as many as the
    /// keys, queries; several shapes separated by ';'
    #[arg(long, value_name = "B,H,N,D[,NQ];...", value_delimiter = ';', value_parser = parse_shape,
          default_value = "1,8,512,64;1,8,1024,64;1,8,2048,64")]
    shapes: Vec<Shape>,
    /// With the causal mask, without it, or both
    #[arg(long, value_enum, num_args = 0..=1, default_value = "none", default_missing_value = "only")]
    causal: Masks,
    /// Element types in memory
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32")]
    dtype: Vec<Type>,
    /// The forward pass, the backward pass over its output, or one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_value = "fwd")]
    op: Vec<Op>,
    /// Times each kernel with this too, beside the same kernel without; may be several. A bias and a mask are [1,H,NQ,N], the bias
    /// in the element type or in f32; ALiBi has its paper's slopes, softcap is 30, dropout 0.1. Backward passes give the gradients of bias and sinks
    #[arg(long, value_enum, value_delimiter = ',')]
    feature: Vec<Feature>,
    /// Kernels to time; coop and coop-scaled open the device with cooperative matrices, which wgpu calls experimental
    #[arg(long, value_enum, value_delimiter = ',', default_value = "naive,tile")]
    kernels: Vec<KernelName>,
    /// Times this tile in place of the tuned one, its loops written out (1) or not (0); may be repeated
    #[arg(long, value_name = "ROWS,KEYS,TY,TX,CHUNK,VALUE_KEYS,WRITTEN_OUT", value_parser = parse_tile)]
    tile: Vec<Tile>,
    /// Times the backward pass with this tile in place of the tuned ones, its loops written out (1) or not (0); may be
    /// repeated
    #[arg(long, value_name = "OWN,STEP,TY,TX,CHUNK,BLOCK,WRITTEN_OUT", value_parser = parse_backward_tile)]
    backward_tile: Vec<BackwardTile>,
    /// Times the backward pass in f32 that computes all gradients at once with this tile in place of the tuned one, its loops
    /// written out (1) or not (0); may be repeated
    #[arg(long, value_name = "OWN,STEP,TY,TX,CHUNK,LINES,BLOCK_KEYS,BLOCK_ROWS,WRITTEN_OUT", value_parser = parse_fused_tile)]
    fused_tile: Vec<FusedTile>,
    /// Times the coop kernel with this tile in place of the tuned one; may be repeated
    #[arg(long, value_name = "SUBGROUPS,ROW_MATRICES,KEYS,BUFFERS", value_parser = parse_coop_tile)]
    coop_tile: Vec<CoopTile>,
    /// Times the backward pass of the coop kernel with these tiles, of the keys' and values' gradients and of the queries', in
    /// place of the tuned ones; each is SUBGROUPS,MATRICES,STEP,COLUMNS,AHEAD (0 or 1); may be repeated
    #[arg(long, value_name = "TILE/TILE", value_parser = parse_coop_backward_tiles)]
    coop_backward_tiles: Vec<[CoopBackwardTile; 2]>,
    /// Times the coop kernel in this form in place of the faster one that the device allows; may be repeated
    #[arg(long, value_enum)]
    coop_form: Vec<Form>,
    /// Times the coop kernel on matrices of bf16 with this way to round in place of the one that the device needs; may be several
    #[arg(long, value_enum, value_delimiter = ',')]
    round_bf16: Vec<RoundName>,
    /// Times the decode kernel with so many splits of the keys, in place of the tuned number; may be repeated
    #[arg(long)]
    splits: Vec<u32>,
    /// Times the decode kernel with this tile in place of the tuned one
    #[arg(long, value_name = "ROWS,THREADS,KEY_THREADS,THREAD_KEYS,LANES", value_parser = parse_decode_tile)]
    decode_tile: Option<DecodeTile>,
    /// The adapter whose name holds this text
    #[arg(long)]
    adapter: Option<String>,
    /// Writes the figures as comma-separated values
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draws time and extra memory against the sequence length
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Masks {
    None,
    Only,
    Both,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Op {
    #[value(name = "fwd")]
    Forward,
    #[value(name = "bwd")]
    Backward,
    #[value(name = "fwd+bwd")]
    Both,
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Op::Forward => "forward",
            Op::Backward => "backward",
            Op::Both => "forward+backward",
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

impl From<Type> for ElementType {
    fn from(ty: Type) -> Self {
        match ty {
            Type::F32 => ElementType::F32,
            Type::F16 => ElementType::F16,
            Type::Bf16 => ElementType::BF16,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Feature {
    Bias,
    BiasF32,
    Mask,
    Alibi,
    Sinks,
    Softcap,
    Dropout,
}

impl Feature {
    fn name(self) -> &'static str {
        match self {
            Feature::Bias => "bias",
            Feature::BiasF32 => "bias-f32",
            Feature::Mask => "mask",
            Feature::Alibi => "alibi",
            Feature::Sinks => "sinks",
            Feature::Softcap => "softcap",
            Feature::Dropout => "dropout",
        }
    }

    /// The problem with it, and what it then has besides q, k and v.
    fn add_to(self, mut problem: Problem) -> (Problem, Extras) {
        let s = problem.shape;
        let sizes = [1, s.heads_q, s.seqlen_q, s.seqlen_k];
        let scores: usize = sizes.iter().map(|&n| n as usize).product();
        let mut extras = Extras::default();
        match self {
            Feature::Bias | Feature::BiasF32 => {
                let ty = if self == Feature::BiasF32 { ElementType::F32 } else { problem.element_type };
                problem = problem.with_bias(Bias::new(ty, ScoreLayout::contiguous(sizes)));
                // Exact in every type.
                extras.bias = Some(random::<f32>(scores, 5).into_iter().map(|x| (8.0 * x).round() / 8.0).collect());
            }
            Feature::Mask => {
                problem = problem.with_mask(ScoreLayout::contiguous(sizes));
                // Three in four take part.
                extras.mask = Some(random::<f32>(scores, 5).into_iter().map(|x| x > -0.674).collect());
            }
            Feature::Alibi => {
                problem = problem.with_alibi(Alibi::PerHead);
                extras.alibi_slopes = Some(alibi_slopes(s.heads_q));
            }
            Feature::Sinks => {
                problem = problem.with_sinks();
                extras.sinks = Some(random(s.heads_q as usize, 5));
            }
            Feature::Softcap => problem = problem.softcap(30.0),
            Feature::Dropout => {
                problem = problem.with_dropout(0.1);
                extras.dropout = Some(Dropout { probability: 0.1, seed: 42, offset: 0 });
            }
        }
        (problem, extras)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum KernelName {
    Naive,
    Tile,
    Coop,
    /// The coop kernel with bf16 scaled to f16, where coop takes matrices of bf16
    CoopScaled,
    Decode,
}

/// How the coop kernel on matrices of bf16 rounds.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RoundName {
    Not,
    Add,
    Fma,
    Mask,
    Pack,
}

impl From<RoundName> for RoundByHand {
    fn from(name: RoundName) -> Self {
        match name {
            RoundName::Not => RoundByHand::Not,
            RoundName::Add => RoundByHand::Add,
            RoundName::Fma => RoundByHand::Fma,
            RoundName::Mask => RoundByHand::Mask,
            RoundName::Pack => RoundByHand::Pack,
        }
    }
}

fn numbers<const N: usize>(text: &str) -> std::result::Result<[u32; N], String> {
    let parsed: std::result::Result<Vec<u32>, _> = text.split(',').map(|part| part.trim().parse()).collect();
    let wrong = || format!("{N} whole numbers separated by commas are expected");
    parsed.map_err(|_| wrong())?.try_into().map_err(|_| wrong())
}

fn parse_shape(text: &str) -> std::result::Result<Shape, String> {
    // "H/Hkv" is one number more than "H".
    let heads = text.split(',').nth(1).unwrap_or("");
    let [batch, heads_q, heads_kv, seqlen_k, head_dim, seqlen_q] = match (heads.contains('/'), text.split(',').count())
    {
        (true, 5) => numbers(&text.replacen('/', ",", 1))?,
        (true, _) => numbers(&text.replacen('/', ",", 1)).map(|[b, h, kv, n, d]| [b, h, kv, n, d, n])?,
        (false, 5) => numbers(text).map(|[b, h, n, d, nq]| [b, h, h, n, d, nq])?,
        (false, _) => numbers(text).map(|[b, h, n, d]| [b, h, h, n, d, n])?,
    };
    if [batch, heads_q, heads_kv, seqlen_k, head_dim, seqlen_q].contains(&0) {
        return Err("every size must be at least 1".into());
    }
    Ok(Shape { heads_kv, seqlen_q, ..Shape::square(batch, heads_q, seqlen_k, head_dim) })
}

fn parse_decode_tile(text: &str) -> std::result::Result<DecodeTile, String> {
    let [rows, threads, key_threads, thread_keys, lanes] = numbers(text)?;
    Ok(DecodeTile { rows, threads, key_threads, thread_keys, lanes })
}

fn parse_coop_tile(text: &str) -> std::result::Result<CoopTile, String> {
    let [subgroups, row_matrices, keys, buffers] = numbers(text)?;
    Ok(CoopTile { subgroups, row_matrices, keys, buffers })
}

fn parse_tile(text: &str) -> std::result::Result<Tile, String> {
    let [rows, keys, threads_y, threads_x, chunk, value_keys, written_out] = numbers(text)?;
    Ok(Tile { rows, keys, threads_y, threads_x, chunk, value_keys, written_out: written_out > 0 })
}

fn parse_backward_tile(text: &str) -> std::result::Result<BackwardTile, String> {
    let [own, step, threads_y, threads_x, chunk, block, written_out] = numbers(text)?;
    Ok(BackwardTile { own, step, threads_y, threads_x, chunk, block, written_out: written_out > 0 })
}

fn parse_fused_tile(text: &str) -> std::result::Result<FusedTile, String> {
    let [own, step, threads_y, threads_x, chunk, lines, block_keys, block_rows, written_out] = numbers(text)?;
    let written_out = written_out > 0;
    Ok(FusedTile { own, step, threads_y, threads_x, chunk, lines, block_keys, block_rows, written_out })
}

fn parse_coop_backward_tiles(text: &str) -> std::result::Result<[CoopBackwardTile; 2], String> {
    let (dkdv, dq) = text.split_once('/').ok_or("two tiles separated by '/' are expected")?;
    let tile = |text| {
        numbers(text).map(|[subgroups, matrices, step, columns, ahead]| CoopBackwardTile {
            subgroups,
            matrices,
            step,
            columns,
            ahead: ahead > 0,
        })
    };
    Ok([tile(dkdv)?, tile(dq)?])
}

/// Something to time: a kernel, with a tile or number of splits if the table's is not wanted.
#[derive(Clone, Copy)]
struct Candidate {
    kernel: Kernel,
    tile: Option<Tile>,
    backward_tile: Option<BackwardTile>,
    fused_tile: Option<FusedTile>,
    coop_tile: Option<CoopTile>,
    coop_backward_tiles: Option<[CoopBackwardTile; 2]>,
    coop_form: Option<CoopForm>,
    scaled_bf16: bool,
    round_bf16: Option<RoundByHand>,
    decode_tile: Option<DecodeTile>,
    splits: Option<u32>,
}

impl Candidate {
    fn of(kernel: Kernel) -> Self {
        Candidate {
            kernel,
            tile: None,
            backward_tile: None,
            fused_tile: None,
            coop_tile: None,
            coop_backward_tiles: None,
            coop_form: None,
            scaled_bf16: false,
            round_bf16: None,
            decode_tile: None,
            splits: None,
        }
    }
}

impl std::fmt::Display for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kernel.fmt(f)?;
        if let Some(form) = self.coop_form {
            write!(f, " {form}")?;
        }
        if self.scaled_bf16 {
            write!(f, " scaled")?;
        }
        if let Some(way) = self.round_bf16 {
            write!(f, " rounds {way:?}")?;
        }
        if let Some(CoopTile { subgroups, row_matrices, keys, buffers }) = self.coop_tile {
            write!(f, "[{subgroups} {row_matrices} {keys} {buffers}]")?;
        }
        for t in self.coop_backward_tiles.iter().flatten() {
            let CoopBackwardTile { subgroups, matrices, step, columns, ahead } = *t;
            write!(f, "[{subgroups} {matrices} {step} {columns} {}]", u32::from(ahead))?;
        }
        if let Some(t) = self.tile {
            let Tile { rows, keys, threads_y, threads_x, chunk, value_keys, written_out } = t;
            write!(f, "[{rows} {keys} {threads_y} {threads_x} {chunk} {value_keys} {}]", u32::from(written_out))?;
        }
        if let Some(t) = self.backward_tile {
            let BackwardTile { own, step, threads_y, threads_x, chunk, block, written_out } = t;
            write!(f, "[{own} {step} {threads_y} {threads_x} {chunk} {block} {}]", u32::from(written_out))?;
        }
        if let Some(t) = self.fused_tile {
            let FusedTile { own, step, threads_y, threads_x, chunk, lines, block_keys, block_rows, written_out } = t;
            write!(
                f,
                "[{own} {step} {threads_y} {threads_x} {chunk} {lines} {block_keys} {block_rows} {}]",
                u32::from(written_out)
            )?;
        }
        if let Some(DecodeTile { rows, threads, key_threads, thread_keys, lanes }) = self.decode_tile {
            write!(f, "[{rows} {threads} {key_threads} {thread_keys} {lanes}]")?;
        }
        self.splits.map_or(Ok(()), |splits| write!(f, " {splits} splits"))
    }
}

/// What to time in one operation.
fn candidates(args: &Args, op: Op, dtype: Type) -> Vec<Candidate> {
    /// The table's choice if nothing is asked for.
    fn or_none<T: Copy>(asked: &[T]) -> Vec<Option<T>> {
        if asked.is_empty() { vec![None] } else { asked.iter().copied().map(Some).collect() }
    }
    let mut all = vec![];
    for kernel in &args.kernels {
        match kernel {
            KernelName::Naive => all.push(Candidate::of(Kernel::Naive)),
            KernelName::CoopScaled if dtype == Type::Bf16 => {
                all.push(Candidate { scaled_bf16: true, ..Candidate::of(Kernel::Coop) });
            }
            // There is one way to f16 from it, or none.
            KernelName::CoopScaled => {}
            KernelName::Coop => {
                let forms: Vec<CoopForm> = args.coop_form.iter().map(|&form| form.into()).collect();
                let coop = Candidate::of(Kernel::Coop);
                // Of the pass that is not timed the table's.
                let tiles = or_none(if op == Op::Backward { &[] } else { &args.coop_tile });
                let backward_tiles = or_none(if op == Op::Forward { &[] } else { &args.coop_backward_tiles });
                let ways: Vec<RoundByHand> = args.round_bf16.iter().map(|&way| way.into()).collect();
                let ways = or_none(if dtype == Type::Bf16 { &ways } else { &[] });
                for coop_form in or_none(&forms) {
                    for &coop_tile in &tiles {
                        for &round_bf16 in &ways {
                            let coop = Candidate { coop_form, coop_tile, round_bf16, ..coop };
                            let with = |&coop_backward_tiles| Candidate { coop_backward_tiles, ..coop };
                            all.extend(backward_tiles.iter().map(with));
                        }
                    }
                }
            }
            KernelName::Decode => {
                let decode = Candidate { decode_tile: args.decode_tile, ..Candidate::of(Kernel::Decode) };
                all.extend(or_none(&args.splits).into_iter().map(|splits| Candidate { splits, ..decode }));
            }
            KernelName::Tile => {
                // Of the pass that is not timed the table's.
                let tiles = or_none(if op == Op::Backward { &[] } else { &args.tile });
                let (split, fused) = match op {
                    Op::Forward => (vec![], vec![]),
                    _ => (args.backward_tile.clone(), args.fused_tile.clone()),
                };
                for tile in tiles {
                    let tile = Candidate { tile, ..Candidate::of(Kernel::Tile) };
                    if split.is_empty() && fused.is_empty() {
                        all.push(tile);
                    }
                    all.extend(split.iter().map(|&t| Candidate { backward_tile: Some(t), ..tile }));
                    all.extend(fused.iter().map(|&t| Candidate { fused_tile: Some(t), ..tile }));
                }
            }
        }
    }
    all
}

/// A figure that was checked.
struct Figure {
    name: String,
    op: Op,
    problem: Problem,
    feature: Option<Feature>,
    time: Time,
    extra_bytes: u64,
}

impl Figure {
    fn teraflops(&self) -> f64 {
        let flops = match self.op {
            Op::Forward => self.problem.forward_flops(),
            Op::Backward => self.problem.backward_flops(),
            Op::Both => self.problem.forward_flops() + self.problem.backward_flops(),
        };
        flops / self.time.median * 1e-12
    }

    /// Of K and V, each read once: what bounds the forward pass of few queries.
    fn gigabytes_per_second(&self) -> Option<f64> {
        if self.op != Op::Forward {
            return None;
        }
        let s = &self.problem.shape;
        let elements = s.batch as f64 * s.heads_kv as f64 * s.seqlen_k as f64 * (s.head_dim + s.head_dim_v) as f64;
        Some(elements * self.problem.element_type.bytes() as f64 / self.time.median * 1e-9)
    }
}

/// How many rows of each output are checked.
const SAMPLES: u64 = 64;

/// What is wrong with a result, if anything.
fn check<T: Number>(sample: &Sample, problem: &Problem, out: &[T], lse: &[f32]) -> std::result::Result<(), String> {
    let is_nan = |&x: &T| -> bool { x.into().is_nan() };
    if out.iter().any(is_nan) || lse.iter().any(|x| x.is_nan()) {
        return Err("WRONG: some elements were not written or are NaN".into());
    }
    let broken = ["o", "lse"].into_iter().zip(sample.judge(problem, out, lse)).find(|(_, verdict)| !verdict.holds);
    broken.map_or(Ok(()), |(name, verdict)| Err(format!("WRONG: {name}: {verdict}")))
}

/// Prints the rows of the table as they are measured, and keeps them.
struct Report {
    bar: ProgressBar,
    csv: Option<OutputFile>,
    /// The most bytes in buffers at one time, less what drivers take for themselves.
    most_bytes: u64,
    figures: Vec<Figure>,
    all_right: bool,
}

impl Report {
    /// On stderr: what is about to be done, with what it takes. The table alone is on stdout.
    fn note(&self, text: &str) {
        self.bar.suspend(|| eprintln!("compare: {text}"));
    }

    /// A line on stderr if what follows takes more than a second and no bar is there to show it.
    fn progress(&self, what: String) -> Option<Progress> {
        (!std::io::stderr().is_terminal()).then(|| Progress::of("compare", what))
    }

    fn line(name: &str, op: Op, problem: &Problem, feature: Option<Feature>, rest: &str) -> String {
        let causal = if problem.causal.is_some() { "causal" } else { "" };
        let feature = feature.map_or("", Feature::name);
        let (ty, shape) = (problem.element_type.to_string(), label(&problem.shape));
        format!("{name:<44} {op:<16} {ty:<5} {shape:<18} {causal:<7} {feature:<8} {rest}")
    }

    fn header(&self) {
        let line = format!(
            "{:<44} {:<16} {:<5} {:<18} {:<7} {:<8} {:>10} {:>10} {:>9} {:>9} {:>12} {:>10} {:>12}",
            "kernel",
            "op",
            "dtype",
            "B,H,N,D",
            "",
            "",
            "median ms",
            "min ms",
            "TFLOP/s",
            "K, V GB/s",
            "extra memory",
            "speed-up",
            "over without"
        );
        self.bar.suspend(|| println!("{line}"));
    }

    /// A kernel without a figure, and why.
    fn refuse(&mut self, name: &str, op: Op, problem: &Problem, feature: Option<Feature>, reason: &str) {
        self.bar.suspend(|| println!("{}", Self::line(name, op, problem, feature, reason)));
    }

    fn add(&mut self, figure: Figure) -> Result<()> {
        let Figure { name, op, problem, feature, time, extra_bytes } = &figure;
        let find = |name: &str, element_type: ElementType, feature: Option<Feature>| {
            self.figures.iter().chain([&figure]).find(|other| {
                let p = &other.problem;
                (other.name.as_str(), other.op, other.feature) == (name, *op, feature)
                    && (p.element_type, p.shape, p.causal) == (element_type, problem.shape, problem.causal)
            })
        };
        let yardstick = find("naive", ElementType::F32, *feature);
        let without = feature.and_then(|_| find(name, problem.element_type, None));
        let over_without =
            |decimals: usize| without.map(|other| format!("{:.decimals$}", time.median / other.time.median));
        let speed_up = yardstick.map_or("-".into(), |naive| format!("{:.2}", naive.time.median / time.median));
        let bandwidth = |decimals: usize| figure.gigabytes_per_second().map(|x| format!("{x:.decimals$}"));
        let rest = format!(
            "{:>10.4} {:>10.4} {:>9.4} {:>9} {:>8.3} MiB {speed_up:>10} {:>12}",
            time.median * 1e3,
            time.min * 1e3,
            figure.teraflops(),
            bandwidth(1).unwrap_or("-".into()),
            *extra_bytes as f64 / 1_048_576.0,
            over_without(3).unwrap_or("-".into()),
        );
        self.bar.suspend(|| println!("{}", Self::line(name, *op, problem, *feature, &rest)));
        if let Some(csv) = &mut self.csv {
            let s = &problem.shape;
            writeln!(
                csv,
                "{name},{op},{},{},{},{},{},{},{},{:.6},{:.6},{},{},{},{}",
                problem.element_type,
                s.batch,
                s.heads_q,
                s.heads_kv,
                s.seqlen_q,
                s.head_dim,
                problem.causal.is_some() as u8,
                time.median * 1e3,
                figure.teraflops(),
                s.seqlen_k,
                bandwidth(3).unwrap_or_default(),
                feature.map_or("", Feature::name),
                over_without(6).unwrap_or_default()
            )?;
        }
        self.figures.push(figure);
        Ok(())
    }
}

/// A shape as `--shapes` takes it.
fn label(s: &Shape) -> String {
    let heads = if s.group() == 1 { s.heads_q.to_string() } else { format!("{}/{}", s.heads_q, s.heads_kv) };
    let queries = if s.seqlen_q == s.seqlen_k { String::new() } else { format!(",{}", s.seqlen_q) };
    format!("{},{heads},{},{}{queries}", s.batch, s.seqlen_k, s.head_dim)
}

/// An error for an option that nothing would look at: a tile for a kernel or a pass that is not timed.
fn refuse_idle(args: &Args) -> std::result::Result<(), String> {
    let (forward, backward) =
        (args.op.iter().any(|&op| op != Op::Backward), args.op.iter().any(|&op| op != Op::Forward));
    let kernel = |name| args.kernels.contains(&name);
    let (tile, coop, decode) = (kernel(KernelName::Tile), kernel(KernelName::Coop), kernel(KernelName::Decode));
    let options = [
        ("--tile", !args.tile.is_empty(), tile && forward, "the tile kernel's forward pass"),
        ("--backward-tile", !args.backward_tile.is_empty(), tile && backward, "the tile kernel's backward pass"),
        ("--fused-tile", !args.fused_tile.is_empty(), tile && backward, "the tile kernel's backward pass"),
        ("--coop-tile", !args.coop_tile.is_empty(), coop && forward, "the coop kernel's forward pass"),
        (
            "--coop-backward-tiles",
            !args.coop_backward_tiles.is_empty(),
            coop && backward,
            "the coop kernel's backward pass",
        ),
        ("--coop-form", !args.coop_form.is_empty(), coop, "the coop kernel"),
        (
            "--round-bf16",
            !args.round_bf16.is_empty(),
            coop && args.dtype.contains(&Type::Bf16),
            "the coop kernel in bf16",
        ),
        ("--splits", !args.splits.is_empty(), decode && forward, "the decode kernel"),
        ("--decode-tile", args.decode_tile.is_some(), decode && forward, "the decode kernel"),
    ];
    match options.iter().find(|(_, given, looked_at, _)| *given && !looked_at) {
        Some((option, _, _, of)) => Err(format!("{option} is for {of}, which is not timed; see --kernels and --op")),
        None => Ok(()),
    }
}

/// A problem, what every kernel is given of it, and what its outputs are checked with.
struct Subject {
    problem: Problem,
    feature: Option<Feature>,
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
    let feature = subject.feature;
    let name = candidate.to_string();
    let options = PlanOptions::default()
        .kernel(candidate.kernel)
        .tile(candidate.tile)
        .coop_tile(candidate.coop_tile)
        .coop_form(candidate.coop_form)
        .scaled_bf16(candidate.scaled_bf16)
        .round_bf16(candidate.round_bf16)
        .coop_backward_tiles(candidate.coop_backward_tiles)
        .decode_tile(candidate.decode_tile)
        .splits(candidate.splits)
        .backward(candidate.kernel)
        .backward_tile(candidate.backward_tile)
        .fused_tile(candidate.fused_tile);
    let mut problem = subject.problem.clone();
    if op == Op::Forward {
        problem.gradients = None;
    }
    let plan = match context.plan_with(&problem, &options) {
        Ok(plan) => plan,
        Err(error) => {
            report.refuse(&name, op, &problem, feature, &format!("refused: {error}"));
            return Ok(());
        }
    };
    let mut taken = given + output_bytes(&problem) + plan.workspace_bytes();
    if op != Op::Forward {
        let shared = shared_buffers(&problem).into_iter().flatten();
        taken += shared.map(|(element_type, n)| n * element_type.bytes()).sum::<u64>();
        taken += input_bytes(&problem) + plan.backward_workspace_bytes();
    }
    report.most_bytes = report.most_bytes.max(taken);
    let outputs = Outputs::poisoned(context, &plan)?;
    let mut bound = vec![bind(&plan, &subject.inputs, &outputs)?];
    pass_times(context, &bound, 1, 1)?;
    let (out, lse) = outputs.read::<T>(context, &problem)?;
    let mut checked = check(&subject.sample, &problem, &out, &lse);
    let mut extra_bytes = 4 * problem.shape.rows();
    if op != Op::Backward {
        extra_bytes += plan.workspace_bytes();
    }
    if let (Ok(()), Some(sample), true) = (&checked, &subject.gradients, op != Op::Forward) {
        let gradients = GradientBuffers::poisoned(context, &plan, upstream)?;
        let backward = [gradients.bind(&plan, &subject.inputs, &outputs)?];
        pass_times(context, &backward, 1, 1)?;
        let found = gradients.read::<T>(context, &problem)?;
        checked = check_gradients(sample, &problem, &found, &gradients.read_shared(context, &problem)?);
        extra_bytes += plan.backward_workspace_bytes();
        if op == Op::Backward {
            bound.clear();
        }
        bound.extend(backward);
    }
    if let Err(wrong) = checked {
        report.refuse(&name, op, &problem, feature, &wrong);
        report.all_right = false;
        return Ok(());
    }
    let time = measure(context, &bound)?;
    report.add(Figure { name, op, problem, feature, time, extra_bytes })
}

/// Of q, k and v, and so of their gradients.
fn input_bytes(problem: &Problem) -> u64 {
    let s = &problem.shape;
    let keys = s.batch as u64 * s.heads_kv as u64 * s.seqlen_k as u64;
    let elements = s.rows() * s.head_dim as u64 + keys * (s.head_dim + s.head_dim_v) as u64;
    elements * problem.element_type.bytes()
}

/// Of bias, mask, slopes and sinks.
fn extra_bytes(problem: &Problem, extras: &Extras) -> u64 {
    fn count<T>(values: &Option<Vec<T>>) -> u64 {
        values.as_ref().map_or(0, |values| values.len() as u64)
    }
    let bias = problem.bias.map_or(0, |bias| bias.element_type.bytes());
    bias * count(&extras.bias) + count(&extras.mask) + 4 * (count(&extras.alibi_slopes) + count(&extras.sinks))
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
    dtype: Type,
    shape: Shape,
    masks: &[Option<Causal>],
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
    for &causal in masks {
        let mut without = problem.clone();
        without.causal = causal;
        if needed {
            without = without.with_gradients();
        }
        let (mut subjects, mut given) = (vec![], size_of_val(&upstream.out[..]) as u64);
        for feature in [None].into_iter().chain(args.feature.iter().copied().map(Some)) {
            let name = feature.map_or(String::new(), |feature| format!(" with {}", feature.name()));
            let checking = report.progress(format!("computing rows of {}{name} in f64, to check with", label(&shape)));
            report.bar.set_message(format!("rows of {}{name} in f64, to check with", label(&shape)));
            let (mut problem, extras) = match feature {
                None => (without.clone(), Extras::default()),
                Some(feature) => feature.add_to(without.clone()),
            };
            if let Some(gradients) = &mut problem.gradients {
                (gradients.bias, gradients.sinks) = (problem.bias.is_some(), problem.sinks);
            }
            tensors.extras = extras;
            let inputs = Inputs::upload(context, &problem, &tensors)?;
            given += input_bytes(&problem) + extra_bytes(&problem, &tensors.extras);
            let rows = sample_rows([shape.batch, shape.heads_q, shape.seqlen_q], SAMPLES);
            let sample = Sample::of(&problem, &tensors, rows.clone());
            let keys = sample_rows([shape.batch, shape.heads_kv, shape.seqlen_k], SAMPLES);
            let gradients = needed.then(|| GradientSample::of(context, &problem, &tensors, &upstream, rows, keys));
            subjects.push(Subject { problem, feature, inputs, sample, gradients: gradients.transpose()? });
            drop(checking);
        }
        for &op in &args.op {
            for candidate in candidates(args, op, dtype) {
                for subject in &subjects {
                    let feature = subject.feature.map_or("", Feature::name);
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
    let mut csv = args.csv.as_ref().map(|path| OutputFile::open(path, &[])).transpose()?;
    let plot = args.plot.as_ref().map(|path| OutputFile::open(path, &[])).transpose()?;
    let mut options = HeadlessOptions::default().cooperative_matrices(
        args.kernels.iter().any(|kernel| [KernelName::Coop, KernelName::CoopScaled].contains(kernel)),
    );
    options.adapter = args.adapter.clone();
    let context = Context::headless_with(&options)?;
    let masks: &[_] = match args.causal {
        Masks::None => &[None],
        Masks::Only => &[Some(Causal::BottomRight)],
        Masks::Both => &[None, Some(Causal::BottomRight)],
    };
    let of = |dtype| args.op.iter().map(|&op| candidates(&args, op, dtype).len()).sum::<usize>();
    let candidates: usize = args.dtype.iter().map(|&dtype| of(dtype)).sum();
    let count = args.shapes.len() * masks.len() * candidates * (1 + args.feature.len());
    let bar = ProgressBar::new(count as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}")?);
    if let Some(csv) = &mut csv {
        writeln!(csv, "kernel,op,dtype,B,H,Hkv,N,D,causal,median_ms,TFLOPS,Nk,GBps,feature,over_without")?;
    }
    let mut report = Report { bar, csv, most_bytes: 0, figures: vec![], all_right: true };
    println!("adapter: {}", adapter_name(&context));
    println!(
        "times: {}; speed-up: over naive in f32 on the same op and shape; over without: time over that of the same kernel without the feature",
        clock(&context)
    );
    match context.facts().matrices.as_ref().map(|matrices| (matrices.rounding, &matrices.bf16)) {
        Some((f16, Ok(bf16))) => println!("matrices of f16, to which it rounds: {f16:?}; of bf16: {bf16:?}"),
        Some((f16, Err(why))) => println!("matrices of f16, to which it rounds: {f16:?}; none of bf16: {why}"),
        None => {}
    }
    report.header();
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

fn compare_shapes(context: &Context, args: &Args, masks: &[Option<Causal>], report: &mut Report) -> Result<()> {
    for &shape in &args.shapes {
        for &dtype in &args.dtype {
            match dtype {
                Type::F32 => compare_all::<f32>(context, args, dtype, shape, masks, report)?,
                Type::F16 => compare_all::<half::f16>(context, args, dtype, shape, masks, report)?,
                Type::Bf16 => compare_all::<half::bf16>(context, args, dtype, shape, masks, report)?,
            }
        }
    }
    Ok(())
}

/// Points of one line, `[N, value]`.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// One line for each kernel, type, mask and shape less the sequence length.
fn series(figures: &[Figure], value: impl Fn(&Figure) -> f64) -> Vec<Series> {
    let mut all: Vec<Series> = vec![];
    for figure in figures {
        let causal = if figure.problem.causal.is_some() { ", causal" } else { "" };
        let mut name = format!("{} {}{causal}", figure.name, figure.problem.element_type);
        if let Some(feature) = figure.feature {
            name = format!("{name}, {}", feature.name());
        }
        if common_op(figures).is_none() {
            name = format!("{name}, {}", figure.op);
        }
        if common_sizes(figures).is_none() {
            name = format!("{name}, {}", sizes(figure));
        }
        let point = (figure.problem.shape.seqlen_k as f64, value(figure));
        match all.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => all.push(Series { name, points: vec![point] }),
        }
    }
    for series in &mut all {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    all
}

/// All sizes but the sequence length.
fn sizes(figure: &Figure) -> String {
    let s = &figure.problem.shape;
    let heads = if s.group() == 1 { s.heads_q.to_string() } else { format!("{}/{}", s.heads_q, s.heads_kv) };
    format!("B {}, H {heads}, D {}", s.batch, s.head_dim)
}

/// The same, where they are those of every figure.
fn common_sizes(figures: &[Figure]) -> Option<String> {
    let first = figures.first().map(sizes)?;
    figures.iter().all(|figure| sizes(figure) == first).then_some(first)
}

/// The operation, where it is that of every figure.
fn common_op(figures: &[Figure]) -> Option<Op> {
    let first = figures.first()?.op;
    figures.iter().all(|figure| figure.op == first).then_some(first)
}

fn draw(figures: &[Figure], adapter: &str) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (1100, 500)).into_drawing_area();
        root.fill(&WHITE)?;
        let title = common_sizes(figures).map_or(adapter.into(), |sizes| format!("{sizes} on {adapter}"));
        let root = root.titled(&title, ("sans-serif", 16))?;
        let (left, right) = root.split_horizontally(550);
        let time = match common_op(figures) {
            Some(Op::Forward) => "Time of a forward pass",
            Some(Op::Backward) => "Time of a backward pass",
            Some(Op::Both) => "Time of a forward and a backward pass",
            None => "Time",
        };
        panel(&left, time, "ms", &series(figures, |figure| figure.time.median * 1e3))?;
        let memory = match common_op(figures) {
            Some(Op::Forward) => "Memory beyond q, k, v and o",
            _ => "Memory beyond q, k, v, o and gradients",
        };
        let mebibytes = series(figures, |figure| figure.extra_bytes as f64 / 1_048_576.0);
        panel(&right, memory, "MiB", &mebibytes)?;
        root.present()?;
    }
    Ok(svg)
}

fn panel(area: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, unit: &str, all: &[Series]) -> Result<()> {
    let values =
        |of: fn(&(f64, f64)) -> f64| -> Vec<f64> { all.iter().flat_map(|s| s.points.iter().map(of)).collect() };
    let (lengths, heights) = (values(|p| p.0), values(|p| p.1));
    let mut ticks = lengths.clone();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    // Room for the legend above the lines.
    let range = |values: &[f64], below: f64, above: f64| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        low * below..high * above
    };
    let x = range(&lengths, 0.8, 1.25).log_scale().with_key_points(ticks);
    let y = range(&heights, 0.5, 10.0).log_scale();
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc("sequence length N (positions)")
        .y_desc(unit)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y}"))
        .light_line_style(WHITE)
        .draw()?;
    for (n, Series { name, points }) in all.iter().enumerate() {
        let style = Palette99::pick(n).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
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
