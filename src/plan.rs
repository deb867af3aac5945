//! A problem on a device: which kernel, which launches, how much workspace, and why.

use std::ops::Range;
use std::sync::Arc;

use crate::context::{Context, LazyPipeline};
use crate::forward::{Step, bind_launch};
use crate::kernel::uniform::{ProblemUniform, TensorUniform};
use crate::kernel::{self, CoopForm, Kernel, Pass, Rounds, Slot, forward_coop};
use crate::problem::{Layout, Tensor};
use crate::tune::{self, BackwardTile, CoopBackwardTile, CoopTile, DecodeTile, FusedTile, Tile};
use crate::{ElementType, Error, Problem, faults, loops};

/// Choices that [`Context::plan`] makes by itself and [`Context::plan_with`] takes. A choice for a kernel that the plan does not take
/// changes nothing: [`Plan::kernel`] says which it takes. Those of tiles name types that may change in
/// any release (see [the crate's documentation](crate#what-may-change)).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct PlanOptions {
    /// The kernel; `None` lets the plan choose.
    pub kernel: Option<Kernel>,
    /// The kernel of the backward pass; `None` lets the plan choose.
    pub backward: Option<Kernel>,
    /// The form of the coop kernel, forward and backward; `None` takes the faster of those that the device allows.
    pub coop_form: Option<CoopForm>,
    /// Into how many splits the decode kernel cuts the keys; `None` takes `tune::decode_splits`.
    pub splits: Option<u32>,
    /// The tile of the tile kernel; `None` takes `tune::tile`.
    #[doc(hidden)]
    pub tile: Option<Tile>,
    /// The tile of the coop kernel; `None` takes `tune::coop_tile`, or `tune::coop_scaled_tile` for f32 and bf16.
    #[doc(hidden)]
    pub coop_tile: Option<CoopTile>,
    /// The tile of the decode kernel; `None` takes `tune::decode_tile`.
    #[doc(hidden)]
    pub decode_tile: Option<DecodeTile>,
    /// The tile of the backward pass' tile kernels, of which each computes the scores; `None` takes `tune::backward_tiles`
    /// unless there is a `fused_tile`.
    #[doc(hidden)]
    pub backward_tile: Option<BackwardTile>,
    /// The tile of the backward pass' tile kernel that computes all gradients at once, in f32, whatever `backward_tile` is; `None` takes
    /// `tune::fused_tile`, or the other kernels where there is a `backward_tile`.
    #[doc(hidden)]
    pub fused_tile: Option<FusedTile>,
    /// The tiles of the backward pass' coop kernels, of the gradients of keys and values and of queries; `None` takes
    /// `tune::coop_backward_tiles`, or `tune::coop_scaled_backward_tiles` for f32 and bf16.
    #[doc(hidden)]
    pub coop_backward_tiles: Option<[CoopBackwardTile; 2]>,
}

/// Each method sets the field of its name; `None` leaves the choice to the plan.
impl PlanOptions {
    /// The kernel of the forward pass.
    pub fn kernel(mut self, kernel: impl Into<Option<Kernel>>) -> Self {
        self.kernel = kernel.into();
        self
    }

    /// The kernel of the backward pass.
    pub fn backward(mut self, kernel: impl Into<Option<Kernel>>) -> Self {
        self.backward = kernel.into();
        self
    }

    /// The form of the coop kernel, forward and backward.
    pub fn coop_form(mut self, form: impl Into<Option<CoopForm>>) -> Self {
        self.coop_form = form.into();
        self
    }

    /// The splits of the decode kernel.
    pub fn splits(mut self, splits: impl Into<Option<u32>>) -> Self {
        self.splits = splits.into();
        self
    }

    #[doc(hidden)]
    pub fn tile(mut self, tile: impl Into<Option<Tile>>) -> Self {
        self.tile = tile.into();
        self
    }

    #[doc(hidden)]
    pub fn coop_tile(mut self, tile: impl Into<Option<CoopTile>>) -> Self {
        self.coop_tile = tile.into();
        self
    }

    #[doc(hidden)]
    pub fn decode_tile(mut self, tile: impl Into<Option<DecodeTile>>) -> Self {
        self.decode_tile = tile.into();
        self
    }

    #[doc(hidden)]
    pub fn backward_tile(mut self, tile: impl Into<Option<BackwardTile>>) -> Self {
        self.backward_tile = tile.into();
        self
    }

    #[doc(hidden)]
    pub fn fused_tile(mut self, tile: impl Into<Option<FusedTile>>) -> Self {
        self.fused_tile = tile.into();
        self
    }

    #[doc(hidden)]
    pub fn coop_backward_tiles(mut self, tiles: impl Into<Option<[CoopBackwardTile; 2]>>) -> Self {
        self.coop_backward_tiles = tiles.into();
        self
    }
}

