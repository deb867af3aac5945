//! Access to the elements of cooperative matrices, which SPIR-V has and WGSL has not.
//!
//! The lanes of a subgroup hold a cooperative matrix together, each the same number of its elements. A kernel is WGSL
//! that naga parses and validates like any other; it reaches a lane's elements through placeholder functions, whose
//! bodies are harmless:
//! - `coop_get_N(m)`, or `coop_get_…_N(m)`, is element N of what the lane holds of the matrix m,
//! - `coop_set…(m, e0, e1, …)` is m with the lane's first elements replaced by e0, e1, ….
//!
//! [`ElementModule::new`] has naga write the module as SPIR-V, where it then makes the functions do what they say.
//!
//! Which row and column the element n of lane i is in is the implementation's choice. [`probe`] asks it once, and
//! [`MatrixLayout`] is the answer that kernels are specialised by.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use naga::valid::Capabilities;
use naga::{CooperativeRole, Scalar, TypeInner};

use crate::error::features;
use crate::{Context, Error, faults, passthrough};

/// The device features that kernels on cooperative matrices need, all of them the caller's decision.
pub const MATRIX_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16).union(wgpu::Features::SUBGROUP);

/// The same with what access to their elements needs.
pub const FEATURES: wgpu::Features = MATRIX_FEATURES.union(wgpu::Features::PASSTHROUGH_SHADERS);

/// What [`FEATURES`] let a module use. `pack2x16float` and its like need no feature on Vulkan.
const CAPABILITIES: Capabilities = Capabilities::COOPERATIVE_MATRIX
    .union(Capabilities::SHADER_FLOAT16)
    .union(Capabilities::SHADER_FLOAT16_IN_FLOAT32)
    .union(Capabilities::SUBGROUP);

/// Why kernels cannot use a device's cooperative matrices.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NoMatrices {
    /// The device was created without features that are needed.
    #[error("the device was created without {}; request it where the adapter has it", features(*.0))]
    Features(wgpu::Features),
    /// The adapter does not have features that are needed.
    #[error("the adapter has no {}; its driver may be too old, or the hardware has none", features(*.0))]
    AdapterFeatures(wgpu::Features),
    /// The adapter has no square matrices of a size that WGSL can name, f16 with f32 sums.
    #[error("the adapter lists no f16 matrices of 16x16 or 8x8 with f32 sums")]
    MatrixSize,
    /// A kernel cannot know how many lanes share a matrix.
    #[error("subgroups have {min} to {max} lanes; one size is needed, from a row of a matrix to its elements")]
    SubgroupSize {
        /// Fewest lanes.
        min: u32,
        /// Most lanes.
        max: u32,
    },
    /// The adapter is not the one that the device came from.
    #[error("the adapter is another than the device's; pass the adapter that the device was requested from")]
    Adapter,
}

/// Why a device gives no access to the elements of its matrices.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NoElementAccess {
    /// The device was created without features that are needed.
    #[error("the device was created without {}", features(*.0))]
    Features(wgpu::Features),
    /// Only Vulkan takes SPIR-V.
    #[error("the backend is {0}, not Vulkan")]
    Backend(wgpu::Backend),
    /// The probe's module was refused.
    #[error("the probe: {0}")]
    Module(#[from] ModuleError),
    /// The driver or wgpu refused the probe, or the device failed while it ran.
    #[error("the probe failed: {0}")]
    Probe(String),
    /// Left operands do not lie as accumulators do, right ones not as their transpose, or a lane holds more or fewer
    /// than eight elements.
    #[error("the roles of a matrix lie in the lanes in ways that no kernel is written for")]
    Roles,
    /// The elements lie in a way that no kernel is written for.
    #[error("role {role}: {error}")]
    Layout {
        /// `C`, `A` or `B`.
        role: &'static str,
        /// What is unexpected.
        error: LayoutError,
    },
}

/// The matrices that a module is made for: `size` by `size`, A and B of f16, C of f32, shared by `lanes` lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixFormat {
    /// Rows and columns, 8 or 16.
    pub size: u32,
    /// The lanes of a subgroup, a power of two.
    pub lanes: u32,
}

