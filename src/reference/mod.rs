//! The same mathematics on the host, in loops one can read: the oracle that the kernels are tested against.
//!
//! - [`forward()`] and [`backward()`] compute in f64, exactly for all that a kernel can tell.
//! - [`rounded`] computes in f32 and rounds to the problem's element type where one would who writes attention in that type. Its
//!   errors are the measure for kernels of 16-bit types.
//! - [`accept`] says how far a kernel's results may be from the exact ones.
//!
//! Both computations are one text: a feature of [`Problem`](crate::Problem) is defined once. Tensors are contiguous `[batch, head, position, dim]`
//! here, whatever the problem's layouts say.

pub mod accept;
mod definition;
mod exact;
mod random;
pub mod rounded;
mod values;

pub use exact::{
    backward, backward_key_row, backward_query_row, backward_shared_rows, delta, delta_sizes, forward, forward_row,
};
pub use random::dropout_mask;
pub use values::{Backward, Extras, Forward, Summed};
