//! Which tile a kernel uses, by head dimension and device. Pure: numbers in, numbers out.

use crate::{CoopForm, ElementType, Error, Shape};

/// The tile of the forward kernel, `shaders/forward_tile.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Queries a workgroup computes; at most as many as it has threads.
    pub rows: u32,
    /// Keys a step of the loop takes.
    pub keys: u32,
    /// Rows of the grid of threads; even, and `4 · threads_y` divides `rows`.
    pub threads_y: u32,
    /// Columns of the grid of threads; even, and `4 · threads_x` divides `keys`.
    pub threads_x: u32,
    /// Columns of Q and K in workgroup memory at a time; a multiple of 4.
    pub chunk: u32,
    /// Keys of which probabilities and rows of V are in workgroup memory at a time; a multiple of `threads_x` that divides
    /// `keys`.
    pub value_keys: u32,
    /// Whether the loops of the products are written out, as the compilers of GPUs do not all do by themselves. On software
    /// Vulkan such a kernel takes several times as long to compile.
    pub written_out: bool,
}

impl Tile {
    /// Threads in a workgroup.
    pub const fn threads(&self) -> u32 {
        self.threads_x * self.threads_y
    }

    /// Keys of which each thread of a row has four scores.
    pub(crate) const fn piece(&self) -> u32 {
        4 * self.threads_x
    }

    /// Workgroup memory in bytes. The same sums as the constants of the shader.
    pub const fn workgroup_bytes(&self, head_dim_v: u32) -> u32 {
        let rows = self.rows / 4;
        let scores = self.chunk * (rows + self.keys / 4) + 2 * gaps(self.chunk);
        let value_at = self.value_keys * ((rows + 5) / 8 * 8 + 2);
        let value = value_at + self.value_keys * head_dim_v.div_ceil(self.piece()) * self.threads_x;
        let partial_at = if value_at > scores { value_at } else { scores };
        let partial = partial_at + self.threads_x * rows;
        16 * (if partial > value { partial } else { value }) + 8 * self.rows
    }

    /// Checks that the tile divides as the shader needs it to.
    pub fn validate(&self) -> Result<(), Error> {
        let all = [self.rows, self.keys, self.threads_y, self.threads_x, self.chunk, self.value_keys];
        // Bounds the arithmetic of workgroup_bytes.
        if all.iter().any(|&n| n == 0 || n > 1024) {
            return Err(Error::Tile("every size must be from 1 to 1024"));
        }
        if !self.threads_y.is_multiple_of(2) || !self.rows.is_multiple_of(4 * self.threads_y) {
            return Err(Error::Tile("threads_y must be even, and 4 · threads_y divide rows"));
        }
        if self.rows > self.threads() {
            return Err(Error::Tile("rows must be at most threads_y · threads_x"));
        }
        if !self.threads_x.is_multiple_of(2) || !self.keys.is_multiple_of(self.piece()) {
            return Err(Error::Tile("threads_x must be even, and 4 · threads_x divide keys"));
        }
        if !self.chunk.is_multiple_of(4) {
            return Err(Error::Tile("chunk must be a multiple of 4"));
        }
        if !self.value_keys.is_multiple_of(self.threads_x) || !self.keys.is_multiple_of(self.value_keys) {
            return Err(Error::Tile("value_keys must be a multiple of threads_x and divide keys"));
        }
        Ok(())
    }
}

/// The tile of the cooperative-matrix kernel, `shaders/forward_coop.wgsl` and `shaders/forward_coop_workgroup.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CoopTile {
    /// Subgroups in a workgroup.
    pub subgroups: u32,
    /// Matrices of rows that a subgroup has.
    pub row_matrices: u32,
    /// Keys a step of the loop takes; a multiple of the matrices' size.
    pub keys: u32,
    /// Tiles of K and V in workgroup memory: 1, or 2 to fill one while the other is in use.
    pub buffers: u32,
}

impl CoopTile {
    /// Queries a workgroup computes, with matrices of `size` rows.
    pub const fn rows(&self, size: u32) -> u32 {
        self.subgroups * self.row_matrices * size
    }

    /// Workgroup memory in bytes. The same sums as the constants of the shader.
    pub const fn workgroup_bytes(&self, form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        let k_stride = head_dim.next_multiple_of(size) / 4 + 2;
        let v_stride = head_dim_v.next_multiple_of(size) / 4 + 2;
        let tiles = self.buffers * self.keys * (k_stride + v_stride);
        match form {
            CoopForm::Registers => {
                let rows = self.rows(size) * if k_stride > v_stride { k_stride } else { v_stride };
                8 * if tiles > rows { tiles } else { rows }
            }
            // And the scores in f32, the probabilities in f16.
            CoopForm::WorkgroupMemory => 8 * tiles + 6 * self.rows(size) * (self.keys + 8) + 16,
        }
    }

    /// The same for `shaders/forward_coop_scaled.wgsl`, with elements of so many parts.
    pub const fn scaled_workgroup_bytes(&self, size: u32, parts: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        let k_stride = head_dim.next_multiple_of(size) / 4 + 2;
        let v_stride = head_dim_v.next_multiple_of(size) / 4 + 2;
        let tiles = parts * self.keys * (k_stride + v_stride);
        let rows = self.rows(size) * k_stride;
        let sizes = self.rows(size) + 2 * self.keys;
        8 * if tiles > rows { tiles } else { rows } + self.subgroups * (16 + 4 * size * size) + 4 * sizes
    }

    /// Checks that the tile divides as the shader needs it to.
    pub fn validate(&self, form: CoopForm, size: u32) -> Result<(), Error> {
        // Bounds the arithmetic of workgroup_bytes.
        if [self.subgroups, self.row_matrices, self.keys].iter().any(|&n| n == 0 || n > 1024) {
            return Err(Error::Tile("every size must be from 1 to 1024"));
        }
        if self.subgroups * self.row_matrices > 1024 {
            return Err(Error::Tile("subgroups times row_matrices must be at most 1024"));
        }
        if !matches!(self.buffers, 1 | 2) {
            return Err(Error::Tile("buffers must be 1 or 2"));
        }
        if form == CoopForm::WorkgroupMemory && self.buffers != 1 {
            return Err(Error::Tile("buffers must be 1 in the form through workgroup memory"));
        }
        if !self.keys.is_multiple_of(size) {
            return Err(Error::Tile("the size of a matrix must divide keys"));
        }
        Ok(())
    }

