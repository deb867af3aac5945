//! A limit of Mesa's software driver, llvmpipe: it ends all loops of a shader after 65,535 iterations together, without a word. Long
//! sequences would be wrong. Mesa 22.3, Debian 12's, does so; Mesa 25.0, Debian 13's, and 26.2 do not. Versions before 25.0 are treated
//! as 22.3, for those between were not tried.
//!
//! Each function here counts, from above, the iterations that an invocation of a kernel makes. It counts every loop that the shader's
//! text does not write out, since a compiler may write out none.

use crate::error::Error;
use crate::kernel::{backward_scores, block_lists, dropout_bytes};
use crate::names::Kernel;
use crate::problem::{Causal, Problem};
use crate::tune::{BackwardTile, DecodeTile, FusedTile, Tile};

/// How many iterations the driver grants a shader.
const GRANTED: u64 = 65_535;

/// An allowance for the short loops of a step that are not counted one by one: over the threads that reduce a row, over what a thread
/// loads.
const SMALL_LOOPS: u64 = 48;

/// The iterations that a device's driver grants; `None` if it does not end loops.
pub(crate) fn granted(info: &wgpu::AdapterInfo) -> Option<u64> {
    // Through OpenGL the adapter's name says what the driver is.
    if info.driver != "llvmpipe" && !info.name.starts_with("llvmpipe") {
        return None;
    }
    let version = info.driver_info.split_once("Mesa ").map_or("", |(_, version)| version);
    let mut numbers = version.split(['.', ' ', '-']).map(|number| number.parse::<u32>().ok());
    let version = (numbers.next().flatten(), numbers.next().flatten());
    (version < (Some(25), Some(0))).then_some(GRANTED)
}

/// An error if a kernel needs more than is granted.
pub(crate) fn check(granted: Option<u64>, kernel: Kernel, needed: u64) -> Result<(), Error> {
    match granted {
        Some(granted) if needed > granted => Err(Error::DriverLoops { kernel, needed, found: granted }),
        _ => Ok(()),
    }
}

/// Iterations over `total` things, `step` at a time, with a loop over those of a step. The driver counts the test that ends a loop, too.
fn nested(total: u32, step: u32) -> u64 {
    total.div_ceil(step) as u64 * (step as u64 + 2)
}

/// Iterations as [`nested`] counts them, or without the inner loop's where the text writes that loop out.
fn outer(total: u32, step: u32, written_out: bool) -> u64 {
    if written_out { total.div_ceil(step) as u64 } else { nested(total, step) }
}

/// How many of `all` keys at most a workgroup visits that owns so many rows; or how many of all rows of a head, if it owns keys.
fn visited(problem: &Problem, all: u32, own: u32) -> u64 {
    let right = if problem.causal == Some(Causal::BottomRight) { Some(0) } else { problem.window_right };
    match (problem.window_left, right) {
        (Some(left), Some(right)) => (all as u64).min(left as u64 + right as u64 + own as u64 + 1),
        _ => all as u64,
    }
}

/// Iterations of `shaders/tile/dropout.wgsl` for a tile of so many rows and keys.
fn of_dropout(problem: &Problem, rows: u32, keys: u32, threads: u32) -> u64 {
    let words = u64::from(dropout_bytes(problem, rows, keys, threads) / 4);
    3 * words.div_ceil(u64::from(threads.max(1)))
}

/// Iterations of `shaders/kernel/forward_tile.wgsl`.
pub(crate) fn of_tile(problem: &Problem, tile: Tile) -> u64 {
    let products = outer(problem.shape.head_dim, tile.chunk, tile.written_out)
        + outer(tile.keys, tile.value_keys, tile.written_out)
        + tile.threads_x as u64
        + of_dropout(problem, tile.rows, tile.keys, tile.threads());
    (visited(problem, problem.shape.seqlen_k, tile.rows).div_ceil(tile.keys as u64) + 1) * (products + SMALL_LOOPS)
}

