//! From a module on f16 to the same module on bf16, of which WGSL and naga know nothing.
//!
//! SPIR-V's type of a bf16 is that of an f16 with one word more, the encoding. So a module whose f16 are only loaded, stored, moved, converted
//! and multiplied as matrices is one on bf16 as soon as its type says so, its constants are bf16, and it declares what it needs.

use std::collections::HashSet;

use super::access::ModuleError;
use super::words::{HEADER, instructions, push};

/// Opcodes of SPIR-V.
mod op {
    pub const EXTENSION: u32 = 10;
    pub const EXT_INST: u32 = 12;
    pub const CAPABILITY: u32 = 17;
    pub const TYPE_FLOAT: u32 = 22;
    pub const TYPE_VECTOR: u32 = 23;
    pub const CONSTANT: u32 = 43;
}

/// BFloat16TypeKHR and BFloat16CooperativeMatrixKHR, of SPV_KHR_bfloat16.
const CAPABILITIES: [u32; 2] = [5116, 5118];
const EXTENSION: &[u8; 20] = b"SPV_KHR_bfloat16\0\0\0\0";
/// The encoding BFloat16KHR.
const ENCODING: u32 = 0;

/// Whether an instruction computes with numbers or compares them. All its operands are ids, but for the set and the number of OpExtInst, which
/// are none of a number.
fn is_arithmetic(opcode: u32) -> bool {
    match opcode {
        op::EXT_INST => true,
        // Conversions between floating point and integers.
        109..=112 => true,
        // Arithmetic, then questions about numbers and comparisons.
        126..=148 | 156..=167 | 180..=191 => true,
        _ => false,
    }
}

/// The words of the module on bf16.
pub(super) fn to_bf16(spirv: &[u32]) -> Result<Vec<u32>, ModuleError> {
    let (header, body) = spirv.split_at(HEADER);
    let mut words = header.to_vec();
    for capability in CAPABILITIES {
        push(&mut words, op::CAPABILITY, &[capability]);
    }
    let mut in_capabilities = true;
    // The type, and vectors of it.
    let mut half = None;
    let mut halves = HashSet::new();
    // Whatever is of these types.
    let mut numbers = HashSet::new();
    for (opcode, operands) in instructions(body) {
        if in_capabilities && opcode != op::CAPABILITY {
            in_capabilities = false;
            let name: Vec<u32> = EXTENSION
                .chunks_exact(4)
                .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
                .collect();
            push(&mut words, op::EXTENSION, &name);
        }
        match (opcode, operands) {
            (op::TYPE_FLOAT, &[id, 16]) => {
                half = Some(id);
                halves.insert(id);
                push(&mut words, opcode, &[id, 16, ENCODING]);
                continue;
            }
            (op::TYPE_VECTOR, [id, element, _]) if halves.contains(element) => drop(halves.insert(*id)),
            (op::CONSTANT, &[ty, id, bits]) if Some(ty) == half => {
                let number = half::f16::from_bits(bits as u16).to_f32();
                push(&mut words, opcode, &[ty, id, half::bf16::from_f32(number).to_bits().into()]);
                numbers.insert(id);
                continue;
            }
            (_, [ty, id, operands @ ..]) => {
                let is_half = halves.contains(ty);
                if is_arithmetic(opcode) && (is_half || operands.iter().any(|operand| numbers.contains(operand))) {
                    return Err(ModuleError::Bf16Arithmetic { opcode });
                }
                if is_half {
                    numbers.insert(*id);
                }
            }
            _ => {}
        }
        push(&mut words, opcode, operands);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOAT16: u32 = 9;
    const MEMORY_MODEL: u32 = 14;
    const TYPE_POINTER: u32 = 32;
    const F_CONVERT: u32 = 115;
    const F_ADD: u32 = 129;

    fn words(instructions: &[(u32, &[u32])]) -> Vec<u32> {
        let mut words = vec![0x0723_0203, 0x0001_0600, 0, 20, 0];
        for (opcode, operands) in instructions {
            push(&mut words, *opcode, operands);
        }
        words
    }

    #[test]
    fn types_constants_and_declarations_change_and_nothing_else() {
        let rest: [(u32, &[u32]); 4] = [
            (op::TYPE_FLOAT, &[2, 32]),
            (TYPE_POINTER, &[3, 12, 1]),
            // 1.5 of 32 bits, and a number that looks like an f16 of the other type.
            (op::CONSTANT, &[2, 5, 0x3fc0_0000]),
            (F_CONVERT, &[1, 6, 5]),
        ];
        let f16: [(u32, &[u32]); 4] = [
            (op::CAPABILITY, &[FLOAT16]),
            (MEMORY_MODEL, &[0, 3]),
            (op::TYPE_FLOAT, &[1, 16]),
            // 1.5, whose bits as bf16 are the upper half of those as f32.
            (op::CONSTANT, &[1, 4, 0x3e00]),
        ];
        let name: [u32; 5] = [0x5f56_5053, 0x5f52_484b, 0x6f6c_6662, 0x3631_7461, 0];
        let bf16: [(u32, &[u32]); 7] = [
            (op::CAPABILITY, &[5116]),
            (op::CAPABILITY, &[5118]),
            (op::CAPABILITY, &[FLOAT16]),
            (op::EXTENSION, &name),
            (MEMORY_MODEL, &[0, 3]),
            (op::TYPE_FLOAT, &[1, 16, 0]),
            (op::CONSTANT, &[1, 4, 0x3fc0]),
        ];
        assert_eq!(to_bf16(&words(&[&f16[..], &rest].concat())), Ok(words(&[&bf16[..], &rest].concat())));
    }

    #[test]
    fn arithmetic_is_refused() {
        let types: [(u32, &[u32]); 5] = [
            (op::CAPABILITY, &[FLOAT16]),
            (op::TYPE_FLOAT, &[1, 16]),
            (op::TYPE_FLOAT, &[2, 32]),
            (op::TYPE_VECTOR, &[3, 1, 4]),
            (op::CONSTANT, &[1, 4, 0x3e00]),
        ];
        let refused = |instruction: (u32, &[u32])| to_bf16(&words(&[&types[..], &[instruction]].concat())).err();
        let error = |opcode| Some(ModuleError::Bf16Arithmetic { opcode });
        // A sum of numbers, one of vectors, a comparison, a conversion to an integer, a function of GLSL's.
        assert_eq!(refused((F_ADD, &[1, 7, 4, 4])), error(F_ADD));
        assert_eq!(refused((F_ADD, &[3, 7, 8, 8])), error(F_ADD));
        assert_eq!(refused((180, &[9, 7, 4, 4])), error(180));
        assert_eq!(refused((109, &[9, 7, 4])), error(109));
        assert_eq!(refused((op::EXT_INST, &[2, 7, 10, 8, 4])), error(op::EXT_INST));
        // A sum of f32, and a conversion to it.
        assert_eq!(refused((F_ADD, &[2, 7, 8, 8])), None);
        assert_eq!(refused((F_CONVERT, &[2, 7, 4])), None);
    }
}
