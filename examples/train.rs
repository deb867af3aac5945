//! Trains a small transformer on a text, character by character, and lets it write. Its attention runs on the device,
//! forward, backward and, at the end, from a cache of keys and values. `--help` lists the options.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use wgpu_flash_attention::{Context, Dropout, HeadlessOptions, Kernel, Shape};

use flash_attention_testing::attention::{CachedAttention, DeviceAttention};
use flash_attention_testing::buffers::{Number, adapter_name};
use flash_attention_testing::output::OutputFile;
use flash_attention_testing::terminal::{arguments, harmless};
use flash_attention_testing::transformer::{AdamW, Sizes, Text, Transformer};

/// What the host computes in.
type Real = f32;

/// What stops the command, in one line.
type Result<T> = std::result::Result<T, String>;

/// The first chapter of Lewis Carroll's Alice's Adventures in Wonderland, London 1865.
const ALICE: &str = include_str!("data/alice.txt");

/// Trains a small transformer on a text, character by character, and prints a sample of what it writes then.
///
/// Attention runs on the device, forward and backward, and for the sample by the decode kernel; the other layers run on
/// the host.
#[derive(Parser)]
#[command(name = "train", version, after_help = "Exit code: 0 if all went well, 2 for bad input.")]
struct Args {
    /// The text to learn, in UTF-8; without it, the first chapter of Alice's Adventures in Wonderland
    text: Option<PathBuf>,
    /// Steps of training
    #[arg(long, default_value_t = 400, value_parser = within(1..=10_000_000))]
    steps: u64,
    /// Blocks of the model
    #[arg(long, default_value_t = 2, value_parser = within(1..=64))]
    layers: u64,
    /// Heads of each block; twice this number must divide the dimension
    #[arg(long, default_value_t = 4, value_parser = within(1..=64))]
    heads: u64,
    /// The dimension of the model
    #[arg(long, default_value_t = 128, value_parser = within(2..=2048))]
    dim: u64,
    /// Characters that the model sees at most
    #[arg(long, default_value_t = 64, value_parser = within(2..=65536))]
    context: u64,
    /// Sequences a step
    #[arg(long, default_value_t = 16, value_parser = within(1..=1024))]
    batch: u64,
    /// The learning rate at its highest
    #[arg(long, default_value = "2e-3", value_parser = parse_rate, allow_negative_numbers = true)]
    lr: Real,
    /// The kernel of both passes of training
    #[arg(long, value_enum, default_value = "auto")]
    kernel: KernelName,
    /// The type of q, k, v, o and their gradients on the device
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Type,
    /// How likely attention is to drop a probability; each step and block draws others
    #[arg(long, value_name = "P", default_value = "0", value_parser = parse_dropout, allow_negative_numbers = true)]
    dropout: f32,
    /// What all random numbers come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Draws the loss
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Characters to write at the end
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = within(0..=1_000_000))]
    sample: u64,
    /// The adapter whose name holds this text
    #[arg(long, value_name = "SUBSTRING")]
    adapter: Option<String>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum KernelName {
    Auto,
    Tile,
    /// Opens the device with cooperative matrices, which wgpu calls experimental
    Coop,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
}

fn within(range: std::ops::RangeInclusive<u64>) -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(range)
}

fn parse_rate(text: &str) -> Result<Real> {
    let rate = text.parse().ok().filter(|rate| (Real::MIN_POSITIVE..=1.0).contains(rate));
    rate.ok_or("a number above 0, at most 1, is expected".into())
}

fn parse_dropout(text: &str) -> Result<f32> {
    let probability = text.parse().ok().filter(|probability| (0.0..1.0).contains(probability));
    probability.ok_or("a probability from 0 to below 1 is expected".into())
}

fn words(error: wgpu_flash_attention::Error) -> String {
    error.to_string()
}

/// The learning rate rises over the first twentieth of the steps and falls along a cosine to a tenth.
fn rate(args: &Args, step: u64) -> Real {
    let done = step as Real / args.steps as Real;
    let cosine = 0.55 + 0.45 * (std::f32::consts::PI * done).cos();
    args.lr * cosine * (20.0 * (step + 1) as Real / args.steps as Real).min(1.0)
}

/// Trains the model; the loss of each step.
fn train<T: Number>(args: &Args, context: &Context, text: &Text, model: &mut Transformer<Real>) -> Result<Vec<f64>> {
    let shape =
        Shape::square(args.batch as u32, args.heads as u32, args.context as u32, (args.dim / args.heads) as u32);
    let kernel = match args.kernel {
        KernelName::Auto => None,
        KernelName::Tile => Some(Kernel::Tile),
        KernelName::Coop => Some(Kernel::Coop),
    };
    let dropout = Dropout { probability: args.dropout, seed: args.seed, offset: 0 };
    let dropout = Some(dropout).filter(|dropout| dropout.probability > 0.0);
    let mut attention =
        DeviceAttention::<T>::new(context, shape, args.layers as usize, kernel, dropout).map_err(words)?;
    say("plan", attention.plan());
    let mut rng = Rng::with_seed(args.seed);
    let mut optimizer = AdamW::new(0.1);
    let bar = ProgressBar::new(args.steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}, {eta} left") {
        bar.set_style(style);
    }
    let mut losses = vec![];
    for step in 0..args.steps {
        let batch = text.batch(&mut rng, args.batch as usize, args.context as usize);
        let loss = model.learn(&batch, &mut attention).map_err(words)?;
        if !loss.is_finite() {
            bar.finish_and_clear();
            return Err(format!("the loss is {loss} at step {}; a smaller --lr may help", step + 1));
        }
        optimizer.step(model.parameters(), rate(args, step));
        losses.push(loss);
        bar.set_message(format!("loss {loss:.3}"));
        bar.inc(1);
        // What stays on the screen, or in a file: the first and every tenth.
        if step == 0 || (step + 1) * 10 / args.steps > step * 10 / args.steps {
            bar.suspend(|| say("step", format!("{:>5}: loss {loss:.3}", step + 1)));
        }
    }
    bar.finish_and_clear();
    Ok(losses)
}

