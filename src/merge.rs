//! Merging results over disjoint sets of keys.

use std::sync::Arc;

use wgpu::BufferBinding;

use crate::bind::{Argument, BoundPass, Launch, ToBinding, ToOptionalBinding, bind_launch, check_buffers};
use crate::context::Context;
use crate::error::Error;
use crate::faults;
use crate::kernel::uniform::{ProblemUniform, TensorUniform};
use crate::kernel::{Access, Part, Pass, Slot, check_limits, decode};
use crate::names::{ElementType, Kernel, MAX_HEAD_DIM};
use crate::pipelines::LazyPipeline;
use crate::recipe::PlannedModule;
use crate::schedule::uniform_buffer;

/// Partial results to merge: `parts` times o and lse of the same rows, each over keys of its own.
///
/// Softmax attention over a set of keys follows from its results over the parts of the set:
/// `lse = ln Σ exp(lseₛ)`, `o = Σ exp(lseₛ − lse) oₛ`. This is the building block of attention over several devices
/// (ring attention, context parallelism, a cache split between them): each device computes o and lse over the keys that it
/// holds, with a [`Plan`](crate::Plan) of a [`Problem`](crate::Problem) that has lse, and what arrives is merged. The
/// merge is associative, but for rounding: results may be merged one by one as they come, or all at once. A part
/// that saw no key of a row has −∞ in lse there and adds nothing.
///
/// Arithmetic is f32; o is rounded to the element type once, so f32 partial results lose least.
///
/// ```no_run
/// use wgpu_flash_attention::wgpu::{Buffer, CommandEncoder};
/// use wgpu_flash_attention::{Context, ElementType, Error, MergeBuffers, MergeProblem};
///
/// // Two results of 8 heads with 100 queries, of head dim 64.
/// fn merge(context: &Context, encoder: &mut CommandEncoder, buffers: [&Buffer; 4]) -> Result<(), Error> {
///     let [part_out, part_lse, out, lse] = buffers;
///     let plan = context.plan_merge(&MergeProblem::new(2, 800, 64, ElementType::F32))?;
///     plan.merge(encoder, &MergeBuffers::new([part_out, part_lse], [out, lse]))
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MergeProblem {
    /// Partial results.
    pub parts: u32,
    /// Rows of each: batch · heads · queries, in any order that all parts share.
    pub rows: u32,
    /// Elements of a row of o, 1 to 256.
    pub head_dim_v: u32,
    /// Type of o, of the parts and of the result. lse is f32.
    pub element_type: ElementType,
    /// Of a merge with sinks: query heads, and queries of each. Row `r` is then of head `r / queries % heads`.
    pub sinks: Option<[u32; 2]>,
}

/// The buffers of a merge. What [`ForwardBuffers`](crate::ForwardBuffers) says of usages and offsets holds here too.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MergeBuffers<'a> {
    /// o of the parts, contiguous `[parts, rows, head_dim_v]`.
    pub part_out: BufferBinding<'a>,
    /// lse of the parts, f32 `[parts, rows]`; −∞ where a part saw no key.
    pub part_lse: BufferBinding<'a>,
    /// The merged o, contiguous `[rows, head_dim_v]`; not where a part is.
    pub out: BufferBinding<'a>,
    /// The merged lse, f32 `[rows]`; not where a part is.
    pub lse: BufferBinding<'a>,
    /// The sinks, f32 `[heads]`; given exactly when the merge has them.
    pub sinks: Option<BufferBinding<'a>>,
}

/// A merge on a device. Made by [`Context::plan_merge`]; used any number of times.
#[derive(Debug)]
pub struct MergePlan {
    device: wgpu::Device,
    problem: MergeProblem,
    offset_alignment: u64,
    /// Nothing to do without rows.
    work: Option<(Launch, wgpu::Buffer)>,
}

impl<'a> MergeBuffers<'a> {
    /// o and lse of the parts, then the merged o and lse.
    pub fn new<P: ToBinding<'a>, B: ToBinding<'a>>([part_out, part_lse]: [P; 2], [out, lse]: [B; 2]) -> Self {
        MergeBuffers {
            part_out: part_out.to_binding(),
            part_lse: part_lse.to_binding(),
            out: out.to_binding(),
            lse: lse.to_binding(),
            sinks: None,
        }
    }

    /// The sinks, of a merge with them.
    pub fn sinks(mut self, sinks: impl ToOptionalBinding<'a>) -> Self {
        self.sinks = sinks.to_optional_binding();
        self
    }
}

impl MergeProblem {
    /// So many parts, each with so many rows of o.
    pub const fn new(parts: u32, rows: u32, head_dim_v: u32, element_type: ElementType) -> Self {
        MergeProblem { parts, rows, head_dim_v, element_type, sinks: None }
    }

    /// Adds a sink to each row, as [`Problem::sinks`](crate::Problem::sinks) does. The parts are results without sinks: a sink
    /// counts once. Rows are those of o `[batch, heads, queries, head_dim_v]`.
    pub const fn with_sinks(mut self, heads: u32, queries: u32) -> Self {
        self.sinks = Some([heads, queries]);
        self
    }

    fn pass(&self) -> Pass {
        decode::merge(self.parts, self.head_dim_v, self.element_type, self.sinks.is_some())
    }

    /// Bytes of o of one part.
    fn out_bytes(&self) -> u64 {
        self.rows as u64 * self.head_dim_v as u64 * self.element_type.bytes()
    }

