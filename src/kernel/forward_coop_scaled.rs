//! Host side of `shaders/kernel/forward_coop_scaled.wgsl`, and of `shaders/kernel/coop_sizes.wgsl` and `shaders/kernel/coop_ranges.wgsl`,
//! which run before the kernels for f32 and scaled bf16, forward and backward.

use super::forward_coop::layout_constants;
use super::{Access, GIVEN, Part, Pass, Slot, bindings, score_bindings, switches, switches_of, without_blocks};
use crate::matrices::{MatrixFormat, MatrixLayout, Operands};
use crate::problem::Tensor;
use crate::specialize::Specialization;
use crate::tune::CoopTile;
use crate::{ElementType, Problem};

/// Into how many f16 an element is split.
pub(crate) fn parts(element_type: ElementType) -> u32 {
    match element_type {
        ElementType::F32 => 2,
        ElementType::F16 | ElementType::BF16 => 1,
    }
}

/// Bytes of the numbers of queries and keys of each batch entry and, behind them, of what `coop_ranges.wgsl` finds out about each head.
pub(crate) fn workspace_bytes(problem: &Problem, part: &Part) -> u64 {
    let ranges = part.batch_count().saturating_mul(part.head_count());
    part.length_count(problem).saturating_add(ranges).saturating_mul(8)
}

/// Into how many shares the rows of a head are cut, for one workgroup each to look at the sizes of their elements: so many that a few heads
/// keep a device busy, but none of fewer than 128 rows.
fn shares(problem: &Problem) -> u32 {
    problem.shape.seqlen_q.max(problem.shape.seqlen_k).div_ceil(128).clamp(1, 32)
}

/// Bytes of the sizes of each head.
pub(crate) fn sizes_bytes(problem: &Problem, part: &Part) -> u64 {
    part.batch_count().saturating_mul(part.head_count()).saturating_mul(32 * shares(problem) as u64)
}

/// Host side of `shaders/kernel/coop_sizes.wgsl` and of `shaders/kernel/coop_ranges.wgsl`: they find out which modules are for each head.
pub(crate) fn ranges(problem: &Problem, backward: bool) -> [Pass; 2] {
    const THREADS: u32 = 256;
    const HEADS: u32 = 32;
    let tensors = if backward { &Tensor::BACKWARD[..] } else { &Tensor::FORWARD };
    let mut on = without_blocks(switches_of(problem, tensors, 4));
    on.retain(|name| !["LSE", "DROPOUT"].contains(name) && !GIVEN.contains(name));
    on.extend(backward.then_some("GRADIENTS"));
    let shares = shares(problem);
    let specialization = |file, entry, switches, threads| Specialization {
        file,
        entry,
        switches,
        constants: vec![
            ("PARTS", parts(problem.element_type)),
            ("HEAD_DIM", problem.shape.head_dim),
            ("HEAD_DIM_V", problem.shape.head_dim_v),
            ("SHARES", shares),
            ("THREADS", threads),
        ],
    };
    let mut used = vec![
        (Slot::Query, Access::Read),
        (Slot::Key, Access::Read),
        (Slot::Value, Access::Read),
        (Slot::SeqlensQ, Access::Read),
        (Slot::SeqlensK, Access::Read),
        (Slot::WorkspaceSizes, Access::ReadWrite),
    ];
    used.extend(backward.then_some((Slot::GradOut, Access::Read)));
    // Without rows too: gradients of keys and values are 0 then, and have to be written.
    let sizes = Pass::new(
        specialization("kernel/coop_sizes.wgsl", "find_sizes", on.clone(), THREADS),
        bindings(problem, &used),
        THREADS,
        32,
        Box::new(move |part: &Part| [shares.into(), part.head_count(), part.batch_count()]),
    );
    // In the backward pass the kernels find lengths behind the numbers of the rows.
    if backward {
        on.retain(|name| !["SEQLENS_Q", "SEQLENS_K"].contains(name));
    } else if problem.has_lengths() {
        on.push("LENGTHS");
    }
    let lengths: &[_] = match backward {
        true => &[],
        false => &[(Slot::SeqlensQ, Access::Read), (Slot::SeqlensK, Access::Read)],
    };
    let ranges = Pass::new(
        specialization("kernel/coop_ranges.wgsl", "find_ranges", on, HEADS),
        // Both are in one buffer, of which a dispatch may only see all parts as writable.
        bindings(
            problem,
            &[&[(Slot::WorkspaceSizes, Access::ReadWrite), (Slot::Workspace, Access::ReadWrite)], lengths].concat(),
        ),
        HEADS,
        0,
        Box::new(|part: &Part| [part.head_count().div_ceil(HEADS.into()), part.batch_count(), 1]),
    );
    [sizes, ranges]
}

/// What finds out about each head, the kernel for most of them, and the kernel for those whose numbers are far apart.
pub(crate) fn passes(
    problem: &Problem,
    tile: CoopTile,
    format: MatrixFormat,
    layout: &MatrixLayout,
    f16: Operands,
) -> Vec<Pass> {
    let kernel = |by_rows| pass(problem, tile, format, layout, f16, by_rows);
    ranges(problem, false).into_iter().chain([kernel(false), kernel(true)]).collect()
}

fn pass(
    problem: &Problem,
    tile: CoopTile,
    format: MatrixFormat,
    layout: &MatrixLayout,
    f16: Operands,
    by_rows: bool,
) -> Pass {
    let shape = problem.shape;
    let parts = parts(problem.element_type);
    let size = format.size;
    let rows = tile.rows(size);
    let mut on = switches(problem, 4);
    // The kernel finds lengths before the ranges.
    on.retain(|name| !["SEQLENS_Q", "SEQLENS_K"].contains(name));
    on.extend(problem.has_lengths().then_some("LENGTHS_IN_ROWS"));
    on.extend(by_rows.then_some("BY_ROWS"));
    on.extend(f16.switches());
    if size == 16 {
        on.push("MATRIX16");
    }
    if problem.element_type == ElementType::BF16 && !problem.is_aligned(&Tensor::FORWARD, 4) {
        on.push("SINGLE_BF16");
    }
    let mut constants = vec![
        ("PARTS", parts),
        ("HEAD_DIM", shape.head_dim),
        ("HEAD_DIM_V", shape.head_dim_v),
        ("KEYS", tile.keys),
        ("SUBGROUPS", tile.subgroups),
        ("ROW_MATRICES", tile.row_matrices),
    ];
    constants.extend(layout_constants(layout));
    Pass::new(
        Specialization { file: "kernel/forward_coop_scaled.wgsl", entry: "forward", switches: on, constants },
        score_bindings(
            problem,
            &[
                (Slot::Query, Access::Read),
                (Slot::Key, Access::Read),
                (Slot::Value, Access::Read),
                (Slot::Out, Access::ReadWrite),
                (Slot::Lse, Access::ReadWrite),
                (Slot::Workspace, Access::Read),
                (Slot::RngState, Access::Read),
                (Slot::Sinks, Access::Read),
            ],
        ),
        tile.subgroups * format.lanes,
        tile.scaled_workgroup_bytes(size, parts, shape.head_dim, shape.head_dim_v),
        Box::new(move |part: &Part| [part.row_count().div_ceil(rows as u64), part.head_count(), part.batch_count()]),
    )
    .with_element_access(true)
}
