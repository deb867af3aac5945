//! Lists of blocks that are made on the device.

use std::sync::Arc;

use wgpu::BufferBinding;

use crate::bind::{
    Argument, BoundPass, Launch, OffsetAlignments, ToBinding, ToOptionalBinding, WHOLE, bind_launch, check_buffers,
    mod_buffers,
};
use crate::context::Context;
use crate::error::Error;
use crate::faults;
use crate::kernel::{Access, Part, Pass, Slot, block_lists, check_limits};
use crate::loops;
use crate::names::Kernel;
use crate::pipelines::LazyPipeline;
use crate::problem::Problem;
use crate::recipe::PlannedModule;
use crate::schedule::uniform_buffer;
use crate::split::{Bounds, bind_part};

/// What block lists are made from on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockSource {
    /// FlexAttention's lists, i32: `kv_num_blocks` `[B|1, Hq|1, R]` and `kv_indices` `[B|1, Hq|1, R, C]`, of partial blocks; with `full` also
    /// `full_kv_num_blocks` and `full_kv_indices`, of full ones. Rows may list blocks in any order; what lies past a row's count means nothing.
    ///
    /// Nobody looks at the numbers on the host, so that they are clamped: counts to 0 to C, indices to the first and the last block. A block that
    /// is listed twice counts once, and one that is listed as partial and as full is partial.
    Lists {
        /// Whether there are lists of full blocks.
        full: bool,
    },
    /// The problem's own masks, its lengths, its boolean mask and its `mask_mod` included (but not a bias that masks): a block is listed if some
    /// score of it counts, and full if all do and it is not cut short. Lists that batch entries or heads share have a block if one of them needs
    /// it, and have it as full if it is for all. Nothing as large as the scores is kept. The passes that use the lists apply the masks as well,
    /// so their results are those without lists.
    Masks,
}

/// Makes the packed block lists of a problem on the device. Made by [`Context::plan_blocks`]; used any number of times. The lists are needed
/// anew only when what they are made from changes: [`BlockSource::Masks`] depends on lengths, the boolean mask and the buffers of mods, not on
/// q, k and v.
///
/// ```
/// use wgpu_flash_attention::{BlockBuffers, BlockLists, BlockSource, Causal, Context, Error, Problem, wgpu};
///
/// /// A problem with a window, and the lists of the blocks that it leaves.
/// fn windowed(context: &Context, problem: Problem) -> Result<(Problem, wgpu::Buffer), Error> {
///     let problem = problem.causal(Causal::BottomRight).window(Some(512), None).with_blocks(BlockLists::new());
///     let plan = context.plan_blocks(&problem, BlockSource::Masks)?;
///     let blocks = plan.create_buffer()?;
///     let mut encoder = context.device().create_command_encoder(&Default::default());
///     plan.record(&mut encoder, &BlockBuffers::new(&blocks))?;
///     context.queue().submit([encoder.finish()]);
///     Ok((problem, blocks))
/// }
///
/// /// A problem with a document mask and its lists. `document` has the number of the document of each position, u32.
/// # #[cfg(feature = "mods")]
/// fn documents(
///     context: &Context,
///     problem: Problem,
///     document: &wgpu::Buffer,
/// ) -> Result<(Problem, wgpu::Buffer), Box<dyn std::error::Error>> {
///     let text = "var<storage, read> document: array<u32>;
///         fn mask_mod(at: Position) -> bool { return document[at.i] == document[at.j]; }";
///     let problem = problem.with_mods(wgpu_flash_attention::Mods::parse(text)?);
///     // Full blocks lie inside a document: passes need not ask the mask about them.
///     let problem = problem.with_blocks(BlockLists::new().full_unmasked());
///     let plan = context.plan_blocks(&problem, BlockSource::Masks)?;
///     let blocks = plan.create_buffer()?;
///     let mut encoder = context.device().create_command_encoder(&Default::default());
///     plan.record(&mut encoder, &BlockBuffers::new(&blocks).mod_buffer("document", document))?;
///     context.queue().submit([encoder.finish()]);
///     Ok((problem, blocks)) // forward and backward passes take `document` by `mod_buffer`, too
/// }
/// ```
#[derive(Debug)]
pub struct BlockPlan {
    device: wgpu::Device,
    problem: Problem,
    source: BlockSource,
    offset_alignments: OffsetAlignments,
    work: Option<(Vec<Launch>, wgpu::Buffer)>,
}

