//! The tile kernel, forward.

use crate::error::Error;

/// The tile of the forward kernel, `shaders/kernel/forward_tile.wgsl`.
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
    tile_in_blocks(head_dim, head_dim_v, limits, None)
}

/// The same where blocks of so many queries and keys divide into tiles. If no tile of the table does, the smallest.
pub(crate) fn tile_in_blocks(head_dim: u32, head_dim_v: u32, limits: &wgpu::Limits, block: Option<[u32; 2]>) -> Tile {
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
        let divides = block
            .is_none_or(|[queries, keys]| queries.is_multiple_of(row.tile.rows) && keys.is_multiple_of(row.tile.keys));
        head_dim.max(head_dim_v) <= row.head_dim
            && divides
            && memory >= row.workgroup_bytes
            && limits.max_compute_invocations_per_workgroup >= row.invocations
            && fitted(row).workgroup_bytes(head_dim_v) <= memory
    };
    // Where not even the last row fits, the plan's check of the device's limits says so.
    fitted(TILES.iter().find(|row| suits(row)).unwrap_or(&TILES[TILES.len() - 1]))
}

/// Bytes of the bits of dropout for a tile of so many rows and keys. The same sums as in `shaders/tile/dropout.wgsl`.
pub(crate) const fn dropout_bytes(rows: u32, keys: u32, threads: u32) -> u32 {
    let calls = 32
        * ((rows + 14) / 16 + !rows.is_multiple_of(16) as u32)
        * ((keys + 30) / 32 + !keys.is_multiple_of(32) as u32);
    if calls >= 2 * threads { 2 * calls } else { 4 * calls }
}

/// Vectors of four in the gaps between the columns of a chunk, as in `shaders/tile/columns.wgsl`.
pub(super) const fn gaps(chunk: u32) -> u32 {
    let chunk4 = chunk / 4;
    if chunk4 > 0 && chunk4 < 8 { 8 / chunk4 * chunk4 } else { chunk4 }
}

#[cfg(test)]
mod tests {
    use super::super::limits;
    use super::*;

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
