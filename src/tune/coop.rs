//! The kernels on cooperative matrices, forward.

use crate::error::Error;
use crate::matrices::MatrixFormat;
use crate::names::{CoopForm, ElementType};

/// The tile of the cooperative-matrix kernel, `shaders/kernel/forward_coop.wgsl` and `shaders/kernel/forward_coop_workgroup.wgsl`.
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
    /// Turns in which the keys of a step are taken, so that registers hold the scores of one turn: 1, but for
    /// `shaders/kernel/forward_coop.wgsl`.
    pub turns: u32,
    /// How many of the matrices of Q across the head dim stay in workgroup memory, where registers do not hold all of them: 0, but for
    /// `shaders/kernel/forward_coop.wgsl`.
    pub query_in_memory: u32,
}

impl CoopTile {
    /// A step in one turn, and all of Q in registers.
    pub const fn new(subgroups: u32, row_matrices: u32, keys: u32, buffers: u32) -> Self {
        Self { subgroups, row_matrices, keys, buffers, turns: 1, query_in_memory: 0 }
    }

    /// The tile with its steps in turns, and with some matrices of Q in workgroup memory.
    pub const fn with_turns(mut self, turns: u32, query_in_memory: u32) -> Self {
        self.turns = turns;
        self.query_in_memory = query_in_memory;
        self
    }

    /// Queries a workgroup computes, with matrices of `size` rows.
    pub const fn rows(&self, size: u32) -> u32 {
        self.subgroups * self.row_matrices * size
    }

    /// Matrices of Q across the head dim that registers hold.
    pub(crate) const fn held(&self, size: u32, head_dim: u32) -> u32 {
        head_dim.div_ceil(size).saturating_sub(self.query_in_memory)
    }

    /// Blocks of columns in which so many matrices pass through workgroup memory, and the matrices of a block: 128 columns at most.
    pub(crate) const fn staged(size: u32, matrices: u32) -> (u32, u32) {
        let matrices = if matrices == 0 { 1 } else { matrices };
        let blocks = matrices.div_ceil(128 / size);
        (blocks, matrices.div_ceil(blocks))
    }

    /// Workgroup memory in bytes. The same sums as the constants of the shader.
    pub const fn workgroup_bytes(&self, form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        let (k_stride, v_stride) = (stride(size, head_dim), stride(size, head_dim_v));
        let tiles = self.buffers * self.keys * (k_stride + v_stride);
        match form {
            CoopForm::Registers => {
                let (_, q) = Self::staged(size, self.held(size, head_dim));
                let (_, o) = Self::staged(size, head_dim_v.div_ceil(size));
                let staged = self.subgroups * size * stride(size, size * if q > o { q } else { o });
                let rest = if self.query_in_memory > 0 { stride(size, self.query_in_memory * size) } else { 0 };
                let used = tiles + self.rows(size) * rest;
                8 * if used > staged { used } else { staged }
            }
            // And the scores in f32, the probabilities in f16.
            CoopForm::WorkgroupMemory => 8 * tiles + 6 * self.rows(size) * (self.keys + 8) + 16,
        }
    }

    /// Workgroup memory of `shaders/kernel/backward_bias_coop.wgsl`, through which whole rows of Q and dO pass.
    pub const fn bias_gradient_bytes(&self, size: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        let (k_stride, v_stride) = (stride(size, head_dim), stride(size, head_dim_v));
        let tiles = self.keys * (k_stride + v_stride);
        let rows = self.rows(size) * if k_stride > v_stride { k_stride } else { v_stride };
        8 * if tiles > rows { tiles } else { rows }
    }

    /// Workgroup memory of `shaders/kernel/forward_coop_scaled.wgsl`, with elements of so many parts.
    pub const fn scaled_workgroup_bytes(&self, size: u32, parts: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        let (k_stride, v_stride) = (stride(size, head_dim), stride(size, head_dim_v));
        let tiles = parts * self.keys * (k_stride + v_stride);
        let rows = self.rows(size) * k_stride;
        let sizes = self.rows(size) + 2 * self.keys;
        8 * if tiles > rows { tiles } else { rows } + self.subgroups * (16 + 4 * size * size) + 4 * sizes
    }

