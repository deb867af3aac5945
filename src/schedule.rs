//! The launches of a forward or a backward pass.

use std::sync::Arc;

use crate::bind::{Launch, Step, WHOLE, bind_launch};
use crate::error::Error;
use crate::faults;
use crate::kernel::uniform::ProblemUniform;
use crate::kernel::{Part, Rounds, Slot};
use crate::names::{CoopForm, Kernel};
use crate::pipelines::{LazyPipeline, Pipelines};
use crate::problem::Problem;
use crate::recipe::Recipe;
use crate::split::{Bounds, Ranges, bind_part, end_of, split};

/// What the forward or the backward pass dispatches, and why.
pub(crate) struct Schedule {
    pub launches: Vec<Launch>,
    /// The launches' uniforms; bound in place of keys and values when there are none.
    pub uniforms: Option<wgpu::Buffer>,
    pub kernel: Kernel,
    pub reason: &'static str,
    /// The coop kernel's form, and why.
    pub coop_form: Option<(CoopForm, String)>,
    /// How many elements are moved at a time, where rows lie so that it can be.
    pub vector: u32,
    /// Of blocks of rows and keys, in a kernel that is dispatched once for each.
    pub rounds: Option<Rounds>,
    pub workgroup_bytes: u32,
    pub workspace_bytes: u64,
    pub parts: usize,
}

impl Schedule {
    /// Nothing to dispatch yet, or at all.
    fn empty(recipe: &Recipe) -> Self {
        Schedule {
            launches: vec![],
            uniforms: None,
            kernel: recipe.kernel,
            reason: recipe.reason,
            coop_form: recipe.coop_form.clone(),
            vector: recipe.vector,
            rounds: recipe.passes.iter().find_map(|pass| pass.rounds),
            workgroup_bytes: recipe.passes.iter().map(|pass| pass.workgroup_bytes).max().unwrap_or(0),
            workspace_bytes: 0,
            parts: 0,
        }
    }

    /// Cuts the problem into parts that fit the device, and says what each launch binds.
    pub(crate) fn new(
        pipelines: &Pipelines,
        limits: &wgpu::Limits,
        problem: &Problem,
        recipe: &Recipe,
        backward: bool,
    ) -> Result<Self, Error> {
        let mut schedule = Schedule::empty(recipe);
        let nothing_to_write = if backward { problem.has_no_gradients() } else { problem.is_empty() };
        if nothing_to_write {
            return Ok(schedule);
        }
        let bounds = Bounds::of(limits);
        // What lies in the workspace, one after the other at aligned places.
        let workspace = |part: &Part| -> Ranges {
            let mut end = 0u64;
            let place = |(slot, bytes): (Slot, u64)| {
                let start = end.saturating_add(bounds.alignment - 1) / bounds.alignment * bounds.alignment;
                end = start.saturating_add(bytes);
                (slot, start, bytes)
            };
            (recipe.workspaces)(part).into_iter().map(place).collect()
        };
        let bind = |part: &Part| {
            let (mut ranges, uniform) = bind_part(problem, part, &bounds, backward);
            ranges.extend(workspace(part));
            (ranges, uniform)
        };
        let uniform_bytes = size_of::<ProblemUniform>() as u64;
        let uniform_step = uniform_bytes.next_multiple_of(limits.min_uniform_buffer_offset_alignment as u64);
        // Of each part one for each round.
        let rounds = schedule.rounds.map_or(1, |rounds| rounds.count);
        let of_part = uniform_step * rounds as u64;
        let parts = split(problem, recipe, &|part| bind(part).0, &|part| end_of(&workspace(part)), of_part, &bounds)?;
        schedule.workspace_bytes = parts.iter().map(|part| end_of(&workspace(part))).max().unwrap_or(0);
        schedule.parts = parts.len();
        let lazy: Vec<_> = recipe.passes.iter().map(|pass| Arc::new(LazyPipeline::new(pipelines, pass))).collect();

        let mut uniforms = vec![0u8; of_part as usize * parts.len()];
        for (n, part) in parts.iter().enumerate() {
            let (ranges, mut uniform) = bind(part);
            uniform.splits = recipe.splits.unwrap_or(0);
            uniform.split_rows = part.rows_of_heads() as u32;
            let uniform_offset = |round: u32| (n as u64 * rounds as u64 + round as u64) * uniform_step;
            if let Some(Rounds { block_keys, block_rows, .. }) = schedule.rounds {
                (uniform.block_keys, uniform.block_rows) = (block_keys, block_rows);
            }
            for round in 0..rounds {
                uniform.round = round;
                let slice = &mut uniforms[uniform_offset(round) as usize..][..uniform_bytes as usize];
                slice.copy_from_slice(bytemuck::bytes_of(&uniform));
            }
            for (pass, pipeline) in recipe.passes.iter().zip(&lazy) {
                // split() has shown that each is at most a u32 limit.
                let workgroups = (pass.workgroups)(part).map(|n| n as u32);
                // Without keys, say, there are no gradients of keys.
                if workgroups.contains(&0) {
                    continue;
                }
                let bound = |slot: Slot| match slot.is_whole() {
                    true => Some((slot, 0, WHOLE)),
                    false => ranges.iter().copied().find(|&(s, _, _)| s == slot),
                };
                schedule.launches.extend((0..pass.rounds.map_or(1, |all| all.count)).map(|round| Launch {
                    pipeline: pipeline.clone(),
                    ranges: pass.bindings.iter().filter_map(|&(slot, _)| bound(slot)).collect(),
                    uniform_offset: uniform_offset(round),
                    workgroups,
                }));
            }
        }
        schedule.uniforms = Some(uniform_buffer(pipelines.device(), &uniforms)?);
        Ok(schedule)
    }

    /// Builds the pipelines that are not there yet.
    pub(crate) fn build(&self) -> Result<(), Error> {
        self.launches.iter().try_for_each(|launch| launch.pipeline.build())
    }

    /// Binds the buffers of every launch.
    pub(crate) fn bind(
        &self,
        device: &wgpu::Device,
        slots: &[(Slot, &wgpu::BufferBinding<'_>)],
    ) -> Result<Vec<Step>, Error> {
        let Some(uniforms) = &self.uniforms else {
            return Ok(vec![]);
        };
        self.launches.iter().map(|launch| bind_launch(device, launch, uniforms, slots)).collect()
    }
}

/// The uniforms of the launches; bound as a tensor too where that has no elements.
pub(crate) fn uniform_buffer(device: &wgpu::Device, bytes: &[u8]) -> Result<wgpu::Buffer, Error> {
    let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::STORAGE;
    faults::mapped(device, "wgpu-flash-attention problem", usage, bytes)
}
