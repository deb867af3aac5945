//! From WGSL with placeholders to SPIR-V that accesses elements, by naga.

use std::collections::{HashMap, HashSet};

use naga::valid::Capabilities;
use naga::{CooperativeRole, Scalar, TypeInner};

use super::access::ModuleError;
use super::bf16_words;
use super::format::MatrixFormat;
use super::words::{HEADER, instructions, push};

/// What [`FEATURES`](super::FEATURES) let a module use. `pack2x16float` and its like need no feature on Vulkan.
const CAPABILITIES: Capabilities = Capabilities::COOPERATIVE_MATRIX
    .union(Capabilities::SHADER_FLOAT16)
    .union(Capabilities::SHADER_FLOAT16_IN_FLOAT32)
    .union(Capabilities::SUBGROUP);

/// A module in SPIR-V whose placeholder functions access elements.
#[derive(Clone, Debug)]
pub struct ElementModule {
    spirv: Vec<u32>,
    entry_points: Vec<(String, [u32; 3])>,
}

impl ElementModule {
    /// Makes a module from WGSL. `bindings` are those of the pipeline's only group; `checked` adds the run-time checks
    /// that wgpu adds to other modules.
    pub fn new(
        text: &str,
        format: MatrixFormat,
        bindings: &[u32],
        checked: bool,
    ) -> Result<ElementModule, ModuleError> {
        let module = naga::front::wgsl::parse_str(text).map_err(|e| ModuleError::Naga(e.emit_to_string(text)))?;
        let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), CAPABILITIES);
        let info = validator.validate(&module).map_err(|e| ModuleError::Naga(e.emit_to_string(text)))?;
        check_matrices(&module, format)?;
        for entry_point in &module.entry_points {
            let width = entry_point.workgroup_size[0];
            if width % format.lanes != 0 {
                let entry_point = entry_point.name.clone();
                return Err(ModuleError::Workgroup { entry_point, width, lanes: format.lanes });
            }
        }
        let placeholders = placeholders(&module, format.elements())?;
        let options = spirv_options(bindings, checked);
        let spirv = naga::back::spv::write_vec(&module, &info, &options, None)
            .map_err(|error| ModuleError::Naga(error.to_string()))?;
        Ok(ElementModule {
            spirv: unroll_counted_loops(fill_placeholders(&spirv, &placeholders)?),
            entry_points: module.entry_points.iter().map(|e| (e.name.clone(), e.workgroup_size)).collect(),
        })
    }

    /// The same module on bf16 in place of f16. Its text may do no arithmetic on f16. The device needs more for it than features of wgpu: see
    /// [`Bf16Matrices`](super::Bf16Matrices).
    pub fn into_bf16(self) -> Result<ElementModule, ModuleError> {
        Ok(ElementModule { spirv: bf16_words::to_bf16(&self.spirv)?, ..self })
    }

    /// The words of the module.
    pub fn spirv(&self) -> &[u32] {
        &self.spirv
    }

    /// Names and workgroup sizes.
    pub fn entry_points(&self) -> &[(String, [u32; 3])] {
        &self.entry_points
    }
}

fn spirv_options(bindings: &[u32], checked: bool) -> naga::back::spv::Options<'static> {
    use naga::back::spv::{BindingInfo, Options, WriterFlags, ZeroInitializeWorkgroupMemoryMode};
    use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};

    let mut bindings = bindings.to_vec();
    bindings.sort_unstable();
    let policy = if checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
    Options {
        // Drivers with cooperative matrices have Vulkan 1.3, which takes it.
        lang_version: (1, 6),
        // Names, by which the placeholders are found again.
        flags: WriterFlags::DEBUG,
        // wgpu-hal numbers the bindings of a group without gaps, in their order.
        binding_map: bindings
            .into_iter()
            .zip(0..)
            .map(|(binding, place)| {
                let info = BindingInfo { descriptor_set: 0, binding: place, binding_array_size: None };
                (naga::ResourceBinding { group: 0, binding }, info)
            })
            .collect(),
        fake_missing_bindings: false,
        bounds_check_policies: BoundsCheckPolicies { index: policy, buffer: policy, ..Default::default() },
        zero_initialize_workgroup_memory: match checked {
            true => ZeroInitializeWorkgroupMemoryMode::Native,
            false => ZeroInitializeWorkgroupMemoryMode::None,
        },
        force_loop_bounding: checked,
        emit_int_div_checks: checked,
        // Otherwise each module declares StorageInputOutput16, which the device need not have and nobody asked it for.
        use_storage_input_output_16: false,
        ..Default::default()
    }
}

