//! The tile kernel that computes all gradients at once.

use super::tile::gaps;
use crate::error::Error;
use crate::problem::Shape;

/// The tile of the backward kernel that computes all gradients at once, in f32, `shaders/kernel/backward_fused_tile.wgsl`.
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

#[cfg(test)]
mod tests {
    use super::super::limits;
    use super::*;

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
}