/// The buffers of a [`BlockPlan`], each a whole buffer or a part of one. Each needs `BufferUsages::STORAGE` and an offset that is a multiple of the
/// device's `min_storage_buffer_offset_alignment`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BlockBuffers<'a> {
    /// Where the packed lists are written, [`Problem::blocks_bytes`].
    pub blocks: BufferBinding<'a>,
    /// How many partial blocks each row has, and which ones; given exactly for [`BlockSource::Lists`].
    pub lists: Option<[BufferBinding<'a>; 2]>,
    /// The same of full blocks; given exactly for lists with `full`.
    pub full: Option<[BufferBinding<'a>; 2]>,
    /// Query lengths; given exactly for [`BlockSource::Masks`] of a problem that has them.
    pub seqlens_q: Option<BufferBinding<'a>>,
    /// Key lengths, likewise.
    pub seqlens_k: Option<BufferBinding<'a>>,
    /// The boolean mask, likewise.
    pub mask: Option<BufferBinding<'a>>,
    /// Of each buffer of the problem's mods its name and where it lies; given exactly for [`BlockSource::Masks`] of a problem with a `mask_mod`.
    pub(crate) mod_buffers: Vec<(&'a str, BufferBinding<'a>)>,
}

impl<'a> BlockBuffers<'a> {
    /// Where the packed lists are written. The methods add what they are made from.
    pub fn new(blocks: impl ToBinding<'a>) -> Self {
        BlockBuffers {
            blocks: blocks.to_binding(),
            lists: None,
            full: None,
            seqlens_q: None,
            seqlens_k: None,
            mask: None,
            mod_buffers: vec![],
        }
    }

    /// `kv_num_blocks` and `kv_indices`.
    pub fn lists<B: ToBinding<'a>>(mut self, lists: [B; 2]) -> Self {
        self.lists = Some(lists.map(B::to_binding));
        self
    }

    /// `full_kv_num_blocks` and `full_kv_indices`.
    pub fn full<B: ToBinding<'a>>(mut self, full: [B; 2]) -> Self {
        self.full = Some(full.map(B::to_binding));
        self
    }

    /// Query lengths.
    pub fn seqlens_q(mut self, seqlens_q: impl ToOptionalBinding<'a>) -> Self {
        self.seqlens_q = seqlens_q.to_optional_binding();
        self
    }

    /// Key lengths.
    pub fn seqlens_k(mut self, seqlens_k: impl ToOptionalBinding<'a>) -> Self {
        self.seqlens_k = seqlens_k.to_optional_binding();
        self
    }

    /// A buffer of the problem's [`Mods`](crate::Mods), by its name in their text: for [`BlockSource::Masks`] of a problem
    /// with a `mask_mod` each of them, else none.
    #[cfg(feature = "mods")]
    pub fn mod_buffer(mut self, name: &'a str, buffer: impl ToBinding<'a>) -> Self {
        self.mod_buffers.push((name, buffer.to_binding()));
        self
    }

    /// The boolean mask.
    pub fn mask(mut self, mask: impl ToOptionalBinding<'a>) -> Self {
        self.mask = mask.to_optional_binding();
        self
    }
}

/// The passes that make the lists of a problem.
fn passes(problem: &Problem, source: BlockSource) -> Result<[Pass; 2], Error> {
    problem.validate()?;
    let (Some(lists), Some(packing)) = (problem.blocks, problem.packing()) else {
        return Err(Error::BlocksMissing);
    };
    match (source, lists.columns) {
        (BlockSource::Masks, Some(columns)) => Err(Error::BlockColumns(columns)),
        (BlockSource::Masks, None) => Ok(block_lists::of_mask(problem, packing)),
        (BlockSource::Lists { full }, _) => Ok(block_lists::of_lists(packing, full)),
    }
}

