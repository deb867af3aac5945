//! Buffers: checks them, binds them, and records dispatches.

use std::sync::Arc;

use wgpu::{BindGroupEntry, BindingResource, BufferBinding, BufferUsages};

use crate::error::{Error, ModBufferFault};
use crate::faults;
use crate::kernel::uniform::ProblemUniform;
use crate::kernel::{Access, Slot};
use crate::mods::Mods;
use crate::overlap::Region;
use crate::pipelines::{LazyPipeline, Pipeline};
use crate::problem::{Problem, ScoreLayout, Tensor};

/// A buffer argument: a whole buffer, `&buffer`, or a part of one, `BufferBinding { buffer, offset, size }`.
pub trait ToBinding<'a>: ToOptionalBinding<'a> {
    /// The part of the buffer.
    fn to_binding(self) -> BufferBinding<'a>;
}

/// A buffer argument that a call may do without: as [`ToBinding`], or an `Option` of it.
pub trait ToOptionalBinding<'a> {
    /// The part of the buffer, if there is one.
    fn to_optional_binding(self) -> Option<BufferBinding<'a>>;
}

impl<'a> ToBinding<'a> for &'a wgpu::Buffer {
    fn to_binding(self) -> BufferBinding<'a> {
        self.as_entire_buffer_binding()
    }
}

impl<'a> ToBinding<'a> for BufferBinding<'a> {
    fn to_binding(self) -> BufferBinding<'a> {
        self
    }
}

impl<'a> ToOptionalBinding<'a> for &'a wgpu::Buffer {
    fn to_optional_binding(self) -> Option<BufferBinding<'a>> {
        Some(self.to_binding())
    }
}

impl<'a> ToOptionalBinding<'a> for BufferBinding<'a> {
    fn to_optional_binding(self) -> Option<BufferBinding<'a>> {
        Some(self)
    }
}

impl<'a, B: ToBinding<'a>> ToOptionalBinding<'a> for Option<B> {
    fn to_optional_binding(self) -> Option<BufferBinding<'a>> {
        self.map(B::to_binding)
    }
}

/// A forward or backward pass with its buffers bound, ready to be recorded any number of times. It keeps what it needs of its
/// plan and its buffers.
#[derive(Clone, Debug)]
pub struct BoundPass {
    pub(crate) steps: Vec<Step>,
}

/// A dispatch: its pipeline, its bind group, its workgroups.
pub(crate) type Step = (Arc<Pipeline>, wgpu::BindGroup, [u32; 3]);

impl BoundPass {
    /// What `bind` binds, unless wgpu finds something wrong with it: a buffer of another device, say.
    pub(crate) fn new(device: &wgpu::Device, bind: impl FnOnce() -> Result<Vec<Step>, Error>) -> Result<Self, Error> {
        Ok(BoundPass { steps: faults::caught(device, "bind group", bind)? })
    }

    /// Records a compute pass of its own, if there is anything to record.
    pub(crate) fn encode(&self, encoder: &mut wgpu::CommandEncoder, label: &str) {
        if !self.steps.is_empty() {
            let label = Some(label);
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes: None });
            self.record(&mut pass);
        }
    }

    /// Records the dispatches into the caller's pass. wgpu orders the dispatches of a pass, so that each sees what earlier ones wrote.
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        for (pipeline, group, [x, y, z]) in &self.steps {
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, group, &[]);
            pass.dispatch_workgroups(*x, *y, *z);
        }
    }
}

/// In the place of a size: all that the caller gives.
pub(crate) const WHOLE: u64 = u64::MAX;

/// One dispatch.
#[derive(Debug)]
pub(crate) struct Launch {
    pub pipeline: Arc<LazyPipeline>,
    /// For each binding of the pipeline: what it holds, its first byte and its size, from where the caller binds it.
    pub ranges: Vec<(Slot, u64, u64)>,
    pub uniform_offset: u64,
    pub workgroups: [u32; 3],
}

/// A buffer argument.
pub(crate) struct Argument<'b, 'a> {
    slot: Slot,
    access: Access,
    given: Option<&'b BufferBinding<'a>>,
    /// The bytes from where it is bound that it needs.
    needed: u64,
    /// Those of them that are its own.
    region: Region,
    /// Whether the problem has it.
    has: bool,
}

impl<'b, 'a> Argument<'b, 'a> {
    /// One that lies as a tensor of the problem.
    pub(crate) fn tensor(
        slot: Slot,
        access: Access,
        given: &'b BufferBinding<'a>,
        problem: &Problem,
        tensor: Tensor,
    ) -> Self {
        let needed = problem.tensor_bytes(tensor).next_multiple_of(4);
        Argument { slot, access, given: Some(given), needed, region: problem.region(tensor), has: true }
    }

    /// One that is so many bytes in a row.
    pub(crate) fn bytes(
        slot: Slot,
        access: Access,
        given: Option<&'b BufferBinding<'a>>,
        needed: u64,
        has: bool,
    ) -> Self {
        Argument { slot, access, given, needed, region: Region::bytes(needed), has }
    }

