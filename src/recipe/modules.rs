//! The modules of plans, without a device: for tests.

use super::choose::recipes;
use crate::error::Error;
use crate::facts::Facts;
use crate::kernel::{Module, Pass};
use crate::options::PlanOptions;
use crate::problem::Problem;
use crate::specialize::{Source, Specialization, SpecializeError};

/// A module that a plan compiles, and what the plan takes it to need.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PlannedModule {
    /// File, switches and constants.
    pub specialization: Specialization,
    /// The numbers of its bindings.
    pub bindings: Vec<u32>,
    /// Whether it has placeholders for access to the elements of matrices.
    pub element_access: bool,
    /// Whether its matrices are of bf16, which its WGSL has as f16.
    pub bf16_matrices: bool,
    /// Threads of a workgroup.
    pub threads: u32,
    /// Workgroup memory.
    pub workgroup_bytes: u32,
    /// Whether it is of the backward pass.
    pub is_backward: bool,
    module: Module,
}

impl PlannedModule {
    pub(crate) fn new(pass: &Pass, is_backward: bool) -> Self {
        PlannedModule {
            specialization: pass.specialization.clone(),
            bindings: pass.binding_numbers(),
            element_access: pass.element_access,
            bf16_matrices: pass.module().is_bf16(),
            threads: pass.threads,
            workgroup_bytes: pass.workgroup_bytes,
            is_backward,
            module: pass.module(),
        }
    }

    /// Its WGSL, with what the user wrote.
    pub fn source(&self) -> Result<Source, SpecializeError> {
        self.module.source()
    }
}

/// The modules that a plan of this problem compiles on a device that allows this, in the order of their dispatches: forward, then backward.
pub fn modules(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Vec<PlannedModule>, Error> {
    let recipes = recipes(problem, facts, options)?;
    let forward = recipes.forward.passes.iter().map(|pass| PlannedModule::new(pass, false));
    let backward = recipes.backward.iter().flat_map(|recipe| &recipe.passes);
    Ok(forward.chain(backward.map(|pass| PlannedModule::new(pass, true))).collect())
}