fn check_matrices(module: &naga::Module, format: MatrixFormat) -> Result<(), ModuleError> {
    for (_, ty) in module.types.iter() {
        if let TypeInner::CooperativeMatrix { columns, rows, scalar, role } = ty.inner {
            let element = match role {
                CooperativeRole::A | CooperativeRole::B => Scalar::F16,
                CooperativeRole::C => Scalar::F32,
            };
            if [columns as u32, rows as u32] != [format.size; 2] || scalar != element {
                let found =
                    format!("coop_mat{}x{}<f{}, {role:?}>", columns as u32, rows as u32, u32::from(scalar.width) * 8);
                return Err(ModuleError::Matrix { found, size: format.size });
            }
        }
    }
    Ok(())
}

/// What a placeholder function is to do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Placeholder {
    /// Returns this element of its parameter.
    Get(u32),
    /// Returns its first parameter with elements replaced by the others.
    Set,
    /// Returns the product of its parameters, of 64 bits: naga's WGSL has no such multiplication.
    MulWide,
    /// Returns the bits of its parameter, two u32, as four f16: naga's WGSL has no such bitcast.
    Bits,
}

/// The functions of the module whose names start with `coop_`, by name. (WGSL's own, such as coopLoad, have no
/// underscore, and are not functions of the module.)
fn placeholders(module: &naga::Module, elements: u32) -> Result<HashMap<&str, Placeholder>, ModuleError> {
    let inner = |ty: naga::Handle<naga::Type>| &module.types[ty].inner;
    let mut found = HashMap::new();
    for (_, function) in module.functions.iter() {
        let Some(name) = function.name.as_deref().filter(|name| name.starts_with("coop_")) else {
            continue;
        };
        let refuse = |expected| Err(ModuleError::Signature { function: name.into(), expected });
        if name == "coop_bits" {
            let vector = |size, scalar| TypeInner::Vector { size, scalar };
            let takes = function.arguments.iter().map(|argument| inner(argument.ty)).collect::<Vec<_>>();
            let gives = function.result.as_ref().map(|result| inner(result.ty));
            let (bits, halves) =
                (vector(naga::VectorSize::Bi, Scalar::U32), vector(naga::VectorSize::Quad, Scalar::F16));
            if takes != [&bits] || gives != Some(&halves) {
                return refuse("it must take one vec2<u32> and return a vec4<f16>");
            }
            found.insert(name, Placeholder::Bits);
            continue;
        }
        if name == "coop_mul_wide" {
            let word = TypeInner::Scalar(Scalar::U32);
            let takes = function.arguments.iter().map(|argument| inner(argument.ty)).collect::<Vec<_>>();
            let gives = function.result.as_ref().map(|result| inner(result.ty));
            let is_pair = |ty: &TypeInner| matches!(ty, TypeInner::Struct { members, .. } if members.len() == 2 && members.iter().all(|member| *inner(member.ty) == word));
            if takes != [&word, &word] || !gives.is_some_and(is_pair) {
                return refuse("it must take two u32 and return a struct of two u32");
            }
            found.insert(name, Placeholder::MulWide);
            continue;
        }
        let is_set = name.starts_with("coop_set");
        let index = name.strip_prefix("coop_get_");
        if !is_set && index.is_none() {
            return Err(ModuleError::UnknownPlaceholder { function: name.into() });
        }
        let parameters: Vec<_> = function.arguments.iter().map(|argument| inner(argument.ty)).collect();
        let result = function.result.as_ref().map(|result| inner(result.ty));
        let Some((&matrix @ &TypeInner::CooperativeMatrix { scalar, .. }, scalars)) = parameters.split_first() else {
            return refuse("its first parameter must be a cooperative matrix");
        };
        let scalar = TypeInner::Scalar(scalar);
        let (placeholder, accessed) = if let Some(index) = index {
            let Some(index) = index.rsplit('_').next().and_then(|index| index.parse::<u32>().ok()) else {
                return refuse("its name must end in _ and the number of an element");
            };
            if !scalars.is_empty() {
                return refuse("it must have no second parameter");
            }
            if result != Some(&scalar) {
                return refuse("its result must be of the type of the matrix' elements");
            }
            (Placeholder::Get(index), u64::from(index) + 1)
        } else {
            if scalars.iter().any(|&parameter| *parameter != scalar) {
                return refuse("its parameters after the first must be of the type of the matrix' elements");
            }
            if result != Some(matrix) {
                return refuse("its result must be of the type of its first parameter");
            }
            (Placeholder::Set, scalars.len() as u64)
        };
        if accessed > u64::from(elements) {
            let element = (accessed - 1) as u32;
            return Err(ModuleError::Element { function: name.into(), element, elements });
        }
        found.insert(name, placeholder);
    }
    Ok(found)
}