/// How a problem is computed on a device. Made by [`Context::plan`]; used any number of times.
///
/// `Display` explains it in words.
pub struct Plan {
    pub(crate) device: wgpu::Device,
    pub(crate) problem: Problem,
    pub(crate) offset_alignment: u64,
    pub(crate) forward: Schedule,
    pub(crate) backward: Option<Schedule>,
    tile: Option<Tile>,
    /// Splits of the keys, for the decode kernel.
    splits: Option<u32>,
    /// Queries and keys of a tile, for kernels that have tiles.
    rows_and_keys: Option<(u32, u32)>,
}

/// What the forward or the backward pass dispatches, and why.
pub(crate) struct Schedule {
    pub launches: Vec<Launch>,
    /// The launches' uniforms; bound in place of keys and values when there are none.
    pub uniforms: Option<wgpu::Buffer>,
    pub kernel: Kernel,
    pub reason: &'static str,
    /// The coop kernel's form, and why.
    pub coop_form: Option<(CoopForm, String)>,
    /// Of blocks of rows and keys, in a kernel that is dispatched once for each.
    pub rounds: Option<Rounds>,
    pub workgroup_bytes: u32,
    pub workspace_bytes: u64,
    pub parts: usize,
}

/// What a part of a problem keeps in the workspace, and how many bytes of it.
pub(crate) type Workspaces<'a> = Box<dyn Fn(&Part) -> Vec<(Slot, u64)> + 'a>;

/// What a kernel runs for each part of a problem.
pub(crate) struct Recipe<'a> {
    pub kernel: Kernel,
    pub reason: &'static str,
    /// The coop kernel's form, and why.
    pub coop_form: Option<(CoopForm, String)>,
    pub passes: Vec<Pass>,
    pub workspaces: Workspaces<'a>,
    /// How a problem that is too large for one launch may be cut.
    pub cut: Cut,
    pub splits: u32,
}

/// Where a problem may be cut into parts, besides between batch entries.
#[derive(Clone, Copy)]
pub(crate) enum Cut {
    /// Between heads, whole groups while there are several, then between multiples of so many rows.
    HeadsAndRows(u32),
    /// Between groups of heads that share a key-value head: their gradients of k and v are one sum.
    Groups,
}

/// A box of the problem: what one launch computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub batch: Range<u32>,
    pub heads: Range<u32>,
    pub rows: Range<u32>,
}

impl Part {
    pub(crate) fn batch_count(&self) -> u64 {
        self.batch.len() as u64
    }

    pub(crate) fn head_count(&self) -> u64 {
        self.heads.len() as u64
    }

    /// Rows of all its heads and batch entries.
    pub(crate) fn rows_of_heads(&self) -> u64 {
        self.batch_count().saturating_mul(self.head_count()).saturating_mul(self.row_count())
    }

    pub(crate) fn row_count(&self) -> u64 {
        self.rows.len() as u64
    }

    /// Two halves: of the batch, else of the heads (whole groups while there are several), else of the rows.
    fn halves(&self, group: u32, cut: Cut) -> Option<(Part, Part)> {
        let middle = |range: &Range<u32>, unit: u32| {
            let units = (range.end - range.start).div_ceil(unit);
            (units > 1).then(|| range.start + units / 2 * unit)
        };
        let (mut a, mut b) = (self.clone(), self.clone());
        if let Some(m) = middle(&self.batch, 1) {
            (a.batch.end, b.batch.start) = (m, m);
            return Some((a, b));
        }
        if let Some(m) = middle(&self.heads, group) {
            (a.heads.end, b.heads.start) = (m, m);
            return Some((a, b));
        }
        let Cut::HeadsAndRows(row_unit) = cut else { return None };
        if let Some(m) = middle(&self.heads, 1) {
            (a.heads.end, b.heads.start) = (m, m);
        } else {
            let m = middle(&self.rows, row_unit)?;
            (a.rows.end, b.rows.start) = (m, m);
        }
        Some((a, b))
    }
}

/// One dispatch.
#[derive(Debug)]
pub(crate) struct Launch {
    pub pipeline: Arc<LazyPipeline>,
    /// For each binding of the pipeline: what it holds, its first byte and its size, from where the caller binds it.
    pub ranges: Vec<(Slot, u64, u64)>,
    pub uniform_offset: u64,
    pub workgroups: [u32; 3],
}

/// What a device allows, as far as splitting work is concerned.
#[derive(Clone, Copy)]
struct Bounds {
    binding: u64,
    buffer: u64,
    workgroups: u64,
    alignment: u64,
}