    /// The same for `shaders/forward_coop_scaled.wgsl`, whose subgroups have `lanes` lanes.
    pub fn validate_scaled(&self, size: u32, lanes: u32) -> Result<(), Error> {
        self.validate(CoopForm::Registers, size)?;
        if self.buffers != 1 {
            return Err(Error::Tile("buffers must be 1 for f32 and bf16"));
        }
        if self.subgroups > lanes {
            return Err(Error::Tile("a workgroup must have at most as many subgroups as a subgroup has lanes"));
        }
        Ok(())
    }
}

/// The tile of the cooperative-matrix kernel for a problem, by the size of the device's matrices.
///
/// With matrices of 16 up to a head dim of 128 they were measured on an H100 (docs/performance.md, docs/tuning/forward-coop.md). Larger
/// ones follow from counting: as many rows and keys as fit 48 KiB. Matrices of 8 with access to their elements only a processor
/// is known to have, which takes its time to compile large tiles; the other form has what fits 32 KiB.
pub fn coop_tile(form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> CoopTile {
    let tile = |subgroups, row_matrices, keys, buffers| CoopTile { subgroups, row_matrices, keys, buffers };
    match (form, size, head_dim.max(head_dim_v)) {
        (CoopForm::Registers, 16, 0..=64) => tile(4, 2, 32, 1),
        (CoopForm::Registers, 16, 65..=128) => tile(8, 1, 64, 1),
        (CoopForm::Registers, 16, _) => tile(4, 1, 16, 2),
        (CoopForm::Registers, _, 0..=128) => tile(4, 1, 8, 1),
        (CoopForm::Registers, _, _) => tile(2, 1, 8, 2),
        (CoopForm::WorkgroupMemory, 16, 0..=64) => tile(4, 2, 16, 1),
        (CoopForm::WorkgroupMemory, 16, 65..=128) => tile(8, 1, 32, 1),
        (CoopForm::WorkgroupMemory, 16, _) => tile(4, 1, 16, 1),
        (CoopForm::WorkgroupMemory, _, 0..=128) => tile(4, 2, 16, 1),
        (CoopForm::WorkgroupMemory, _, _) => tile(2, 2, 16, 1),
    }
}

/// Queries and keys from which on plans take [`long_coop_tile`], if it gives the device enough workgroups.
pub(crate) const LONG: u32 = 16384;

/// The same for long rows, where there is a better one. An H100 then is at its limit of power, and 256 rows read K and V half
/// as often as 128 do: with them 1·16·16384·64 has 287 to 300 TFLOP/s, without 273 to 295 (docs/performance.md).
pub fn long_coop_tile(form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> Option<CoopTile> {
    let measured = (form, size) == (CoopForm::Registers, 16) && head_dim.max(head_dim_v) <= 64;
    measured.then_some(CoopTile { subgroups: 8, row_matrices: 2, keys: 64, buffers: 1 })
}

/// The same for elements that are made f16, `shaders/forward_coop_scaled.wgsl`.
pub fn coop_scaled_tile(size: u32, element_type: ElementType, head_dim: u32, head_dim_v: u32) -> CoopTile {
    let (subgroups, row_matrices, keys) = match (size, element_type, head_dim.max(head_dim_v)) {
        (16, ElementType::F32, 0..=64) => (4, 2, 32),
        (16, ElementType::F32, 65..=128) => (8, 1, 32),
        (16, ElementType::F32, _) => (2, 1, 16),
        (16, _, 0..=64) => (4, 2, 32),
        (16, _, 65..=128) => (8, 1, 64),
        (16, _, _) => (4, 1, 16),
        (_, _, 0..=128) => (4, 1, 16),
        (_, _, _) => (2, 1, 8),
    };
    CoopTile { subgroups, row_matrices, keys, buffers: 1 }
}

/// The tile of the decode kernel, `shaders/decode_split.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeTile {
    /// Rows a workgroup computes: queries of all heads that share a key-value head; a multiple of 4.
    pub rows: u32,
    /// Threads in a workgroup; at least a quarter of the head dim of the values.
    pub threads: u32,
    /// Threads that share a key; divides `threads`.
    pub key_threads: u32,
    /// Keys of a tile that a thread takes part in; at most `key_threads`.
    pub thread_keys: u32,
    /// Threads in a row that sum and compare by subgroup operations: a power of two that divides `threads` and is a
    /// multiple of `key_threads`. 0: all do so through workgroup memory.
    pub lanes: u32,
}

impl DecodeTile {
    /// Keys a step of the loop takes.
    pub const fn keys(&self) -> u32 {
        self.threads / self.key_threads * self.thread_keys
    }

    /// Workgroup memory in bytes. The same sums as the constants of the shader.
    pub const fn workgroup_bytes(&self, head_dim: u32, head_dim_v: u32) -> u32 {
        let q = 4 * self.key_threads * head_dim.div_ceil(4 * self.key_threads);
        let columns = head_dim_v.div_ceil(4);
        let slices = if self.threads / columns < self.keys() { self.threads / columns } else { self.keys() };
        let p = (self.threads - 1) / columns + slices * (self.keys().div_ceil(slices) - 1) + 1;
        let (partials, dots) = match self.lanes {
            0 => (if self.threads < 8 { self.threads } else { 8 }, self.key_threads * (self.keys() + 1)),
            lanes => (self.threads / lanes, 0),
        };
        let partial = if dots > 4 * self.threads { dots } else { 4 * self.threads };
        16 * (self.rows / 4 * (q + p + partials) + partial)
    }

    /// Checks that the tile divides as the shader needs it to.
    pub fn validate(&self, head_dim_v: u32) -> Result<(), Error> {
        // Bounds the arithmetic of workgroup_bytes.
        if [self.rows, self.threads, self.key_threads, self.thread_keys].iter().any(|&n| n == 0 || n > 1024) {
            return Err(Error::Tile("every size must be from 1 to 1024"));
        }
        if !self.rows.is_multiple_of(4) {
            return Err(Error::Tile("rows must be a multiple of 4"));
        }
        if !self.threads.is_multiple_of(self.key_threads) {
            return Err(Error::Tile("key_threads must divide threads"));
        }
        if self.thread_keys > self.key_threads {
            return Err(Error::Tile("thread_keys must be at most key_threads"));
        }
        if self.lanes > 0 && !(self.lanes.is_power_of_two() && self.threads.is_multiple_of(self.lanes)) {
            return Err(Error::Tile("lanes must be 0, or a power of two that divides threads"));
        }
        if !self.lanes.is_multiple_of(self.key_threads) {
            return Err(Error::Tile("lanes must be 0, or a multiple of key_threads"));
        }
        if self.threads < head_dim_v.div_ceil(4) {
            return Err(Error::Tile("threads must be at least a quarter of head_dim_v"));
        }
        Ok(())
    }
}

/// The tile of the decode kernel for a problem with so many rows a key-value head, `element_bytes` bytes an element.
/// `lanes`: those of the device's smallest subgroup, if it may use subgroup operations.
pub fn decode_tile(
    rows: u64,
    head_dim: u32,
    head_dim_v: u32,
    element_bytes: u64,
    lanes: Option<u32>,
    limits: &wgpu::Limits,
) -> DecodeTile {
    // A thread loads four vectors of each key or fewer; 128 bytes of K at once, and as much of V.
    let key_threads = (head_dim.max(head_dim_v).div_ceil(4).next_power_of_two() / 4).clamp(4, 16);
    let thread_keys = if element_bytes == 2 { 4 } else { 2 };
    let rows = rows.next_multiple_of(4).clamp(4, 16) as u32;
    let threads = 128;
    // Fewer would leave every thread more to read than workgroup memory does.
    let lanes = lanes.filter(|&lanes| lanes >= key_threads.max(threads / 8)).map_or(0, |lanes| lanes.min(threads));
    let mut tile = DecodeTile { rows, threads, key_threads, thread_keys, lanes };
    while tile.rows > 4 && tile.workgroup_bytes(head_dim, head_dim_v) > limits.max_compute_workgroup_storage_size {
        tile.rows -= 4;
    }
    tile
}

/// Workgroups that fill a large device: two on each of the 132 multiprocessors of an H100. There 32,768 keys of 8 heads take
/// 55.0 µs in 32 splits, 55.2 µs in 64, and 65.0 µs in 86.
pub(crate) const FULL_DEVICE: u64 = 264;

/// Into how many splits the keys go when `workgroups` take all of them, in `tiles` tiles each: as many as fill the
/// device, and no more than whole tiles need.
pub fn decode_splits(workgroups: u64, tiles: u64) -> u32 {
    let most = (FULL_DEVICE / workgroups.max(1)).clamp(1, tiles.max(1));
    let tiles_of_split = tiles.div_ceil(most).max(1);
    tiles.div_ceil(tiles_of_split).max(1) as u32
}

/// The tile of a tiled backward kernel, `shaders/backward_dkdv_tile.wgsl` or `shaders/backward_dq_tile.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackwardTile {
    /// Keys (for the gradients of keys and values) or queries (for that of queries) that a workgroup owns.
    pub own: u32,
    /// Queries, or keys, that a step of the loop takes.
    pub step: u32,
    /// Rows of the grid of threads; even, and divides `own`.
    pub threads_y: u32,
    /// Columns of the grid of threads; even, and `4 · threads_x` divides `step`.
    pub threads_x: u32,
    /// Columns of the scores' operands in workgroup memory at a time; a multiple of 4.
    pub chunk: u32,
    /// Rows of the step in workgroup memory at a time, for the gradients; a multiple of 4 that divides `step`.
    pub block: u32,
    /// Whether the loops of the products are written out, as the compilers of GPUs do not all do by themselves. On software
    /// Vulkan such a kernel takes several times as long to compile.
    pub written_out: bool,
}