/// Iterations of `shaders/kernel/decode_split.wgsl` for a tile of keys.
fn of_decode_tile(problem: &Problem, tile: DecodeTile) -> u64 {
    let (rows4, keys) = (tile.rows as u64 / 4, tile.keys() as u64);
    let vectors = problem.shape.head_dim.div_ceil(4 * tile.key_threads) as u64;
    let slices = (tile.threads / problem.shape.head_dim_v.div_ceil(4)).min(tile.keys()).max(1) as u64;
    let scores = vectors * tile.thread_keys as u64 + tile.key_threads as u64 + tile.thread_keys as u64 + 16;
    rows4 * (scores + 16 + keys.div_ceil(slices)) + SMALL_LOOPS
}

/// Iterations of `shaders/kernel/decode_split.wgsl` after its loop over keys.
fn of_decode_end(tile: DecodeTile) -> u64 {
    tile.rows as u64 * (tile.threads as u64 + 16)
}

/// Iterations of `shaders/kernel/decode_split.wgsl` with so many splits.
pub(crate) fn of_decode(problem: &Problem, tile: DecodeTile, splits: u32) -> u64 {
    let tiles = (problem.keys_in_sight() as u64).div_ceil(tile.keys() as u64);
    (tiles.div_ceil(splits.max(1) as u64) + 1) * of_decode_tile(problem, tile) + of_decode_end(tile)
}

/// The fewest splits of the keys with which the decode kernel has what it needs.
pub(crate) fn splits(granted: u64, problem: &Problem, tile: DecodeTile) -> u32 {
    let tiles = granted.saturating_sub(of_decode_end(tile)) / of_decode_tile(problem, tile);
    let all = (problem.keys_in_sight() as u64).div_ceil(tile.keys() as u64);
    all.div_ceil(tiles.saturating_sub(1).max(1)).try_into().unwrap_or(u32::MAX)
}

/// Iterations of `shaders/kernel/naive_*.wgsl` or, of a backward pass, of `shaders/kernel/naive_backward_*.wgsl`.
pub(crate) fn of_naive(problem: &Problem, backward: bool) -> u64 {
    let s = &problem.shape;
    let forward = nested(s.seqlen_k, 128);
    let backward_too = (s.group() as u64).saturating_mul(nested(s.seqlen_q, 128) + 1);
    if backward { forward.max(backward_too) } else { forward }
}

/// Iterations of `shaders/kernel/backward_dkdv_tile.wgsl` and of `shaders/kernel/backward_dq_tile.wgsl`, whichever needs more.
pub(crate) fn of_backward_tiles(problem: &Problem, [dkdv, dq]: [BackwardTile; 2]) -> u64 {
    let s = &problem.shape;
    let of_step = |tile: BackwardTile, gradients: u64| {
        let scores = |dim: u32| outer(dim.div_ceil(4), tile.chunk / 4, tile.written_out);
        let longer = tile.own.max(tile.step);
        let dropout = of_dropout(problem, longer, longer, tile.threads());
        let results = gradients * outer(tile.step / 4, tile.block / 4, tile.written_out);
        scores(s.head_dim)
            + scores(s.head_dim_v)
            + results
            + (tile.step / tile.threads_x) as u64
            + dropout
            + SMALL_LOOPS
    };
    let rows = visited(problem, s.seqlen_q, dkdv.own).div_ceil(dkdv.step as u64) + 1;
    let of_rows = (s.group() as u64).saturating_mul(rows).saturating_mul(of_step(dkdv, 2));
    let of_keys = (visited(problem, s.seqlen_k, dq.own).div_ceil(dq.step as u64) + 1).saturating_mul(of_step(dq, 1));
    of_rows.max(of_keys)
}