impl Bounds {
    fn of(limits: &wgpu::Limits) -> Self {
        Bounds {
            // Shaders count elements in u32.
            binding: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(u32::MAX as u64) / 4 * 4,
            buffer: limits.max_buffer_size,
            workgroups: limits.max_compute_workgroups_per_dimension as u64,
            alignment: limits.min_storage_buffer_offset_alignment.max(16) as u64,
        }
    }
}

/// The bytes of a tensor that a part touches, from an aligned start, and the tensor's numbers within them.
fn tensor_range(
    layout: &Layout,
    ranges: [Range<u32>; 3],
    dim: u32,
    element_bytes: u64,
    bounds: &Bounds,
) -> (u64, u64, TensorUniform) {
    let [batch, heads, rows] = &ranges;
    if ranges.iter().any(|range| range.is_empty()) {
        return (0, 0, TensorUniform::default());
    }
    let at = |b: u32, h: u32, i: u32| {
        layout.offset + b as u64 * layout.batch + h as u64 * layout.head + i as u64 * layout.row
    };
    let first = at(batch.start, heads.start, rows.start);
    let end = at(batch.end - 1, heads.end - 1, rows.end - 1) + dim as u64;
    let start = first * element_bytes / bounds.alignment * bounds.alignment;
    let size = (end * element_bytes - start).next_multiple_of(4);
    // A stride that is used is shorter than the binding; one that is not is left out, so that it cannot wrap.
    let stride = |stride: u64, range: &Range<u32>| if range.len() > 1 { stride as u32 } else { 0 };
    let uniform = TensorUniform {
        base: (first - start / element_bytes) as u32,
        batch: stride(layout.batch, batch),
        head: stride(layout.head, heads),
        row: stride(layout.row, rows),
    };
    (start, size, uniform.counted_from(ranges.map(|range| range.start)))
}

/// Bindings: what each holds, its first byte and its size.
type Ranges = Vec<(Slot, u64, u64)>;

/// The bytes up to the end of ranges that lie one after the other.
fn end_of(ranges: &[(Slot, u64, u64)]) -> u64 {
    ranges.last().map_or(0, |&(_, start, bytes)| start.saturating_add(bytes))
}

/// What a part binds, and what it is told.
fn bind_part(problem: &Problem, part: &Part, bounds: &Bounds, backward: bool) -> (Ranges, ProblemUniform) {
    let shape = &problem.shape;
    let group = shape.group();
    let heads_kv = part.heads.start / group..(part.heads.end - 1) / group + 1;
    let keys = 0..shape.seqlen_k;
    let bytes = problem.element_type.bytes();
    let mut uniform = ProblemUniform::of(problem);
    let mut ranges = vec![];
    let mut add = |slot, layout: &Layout, of_keys: bool, dim, bytes| {
        let of = match of_keys {
            true => [part.batch.clone(), heads_kv.clone(), keys.clone()],
            false => [part.batch.clone(), part.heads.clone(), part.rows.clone()],
        };
        let (start, size, tensor) = tensor_range(layout, of, dim, bytes, bounds);
        ranges.push((slot, start, size));
        tensor
    };
    uniform.query = add(Slot::Query, &problem.layout(Tensor::Query), false, shape.head_dim, bytes);
    uniform.key = add(Slot::Key, &problem.layout(Tensor::Key), true, shape.head_dim, bytes);
    uniform.value = add(Slot::Value, &problem.layout(Tensor::Value), true, shape.head_dim_v, bytes);
    uniform.out = add(Slot::Out, &problem.layout(Tensor::Out), false, shape.head_dim_v, bytes);
    let of_lse = Layout::bhnd(shape.heads_q, shape.seqlen_q, 1);
    if problem.lse {
        uniform.lse = add(Slot::Lse, &of_lse, false, 1, 4);
    }
    if let Some(gradients) = problem.gradients.filter(|_| backward) {
        uniform.grad_out = add(Slot::GradOut, &problem.layout(Tensor::GradOut), false, shape.head_dim_v, bytes);
        uniform.grad_query = add(Slot::GradQuery, &problem.layout(Tensor::GradQuery), false, shape.head_dim, bytes);
        uniform.grad_key = add(Slot::GradKey, &problem.layout(Tensor::GradKey), true, shape.head_dim, bytes);
        uniform.grad_value = add(Slot::GradValue, &problem.layout(Tensor::GradValue), true, shape.head_dim_v, bytes);
        if gradients.lse {
            add(Slot::GradLse, &of_lse, false, 1, 4);
        }
    }
    for (slot, has) in [(Slot::SeqlensQ, problem.seqlens_q), (Slot::SeqlensK, problem.seqlens_k)] {
        if has {
            ranges.push((slot, 0, shape.batch as u64 * 4));
        }
    }
    let heads = part.heads.len() as u32;
    let rows = part.rows.len() as u32;
    let of_part = TensorUniform { base: 0, batch: heads.wrapping_mul(rows), head: rows, row: 1 };
    uniform.rows = of_part.counted_from([part.batch.start, part.heads.start, part.rows.start]);
    // Behind the rows, the lengths of each batch entry, and behind these the ranges of each head.
    let lengths = if problem.has_lengths() { part.batch.len() as u32 } else { 0 };
    let rows_end = part.rows_of_heads() as u32;
    uniform.lengths_at = rows_end.wrapping_sub(part.batch.start);
    let ranges_at = if backward { rows_end.wrapping_add(lengths) } else { 0 };
    uniform.ranges_at = ranges_at.wrapping_sub(part.batch.start.wrapping_mul(heads)).wrapping_sub(part.heads.start);
    uniform.row_begin = part.rows.start;
    uniform.row_end = part.rows.end;
    uniform.batch_begin = part.batch.start;
    uniform.head_begin = part.heads.start;
    uniform.heads = part.heads.end - part.heads.start;
    (ranges, uniform)
}

