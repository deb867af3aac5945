//! The cases: all kernels that a browser can run, each with several tiles of keys, and in the backward pass of queries.
//!
//! A kernel is compiled anew for each element type, pair of head dims and tile, for softcap, lengths and lse, and for rows that
//! do not lie in whole vectors. That takes seconds here, so cases share what is compiled where they can; masks are no part of it.

use wgpu_flash_attention::Causal::{BottomRight, TopLeft};
use wgpu_flash_attention::ElementType::{self, BF16, F16, F32};
use wgpu_flash_attention::tune::{BackwardTile, FusedTile};
use wgpu_flash_attention::{Alibi, BlockLists, Kernel, PlanOptions};

use flash_attention_testing::backward::{Ask, backward, fused};
use flash_attention_testing::{Case, case, naive, tile, tiled};

/// What is computed, and how.
pub struct Entry {
    pub name: String,
    pub case: Case,
    pub options: PlanOptions,
    /// Gradients instead of o and lse.
    pub gradients: Option<Ask>,
    /// Whether it is one of the few that also run on larger limits and in a second browser.
    pub few: bool,
}

/// What a user may write: a buffer with an index past its end, a function, a loop, branches, a mask that leaves rows without keys.
const MODS: &str = "
    var<storage, read> table: array<f32>;
    fn squash(x: f32, power: u32) -> f32 {
        var y = x;
        for (var n = 0u; n < power; n++) {
            y = y / (1.0 + 0.3 * abs(y));
            if abs(y) < 0.25 { break; }
        }
        return y;
    }
    fn score_mod(score: f32, at: Position) -> f32 {
        if at.j > at.i + 20u { return max(score, -0.5) - 0.5 * sin(score); }
        let both = vec2f(squash(score, 1u + at.h), tanh(0.5 * score));
        return dot(both, vec2f(0.75, 2.0)) + table[at.j];
    }
    fn mask_mod(at: Position) -> bool { return at.i % 5u != 3u && (at.i + at.j) % 3u != 0u; }
";

const FEW: bool = true;
const FULL: bool = false;

pub fn entries() -> Vec<Entry> {
    let mut all = forward_entries();
    all.extend(backward_entries());
    all
}

fn forward_entries() -> Vec<Entry> {
    let mut all = vec![];
    let mut add = |few: bool, kernel: &str, options: PlanOptions, ty: ElementType, what: &str, case: Case| {
        let name = format!("{kernel} {ty}, {what}");
        all.push(Entry { name, case: case.element_type(ty), options, gradients: None, few });
    };
    // 290 keys are five tiles of 64 or ten of 32.
    let plain = || case(1, [2, 2], [70, 290], [16, 12]);
    let grouped = || case(2, [4, 2], [37, 170], [16, 12]);
    let odd = || case(2, [2, 1], [37, 170], [7, 5]).odd();
    let lengths = || case(3, [2, 1], [37, 170], [16, 12]).seqlens(&[170, 0, 131]);
    let padded = || case(2, [2, 1], [150, 150], [16, 12]).seqlens_q(&[150, 97]).seqlens(&[150, 97]);
    let more_queries = || case(1, [2, 2], [170, 150], [16, 12]);

    add(FULL, "naive", naive(), F32, "bottom-right", plain().causal(BottomRight));
    add(FEW, "naive", naive(), F16, "odd head dims and strides", odd());
    add(FULL, "naive", naive(), BF16, "grouped heads, window", grouped().window(90, 3));

    add(FULL, "tile", tile(), F32, "no mask", plain());
    add(FEW, "tile", tile(), F32, "bottom-right", plain().causal(BottomRight));
    add(FULL, "tile", tile(), F32, "top-left, more queries", more_queries().causal(TopLeft));
    add(FULL, "tile", tile(), F32, "window, grouped heads", grouped().window(100, 2));
    add(FULL, "tile", tile(), F32, "lengths, bottom-right", lengths().causal(BottomRight));
    add(FULL, "tile", tile(), F32, "padded, window", padded().window(100, 5));
    add(FULL, "tile", tile(), F32, "softcap, scale below 0", plain().softcap(2.0).scale(-0.6));
    add(FULL, "tile", tile(), F32, "odd head dims and strides", odd().causal(BottomRight));
    add(FEW, "tile", tile(), F32, "several chunks of columns", case(1, [2, 1], [37, 170], [72, 80]));
    add(FULL, "tile", tile(), F32, "sums of sums", case(1, [1, 1], [9, 4300], [16, 12]));
    add(FULL, "tile", tile(), F16, "grouped heads, bottom-right", grouped().causal(BottomRight));
    add(FEW, "tile", tile(), F16, "odd head dims and strides", odd());
    add(FULL, "tile", tile(), BF16, "window", plain().window(130, 0));
    let written_out = tiled(32, 32, (8, 8), 16, 16);
    add(FULL, "tile, written out", written_out, F32, "bottom-right", plain().causal(BottomRight));

    let biased = || grouped().bias([2, 1, 37, 170]).sinks();
    add(FEW, "tile", tile(), F32, "bias, sinks", biased());
    add(FULL, "tile", tile(), BF16, "bias, sinks", biased());
    add(FULL, "tile", tile(), F32, "mask", plain().mask([1, 2, 70, 290]));
    add(FULL, "tile", tile(), F32, "ALiBi, padded", padded().alibi(Alibi::PerHead));

    let table: &[f32] = &[0.5, -0.25, 1.0];

    add(FULL, "tile", tile(), F32, "dropout, padded", padded().dropout(0.3));
    add(FEW, "tile", tile(), F16, "block lists", listed(grouped()));

    let one = || case(2, [4, 1], [1, 600], [16, 12]);
    add(FULL, "decode", decode(2), F32, "mask, sinks", one().mask([2, 1, 1, 600]).sinks());
    add(FEW, "decode", decode(2), F32, "two splits", one());
    add(FULL, "decode", decode(1), F32, "one split, window", one().window(400, 0));
    add(FULL, "decode", decode(2), F32, "lengths", one().seqlens(&[600, 333]).causal(BottomRight));
    add(FULL, "decode", decode(2), F16, "odd head dims and strides", case(2, [2, 1], [3, 500], [7, 5]).odd());
    add(FULL, "decode", decode(2), BF16, "softcap", one().softcap(3.0));
    add(FULL, "decode", decode(2), F16, "mods", one().mods(MODS, &[("table", table)]));
    all
}