/// Opcodes of SPIR-V.
mod op {
    pub const NAME: u32 = 5;
    pub const CONSTANT: u32 = 43;
    pub const FUNCTION: u32 = 54;
    pub const FUNCTION_PARAMETER: u32 = 55;
    pub const FUNCTION_END: u32 = 56;
    pub const COMPOSITE_EXTRACT: u32 = 81;
    pub const COMPOSITE_INSERT: u32 = 82;
    pub const U_MUL_EXTENDED: u32 = 151;
    pub const U_LESS_THAN: u32 = 176;
    pub const LOOP_MERGE: u32 = 246;
    pub const BRANCH_CONDITIONAL: u32 = 250;
    pub const BITCAST: u32 = 124;
    pub const RETURN_VALUE: u32 = 254;
}

/// The place in the header of the lowest number that no id has.
const BOUND: usize = 3;

/// The text of a literal operand: UTF-8, ended by a zero byte.
fn literal(words: &[u32]) -> String {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).take_while(|&byte| byte != 0).collect::<Vec<_>>();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Has each placeholder return elements instead of what its body computes.
///
/// This keeps the module valid. SPV_KHR_cooperative_matrix lists OpCompositeExtract and OpCompositeInsert among the
/// instructions that take cooperative matrices: what a lane holds is a composite of scalars, and a literal index
/// selects one. The types are right because the signatures are; parameters dominate every return; each result has a
/// fresh id; and no instruction is removed whose id another could name.
fn fill_placeholders(spirv: &[u32], placeholders: &HashMap<&str, Placeholder>) -> Result<Vec<u32>, ModuleError> {
    struct Function {
        placeholder: Placeholder,
        result_type: u32,
        parameters: Vec<u32>,
    }
    let (header, body) = spirv.split_at(HEADER);
    let names: HashMap<u32, String> = instructions(body)
        .filter(|&(opcode, _)| opcode == op::NAME)
        .map(|(_, operands)| (operands[0], literal(&operands[1..])))
        .collect();
    let mut words = header.to_vec();
    let mut next_id = header[BOUND];
    let mut fresh = || {
        next_id += 1;
        next_id - 1
    };
    let mut missing: Vec<&str> = placeholders.keys().copied().collect();
    let mut current: Option<Function> = None;
    for (opcode, operands) in instructions(body) {
        match (opcode, &mut current) {
            (op::FUNCTION, _) => {
                let [result_type, id] = [operands[0], operands[1]];
                let name = names.get(&id).map_or("", String::as_str);
                missing.retain(|&other| other != name);
                current = placeholders.get(name).map(|&placeholder| Function {
                    placeholder,
                    result_type,
                    parameters: vec![],
                });
            }
            (op::FUNCTION_PARAMETER, Some(function)) => function.parameters.push(operands[1]),
            (op::FUNCTION_END, _) => current = None,
            (op::RETURN_VALUE, Some(Function { placeholder, result_type, parameters })) => {
                let mut value = parameters[0];
                match placeholder {
                    Placeholder::Get(index) => {
                        let element = fresh();
                        push(&mut words, op::COMPOSITE_EXTRACT, &[*result_type, element, value, *index]);
                        value = element;
                    }
                    Placeholder::Bits => {
                        let halves = fresh();
                        push(&mut words, op::BITCAST, &[*result_type, halves, value]);
                        value = halves;
                    }
                    Placeholder::MulWide => {
                        let product = fresh();
                        push(&mut words, op::U_MUL_EXTENDED, &[*result_type, product, value, parameters[1]]);
                        value = product;
                    }
                    Placeholder::Set => {
                        for (&scalar, index) in parameters[1..].iter().zip(0..) {
                            let matrix = fresh();
                            push(&mut words, op::COMPOSITE_INSERT, &[*result_type, matrix, scalar, value, index]);
                            value = matrix;
                        }
                    }
                }
                push(&mut words, op::RETURN_VALUE, &[value]);
                continue;
            }
            _ => {}
        }
        push(&mut words, opcode, operands);
    }
    if let Some(function) = missing.first() {
        return Err(ModuleError::Lost { function: (*function).into() });
    }
    words[BOUND] = next_id;
    Ok(words)
}

