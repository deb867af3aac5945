//! The decode kernel.

use crate::error::Error;

/// The tile of the decode kernel, `shaders/kernel/decode_split.wgsl`.
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
    // In 16 bits a thread has more keys at a time. There tiles of 16 rows are slow, it seems for want of registers. f16 at D 128 on an H200,
    // 16 · 8,192 keys of 8 heads: 12 rows took 325 µs in one tile, 445 in two of 8; 16 rows 1,324 in one, 446 in two. In f32 they took 586 in one tile, 609 in two.
    let rows = match rows.next_multiple_of(4).max(4) {
        rows @ 0..=12 => rows as u32,
        _ if element_bytes == 2 => 8,
        _ => 16,
    };
    let threads = 128;
    // Fewer would leave every thread more to read than workgroup memory does.
    let lanes = lanes.filter(|&lanes| lanes >= key_threads.max(threads / 8)).map_or(0, |lanes| lanes.min(threads));
    let mut tile = DecodeTile { rows, threads, key_threads, thread_keys, lanes };
    while tile.rows > 4 && tile.workgroup_bytes(head_dim, head_dim_v) > limits.max_compute_workgroup_storage_size {
        tile.rows -= 4;
    }
    tile
}

/// Workgroups that fill a large device where each has many registers: two on each of the 132 multiprocessors of an H100.
pub(crate) const FULL_DEVICE: u64 = 264;

/// Into how many splits the keys go when `workgroups` take all of them in `tiles` tiles, each workgroup for `rows` rows: as many as fill the device,
/// and no more than whole tiles need.
///
/// For 4 rows four workgroups of 128 threads run on a multiprocessor at once, and hide each other's waits. So there may be twice as many splits, of two
/// tiles each at the least. f16 at D 128 on an H200: 32,768 keys of 8 heads took 47.9 µs in 32 splits, 41.6 in 64; 16 · 8,192 keys 158.0 in 2, 131.2 in
/// 4, and 159.6 in 6, which are more than run at once. Splits of one tile gain nothing: 4,096 keys took 11.1 µs in 32 splits, 11.7 in 64.
pub fn decode_splits(workgroups: u64, tiles: u64, rows: u32) -> u32 {
    let filling = |at_once: u64, limit: u64| (at_once / workgroups.max(1)).min(limit);
    let many = if rows <= 4 { filling(2 * FULL_DEVICE, tiles / 2) } else { 0 };
    let most = filling(FULL_DEVICE, tiles).max(many).max(1);
    let tiles_of_split = tiles.div_ceil(most).max(1);
    tiles.div_ceil(tiles_of_split).max(1) as u32
}

#[cfg(test)]
mod tests {
    use super::super::limits;
    use super::*;

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
    fn rows_of_a_tile_follow_from_rows_and_type() {
        let rows = |rows, bytes| decode_tile(rows, 128, 128, bytes, Some(32), &limits(48 << 10, 1024)).rows;
        assert_eq!([0, 1, 5, 8, 9, 12, 13, 16, 100].map(|n| rows(n, 2)), [4, 4, 8, 8, 12, 12, 8, 8, 8]);
        assert_eq!([0, 1, 5, 8, 9, 12, 13, 16, 100].map(|n| rows(n, 4)), [4, 4, 8, 8, 12, 12, 16, 16, 16]);
    }

    #[test]
    fn splits_fill_the_device() {
        for (workgroups, tiles, rows, splits) in [
            // 32,768 keys in tiles of 64 for 8 key-value heads.
            (8, 512, 4, 64),
            (8, 512, 8, 32),
            (128, 128, 4, 4),
            (128, 128, 16, 2),
            // Of two tiles each at the least where there are more than two workgroups a multiprocessor.
            (8, 64, 4, 32),
            (512, 16, 4, 1),
            (200, 7, 4, 2),
            (200, 7, 8, 1),
            // Never less than a tile each, and none without a tile.
            (8, 10, 4, 10),
            (50, 12, 8, 4),
            (50, 11, 8, 4),
            (1000, 50, 4, 1),
            (8, 0, 4, 1),
        ] {
            assert_eq!(decode_splits(workgroups, tiles, rows), splits, "{workgroups} {tiles} {rows}");
        }
    }
}
