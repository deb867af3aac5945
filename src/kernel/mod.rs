//! The kernels: one file each, beside its WGSL. A kernel says which modules it runs, what they bind, and how many
//! workgroups a part of the problem takes.

pub(crate) mod backward_bias_coop;
pub(crate) mod backward_coop;
pub(crate) mod backward_delta;
pub(crate) mod backward_fused;
pub(crate) mod backward_naive;
pub(crate) mod backward_scores;
pub(crate) mod backward_tile;
pub(crate) mod block_lists;
pub(crate) mod decode;
pub(crate) mod forward_coop;
pub(crate) mod forward_coop_scaled;
pub(crate) mod forward_tile;
pub(crate) mod naive;
pub(crate) mod part;
pub(crate) mod pass;
pub(crate) mod uniform;

pub(crate) use part::{Cut, Part};
pub(crate) use pass::{Access, Module, Pass, Rounds, Slot, Workgroups, check_limits};

use crate::problem::{Probe, Tensor};
use crate::{ElementType, Problem, tune};

/// What a forward pass in one dispatch binds, besides what it asks about scores.
pub(crate) const FORWARD_BINDINGS: &[(Slot, Access)] = &[
    (Slot::Query, Access::Read),
    (Slot::Key, Access::Read),
    (Slot::Value, Access::Read),
    (Slot::Out, Access::ReadWrite),
    (Slot::Lse, Access::ReadWrite),
    (Slot::SeqlensQ, Access::Read),
    (Slot::SeqlensK, Access::Read),
    (Slot::RngState, Access::Read),
    (Slot::Sinks, Access::Read),
];

impl ElementType {
    /// Its name in `memory/elements.wgsl`.
    fn switch(self) -> &'static str {
        match self {
            ElementType::F32 => "ELEMENT_F32",
            ElementType::F16 => "ELEMENT_F16",
            ElementType::BF16 => "ELEMENT_BF16",
        }
    }
}

/// The switches that follow from the problem, for a forward kernel that moves `vector` elements at a time where they lie so.
pub(crate) fn switches(problem: &Problem, vector: u32) -> Vec<&'static str> {
    switches_of(problem, &Tensor::FORWARD, vector)
}

/// The switches of what is given of each score.
pub(crate) const GIVEN: [&str; 14] = [
    "ADDED",
    "BIAS",
    "BIAS_F16",
    "BIAS_BF16",
    "BIAS_PAIRED",
    "ALIBI",
    "MASK",
    "MASK_PAIRED",
    "MASK_QUADS",
    "ANY_MASK",
    "ASKED_EVERYWHERE",
    "MODS",
    "SCORE_MOD",
    "MASK_MOD",
];