impl BackwardTile {
    /// Threads in a workgroup.
    pub const fn threads(&self) -> u32 {
        self.threads_x * self.threads_y
    }

    /// Workgroup memory in bytes. The same sums as the constants of the shader.
    pub const fn workgroup_bytes(&self, head_dim: u32, head_dim_v: u32) -> u32 {
        let scores = (self.own + self.step) * ((self.chunk / 4) | 1);
        let widest = if head_dim > head_dim_v { head_dim } else { head_dim_v };
        let block = self.block * widest.div_ceil(4 * self.threads_x) * self.threads_x;
        let results = self.own * ((self.step / 4) | 1) + block;
        16 * if scores > results { scores } else { results }
    }

    /// Checks that the tile divides as the shader needs it to.
    pub fn validate(&self) -> Result<(), Error> {
        let all = [self.own, self.step, self.threads_y, self.threads_x, self.chunk, self.block];
        // Bounds the arithmetic of workgroup_bytes.
        if all.iter().any(|&n| n == 0 || n > 1024) {
            return Err(Error::Tile("every size must be from 1 to 1024"));
        }
        if !self.threads_y.is_multiple_of(2) || !self.own.is_multiple_of(self.threads_y) {
            return Err(Error::Tile("threads_y must be even and divide own"));
        }
        if !self.threads_x.is_multiple_of(2) || !self.step.is_multiple_of(4 * self.threads_x) {
            return Err(Error::Tile("threads_x must be even, and 4 · threads_x divide step"));
        }
        if !self.chunk.is_multiple_of(4) {
            return Err(Error::Tile("chunk must be a multiple of 4"));
        }
        if !self.block.is_multiple_of(4) || !self.step.is_multiple_of(self.block) {
            return Err(Error::Tile("block must be a multiple of 4 and divide step"));
        }
        Ok(())
    }
}