impl MatrixFormat {
    /// The largest matrices of this device that kernels can use. `properties` are those of the device's adapter,
    /// `Adapter::cooperative_matrix_properties`.
    pub fn of(
        device: &wgpu::Device,
        properties: &[wgpu::CooperativeMatrixProperties],
    ) -> Result<MatrixFormat, NoMatrices> {
        let missing = MATRIX_FEATURES - device.features();
        if !missing.is_empty() {
            return Err(NoMatrices::Features(missing));
        }
        let listed = |&size: &u32| {
            properties.iter().any(|p| {
                [p.m_size, p.n_size, p.k_size] == [size; 3]
                    && p.ab_type == wgpu::CooperativeScalarType::F16
                    && p.cr_type == wgpu::CooperativeScalarType::F32
            })
        };
        let size = [16, 8].into_iter().find(listed).ok_or(NoMatrices::MatrixSize)?;
        let info = device.adapter_info();
        let (min, max) = match info.backend {
            // wgpu reports what any GPU with Metal may have; all those with matrices have 32.
            wgpu::Backend::Metal => (32, 32),
            _ => (info.subgroup_min_size, info.subgroup_max_size),
        };
        if min != max || !max.is_power_of_two() || max < size || max > size * size {
            return Err(NoMatrices::SubgroupSize { min, max });
        }
        Ok(MatrixFormat { size, lanes: max })
    }

    /// How many elements each lane holds. Where an implementation keeps elements more than once it is more, never
    /// less, so that these can always be accessed; the probe then finds no layout.
    pub fn elements(self) -> u32 {
        self.size * self.size / self.lanes
    }
}

/// Why a module was refused. The library's own modules are not: a test makes each of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// naga refused the text, or could not write it as SPIR-V.
    #[error("{0}")]
    Naga(String),
    /// A matrix that the format does not have.
    #[error("{found} is not a matrix of f16 (A, B) or f32 (C) with {size} rows and columns")]
    Matrix {
        /// The type, as WGSL writes it.
        found: String,
        /// The format's size.
        size: u32,
    },
    /// A function whose name starts with `coop_` and that means nothing.
    #[error("unknown placeholder {function}: it must start with coop_get_ or coop_set")]
    UnknownPlaceholder {
        /// Its name.
        function: String,
    },
    /// A placeholder with the wrong parameters, result or name.
    #[error("placeholder {function}: {expected}")]
    Signature {
        /// Its name.
        function: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A placeholder for an element that a lane may not hold.
    #[error("placeholder {function} is for element {element}; a lane holds {elements}")]
    Element {
        /// Its name.
        function: String,
        /// The highest element that it accesses.
        element: u32,
        /// How many there are.
        elements: u32,
    },
    /// A workgroup in which lanes of a subgroup are missing: only whole subgroups can share matrices.
    #[error("entry point {entry_point} has workgroups of {width} in x; a multiple of {lanes} is needed")]
    Workgroup {
        /// Its name.
        entry_point: String,
        /// The workgroup's size in x.
        width: u32,
        /// The lanes of a subgroup.
        lanes: u32,
    },
    /// A placeholder that the SPIR-V does not name, so that its harmless body would run.
    #[error("placeholder {function} is not in the SPIR-V that naga wrote")]
    Lost {
        /// Its name.
        function: String,
    },
}

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
    pub const U_LESS_THAN: u32 = 176;
    pub const LOOP_MERGE: u32 = 246;
    pub const BRANCH_CONDITIONAL: u32 = 250;
    pub const BITCAST: u32 = 124;
    pub const RETURN_VALUE: u32 = 254;
}

/// A SPIR-V module starts with five words; this one is the lowest number that no id has.
const HEADER: usize = 5;
const BOUND: usize = 3;

/// The opcode and the operands of each instruction.
fn instructions(mut words: &[u32]) -> impl Iterator<Item = (u32, &[u32])> {
    std::iter::from_fn(move || {
        let length = (*words.first()? >> 16) as usize;
        let (instruction, rest) = words.split_at(length);
        words = rest;
        Some((instruction[0] & 0xffff, &instruction[1..]))
    })
}

fn push(words: &mut Vec<u32>, opcode: u32, operands: &[u32]) {
    words.push((operands.len() as u32 + 1) << 16 | opcode);
    words.extend_from_slice(operands);
}

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

/// A bit of the number of a lane, or of the number of an element that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bit {
    /// A bit of the lane.
    Lane(u32),
    /// A bit of the element.
    Element(u32),
}

/// Where a square matrix lies in the lanes of a subgroup: the bits of lane and element are the bits of row and column,
/// in another order.
///
/// So the positions of a lane and of an element add: element e of lane i is at `position(i, 0) + position(0, e)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MatrixLayout {
    /// What each bit of the row is, the lowest first.
    pub row: Vec<Bit>,
    /// What each bit of the column is, the lowest first.
    pub column: Vec<Bit>,
}

