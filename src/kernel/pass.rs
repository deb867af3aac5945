//! A dispatch of a kernel: its module, what it binds, and how many workgroups a part of the problem takes.

use super::part::Part;
use super::uniform::ProblemUniform;
use crate::blocks::lists::BlockLists;
use crate::error::Error;
use crate::mods::{MOST_BUFFERS, Mods};
use crate::names::Kernel;
use crate::specialize::{Source, Specialization, SpecializeError};

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
    /// How large the numbers of each head are, at the workspace's end.
    WorkspaceSizes = 18,
    Bias = 19,
    Mask = 20,
    AlibiSlopes = 21,
    Sinks = 22,
    GradBias = 23,
    GradSinks = 24,
    GradAlibiSlopes = 25,
    /// A number of each row for gradients of what a head has, at the workspace's end.
    WorkspaceRowSums = 26,
    /// Seed and offset of dropout. The one that is bound as a uniform, so that it takes none of a stage's storage buffers.
    RngState = 27,
    /// Packed lists of blocks.
    Blocks = 28,
    /// Lists of blocks as FlexAttention has them.
    KvNumBlocks = 29,
    KvIndices = 30,
    FullKvNumBlocks = 31,
    FullKvIndices = 32,
    /// The buffers of the user's mods, in the order of their text. The numbers are those of src/mods/, from `FIRST_BINDING` on.
    ModBuffer0 = 40,
    ModBuffer1 = 41,
    ModBuffer2 = 42,
    ModBuffer3 = 43,
    ModBuffer4 = 44,
    ModBuffer5 = 45,
    ModBuffer6 = 46,
    ModBuffer7 = 47,
}

impl Slot {
    /// Whether it is bound as a uniform.
    pub(crate) const fn is_uniform(self) -> bool {
        matches!(self, Slot::RngState)
    }

    pub(crate) const MOD_BUFFERS: [Slot; MOST_BUFFERS] = [
        Slot::ModBuffer0,
        Slot::ModBuffer1,
        Slot::ModBuffer2,
        Slot::ModBuffer3,
        Slot::ModBuffer4,
        Slot::ModBuffer5,
        Slot::ModBuffer6,
        Slot::ModBuffer7,
    ];

    /// Whether it is bound as the caller gives it, whatever its size.
    pub(crate) fn is_whole(self) -> bool {
        Slot::MOD_BUFFERS.contains(&self)
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Slot::Query => "query",
            Slot::Key => "key",
            Slot::Value => "value",
            Slot::Out => "out",
            Slot::Lse => "lse",
            Slot::SeqlensK => "seqlens_k",
            Slot::SeqlensQ => "seqlens_q",
            Slot::Blocks => "blocks",
            Slot::KvNumBlocks => "kv_num_blocks",
            Slot::KvIndices => "kv_indices",
            Slot::FullKvNumBlocks => "full_kv_num_blocks",
            Slot::FullKvIndices => "full_kv_indices",
            Slot::Workspace
            | Slot::WorkspaceStats
            | Slot::WorkspaceScores
            | Slot::WorkspaceSizes
            | Slot::WorkspaceRowSums => "workspace",
            Slot::PartOut => "part_out",
            Slot::PartLse => "part_lse",
            Slot::RngState => "rng_state",
            Slot::GradOut => "grad_out",
            Slot::GradLse => "grad_lse",
            Slot::GradQuery => "grad_query",
            Slot::GradKey => "grad_key",
            Slot::GradValue => "grad_value",
            Slot::Bias => "bias",
            Slot::Mask => "mask",
            Slot::AlibiSlopes => "alibi_slopes",
            Slot::Sinks => "sinks",
            Slot::GradBias => "grad_bias",
            Slot::GradSinks => "grad_sinks",
            Slot::GradAlibiSlopes => "grad_alibi_slopes",
            Slot::ModBuffer0 => "mod_buffers[0]",
            Slot::ModBuffer1 => "mod_buffers[1]",
            Slot::ModBuffer2 => "mod_buffers[2]",
            Slot::ModBuffer3 => "mod_buffers[3]",
            Slot::ModBuffer4 => "mod_buffers[4]",
            Slot::ModBuffer5 => "mod_buffers[5]",
            Slot::ModBuffer6 => "mod_buffers[6]",
            Slot::ModBuffer7 => "mod_buffers[7]",
        }
    }

    /// Whether it is an input that a problem may do without.
    fn is_extra(self) -> bool {
        matches!(
            self,
            Slot::SeqlensQ
                | Slot::SeqlensK
                | Slot::Blocks
                | Slot::Bias
                | Slot::Mask
                | Slot::AlibiSlopes
                | Slot::Sinks
                | Slot::GradLse
        ) || self.is_whole()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Read,
    ReadWrite,
}

/// One dispatch of a kernel, or several in a row.
pub(crate) struct Pass {
    pub specialization: Specialization,
    pub bindings: Vec<(Slot, Access)>,
    /// Whether the module has placeholders for `src/matrices/spirv.rs` to fill.
    pub element_access: bool,
    /// What a score is and whether it counts, by the user.
    pub mods: Option<Mods>,
    /// For a kernel that is dispatched several times in a row, each time for other blocks.
    pub rounds: Option<Rounds>,
    pub threads: u32,
    pub workgroup_bytes: u32,
    pub workgroups: Workgroups,
}

impl Pass {
    /// One dispatch of a module that needs no access to the elements of matrices.
    pub(crate) fn new(
        specialization: Specialization,
        bindings: Vec<(Slot, Access)>,
        threads: u32,
        workgroup_bytes: u32,
        workgroups: Workgroups,
    ) -> Self {
        Pass {
            specialization,
            bindings,
            element_access: false,
            mods: None,
            rounds: None,
            threads,
            workgroup_bytes,
            workgroups,
        }
    }

