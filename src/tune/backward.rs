//! The tile kernels of the backward pass, of which each computes the scores.

use crate::error::Error;

/// The tile of a tiled backward kernel, `shaders/kernel/backward_dkdv_tile.wgsl` or `shaders/kernel/backward_dq_tile.wgsl`.
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
    backward_tiles_in_blocks(head_dim, head_dim_v, limits, None)
}

/// The same where blocks of so many queries and keys divide into tiles. If none of them does, the smallest.
pub(crate) fn backward_tiles_in_blocks(
    head_dim: u32,
    head_dim_v: u32,
    limits: &wgpu::Limits,
    block: Option<[u32; 2]>,
) -> [BackwardTile; 2] {
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
    // On an H100 in f32, TFLOP/s: the first 26.1 at D = 64, the second 25.5 at D = 128; docs/tuning/backward-tile.md has the others.
    let both = match (memory >> 10, widest) {
        (48.., 0..=64) => fitted(64, 64, (16, 16), 64, 64, true),
        (48.., 65..=128) => fitted(64, 64, (16, 16), 32, 32, true),
        (32.., _) => fitted(64, 64, (16, 16), 32, 32, false),
        (_, 0..=64) => fitted(32, 32, (8, 8), 32, 32, false),
        // More threads, so that each has fewer columns.
        (_, _) => fitted(32, 64, (16, 16), 32, 16, false),
    };
    let Some([queries, keys]) = block else { return [both; 2] };
    [[keys, queries], [queries, keys]].map(|[own, step]| {
        match own.is_multiple_of(both.own) && step.is_multiple_of(both.step) {
            true => both,
            false => fitted(32, 32, (8, 8), 32, 32, false),
        }
    })
}
