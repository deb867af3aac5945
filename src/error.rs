//! What can be wrong with an argument or a device, in words that say what would be right.

use crate::names::{ElementType, Kernel, MAX_SEQLEN};

/// What was wrong with an argument, and what would be right.
///
/// Every check runs before anything is recorded: after an error nothing was written to any buffer and
/// the encoder is as it was.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A head dimension outside what the kernels hold on chip.
    #[error("{argument} is {found}; it must be from 1 to 256")]
    HeadDim {
        /// `head_dim` or `head_dim_v`.
        argument: &'static str,
        /// The value given.
        found: u32,
    },
    /// The key-value heads cannot be shared evenly by the query heads.
    #[error(
        "heads_q is {heads_q} and heads_kv is {heads_kv}; both must be at least 1 and heads_kv must divide heads_q"
    )]
    Heads {
        /// Query heads given.
        heads_q: u32,
        /// Key-value heads given.
        heads_kv: u32,
    },
    /// A sequence longer than positions can be computed for.
    #[error("{argument} is {found}; it must be at most {MAX_SEQLEN}")]
    Seqlen {
        /// `seqlen_q` or `seqlen_k`.
        argument: &'static str,
        /// The value given.
        found: u32,
    },
    /// The size of a block of the problem's block lists is out of range.
    #[error("{argument} is {found}; it must be from 1 to {MAX_SEQLEN}")]
    BlockSize {
        /// `blocks.queries` or `blocks.keys`.
        argument: &'static str,
        /// What the problem has.
        found: u32,
    },
    /// Blocks do not divide into the tiles of a kernel.
    #[error(
        "blocks of {} queries by {} keys do not divide into the {kernel} kernel's tiles of {} by {}{}; take blocks that are multiples of \
         the tile, as those of 128 by 128 are, or the naive kernel, which takes any",
        block[0], block[1], tile[0], tile[1], if *backward { " in the backward pass" } else { "" }
    )]
    BlockTile {
        /// The kernel.
        kernel: Kernel,
        /// Whether it is the tile of the backward pass.
        backward: bool,
        /// Queries and keys of a block.
        block: [u32; 2],
        /// Queries and keys of the kernel's smallest tile on this device, or of that which was asked for.
        tile: [u32; 2],
    },
    /// Lists on the host of more blocks than they are made for.
    #[error(
        "the block lists would tell of {found} blocks, listed or not; lists on the host tell of {most} at most: take larger blocks"
    )]
    TooManyBlocks {
        /// The blocks of all lists.
        found: u64,
        /// The most.
        most: u64,
    },
    /// Lists of blocks are to be made for a problem that has none.
    #[error("the problem has no block lists; give it some by Problem::with_blocks")]
    BlocksMissing,
    /// An array of blocks has not as many elements as its shape says.
    #[error(
        "{argument} has {found} elements; {needed} are needed, by the shape that BlockMask and Problem::block_counts tell"
    )]
    BlockArray {
        /// Its name.
        argument: &'static str,
        /// The elements of its shape.
        needed: u64,
        /// The elements given.
        found: usize,
    },
    /// A row of blocks lists too many, or fewer than none.
    #[error("{argument} has {found} blocks in row {row}; a row may have from 0 to {most} (BlockLists::columns)")]
    BlockCount {
        /// The array's name.
        argument: &'static str,
        /// The row of blocks, counted over all batch entries and heads that have lists.
        row: usize,
        /// What it lists.
        found: i64,
        /// The most that it may list.
        most: u32,
    },
    /// A row of blocks lists one that is not there, or lists one twice.
    #[error(
        "{argument} has block {found} in row {row}{}",
        if *duplicate { ", which lists it already; list each block once".into() }
        else if *blocks == 0 { "; there are no blocks of keys".into() } else { format!("; blocks are 0 to {}", blocks - 1) }
    )]
    BlockIndex {
        /// The array's name.
        argument: &'static str,
        /// The row of blocks, counted over all batch entries and heads that have lists.
        row: usize,
        /// The number listed.
        found: i32,
        /// How many blocks of keys there are.
        blocks: u32,
        /// Whether the row lists it already, in this array or in the other one.
        duplicate: bool,
    },
    /// Lists with a bound on the blocks of a row are to be made from masks.
    #[error("blocks.columns is {0}, but how many blocks of a row masks leave is not known beforehand; leave it None")]
    BlockColumns(u32),
    /// The scale is NaN, or beyond ±1e30.
    #[error("scale is {0:?}; it must be from -1e30 to 1e30")]
    Scale(f32),
    /// The softcap is NaN, or not from 1e-30 to 1e30.
    #[error("softcap is {0:?}; it must be from 1e-30 to 1e30 (leave it out for scores without a cap)")]
    Softcap(f32),
    /// The probability of dropout is NaN, below 0, or 1 and above.
    #[error("dropout is {0:?}; it must be a probability from 0 to below 1 (0 is no dropout)")]
    Dropout(f32),
    /// Gradients need lse, from which the backward pass recomputes the probabilities.
    #[error("lse is not set and gradients are; set both, as Problem::with_gradients does")]
    GradientsWithoutLse,
    /// A gradient of what the problem does not have.
    #[error(
        "the gradient of {argument} is asked for, but the problem has no {argument}; leave it out or give the problem {argument}"
    )]
    GradientOfNothing {
        /// `bias`, `sinks` or `alibi_slopes`.
        argument: &'static str,
    },
    /// A contiguous bias, or mask, of other sizes than the problem's.
    #[error(
        "{argument} is of sizes {found:?}; each must be 1 or that of [batch, heads_q, seqlen_q, seqlen_k], which is {needed:?} (ScoreLayout::strided \
         takes strides, whatever the sizes are)"
    )]
    ScoreSizes {
        /// `bias` or `mask`.
        argument: &'static str,
        /// Its sizes.
        found: [u32; 4],
        /// Those of the problem.
        needed: [u32; 4],
    },
    /// A bias in a type that kernels do not read.
    #[error("the bias (attn_mask) is {found}; it must be f32 or the type of the problem, {problem}")]
    BiasType {
        /// Its type.
        found: ElementType,
        /// That of the problem.
        problem: ElementType,
    },
    /// A backward pass of a plan that was made without one.
    #[error("gradients is None in the plan's problem; plan one made by Problem::with_gradients")]
    NoGradients,
    /// Two elements of the output would lie in the same place.
    #[error(
        "the layout of {argument} puts two elements in one place; each stride must be at least as large as \
         everything that the smaller strides span"
    )]
    OutputOverlap {
        /// The output.
        argument: &'static str,
    },
    /// The layout reaches past 2^64 bytes.
    #[error("the layout of {argument} reaches past 2^64 bytes; its strides must be smaller")]
    LayoutOverflow {
        /// The tensor.
        argument: &'static str,
    },
    /// What cannot be split further is more than the device can bind at once: the keys or the values of one head, the smallest
    /// tile of rows, the scores of a head, or a merge. Or there are more parts than one buffer can tell kernels of (`uniforms`).
    #[error(
        "{argument} needs {bytes} bytes in one binding or buffer, which cannot be split further; the device allows {limit} \
         (max_storage_buffer_binding_size, max_buffer_size)"
    )]
    BindingTooLarge {
        /// The tensor, workspace or `uniforms`.
        argument: &'static str,
        /// Bytes that it spans, of `uniforms` those of the parts that were counted.
        bytes: u64,
        /// What the device allows.
        limit: u64,
    },
    /// A merge with sinks whose rows are not those of whole heads.
    #[error(
        "rows is {rows}; with sinks it must be a multiple of the {heads} heads times {queries} queries, both at least 1"
    )]
    MergeRows {
        /// Rows given.
        rows: u32,
        /// Heads given.
        heads: u32,
        /// Queries given.
        queries: u32,
    },
    /// The device's limits would cut the problem into too many parts.
    #[error(
        "the device's limits (max_compute_workgroups_per_dimension, max_storage_buffer_binding_size) would split the problem \
         into more than {most} parts; request larger limits, or compute less at a time"
    )]
    TooManyParts {
        /// The most parts of a plan.
        most: usize,
    },
    /// The device was created with a limit below what the kernel needs.
    #[error("the device's {limit} is {found}; the {kernel} kernel needs at least {needed}")]
    DeviceLimit {
        /// The kernel.
        kernel: Kernel,
        /// The field of `wgpu::Limits`.
        limit: &'static str,
        /// What this problem needs.
        needed: u64,
        /// What the device has.
        found: u64,
    },
    /// The problem has more inputs than a kernel can bind on the device.
    #[error(
        "with {} the {kernel} kernel binds {needed} storage buffers{}, and the device allows {found} (max_storage_buffers_per_shader_stage); \
         request the adapter's limit where it is larger, or leave out one of these inputs",
        list(.inputs), if *backward { " in the backward pass" } else { "" }
    )]
    StorageBuffers {
        /// The kernel.
        kernel: Kernel,
        /// Whether it is in the backward pass.
        backward: bool,
        /// Its storage buffers.
        needed: u32,
        /// What the device allows.
        found: u32,
        /// The inputs besides q, k, v and their gradients that it binds. Buffers of mods have their names in the text.
        inputs: Vec<String>,
    },
    /// The driver ends a shader's loops before the kernel is done, as Mesa's software driver did for many years.
    #[error(
        "this driver ends the loops of a shader after {found} iterations together, and the {kernel} kernel would make {needed}; \
         take Mesa 25.0 or later, a GPU, or shorter sequences"
    )]
    DriverLoops {
        /// The kernel.
        kernel: Kernel,
        /// The iterations that it would make.
        needed: u64,
        /// Those that the driver grants.
        found: u64,
    },
    /// A number of splits that no dispatch can have.
    #[error(
        "splits: {found} were asked for; the decode kernel takes from 1 to {most} on this device, its \
         max_compute_workgroups_per_dimension"
    )]
    Splits {
        /// Those that were asked for.
        found: u32,
        /// The most that the device allows.
        most: u32,
    },
    /// A tile that does not divide into threads and vectors.
    #[error("the tile is not usable: {0}")]
    Tile(&'static str),
    /// A buffer that the plan needs was not given.
    #[error("{argument} is missing; this plan needs a buffer of at least {bytes} bytes for it")]
    BufferMissing {
        /// The tensor or workspace.
        argument: &'static str,
        /// Bytes needed.
        bytes: u64,
    },
    /// A buffer was given that the problem does not have.
    #[error("{argument} was given, but the problem was built without it; leave it None or build the problem with it")]
    BufferUnexpected {
        /// The tensor.
        argument: &'static str,
    },
    /// A buffer is shorter than its tensor.
    #[error("{argument} has {found} bytes from its offset; this plan needs {needed}")]
    BufferTooSmall {
        /// The tensor or workspace.
        argument: &'static str,
        /// Bytes that the layout spans, rounded up to 4.
        needed: u64,
        /// Bytes of the binding.
        found: u64,
    },
    /// A buffer lacks a usage.
    #[error("the buffer of {argument} was created with {}; it needs {}", usages(*found), usages(*needed))]
    BufferUsage {
        /// The tensor, workspace, or `download`.
        argument: &'static str,
        /// The usages it has.
        found: wgpu::BufferUsages,
        /// The usage it needs.
        needed: wgpu::BufferUsages,
    },
    /// Bytes to be downloaded that a copy cannot reach.
    #[error(
        "download of {bytes} bytes at {offset} of a buffer of {size}; the offset must be a multiple of 4, and offset and bytes together, rounded up \
         to a multiple of 4, at most {size}"
    )]
    DownloadRange {
        /// The first byte asked for.
        offset: u64,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes of the buffer.
        size: u64,
    },
    /// A buffer offset that the device cannot bind at.
    #[error(
        "{argument} is bound at byte {offset}; the device binds at multiples of {alignment} \
         (min_storage_buffer_offset_alignment). Put the rest of the offset into the problem's Layout, in elements"
    )]
    BufferOffset {
        /// The tensor or workspace.
        argument: &'static str,
        /// Bytes given.
        offset: u64,
        /// Bytes required to divide it.
        alignment: u64,
    },
    /// The offset of a buffer that is bound as a uniform, which the device cannot bind at.
    #[error(
        "{argument} is bound at byte {offset}; the device binds uniforms at multiples of {alignment} (min_uniform_buffer_offset_alignment)"
    )]
    UniformOffset {
        /// The argument: `rng_state`.
        argument: &'static str,
        /// Bytes given.
        offset: u64,
        /// Bytes required to divide it.
        alignment: u64,
    },
    /// An output lies where another argument does.
    #[error(
        "{output} and {other} overlap, or are interleaved in too complex a way to show that they do not; they may share a buffer, \
         but {output} needs bytes of its own there, in 4-byte words without an input"
    )]
    BufferAliased {
        /// The output.
        output: &'static str,
        /// What it collides with.
        other: &'static str,
    },
    /// Something is wrong with a buffer of the problem's mods.
    #[error("the mods' buffer {name} {fault}")]
    ModBuffer {
        /// Its name in the mods' text.
        name: String,
        /// What is wrong.
        fault: ModBufferFault,
    },
    /// Lengths or block lists in a buffer with an output, in a browser.
    #[error("{argument} shares a buffer with an output, which browsers do not take; give it a buffer of its own")]
    LengthsShared {
        /// `seqlens_q`, `seqlens_k` or `blocks`.
        argument: &'static str,
    },
    /// What is bound as a uniform, in a buffer that the pass writes to.
    #[error(
        "{argument} is in the buffer of {output}; it is bound as a uniform, which must not lie in a buffer with an output"
    )]
    UniformShared {
        /// The argument: `rng_state`.
        argument: &'static str,
        /// The output.
        output: &'static str,
    },
    /// `attn_mask` and `is_causal` together, which PyTorch refuses too.
    #[error("attn_mask and is_causal are both set; make the causal mask a part of attn_mask, or leave one of them out")]
    CausalWithMask,
    /// A host slice whose length is not the product of its shape.
    #[error("{argument} has {found} elements; its shape {shape:?} needs {needed}")]
    SliceLength {
        /// The argument.
        argument: &'static str,
        /// The shape given.
        shape: [usize; 4],
        /// Elements needed.
        needed: usize,
        /// Elements given.
        found: usize,
    },
    /// Shapes of host tensors that do not go together.
    #[error("{argument} has shape {found:?}; {expected}")]
    HostShape {
        /// The argument.
        argument: &'static str,
        /// The shape given.
        found: [usize; 4],
        /// What would be right.
        expected: &'static str,
    },
    /// The kernel cannot compute this problem.
    #[error("the {kernel} kernel cannot compute this problem, in {element_type}: {why}")]
    Unsupported {
        /// The kernel asked for.
        kernel: Kernel,
        /// The problem's type.
        element_type: ElementType,
        /// The reason.
        why: &'static str,
    },
    /// An option for a kernel that the plan does not take, so that it would change nothing.
    #[error(
        "PlanOptions::{option} is for the {needs} kernel, and {}; {}",
        of_plan(*taken),
        remedy(option, *needs, *taken, *backward)
    )]
    OptionUnused {
        /// The field of [`PlanOptions`](crate::PlanOptions).
        option: &'static str,
        /// The kernel that the option is for.
        needs: Kernel,
        /// Whether it is for the backward pass.
        backward: bool,
        /// The kernel that the plan takes there, and why; `None` of the backward pass of a problem without gradients.
        taken: Option<(Kernel, &'static str)>,
    },
    /// An option for problems of another element type, so that it would change nothing.
    #[error("PlanOptions::{option} is for problems in {needs}, and this one is in {found}; leave it out")]
    OptionElementType {
        /// The field of [`PlanOptions`](crate::PlanOptions).
        option: &'static str,
        /// The element type that it is for.
        needs: ElementType,
        /// The problem's.
        found: ElementType,
    },
    /// Two options of which only one can be followed.
    #[error("PlanOptions::{option} and PlanOptions::{other} exclude each other; leave one of them out")]
    OptionsExclude {
        /// A field of [`PlanOptions`](crate::PlanOptions).
        option: &'static str,
        /// Another one.
        other: &'static str,
    },
    /// The adapter, or a device of it, has no cooperative matrices that the kernels can use.
    #[error(
        "{adapter}: {why}. Kernels on cooperative matrices were asked for \
         (HeadlessOptions::cooperative_matrices); all others run without"
    )]
    Matrices {
        /// The adapter's name.
        adapter: String,
        /// What is missing.
        why: NoMatrices,
    },
    /// No adapter, or none that could make a device.
    #[error("no usable adapter: {0}")]
    Adapter(String),
    /// The device was lost, its driver refused something, or wgpu did: see
    /// [the crate's documentation](crate#when-the-device-fails).
    #[error("the device failed: {0}")]
    Device(String),
    /// The device has not enough memory left.
    #[error("the device has no memory left for the {what}; free some of its buffers, or compute less at a time")]
    OutOfMemory {
        /// What was to be made.
        what: &'static str,
    },
}

