//! Exact attention, `softmax(scale · QKᵀ) V`, as WGSL compute shaders on [`wgpu`].
//!
//! The scores are never stored: a workgroup takes a tile of queries through the keys with an online softmax, as
//! FlashAttention does, so memory beyond the tensors does not grow with the square of the length. All kernels but those
//! on cooperative matrices have a form within WebGPU's default limits and need no device feature. Queries may have more heads
//! than keys, every tensor any strides with a contiguous last dimension; masks are causal (either diagonal), sliding
//! windows, lengths of keys and queries by batch entry, and boolean masks. Scores may be capped softly and have a bias or ALiBi's terms added; heads
//! may have sinks.
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
//! `examples/own_device.rs` is a complete program of this kind, `examples/attend` a command that compares the kernels
//! with your own framework on a safetensors file, `examples/train.rs` one that trains a small transformer on the device.
//! [`mod@reference`] has the same mathematics on the host, in loops one can read: in f64, and rounded as each element type rounds. It also
//! says how far a kernel's results may be from that.
//!
//! `examples/decode.rs` is a decode loop on a cache of keys and values. docs/features.md in the repository has a recipe of a few lines for each of
//! the larger features: bias with gradient, boolean mask, ALiBi, sinks, dropout, document mask, block lists, gradients that are added.
//!
//! # Conventions
//!
//! q `[B, Hq, Nq, D]`, k `[B, Hkv, Nk, D]` and v `[B, Hkv, Nk, Dv]` give o `[B, Hq, Nq, Dv]` and, on request, lse `[B, Hq, Nq]`.
//!
//! | subject | convention |
//! |---|---|
//! | order of operations | `s = scale · q·k`, then softcap `c · tanh(s / c)`, then `score_mod`, then ALiBi and bias, then masks, then the sink in the denominator, then softmax, then dropout |
//! | scale | `1/sqrt(D)` by default; from −10³⁰ to 10³⁰, 0 included |
//! | softcap | none by default; from 10⁻³⁰ to 10³⁰ |
//! | grouped heads | `kv_head = q_head / (Hq / Hkv)`; `Hkv` divides `Hq` |
//! | [mods](Problem::with_mods) | `score_mod` and `mask_mod` of your own, in WGSL; the derivative is derived |
//! | [bias](Problem::bias) | `[B, Hq, Nq, Nk]`, each size 1 or full, by strides; f32 or the element type; −∞ and what is below −10³⁰ masks |
//! | [boolean mask](Problem::mask) | `[B, Hq, Nq, Nk]`, likewise; one byte each: a key takes part where it is not 0 |
//! | [ALiBi](Alibi) | `s − slope · abs(i + Nk − Nq − j)`; [`alibi_slopes`] has the slopes of the paper |
//! | [sinks](Problem::sinks) | `[Hq]`, f32: one more score in the denominator, neither scaled nor capped |
//! | causal | [bottom-right](Causal::BottomRight), `j ≤ i + Nk − Nq`, as flash-attention, or [top-left](Causal::TopLeft), `j ≤ i`, as PyTorch |
//! | window | inclusive, from `i + Nk − Nq − left` to `i + Nk − Nq + right`, each side optional |
//! | key lengths, query lengths | how many keys, and queries, of each batch entry count; the bottom-right diagonal, the window, ALiBi and a mod's `Position::shift` use them for `Nk` and `Nq` |
//! | dropout | after the softmax, on probabilities; FlashAttention-2's mask of a seed and an offset, bit for bit ([`Dropout`]). lse is not affected, sinks are not dropped. The decode kernel has none |
//! | block lists | scores count in listed blocks of queries and keys only, where every other mask lets them ([`BlockLists`]); as FlexAttention's `BlockMask` |
//! | lse | natural logarithm, f32; includes scale, softcap, bias, ALiBi, masks and sink |
//! | a query that sees no key | o = 0, lse = −∞ (or its sink), every gradient through it 0 (but that of its sink by lse); never NaN |
//! | `B`, `Nq` or `Nk` of 0 | allowed: the right, possibly zero, result |
//! | element types | q, k, v and o in one of f32, f16, bf16; products, softmax and lse in f32. On cooperative matrices f16 is multiplied, f32 as two parts of 11 bits, and bf16 as it is ([`Bf16Matrices`]) or scaled to f16 |
//! | gradients | in the element type, their sums in f32; those of k and v summed over the query heads that share them; written or, on request, added; those of bias, sinks and slopes on request |
//! | the same input twice | the same bits, of gradients too |
//!
//! # Limits
//!
//! - `D` and `Dv` are 1 to 256, each ([`MAX_HEAD_DIM`]); sequences have at most 2²⁹ positions ([`MAX_SEQLEN`]).
//! - Work that exceeds a binding or a dispatch limit of the device is split, down to a tile of rows of one head. The keys of a head, and
//!   its values, must each lie within one binding (`max_storage_buffer_binding_size`). Of gradients, all that heads sharing a key-value
//!   head read and write must: q, o and their gradients.
//! - There is no packed or paged sequence.
//! - Inputs must be finite where they count: WGSL leaves NaN and infinity undefined. How large scores and values may be is at [`Kernel`].
//! - Offsets of bindings are multiples of the device's `min_storage_buffer_offset_alignment`; finer ones go into [`Layout`].
//!
//! What breaks a limit is an [`Error`] that names the argument, what was found and what would be right, before anything is recorded. Values are the
//! exception: nobody looks at them.
//!
//! # When the device fails
//!
//! What returns a `Result` does not panic. A device that is lost gives [`Error::Device`] from plans, workspaces, uploads and
//! downloads; a device out of memory gives [`Error::OutOfMemory`] from what makes a buffer; and what wgpu or a driver refuses
//! is an [`Error::Device`] in their words. The library catches these in error scopes of its own, so a handler that
//! the device's owner installed does not see them. On an error nothing has been recorded.
//!
//! - Recording on a lost device may be `Ok`: wgpu tells only who set `Device::set_device_lost_callback`. The next download is
//!   an error.
//! - A device that is lost while `Device::poll` waits for it makes wgpu itself panic there, in [`Context::download`] too.
//! - In a browser errors come later than the call: [`Context::plan_async`], [`Context::download_async`] and
//!   [`Context::scaled_dot_product_attention_async`] wait for them, other functions leave them to the device's handler.
//!
//! [`Context::headless`], [`Context::with_cooperative_matrices`], [`Context::download`] and the functions on host slices wait for the
//! device, which their documentation says; the rest of the library never does. Making a plan may take as long as the driver compiles ([`Context::plan`]).
//!
//! # What cannot be checked
//!
//! wgpu does not let a library ask some things about what it is given. They are the caller's to see to:
//!
//! - A buffer of another device is an [`Error::Device`] if both devices are of one `wgpu::Instance`. Of another instance it can
//!   pass for a buffer with the same number there. All that [`Context::headless`] opens is of one instance.
//! - A buffer that is destroyed or mapped, and an encoder that is finished, of another device or has a pass open, give wgpu's own
//!   error when the encoder is finished or submitted.
//! - Inputs that are not finite give wrong numbers.
//!
//! # What may change
//!
//! Types that will grow are `#[non_exhaustive]`: they are made by constructors and methods, and their public fields may be read
//! and set. The modules `facts` (what a device allows), `tune` (tiles by device), `specialize` (how a shader file becomes a module)
//! and `matrices`, the functions `modules`, `merge_module` and `block_modules` (what a plan would compile), `Probe` (variants of attention that only tests
//! plan) and the choices of tiles in [`PlanOptions`] are public for the crate's own tests and tools. They are not in these pages and
//! may change in any release.
#![deny(unsafe_code)]
#![warn(missing_docs)]