/// What the model writes, from the first character of the text on. The cache on the device holds what the model sees.
fn sample<T: Number>(args: &Args, context: &Context, text: &Text, model: &mut Transformer<Real>) -> Result<String> {
    const TEMPERATURE: Real = 0.7;
    let heads = [args.heads, args.dim / args.heads].map(|n| n as u32);
    let mut attention =
        CachedAttention::<T>::new(context, heads, args.context as u32, args.layers as usize).map_err(words)?;
    let mut rng = Rng::with_seed(args.seed);
    let mut seen = vec![text.tokens[0]];
    let mut cached = 0;
    let mut written = String::new();
    for _ in 0..args.sample {
        // Positions end with the context: the later half of it is the start of a new one.
        if seen.len() > args.context as usize {
            seen.drain(..seen.len() - args.context as usize / 2);
            cached = 0;
        }
        let mut logits = vec![];
        while cached < seen.len() {
            attention.move_to(cached);
            logits =
                model.logits(&[seen[cached]], &[cached], &mut attention).map_err(words)?.into_raw_vec_and_offset().0;
            cached += 1;
        }
        let max = logits.iter().copied().fold(Real::NEG_INFINITY, Real::max);
        let weights: Vec<Real> = logits.iter().map(|x| ((x - max) / TEMPERATURE).exp()).collect();
        let mut rest = rng.f32() * weights.iter().sum::<Real>();
        let chosen = weights.iter().position(|weight| {
            rest -= weight;
            rest < 0.0
        });
        let token = chosen.unwrap_or(weights.len() - 1);
        seen.push(token);
        written.push(text.alphabet[token]);
    }
    Ok(written)
}

fn draw(losses: &[f64]) -> std::result::Result<String, Box<dyn std::error::Error>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (700, 450)).into_drawing_area();
        root.fill(&WHITE)?;
        let highest = losses.iter().copied().fold(0.1, f64::max);
        let mut chart = ChartBuilder::on(&root)
            .caption("Loss", ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(1.0..losses.len().max(2) as f64, 0.0..1.05 * highest)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("nats a character")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .light_line_style(WHITE)
            .draw()?;
        let points = (1..).map(f64::from).zip(losses.iter().copied());
        chart.draw_series(LineSeries::new(points, Palette99::pick(0).stroke_width(1)))?;
        root.present()?;
    }
    Ok(svg)
}

/// A line with its subject in front; further lines of the same subject are indented.
fn say(subject: &str, text: impl std::fmt::Display) {
    println!("{subject:<8} {}", harmless(&text.to_string(), true).replace('\n', "\n         "));
}

fn run(args: &Args) -> Result<()> {
    let (name, text) = match &args.text {
        None => ("the first chapter of Alice's Adventures in Wonderland".to_string(), ALICE.to_string()),
        Some(path) => {
            let name = harmless(&path.display().to_string(), false);
            let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {name}: {error}"))?;
            (name, text)
        }
    };
    let text = Text::new(&text);
    let (characters, needed) = (text.tokens.len(), args.context as usize + 1);
    if characters < needed {
        return Err(format!("{name} has {characters} characters; --context {} needs at least {needed}", args.context));
    }
    if !args.dim.is_multiple_of(2 * args.heads) {
        return Err(format!("--dim is {}; it must be a multiple of {}, twice --heads", args.dim, 2 * args.heads));
    }
    let sizes = Sizes {
        vocabulary: text.alphabet.len(),
        context: args.context as usize,
        dim: args.dim as usize,
        layers: args.layers as usize,
    };
    // Now, rather than after the training.
    let plot = args.plot.as_ref().map(|path| OutputFile::open(path, args.text.as_deref().as_slice())).transpose()?;
    let mut options = HeadlessOptions::default().cooperative_matrices(args.kernel == KernelName::Coop);
    options.adapter = args.adapter.clone();
    let context = Context::headless_with(&options).map_err(words)?;
    say("adapter", adapter_name(&context));
    say("text", format!("{name}: {characters} characters, {} different ones", sizes.vocabulary));
    let mut model = Transformer::new(sizes, args.seed);
    let weights: usize = model.parameters().iter().map(|parameter| parameter.value.len()).sum();
    say("model", format!("{} blocks of dimension {}, {weights} weights", args.layers, args.dim));
    let start = Instant::now();
    let losses = match args.dtype {
        Type::F32 => train::<f32>(args, &context, &text, &mut model)?,
        Type::F16 => train::<half::f16>(args, &context, &text, &mut model)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    say("time", format!("{seconds:.1} s, {:.1} ms a step", seconds * 1e3 / args.steps as f64));
    if let Some(mut plot) = plot {
        let svg = draw(&losses).map_err(|error| format!("cannot draw the loss: {error}"))?;
        plot.write_all(svg.as_bytes()).map_err(|error| format!("cannot write {}: {error}", plot.path().display()))?;
        plot.finish()?;
    }
    if args.sample > 0 {
        let written = match args.dtype {
            Type::F32 => sample::<f32>(args, &context, &text, &mut model)?,
            Type::F16 => sample::<half::f16>(args, &context, &text, &mut model)?,
        };
        say("sample", written);
    }
    Ok(())
}

fn main() -> ExitCode {
    match arguments().and_then(|args| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("train: {}", harmless(&error, false));
            ExitCode::from(2)
        }
    }
}
