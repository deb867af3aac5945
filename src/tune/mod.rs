//! Which tile a kernel uses, by head dimension and device. Pure: numbers in, numbers out.

mod backward;
mod coop;
mod coop_backward;
mod decode;
mod fused;
mod tile;

pub(crate) use backward::backward_tiles_in_blocks;
pub use backward::{BackwardTile, backward_tiles};
pub use coop::{CoopTile, coop_scaled_tile, coop_tile, long_coop_tile, wide_coop_tile};
pub(crate) use coop::{LONG, WIDE};
pub(crate) use coop_backward::LEAN_STEPS;
pub use coop_backward::{
    CoopBackwardTile, bias_gradient_tile, coop_backward_tiles, coop_scaled_backward_tiles, lean_coop_backward_tiles,
};
pub(crate) use decode::FULL_DEVICE;
pub use decode::{DecodeTile, decode_splits, decode_tile};
pub(crate) use fused::MOST_ROUNDS;
pub use fused::{FusedTile, fused_tile};
pub use tile::{Tile, tile};
pub(crate) use tile::{dropout_bytes, tile_in_blocks};

/// A device's limits, for the tests of the tables.
#[cfg(test)]
fn limits(bytes: u32, invocations: u32) -> wgpu::Limits {
    wgpu::Limits {
        max_compute_workgroup_storage_size: bytes,
        max_compute_invocations_per_workgroup: invocations,
        ..Default::default()
    }
}