/// The modules that a [`BlockPlan`] compiles, without a device: for tests.
#[doc(hidden)]
pub fn block_modules(problem: &Problem, source: BlockSource) -> Result<Vec<PlannedModule>, Error> {
    Ok(passes(problem, source)?.iter().map(|pass| PlannedModule::new(pass, false)).collect())
}

impl Context {
    /// Plans how the packed block lists of a problem are made on the device.
    ///
    /// Errors, besides those of [`Problem::validate`]:
    ///
    /// - [`Error::BlocksMissing`]: the problem has no block lists.
    /// - [`Error::BlockColumns`]: lists with a bound on the blocks of a row are to be made from masks.
    /// - [`Error::BindingTooLarge`]: the lists, one of the arrays that they are made from, or the boolean mask exceeds the device's limits on a
    ///   binding.
    /// - [`Error::StorageBuffers`], [`Error::DeviceLimit`]: the device allows fewer storage buffers, or fewer workgroups and the like, than it
    ///   takes; their `kernel` is [`Kernel::Tile`].
    /// - [`Error::DriverLoops`]: the driver ends loops before the lists are made; likewise.
    /// - What the driver says of a module, of memory, or of a lost device.
    pub fn plan_blocks(&self, problem: &Problem, source: BlockSource) -> Result<BlockPlan, Error> {
        faults::caught(self.device(), "block plan", || self.new_block_plan(problem, source))
    }

    fn new_block_plan(&self, problem: &Problem, source: BlockSource) -> Result<BlockPlan, Error> {
        let passes = passes(problem, source)?;
        let limits = self.limits();
        let mut plan = BlockPlan {
            device: self.device().clone(),
            problem: problem.clone(),
            source,
            offset_alignments: OffsetAlignments::of(limits),
            work: None,
        };
        // Shaders count words in u32.
        let limit = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(u32::MAX as u64);
        let ranges = plan.bytes();
        if let Some(&(slot, bytes)) = ranges.iter().find(|(_, bytes)| *bytes > limit) {
            return Err(Error::BindingTooLarge { argument: slot.name(), bytes, limit });
        }
        faults::alive(self.device())?;
        check_limits(Kernel::Tile, &passes, limits)?;
        let s = &problem.shape;
        let part = Part { batch: 0..s.batch, heads: 0..s.heads_q, rows: 0..s.seqlen_q };
        let (of_problem, uniform) = bind_part(problem, &part, &Bounds::of(limits), false);
        let mask = of_problem.iter().find(|&&(slot, ..)| slot == Slot::Mask && source == BlockSource::Masks);
        if let Some(&(slot, _, bytes)) = mask.filter(|(.., bytes)| *bytes > limit) {
            return Err(Error::BindingTooLarge { argument: slot.name(), bytes, limit });
        }
        loops::check(
            self.facts().loop_iterations,
            Kernel::Tile,
            loops::of_blocks(problem, source == BlockSource::Masks),
        )?;
        let mut launches = vec![];
        for pass in &passes {
            let workgroups = (pass.workgroups)(&part);
            let found = limits.max_compute_workgroups_per_dimension as u64;
            if let Some(&needed) = workgroups.iter().find(|&&n| n > found) {
                let limit = "max_compute_workgroups_per_dimension";
                return Err(Error::DeviceLimit { kernel: Kernel::Tile, limit, needed, found });
            }
            if workgroups.contains(&0) {
                continue;
            }
            let pipeline = Arc::new(LazyPipeline::new(self.pipelines(), pass));
            pipeline.build()?;
            // The boolean mask lies where the problem's layout says, all else from the first byte on.
            let range = |slot: Slot| match of_problem.iter().find(|&&(s, ..)| s == slot && slot == Slot::Mask) {
                Some(&range) => range,
                None if slot.is_whole() => (slot, 0, WHOLE),
                None => (slot, 0, ranges.iter().find(|(s, _)| *s == slot).map_or(0, |&(_, bytes)| bytes)),
            };
            launches.push(Launch {
                pipeline,
                ranges: pass.bindings.iter().map(|&(slot, _)| range(slot)).collect(),
                uniform_offset: 0,
                workgroups: workgroups.map(|n| n as u32),
            });
        }
        if !launches.is_empty() {
            plan.work = Some((launches, uniform_buffer(self.device(), bytemuck::bytes_of(&uniform))?));
        }
        Ok(plan)
    }
}