/// The tiles of the backward kernels for a problem on a device: of the gradients of keys and values, and of queries.
pub fn backward_tiles(head_dim: u32, head_dim_v: u32, limits: &wgpu::Limits) -> [BackwardTile; 2] {
    let memory = limits.max_compute_workgroup_storage_size;
    let widest = head_dim.max(head_dim_v);
    let fitted = |own, step, (threads_y, threads_x), chunk: u32, block, written_out| {
        // Equal chunks, as those of `tile`.
        let chunks = widest.div_ceil(chunk);
        let chunk = widest.div_ceil(chunks).next_multiple_of(4);
        let mut tile = BackwardTile { own, step, threads_y, threads_x, chunk, block, written_out };
        while tile.block > 4 && tile.workgroup_bytes(head_dim, head_dim_v) > memory {
            tile.block /= 2;
        }
        tile
    };
    // On an H100 in f32, TFLOP/s: the first 26.1 at D = 64, the second 25.5 at D = 128; docs/tuning/log/tiles.csv has the others.
    let both = match (memory >> 10, widest) {
        (48.., 0..=64) => fitted(64, 64, (16, 16), 64, 64, true),
        (48.., 65..=128) => fitted(64, 64, (16, 16), 32, 32, true),
        (32.., _) => fitted(64, 64, (16, 16), 32, 32, false),
        (_, 0..=64) => fitted(32, 32, (8, 8), 32, 32, false),
        // More threads, so that each has fewer columns.
        (_, _) => fitted(32, 64, (16, 16), 32, 16, false),
    };
    [both; 2]
}

/// The tile of the backward kernel that computes all gradients at once, in f32, `shaders/backward_fused_tile.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FusedTile {
    /// Keys of a tile.
    pub own: u32,
    /// Queries of a tile.
    pub step: u32,
    /// Rows of the grid of threads; even, and `4 · threads_y` divides `own` and `step`.
    pub threads_y: u32,
    /// Columns of the grid of threads; even, and `4 · threads_x` divides `step`.
    pub threads_x: u32,
    /// Columns of the scores' operands in workgroup memory at a time; a multiple of 4.
    pub chunk: u32,
    /// Rows of the gradients' second operand in workgroup memory at a time; divides `4 · threads_y` and `4 · threads_x`.
    pub lines: u32,
    /// Keys of a block, of which each meets one block of queries in a dispatch; a multiple of `own`.
    pub block_keys: u32,
    /// Queries of a block; a multiple of `step`.
    pub block_rows: u32,
    /// Whether the loops of the products are written out, as the compilers of GPUs do not all do by themselves. On software
    /// Vulkan such a kernel takes several times as long to compile.
    pub written_out: bool,
}

impl FusedTile {
    /// Threads in a workgroup.
    pub const fn threads(&self) -> u32 {
        self.threads_x * self.threads_y
    }

    /// Workgroup memory in bytes. The same sums as the constants of the shader.
    pub const fn workgroup_bytes(&self, head_dim: u32, head_dim_v: u32) -> u32 {
        let widest = if head_dim > head_dim_v { head_dim } else { head_dim_v };
        let chunks = self.chunk * (self.own + self.step) / 4 + 2 * gaps(self.chunk);
        let lines = self.lines * widest.div_ceil(4 * self.threads_x) * self.threads_x;
        let by_rows = self.step * ((self.own / 4 + 5) / 8 * 8 + 2);
        let by_keys = 4 * self.threads_y * ((self.step / 4 + 3) / 8 * 8 + 4);
        16 * (if chunks > lines { chunks } else { lines } + if by_rows > by_keys { by_rows } else { by_keys })
    }

    /// Rounds in which each block of keys meets each block of queries once, for a tile that is valid.
    pub const fn rounds(&self, seqlen_q: u32, seqlen_k: u32) -> u32 {
        let (rows, keys) = (seqlen_q.div_ceil(self.block_rows), seqlen_k.div_ceil(self.block_keys));
        let blocks = if rows > keys { rows } else { keys };
        if blocks < 2 { 1 } else { blocks + blocks % 2 }
    }

    /// Checks that the tile divides as the shader needs it to.
    pub fn validate(&self) -> Result<(), Error> {
        let all = [self.own, self.step, self.threads_y, self.threads_x, self.chunk, self.lines];
        // Bounds the arithmetic of workgroup_bytes.
        if all.iter().any(|&n| n == 0 || n > 1024) {
            return Err(Error::Tile("every size must be from 1 to 1024"));
        }
        let (of_y, of_x) = (4 * self.threads_y, 4 * self.threads_x);
        if !of_y.is_multiple_of(8) || !self.own.is_multiple_of(of_y) || !self.step.is_multiple_of(of_y) {
            return Err(Error::Tile("threads_y must be even, and 4 · threads_y divide own and step"));
        }
        if !of_x.is_multiple_of(8) || !self.step.is_multiple_of(of_x) {
            return Err(Error::Tile("threads_x must be even, and 4 · threads_x divide step"));
        }
        if !self.chunk.is_multiple_of(4) {
            return Err(Error::Tile("chunk must be a multiple of 4"));
        }
        if !of_y.is_multiple_of(self.lines) || !of_x.is_multiple_of(self.lines) {
            return Err(Error::Tile("lines must divide 4 · threads_y and 4 · threads_x"));
        }
        let blocks = [(self.block_keys, self.own), (self.block_rows, self.step)];
        if blocks.iter().any(|&(block, of)| block == 0 || block > 1 << 24 || !block.is_multiple_of(of)) {
            return Err(Error::Tile("block_keys must be a multiple of own, and block_rows of step, up to 2^24"));
        }
        Ok(())
    }
}

/// Workgroups of one round of blocks that fill a large device, each having a multiprocessor to itself: nearly the 132 of an
/// H100.
const FULL_ROUND: u64 = 128;

/// A plan has a uniform and records a dispatch for each round.
pub(crate) const MOST_ROUNDS: u32 = 1 << 16;