/// Iterations of `shaders/kernel/backward_scores_tile.wgsl`, whichever of its two forms needs more. `bias_in_tiles`: it computes the gradient of
/// the bias.
pub(crate) fn of_score_gradients(problem: &Problem, tile: BackwardTile, bias_in_tiles: bool) -> u64 {
    let s = &problem.shape;
    let scores = |dim: u32| outer(dim.div_ceil(4), tile.chunk / 4, tile.written_out);
    let dropout = of_dropout(problem, tile.own, tile.step, tile.threads());
    let of_tile =
        scores(s.head_dim) + scores(s.head_dim_v) + (tile.step / tile.threads_x) as u64 + dropout + SMALL_LOOPS;
    let all = [s.batch, s.heads_q, s.seqlen_q.div_ceil(tile.own), s.seqlen_k.div_ceil(tile.step)];
    let of_shared = |shared: [bool; 4]| {
        let tiles = |n: usize| if shared[n] { all[n] as u64 + 1 } else { 1 };
        (0..4).map(tiles).fold(of_tile, u64::saturating_mul)
    };
    let gradients = problem.gradients.unwrap_or_default();
    let of_bias = problem
        .bias
        .filter(|_| gradients.bias && bias_in_tiles)
        .map(|bias| backward_scores::shared(problem, &bias.layout));
    // The gradient of slopes sums over the keys of a row.
    let of_slopes = gradients.alibi_slopes.then_some([false, false, false, true]);
    of_bias.into_iter().chain(of_slopes).map(of_shared).max().unwrap_or(0)
}

/// Iterations of `shaders/kernel/backward_heads.wgsl`, whose workgroups have so many threads.
pub(crate) fn of_head_gradients(problem: &Problem, threads: u32) -> u64 {
    let s = &problem.shape;
    let of_entry = s.seqlen_q.div_ceil(threads) as u64 + 2;
    if problem.has_head_gradients() { of_entry.saturating_mul(s.batch.into()).saturating_add(SMALL_LOOPS) } else { 0 }
}

/// Iterations of `shaders/kernel/backward_fused_tile.wgsl`.
pub(crate) fn of_fused(problem: &Problem, tile: FusedTile) -> u64 {
    let s = &problem.shape;
    let blocks = |total: u32, block: u32, step: u32| (total.min(block).div_ceil(step) + 1) as u64;
    let products = [
        outer(s.head_dim, tile.chunk, tile.written_out),
        outer(s.head_dim_v, tile.chunk, tile.written_out),
        2 * outer(tile.step, tile.lines, tile.written_out),
        outer(tile.own, tile.lines, tile.written_out),
    ];
    let dropout = of_dropout(problem, tile.step, tile.own, tile.threads());
    let of_step = products.iter().sum::<u64>() + dropout + SMALL_LOOPS;
    let rows = (s.group() as u64).saturating_mul(blocks(s.seqlen_q, tile.block_rows, tile.step));
    blocks(s.seqlen_k, tile.block_keys, tile.own).saturating_mul(rows).saturating_mul(of_step)
}