fn backward_entries() -> Vec<Entry> {
    let mut all = vec![];
    let mut add = |few: bool, kernel: &str, options: PlanOptions, ty: ElementType, what: &str, ask: Ask, case: Case| {
        let name = format!("{kernel} {ty}, {what}");
        // The plan's forward pass does not run. Its naive kernel takes the shortest time to compile.
        let options = options.kernel(Kernel::Naive);
        all.push(Entry { name, case: case.element_type(ty), options, gradients: Some(ask), few });
    };
    let square = || case(1, [2, 1], [150, 170], [16, 12]);
    let odd = || case(1, [2, 1], [90, 170], [7, 5]).odd();
    let (none, both) = (Ask::default(), Ask { grad_lse: true, accumulate: true });

    let naive = backward(Kernel::Naive);
    add(FULL, "backward naive", naive, F32, "bottom-right", none, square().causal(BottomRight));
    add(FEW, "backward naive", naive, F16, "odd head dims and strides", none, odd());

    let tile = backward(Kernel::Tile);
    add(FEW, "backward tile", tile, F32, "bottom-right", none, square().causal(BottomRight));
    add(FULL, "backward tile", tile, F32, "window, grouped heads", none, square().window(100, 2));
    add(FULL, "backward tile", tile, F32, "gradient of lse, accumulated, top-left", both, square().causal(TopLeft));
    add(
        FULL,
        "backward tile",
        tile,
        F32,
        "padded, softcap",
        none,
        square().seqlens_q(&[130]).seqlens(&[141]).softcap(2.0),
    );
    add(FULL, "backward tile", tile, F32, "odd head dims and strides", none, odd());
    add(FULL, "backward tile", tile, F16, "no mask", none, square());
    add(FEW, "backward tile", tile, BF16, "bottom-right", none, square().causal(BottomRight));
    let written_out = backward_written_out();
    add(FULL, "backward tile, written out", written_out, F32, "bottom-right", none, square().causal(BottomRight));

    let biased = || square().bias([1, 2, 150, 170]);
    add(FEW, "backward tile", tile, F32, "bias", none, biased());
    add(
        FULL,
        "backward tile",
        tile,
        F16,
        "bias of all rows, sinks, padded",
        both,
        square().bias([1, 2, 1, 170]).sinks().seqlens(&[141]),
    );
    add(
        FULL,
        "backward tile",
        tile,
        F32,
        "ALiBi, padded",
        none,
        square().alibi(Alibi::PerHead).seqlens_q(&[130]).seqlens(&[141]),
    );
    add(FULL, "backward tile", tile, F32, "mask", none, square().mask([1, 1, 150, 170]));

    add(FULL, "backward tile", tile, F32, "dropout", none, square().dropout(0.3).seqlens(&[141]));
    add(FULL, "backward tile", tile, F32, "block lists", none, listed(square()).causal(BottomRight));

    let by_keys = fused([64, 32], 8, 8, 16, [64, 32]);
    add(FULL, "backward fused", by_keys, F32, "a tile a block, bottom-right", none, square().causal(BottomRight));
    let by_rows = fused([32, 64], 8, 8, 16, [96, 128]);
    add(FEW, "backward fused", by_rows, F32, "several tiles a block", none, square());
    let written_out = fused_written_out();
    add(FULL, "backward fused, written out", written_out, F32, "gradient of lse, accumulated", both, square());
    all
}

/// Half of the blocks of 128 by 128.
fn listed(case: Case) -> Case {
    let problem = case.problem.clone().with_blocks(BlockLists::new());
    let blocks = problem.block_counts().iter().map(|&n| n as usize).product();
    case.blocks(BlockLists::new(), (0..blocks).map(|n| n % 3 != 1).collect())
}

/// So few splits that each has several tiles of keys, of 64 in f32 and of 128 in the other types.
fn decode(splits: u32) -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Decode).splits(splits)
}

fn backward_written_out() -> PlanOptions {
    let tile = BackwardTile { own: 32, step: 32, threads_y: 8, threads_x: 8, chunk: 16, block: 32, written_out: true };
    backward(Kernel::Tile).backward_tile(tile)
}

fn fused_written_out() -> PlanOptions {
    let options = fused([32, 32], 8, 8, 16, [96, 64]);
    options.fused_tile(options.fused_tile.map(|tile| FusedTile { written_out: true, ..tile }))
}