/// What is wrong with a buffer of the problem's mods.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ModBufferFault {
    /// It was not given.
    #[error("is missing; give it with mod_buffer of the pass' buffers")]
    Missing,
    /// The text declares no such buffer.
    #[error("was given, but the problem's mods declare {}", declared(.known))]
    Unknown {
        /// Those that it declares.
        known: Vec<String>,
    },
    /// It was given twice.
    #[error("was given twice; give it once")]
    Twice,
    /// It has no element.
    #[error("has {found} bytes from its offset; it needs at least 4, one element")]
    TooSmall {
        /// Bytes of the binding.
        found: u64,
    },
    /// More is bound than the device binds.
    #[error("has {found} bytes from its offset; the device binds at most {limit} (max_storage_buffer_binding_size)")]
    TooLarge {
        /// Bytes of the binding.
        found: u64,
        /// What the device allows.
        limit: u64,
    },
    /// It lacks a usage.
    #[error("was created with {}; it needs BufferUsages::STORAGE", usages(*found))]
    Usage {
        /// The usages it has.
        found: wgpu::BufferUsages,
    },
    /// It begins where the device cannot bind.
    #[error(
        "is bound at byte {offset}; the device binds at multiples of {alignment} (min_storage_buffer_offset_alignment)"
    )]
    Offset {
        /// Bytes given.
        offset: u64,
        /// Bytes required to divide it.
        alignment: u64,
    },
}