    /// The packed block lists.
    pub(crate) fn blocks(given: Option<&'b BufferBinding<'a>>, problem: &Problem) -> Self {
        Argument::bytes(Slot::Blocks, Access::Read, given, problem.blocks_bytes(), problem.blocks.is_some())
    }

    /// One that has an element for each score.
    pub(crate) fn scores(
        slot: Slot,
        access: Access,
        given: Option<&'b BufferBinding<'a>>,
        problem: &Problem,
        scores: Option<(ScoreLayout, u64)>,
    ) -> Self {
        let Some((layout, element_bytes)) = scores else {
            return Argument::bytes(slot, access, given, 0, false);
        };
        // validate() has shown that this does not overflow.
        let needed = problem.score_bytes(&layout, element_bytes).unwrap_or(u64::MAX / 8).next_multiple_of(4);
        Argument { slot, access, given, needed, region: problem.score_region(&layout, element_bytes), has: true }
    }

    /// One that holds so many f32, if the problem has it.
    pub(crate) fn of_heads(
        slot: Slot,
        access: Access,
        given: Option<&'b BufferBinding<'a>>,
        numbers: Option<u64>,
    ) -> Self {
        Argument::bytes(slot, access, given, 4 * numbers.unwrap_or(0), numbers.is_some())
    }

    /// One that holds a length for each batch entry.
    pub(crate) fn lengths(slot: Slot, given: Option<&'b BufferBinding<'a>>, problem: &Problem, has: bool) -> Self {
        let needed = if has { 4 * problem.shape.batch as u64 } else { 0 };
        Argument::bytes(slot, Access::Read, given, needed, has)
    }

    /// Seed and offset of dropout. A problem whose probability is 0 looks at none.
    pub(crate) fn rng_state(given: Option<&'b BufferBinding<'a>>, problem: &Problem) -> Self {
        let needed = if problem.dropout_in_use().is_some() { 16 } else { 0 };
        Argument::bytes(Slot::RngState, Access::Read, given, needed, problem.dropout.is_some())
    }
}

/// What offsets of bindings are multiples of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OffsetAlignments {
    storage: u64,
    uniform: u64,
}

impl OffsetAlignments {
    pub(crate) fn of(limits: &wgpu::Limits) -> Self {
        OffsetAlignments {
            storage: limits.min_storage_buffer_offset_alignment.into(),
            uniform: limits.min_uniform_buffer_offset_alignment.into(),
        }
    }
}

/// The bytes that are bound.
fn bytes_of(binding: &BufferBinding<'_>) -> u64 {
    let rest = binding.buffer.size().saturating_sub(binding.offset);
    binding.size.map_or(rest, |size| rest.min(size.get()))
}

/// The buffers of the problem's mods, checked but for what they overlap.
pub(crate) fn mod_buffers<'b, 'a>(
    mods: Option<&Mods>,
    given: &'b [(&'a str, BufferBinding<'a>)],
    limits: &wgpu::Limits,
) -> Result<Vec<Argument<'b, 'a>>, Error> {
    let wrong = |name: &str, fault| Err(Error::ModBuffer { name: name.into(), fault });
    let names: Vec<&str> = mods.iter().flat_map(|mods| mods.buffers()).collect();
    for (n, (name, _)) in given.iter().enumerate() {
        if !names.contains(name) {
            let known = names.iter().map(|name| name.to_string()).collect();
            return wrong(name, ModBufferFault::Unknown { known });
        }
        if given[..n].iter().any(|(before, _)| before == name) {
            return wrong(name, ModBufferFault::Twice);
        }
    }
    let mut all = vec![];
    for (name, slot) in names.iter().zip(Slot::MOD_BUFFERS) {
        let Some((_, binding)) = given.iter().find(|(given, _)| given == name) else {
            return wrong(name, ModBufferFault::Missing);
        };
        let (found, offset, usage) = (bytes_of(binding), binding.offset, binding.buffer.usage());
        let limit = limits.max_storage_buffer_binding_size.min(u32::MAX.into());
        let alignment = limits.min_storage_buffer_offset_alignment as u64;
        let fault = match found {
            _ if !usage.contains(BufferUsages::STORAGE) => Some(ModBufferFault::Usage { found: usage }),
            _ if !offset.is_multiple_of(alignment) => Some(ModBufferFault::Offset { offset, alignment }),
            0..4 => Some(ModBufferFault::TooSmall { found }),
            _ if found > limit => Some(ModBufferFault::TooLarge { found, limit }),
            _ => None,
        };
        if let Some(fault) = fault {
            return wrong(name, fault);
        }
        all.push(Argument::bytes(slot, Access::Read, Some(binding), found / 4 * 4, true));
    }
    Ok(all)
}