    /// Whether the module has placeholders for access to the elements of matrices.
    pub(crate) fn with_element_access(self, element_access: bool) -> Self {
        Pass { element_access, ..self }
    }

    /// With what the user wrote, if the module calls it.
    pub(crate) fn with_mods(self, mods: Option<&Mods>) -> Self {
        let calls = self.specialization.switches.contains(&"MODS");
        Pass { mods: mods.filter(|_| calls).cloned(), ..self }
    }

    /// With the sizes of the problem's blocks as constants, if the module knows block lists: each visit of a tile divides by a size.
    pub(crate) fn with_blocks(mut self, blocks: Option<BlockLists>) -> Self {
        if let Some(blocks) = blocks.filter(|_| self.specialization.switches.contains(&"BLOCKS")) {
            self.specialization.constants.extend([("BLOCK_QUERIES", blocks.queries), ("BLOCK_KEYS", blocks.keys)]);
        }
        self
    }

    /// On a device that has numbers of 64 bits, or not. Only the products of dropout's random numbers take them, and not in modules with
    /// access to the elements of matrices, which have an instruction of their own for these.
    pub(crate) fn with_int64(mut self, int64: bool) -> Self {
        if int64 && !self.element_access && self.specialization.switches.contains(&"DROPOUT") {
            self.specialization.switches.push("INT64");
        }
        self
    }

    /// Dispatched once for each round of blocks.
    pub(crate) fn with_rounds(self, rounds: Rounds) -> Self {
        Pass { rounds: Some(rounds), ..self }
    }

    /// What is compiled for it.
    pub(crate) fn module(&self) -> Module {
        Module {
            specialization: self.specialization.clone(),
            bindings: self.bindings.clone(),
            element_access: self.element_access,
            mods: self.mods.clone(),
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
    pub mods: Option<Mods>,
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

    /// Whether its matrices are of bf16, which its WGSL has as f16.
    pub(crate) fn is_bf16(&self) -> bool {
        self.specialization.switches.contains(&"BF16_MATRICES")
    }

    /// Its WGSL, with all inputs as inputs.
    pub(crate) fn source(&self) -> Result<Source, SpecializeError> {
        let mut source = self.specialization.source()?;
        source.text.extend(self.mods.iter().map(Mods::printed));
        Ok(source)
    }

    /// Its WGSL.
    pub(crate) fn text(&self) -> Result<String, SpecializeError> {
        let mut text = self.source()?.text;
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

/// An error if a pass needs more than the device's limits allow.
pub(crate) fn check_limits(kernel: Kernel, passes: &[Pass], limits: &wgpu::Limits) -> Result<(), Error> {
    for pass in passes {
        let uniforms = pass.bindings.iter().filter(|(slot, _)| slot.is_uniform()).count() as u32;
        let storage_buffers = pass.bindings.len() as u32 - uniforms;
        let inputs: Vec<_> = pass.bindings.iter().map(|&(slot, _)| slot).filter(|slot| slot.is_extra()).collect();
        let found = limits.max_storage_buffers_per_shader_stage;
        // It is these inputs that are too many, if it would do without them.
        if (found + 1..=found + inputs.len() as u32).contains(&storage_buffers) {
            // A buffer of the user's has the name that the text gives it.
            let of_text = |slot| {
                let n = Slot::MOD_BUFFERS.iter().position(|&of_mods| of_mods == slot)?;
                pass.mods.as_ref()?.buffers().nth(n)
            };
            let inputs = inputs.into_iter().map(|slot| of_text(slot).unwrap_or(slot.name()).to_string()).collect();
            let backward = pass.bindings.iter().any(|&(slot, _)| slot == Slot::GradOut);
            return Err(Error::StorageBuffers { kernel, backward, needed: storage_buffers, found, inputs });
        }
        let bindings = pass.binding_numbers().into_iter().max().unwrap_or(0) + 1;
        let uniform_bytes = size_of::<ProblemUniform>() as u64;
        let needs = [
            ("max_compute_workgroup_storage_size", pass.workgroup_bytes, limits.max_compute_workgroup_storage_size),
            ("max_compute_invocations_per_workgroup", pass.threads, limits.max_compute_invocations_per_workgroup),
            ("max_compute_workgroup_size_x", pass.threads, limits.max_compute_workgroup_size_x),
            ("max_compute_workgroup_size_y", 1, limits.max_compute_workgroup_size_y),
            ("max_compute_workgroup_size_z", 1, limits.max_compute_workgroup_size_z),
            ("max_compute_workgroups_per_dimension", 1, limits.max_compute_workgroups_per_dimension),
            ("max_storage_buffers_per_shader_stage", storage_buffers, limits.max_storage_buffers_per_shader_stage),
            ("max_uniform_buffers_per_shader_stage", 1 + uniforms, limits.max_uniform_buffers_per_shader_stage),
            ("max_bindings_per_bind_group", bindings, limits.max_bindings_per_bind_group),
            ("max_bind_groups", 1, limits.max_bind_groups),
        ];
        let needs = needs.map(|(limit, needed, found)| (limit, u64::from(needed), u64::from(found)));
        let of_uniform = [
            ("max_uniform_buffer_binding_size", uniform_bytes, limits.max_uniform_buffer_binding_size),
            ("max_buffer_size", uniform_bytes, limits.max_buffer_size),
        ];
        for (limit, needed, found) in needs.into_iter().chain(of_uniform) {
            if needed > found {
                return Err(Error::DeviceLimit { kernel, limit, needed, found });
            }
        }
    }
    Ok(())
}
