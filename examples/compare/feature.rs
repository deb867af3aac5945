//! What a problem may have besides q, k and v, to be timed beside the same kernel without it.

use std::ops::Range;

use clap::ValueEnum;
use wgpu_flash_attention::{
    Alibi, Bias, BlockLists, BlockMask, BlockPattern, Causal, Context, Dropout, ElementType, Mods, Problem,
    ScoreLayout, alibi_slopes,
};

use flash_attention_testing::Extras;
use flash_attention_testing::buffers::random;

use crate::Result;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Feature {
    Bias,
    BiasF32,
    Mask,
    Alibi,
    Sinks,
    Softcap,
    Dropout,
    Blocks,
    WindowBlocks,
    Documents,
    IdentityMod,
    AlibiMod,
}

/// Blocks of queries and of keys.
const BLOCK: u32 = 128;
/// How likely it is that a block is listed.
const LISTED: f64 = 0.25;
/// Keys that a query sees, itself included.
const WINDOW: u32 = 512;
/// Tokens of a document.
const DOCUMENT: u32 = 512;

/// Queries are the last positions, so that they have the document of the key on the bottom-right diagonal.
const SAME_DOCUMENT: &str = "
    var<storage, read> document: array<u32>;
    fn mask_mod(at: Position) -> bool {
        return document[i32(at.i) + at.shift] == document[at.j];
    }
";
const IDENTITY: &str = "fn score_mod(score: f32, at: Position) -> f32 { return score; }";
const ALIBI: &str = "
    var<storage, read> slopes: array<f32>;
    fn score_mod(score: f32, at: Position) -> f32 {
        return score - slopes[at.h] * f32(abs(i32(at.i) + at.shift - i32(at.j)));
    }
";

/// A problem with a feature.
pub struct Featured {
    pub problem: Problem,
    /// What it has besides q, k and v.
    pub extras: Extras,
    /// The share of all scores that count as work.
    pub share: f64,
}

impl Featured {
    /// With none.
    pub fn without(problem: Problem) -> Self {
        Featured { share: share_of_masks(&problem), problem, extras: Extras::default() }
    }
}

impl Feature {
    pub fn name(self) -> &'static str {
        match self {
            Feature::Bias => "bias",
            Feature::BiasF32 => "bias-f32",
            Feature::Mask => "mask",
            Feature::Alibi => "alibi",
            Feature::Sinks => "sinks",
            Feature::Softcap => "softcap",
            Feature::Dropout => "dropout",
            Feature::Blocks => "blocks",
            Feature::WindowBlocks => "window-blocks",
            Feature::Documents => "documents",
            Feature::IdentityMod => "identity-mod",
            Feature::AlibiMod => "alibi-mod",
        }
    }

    /// The problem with it.
    pub fn add_to(self, context: &Context, mut problem: Problem) -> Result<Featured> {
        let s = problem.shape;
        let sizes = [1, s.heads_q, s.seqlen_q, s.seqlen_k];
        let scores: usize = sizes.iter().map(|&n| n as usize).product();
        let mut extras = Extras::default();
        let mut share = None;
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
            Feature::Blocks => {
                problem = problem.with_blocks(BlockLists::new().size(BLOCK, BLOCK));
                let [_, _, down, across] = problem.block_counts();
                let mut rng = fastrand::Rng::with_seed(7);
                let pattern = BlockPattern::of(down, across, |_, _| rng.f64() < LISTED)
                    .or(&BlockPattern::local(down, across, 0, 0));
                extras.blocks = Some((pattern.listed().to_vec(), BlockMask::from_dense(&problem, pattern.listed())?));
                share = Some(counted(&problem, |i, seen| {
                    let listed = (0..across).filter(|&block| pattern.is_listed(i / BLOCK, block));
                    listed.map(|block| overlap(&seen, block * BLOCK..(block + 1) * BLOCK)).sum()
                }));
            }
            Feature::WindowBlocks => {
                problem = problem.causal(Causal::BottomRight).window(Some(WINDOW - 1), None);
                list_blocks_of_masks(context, &mut problem, &mut extras)?;
            }
            Feature::Documents => {
                problem = problem.causal(Causal::BottomRight).with_mods(Mods::parse(SAME_DOCUMENT)?);
                let ids = (0..s.seqlen_k).flat_map(|j| (j / DOCUMENT).to_le_bytes());
                extras.mod_buffers = vec![("document".into(), ids.collect())];
                list_blocks_of_masks(context, &mut problem, &mut extras)?;
                share = Some(counted(&problem, |i, seen| {
                    // The causal mask leaves queries before the first key nothing, whatever their document is.
                    let document = (i + s.seqlen_k).saturating_sub(s.seqlen_q) / DOCUMENT;
                    overlap(&seen, document * DOCUMENT..(document + 1) * DOCUMENT)
                }));
            }
            Feature::IdentityMod => problem = problem.with_mods(Mods::parse(IDENTITY)?),
            Feature::AlibiMod => {
                problem = problem.with_mods(Mods::parse(ALIBI)?);
                let slopes = alibi_slopes(s.heads_q).into_iter().flat_map(f32::to_le_bytes);
                extras.mod_buffers = vec![("slopes".into(), slopes.collect())];
            }
        }
        let share = share.unwrap_or_else(|| share_of_masks(&problem));
        Ok(Featured { problem, extras, share })
    }
}

/// Has the device make the block lists of the problem's masks, which then leave scores out that count in no other way.
fn list_blocks_of_masks(context: &Context, problem: &mut Problem, extras: &mut Extras) -> Result<()> {
    problem.blocks = Some(BlockLists::new().size(BLOCK, BLOCK).full_unmasked());
    let mask = extras.upload(context, problem)?.blocks_of_masks(context, problem)?;
    // The reference goes by the masks alone: what these lists leave out by mistake is wrong.
    let all = problem.block_counts().iter().map(|&n| n as usize).product();
    extras.blocks = Some((vec![true; all], mask));
    Ok(())
}

/// The share of scores that count as work by the causal mask and the window. A causal mask alone counts as half of them, as everyone counts.
fn share_of_masks(problem: &Problem) -> f64 {
    match (problem.causal, problem.window_left, problem.window_right) {
        (None, None, None) => 1.0,
        (Some(_), None, None) => 0.5,
        _ => counted(problem, |_, seen| seen.end - seen.start),
    }
}

/// The share of scores that count: of query `i`, `keys(i, seen)` of the keys `seen` that the causal mask and the window leave.
fn counted(problem: &Problem, keys: impl Fn(u32, Range<u32>) -> u32) -> f64 {
    let s = &problem.shape;
    let of_row = |i: u32| {
        let (first, end) = problem.key_interval(i, s.seqlen_k);
        u64::from(keys(i, first..end))
    };
    (0..s.seqlen_q).map(of_row).sum::<u64>() as f64 / (s.seqlen_q as f64 * s.seqlen_k as f64)
}

/// How many numbers both have.
fn overlap(a: &Range<u32>, b: Range<u32>) -> u32 {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}
