//! What a caller may decide of a plan.

use crate::names::{CoopForm, Kernel};
use crate::tune::{BackwardTile, CoopBackwardTile, CoopTile, DecodeTile, FusedTile, Tile};

/// Choices that [`Context::plan`](crate::Context::plan) makes by itself and [`Context::plan_with`](crate::Context::plan_with) takes.
///
/// An option for a kernel that the plan does not take is an [`Error::OptionUnused`](crate::Error::OptionUnused): `splits` where the plan takes
/// the tile kernel, say. Only `backward` may also be given for a problem without gradients, so that one value serves training and inference.
/// The options of tiles name types that may change in any release (see [the crate's documentation](crate#what-may-change)).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct PlanOptions {
    /// The kernel; `None` lets the plan choose.
    pub kernel: Option<Kernel>,
    /// The kernel of the backward pass, of a problem with gradients; `None` lets the plan choose.
    pub backward: Option<Kernel>,
    /// The form of the coop kernel, forward and backward; `None` takes the faster of those that the device allows.
    pub coop_form: Option<CoopForm>,
    /// Scales bf16 to f16 in the coop kernel also where the device has matrices of bf16, forward and backward: slower, to be compared with, and
    /// for scores above ±10⁷. For problems in bf16 only: others are an [`Error::OptionElementType`](crate::Error::OptionElementType).
    pub scaled_bf16: bool,
    /// Into how many splits the decode kernel cuts the keys; `None` takes `tune::decode_splits`.
    pub splits: Option<u32>,
    /// The tile of the tile kernel; `None` takes `tune::tile`.
    #[doc(hidden)]
    pub tile: Option<Tile>,
    /// The tile of the coop kernel; `None` takes `tune::coop_tile`, or `tune::coop_scaled_tile` for f32 and scaled bf16.
    #[doc(hidden)]
    pub coop_tile: Option<CoopTile>,
    /// The tile of the decode kernel; `None` takes `tune::decode_tile`.
    #[doc(hidden)]
    pub decode_tile: Option<DecodeTile>,
    /// The tile of the backward pass' tile kernels, of which each computes the scores; `None` takes `tune::backward_tiles`
    /// unless there is a `fused_tile`.
    #[doc(hidden)]
    pub backward_tile: Option<BackwardTile>,
    /// The tile of the backward pass' tile kernel that computes all gradients at once, in f32; `None` takes `tune::fused_tile`, or the
    /// other kernels where there is a `backward_tile`.
    #[doc(hidden)]
    pub fused_tile: Option<FusedTile>,
    /// The tiles of the backward pass' coop kernels, of the gradients of keys and values and of queries; `None` takes
    /// `tune::coop_backward_tiles`, or `tune::coop_scaled_backward_tiles` for f32 and scaled bf16.
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

    /// bf16 scaled to f16 in the coop kernel.
    pub const fn scaled_bf16(mut self, scaled_bf16: bool) -> Self {
        self.scaled_bf16 = scaled_bf16;
        self
    }

    /// Into how many splits the decode kernel divides the keys: from 1 to the device's `max_compute_workgroups_per_dimension`, else the plan is an error
    /// ([`Error::Splits`](crate::Error::Splits)). Splits without a tile of keys are launched all the same: each takes workspace, f32 of the size of o. By
    /// itself a plan takes as many as fill the device.
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
