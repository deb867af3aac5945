//! Host side of `shaders/kernel/block_*.wgsl`: lists of blocks that are made on the device.

use super::{Access, Part, Pass, Slot, bindings, mod_bindings, switches_of};
use crate::Problem;
use crate::blocks::lists::Packing;
use crate::problem::Tensor;
use crate::specialize::Specialization;

pub(crate) const THREADS: u32 = 256;

/// From FlexAttention's lists; with those of full blocks, or without.
pub(crate) fn of_lists(packing: Packing, full: bool) -> [Pass; 2] {
    let mut used =
        vec![(Slot::KvNumBlocks, Access::Read), (Slot::KvIndices, Access::Read), (Slot::Blocks, Access::ReadWrite)];
    let mut on = vec![];
    if full {
        used.extend([(Slot::FullKvNumBlocks, Access::Read), (Slot::FullKvIndices, Access::Read)]);
        on.push("FULL_LISTS");
    }
    let specialization = specialization("kernel/block_kinds_of_lists.wgsl", "kinds_of_lists", on);
    let kinds = Pass::new(
        specialization,
        used,
        THREADS,
        0,
        Box::new(move |_: &Part| [packing.down.into(), packing.list_count(), 1]),
    );
    [kinds, lists(packing)]
}

/// From the masks of a problem, other than its block lists.
pub(crate) fn of_mask(problem: &Problem, packing: Packing) -> [Pass; 2] {
    // It asks nothing but whether scores count. A `score_mod` without a `mask_mod` does not say, so that its buffers are not bound.
    let mut problem = problem.clone();
    if !problem.has_mask_mod() {
        problem.mods = None;
    }
    let problem = &problem;
    const OF_MASKS: [&str; 8] =
        ["SEQLENS_Q", "QUERY_LENGTHS", "SEQLENS_K", "MASK", "ANY_MASK", "MODS", "MASK_MOD", "PROBE_TILES"];
    let mut on = switches_of(problem, &Tensor::FORWARD, 4);
    on.retain(|name| OF_MASKS.contains(name));
    let mut used = bindings(
        problem,
        &[
            (Slot::SeqlensQ, Access::Read),
            (Slot::SeqlensK, Access::Read),
            (Slot::Mask, Access::Read),
            (Slot::Blocks, Access::ReadWrite),
        ],
    );
    used.extend(mod_bindings(problem));
    let kinds = Pass::new(
        specialization("kernel/block_kinds_of_mask.wgsl", "kinds_of_mask", on),
        used,
        THREADS,
        8,
        Box::new(move |_: &Part| [packing.row_words(), packing.down.into(), packing.list_count()]),
    )
    .with_mods(problem.mods.as_ref());
    [kinds, lists(packing)]
}

fn lists(packing: Packing) -> Pass {
    Pass::new(
        specialization("kernel/block_lists.wgsl", "lists", vec![]),
        vec![(Slot::Blocks, Access::ReadWrite)],
        THREADS,
        4 * THREADS,
        Box::new(move |_: &Part| [2, packing.list_count(), 1]),
    )
}

fn specialization(file: &'static str, entry: &'static str, switches: Vec<&'static str>) -> Specialization {
    Specialization { file, entry, switches, constants: vec![("THREADS", THREADS)] }
}