/// The tile of the backward kernel that computes all gradients at once, for a problem on a device; `uneven`: masks leave about
/// half of the blocks of a round empty. `None` where a round has too few blocks for a large device, and where there are no
/// figures, above a head dim of 128 and below 48 KiB: there two kernels do without rounds.
pub fn fused_tile(shape: &Shape, uneven: bool, limits: &wgpu::Limits) -> Option<FusedTile> {
    let (head_dim, head_dim_v) = (shape.head_dim, shape.head_dim_v);
    let widest = head_dim.max(head_dim_v);
    let memory = limits.max_compute_workgroup_storage_size;
    // On H100s, TFLOP/s: the first 34.7 to 35.0 at D = 64, the second 36.4 to 36.6 at D = 128; docs/tuning/backward-tile.md has the others.
    let (own, step, chunk, lines) = match (memory >> 10, widest) {
        (48.., 0..=64) => (128, 64, 16, 32),
        (48.., 65..=128) => (128, 64, 16, 16),
        _ => return None,
    };
    // Equal chunks, as those of `tile`.
    let chunk = widest.div_ceil(widest.div_ceil(chunk)).next_multiple_of(4);
    let (threads_y, threads_x, written_out) = (16, 16, true);
    // The largest blocks, up to 2,048 keys, of which a round fills the device: between rounds all gradients go through memory.
    let needed = if uneven { 2 * FULL_ROUND } else { FULL_ROUND };
    let heads = shape.batch as u64 * shape.heads_kv as u64;
    [16, 8, 4, 2, 1].into_iter().find_map(|times| {
        // Equal blocks, and as many of rows as of keys, so that under a causal mask they lie on the diagonal.
        let key_blocks = shape.seqlen_k.div_ceil(own * times).max(1);
        let block_keys = shape.seqlen_k.div_ceil(key_blocks).max(1).next_multiple_of(own);
        let block_rows = shape.seqlen_q.div_ceil(key_blocks).max(1).checked_next_multiple_of(own)?;
        let tile = FusedTile { own, step, threads_y, threads_x, chunk, lines, block_keys, block_rows, written_out };
        let rounds = tile.rounds(shape.seqlen_q, shape.seqlen_k);
        let pairs = shape.seqlen_k.div_ceil(block_keys) as u64 * shape.seqlen_q.div_ceil(block_rows) as u64;
        let filled = heads.saturating_mul(pairs) / rounds as u64 >= needed;
        (filled && rounds <= MOST_ROUNDS && tile.validate().is_ok()).then_some(tile)
    })
}

/// The tile of a backward kernel on cooperative matrices, `shaders/backward_dkdv_coop.wgsl` or
/// `shaders/backward_dq_coop.wgsl`, through workgroup memory `shaders/backward_dkdv_coop_workgroup.wgsl` or
/// `shaders/backward_dq_coop_workgroup.wgsl`, or for f32 and bf16 `shaders/backward_dkdv_coop_scaled.wgsl` or
/// `shaders/backward_dq_coop_scaled.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CoopBackwardTile {
    /// Subgroups in a workgroup; even for f32 and bf16.
    pub subgroups: u32,
    /// Matrices of keys (for the gradients of keys and values) or of queries (for that of queries) that a subgroup owns,
    /// or for f32 and bf16 a pair of subgroups.
    pub matrices: u32,
    /// Queries, or keys, that a step of the loop takes; a multiple of the matrices' size.
    pub step: u32,
    /// Columns of a gradient that a workgroup computes; a multiple of the matrices' size. With fewer than the head dim,
    /// scores are computed once for each block of them. For f32 and bf16 at least the head dims.
    pub columns: u32,
    /// Whether the next step's tile is loaded while one is in use, which takes registers.
    pub ahead: bool,
}

impl CoopBackwardTile {
    /// Keys, or queries, that a workgroup owns, with matrices of `size` rows.
    pub const fn own(&self, size: u32) -> u32 {
        self.subgroups * self.matrices * size
    }

    /// Blocks of columns of gradients with rows of `dim`.
    pub const fn blocks(&self, dim: u32) -> u32 {
        dim.div_ceil(self.columns)
    }

    /// Whether V is in registers, where the gradients of keys and values leave room: when they are computed in blocks. In the
    /// form through workgroup memory it always is.
    pub const fn holds_value(&self, head_dim: u32, head_dim_v: u32) -> bool {
        self.blocks(head_dim) > 1 || self.blocks(head_dim_v) > 1
    }

    /// Vectors of four from one row to the next in workgroup memory, of whole rows and of a block's.
    const fn strides(&self, size: u32, dim: u32) -> (u32, u32) {
        let whole = dim.next_multiple_of(size);
        let block = if whole < self.columns { whole } else { self.columns };
        (whole / 4 + 2, block / 4 + 2)
    }

    /// Workgroup memory in bytes of the kernel for keys and values. The same sums as the constants of the shader.
    pub const fn dkdv_bytes(&self, form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        match form {
            CoopForm::Registers => {
                let value = if self.holds_value(head_dim, head_dim_v) { 0 } else { self.own(size) };
                self.bytes(size, head_dim, head_dim_v, value) + 8 * self.step
            }
            // The scores and their gradients in f32, the probabilities and the gradients in f16.
            CoopForm::WorkgroupMemory => self.exchange_bytes(size, head_dim, head_dim_v, 12) + 2 * 8 * self.step,
        }
    }

    /// The same of the kernel for queries.
    pub const fn dq_bytes(&self, form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        match form {
            CoopForm::Registers => self.bytes(size, head_dim, head_dim_v, 0),
            // No probabilities.
            CoopForm::WorkgroupMemory => self.exchange_bytes(size, head_dim, head_dim_v, 10),
        }
    }

    const fn bytes(&self, size: u32, head_dim: u32, head_dim_v: u32, value_rows: u32) -> u32 {
        let (d_stride, d_block) = self.strides(size, head_dim);
        let (v_stride, v_block) = self.strides(size, head_dim_v);
        let tiles = value_rows * v_stride + self.step * (d_stride + v_stride);
        let moved = self.own(size) * if d_block > v_block { d_block } else { v_block };
        8 * if tiles > moved { tiles } else { moved }
    }