    /// What each buffer needs: o and lse of the parts, o and lse of the result, sinks.
    fn bytes(&self) -> Result<[(Slot, u64); 5], Error> {
        let parts = |bytes: u64| bytes.checked_mul(self.parts as u64).and_then(|n| n.checked_next_multiple_of(4));
        let overflow = |slot: Slot| Error::LayoutOverflow { argument: slot.name() };
        let part_out = parts(self.out_bytes()).ok_or(overflow(Slot::PartOut))?;
        let part_lse = parts(4 * self.rows as u64).ok_or(overflow(Slot::PartLse))?;
        Ok([
            (Slot::PartOut, part_out),
            (Slot::PartLse, part_lse),
            (Slot::Out, self.out_bytes().next_multiple_of(4)),
            (Slot::Lse, 4 * self.rows as u64),
            (Slot::Sinks, self.sinks.map_or(0, |[heads, _]| 4 * heads as u64)),
        ])
    }
}

/// The module of a merge.
#[doc(hidden)]
pub fn merge_module(problem: &MergeProblem) -> PlannedModule {
    PlannedModule::new(&problem.pass(), false)
}

impl Context {
    /// Checks a merge and builds its pipeline. All parts must fit into one binding.
    pub fn plan_merge(&self, problem: &MergeProblem) -> Result<MergePlan, Error> {
        faults::caught(self.device(), "merge plan", || self.new_merge_plan(problem))
    }

    fn new_merge_plan(&self, problem: &MergeProblem) -> Result<MergePlan, Error> {
        if !(1..=MAX_HEAD_DIM).contains(&problem.head_dim_v) {
            return Err(Error::HeadDim { argument: "head_dim_v", found: problem.head_dim_v });
        }
        if let Some([heads, queries]) = problem.sinks
            && (heads == 0 || queries == 0 || !(problem.rows as u64).is_multiple_of(heads as u64 * queries as u64))
        {
            return Err(Error::MergeRows { rows: problem.rows, heads, queries });
        }
        let limits = self.limits();
        // The shader counts elements in u32.
        let limit = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(u32::MAX as u64);
        let ranges = problem.bytes()?;
        if let Some(&(slot, bytes)) = ranges.iter().find(|(_, bytes)| *bytes > limit) {
            return Err(Error::BindingTooLarge { argument: slot.name(), bytes, limit });
        }
        faults::alive(self.device())?;
        let pass = problem.pass();
        let part = Part { batch: 0..1, heads: 0..1, rows: 0..problem.rows };
        check_limits(Kernel::Decode, std::slice::from_ref(&pass), limits)?;
        let workgroups = (pass.workgroups)(&part);
        let most = limits.max_compute_workgroups_per_dimension as u64;
        if let Some(&needed) = workgroups.iter().find(|&&n| n > most) {
            let limit = "max_compute_workgroups_per_dimension";
            return Err(Error::DeviceLimit { kernel: Kernel::Decode, limit, needed, found: most });
        }
        let mut plan = MergePlan {
            device: self.device().clone(),
            problem: *problem,
            offset_alignment: limits.min_storage_buffer_offset_alignment as u64,
            work: None,
        };
        if problem.rows > 0 {
            // Rows are numbered through all batch entries and heads.
            let [heads, queries] = problem.sinks.unwrap_or([1, problem.rows]);
            let numbered = |element: u32| TensorUniform {
                base: 0,
                batch: heads.wrapping_mul(queries).wrapping_mul(element),
                head: queries.wrapping_mul(element),
                row: element,
            };
            let uniform = ProblemUniform {
                out: numbered(problem.head_dim_v),
                lse: numbered(1),
                row_end: queries,
                heads,
                group: 1,
                splits: problem.parts,
                split_rows: problem.rows,
                ..Default::default()
            };
            let pipeline = Arc::new(LazyPipeline::new(self.pipelines(), &pass));
            pipeline.build()?;
            let launch = Launch {
                pipeline,
                ranges: pass
                    .bindings
                    .iter()
                    .filter_map(|&(slot, _)| ranges.iter().find(|(s, _)| *s == slot))
                    .map(|&(slot, bytes)| (slot, 0, bytes))
                    .collect(),
                uniform_offset: 0,
                workgroups: workgroups.map(|n| n as u32),
            };
            plan.work = Some((launch, uniform_buffer(self.device(), bytemuck::bytes_of(&uniform))?));
        }
        Ok(plan)
    }
}

impl MergePlan {
    /// The problem that this plan computes.
    pub fn problem(&self) -> &MergeProblem {
        &self.problem
    }

    /// Records the merge into the caller's encoder. Submits nothing and allocates no buffer; on an error nothing has
    /// been recorded.
    pub fn merge(&self, encoder: &mut wgpu::CommandEncoder, buffers: &MergeBuffers<'_>) -> Result<(), Error> {
        let given = [
            Some(&buffers.part_out),
            Some(&buffers.part_lse),
            Some(&buffers.out),
            Some(&buffers.lse),
            buffers.sinks.as_ref(),
        ];
        let needed = self.problem.bytes()?;
        let all: Vec<_> = needed
            .iter()
            .zip(given)
            .map(|(&(slot, bytes), binding)| {
                let output = matches!(slot, Slot::Out | Slot::Lse);
                let access = if output { Access::ReadWrite } else { Access::Read };
                Argument::bytes(slot, access, binding, bytes, slot != Slot::Sinks || self.problem.sinks.is_some())
            })
            .collect();
        let slots = check_buffers(&all, self.offset_alignment)?;
        let Some((launch, uniforms)) = &self.work else {
            return Ok(());
        };
        let bound = BoundPass::new(&self.device, || Ok(vec![bind_launch(&self.device, launch, uniforms, &slots)?]))?;
        bound.encode(encoder, "wgpu-flash-attention merge");
        Ok(())
    }
}
