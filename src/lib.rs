//! Exact attention, `softmax(scale · QKᵀ) V`, as WGSL compute shaders on [`wgpu`].
//!
//! The scores are never stored: a workgroup takes a tile of queries through the keys with an online softmax, as
//! FlashAttention does, so memory beyond the tensors does not grow with the square of the length. All kernels but those
//! on cooperative matrices have a form within WebGPU's default limits and need no device feature. Queries may have more heads
//! than keys, every tensor any strides with a contiguous last dimension; masks are causal (either diagonal), sliding
//! windows and key lengths by batch entry.
//!
//! With host slices, as PyTorch's function of the same name:
//!
//! ```
//! use wgpu_flash_attention::{Context, HostTensor, SdpaOptions};
//!
//! # fn main() -> Result<(), wgpu_flash_attention::Error> {
//! // One batch entry, one head, two positions, head dim 2. Each query sees the keys up to its own position.
//! let shape = [1, 1, 2, 2];
//! let query = HostTensor { data: &[1.0f32, 0.0, 0.0, 1.0], shape };
//! let key = HostTensor { data: &[0.0, 0.0, 0.0, 3f32.ln()], shape };
//! let value = HostTensor { data: &[4.0, 40.0, 8.0, 80.0], shape };
//! let options = SdpaOptions::default().is_causal(true).scale(1.0);
//!
//! let context = Context::headless()?;
//! let out = context.scaled_dot_product_attention(query, key, value, &options)?;
//!
//! // The first query sees the first key only; the second weighs them 1 to 3.
//! let expected = [4.0, 40.0, 7.0, 70.0];
//! assert!(out.iter().zip(expected).all(|(o, e)| (o - e).abs() < 1e-4 * e), "{out:?}");
//! # Ok(())
//! # }
//! ```
//!
//! With a device, buffers and an encoder of your own:
//!
//! - [`Problem`] is plain data: a [`Shape`], an [`ElementType`], a [`Layout`] for each tensor, masks, scale.
//! - [`Context`] holds a device and the pipelines built for it.
//! - [`Context::plan`] checks the problem and chooses kernel and tile. The [`Plan`] it gives says in words what it does
//!   (`println!("{plan}")`) and how large a workspace it needs.
//! - [`Plan::forward`] records into your encoder. It submits nothing, allocates no buffer, and on an [`Error`] has
//!   recorded nothing.
//! - [`Plan::backward`] does the same for the gradients of q, k and v, if the problem was made
//!   [`with_gradients`](Problem::with_gradients).
//!
//! `examples/own_device.rs` is a complete program of this kind, `examples/attend.rs` a command that compares the kernels
//! with your own framework on a safetensors file, `examples/train.rs` one that trains a small transformer on the device.
//! [`mod@reference`] has the same mathematics in f64 on the host, in loops one can read.
//!
//! # What may change
//!
//! Types that will grow are `#[non_exhaustive]`: they are made by constructors and methods, and their public fields may be read
//! and set. The modules `tune` (tiles by device), `specialize` (how a shader file becomes a module) and `elements`, and the
//! choices of tiles in [`PlanOptions`], are public for the crate's own tests and tools. They are not in these pages and may
//! change in any release.
#![deny(unsafe_code)]
#![warn(missing_docs)]

mod backward;
mod context;
#[doc(hidden)]
pub mod elements;
mod error;
mod faults;
mod forward;
mod host;
mod kernel;
mod merge;
mod overlap;
mod passthrough;
mod plan;
mod problem;
pub mod reference;
#[doc(hidden)]
pub mod specialize;
#[doc(hidden)]
pub mod tune;

pub use backward::BackwardBuffers;
pub use context::Context;
pub use elements::{MATRIX_FEATURES as COOPERATIVE_MATRIX_FEATURES, NoMatrices};
pub use error::Error;
pub use forward::{BoundPass, ForwardBuffers, ToBinding, ToOptionalBinding};
pub use host::{Element, HeadlessOptions, HostTensor, SdpaOptions};
pub use kernel::{CoopForm, Kernel};
pub use merge::{MergeBuffers, MergePlan, MergeProblem};
pub use plan::{Plan, PlanOptions};
pub use problem::{Causal, ElementType, Gradients, Layout, MAX_HEAD_DIM, MAX_SEQLEN, Problem, Shape, Tensor};
pub use wgpu;

// The README's code compiles, too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