    /// Two tiles, and so many bytes for each score of a step.
    const fn exchange_bytes(&self, size: u32, head_dim: u32, head_dim_v: u32, of_score: u32) -> u32 {
        let (d_stride, v_stride) = (self.strides(size, head_dim).0, self.strides(size, head_dim_v).0);
        2 * 8 * self.step * (d_stride + v_stride) + of_score * self.own(size) * (self.step + 8)
    }

    /// Keys, or queries, that a workgroup owns for f32 and bf16.
    pub const fn scaled_own(&self, size: u32) -> u32 {
        self.own(size) / 2
    }

    /// Workgroup memory in bytes of the kernel for keys and values for f32 and bf16, with elements of so many parts.
    pub const fn scaled_dkdv_bytes(&self, size: u32, parts: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        self.scaled_dq_bytes(size, parts, head_dim, head_dim_v) + 8 * self.step
    }

    /// The same of the kernel for queries.
    pub const fn scaled_dq_bytes(&self, size: u32, parts: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        let widest = if head_dim > head_dim_v { head_dim } else { head_dim_v };
        let stride = widest.next_multiple_of(size) / 4 + 2;
        let rows = if parts * self.step > self.scaled_own(size) { parts * self.step } else { self.scaled_own(size) };
        let matrices = self.matrices * (self.step / size);
        let told = self.subgroups / 2 * if matrices > 2 { matrices } else { 2 } * size * size;
        16 * rows * stride + 4 * told + 16 * self.subgroups + 8 * (self.scaled_own(size) + self.step)
    }

    /// Checks that the tile divides as the shader needs it to.
    pub fn validate(&self, size: u32) -> Result<(), Error> {
        // Bounds the arithmetic of the sums above.
        if [self.subgroups, self.matrices, self.step, self.columns].iter().any(|&n| n == 0 || n > 1024) {
            return Err(Error::Tile("every size must be from 1 to 1024"));
        }
        if self.subgroups * self.matrices > 1024 {
            return Err(Error::Tile("subgroups times matrices must be at most 1024"));
        }
        if !self.step.is_multiple_of(size) || !self.columns.is_multiple_of(size) {
            return Err(Error::Tile("the size of a matrix must divide step and columns"));
        }
        Ok(())
    }

    /// The same for f32 and bf16, with subgroups of `lanes` lanes and rows of `widest` elements at most.
    pub fn validate_scaled(&self, size: u32, lanes: u32, widest: u32) -> Result<(), Error> {
        self.validate(size)?;
        if !self.subgroups.is_multiple_of(2) {
            return Err(Error::Tile("subgroups must be even for f32 and bf16"));
        }
        if self.subgroups > lanes {
            return Err(Error::Tile("a workgroup must have at most as many subgroups as a subgroup has lanes"));
        }
        if self.columns < widest {
            return Err(Error::Tile("columns must be at least the head dims for f32 and bf16"));
        }
        Ok(())
    }
}

