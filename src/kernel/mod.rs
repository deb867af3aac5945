//! The kernels: one file each, beside its WGSL. A kernel says which modules it runs, what they bind, and how many
//! workgroups a part of the problem takes.

pub(crate) mod decode;
pub(crate) mod forward_coop;
pub(crate) mod forward_tile;
pub(crate) mod naive;
pub(crate) mod uniform;

pub use forward_coop::CoopForm;

use crate::plan::Part;
use crate::specialize::Specialization;
use crate::{ElementType, Problem};

/// Which algorithm computes a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Scores to memory, softmax, product: what people write first. The yardstick; no plan falls back to it.
    Naive,
    /// Tiles on cooperative matrices (tensor cores), f16 in memory, for contexts that
    /// [`Context::with_cooperative_matrices`](crate::Context::with_cooperative_matrices) made.
    Coop,
    /// Few queries, many keys: the keys are split over workgroups, and the splits' results merged by lse.
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
    /// The lse of the splits, at the workspace's end.
    WorkspaceLse = 8,
    PartOut = 9,
    PartLse = 10,
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
            Slot::Workspace | Slot::WorkspaceLse => "workspace",
            Slot::PartOut => "part_out",
            Slot::PartLse => "part_lse",
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
    (Slot::SeqlensK, Access::Read),
];

/// One dispatch of a kernel.
pub(crate) struct Pass {
    pub specialization: Specialization,
    pub bindings: Vec<(Slot, Access)>,
    /// Whether the module has placeholders for `src/elements.rs` to fill.
    pub element_access: bool,
    pub threads: u32,
    pub workgroup_bytes: u32,
    pub workgroups: Workgroups,
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

/// The switches that follow from the problem, for a kernel that moves `vector` elements at a time where they lie so.
pub(crate) fn switches(problem: &Problem, vector: u32) -> Vec<&'static str> {
    let aligned = problem.is_aligned(vector);
    let mut on = vec![problem.element_type.switch()];
    let flags = [
        (aligned, "ALIGNED"),
        (aligned && problem.element_type != ElementType::F32, "PACKED"),
        (problem.softcap.is_some(), "SOFTCAP"),
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
        Slot::SeqlensK => problem.seqlens_k,
        _ => true,
    };
    bindings.iter().copied().filter(|&(slot, _)| used(slot)).collect()
}
