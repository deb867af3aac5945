//! Host side of `shaders/kernel/decode_split.wgsl` and `shaders/kernel/decode_combine.wgsl`.

use super::{Access, Part, Pass, Slot, bindings, score_bindings, switches, without_scores};
use crate::specialize::Specialization;
use crate::tune::DecodeTile;
use crate::{ElementType, Kernel, Problem};

/// From how many keys on this kernel is faster than another one, by how many rows at most share a key-value head: than the tile kernel,
/// and than the coop kernel on 16 bits as they are, on bf16 scaled to f16, and on f32. Measured on an H200 with 32 heads on 8 of head dim 128,
/// one batch entry; docs/kernels/decode.md has the times. Few keys were not measured on a full device. Scaled bf16 was not measured, and takes the numbers
/// of bf16's matrices.
const FROM_KEYS: [(u64, [u32; 4]); 3] = [(4, [1, 96, 96, 1]), (8, [1, 160, 160, 1]), (64, [1, 192, 192, 1])];

/// More queries than this were not measured.
const MOST_QUERIES: u32 = 16;

/// On 16 bits the coop kernel is faster with more than `FEW_QUERIES`, unless decode has at most `FEW_TILES` tiles of `TILE_ROWS` rows, over all batch entries
/// and key-value heads: about one for each multiprocessor of a large device. The coop kernel then leaves most of the device idle. This counts
/// roughly: up to 12 rows may be one tile.
const FEW_QUERIES: u32 = 8;
const FEW_TILES: u64 = 128;
const TILE_ROWS: u64 = 8;

/// Whether this kernel computes a problem faster than the one that would take it otherwise, which may be the coop kernel with elements that it
/// splits or scales to f16. The tile and coop kernels compute 32 to 128 queries of each head whatever there are, and take all keys in one loop.
pub(crate) fn pays(problem: &Problem, otherwise: Kernel, coop_is_scaled: bool) -> bool {
    let s = &problem.shape;
    // It sums scores in another order than every backward kernel, so that probabilities would not be recomputed as they were. In
    // f32 that shows.
    if s.seqlen_q == 0 || problem.element_type == ElementType::F32 && problem.gradients.is_some() {
        return false;
    }
    let column = match (otherwise, problem.element_type) {
        (Kernel::Coop, ElementType::F32) => 3,
        (Kernel::Coop, _) if coop_is_scaled => 2,
        (Kernel::Coop, _) => 1,
        _ => 0,
    };
    let rows = s.group() as u64 * s.seqlen_q as u64;
    let tiles = s.batch as u64 * s.heads_kv as u64 * rows.div_ceil(TILE_ROWS);
    let coop_on_16_bits = otherwise == Kernel::Coop && problem.element_type != ElementType::F32;
    let coop_fills = coop_on_16_bits && s.seqlen_q > FEW_QUERIES && tiles > FEW_TILES;
    if s.seqlen_q > MOST_QUERIES || coop_fills {
        return false;
    }
    FROM_KEYS.iter().find(|(most, _)| rows <= *most).is_some_and(|(_, from)| problem.keys_in_sight() >= from[column])
}

/// Rows of a part that share a key-value head.
fn rows_of_head(problem: &Problem, part: &Part) -> u64 {
    part.head_count().min(problem.shape.group() as u64) * part.row_count()
}

/// Bytes of O, and of m and l, of all splits.
pub(crate) fn workspace_bytes(problem: &Problem, part: &Part, splits: u32) -> (u64, u64) {
    let rows = part.rows_of_heads().saturating_mul(splits as u64);
    (rows.saturating_mul(16 * problem.shape.head_dim_v.div_ceil(4) as u64), rows.saturating_mul(8))
}

