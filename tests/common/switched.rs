//! Problems that differ in the switches of a module.

use wgpu_flash_attention::{ElementType, Problem, Shape, Tensor};

/// Bits of five switches in which each pair of switches is off and off, off and on, on and off, on and on; with the fourth of
/// them on, each pair of the others as well. All 32 would take four times as long and show nothing that no pair shows.
pub const PAIRWISE: [u32; 8] = [0b00000, 0b10111, 0b11000, 0b01001, 0b01011, 0b11101, 0b01110, 0b11111];

/// A problem with each switch of a module as a bit of `bits` says, five of them: vectors or not, softcap, key lengths, lse, query
/// lengths.
pub fn switched(shape: Shape, element_type: ElementType, bits: u32) -> Problem {
    let set = |n: u32| bits >> n & 1 == 1;
    let mut problem = Problem::new(shape, element_type);
    let layout = problem.layout(Tensor::Query).at(set(0).into());
    problem = problem.with_layout(Tensor::Query, layout);
    problem.softcap = set(1).then_some(2.0);
    problem.seqlens_k = set(2);
    problem.lse = set(3);
    problem.seqlens_q = set(4);
    problem
}
