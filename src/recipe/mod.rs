//! Which kernel computes a problem on a device, and why: candidates in order, of which the first that takes the problem is taken.
//! Pure: a problem, what a device allows and what the caller asks for go in, kernels with their passes come out.

mod backward;
mod candidate;
mod choose;
mod coop;
mod forward;
mod modules;

pub(crate) use candidate::Recipe;
pub(crate) use choose::{Recipes, recipes};
pub use modules::{PlannedModule, modules};
