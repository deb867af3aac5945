//! The options, and which kernels they ask for.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use wgpu_flash_attention::tune::{BackwardTile, CoopBackwardTile, CoopTile, DecodeTile, FusedTile, Tile};
use wgpu_flash_attention::{Causal, CoopForm, ElementType, Kernel, Problem, Shape};

use flash_attention_testing::terminal::Form;

use crate::feature::Feature;

/// Times every kernel on a list of shapes. Rows of each output, gradients included, are checked against f64 first; a kernel
/// that fails gets no figure, and the exit code is 1.
#[derive(Parser)]
#[command(name = "compare", version)]
pub struct Args {
    /// Batch, heads (or query heads/key-value heads), sequence length, head dim and, where they are not as many as the
    /// keys, queries; several shapes separated by ';'
    #[arg(long, value_name = "B,H,N,D[,NQ];...", value_delimiter = ';', value_parser = parse_shape,
          default_value = "1,8,512,64;1,8,1024,64;1,8,2048,64")]
    pub shapes: Vec<Shape>,
    /// With the causal mask, without it, or both
    #[arg(long, value_enum, num_args = 0..=1, default_value = "none", default_missing_value = "only")]
    pub causal: Masks,
    /// Element types in memory
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32")]
    pub dtype: Vec<Type>,
    /// The forward pass, the backward pass over its output, or one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_value = "fwd")]
    pub op: Vec<Op>,
    /// Times each kernel with this too, beside the same kernel without; may be several. A bias and a mask are [1,H,NQ,N], the bias
    /// in the element type or in f32; ALiBi has its paper's slopes, softcap is 30, dropout 0.1. Backward passes give the gradients of bias and sinks.
    /// blocks: of 128 by 128, one in four by chance, and the diagonal; window-blocks: a causal window of 512 keys with block lists;
    /// documents: of 512 tokens, causal, a mask_mod with block lists; identity-mod: a score_mod that returns the score; alibi-mod: ALiBi as a score_mod
    #[arg(long, value_enum, value_delimiter = ',')]
    pub feature: Vec<Feature>,
    /// With a causal window: each query sees itself and the N - 1 keys before it
    #[arg(long, value_name = "N", conflicts_with = "causal", value_parser = clap::value_parser!(u32).range(1..))]
    pub window: Option<u32>,
    /// Kernels to time; coop and coop-scaled open the device with cooperative matrices, which wgpu calls experimental
    #[arg(long, value_enum, value_delimiter = ',', default_value = "naive,tile")]
    pub kernels: Vec<KernelName>,
    /// Times this tile in place of the tuned one, its loops written out (1) or not (0); may be repeated
    #[arg(long, value_name = "ROWS,KEYS,TY,TX,CHUNK,VALUE_KEYS,WRITTEN_OUT", value_parser = parse_tile)]
    pub tile: Vec<Tile>,
    /// Times the backward pass with this tile in place of the tuned ones, its loops written out (1) or not (0); may be
    /// repeated
    #[arg(long, value_name = "OWN,STEP,TY,TX,CHUNK,BLOCK,WRITTEN_OUT", value_parser = parse_backward_tile)]
    pub backward_tile: Vec<BackwardTile>,
    /// Times the backward pass in f32 that computes all gradients at once with this tile in place of the tuned one, its loops
    /// written out (1) or not (0); may be repeated
    #[arg(long, value_name = "OWN,STEP,TY,TX,CHUNK,LINES,BLOCK_KEYS,BLOCK_ROWS,WRITTEN_OUT", value_parser = parse_fused_tile)]
    pub fused_tile: Vec<FusedTile>,
    /// Times the coop kernel with this tile in place of the tuned one; may be repeated
    #[arg(long, value_name = "SUBGROUPS,ROW_MATRICES,KEYS,BUFFERS[,TURNS,QUERY_IN_MEMORY]", value_parser = parse_coop_tile)]
    pub coop_tile: Vec<CoopTile>,
    /// Times the backward pass of the coop kernel with these tiles, of the keys' and values' gradients and of the queries', in
    /// place of the tuned ones; each is SUBGROUPS,MATRICES,STEP,COLUMNS,AHEAD (0 or 1); may be repeated
    #[arg(long, value_name = "TILE/TILE", value_parser = parse_coop_backward_tiles)]
    pub coop_backward_tiles: Vec<[CoopBackwardTile; 2]>,
    /// Times the coop kernel in this form in place of the faster one that the device allows; may be repeated
    #[arg(long, value_enum)]
    pub coop_form: Vec<Form>,
    /// Times the decode kernel with so many splits of the keys, in place of the tuned number; may be repeated
    #[arg(long)]
    pub splits: Vec<u32>,
    /// Times the decode kernel with this tile in place of the tuned one
    #[arg(long, value_name = "ROWS,THREADS,KEY_THREADS,THREAD_KEYS,LANES", value_parser = parse_decode_tile)]
    pub decode_tile: Option<DecodeTile>,
    /// How many rows of each output are checked against f64. With few of them the check takes seconds
    #[arg(long, value_name = "ROWS", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    pub checked_rows: u64,
    /// The adapter whose name holds this text
    #[arg(long)]
    pub adapter: Option<String>,
    /// Writes the figures as comma-separated values
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Draws time and extra memory against the sequence length
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Masks {
    None,
    Only,
    Both,
}

