//! Problems that differ in the switches of a module.

use wgpu_flash_attention::{ElementType, Problem, Shape, Tensor};

/// Bits of four switches in which each pair of switches is off and off, off and on, on and off, on and on; with the last of
/// them on, each pair of the other three as well. All sixteen would take three times as long and show nothing that no pair shows.
pub const PAIRWISE: [u32; 7] = [0b0000, 0b0111, 0b1000, 0b1011, 0b1101, 0b1110, 0b1111];

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
