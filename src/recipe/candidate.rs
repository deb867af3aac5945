//! What a kernel would run for a problem, and which of several kernels is taken.

use crate::error::Error;
use crate::kernel::{Cut, Part, Pass, Slot};
use crate::names::{CoopForm, Kernel};
use crate::problem::Problem;
use crate::tune::Tile;

/// What a kernel runs for each part of a problem.
pub(crate) struct Recipe {
    pub kernel: Kernel,
    pub reason: &'static str,
    /// The coop kernel's form, and why.
    pub coop_form: Option<(CoopForm, String)>,
    /// How many elements are moved at a time, where rows lie so that it can be.
    pub vector: u32,
    pub passes: Vec<Pass>,
    pub workspaces: Workspaces,
    /// How a problem that is too large for one launch may be cut.
    pub cut: Cut,
    /// Splits of the keys, for the decode kernel.
    pub splits: Option<u32>,
    /// The tile kernel's tile, forward.
    pub tile: Option<Tile>,
    /// Queries and keys of a tile, for forward kernels that have tiles.
    pub rows_and_keys: Option<(u32, u32)>,
}

/// What a part of a problem keeps in the workspace, and how many bytes of it.
pub(crate) type Workspaces = Box<dyn Fn(&Part) -> Vec<(Slot, u64)>>;

/// Queries and keys of a block of the problem's block lists.
pub(super) fn block(problem: &Problem) -> Option<[u32; 2]> {
    problem.blocks.map(|blocks| [blocks.queries, blocks.keys])
}

/// An error if blocks do not divide into tiles of so many queries and keys.
pub(super) fn check_blocks(kernel: Kernel, problem: &Problem, tile: [u32; 2], backward: bool) -> Result<(), Error> {
    match block(problem) {
        Some(block) if (0..2).any(|n| !block[n].is_multiple_of(tile[n])) => {
            Err(Error::BlockTile { kernel, backward, block, tile })
        }
        _ => Ok(()),
    }
}

/// A kernel that a plan may take.
pub(super) struct Candidate {
    pub kernel: Kernel,
    /// Whether it takes the problem.
    pub takes: bool,
    /// Why, if it does.
    pub reason: &'static str,
}

/// The kernel that is asked for, or the first candidate that takes the problem; and why.
pub(super) fn first(asked: Option<Kernel>, candidates: impl FnOnce() -> Vec<Candidate>) -> (Kernel, &'static str) {
    match asked {
        Some(kernel) => (kernel, "asked for"),
        None => {
            let taken = candidates().into_iter().find(|candidate| candidate.takes);
            taken.map_or((Kernel::Tile, ANYWHERE), |candidate| (candidate.kernel, candidate.reason))
        }
    }
}

/// What the table gives for these limits. Where a tile takes `used` bytes of workgroup memory and dropout takes `more` than is left, it is what
/// the table gives for limits that leave room.
pub(super) fn with_room<T>(
    limits: &wgpu::Limits,
    table: impl Fn(&wgpu::Limits) -> T,
    used: impl Fn(&T) -> u32,
    more: impl Fn(&T) -> u32,
) -> T {
    let tile = table(limits);
    let memory = limits.max_compute_workgroup_storage_size;
    let more = more(&tile);
    if used(&tile).saturating_add(more) <= memory {
        return tile;
    }
    let max_compute_workgroup_storage_size = memory.saturating_sub(more);
    table(&wgpu::Limits { max_compute_workgroup_storage_size, ..limits.clone() })
}

/// Why a plan takes the tile kernel.
pub(super) const ANYWHERE: &str = "it runs on every device and computes every problem";
/// Why a plan takes the naive kernel.
pub(super) const SHORT_SEQUENCES: &str = "sequences so short that tiles would be nearly empty";
