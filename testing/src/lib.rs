//! What the tests, benches and examples share.
//!
//! **Cases.** A [`Case`] says what to compute and how its tensors lie in memory. Gaps in the inputs, and keys past their length, hold
//! NaN; outputs and workspace hold NaN before each run, and what is not the output's must hold it afterwards. [`cases`] is the
//! table of them, [`Prepared`] and [`backward::PreparedBackward`] run them and compare with the oracle. `tests/web` runs cases in
//! a browser, where nothing may wait: there `submit` and `take` stand for `run`.
//!
//! **Modules.** [`switches`], [`loops`], [`stores`] and [`coop`] are for tests of shaders, without a device.
//!
//! **Commands.** [`buffers`], [`sample`], [`timing`], [`output`] and [`terminal`] are what commands on large tensors need;
//! [`transformer`] and [`attention`] are the model that `examples/train.rs` trains.

#[cfg(not(target_arch = "wasm32"))]
pub mod attention;
pub mod backward;
#[cfg(not(target_arch = "wasm32"))]
pub mod buffers;
mod case;
pub mod cases;
#[cfg(not(target_arch = "wasm32"))]
pub mod coop;
#[cfg(not(target_arch = "wasm32"))]
pub mod devices;
mod extras;
mod forward;
pub mod loops;
mod memory;
#[cfg(not(target_arch = "wasm32"))]
pub mod output;
#[cfg(not(target_arch = "wasm32"))]
pub mod sample;
#[cfg(not(target_arch = "wasm32"))]
pub mod skipped;
#[cfg(not(target_arch = "wasm32"))]
pub mod stores;
pub mod switches;
#[cfg(not(target_arch = "wasm32"))]
pub mod terminal;
#[cfg(not(target_arch = "wasm32"))]
pub mod timing;
#[cfg(not(target_arch = "wasm32"))]
pub mod transformer;

pub use case::{Case, Inputs, case};
#[cfg(not(target_arch = "wasm32"))]
pub use devices::{assert_split, every_kernel, full, webgpu, with_bindings, with_features, with_limits};
pub use extras::{DeviceExtras, Extras, bytes_of, score_elements};
#[cfg(not(target_arch = "wasm32"))]
pub use forward::check_all;
pub use forward::{Bits, Prepared, TYPES, decode, naive, tile, tiled};
pub use memory::{from_bits, to_bits};