/// The mask of a problem without a feature.
#[derive(Clone, Copy, PartialEq)]
pub enum Mask {
    None,
    Causal,
    /// Causal, and a query sees at most so many keys.
    Window(u32),
}

impl Mask {
    pub fn name(self) -> &'static str {
        match self {
            Mask::None => "",
            Mask::Causal => "causal",
            Mask::Window(_) => "window",
        }
    }

    pub fn add_to(self, problem: Problem) -> Problem {
        match self {
            Mask::None => problem,
            Mask::Causal => problem.causal(Causal::BottomRight),
            Mask::Window(keys) => problem.causal(Causal::BottomRight).window(Some(keys - 1), None),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Op {
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
pub enum Type {
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
pub enum KernelName {
    Naive,
    Tile,
    Coop,
    /// The coop kernel with bf16 scaled to f16, where coop takes matrices of bf16
    CoopScaled,
    Decode,
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
    if let Ok([subgroups, row_matrices, keys, buffers]) = numbers(text) {
        return Ok(CoopTile::new(subgroups, row_matrices, keys, buffers));
    }
    let [subgroups, row_matrices, keys, buffers, turns, query_in_memory] =
        numbers(text).map_err(|_| "4 or 6 whole numbers separated by commas are expected")?;
    Ok(CoopTile::new(subgroups, row_matrices, keys, buffers).with_turns(turns, query_in_memory))
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
pub struct Candidate {
    pub kernel: Kernel,
    pub tile: Option<Tile>,
    pub backward_tile: Option<BackwardTile>,
    pub fused_tile: Option<FusedTile>,
    pub coop_tile: Option<CoopTile>,
    pub coop_backward_tiles: Option<[CoopBackwardTile; 2]>,
    pub coop_form: Option<CoopForm>,
    pub scaled_bf16: bool,
    pub decode_tile: Option<DecodeTile>,
    pub splits: Option<u32>,
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
        if let Some(CoopTile { subgroups, row_matrices, keys, buffers, turns, query_in_memory }) = self.coop_tile {
            write!(f, "[{subgroups} {row_matrices} {keys} {buffers} {turns} {query_in_memory}]")?;
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
pub fn candidates(args: &Args, op: Op) -> Vec<Candidate> {
    /// The table's choice if nothing is asked for.
    fn or_none<T: Copy>(asked: &[T]) -> Vec<Option<T>> {
        if asked.is_empty() { vec![None] } else { asked.iter().copied().map(Some).collect() }
    }
    let mut all = vec![];
    for kernel in &args.kernels {
        match kernel {
            KernelName::Naive => all.push(Candidate::of(Kernel::Naive)),
            KernelName::Coop => {
                let forms: Vec<CoopForm> = args.coop_form.iter().map(|&form| form.into()).collect();
                let coop = Candidate::of(Kernel::Coop);
                // Of the pass that is not timed the table's.
                let tiles = or_none(if op == Op::Backward { &[] } else { &args.coop_tile });
                let backward_tiles = or_none(if op == Op::Forward { &[] } else { &args.coop_backward_tiles });
                for coop_form in or_none(&forms) {
                    for &coop_tile in &tiles {
                        let coop = Candidate { coop_form, coop_tile, ..coop };
                        let with = |&coop_backward_tiles| Candidate { coop_backward_tiles, ..coop };
                        all.extend(backward_tiles.iter().map(with));
                    }
                }
            }
            KernelName::CoopScaled => all.push(Candidate { scaled_bf16: true, ..Candidate::of(Kernel::Coop) }),
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

/// An error for an option that nothing would look at: a tile for a kernel or a pass that is not timed.
pub fn refuse_idle(args: &Args) -> std::result::Result<(), String> {
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
        ("--splits", !args.splits.is_empty(), decode && forward, "the decode kernel"),
        ("--decode-tile", args.decode_tile.is_some(), decode && forward, "the decode kernel"),
    ];
    match options.iter().find(|(_, given, looked_at, _)| *given && !looked_at) {
        Some((option, _, _, of)) => Err(format!("{option} is for {of}, which is not timed; see --kernels and --op")),
        None => Ok(()),
    }
}
