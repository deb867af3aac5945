//! The kernels: one file each, beside its WGSL. A kernel says which modules it runs, what they bind, and how many
//! workgroups a part of the problem takes.

pub(crate) mod backward_coop;
pub(crate) mod backward_delta;
pub(crate) mod backward_fused;
pub(crate) mod backward_naive;
pub(crate) mod backward_tile;
pub(crate) mod decode;
pub(crate) mod forward_coop;
pub(crate) mod forward_coop_scaled;
pub(crate) mod forward_tile;
pub(crate) mod naive;
pub(crate) mod uniform;

pub use forward_coop::CoopForm;

use crate::plan::Part;
use crate::problem::Tensor;
use crate::specialize::{Specialization, SpecializeError};
use crate::{ElementType, Problem};

/// Which algorithm computes a problem.
///
/// All are right for scores within ±1e7 and values within ±1e35 over the number of keys, [`Kernel::Coop`] in f32 and bf16 for scores
/// within ±5e13, the other kernels for scores within ±5e37 and values within ±1e37 over the number of keys. Nothing looks for larger
/// ones. `docs/kernels/numbers.md` has more on this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Scores to memory, softmax, product: what people write first. The yardstick, and what plans for both passes take where sequences
    /// have at most 16 queries and 16 keys.
    Naive,
    /// Tiles on cooperative matrices (tensor cores), for contexts that
    /// [`Context::with_cooperative_matrices`](crate::Context::with_cooperative_matrices) made. The matrices are of f16:
    /// bf16 is scaled to it, f32 is also split into two parts, which keep 22 bits of it.
    Coop,
    /// Few queries, many keys: the keys are split over workgroups, and the splits' results merged.
    Decode,
    /// Tiles and an online softmax within WebGPU's default limits, larger tiles where the device allows them.
    Tile,
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kernel::Coop => "coop",
            Kernel::Decode => "decode",
            Kernel::Naive => "naive",
            Kernel::Tile => "tile",
        })
    }
}

/// What a binding holds. The number is its place in every shader's group 0; the uniform is at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Query = 1,
    Key = 2,
    Value = 3,
    Out = 4,
    Lse = 5,
    SeqlensK = 6,
    Workspace = 7,
    /// The maxima and sums of the splits, at the workspace's end.
    WorkspaceStats = 8,
    PartOut = 9,
    PartLse = 10,
    GradOut = 11,
    GradLse = 12,
    GradQuery = 13,
    GradKey = 14,
    GradValue = 15,
    /// Probabilities and score gradients of the naive backward pass, at the workspace's end.
    WorkspaceScores = 16,
    SeqlensQ = 17,
    /// Which modules of the coop kernels for f32 and bf16 are for a head, at the workspace's end.
    WorkspaceRanges = 18,
}

impl Slot {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Slot::Query => "query",
            Slot::Key => "key",
            Slot::Value => "value",
            Slot::Out => "out",
            Slot::Lse => "lse",
            Slot::SeqlensK => "seqlens_k",
            Slot::SeqlensQ => "seqlens_q",
            Slot::Workspace | Slot::WorkspaceStats | Slot::WorkspaceScores | Slot::WorkspaceRanges => "workspace",
            Slot::PartOut => "part_out",
            Slot::PartLse => "part_lse",
            Slot::GradOut => "grad_out",
            Slot::GradLse => "grad_lse",
            Slot::GradQuery => "grad_query",
            Slot::GradKey => "grad_key",
            Slot::GradValue => "grad_value",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Read,
    ReadWrite,
}

/// What a forward pass in one dispatch binds.
pub(crate) const FORWARD_BINDINGS: &[(Slot, Access)] = &[
    (Slot::Query, Access::Read),
    (Slot::Key, Access::Read),
    (Slot::Value, Access::Read),
    (Slot::Out, Access::ReadWrite),
    (Slot::Lse, Access::ReadWrite),
    (Slot::SeqlensQ, Access::Read),
    (Slot::SeqlensK, Access::Read),
];

/// One dispatch of a kernel, or several in a row.
pub(crate) struct Pass {
    pub specialization: Specialization,
    pub bindings: Vec<(Slot, Access)>,
    /// Whether the module has placeholders for `src/elements/module.rs` to fill.
    pub element_access: bool,
    /// For a kernel that is dispatched several times in a row, each time for other blocks.
    pub rounds: Option<Rounds>,
    pub threads: u32,
    pub workgroup_bytes: u32,
    pub workgroups: Workgroups,
}

