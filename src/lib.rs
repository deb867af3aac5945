//! Exact attention on any GPU.
#![deny(unsafe_code)]
#![warn(missing_docs)]

mod context;
mod error;
mod forward;
mod host;
mod kernel;
mod plan;
mod problem;
pub mod reference;
pub mod specialize;
pub mod tune;

pub use context::Context;
pub use error::Error;
pub use forward::{BoundForward, ForwardBuffers};
pub use host::{Element, HeadlessOptions, HostTensor, SdpaOptions};
pub use kernel::Kernel;
pub use plan::{Plan, PlanOptions};
pub use problem::{Causal, ElementType, Layout, MAX_HEAD_DIM, MAX_SEQLEN, Problem, Shape};
pub use wgpu;
