//! The kernels on cooperative matrices, backward.

use super::coop::{CoopTile, fits, step_in_block, stride};
use crate::error::Error;
use crate::matrices::MatrixFormat;
use crate::names::{CoopForm, ElementType};

/// The tile of a backward kernel on cooperative matrices, `shaders/kernel/backward_dkdv_coop.wgsl` or
/// `shaders/kernel/backward_dq_coop.wgsl`, through workgroup memory `shaders/kernel/backward_dkdv_coop_workgroup.wgsl` or
/// `shaders/kernel/backward_dq_coop_workgroup.wgsl`, or for f32 and scaled bf16 `shaders/kernel/backward_dkdv_coop_scaled.wgsl` or
/// `shaders/kernel/backward_dq_coop_scaled.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CoopBackwardTile {
    /// Subgroups in a workgroup; even for f32 and scaled bf16.
    pub subgroups: u32,
    /// Matrices of keys (for the gradients of keys and values) or of queries (for that of queries) that a subgroup owns,
    /// or for f32 and scaled bf16 a pair of subgroups.
    pub matrices: u32,
    /// Queries, or keys, that a step of the loop takes; a multiple of the matrices' size.
    pub step: u32,
    /// Columns of a gradient that a workgroup computes; a multiple of the matrices' size. With fewer than the head dim,
    /// scores are computed once for each block of them. For f32 and scaled bf16 at least the head dims.
    pub columns: u32,
    /// Whether the next step's tile is loaded while one is in use. It takes registers: where dK and dV are one block of columns, V then stays in
    /// workgroup memory ([`holds_value`](Self::holds_value)).
    pub ahead: bool,
}

impl CoopBackwardTile {
    /// Keys, or queries, that a workgroup owns, with matrices of `size` rows.
    pub const fn own(&self, size: u32) -> u32 {
        self.subgroups * self.matrices * size
    }

    /// The tile, made smaller where blocks of so many queries and keys, or keys and queries, that are owned and stepped over, do not divide into
    /// tiles of it, if there is a smaller one that does. Of f32 and scaled bf16 two subgroups own the same ones.
    pub(crate) fn in_blocks(mut self, size: u32, scaled: bool, [own, step]: [u32; 2]) -> Self {
        let share = 1 + scaled as u32;
        while !own.is_multiple_of((self.own(size) / share).max(1)) && self.matrices * self.subgroups > share {
            if self.matrices > 1 {
                self.matrices /= 2;
            } else {
                self.subgroups -= share;
            }
        }
        self.step = step_in_block(self.step, size, step);
        self
    }

    /// The tile, or one with half of its step or of its subgroups if a device's limits are too small for it, if such a tile fits. `bytes` is the
    /// workgroup memory of a tile.
    pub(crate) fn in_limits(self, format: MatrixFormat, limits: &wgpu::Limits, bytes: impl Fn(&Self) -> u32) -> Self {
        let half_step = (self.step / 2 / format.size * format.size).max(format.size);
        let sizes = [self.subgroups, self.subgroups / 2].map(|n| [(n, self.step), (n, half_step)]);
        let tiles = sizes.into_iter().flatten().map(|(subgroups, step)| Self { subgroups, step, ..self });
        let mut fitting = tiles.filter(|tile| tile.subgroups > 0 && tile.fits(format, limits, &bytes));
        fitting.next().unwrap_or(self)
    }

    /// Whether a device's limits are large enough.
    pub(crate) fn fits(&self, format: MatrixFormat, limits: &wgpu::Limits, bytes: impl Fn(&Self) -> u32) -> bool {
        fits(limits, self.subgroups * format.lanes, bytes(self))
    }

    /// Blocks of columns of gradients with rows of `dim`.
    pub const fn blocks(&self, dim: u32) -> u32 {
        dim.div_ceil(self.columns)
    }

    /// Whether V is in registers, where the gradients of keys and values leave room: when no tile is loaded ahead, or they are computed in
    /// blocks. In the form through workgroup memory it always is.
    pub const fn holds_value(&self, head_dim: u32, head_dim_v: u32) -> bool {
        !self.ahead || self.blocks(head_dim) > 1 || self.blocks(head_dim_v) > 1
    }