impl Pass {
    /// What is compiled for it.
    pub(crate) fn module(&self) -> Module {
        Module {
            specialization: self.specialization.clone(),
            bindings: self.bindings.clone(),
            element_access: self.element_access,
        }
    }

    /// The numbers of all its bindings.
    pub(crate) fn binding_numbers(&self) -> Vec<u32> {
        self.module().binding_numbers()
    }
}

/// What a pipeline is compiled from. Equal ones are one pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Module {
    pub specialization: Specialization,
    pub bindings: Vec<(Slot, Access)>,
    pub element_access: bool,
}

impl Module {
    /// The numbers of all its bindings.
    pub(crate) fn binding_numbers(&self) -> Vec<u32> {
        std::iter::once(0).chain(self.bindings.iter().map(|&(slot, _)| slot as u32)).collect()
    }

    /// The same, with these inputs declared as if they were written: wgpu wants that of a buffer that is bound as an input and as
    /// an output of one dispatch.
    pub(crate) fn sharing(&self, inputs: &[Slot]) -> Module {
        let mut module = self.clone();
        for (slot, access) in &mut module.bindings {
            if inputs.contains(slot) {
                *access = Access::ReadWrite;
            }
        }
        module
    }

    /// Its WGSL.
    pub(crate) fn text(&self) -> Result<String, SpecializeError> {
        let mut text = self.specialization.source()?.text;
        for (slot, _) in self.bindings.iter().filter(|(_, access)| *access == Access::ReadWrite) {
            let declared = |access: &str| format!("@binding({}) var<storage, {access}>", *slot as u32);
            text = text.replace(&declared("read"), &declared("read_write"));
        }
        Ok(text)
    }
}

/// Sizes of the blocks of keys and of rows, and how many rounds visit all pairs of them.
#[derive(Clone, Copy)]
pub(crate) struct Rounds {
    pub block_keys: u32,
    pub block_rows: u32,
    pub count: u32,
}

/// The workgroups that a part of the problem takes.
pub(crate) type Workgroups = Box<dyn Fn(&Part) -> [u64; 3]>;

impl ElementType {
    /// Its name in `common/elements.wgsl`.
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

/// `switches`, less those of what a score is and whether it counts: for a kernel that ends rows.
pub(crate) fn without_scores(mut switches: Vec<&'static str>) -> Vec<&'static str> {
    switches.retain(|name| !["SOFTCAP", "SHAPED", "SEQLENS_Q", "QUERY_LENGTHS", "SEQLENS_K"].contains(name));
    switches
}

/// The same for a backward kernel.
pub(crate) fn backward_switches(problem: &Problem, vector: u32) -> Vec<&'static str> {
    let mut on = switches_of(problem, &Tensor::BACKWARD, vector);
    on.retain(|name| !["LSE", "SEQLENS_Q", "SEQLENS_K"].contains(name));
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
const SMALLEST_FACTOR: f32 = 1e-28;

fn switches_of(problem: &Problem, tensors: &[Tensor], vector: u32) -> Vec<&'static str> {
    let aligned = problem.is_aligned(tensors, vector);
    let shaped = problem.softcap.is_some() || problem.effective_scale() < SMALLEST_FACTOR;
    let mut on = vec![problem.element_type.switch()];
    let flags = [
        (aligned, "ALIGNED"),
        (aligned && problem.element_type != ElementType::F32, "PACKED"),
        (problem.softcap.is_some(), "SOFTCAP"),
        (shaped, "SHAPED"),
        (problem.seqlens_q, "SEQLENS_Q"),
        (problem.seqlens_q, "QUERY_LENGTHS"),
        (problem.seqlens_k, "SEQLENS_K"),
        (problem.lse, "LSE"),
    ];
    on.extend(flags.iter().filter(|(set, _)| *set).map(|(_, name)| name));
    on
}

/// `bindings`, less those of buffers that the problem does without.
pub(crate) fn bindings(problem: &Problem, bindings: &[(Slot, Access)]) -> Vec<(Slot, Access)> {
    let used = |slot| match slot {
        Slot::Lse => problem.lse,
        Slot::SeqlensQ => problem.seqlens_q,
        Slot::SeqlensK => problem.seqlens_k,
        Slot::GradLse => problem.gradients.is_some_and(|gradients| gradients.lse),
        _ => true,
    };
    bindings.iter().copied().filter(|&(slot, _)| used(slot)).collect()
}