impl BlockPlan {
    /// The problem that the lists are for.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// A buffer for the lists, which may also be downloaded: [`Problem::blocks_bytes`]. Out of memory, and on a device that is lost, it is an error.
    pub fn create_buffer(&self) -> Result<wgpu::Buffer, Error> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        faults::buffer(&self.device, "block lists", self.problem.blocks_bytes(), usage)
    }

    /// What each buffer needs.
    fn bytes(&self) -> Vec<(Slot, u64)> {
        let (rows, columns) = self.problem.packing().map_or((0, 0), |packing| (packing.row_count(), packing.columns));
        let rows = rows.saturating_mul(4);
        let lists = rows.saturating_mul(columns.into());
        let lengths = 4 * self.problem.shape.batch as u64;
        vec![
            (Slot::Blocks, self.problem.blocks_bytes()),
            (Slot::KvNumBlocks, rows),
            (Slot::KvIndices, lists),
            (Slot::FullKvNumBlocks, rows),
            (Slot::FullKvIndices, lists),
            (Slot::SeqlensQ, lengths),
            (Slot::SeqlensK, lengths),
        ]
    }

    /// Records what makes the lists into the caller's encoder. Submits nothing and allocates no buffer. On an error nothing has been recorded.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder, buffers: &BlockBuffers<'_>) -> Result<(), Error> {
        let (has_lists, has_full) = match self.source {
            BlockSource::Lists { full } => (true, full),
            BlockSource::Masks => (false, false),
        };
        let (lists, full) = (buffers.lists.as_ref(), buffers.full.as_ref());
        let given = [
            (Some(&buffers.blocks), true),
            (lists.map(|[counts, _]| counts), has_lists),
            (lists.map(|[_, indices]| indices), has_lists),
            (full.map(|[counts, _]| counts), has_full),
            (full.map(|[_, indices]| indices), has_full),
            (buffers.seqlens_q.as_ref(), !has_lists && self.problem.seqlens_q),
            (buffers.seqlens_k.as_ref(), !has_lists && self.problem.seqlens_k),
        ];
        let mut all: Vec<_> = self
            .bytes()
            .into_iter()
            .zip(given)
            .map(|((slot, bytes), (given, has))| {
                let access = if slot == Slot::Blocks { Access::ReadWrite } else { Access::Read };
                Argument::bytes(slot, access, given, if has { bytes } else { 0 }, has)
            })
            .collect();
        let scores = self.problem.mask_scores().filter(|_| !has_lists);
        all.push(Argument::scores(Slot::Mask, Access::Read, buffers.mask.as_ref(), &self.problem, scores));
        let mods = self.problem.mods.as_ref().filter(|_| !has_lists && self.problem.has_mask_mod());
        all.extend(mod_buffers(mods, &buffers.mod_buffers, &self.device.limits())?);
        let slots = check_buffers(&all, self.offset_alignments)?;
        let Some((launches, uniforms)) = &self.work else {
            return Ok(());
        };
        let bind = || launches.iter().map(|launch| bind_launch(&self.device, launch, uniforms, &slots)).collect();
        BoundPass::new(&self.device, bind)?.encode(encoder, "wgpu-flash-attention block lists");
        Ok(())
    }
}