/// The tiles of the backward kernels on cooperative matrices, by the size of the device's matrices: of the gradients of keys
/// and values, and of queries.
///
/// Those with matrices of 16 were measured on an H100 (docs/tuning/coop-backward.md), through workgroup memory up to a head dim of 128. The
/// others follow from counting: K, V, dK and dV of a subgroup take 192 registers a lane with matrices of 16, half as many
/// with Metal's of 8, and steps are as long as 48 and 32 KiB then allow.
pub fn coop_backward_tiles(form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> [CoopBackwardTile; 2] {
    let tile =
        |subgroups, matrices, step, columns, ahead| CoopBackwardTile { subgroups, matrices, step, columns, ahead };
    match (form, size, head_dim.max(head_dim_v)) {
        (CoopForm::Registers, 16, 0..=64) => [tile(8, 2, 32, 64, true), tile(4, 2, 32, 64, true)],
        (CoopForm::Registers, 16, 65..=128) => [tile(8, 1, 16, 128, true), tile(8, 1, 48, 128, true)],
        (CoopForm::Registers, 16, _) => [tile(4, 1, 32, 64, false), tile(4, 1, 32, 128, false)],
        (CoopForm::Registers, _, 0..=128) => [tile(4, 2, 16, 128, true), tile(4, 2, 16, 128, true)],
        (CoopForm::Registers, _, _) => [tile(2, 1, 8, 64, false), tile(2, 1, 8, 128, false)],
        (CoopForm::WorkgroupMemory, 16, 0..=64) => [tile(4, 2, 16, 64, true), tile(4, 2, 16, 64, true)],
        (CoopForm::WorkgroupMemory, 16, 65..=128) => [tile(4, 1, 16, 128, false), tile(4, 1, 16, 128, false)],
        (CoopForm::WorkgroupMemory, 16, _) => [tile(2, 1, 16, 64, false), tile(2, 1, 16, 128, false)],
        (CoopForm::WorkgroupMemory, _, 0..=64) => [tile(4, 2, 16, 64, true), tile(4, 2, 16, 64, true)],
        (CoopForm::WorkgroupMemory, _, 65..=128) => [tile(4, 1, 16, 128, true), tile(4, 1, 16, 128, true)],
        (CoopForm::WorkgroupMemory, _, _) => [tile(4, 1, 8, 64, false), tile(4, 1, 8, 128, false)],
    }
}

/// The same for f32 and bf16. Registers: at head dim 64, of the first kernel, 64 of a lane hold both parts of K or V, 64 dV or
/// dK, 16 what a subgroup computes of S or dP, and 16 the next step; at 128 with half the keys the same.
pub fn coop_scaled_backward_tiles(
    size: u32,
    element_type: ElementType,
    head_dim: u32,
    head_dim_v: u32,
) -> [CoopBackwardTile; 2] {
    let tile = |subgroups, matrices, step, ahead| CoopBackwardTile { subgroups, matrices, step, columns: 256, ahead };
    match (size, element_type, head_dim.max(head_dim_v)) {
        (16, ElementType::F32, 0..=64) => [tile(4, 2, 16, true), tile(4, 2, 32, true)],
        (16, ElementType::F32, 65..=128) => [tile(8, 1, 16, true), tile(8, 1, 32, true)],
        (16, _, 0..=64) => [tile(4, 2, 32, true), tile(4, 2, 32, true)],
        (16, _, 65..=128) => [tile(8, 1, 32, true), tile(8, 1, 32, true)],
        (16, _, _) => [tile(4, 1, 16, false), tile(4, 1, 16, false)],
        (_, _, 0..=128) => [tile(4, 1, 16, true), tile(4, 1, 16, true)],
        (_, _, _) => [tile(2, 1, 8, false), tile(2, 1, 8, false)],
    }
}

/// A row of the table: the first one whose bounds hold is taken.
struct Row {
    /// The larger of the two head dimensions is at most this.
    head_dim: u32,
    /// The device has at least this much workgroup memory, in bytes, and this many invocations in a workgroup.
    workgroup_bytes: u32,
    invocations: u32,
    /// `chunk` and `value_keys` are upper bounds here: see [`tile`].
    tile: Tile,
}

const fn row(
    head_dim: u32,
    workgroup_bytes: u32,
    rows: u32,
    keys: u32,
    grid: (u32, u32),
    chunk: u32,
    value_keys: u32,
) -> Row {
    let (threads_y, threads_x) = grid;
    // Memory that software Vulkan does not have.
    let written_out = workgroup_bytes > 32 << 10;
    let tile = Tile { rows, keys, threads_y, threads_x, chunk, value_keys, written_out };
    Row { head_dim, workgroup_bytes, invocations: threads_x * threads_y, tile }
}

// TFLOP/s on an H100 in f32: the first row 43.0 at D = 64, the second 47.2 at D = 128, the third 42.6 at D = 256; docs/tuning/forward-tile.md has
// others.
#[rustfmt::skip]
const TILES: &[Row] = &[
    //  D,    memory, rows, keys,     grid, chunk, value_keys
    row( 64, 48 << 10,  128,  128, (16, 16),    32,  32),
    row(128, 48 << 10,  128,  128, (16, 16),    32,  32),
    row(256, 48 << 10,   64,  128, (16, 16),    32,  32),
    row(128, 32 << 10,   64,   64,  (16, 8),    32,  32),
    row(256, 32 << 10,   64,   64, (16, 16),    32,  16),
    // WebGPU's default limits: 16 KiB, 256 invocations.
    row(256,        0,   32,   32,   (8, 8),    32,  32),
];

/// The tile for a problem on a device: the table's, with `chunk` and `value_keys` made to fit head dimension and
/// memory.
pub fn tile(head_dim: u32, head_dim_v: u32, limits: &wgpu::Limits) -> Tile {
    let memory = limits.max_compute_workgroup_storage_size;
    let fitted = |row: &Row| {
        let mut tile = row.tile;
        // Equal chunks: 80 columns in chunks of at most 32 are three of 28.
        let chunks = head_dim.div_ceil(tile.chunk);
        tile.chunk = head_dim.div_ceil(chunks).next_multiple_of(4);
        // From a power of two times threads_x.
        while tile.value_keys > tile.threads_x && tile.workgroup_bytes(head_dim_v) > memory {
            tile.value_keys /= 2;
        }
        tile
    };
    let suits = |row: &Row| {
        head_dim.max(head_dim_v) <= row.head_dim
            && memory >= row.workgroup_bytes
            && limits.max_compute_invocations_per_workgroup >= row.invocations
            && fitted(row).workgroup_bytes(head_dim_v) <= memory
    };
    // Where not even the last row fits, the plan's check of the device's limits says so.
    fitted(TILES.iter().find(|row| suits(row)).unwrap_or(&TILES[TILES.len() - 1]))
}

/// Vectors of four in the gaps between the columns of a chunk, as in `shaders/common/tile_columns.wgsl`.
const fn gaps(chunk: u32) -> u32 {
    let chunk4 = chunk / 4;
    if chunk4 > 0 && chunk4 < 8 { 8 / chunk4 * chunk4 } else { chunk4 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bytes: u32, invocations: u32) -> wgpu::Limits {
        wgpu::Limits {
            max_compute_workgroup_storage_size: bytes,
            max_compute_invocations_per_workgroup: invocations,
            ..Default::default()
        }
    }

    #[test]
    fn every_head_dim_gets_a_tile_that_fits() {
        for (bytes, invocations) in [(16 << 10, 256), (32 << 10, 256), (48 << 10, 1024)] {
            for head_dim in 1..=256 {
                for head_dim_v in [1, 7, 32, 64, 100, 128, 200, 256, head_dim] {
                    let tile = tile(head_dim, head_dim_v, &limits(bytes, invocations));
                    tile.validate().unwrap();
                    let used = tile.workgroup_bytes(head_dim_v);
                    assert!(used <= bytes, "{head_dim} {head_dim_v} {tile:?} {used} > {bytes}");
                    assert!(tile.threads() <= invocations);
                }
            }
        }
    }

    #[test]
    fn every_head_dim_gets_a_decode_tile_that_fits() {
        for bytes in [16 << 10, 32 << 10, 48 << 10] {
            for (head_dim, rows) in (1..=256).flat_map(|d| [1, 4, 7, 16, 100].map(|rows| (d, rows))) {
                for (head_dim_v, element_bytes) in [(1, 2), (64, 4), (128, 2), (256, 4), (head_dim, 2)] {
                    for lanes in [None, Some(4), Some(8), Some(32), Some(64)] {
                        let tile = decode_tile(rows, head_dim, head_dim_v, element_bytes, lanes, &limits(bytes, 256));
                        tile.validate(head_dim_v).unwrap();
                        let used = tile.workgroup_bytes(head_dim, head_dim_v);
                        assert!(used <= bytes, "{head_dim} {head_dim_v} {tile:?} {used} > {bytes}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_head_dim_gets_coop_tiles_that_fit() {
        for (size, bytes) in [(8, 32 << 10), (16, 48 << 10)] {
            for (head_dim, head_dim_v) in (1..=256).flat_map(|d| [1, 40, 64, 128, 200, 256, d].map(|v| (d, v))) {
                for form in [CoopForm::Registers, CoopForm::WorkgroupMemory] {
                    let [dkdv, dq] = coop_backward_tiles(form, size, head_dim, head_dim_v);
                    for (tile, used) in [
                        (dkdv, dkdv.dkdv_bytes(form, size, head_dim, head_dim_v)),
                        (dq, dq.dq_bytes(form, size, head_dim, head_dim_v)),
                    ] {
                        tile.validate(size).unwrap();
                        assert!(used <= bytes, "{form} {head_dim} {head_dim_v} {tile:?} {used} > {bytes}");
                    }
                }
                for (element_type, parts) in [(ElementType::F32, 2), (ElementType::BF16, 1)] {
                    let [dkdv, dq] = coop_scaled_backward_tiles(size, element_type, head_dim, head_dim_v);
                    for (tile, used) in [
                        (dkdv, dkdv.scaled_dkdv_bytes(size, parts, head_dim, head_dim_v)),
                        (dq, dq.scaled_dq_bytes(size, parts, head_dim, head_dim_v)),
                    ] {
                        tile.validate_scaled(size, 2 * size, head_dim.max(head_dim_v)).unwrap();
                        assert!(used <= bytes, "{element_type} {head_dim} {head_dim_v} {tile:?} {used} > {bytes}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_head_dim_gets_a_coop_tile_that_fits() {
        for (form, size, bytes) in [
            (CoopForm::Registers, 16, 48 << 10),
            (CoopForm::Registers, 8, 32 << 10),
            (CoopForm::WorkgroupMemory, 16, 48 << 10),
            (CoopForm::WorkgroupMemory, 8, 32 << 10),
        ] {
            for (head_dim, head_dim_v) in (1..=256).flat_map(|d| [1, 64, 128, 256, d].map(|dv| (d, dv))) {
                let short = coop_tile(form, size, head_dim, head_dim_v);
                for tile in [short].into_iter().chain(long_coop_tile(form, size, head_dim, head_dim_v)) {
                    tile.validate(form, size).unwrap();
                    let used = tile.workgroup_bytes(form, size, head_dim, head_dim_v);
                    assert!(used <= bytes, "{form} {size} {head_dim} {head_dim_v} {tile:?} {used} > {bytes}");
                }
            }
        }
    }

    #[test]
    fn blocks_of_a_round_fill_the_device() {
        let large = limits(48 << 10, 1024);
        let blocks = |batch, heads, seqlen, uneven| {
            let tile = fused_tile(&Shape::square(batch, heads, seqlen, 64), uneven, &large)?;
            tile.validate().unwrap();
            Some((tile.block_keys, tile.block_rows))
        };
        assert_eq!(blocks(4, 16, 4096, false), Some((2048, 2048)));
        assert_eq!(blocks(4, 16, 4096, true), Some((1024, 1024)));
        assert_eq!(blocks(2, 16, 4096, true), Some((512, 512)));
        // Eight blocks of 128 keys for each of 16 heads.
        assert_eq!(blocks(1, 16, 1024, false), Some((128, 128)));
        assert_eq!(blocks(1, 16, 1024, true), None);
        // Nine and seventeen blocks, in ten and eighteen rounds.
        assert_eq!(blocks(1, 16, 2176, false), Some((256, 256)));
        assert_eq!(blocks(1, 16, 2176, true), Some((128, 128)));
        // Three equal ones, not two of 1,024 and a half.
        assert_eq!(blocks(8, 8, 2560, false), Some((1280, 1280)));
        assert_eq!(blocks(7, 17, 2560, true), Some((896, 896)));
        // One block of rows.
        let few_rows = Shape { seqlen_q: 64, ..Shape::square(1, 16, 8192, 64) };
        assert_eq!(fused_tile(&few_rows, false, &large), None);
        assert_eq!(fused_tile(&Shape::square(4, 16, 4096, 136), false, &large), None);
        assert_eq!(fused_tile(&Shape::square(4, 16, 4096, 64), false, &limits(32 << 10, 1024)), None);
    }

    #[test]
    fn splits_fill_the_device() {
        // 32,768 keys in tiles of 64 for 8 key-value heads.
        assert_eq!(decode_splits(8, 512), 32);
        // Never less than a tile each, and none without a tile.
        assert_eq!(decode_splits(8, 10), 10);
        assert_eq!(decode_splits(50, 12), 4);
        assert_eq!(decode_splits(50, 11), 4);
        assert_eq!(decode_splits(1000, 50), 1);
        assert_eq!(decode_splits(8, 0), 1);
    }

    #[test]
    fn larger_limits_give_larger_tiles() {
        let small = tile(64, 64, &limits(16 << 10, 256));
        let large = tile(64, 64, &limits(48 << 10, 1024));
        assert!(large.rows * large.keys > small.rows * small.keys);
    }

    #[test]
    fn head_dims_are_cut_into_equal_chunks() {
        assert_eq!(tile(80, 80, &limits(16 << 10, 256)).chunk, 28);
        assert_eq!(tile(1, 1, &limits(16 << 10, 256)).chunk, 4);
    }

    #[test]
    fn a_tile_that_does_not_divide_is_refused() {
        let good = tile(64, 64, &limits(16 << 10, 256));
        for bad in [
            Tile { rows: 33, ..good },
            Tile { rows: 128, ..good },
            Tile { threads_x: 3, ..good },
            Tile { keys: 36, ..good },
            Tile { chunk: 30, ..good },
            Tile { value_keys: 6, ..good },
            Tile { value_keys: 0, ..good },
            Tile { value_keys: 24, ..good },
            Tile { rows: 4096, ..good },
        ] {
            assert!(matches!(bad.validate(), Err(Error::Tile(_))), "{bad:?}");
        }
    }
}