impl Schedule {
    /// Nothing to dispatch yet, or at all.
    fn empty(recipe: &Recipe<'_>) -> Self {
        Schedule {
            launches: vec![],
            uniforms: None,
            kernel: recipe.kernel,
            reason: recipe.reason,
            coop_form: recipe.coop_form.clone(),
            rounds: recipe.passes.iter().find_map(|pass| pass.rounds),
            workgroup_bytes: recipe.passes.iter().map(|pass| pass.workgroup_bytes).max().unwrap_or(0),
            workspace_bytes: 0,
            parts: 0,
        }
    }

    /// Cuts the problem into parts that fit the device, and says what each launch binds.
    fn new(context: &Context, problem: &Problem, recipe: &Recipe<'_>, backward: bool) -> Result<Self, Error> {
        let limits = context.limits();
        let mut schedule = Schedule::empty(recipe);
        check_limits(recipe.kernel, &recipe.passes, limits)?;
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
        let pipelines: Vec<_> = recipe.passes.iter().map(|pass| Arc::new(LazyPipeline::new(context, pass))).collect();

        let mut uniforms = vec![0u8; of_part as usize * parts.len()];
        for (n, part) in parts.iter().enumerate() {
            let (ranges, mut uniform) = bind(part);
            uniform.splits = recipe.splits;
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
            for (pass, pipeline) in recipe.passes.iter().zip(&pipelines) {
                // split() has shown that each is at most a u32 limit.
                let workgroups = (pass.workgroups)(part).map(|n| n as u32);
                // Without keys, say, there are no gradients of keys.
                if workgroups.contains(&0) {
                    continue;
                }
                let bound = |slot| ranges.iter().copied().find(|&(s, _, _)| s == slot);
                schedule.launches.extend((0..pass.rounds.map_or(1, |all| all.count)).map(|round| Launch {
                    pipeline: pipeline.clone(),
                    ranges: pass.bindings.iter().filter_map(|&(slot, _)| bound(slot)).collect(),
                    uniform_offset: uniform_offset(round),
                    workgroups,
                }));
            }
        }
        schedule.uniforms = Some(uniform_buffer(context.device(), &uniforms)?);
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

/// The most parts that a problem is split into: each has bind groups, dispatches and pieces of the uniforms of its own, so that
/// more would take seconds and gigabytes of the host.
const MOST_PARTS: usize = 1 << 16;

/// Cuts the problem until each part fits into the device's bindings and dispatches. `ranges` are those that a part binds, and
/// `workspace` is the size of its workspace; `uniforms` bytes tell kernels of a part, of all parts in one buffer.
fn split(
    problem: &Problem,
    recipe: &Recipe<'_>,
    ranges: &dyn Fn(&Part) -> Ranges,
    workspace: &dyn Fn(&Part) -> u64,
    uniforms: u64,
    bounds: &Bounds,
) -> Result<Vec<Part>, Error> {
    let shape = &problem.shape;
    let kernel = recipe.kernel;
    let fits = |part: &Part| {
        for (slot, _, size) in ranges(part) {
            if size > bounds.binding {
                return Err(Error::BindingTooLarge { argument: slot.name(), bytes: size, limit: bounds.binding });
            }
        }
        let total = workspace(part);
        if total > bounds.buffer {
            return Err(Error::BindingTooLarge { argument: "workspace", bytes: total, limit: bounds.buffer });
        }
        let most = recipe.passes.iter().flat_map(|pass| (pass.workgroups)(part)).max().unwrap_or(0);
        if most > bounds.workgroups {
            let limit = "max_compute_workgroups_per_dimension";
            return Err(Error::DeviceLimit { kernel, limit, needed: most, found: bounds.workgroups });
        }
        Ok(())
    };
    let mut done = vec![];
    let mut open = vec![Part { batch: 0..shape.batch, heads: 0..shape.heads_q, rows: 0..shape.seqlen_q }];
    while let Some(part) = open.pop() {
        match fits(&part) {
            Ok(()) => {
                done.push(part);
                if done.len() > MOST_PARTS {
                    return Err(Error::TooManyParts { most: MOST_PARTS });
                }
                let bytes = uniforms * done.len() as u64;
                if bytes > bounds.buffer {
                    return Err(Error::BindingTooLarge { argument: "uniforms", bytes, limit: bounds.buffer });
                }
            }
            Err(error) => {
                let (a, b) = part.halves(shape.group(), recipe.cut).ok_or(error)?;
                open.extend([b, a]);
            }
        }
    }
    Ok(done)
}

/// The uniforms of the launches; bound as a tensor too where that has no elements.
pub(crate) fn uniform_buffer(device: &wgpu::Device, bytes: &[u8]) -> Result<wgpu::Buffer, Error> {
    let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::STORAGE;
    faults::mapped(device, "wgpu-flash-attention problem", usage, bytes)
}

/// Why a plan takes the naive kernel.
pub(crate) const SHORT_SEQUENCES: &str = "sequences so short that tiles would be nearly empty";

impl Plan {
    pub(crate) fn new(context: &Context, problem: &Problem, options: &PlanOptions) -> Result<Plan, Error> {
        problem.validate()?;
        faults::alive(context.device())?;
        let limits = context.limits();
        let shape = &problem.shape;
        let coop_fits = || {
            let matrices = context.matrices.as_ref()?;
            let chosen = forward_coop::choose(problem, matrices, options, limits).ok()?;
            check_limits(Kernel::Coop, &chosen.passes, limits).ok()
        };
        // What f32 and bf16 need.
        let in_registers = context.matrices.as_ref().is_some_and(|matrices| matrices.in_registers(options.coop_form));
        let tile_of = || options.tile.unwrap_or_else(|| tune::tile(shape.head_dim, shape.head_dim_v, limits));
        let granted = context.loop_iterations;
        let tile_loops = |tile| loops::check(granted, Kernel::Tile, loops::of_tile(problem, tile));
        let for_many_queries = || match (&context.matrices, problem.element_type) {
            (Some(_), ElementType::F32 | ElementType::BF16) if !in_registers => {
                (Kernel::Tile, forward_coop::HALF_WITHOUT_ACCESS)
            }
            (Some(_), ElementType::F32) if shape.head_dim.max(shape.head_dim_v) > 128 => {
                (Kernel::Tile, "registers do not hold the rows of the coop kernel in f32 at this head dim")
            }
            (Some(_), _) if coop_fits().is_none() => (Kernel::Tile, forward_coop::LIMITS_TOO_SMALL),
            (Some(_), element_type) => (Kernel::Coop, forward_coop::reason(element_type)),
            (None, _) => (Kernel::Tile, "it runs on every device and computes every problem"),
        };
        let (kernel, reason) = match options.kernel {
            Some(kernel) => (kernel, "asked for"),
            None if options.backward.is_none() && kernel::naive::suits(problem) => (Kernel::Naive, SHORT_SEQUENCES),
            None => match for_many_queries() {
                (otherwise, _) if kernel::decode::pays(problem, otherwise) => {
                    (Kernel::Decode, "few queries: they share a tile, and splits of the keys fill the device")
                }
                (Kernel::Tile, _)
                    if problem.gradients.is_none()
                        && tile_of().validate().is_ok()
                        && tile_loops(tile_of()).is_err() =>
                {
                    (Kernel::Decode, "the driver ends long loops: splits of the keys make them shorter")
                }
                (kernel, reason) => (kernel, reason),
            },
        };
        let mut tile = None;
        let mut rows_and_keys = None;
        let mut splits = None;
        let mut coop_form = None;
        let passes = match kernel {
            Kernel::Coop => {
                let unsupported = |why| Error::Unsupported { kernel, element_type: problem.element_type, why };
                let matrices = context
                    .matrices
                    .as_ref()
                    .ok_or(unsupported("the context was made without with_cooperative_matrices"))?;
                let chosen = forward_coop::choose(problem, matrices, options, limits)?;
                rows_and_keys = Some((chosen.tile.rows(matrices.format.size), chosen.tile.keys));
                coop_form = Some((chosen.form, chosen.why));
                chosen.passes
            }
            Kernel::Decode => {
                let rows = shape.group() as u64 * shape.seqlen_q as u64;
                let chosen = options.decode_tile.unwrap_or_else(|| {
                    let bytes = problem.element_type.bytes();
                    tune::decode_tile(rows, shape.head_dim, shape.head_dim_v, bytes, context.lanes, limits)
                });
                chosen.validate(shape.head_dim_v)?;
                if chosen.lanes > context.lanes.unwrap_or(0) {
                    return Err(Error::Tile(
                        "lanes must be at most those of the device's smallest subgroup, and 0 without Features::SUBGROUP",
                    ));
                }
                let workgroups = shape.batch as u64 * shape.heads_kv as u64 * rows.div_ceil(chosen.rows as u64);
                let tiles = problem.keys_in_sight().div_ceil(chosen.keys()) as u64;
                let fewest = granted.map_or(1, |granted| loops::splits(granted, problem, chosen));
                let split = options.splits.unwrap_or_else(|| tune::decode_splits(workgroups, tiles).max(fewest));
                let split = split.clamp(1, limits.max_compute_workgroups_per_dimension.max(1));
                loops::check(granted, kernel, loops::of_decode(problem, chosen, split))?;
                splits = Some(split);
                rows_and_keys = Some((chosen.rows, chosen.keys()));
                kernel::decode::passes(problem, chosen, split)
            }
            Kernel::Naive => {
                loops::check(granted, kernel, loops::of_naive(problem, false))?;
                kernel::naive::passes(problem)
            }
            Kernel::Tile => {
                let chosen = tile_of();
                chosen.validate()?;
                tile_loops(chosen)?;
                tile = Some(chosen);
                rows_and_keys = Some((chosen.rows, chosen.keys));
                vec![kernel::forward_tile::pass(problem, chosen)]
            }
        };
        // The naive kernel keeps all scores of a head at once, as people write it.
        let row_unit = match kernel {
            Kernel::Decode => 1,
            _ => rows_and_keys.map_or(shape.seqlen_q, |(rows, _)| rows),
        };
        let forward = Recipe {
            kernel,
            reason,
            coop_form,
            passes,
            workspaces: Box::new(|part: &Part| match kernel {
                Kernel::Naive => vec![(Slot::Workspace, kernel::naive::workspace_bytes(problem, part))],
                Kernel::Decode => {
                    let (out, stats) = kernel::decode::workspace_bytes(problem, part, splits.unwrap_or(1));
                    vec![(Slot::Workspace, out), (Slot::WorkspaceStats, stats)]
                }
                Kernel::Coop if problem.element_type != ElementType::F16 => {
                    vec![(Slot::WorkspaceRanges, kernel::forward_coop_scaled::workspace_bytes(part))]
                }
                Kernel::Coop | Kernel::Tile => vec![],
            }),
            cut: Cut::HeadsAndRows(row_unit),
            splits: splits.unwrap_or(0),
        };
        let backward = match problem.gradients {
            Some(_) => Some(Schedule::new(
                context,
                problem,
                &crate::backward::recipe(context, problem, options, kernel)?,
                true,
            )?),
            None => None,
        };
        let forward = Schedule::new(context, problem, &forward, false)?;
        forward.build()?;
        Ok(Plan {
            device: context.device().clone(),
            problem: problem.clone(),
            offset_alignment: limits.min_storage_buffer_offset_alignment as u64,
            forward,
            backward,
            tile,
            splits,
            rows_and_keys,
        })
    }

    /// Builds the pipelines of the backward pass, if the problem has gradients and they are not there yet. The first backward pass
    /// does so otherwise: drivers can take seconds, and those who only want the forward pass do without.
    pub fn prepare_backward(&self) -> Result<(), Error> {
        let build = || self.backward.as_ref().map_or(Ok(()), Schedule::build);
        faults::caught(&self.device, "backward plan", build)
    }

    /// The problem that this plan computes.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The kernel of the forward pass.
    pub fn kernel(&self) -> Kernel {
        self.forward.kernel
    }

    /// The kernel of the backward pass; `None` for a problem without gradients.
    pub fn backward_kernel(&self) -> Option<Kernel> {
        self.backward.as_ref().map(|schedule| schedule.kernel)
    }

    /// The tile kernel's tile; `None` for another kernel.
    #[doc(hidden)]
    pub fn tile(&self) -> Option<Tile> {
        self.tile
    }

    /// The coop kernel's form; `None` for another kernel.
    pub fn coop_form(&self) -> Option<CoopForm> {
        self.forward.coop_form.as_ref().map(|&(form, _)| form)
    }

    /// The coop kernel's form in the backward pass; `None` for another kernel, and for a problem without gradients.
    pub fn backward_coop_form(&self) -> Option<CoopForm> {
        self.backward.as_ref()?.coop_form.as_ref().map(|&(form, _)| form)
    }

    /// Bytes of the buffer that [`ForwardBuffers::workspace`](crate::ForwardBuffers::workspace) needs; 0 if none.
    pub fn workspace_bytes(&self) -> u64 {
        self.forward.workspace_bytes
    }

    /// Bytes of the buffer that [`BackwardBuffers::workspace`](crate::BackwardBuffers::workspace) needs: some for each row; more
    /// for the naive kernel. 0 for a problem without gradients.
    pub fn backward_workspace_bytes(&self) -> u64 {
        self.backward.as_ref().map_or(0, |schedule| schedule.workspace_bytes)
    }

    /// A buffer for [`ForwardBuffers::workspace`](crate::ForwardBuffers::workspace), or `None` if the plan needs none.
    /// Its contents need not be kept between calls. One serves all plans and passes that are recorded for one queue, if it is as large as the
    /// largest needs, since wgpu orders them.
    /// Out of memory, and on a device that is lost, it is an error.
    pub fn create_workspace(&self) -> Result<Option<wgpu::Buffer>, Error> {
        self.workspace_of(self.workspace_bytes())
    }

    /// The same for [`BackwardBuffers::workspace`](crate::BackwardBuffers::workspace).
    pub fn create_backward_workspace(&self) -> Result<Option<wgpu::Buffer>, Error> {
        self.workspace_of(self.backward_workspace_bytes())
    }

    fn workspace_of(&self, size: u64) -> Result<Option<wgpu::Buffer>, Error> {
        (size > 0).then(|| faults::buffer(&self.device, "workspace", size, wgpu::BufferUsages::STORAGE)).transpose()
    }

    /// Bytes that the kernel asks of device memory or its caches, which is not to be compared with
    /// [`Plan::materialized_bytes`], for what caches serve is counted here and not there: inputs each time that they are
    /// loaded, outputs each time that they are stored or, being sums in the making, loaded, and scores where they are stored.
    /// `u64::MAX` if they are more.
    pub fn bytes_moved(&self) -> u64 {
        match self.rows_and_keys {
            Some((rows, _)) if self.kernel() == Kernel::Decode => saturated(self.decode_bytes_moved(rows)),
            Some((rows, keys)) => saturated(self.tile_bytes_moved(rows, keys)),
            None => self.materialized_bytes(),
        }
    }

    /// K and V once for each tile of rows, q for each split, and the splits' results, written and read.
    fn decode_bytes_moved(&self, rows: u32) -> u128 {
        let s = &self.problem.shape;
        let splits = self.splits.unwrap_or(1) as u128;
        let tiles = (s.group() as u64 * s.seqlen_q as u64).div_ceil(rows as u64) as u128;
        let keys = s.batch as u128 * s.heads_kv as u128 * tiles * self.problem.keys_in_sight() as u128;
        let elements = keys * (s.head_dim + s.head_dim_v) as u128
            + s.rows() as u128 * (splits * s.head_dim as u128 + s.head_dim_v as u128);
        let workspace = splits * s.rows() as u128 * (16 * s.head_dim_v.div_ceil(4) as u128 + 8);
        elements * self.problem.element_type.bytes() as u128 + 2 * workspace + self.lse_bytes()
    }

    fn tile_bytes_moved(&self, rows: u32, keys: u32) -> u128 {
        let s = &self.problem.shape;
        let fold_tiles = self.tile.and_then(|tile| kernel::forward_tile::fold_tiles(&self.problem, tile.keys));
        let keeps_query = self.tile.is_none_or(|tile| kernel::forward_tile::keeps_query(&self.problem, tile));
        // Of one head: keys loaded, rows of q loaded, and rows of o loaded or stored.
        let (mut loaded_keys, mut loaded_rows, mut moved_rows) = (0u128, 0u128, 0u128);
        for row0 in (0..s.seqlen_q).step_by(rows as usize) {
            let row1 = (row0 + rows).min(s.seqlen_q);
            let first = self.problem.key_interval(row0, s.seqlen_k).0 / keys * keys;
            let last = self.problem.key_interval(row1 - 1, s.seqlen_k).1;
            let loaded = last.saturating_sub(first);
            loaded_keys += loaded as u128;
            // The coop kernels keep q. The tile kernel may load it for each tile of keys, and may add to o in memory on the way.
            let tiles = loaded.div_ceil(keys).max(1);
            let folds = fold_tiles.map_or(0, |of| (tiles - 1) / of);
            loaded_rows += (row1 - row0) as u128 * if keeps_query { 1 } else { tiles as u128 };
            moved_rows += (row1 - row0) as u128 * (1 + 2 * folds as u128);
        }
        let heads = s.batch as u128 * s.heads_q as u128;
        let of_key = (s.head_dim + s.head_dim_v) as u128;
        let elements = loaded_keys * of_key + loaded_rows * s.head_dim as u128 + moved_rows * s.head_dim_v as u128;
        heads * elements * self.problem.element_type.bytes() as u128 + self.lse_bytes()
    }

    /// Bytes that the materialised form moves to and from device memory at the least, with caches of any size: inputs and output once; the scores written, read and
    /// written by the softmax, and read by the second product. `u64::MAX` if they are more.
    pub fn materialized_bytes(&self) -> u64 {
        let s = &self.problem.shape;
        let rows = s.rows() as u128;
        let keys = s.batch as u128 * s.heads_kv as u128 * s.seqlen_k as u128;
        let elements = (rows + keys) * (s.head_dim + s.head_dim_v) as u128;
        let scores = 4 * rows * s.seqlen_k as u128;
        saturated(elements * self.problem.element_type.bytes() as u128 + self.lse_bytes() + 4 * scores)
    }

    fn lse_bytes(&self) -> u128 {
        if self.problem.lse { 4 * self.problem.shape.rows() as u128 } else { 0 }
    }
}

fn saturated(bytes: u128) -> u64 {
    bytes.try_into().unwrap_or(u64::MAX)
}

pub(crate) fn check_limits(kernel: Kernel, passes: &[Pass], limits: &wgpu::Limits) -> Result<(), Error> {
    for pass in passes {
        let storage_buffers = pass.bindings.len() as u32;
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
            ("max_uniform_buffers_per_shader_stage", 1, limits.max_uniform_buffers_per_shader_stage),
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

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = &self.problem;
        let s = &p.shape;
        writeln!(
            f,
            "{} forward: batch {}, {} query heads on {} key-value heads, {} queries, {} keys, head dim {} and {}",
            p.element_type, s.batch, s.heads_q, s.heads_kv, s.seqlen_q, s.seqlen_k, s.head_dim, s.head_dim_v
        )?;
        writeln!(f, "kernel: {} ({})", self.forward.kernel, self.forward.reason)?;
        if let Some((form, why)) = &self.forward.coop_form {
            writeln!(f, "form: {form} ({why})")?;
        }
        if let Some(t) = self.tile {
            writeln!(
                f,
                "tile: {} queries by {} keys, {} threads; Q and K by {} columns, probabilities and V by {} keys",
                t.rows,
                t.keys,
                t.threads(),
                t.chunk,
                t.value_keys
            )?;
        }
        if let (None, Some((rows, keys))) = (self.tile, self.rows_and_keys) {
            writeln!(f, "tile: {rows} queries by {keys} keys")?;
        }
        if let Some(splits) = self.splits {
            writeln!(f, "splits of the keys: {splits}")?;
        }
        let vector = if self.kernel() == Kernel::Coop && p.element_type == ElementType::F16 { 8 } else { 4 };
        let aligned = p.is_aligned(&Tensor::FORWARD, vector);
        writeln!(f, "access: {}", if aligned { "whole vectors" } else { "element by element" })?;
        writeln!(f, "{}", self.forward)?;
        let stored = if self.kernel() == Kernel::Naive { "kept in the workspace" } else { "kept in no buffer" };
        write!(
            f,
            "tensors: {}; scores: {}, {stored}",
            Bytes(p.forward_bytes()),
            Bytes(saturated(4 * s.rows() as u128 * s.seqlen_k as u128))
        )?;
        if let Some(backward) = &self.backward {
            write!(f, "\nbackward kernel: {} ({})", backward.kernel, backward.reason)?;
            if let Some((form, why)) = &backward.coop_form {
                write!(f, "\nbackward form: {form} ({why})")?;
            }
            if let Some(Rounds { block_keys, block_rows, count }) = backward.rounds {
                let blocks = format!("{block_rows} queries by {block_keys} keys");
                write!(f, "\nbackward gradients: all at once, in {count} dispatches, in blocks of {blocks}")?;
            }
            write!(f, "\n{backward}")?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "workgroup memory: {}", Bytes(self.workgroup_bytes as u64))?;
        let workgroups: u64 =
            self.launches.iter().map(|l| l.workgroups.iter().map(|&n| n as u64).product::<u64>()).sum();
        writeln!(
            f,
            "workgroups: {workgroups}, dispatches: {}, parts that the problem was split into: {}",
            self.launches.len(),
            self.parts
        )?;
        write!(f, "workspace: {}", Bytes(self.workspace_bytes))
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan")
            .field("problem", &self.problem)
            .field("kernel", &self.kernel())
            .field("tile", &self.tile)
            .field("workspace_bytes", &self.workspace_bytes())
            .field("backward_kernel", &self.backward_kernel())
            .finish_non_exhaustive()
    }
}

struct Bytes(u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let x = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} bytes", self.0),
            1024..1_048_576 => write!(f, "{:.1} KiB", x / 1024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", x / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", x / 1_073_741_824.0),
        }
    }
}
