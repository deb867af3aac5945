//! Host side of `shaders/kernel/forward_tile.wgsl`.

use super::{FORWARD_BINDINGS, Part, Pass, dropout_bytes, score_bindings, switches};
use crate::specialize::Specialization;
use crate::tune::Tile;
use crate::{ElementType, Problem};

/// From more keys than this on, outputs in f32 are added up in memory after each so many. One sum over N keys has a relative error
/// of about 2e-8 · N^½ where values are random, which is 1.1e-6 here, and at 65,536 keys more than the 2e-6 that f32 promises.
const KEYS_OF_ONE_SUM: u32 = 4096;

/// The same in tiles: sums of tiles are added up in one sum as well, whatever a tile has of keys.
const TILES_OF_ONE_SUM: u32 = 128;

/// After how many tiles of so many keys O goes to memory and begins anew, if it does so.
pub(crate) fn fold_tiles(problem: &Problem, keys: u32) -> Option<u32> {
    let tiles = (KEYS_OF_ONE_SUM / keys).clamp(1, TILES_OF_ONE_SUM);
    let many = problem.element_type == ElementType::F32 && problem.shape.seqlen_k > KEYS_OF_ONE_SUM.min(tiles * keys);
    many.then_some(tiles)
}

/// Whether threads load what they store of Q once and keep it as it is in memory, instead of loading it for each tile of keys:
/// where that and O take no more registers than S does, or where Q is one chunk.
pub(crate) fn keeps_query(problem: &Problem, tile: Tile) -> bool {
    let (shape, threads) = (problem.shape, tile.threads());
    let registers_of_vector = if switches(problem, 4).contains(&"PACKED") { 2 } else { 4 };
    let chunks = shape.head_dim.div_ceil(tile.chunk);
    let query = chunks * (tile.rows * tile.chunk).div_ceil(16 * threads) * 4 * registers_of_vector;
    let out = tile.rows * shape.head_dim_v.next_multiple_of(4 * tile.threads_x) / threads;
    chunks == 1 || query + out <= tile.rows * tile.keys / threads
}

/// Whether each tile of keys has a sum of its own, in f32. One sum over n keys whose values are alike has a relative error of about
/// 8e-9 · n: 3e-5 at 4,096 keys, where f32 promises 2e-6. Sums of tiles take as many registers again as O. On an H200 they cost 1 % where
/// a thread has 128 registers for S, O and them (a head dim of 64), and 15 to 25 % where it would need more.
pub(crate) fn has_tile_sums(problem: &Problem, tile: Tile) -> bool {
    let out = tile.rows * problem.shape.head_dim_v.next_multiple_of(tile.piece());
    let registers = (tile.rows * tile.keys + 2 * out) / tile.threads();
    problem.element_type == ElementType::F32 && (!tile.written_out || registers <= 128)
}

pub(crate) fn pass(problem: &Problem, tile: Tile) -> Pass {
    let shape = problem.shape;
    let mut on = switches(problem, 4);
    on.push("UNROLL");
    if tile.written_out {
        on.push("WRITTEN_OUT");
    }
    let fold_tiles = fold_tiles(problem, tile.keys);
    on.extend(fold_tiles.is_some().then_some("FOLDS"));
    on.extend(has_tile_sums(problem, tile).then_some("TILE_SUMS"));
    // An order of the products, where it made an H100 faster (docs/tuning/README.md).
    if tile.written_out && shape.head_dim_v <= 128 {
        on.push("SERPENTINE");
    }
    let chunks = shape.head_dim.div_ceil(tile.chunk);
    Pass::new(
        Specialization {
            file: "kernel/forward_tile.wgsl",
            entry: "forward",
            switches: on,
            constants: vec![
                ("HEAD_DIM", shape.head_dim),
                ("HEAD_DIM_V", shape.head_dim_v),
                ("ROWS", tile.rows),
                ("KEYS", tile.keys),
                ("THREADS_Y", tile.threads_y),
                ("THREADS_X", tile.threads_x),
                ("CHUNK", tile.chunk),
                ("CHUNK4", tile.chunk / 4),
                ("CHUNKS", chunks),
                ("KEPT", if keeps_query(problem, tile) { chunks } else { 1 }),
                ("VALUE_KEYS", tile.value_keys),
                ("PIECES", tile.keys / tile.piece()),
                ("FOLD_TILES", fold_tiles.unwrap_or(1)),
            ],
        },
        score_bindings(problem, FORWARD_BINDINGS),
        tile.threads(),
        tile.workgroup_bytes(shape.head_dim_v) + dropout_bytes(problem, tile.rows, tile.keys, tile.threads()),
        Box::new(move |part: &Part| {
            [part.row_count().div_ceil(tile.rows as u64), part.head_count(), part.batch_count()]
        }),
    )
}
