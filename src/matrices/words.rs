//! Instructions of a SPIR-V module, read and written.

/// A SPIR-V module starts with so many words.
pub(super) const HEADER: usize = 5;

/// The opcode and the operands of each instruction.
pub(super) fn instructions(mut words: &[u32]) -> impl Iterator<Item = (u32, &[u32])> {
    std::iter::from_fn(move || {
        let length = (*words.first()? >> 16) as usize;
        let (instruction, rest) = words.split_at(length);
        words = rest;
        Some((instruction[0] & 0xffff, &instruction[1..]))
    })
}

pub(super) fn push(words: &mut Vec<u32>, opcode: u32, operands: &[u32]) {
    words.push((operands.len() as u32 + 1) << 16 | opcode);
    words.extend_from_slice(operands);
}