/// Iterations of `shaders/kernel/block_*.wgsl`, whichever of the two needs more: kinds of blocks, from masks or lists, and lists of them.
pub(crate) fn of_blocks(problem: &Problem, from_masks: bool) -> u64 {
    let (Some(lists), Some(packing)) = (problem.blocks, problem.packing()) else { return 0 };
    let s = &problem.shape;
    let of_thread = |things: u64| things.div_ceil(block_lists::THREADS.into()) + 1;
    let of_kinds = if from_masks {
        let [batches, heads] = [(lists.per_batch, s.batch), (lists.per_head, s.heads_q)]
            .map(|(own, all)| if own { 1 } else { all as u64 });
        let scores = lists.queries.min(s.seqlen_q) as u64 * lists.keys.min(s.seqlen_k) as u64;
        let of_word = packing.across.min(16) as u64 * (of_thread(scores) + 1) + 1;
        batches.saturating_mul(heads.saturating_mul(of_word) + 2) + SMALL_LOOPS
    } else {
        of_thread(packing.row_words()) + 2 * of_thread(packing.columns.into())
    };
    // A thread looks at all blocks of its lines three times.
    let of_lines = |lines: u32, of_line: u32| of_thread(lines.into()).saturating_mul(3 * (of_line as u64 + 1) + 4);
    let of_lists = of_lines(packing.down, packing.across)
        .max(of_lines(packing.across, packing.down))
        .saturating_add(of_thread(packing.entries) + 2 * u64::from(block_lists::THREADS) + 2);
    of_kinds.max(of_lists)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockLists, ElementType, Shape, tune};

    #[test]
    fn drivers_by_their_names() {
        let info = |driver: &str, driver_info: &str| {
            let mut info = wgpu::AdapterInfo::new(wgpu::DeviceType::Cpu, wgpu::Backend::Vulkan);
            (info.driver, info.driver_info) = (driver.into(), driver_info.into());
            granted(&info)
        };
        assert_eq!(info("llvmpipe", "Mesa 22.3.6 (LLVM 15.0.6)"), Some(GRANTED));
        assert_eq!(info("llvmpipe", "something else"), Some(GRANTED));
        assert_eq!(info("llvmpipe", "Mesa 24.3.4 (LLVM 19.1.7)"), Some(GRANTED));
        assert_eq!(info("llvmpipe", "Mesa 25.0.7-2+deb13u1 (LLVM 19.1.7)"), None);
        assert_eq!(info("llvmpipe", "Mesa 27.0.0-devel (LLVM 21.1.8)"), None);
        assert_eq!(info("llvmpipe", "Mesa 26.2.6-1 (LLVM 21.1.8)"), None);
        assert_eq!(info("NVIDIA", "580.159.04"), None);
    }

    /// Shapes that no device computes are counted too, before anything refuses them.
    #[test]
    fn counts_do_not_overflow() {
        let shape = Shape { heads_q: u32::MAX, heads_kv: 1, ..Shape::square(1, 1, crate::MAX_SEQLEN, 256) };
        let problem = Problem::new(shape, ElementType::F32).with_gradients();
        let tile = BackwardTile { own: 8, step: 8, threads_y: 2, threads_x: 2, chunk: 4, block: 4, written_out: false };
        let all = FusedTile {
            own: 8,
            step: 8,
            threads_y: 2,
            threads_x: 2,
            chunk: 4,
            lines: 8,
            block_keys: 1 << 24,
            block_rows: 1 << 24,
            written_out: false,
        };
        for count in [of_backward_tiles(&problem, [tile; 2]), of_fused(&problem, all), of_naive(&problem, true)] {
            assert!(count > 1 << 40, "{count}");
        }
    }

    #[test]
    fn block_lists_are_counted() {
        let count = |problem: &Problem, lists, from_masks| of_blocks(&problem.clone().with_blocks(lists), from_masks);
        let lists = BlockLists::new();
        let problem = Problem::new(Shape::square(16, 16, 4096, 64), ElementType::F32);
        // 16 blocks of 64 scores a thread, for each of 256 sequences, or for one.
        assert!(count(&problem, lists, true) > 16 * 64 * 256);
        assert!(count(&problem, lists.per_batch().per_head(), true) < GRANTED);
        assert!(count(&problem, lists, false) < GRANTED);
        // One block of all scores, however large it is said to be.
        let huge = count(&problem, lists.size(crate::MAX_SEQLEN, crate::MAX_SEQLEN), true);
        assert!((256 * 65_536..257 * 65_536).contains(&huge), "{huge}");
        // 1,024 blocks each way, of which a thread has 4 lines.
        let long = Problem::new(Shape::square(1, 1, 1 << 17, 64), ElementType::F32);
        assert!(count(&long, lists, false) < GRANTED);
        assert!(count(&long, lists.size(32, 32), false) > GRANTED);
        assert!(
            count(
                &Problem::new(Shape::square(u32::MAX, 1, crate::MAX_SEQLEN, 1), ElementType::F32),
                lists.size(1, 1),
                true
            ) > GRANTED
        );
    }

    /// From how many keys on the tile kernel was wrong on Mesa 22.3, by head dim.
    #[test]
    fn lengths_that_were_wrong_are_refused() {
        let limits = wgpu::Limits { max_compute_workgroup_storage_size: 32 << 10, ..Default::default() };
        for (head_dim, wrong) in [(256, 12_000), (128, 24_000), (64, 30_000), (16, 48_000)] {
            let needed = |keys: u32| {
                let shape = Shape { seqlen_k: keys, ..Shape::square(1, 1, 9, head_dim) };
                of_tile(&Problem::new(shape, ElementType::F32), tune::tile(head_dim, head_dim, &limits))
            };
            assert!(needed(wrong) > GRANTED, "{head_dim}: {}", needed(wrong));
            assert!(needed(wrong / 2) <= GRANTED, "{head_dim}: {}", needed(wrong / 2));
        }
    }
}