    /// Vectors of four from one row to the next in workgroup memory, of whole rows and of a block's.
    const fn strides(&self, size: u32, dim: u32) -> (u32, u32) {
        let (whole, block) = (stride(size, dim), stride(size, self.columns));
        (whole, if whole < block { whole } else { block })
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

    /// Keys, or queries, that a workgroup owns for f32 and scaled bf16.
    pub const fn scaled_own(&self, size: u32) -> u32 {
        self.own(size) / 2
    }

    /// Workgroup memory in bytes of the kernel for keys and values for f32 and scaled bf16, with elements of so many parts.
    pub const fn scaled_dkdv_bytes(&self, size: u32, parts: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        self.scaled_dq_bytes(size, parts, head_dim, head_dim_v) + 8 * self.step
    }

    /// The same of the kernel for queries.
    pub const fn scaled_dq_bytes(&self, size: u32, parts: u32, head_dim: u32, head_dim_v: u32) -> u32 {
        let widest = if head_dim > head_dim_v { head_dim } else { head_dim_v };
        let stride = stride(size, widest);
        let rows = if parts * self.step > self.scaled_own(size) { parts * self.step } else { self.scaled_own(size) };
        let matrices = self.matrices * (self.step / size);
        let exchange = self.subgroups / 2 * if matrices > 2 { matrices } else { 2 } * size * size;
        16 * rows * stride + 4 * exchange + 16 * self.subgroups + 8 * (self.scaled_own(size) + self.step)
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

    /// The same for f32 and scaled bf16, with subgroups of `lanes` lanes and rows of `widest` elements at most.
    pub fn validate_scaled(&self, size: u32, lanes: u32, widest: u32) -> Result<(), Error> {
        self.validate(size)?;
        if !self.subgroups.is_multiple_of(2) {
            return Err(Error::Tile("subgroups must be even for f32 and scaled bf16"));
        }
        if self.subgroups > lanes {
            return Err(Error::Tile("a workgroup must have at most as many subgroups as a subgroup has lanes"));
        }
        if self.columns < widest {
            return Err(Error::Tile("columns must be at least the head dims for f32 and scaled bf16"));
        }
        Ok(())
    }
}

/// The tiles of the backward kernels on cooperative matrices, by the size of the device's matrices: of the gradients of keys
/// and values, and of queries.
///
/// Those with matrices of 16 were measured on an H100 and an H200 (docs/tuning/coop-backward.md), through workgroup memory up to a head dim of
/// 128, in registers above 128 at 160, 192 and 256. The others follow from counting: K, V, dK and dV of a subgroup take 192 registers a lane
/// with matrices of 16, half as many with Metal's of 8, and steps are as long as 48 and 32 KiB then allow.
pub fn coop_backward_tiles(form: CoopForm, size: u32, head_dim: u32, head_dim_v: u32) -> [CoopBackwardTile; 2] {
    let tile =
        |subgroups, matrices, step, columns, ahead| CoopBackwardTile { subgroups, matrices, step, columns, ahead };
    match (form, size, head_dim.max(head_dim_v)) {
        (CoopForm::Registers, 16, 0..=64) => [tile(8, 2, 32, 64, true), tile(4, 2, 32, 64, true)],
        (CoopForm::Registers, 16, 65..=128) => [tile(8, 1, 16, 128, true), tile(8, 1, 48, 128, true)],
        (CoopForm::Registers, 16, 129..=160) => [tile(8, 1, 64, 80, false), tile(8, 1, 48, 160, false)],
        (CoopForm::Registers, 16, 161..=192) => [tile(8, 1, 32, 96, false), tile(6, 1, 32, 192, false)],
        (CoopForm::Registers, 16, _) => [tile(8, 1, 32, 64, false), tile(8, 1, 32, 128, false)],
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

/// How many steps of [`lean_coop_backward_tiles`] the queries must have, and the keys that the last of them sees, that plans take those tiles: a
/// step that is cut short costs as much as a whole one.
pub(crate) const LEAN_STEPS: u32 = 8;

/// The tiles of [`coop_backward_tiles`]'s kernels where scores take few registers of their own (`has_lean_scores` in `src/recipe/coop.rs`), if
/// there are better ones. V is in registers and steps are long, so that nothing is loaded ahead: docs/tuning/coop-backward.md has the times.
pub fn lean_coop_backward_tiles(
    form: CoopForm,
    size: u32,
    head_dim: u32,
    head_dim_v: u32,
) -> Option<[CoopBackwardTile; 2]> {
    let [dkdv, dq] = coop_backward_tiles(form, size, head_dim, head_dim_v);
    let step = match (form, size, head_dim.max(head_dim_v)) {
        (CoopForm::Registers, 16, 0..=64) => 128,
        (CoopForm::Registers, 16, 65..=128) => 64,
        _ => return None,
    };
    Some([CoopBackwardTile { step, ahead: false, ..dkdv }, dq])
}

/// The tiles for f32 and scaled bf16. Registers: at head dim 64, of the first kernel, 64 of a lane hold both parts of K or V, 64 dV or
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

/// The tile of the gradient of the bias on cooperative matrices. At head dim 64 a lane has 32 registers of sums, and 32 of Q and dO; with twice as many
/// of each the kernel took a fifth longer on an H200.
pub fn bias_gradient_tile(size: u32, head_dim: u32, head_dim_v: u32) -> CoopTile {
    let tile = |subgroups, row_matrices, keys| CoopTile::new(subgroups, row_matrices, keys, 1);
    match (size, head_dim.max(head_dim_v)) {
        (16, 0..=128) => tile(8, 1, 64),
        (16, _) => tile(4, 1, 32),
        _ => tile(2, 2, 16),
    }
}

#[cfg(test)]
mod tests {
    use super::super::coop::coop_tile;
    use super::super::limits;
    use super::*;

    /// With 32 KiB, and with 64 lanes of 256 invocations, wide heads get smaller tiles instead of none.
    #[test]
    fn small_limits_get_smaller_tiles() {
        let form = CoopForm::Registers;
        for (lanes, limits) in [(32, limits(32 << 10, 1024)), (64, limits(48 << 10, 256))] {
            let format = MatrixFormat { size: 16, lanes };
            for dim in (129..=240).chain([256]) {
                let [dkdv, dq] = coop_backward_tiles(form, 16, dim, dim);
                let of_dkdv = |tile: &CoopBackwardTile| tile.dkdv_bytes(form, 16, dim, dim);
                let of_dq = |tile: &CoopBackwardTile| tile.dq_bytes(form, 16, dim, dim);
                let forward = coop_tile(form, 16, dim, dim).in_limits(format, [dim, dim], &limits);
                // 16 keys of 256 columns in two buffers, and 32 rows of them, take more than 32 KiB.
                let fits = dim <= 240 || lanes == 64;
                let bytes = forward.workgroup_bytes(form, 16, dim, dim);
                assert_eq!(bytes <= limits.max_compute_workgroup_storage_size, fits, "{dim} {forward:?}");
                assert!(dkdv.in_limits(format, &limits, of_dkdv).fits(format, &limits, of_dkdv), "{dim}");
                assert!(dq.in_limits(format, &limits, of_dq).fits(format, &limits, of_dq), "{dim}");
            }
        }
    }

    /// The number of subgroups need not be halved.
    #[test]
    fn tiles_in_blocks_keep_most_subgroups() {
        let tile = |subgroups, matrices| CoopBackwardTile { subgroups, matrices, step: 32, columns: 64, ahead: false };
        for (own, taken, expected) in
            [(64, tile(6, 1), 4), (96, tile(8, 1), 6), (128, tile(8, 2), 8), (16, tile(8, 2), 1)]
        {
            assert_eq!(taken.in_blocks(16, false, [own, 64]), tile(expected, 1), "{own}");
        }
        assert_eq!(tile(8, 1).in_blocks(16, true, [48, 64]), tile(6, 1));
    }

    #[test]
    fn every_head_dim_gets_coop_tiles_that_fit() {
        for (size, bytes) in [(8, 32 << 10), (16, 48 << 10)] {
            for (head_dim, head_dim_v) in (1..=256).flat_map(|d| [1, 40, 64, 128, 200, 256, d].map(|v| (d, v))) {
                for form in [CoopForm::Registers, CoopForm::WorkgroupMemory] {
                    let usual = coop_backward_tiles(form, size, head_dim, head_dim_v);
                    let lean = lean_coop_backward_tiles(form, size, head_dim, head_dim_v);
                    for [dkdv, dq] in [usual].into_iter().chain(lean) {
                        for (tile, used) in [
                            (dkdv, dkdv.dkdv_bytes(form, size, head_dim, head_dim_v)),
                            (dq, dq.dq_bytes(form, size, head_dim, head_dim_v)),
                        ] {
                            tile.validate(size).unwrap();
                            assert!(used <= bytes, "{form} {head_dim} {head_dim_v} {tile:?} {used} > {bytes}");
                        }
                    }
                }
                let used =
                    bias_gradient_tile(size, head_dim, head_dim_v).bias_gradient_bytes(size, head_dim, head_dim_v);
                assert!(used <= bytes, "bias {head_dim} {head_dim_v} {used} > {bytes}");
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
}
