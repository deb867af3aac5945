//! Problems that differ in the switches of a module.

use wgpu_flash_attention::{ElementType, Problem, Shape};

/// A problem with each switch of a module as a bit of `bits` says, four of them: vectors or not, softcap, key lengths, lse.
pub fn switched(shape: Shape, element_type: ElementType, bits: u32) -> Problem {
    let set = |n: u32| bits >> n & 1 == 1;
    let mut problem = Problem::new(shape, element_type);
    problem.query = problem.query.at(set(0).into());
    problem.softcap = set(1).then_some(2.0);
    problem.seqlens_k = set(2);
    problem.lse = set(3);
    problem
}
