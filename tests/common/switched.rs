//! Problems that differ in the switches of a module.

use wgpu_flash_attention::{ElementType, Problem, Shape, Tensor};

/// A problem with each switch of a module as a bit of `bits` says, four of them: vectors or not, softcap, key lengths, lse.
pub fn switched(shape: Shape, element_type: ElementType, bits: u32) -> Problem {
    let set = |n: u32| bits >> n & 1 == 1;
    let mut problem = Problem::new(shape, element_type);
    let layout = problem.layout(Tensor::Query).at(set(0).into());
    problem = problem.with_layout(Tensor::Query, layout);
    problem.softcap = set(1).then_some(2.0);
    problem.seqlens_k = set(2);
    problem.lse = set(3);
    problem
}