/// How elements lie that are not in a [`MatrixLayout`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The numbers do not make a matrix.
    #[error("{found} indices in {lanes} lanes of {elements} elements are no matrix with {size} rows and columns")]
    Shape {
        /// Rows and columns.
        size: u32,
        /// Lanes.
        lanes: u32,
        /// Elements of each lane.
        elements: u32,
        /// How many indices were given.
        found: usize,
    },
    /// A bit that is not one bit of row or column.
    #[error("{bit:?} alone is at index {index:#x}, which has not one bit")]
    NotOneBit {
        /// The bit.
        bit: Bit,
        /// What the element holds whose only bit it is.
        index: u32,
    },
    /// Two bits that are the same bit of row or column: some elements are held twice.
    #[error("{first:?} and {second:?} are the same bit of row and column")]
    SameBit {
        /// The lower.
        first: Bit,
        /// The higher.
        second: Bit,
    },
    /// An element that is not where its bits say.
    #[error("element {element} of lane {lane} is at index {found:#x}; by its bits it would be at {expected:#x}")]
    NotLinear {
        /// The lane.
        lane: u32,
        /// Its element.
        element: u32,
        /// The index that it holds.
        found: u32,
        /// The sum of what its bits hold.
        expected: u32,
    },
}

impl MatrixLayout {
    /// Finds the layout from what the elements of a matrix of indices are: `indices[lane * elements + element]` is
    /// `row * size + column`.
    pub fn from_indices(size: u32, lanes: u32, elements: u32, indices: &[u32]) -> Result<MatrixLayout, LayoutError> {
        let all_powers = [size, lanes, elements].iter().all(|n| n.is_power_of_two());
        if !all_powers || lanes * elements != size * size || indices.len() != (size * size) as usize {
            return Err(LayoutError::Shape { size, lanes, elements, found: indices.len() });
        }
        // The place of an element in `indices` is a number too: its low bits are those of the element, its high bits
        // those of the lane.
        let bit = |n: u32| match n.checked_sub(elements.ilog2()) {
            Some(lane_bit) => Bit::Lane(lane_bit),
            None => Bit::Element(n),
        };
        let bits = 2 * size.ilog2();
        // The bit of the place that is bit n of the index.
        let mut sources = vec![None; bits as usize];
        for n in 0..bits {
            let index = indices[1 << n];
            if !index.is_power_of_two() || index >= size * size {
                return Err(LayoutError::NotOneBit { bit: bit(n), index });
            }
            if let Some(first) = sources[index.ilog2() as usize].replace(n) {
                return Err(LayoutError::SameBit { first: bit(first), second: bit(n) });
            }
        }
        for (place, &found) in (0..).zip(indices) {
            let set = (0..bits).filter(|n| place >> n & 1 == 1);
            let expected = set.map(|n| indices[1 << n]).sum();
            if found != expected {
                let (lane, element) = (place / elements, place % elements);
                return Err(LayoutError::NotLinear { lane, element, found, expected });
            }
        }
        let mut column: Vec<Bit> = sources.into_iter().flatten().map(bit).collect();
        let row = column.split_off(size.ilog2() as usize);
        Ok(MatrixLayout { row, column })
    }

    /// A layout in which each lane's elements lie in one row, in runs of four where it has as many, beside those of its
    /// neighbours. For formats with at least as many lanes as rows.
    pub fn rows(format: MatrixFormat) -> MatrixLayout {
        let (bits, elements) = (format.size.ilog2(), format.elements().ilog2());
        let shared = bits - elements;
        let run = elements.min(2);
        let mut column: Vec<Bit> = (0..run).map(Bit::Element).collect();
        column.extend((0..shared).map(Bit::Lane));
        column.extend((run..elements).map(Bit::Element));
        MatrixLayout { row: (shared..shared + bits).map(Bit::Lane).collect(), column }
    }

    /// Row and column of an element of a lane.
    pub fn position(&self, lane: u32, element: u32) -> (u32, u32) {
        let gather = |bits: &[Bit]| {
            (0..).zip(bits).fold(0, |sum, (place, &bit)| {
                sum | match bit {
                    Bit::Lane(n) => (lane >> n & 1) << place,
                    Bit::Element(n) => (element >> n & 1) << place,
                }
            })
        };
        (gather(&self.row), gather(&self.column))
    }

    /// The bits of an element that choose its row, the one for the lowest row bit first. A lane holds elements of
    /// two to the power of their number rows.
    pub fn row_element_bits(&self) -> Vec<u32> {
        self.row.iter().filter_map(|bit| if let Bit::Element(n) = bit { Some(*n) } else { None }).collect()
    }