/// `switches`, less those of what a score is and whether it counts: for a kernel that ends rows.
pub(crate) fn without_scores(mut switches: Vec<&'static str>) -> Vec<&'static str> {
    const OF_SCORES: [&str; 5] = ["SOFTCAP", "SHAPED", "SEQLENS_Q", "QUERY_LENGTHS", "SEQLENS_K"];
    switches.retain(|name| !OF_SCORES.contains(name) && !GIVEN.contains(name));
    without_blocks(switches)
}

/// `switches`, less those of block lists: for a kernel that neither visits tiles nor asks whether a score counts.
pub(crate) fn without_blocks(mut switches: Vec<&'static str>) -> Vec<&'static str> {
    switches.retain(|name| !["BLOCKS", "TILES_BY_HEAD"].contains(name));
    switches
}

/// The switches of a kernel that asks whether scores count without visiting tiles: block lists say of a pair that it does.
pub(crate) fn by_pair(mut switches: Vec<&'static str>) -> Vec<&'static str> {
    if switches.contains(&"BLOCKS") {
        switches.push("BLOCKS_BY_PAIR");
    }
    switches
}

/// `switches`, less dropout: for a kernel that has no probabilities.
pub(crate) fn without_dropout(mut switches: Vec<&'static str>) -> Vec<&'static str> {
    switches.retain(|&name| name != "DROPOUT");
    switches
}

/// The switches that follow from the problem, for a backward kernel that moves `vector` elements at a time.
pub(crate) fn backward_switches(problem: &Problem, vector: u32) -> Vec<&'static str> {
    let mut on = switches_of(problem, &Tensor::BACKWARD, vector);
    on.retain(|name| !["LSE", "SEQLENS_Q", "SEQLENS_K", "SINKS"].contains(name));
    if problem.has_lengths() {
        on.push("LENGTHS_IN_ROWS");
    }
    if problem.gradients.is_some_and(|gradients| gradients.accumulate) {
        on.push("ACCUMULATE");
    }
    on
}

/// With a smaller scale than this, 0 and negative ones included, kernels hold scores instead of products: a factor so small, times the
/// difference of a masked and a real product, would not make the masked one vanish, and a negative one would turn the order around.
const TINY_SCALE: f32 = 1e-28;

/// What each feature of a problem switches on in a module. A new feature is a line here.
fn switches_of(problem: &Problem, tensors: &[Tensor], vector: u32) -> Vec<&'static str> {
    let aligned = problem.is_aligned(tensors, vector);
    let shaped = problem.softcap.is_some()
        || problem.effective_scale() < TINY_SCALE
        || problem.bias.is_some()
        || problem.alibi.is_some()
        || problem.has_score_mod();
    let bias_is = |ty| problem.bias.is_some_and(|bias| bias.element_type == ty);
    let bias_paired = problem.bias.is_some_and(|bias| bias.element_type != ElementType::F32 && bias.layout.is_paired());
    let any_mask = problem.mask.is_some() || problem.has_mask_mod();
    let mut on = vec![problem.element_type.switch()];
    let flags = [
        (aligned, "ALIGNED"),
        (aligned && problem.element_type != ElementType::F32, "PACKED"),
        (problem.softcap.is_some(), "SOFTCAP"),
        (shaped, "SHAPED"),
        (problem.blocks.is_some(), "BLOCKS"),
        (problem.probe == Some(Probe::Tiles) || problem.blocks.is_some_and(|blocks| blocks.per_head), "TILES_BY_HEAD"),
        (problem.bias.is_some() || problem.alibi.is_some(), "ADDED"),
        (problem.bias.is_some(), "BIAS"),
        (bias_is(ElementType::F16), "BIAS_F16"),
        (bias_is(ElementType::BF16), "BIAS_BF16"),
        (bias_paired, "BIAS_PAIRED"),
        (problem.alibi.is_some(), "ALIBI"),
        (problem.mask.is_some(), "MASK"),
        (problem.mask.is_some_and(|mask| mask.is_paired()), "MASK_PAIRED"),
        (problem.mask.is_some_and(|mask| mask.is_in_quads()), "MASK_QUADS"),
        // Any score may be masked, wherever it is.
        (any_mask, "ANY_MASK"),
        (any_mask && !problem.blocks.is_some_and(|blocks| blocks.full_unmasked), "ASKED_EVERYWHERE"),
        (problem.mods.is_some(), "MODS"),
        (problem.has_score_mod(), "SCORE_MOD"),
        (problem.has_mask_mod(), "MASK_MOD"),
        // Nothing is known of how large scores are.
        (problem.has_score_mod(), "ANY_SIZE"),
        (problem.sinks, "SINKS"),
        (problem.seqlens_q, "SEQLENS_Q"),
        (problem.seqlens_q, "QUERY_LENGTHS"),
        (problem.seqlens_k, "SEQLENS_K"),
        (problem.lse, "LSE"),
        (problem.dropout_in_use().is_some(), "DROPOUT"),
    ];
    on.extend(flags.iter().filter(|(set, _)| *set).map(|(_, name)| name));
    on.extend(problem.probe.map(Probe::switch));
    on
}

/// Workgroup memory that dropout takes in the tile kernels, for a tile of so many rows and keys.
pub(crate) fn dropout_bytes(problem: &Problem, rows: u32, keys: u32, threads: u32) -> u32 {
    problem.dropout_in_use().map_or(0, |_| tune::dropout_bytes(rows, keys, threads))
}

/// What a kernel reads that computes scores: of each of them what is given, and whether it counts. A new input of scores is a line here.
const SCORE_INPUTS: [(Slot, Access); 4] = [
    (Slot::Blocks, Access::Read),
    (Slot::Bias, Access::Read),
    (Slot::Mask, Access::Read),
    (Slot::AlibiSlopes, Access::Read),
];

/// The bindings of a kernel that computes scores, `own` being its own.
pub(crate) fn score_bindings(problem: &Problem, own: &[(Slot, Access)]) -> Vec<(Slot, Access)> {
    let mut all = bindings(problem, own);
    all.extend(bindings(problem, &SCORE_INPUTS));
    all.extend(mod_bindings(problem));
    all
}

/// The buffers of the problem's mods.
pub(crate) fn mod_bindings(problem: &Problem) -> impl Iterator<Item = (Slot, Access)> {
    let buffers = problem.mods.iter().flat_map(|mods| mods.buffers());
    Slot::MOD_BUFFERS.into_iter().zip(buffers).map(|(slot, _)| (slot, Access::Read))
}

/// `bindings`, less those of buffers that the problem does without.
pub(crate) fn bindings(problem: &Problem, bindings: &[(Slot, Access)]) -> Vec<(Slot, Access)> {
    let used = |slot| match slot {
        Slot::Lse => problem.lse,
        Slot::SeqlensQ => problem.seqlens_q,
        Slot::SeqlensK => problem.seqlens_k,
        Slot::RngState => problem.dropout_in_use().is_some(),
        Slot::Blocks => problem.blocks.is_some(),
        Slot::Bias => problem.bias.is_some(),
        Slot::Mask => problem.mask.is_some(),
        Slot::AlibiSlopes => problem.alibi.is_some(),
        Slot::Sinks => problem.sinks,
        Slot::GradLse => problem.gradients.is_some_and(|gradients| gradients.lse),
        _ => true,
    };
    bindings.iter().copied().filter(|&(slot, _)| used(slot)).collect()
}