mod backward;
mod bind;
mod block_mask;
mod block_plan;
mod blocks;
mod context;
mod dropout;
mod error;
mod explain;
#[doc(hidden)]
pub mod facts;
mod faults;
mod forward;
mod host;
mod kernel;
mod loops;
#[doc(hidden)]
pub mod matrices;
mod merge;
#[cfg(feature = "mods")]
mod mods;
#[cfg(not(feature = "mods"))]
#[path = "mods_off.rs"]
mod mods;
mod names;
mod options;
mod overlap;
mod pipelines;
mod plan;
mod problem;
mod recipe;
pub mod reference;
mod schedule;
#[doc(hidden)]
pub mod specialize;
mod split;
mod transfer;
#[doc(hidden)]
pub mod tune;

pub use backward::BackwardBuffers;
pub use bind::{BoundPass, ToBinding, ToOptionalBinding};
pub use block_mask::{BlockIndices, BlockMask};
#[doc(hidden)]
pub use block_plan::block_modules;
pub use block_plan::{BlockBuffers, BlockPlan, BlockSource};
pub use blocks::lists::BlockLists;
pub use blocks::pattern::BlockPattern;
pub use context::Context;
pub use dropout::Dropout;
pub use error::{Error, ModBufferFault, NoMatrices};
pub use forward::ForwardBuffers;
pub use host::{AttnMask, Element, HeadlessOptions, HostTensor, SdpaOptions};
pub use matrices::MATRIX_FEATURES as COOPERATIVE_MATRIX_FEATURES;
pub use matrices::{Bf16Matrices, NoBf16Matrices};
#[doc(hidden)]
pub use merge::merge_module;
pub use merge::{MergeBuffers, MergePlan, MergeProblem};
#[cfg(feature = "mods")]
pub use mods::{ModError, Mods};
pub use names::{CoopForm, ElementType, Kernel, MAX_HEAD_DIM, MAX_SEQLEN};
pub use options::PlanOptions;
pub use plan::Plan;
#[doc(hidden)]
pub use problem::Probe;
pub use problem::{Alibi, Bias, Causal, Gradients, Layout, Problem, ScoreLayout, Shape, Tensor, alibi_slopes};
#[doc(hidden)]
pub use recipe::{PlannedModule, modules};
pub use wgpu;

// The README's code compiles, too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../docs/devices.md")]
struct Devices;

#[cfg(all(doctest, feature = "mods"))]
#[doc = include_str!("../docs/features.md")]
struct Features;