    /// What to add to a lane, bit by bit without carry, to reach the lanes that hold the rest of its rows, one step
    /// after the other: the `subgroupShuffleXor` steps of a sum or maximum over each row.
    pub fn row_shuffles(&self) -> Vec<u32> {
        self.column.iter().filter_map(|bit| if let Bit::Lane(n) = bit { Some(1 << n) } else { None }).collect()
    }

    /// The layout of the transposed matrix in the same lanes.
    pub fn transposed(&self) -> MatrixLayout {
        MatrixLayout { row: self.column.clone(), column: self.row.clone() }
    }
}

/// How the matrices of a device lie in its lanes, by role.
///
/// Scores become left operands in place where `c == a`; right operands are left operands of the transposed matrix where
/// `b == a.transposed()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbedLayouts {
    /// Accumulators, f32.
    pub c: MatrixLayout,
    /// Left operands, f16.
    pub a: MatrixLayout,
    /// Right operands, f16.
    pub b: MatrixLayout,
}

/// Runs a small kernel that finds how matrices lie in the lanes of this device.
pub async fn probe(context: &Context, format: MatrixFormat) -> Result<ProbedLayouts, NoElementAccess> {
    let MatrixFormat { size, lanes } = format;
    let count = size * size;
    let module = ElementModule::new(&probe_text(format), format, &[0, 1, 2], false)?;
    // f16 holds every integer up to 2048.
    let indices_f32: Vec<f32> = (0..count).map(|n| n as f32).collect();
    let indices_f16: Vec<half::f16> = indices_f32.iter().map(|&x| half::f16::from_f32(x)).collect();
    // No index, so that an element that no lane writes is noticed.
    let nothing = vec![u32::MAX; 3 * count as usize];

    let device = context.device();
    // Asked before any scope opens.
    passthrough::check(device)?;
    let submitted = faults::caught_async(device, "probe", || {
        let shader = passthrough::shader_module(device, "coop_probe", &module)
            .map_err(|error| Error::Device(error.to_string()))?;
        let buffers = [
            context.upload(bytemuck::cast_slice(&indices_f32))?,
            context.upload(bytemuck::cast_slice(&indices_f16))?,
            context.upload(bytemuck::cast_slice(&nothing))?,
        ];
        let label = Some("coop_probe");
        let entries = [0, 1, 2].map(|binding| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: false },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        });
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &shader,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let entries: Vec<_> = (0..)
            .zip(&buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label, layout: &layout, entries: &entries });
        let mut encoder = device.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(1, 1, 1);
        }
        context.queue().submit([encoder.finish()]);
        let [_, _, held] = buffers;
        Ok(held)
    });
    let failed = |error: Error| NoElementAccess::Probe(error.to_string());
    let held = submitted.await.map_err(failed)?;
    let bytes = context.download_async(&held, 0, u64::from(3 * count) * 4).await.map_err(failed)?;
    let held: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
    let layout = |role, part: usize| {
        let indices = &held[part * count as usize..][..count as usize];
        MatrixLayout::from_indices(size, lanes, format.elements(), indices)
            .map_err(|error| NoElementAccess::Layout { role, error })
    };
    Ok(ProbedLayouts { c: layout("C", 0)?, a: layout("A", 1)?, b: layout("B", 2)? })
}

/// The probe's kernel for matrices of this format. Public for the test that validates it.
pub fn probe_text(format: MatrixFormat) -> String {
    let MatrixFormat { size, lanes } = format;
    let mut text =
        format!("enable f16;\nenable wgpu_cooperative_matrix;\nconst SIZE = {size}u;\nconst LANES = {lanes}u;\n");
    for (role, scalar) in [("c", "f32"), ("a", "f16"), ("b", "f16")] {
        let matrix = format!("Matrix{}", role.to_uppercase());
        let _ = writeln!(text, "alias {matrix} = coop_mat{size}x{size}<{scalar}, {}>;", role.to_uppercase());
        let mut writes = String::new();
        for n in 0..format.elements() {
            let _ = writeln!(text, "fn coop_get_{role}_{n}(m: {matrix}) -> {scalar} {{ return {scalar}(); }}");
            let _ = writeln!(writes, "    held[at + {n}u] = u32(coop_get_{role}_{n}(m));");
        }
        let _ = writeln!(text, "fn write_{role}(m: {matrix}, at: u32) {{\n{writes}}}");
    }
    text + include_str!("../shaders/coop_probe.wgsl")
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