    /// The tile, made smaller where blocks of so many queries and keys do not divide into tiles of it, if there is a smaller one that does.
    pub(crate) fn in_blocks(mut self, size: u32, [queries, keys]: [u32; 2]) -> Self {
        while !queries.is_multiple_of(self.rows(size)) && self.row_matrices * self.subgroups > 1 {
            let halved = if self.row_matrices > 1 { &mut self.row_matrices } else { &mut self.subgroups };
            *halved /= 2;
        }
        self.keys = step_in_block(self.keys, size, keys);
        if !(self.keys / size).is_multiple_of(self.turns) {
            self.turns = 1;
        }
        self
    }

    /// The tile in registers, or the one with half of its subgroups if a device's limits are too small for all of them.
    pub(crate) fn in_limits(self, format: MatrixFormat, dims: [u32; 2], limits: &wgpu::Limits) -> Self {
        let bytes = |tile: &Self| tile.workgroup_bytes(CoopForm::Registers, format.size, dims[0], dims[1]);
        let fits = |tile: &Self| fits(limits, tile.subgroups * format.lanes, bytes(tile));
        let half = Self { subgroups: self.subgroups / 2, ..self };
        if !fits(&self) && half.subgroups > 0 && fits(&half) { half } else { self }
    }

    /// Checks that the tile divides as the shader needs it to, for rows of Q of `head_dim` elements.
    pub fn validate(&self, form: CoopForm, size: u32, head_dim: u32) -> Result<(), Error> {
        // Bounds the arithmetic of workgroup_bytes.
        if [self.subgroups, self.row_matrices, self.keys].iter().any(|&n| n == 0 || n > 1024) {
            return Err(Error::Tile("every size must be from 1 to 1024"));
        }
        if self.subgroups * self.row_matrices > 1024 {
            return Err(Error::Tile("subgroups times row_matrices must be at most 1024"));
        }
        if form == CoopForm::Registers && self.row_matrices > 8 {
            return Err(Error::Tile(
                "row_matrices must be at most 8 in registers, whose kernel is written out for each of them",
            ));
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
        if self.turns == 0 || !(self.keys / size).is_multiple_of(self.turns) {
            return Err(Error::Tile("turns must be at least 1 and divide keys over the size of a matrix"));
        }
        if self.query_in_memory >= head_dim.div_ceil(size) {
            return Err(Error::Tile("query_in_memory must be less than the matrices across the head dim"));
        }
        if form == CoopForm::WorkgroupMemory {
            self.validate_whole()?;
        }
        Ok(())
    }

    /// Checks that a kernel that takes steps whole, with all of Q in registers, can have the tile.
    fn validate_whole(&self) -> Result<(), Error> {
        if (self.turns, self.query_in_memory) != (1, 0) {
            return Err(Error::Tile(
                "turns and query_in_memory are for f16 in registers, and for bf16 on matrices of bf16",
            ));
        }
        Ok(())
    }

    /// `validate` for `shaders/kernel/forward_coop_scaled.wgsl`, whose subgroups have `lanes` lanes.
    pub fn validate_scaled(&self, size: u32, lanes: u32) -> Result<(), Error> {
        self.validate_whole()?;
        self.validate(CoopForm::Registers, size, size)?;
        if self.buffers != 1 {
            return Err(Error::Tile("buffers must be 1 for f32 and scaled bf16"));
        }
        if self.subgroups > lanes {
            return Err(Error::Tile("a workgroup must have at most as many subgroups as a subgroup has lanes"));
        }
        Ok(())
    }
}

/// The tile of the cooperative-matrix kernel for a problem, by the size of the device's matrices.
///
/// With matrices of 16 they were measured on an H100 and an H200, above a head dim of 128 at 160, 192 and 256 in f16 (docs/performance.md,
/// docs/tuning/forward-coop.md). Through workgroup memory those above 128 follow from counting. Matrices of 8 with access to their elements only a processor
/// is known to have, which takes its time to compile large tiles; the other form has what fits 32 KiB.
pub fn coop_tile(form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> CoopTile {
    let tile = CoopTile::new;
    match (form, size, head_dim.max(head_dim_v)) {
        (CoopForm::Registers, 16, 0..=64) => tile(4, 2, 32, 1),
        (CoopForm::Registers, 16, 65..=128) => tile(8, 1, 64, 1),
        (CoopForm::Registers, 16, 129..=192) => tile(8, 1, 32, 1),
        (CoopForm::Registers, 16, _) => tile(8, 1, 16, 2),
        (CoopForm::Registers, _, 0..=128) => tile(4, 1, 8, 1),
        (CoopForm::Registers, _, _) => tile(2, 1, 8, 2),
        (CoopForm::WorkgroupMemory, 16, 0..=64) => tile(4, 2, 16, 1),
        (CoopForm::WorkgroupMemory, 16, 65..=128) => tile(8, 1, 32, 1),
        (CoopForm::WorkgroupMemory, 16, _) => tile(4, 1, 16, 1),
        (CoopForm::WorkgroupMemory, _, 0..=128) => tile(4, 2, 16, 1),
        (CoopForm::WorkgroupMemory, _, _) => tile(2, 2, 16, 1),
    }
}

/// Whether a device's limits are large enough for workgroups of so many invocations and bytes of workgroup memory.
pub(super) fn fits(limits: &wgpu::Limits, invocations: u32, bytes: u32) -> bool {
    bytes <= limits.max_compute_workgroup_storage_size && invocations <= limits.max_compute_invocations_per_workgroup
}

/// Vectors of four from one row of so many elements to the next in workgroup memory, with matrices of `size` columns.
pub(super) const fn stride(size: u32, dim: u32) -> u32 {
    dim.next_multiple_of(size) / 4 + 2
}

/// The largest step, of multiples of `unit` up to this one, that divides a block; this one if none does.
pub(super) fn step_in_block(step: u32, unit: u32, block: u32) -> u32 {
    (1..=step / unit).rev().map(|n| n * unit).find(|&n| block.is_multiple_of(n)).unwrap_or(step)
}

/// Queries and keys from which on plans take [`long_coop_tile`], if it gives the device enough workgroups.
pub(crate) const LONG: u32 = 16384;

/// The tile for long rows, where there is a better one than that of [`coop_tile`]. An H100 then is at its limit of power, and 256 rows read K and V half
/// as often as 128 do: with them 1·16·16384·64 has 287 to 300 TFLOP/s, without 273 to 295 (docs/performance.md).
pub fn long_coop_tile(form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> Option<CoopTile> {
    let measured = (form, size) == (CoopForm::Registers, 16) && head_dim.max(head_dim_v) <= 64;
    measured.then_some(CoopTile::new(8, 2, 64, 1))
}

/// Queries, and keys that the last of them sees, from which on plans take [`wide_coop_tile`], if it gives the device enough workgroups; under a
/// mask that lets rows see more keys the later they are, four times as many. With fewer, its 256 rows visit more scores that do not count: at
/// 1,024 causal queries 11 % more than 128 rows, by count.
pub(crate) const WIDE: u32 = 1024;

/// The tile of [`coop_tile`]'s kernel where scores are the plain ones, if there is a better one: each matrix of K and V that is loaded then serves
/// two matrices of rows. Registers do not hold all of Q beside O, nor S of 32 keys at the larger head dims (docs/tuning/forward-coop.md).
pub fn wide_coop_tile(form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> Option<CoopTile> {
    let (turns, query_in_memory) = match (form, size, head_dim.max(head_dim_v)) {
        (CoopForm::Registers, 16, 65..=80) => (1, 0),
        (CoopForm::Registers, 16, 81..=112) => (1, 1),
        (CoopForm::Registers, 16, 113..=128) => (2, 2),
        _ => return None,
    };
    let most = head_dim.div_ceil(size) - 1;
    Some(CoopTile::new(8, 2, 32, 1).with_turns(turns, query_in_memory.min(most)))
}

/// The tile for elements that are made f16, `shaders/kernel/forward_coop_scaled.wgsl`.
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
    CoopTile::new(subgroups, row_matrices, keys, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

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
                let others = [long_coop_tile, wide_coop_tile].map(|table| table(form, size, head_dim, head_dim_v));
                for tile in [short].into_iter().chain(others.into_iter().flatten()) {
                    tile.validate(form, size, head_dim).unwrap();
                    let used = tile.workgroup_bytes(form, size, head_dim, head_dim_v);
                    assert!(used <= bytes, "{form} {size} {head_dim} {head_dim_v} {tile:?} {used} > {bytes}");
                }
            }
        }
    }
}