fn declared(known: &[String]) -> String {
    if known.is_empty() { "no buffer".into() } else { known.join(", ") }
}

/// Why kernels cannot use a device's cooperative matrices.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NoMatrices {
    /// The device was created without features that are needed.
    #[error("the device was created without {}; request it where the adapter has it", features(*.0))]
    Features(wgpu::Features),
    /// The adapter does not have features that are needed.
    #[error("the adapter has no {}; its driver may be too old, or the hardware has none", features(*.0))]
    AdapterFeatures(wgpu::Features),
    /// The adapter has no square matrices of a size that WGSL can name, f16 with f32 sums.
    #[error("the adapter lists no f16 matrices of 16x16 or 8x8 with f32 sums")]
    MatrixSize,
    /// A kernel cannot know how many lanes share a matrix.
    #[error("subgroups have {min} to {max} lanes; one size is needed, from a row of a matrix to its elements")]
    SubgroupSize {
        /// Fewest lanes.
        min: u32,
        /// Most lanes.
        max: u32,
    },
    /// The adapter is not the one that the device came from.
    #[error("the adapter is another than the device's; pass the adapter that the device was requested from")]
    Adapter,
}

/// The names of features as a program writes them, those first that have a name in plain words.
pub(crate) fn features(features: wgpu::Features) -> String {
    let words = |name: &str| match name {
        "EXPERIMENTAL_COOPERATIVE_MATRIX" => "cooperative matrices",
        "SHADER_F16" => "f16 arithmetic",
        "SUBGROUP" => "subgroup operations",
        "PASSTHROUGH_SHADERS" => "shaders in SPIR-V",
        _ => "a feature",
    };
    let names = features.iter_names().map(|(name, _)| format!("{} (Features::{name})", words(name)));
    names.collect::<Vec<_>>().join(", ")
}