/// Checks every buffer; returns those that can be bound.
pub(crate) fn check_buffers<'b, 'a>(
    all: &[Argument<'b, 'a>],
    alignments: OffsetAlignments,
) -> Result<Vec<(Slot, &'b BufferBinding<'a>)>, Error> {
    let mut bound: Vec<(Slot, Access, &BufferBinding, Region)> = vec![];
    for &Argument { slot, access, given, needed, ref region, has } in all {
        let argument = slot.name();
        let binding = match given {
            Some(_) if !has => return Err(Error::BufferUnexpected { argument }),
            None if needed > 0 => return Err(Error::BufferMissing { argument, bytes: needed }),
            Some(binding) if needed > 0 => binding,
            _ => continue,
        };
        let found = bytes_of(binding);
        let needed_usage = if slot.is_uniform() { BufferUsages::UNIFORM } else { BufferUsages::STORAGE };
        if !binding.buffer.usage().contains(needed_usage) {
            return Err(Error::BufferUsage { argument, found: binding.buffer.usage(), needed: needed_usage });
        }
        let offset = binding.offset;
        match (slot.is_uniform(), alignments) {
            (true, OffsetAlignments { uniform: alignment, .. }) if !offset.is_multiple_of(alignment) => {
                return Err(Error::UniformOffset { argument, offset, alignment });
            }
            (false, OffsetAlignments { storage: alignment, .. }) if !offset.is_multiple_of(alignment) => {
                return Err(Error::BufferOffset { argument, offset, alignment });
            }
            _ => {}
        }
        if found < needed {
            return Err(Error::BufferTooSmall { argument, needed, found });
        }
        let region = region.clone().at(binding.offset);
        for (other, other_access, there, other_region) in &bound {
            if there.buffer != binding.buffer || (access, *other_access) == (Access::Read, Access::Read) {
                continue;
            }
            let (output, input) = if access == Access::ReadWrite { (slot, *other) } else { (*other, slot) };
            if input.is_uniform() {
                return Err(Error::UniformShared { argument: input.name(), output: output.name() });
            }
            let meet = match access == *other_access {
                // Where words are shared they are written by atomic operations.
                true => region.meets(other_region),
                false => region.clone().in_words().meets(&other_region.clone().in_words()),
            };
            if meet {
                return Err(Error::BufferAliased { output: output.name(), other: input.name() });
            }
        }
        bound.push((slot, access, binding, region));
    }
    Ok(bound.into_iter().map(|(slot, _, binding, _)| (slot, binding)).collect())
}

/// Binds a launch's uniform and ranges of the buffers.
pub(crate) fn bind_launch(
    device: &wgpu::Device,
    launch: &Launch,
    uniforms: &wgpu::Buffer,
    slots: &[(Slot, &BufferBinding<'_>)],
) -> Result<Step, Error> {
    let uniform = BufferBinding {
        buffer: uniforms,
        offset: launch.uniform_offset,
        size: wgpu::BufferSize::new(size_of::<ProblemUniform>() as u64),
    };
    let mut entries = vec![BindGroupEntry { binding: 0, resource: BindingResource::Buffer(uniform.clone()) }];
    // The caller gives one workspace.
    let given = |slot: Slot| {
        let argument = match slot {
            Slot::WorkspaceStats | Slot::WorkspaceScores | Slot::WorkspaceSizes | Slot::WorkspaceRowSums => {
                Slot::Workspace
            }
            slot => slot,
        };
        slots.iter().find(|(s, _)| *s == argument).map(|(_, binding)| binding)
    };
    for &(slot, start, size) in &launch.ranges {
        let given = given(slot);
        let size = match given {
            Some(given) if size == WHOLE => bytes_of(given) / 4 * 4,
            _ => size,
        };
        // A tensor without elements is never read; wgpu wants something bound all the same.
        let resource = match (given, wgpu::BufferSize::new(size)) {
            (Some(given), Some(size)) => {
                BufferBinding { buffer: given.buffer, offset: given.offset + start, size: Some(size) }
            }
            _ => BufferBinding { offset: 0, ..uniform.clone() },
        };
        entries.push(BindGroupEntry { binding: slot as u32, resource: BindingResource::Buffer(resource) });
    }
    // wgpu takes a buffer at several places of a dispatch if all of them may write or none.
    let bound = |slot| launch.ranges.iter().any(|&(s, _, size)| s == slot && size > 0);
    let buffer = |slot: Slot| given(slot).filter(|_| bound(slot)).map(|binding| binding.buffer);
    let written = launch.pipeline.written();
    let shared = launch.pipeline.read().filter(|&slot| {
        let there = buffer(slot);
        there.is_some() && written.clone().any(|output| buffer(output) == there)
    });
    let shared: Vec<_> = shared.collect();
    // A browser does not take a number from a buffer that may be written as the same for a whole workgroup. Lengths and block lists must
    // be, since they bound loops with barriers.
    let bounds = shared.iter().find(|slot| [Slot::SeqlensQ, Slot::SeqlensK, Slot::Blocks].contains(slot));
    match bounds {
        Some(slot) if device.adapter_info().backend == wgpu::Backend::BrowserWebGpu => {
            return Err(Error::LengthsShared { argument: slot.name() });
        }
        _ => {}
    }
    let pipeline = launch.pipeline.sharing(&shared)?;
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("wgpu-flash-attention"),
        layout: &pipeline.layout,
        entries: &entries,
    });
    Ok((pipeline, group, launch.workgroups))
}