pub(crate) fn passes(problem: &Problem, tile: DecodeTile, splits: u32) -> Vec<Pass> {
    let shape = problem.shape;
    let workgroups = {
        let problem = problem.clone();
        move |part: &Part| {
            let group = part.head_count().min(shape.group() as u64);
            let tiles = rows_of_head(&problem, part).div_ceil(tile.rows as u64);
            [splits as u64, part.head_count() / group * tiles, part.batch_count()]
        }
    };
    // Its lse goes to the workspace in any case.
    let mut on: Vec<_> = switches(problem, 4).into_iter().filter(|&name| name != "LSE").collect();
    on.push("UNROLL");
    let mut constants = vec![
        ("HEAD_DIM", shape.head_dim),
        ("HEAD_DIM_V", shape.head_dim_v),
        ("ROWS", tile.rows),
        ("ROWS4", tile.rows / 4),
        ("THREADS", tile.threads),
        ("KEY_THREADS", tile.key_threads),
        ("THREAD_KEYS", tile.thread_keys),
    ];
    if tile.lanes > 0 {
        on.push("SHUFFLES");
        constants.push(("LANES", tile.lanes));
    }
    let split = Pass::new(
        Specialization { file: "kernel/decode_split.wgsl", entry: "decode_split", switches: on, constants },
        score_bindings(
            problem,
            &[
                (Slot::Query, Access::Read),
                (Slot::Key, Access::Read),
                (Slot::Value, Access::Read),
                (Slot::SeqlensQ, Access::Read),
                (Slot::SeqlensK, Access::Read),
                (Slot::Workspace, Access::ReadWrite),
                (Slot::WorkspaceStats, Access::ReadWrite),
            ],
        ),
        tile.threads,
        tile.workgroup_bytes(shape.head_dim, shape.head_dim_v),
        Box::new(workgroups),
    );
    let on = without_scores(switches(problem, 4));
    let used = bindings(
        problem,
        &[
            (Slot::Workspace, Access::Read),
            (Slot::WorkspaceStats, Access::Read),
            (Slot::Out, Access::ReadWrite),
            (Slot::Lse, Access::ReadWrite),
            (Slot::Sinks, Access::Read),
        ],
    );
    vec![split, combine(on, used, splits, shape.head_dim_v)]
}

/// The public merge, of so many partial results.
pub(crate) fn merge(parts: u32, head_dim_v: u32, element_type: ElementType, sinks: bool) -> Pass {
    let aligned = head_dim_v.is_multiple_of(4);
    let mut on = vec!["MERGE", "LSE", element_type.switch()];
    if aligned {
        on.push("ALIGNED");
    }
    if aligned && element_type != ElementType::F32 {
        on.push("PACKED");
    }
    on.extend(sinks.then_some("SINKS"));
    let mut used = vec![
        (Slot::PartOut, Access::Read),
        (Slot::PartLse, Access::Read),
        (Slot::Out, Access::ReadWrite),
        (Slot::Lse, Access::ReadWrite),
    ];
    used.extend(sinks.then_some((Slot::Sinks, Access::Read)));
    combine(on, used, parts, head_dim_v)
}

fn combine(switches: Vec<&'static str>, bindings: Vec<(Slot, Access)>, parts: u32, head_dim_v: u32) -> Pass {
    // Slices for the parts as far as there are threads, then rows. A power of two, so that a growing number of parts, as
    // keys are appended, meets few pipelines.
    const THREADS: u32 = 256;
    const WIDTH: u64 = 4096;
    let columns = head_dim_v.div_ceil(4);
    let slices = (THREADS / columns).min(parts.min(32).next_power_of_two()).max(1);
    let rows = (THREADS / columns / slices).max(1);
    Pass::new(
        Specialization {
            file: "kernel/decode_combine.wgsl",
            entry: "decode_combine",
            switches,
            constants: vec![("HEAD_DIM_V", head_dim_v), ("SLICES", slices), ("ROWS", rows)],
        },
        bindings,
        rows * slices * columns,
        rows * slices * (16 * columns + 8),
        Box::new(move |part: &Part| {
            let groups = part.rows_of_heads().div_ceil(rows as u64);
            [groups.min(WIDTH), groups.div_ceil(WIDTH), 1]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Shape;

    /// A driver that keeps loops over rows has the sums in memory: 8 rows of f16 took six times as long on an NVIDIA H200.
    #[test]
    fn loops_over_rows_are_written_out() {
        let problem = Problem::new(Shape { heads_kv: 1, ..Shape::square(1, 8, 64, 64) }, ElementType::F16);
        let tile = DecodeTile { rows: 8, threads: 128, key_threads: 4, thread_keys: 4, lanes: 0 };
        let text = passes(&problem, tile, 2)[0].module().text().unwrap();
        let main = text.split("@compute").nth(1).unwrap();
        let shader = include_str!("../../shaders/kernel/decode_split.wgsl").split("@compute").nth(1).unwrap();
        assert!(shader.contains("< ROWS4;") && !main.contains("< ROWS4;"), "{main}");
        assert!(shader.contains("< ROWS;") && !main.contains("< ROWS;"), "{main}");
    }
}