/// Names in a row, as one says them.
fn list(names: &[impl AsRef<str>]) -> String {
    match names {
        [] => "these inputs".into(),
        [one] => one.as_ref().to_string(),
        [first @ .., last] => {
            let first: Vec<_> = first.iter().map(AsRef::as_ref).collect();
            format!("{} and {}", first.join(", "), last.as_ref())
        }
    }
}

/// What a plan takes in the place of a kernel that an option is for.
fn of_plan(taken: Option<(Kernel, &'static str)>) -> String {
    match taken {
        Some((kernel, why)) => format!("this plan takes the {kernel} kernel ({why})"),
        None => "the problem has no gradients".into(),
    }
}

/// What to do about an option for a kernel that is not taken.
fn remedy(option: &str, needs: Kernel, taken: Option<(Kernel, &'static str)>, backward: bool) -> String {
    match (taken, backward) {
        (None, _) => format!("leave {option} out, or plan a problem made by Problem::with_gradients"),
        (Some(_), false) => format!("leave {option} out, or ask for the {needs} kernel by PlanOptions::kernel"),
        (Some(_), true) => format!("leave {option} out, or ask for the {needs} kernel by PlanOptions::backward"),
    }
}

/// The names of usages as a program writes them.
fn usages(usages: wgpu::BufferUsages) -> String {
    let names: Vec<_> = usages.iter_names().map(|(name, _)| format!("BufferUsages::{name}")).collect();
    if names.is_empty() { "no usage".into() } else { names.join(" | ") }
}
