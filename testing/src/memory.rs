//! Tensors in memory, with gaps and guards of poison that nothing may write.

use half::{bf16, f16};
use wgpu_flash_attention::{ElementType, Problem, Tensor};

/// Where each element of a contiguous `[batch, head, position, dim]` tensor of a problem lies, and its batch entry and position.
pub(crate) fn places(
    problem: &Problem,
    tensor: Tensor,
    [batch, heads, rows, dim]: [u32; 4],
) -> impl Iterator<Item = (usize, u32, u32)> + use<> {
    let (layout, probe) = (problem.layout(tensor), problem.probe());
    let of_keys = matches!(tensor, Tensor::Key | Tensor::Value | Tensor::GradKey | Tensor::GradValue);
    let row = move |i: u32| match probe {
        Some(probe) if of_keys => probe.key_row(i, rows),
        Some(probe) => probe.query_row(i, rows),
        None => i,
    };
    let at = move |b: u32, h: u32, i: u32, d: u32| {
        layout.offset + b as u64 * layout.batch + h as u64 * layout.head + row(i) as u64 * layout.row + d as u64
    };
    (0..batch).flat_map(move |b| {
        (0..heads)
            .flat_map(move |h| (0..rows).flat_map(move |i| (0..dim).map(move |d| (at(b, h, i, d) as usize, b, i))))
    })
}

/// Where the number of each row lies in a buffer of one number a row, such as lse.
pub(crate) fn row_places(problem: &Problem) -> Vec<usize> {
    let s = problem.shape;
    let row = |i: u32| problem.probe().map_or(i, |probe| probe.query_row(i, s.seqlen_q));
    let heads = 0..s.batch as usize * s.heads_q as usize;
    heads
        .flat_map(|head| (0..s.seqlen_q).map(move |i| (head, i)))
        .map(|(head, i)| head * s.seqlen_q as usize + row(i) as usize)
        .collect()
}

pub(crate) fn end(problem: &Problem, tensor: Tensor, dims: [u32; 4]) -> usize {
    places(problem, tensor, dims).map(|(place, ..)| place + 1).max().unwrap_or(0)
}

/// The bits of x rounded to the type.
pub fn to_bits(element_type: ElementType, x: f32) -> u32 {
    match element_type {
        ElementType::F32 => x.to_bits(),
        ElementType::F16 => f16::from_f32(x).to_bits().into(),
        ElementType::BF16 => bf16::from_f32(x).to_bits().into(),
        other => unreachable!("{other}"),
    }
}

pub fn from_bits(element_type: ElementType, bits: u32) -> f32 {
    match element_type {
        ElementType::F32 => f32::from_bits(bits),
        ElementType::F16 => f16::from_bits(bits as u16).to_f32(),
        ElementType::BF16 => bf16::from_bits(bits as u16).to_f32(),
        other => unreachable!("{other}"),
    }
}

/// A NaN of the type that no computation makes; each round has its own.
pub(crate) fn poison(element_type: ElementType, round: u32) -> u32 {
    match element_type {
        ElementType::F32 => 0x7fc5_a5a5 + round,
        ElementType::F16 => 0xfe5a + round,
        ElementType::BF16 => 0xffda + round,
        other => unreachable!("{other}"),
    }
}

/// Elements in memory, after and before a guard of poison, padded with it to whole words.
pub(crate) fn guarded(element_type: ElementType, elements: &[u32], poison: u32) -> Vec<u8> {
    let bytes = element_type.bytes() as usize;
    let guard = GUARD as usize / bytes;
    let padding = (elements.len() * bytes).next_multiple_of(4) / bytes - elements.len();
    let all = std::iter::repeat_n(&poison, guard).chain(elements).chain(std::iter::repeat_n(&poison, padding + guard));
    all.flat_map(|bits| bits.to_le_bytes().into_iter().take(bytes)).collect()
}

/// Bytes before and after each tensor: the largest alignment that a device may ask of an offset.
pub(crate) const GUARD: u64 = 256;

/// The elements at the places that belong to a tensor, in its order; an error if anything else changed.
/// `owned(n)` gives those places, and for each of n whether it is one.
pub(crate) fn unguard(
    bytes: &[u8],
    element_type: ElementType,
    poison: u32,
    owned: impl FnOnce(usize) -> (Vec<usize>, Vec<bool>),
) -> Result<Vec<u32>, String> {
    let all: Vec<u32> = match element_type {
        ElementType::F32 => bytemuck::pod_collect_to_vec(bytes),
        _ => bytemuck::pod_collect_to_vec::<u8, u16>(bytes).into_iter().map(u32::from).collect(),
    };
    let guard = GUARD as usize / element_type.bytes() as usize;
    let (places, taken) = owned(all.len() - 2 * guard);
    for (n, &bits) in all.iter().enumerate() {
        let ours = n.checked_sub(guard).and_then(|n| taken.get(n)).is_some_and(|&taken| taken);
        if !ours && bits != poison {
            return Err(format!("element {} is not the tensor's and was written", n as i64 - guard as i64));
        }
        if ours && bits == poison {
            return Err(format!("element {} was not written", n - guard));
        }
    }
    Ok(places.into_iter().map(|place| all[guard + place]).collect())
}