/// Asks the driver to unroll each loop that counts an unsigned number up to a constant, which WGSL has no words for.
/// Arrays of matrices are registers only when every index into them is known.
fn unroll_counted_loops(mut words: Vec<u32>) -> Vec<u32> {
    /// The bit of a loop's control that asks for it.
    const UNROLL: u32 = 1;
    let mut constants = HashSet::new();
    // The control word of the last loop whose condition has not been seen.
    let mut control = None;
    let mut hints = vec![];
    let mut place = HEADER;
    for (opcode, operands) in instructions(&words[HEADER..]) {
        match opcode {
            op::CONSTANT => drop(constants.insert(operands[1])),
            op::LOOP_MERGE => control = Some(place + 3),
            op::U_LESS_THAN if constants.contains(&operands[3]) => hints.extend(control.take()),
            op::BRANCH_CONDITIONAL => control = None,
            _ => {}
        }
        place += operands.len() + 1;
    }
    for hint in hints {
        words[hint] |= UNROLL;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An OpName of function 7, then the function itself: one parameter of type 2, result of type 1.
    fn module(name: &str) -> Vec<u32> {
        let mut words = vec![0x0723_0203, 0x0001_0600, 0, 20, 0];
        let mut letters = name.as_bytes().to_vec();
        letters.resize((name.len() / 4 + 1) * 4, 0);
        let letters = letters.chunks(4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]));
        push(&mut words, op::NAME, &[[7].to_vec(), letters.collect()].concat());
        push(&mut words, op::FUNCTION, &[1, 7, 0, 3]);
        push(&mut words, op::FUNCTION_PARAMETER, &[2, 8]);
        push(&mut words, op::RETURN_VALUE, &[9]);
        push(&mut words, op::FUNCTION_END, &[]);
        words
    }

    #[test]
    fn only_what_a_placeholder_returns_changes() {
        let placeholders = HashMap::from([("coop_get_3", Placeholder::Get(3))]);
        let words = module("coop_get_3");
        let filled = fill_placeholders(&words, &placeholders).unwrap();
        let mut expected = words[..words.len() - 3].to_vec();
        push(&mut expected, op::COMPOSITE_EXTRACT, &[1, 20, 8, 3]);
        push(&mut expected, op::RETURN_VALUE, &[20]);
        push(&mut expected, op::FUNCTION_END, &[]);
        expected[BOUND] = 21;
        assert_eq!(filled, expected);
        assert_eq!(fill_placeholders(&words, &HashMap::new()).unwrap(), words);
    }

    #[test]
    fn a_placeholder_that_lost_its_name_is_refused() {
        let placeholders = HashMap::from([("coop_get_3", Placeholder::Get(3))]);
        let error = fill_placeholders(&module("main"), &placeholders).unwrap_err();
        assert_eq!(error, ModuleError::Lost { function: "coop_get_3".into() });
    }
}
