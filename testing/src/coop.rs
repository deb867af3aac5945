//! What the tests of kernels on cooperative matrices share.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use wgpu_flash_attention::CoopForm::{self, Registers, WorkgroupMemory};
use wgpu_flash_attention::matrices::{Bit, ElementModule, MatrixFormat, MatrixLayout};
use wgpu_flash_attention::{Context, ElementType, HeadlessOptions, Kernel, PlanOptions, PlannedModule, wgpu};

use crate::backward::{self, Ask};
use crate::cases::{self, dims};
use crate::skipped::{NEWER_DRIVER, NO_VALIDATOR, skipped};
use crate::{Case, check_all, loops, stores};

/// A context with cooperative matrices, on a device of its own: software Vulkan compiles the pipelines of a device one by one,
/// those of several tests at once.
pub fn context() -> Option<Context> {
    let options = HeadlessOptions::default().cooperative_matrices(true);
    Context::headless_with(&options)
        .inspect_err(|why| skipped(&format!("kernels on cooperative matrices. {why}. {NEWER_DRIVER}")))
        .ok()
}

/// Whether a processor does the work of the device. It takes minutes to compile large tiles.
pub fn is_software(context: &Context) -> bool {
    context.device().adapter_info().device_type == wgpu::DeviceType::Cpu
}

/// Whether kernels take matrices of bf16 on the context's device.
pub fn has_bf16(context: &Context) -> bool {
    context.facts().matrices.as_ref().is_some_and(|matrices| matrices.bf16.is_ok())
}

/// Rows and columns of the context's matrices: of software Vulkan, and of GPUs that these tests have run on.
pub fn matrix_size(context: &Context) -> u32 {
    if is_software(context) { 8 } else { 16 }
}

/// A case for each pair of head dims; on a processor, of those up to 64, since it takes long to compile more matrices.
pub fn dims_of(context: &Context) -> Vec<(String, Case)> {
    let mut dims = dims();
    dims.retain(|(_, case)| {
        let shape = &case.problem.shape;
        !is_software(context) || shape.head_dim.max(shape.head_dim_v) <= 64
    });
    dims
}

/// A context of a device with these features, and WebGPU's limits but for its workgroup memory: so many bytes with matrices of 8, and with
/// matrices of 16, whose tiles are larger.
#[allow(unsafe_code)]
pub fn small_device(features: wgpu::Features, [of_8, of_16]: [u32; 2]) -> Option<Context> {
    let workgroup_bytes = if matrix_size(&context()?) == 16 { of_16 } else { of_8 };
    let instance = wgpu::Instance::default();
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default())).unwrap();
    let descriptor = wgpu::DeviceDescriptor {
        required_features: features,
        required_limits: wgpu::Limits { max_compute_workgroup_storage_size: workgroup_bytes, ..Default::default() },
        // SAFETY: a test; the features are what it is about.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    Some(pollster::block_on(Context::new(&device, &queue).with_cooperative_matrices(&adapter)).unwrap())
}

pub fn in_form(form: CoopForm, options: PlanOptions) -> PlanOptions {
    options.coop_form(form)
}

/// Each way in each form that takes the type.
pub fn in_forms<'a>(
    element_type: ElementType,
    ways: &[(&'a str, &'a Context, PlanOptions)],
) -> Vec<(&'a str, &'a Context, PlanOptions)> {
    let forms = if element_type == ElementType::F16 { &[Registers, WorkgroupMemory][..] } else { &[Registers] };
    let with =
        |&form: &CoopForm| ways.iter().map(move |&(name, context, options)| (name, context, in_form(form, options)));
    forms.iter().flat_map(with).collect()
}

/// Both passes of cases in a type, in each form that takes the type. The backward pass in bf16 takes whole vectors only, so that it leaves
/// cases of odd strides and head dims, which have "odd" in their names.
pub fn check_passes(context: &Context, mut cases: Vec<(String, Case)>, element_type: ElementType) {
    let forward = PlanOptions::default().kernel(Kernel::Coop);
    let ways = in_forms(element_type, &[("coop", context, forward)]);
    check_all(&cases::prepare(cases.clone(), element_type), &ways);
    let ways = in_forms(element_type, &[("coop", context, forward.backward(Kernel::Coop))]);
    cases.retain(|(name, _)| element_type != ElementType::BF16 || !name.contains("odd"));
    backward::check_all(&backward::prepare(cases, element_type, Ask::default()), &ways);
}

/// The matrices that are known to exist: of an H100 and of lavapipe.
pub fn known_matrices() -> [(MatrixFormat, MatrixLayout); 2] {
    use Bit::{Element, Lane};
    let h100 = MatrixLayout {
        row: vec![Lane(2), Lane(3), Lane(4), Element(2)],
        column: vec![Element(0), Lane(0), Lane(1), Element(1)],
    };
    let lavapipe =
        MatrixLayout { row: vec![Element(0), Element(1), Element(2)], column: vec![Lane(0), Lane(1), Lane(2)] };
    [(MatrixFormat { size: 16, lanes: 32 }, h100), (MatrixFormat { size: 8, lanes: 8 }, lavapipe)]
}

/// Bytes of the workgroup variables of a module. Functions declare none: without them naga has a tenth to read.
pub fn workgroup_bytes(text: &str) -> u32 {
    workgroup_sizes(&naga::front::wgsl::parse_str(&without_functions(text)).unwrap()).iter().sum()
}

/// The lines of a module that are not of its functions. Each function begins on a line of its own.
fn without_functions(text: &str) -> String {
    let mut kept = String::new();
    let (mut in_function, mut depth) = (false, 0);
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or(line);
        in_function |= depth == 0 && (code.starts_with("fn ") || code.starts_with("@compute "));
        if !in_function {
            kept.push_str(line);
            kept.push('\n');
        }
        let braces = |brace| code.matches(brace).count() as i32;
        depth += braces('{') - braces('}');
        in_function &= depth > 0 || !code.contains('}');
    }
    kept
}

/// Sizes of the workgroup variables of a module.
pub fn workgroup_sizes(module: &naga::Module) -> Vec<u32> {
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let variables = module.global_variables.iter().map(|(_, variable)| variable);
    variables.filter(|v| v.space == naga::AddressSpace::WorkGroup).map(|v| layouter[v.ty].size).collect()
}

/// The validator of SPIR-V, where it is there.
pub fn validator() -> Option<PathBuf> {
    let validator = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/mesa/spirv-val");
    if !validator.exists() {
        skipped(NO_VALIDATOR);
        return None;
    }
    Some(validator)
}

/// The instructions of a SPIR-V module after its header: opcode and operands.
fn instructions(words: &[u32]) -> impl Iterator<Item = (u32, &[u32])> {
    let mut rest = &words[5..];
    std::iter::from_fn(move || {
        let (&first, _) = rest.split_first()?;
        let (instruction, after) = rest.split_at((first >> 16) as usize);
        rest = after;
        Some((first & 0xffff, &instruction[1..]))
    })
}

/// What a module may need of a device: what wgpu has seen to when the device has cooperative matrices, f16, subgroups and
/// passthrough, on Vulkan 1.3.
const CAPABILITIES: [(u32, &str); 15] = [
    (1, "Shader"),
    (9, "Float16"),
    // Where the device was made with SHADER_INT64: the library plans modules with INT64 for no other.
    (11, "Int64"),
    (61, "GroupNonUniform"),
    (62, "GroupNonUniformVote"),
    (63, "GroupNonUniformArithmetic"),
    (64, "GroupNonUniformBallot"),
    (65, "GroupNonUniformShuffle"),
    (66, "GroupNonUniformShuffleRelative"),
    (4433, "StorageBuffer16BitAccess"),
    (4434, "UniformAndStorageBuffer16BitAccess"),
    // These two where the library made the device with VK_KHR_shader_bfloat16: it plans modules on bf16 for no other.
    (5116, "BFloat16TypeKHR"),
    (5118, "BFloat16CooperativeMatrixKHR"),
    (5345, "VulkanMemoryModel"),
    (6022, "CooperativeMatrixKHR"),
];

/// The module without strides and offsets of types that variables outside buffers have, and none in them. naga writes them, which Vulkan's rules do not
/// take (gfx-rs/wgpu#7696) and no driver minds; the validator stops at the first thing that it finds.
fn without_layouts_on_chip(words: &[u32]) -> Vec<u32> {
    // What a type is made of, and which types a variable's storage class leads to.
    let mut parts: HashMap<u32, Vec<u32>> = HashMap::new();
    let (mut on_chip, mut of_others) = (vec![], vec![]);
    for (opcode, operands) in instructions(words) {
        match (opcode, operands) {
            // OpTypeArray and OpTypeRuntimeArray, OpTypeStruct, OpTypePointer.
            (28 | 29, [id, element, ..]) => drop(parts.insert(*id, vec![*element])),
            (30, [id, members @ ..]) => drop(parts.insert(*id, members.to_vec())),
            (32, [id, _, pointee]) => drop(parts.insert(*id, vec![*pointee])),
            // OpVariable; Workgroup, Private, Function.
            (59, [ty, _, 4 | 6 | 7, ..]) => on_chip.push(*ty),
            (59, [ty, ..]) => of_others.push(*ty),
            _ => {}
        }
    }
    let reached = |mut open: Vec<u32>| {
        let mut all = HashSet::new();
        while let Some(id) = open.pop() {
            if all.insert(id) {
                open.extend(parts.get(&id).into_iter().flatten());
            }
        }
        all
    };
    let (on_chip, of_others) = (reached(on_chip), reached(of_others));
    let mut out = words[..5].to_vec();
    for (opcode, operands) in instructions(words) {
        // OpDecorate ArrayStride (6), OpMemberDecorate Offset (35).
        let layout = matches!((opcode, operands), (71, [_, 6, ..]) | (72, [_, _, 35, ..]));
        if !(layout && on_chip.contains(&operands[0]) && !of_others.contains(&operands[0])) {
            out.push((operands.len() as u32 + 1) << 16 | opcode);
            out.extend(operands);
        }
    }
    out
}

/// What the validator of SPIR-V says of a module, if anything.
pub fn spirv_error(validator: &Path, name: &str, words: &[u32]) -> Option<String> {
    let capabilities = instructions(words).filter(|(opcode, _)| *opcode == 17).map(|(_, operands)| operands[0]);
    let mut unexpected = capabilities.filter(|found| CAPABILITIES.iter().all(|(known, _)| known != found));
    if let Some(capability) = unexpected.next() {
        return Some(format!("capability {capability} is none that the device was asked for"));
    }
    let words = &without_layouts_on_chip(words)[..];
    let mut file = tempfile::Builder::new().suffix(&name.replace('/', "-")).tempfile().unwrap();
    file.write_all(bytemuck::cast_slice(words)).unwrap();
    let output = Command::new(validator).args(["--target-env", "vulkan1.3"]).arg(file.path()).output().unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

/// naga takes the module, the library makes it one on bf16, and the validator of SPIR-V takes that.
pub fn check_bf16(planned: &PlannedModule, format: MatrixFormat, checked: bool, spirv_val: Option<&Path>) {
    let PlannedModule { specialization, bindings, .. } = planned;
    let text = planned.source().unwrap().text;
    assert_eq!(workgroup_bytes(&text), planned.workgroup_bytes, "{specialization:?}");
    let module = ElementModule::new(&text, format, bindings, checked).and_then(ElementModule::into_bf16);
    let module = module.unwrap_or_else(|error| panic!("{specialization:?}: {error}"));
    let has =
        |capability| instructions(module.spirv()).any(|(opcode, operands)| (opcode, operands) == (17, &[capability]));
    assert!(has(5116) && has(5118), "{specialization:?}");
    if let Some(error) = spirv_val.and_then(|validator| spirv_error(validator, "bf16.spv", module.spirv())) {
        panic!("{specialization:?}: {error}");
    }
}

/// Matrices that devices without access to elements may have: of 2, 4 and 8 elements a lane.
pub const WGSL_FORMATS: [MatrixFormat; 4] = [
    MatrixFormat { size: 8, lanes: 8 },
    // Metal's.
    MatrixFormat { size: 8, lanes: 32 },
    MatrixFormat { size: 16, lanes: 32 },
    MatrixFormat { size: 16, lanes: 64 },
];

/// naga takes the module, of a form through workgroup memory, with no more than its features, and writes it as SPIR-V,
/// which the validator takes, and, where matrices are as Metal has them, as MSL. Its workgroup memory is what the tile says.
pub fn check_wgsl(planned: &PlannedModule, format: MatrixFormat, said: u32, spirv_val: Option<&Path>) {
    use naga::back::{msl, spv};
    use naga::valid::{Capabilities, ValidationFlags, Validator};
    let (specialization, text) = (&planned.specialization, planned.source().unwrap().text);
    let fail = |error: &str| -> ! { panic!("{specialization:?}: {error}") };
    if let Some((line, text)) = loops::uninitialised_in_loop(&text) {
        fail(&format!("line {line}: a variable in a loop without a value: {text}"));
    }
    let module = naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| fail(&e.emit_to_string(&text)));
    assert_eq!(workgroup_sizes(&module).iter().sum::<u32>(), said, "{specialization:?}");
    let mut capabilities = Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16 | Capabilities::SUBGROUP;
    capabilities.set(Capabilities::SHADER_INT64, specialization.switches.contains(&"INT64"));
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    let info = validator.validate(&module).unwrap_or_else(|e| fail(&e.emit_to_string(&text)));
    // As wgpu writes it for Vulkan 1.3, on a device without StorageInputOutput16.
    let options = spv::Options { lang_version: (1, 6), use_storage_input_output_16: false, ..Default::default() };
    let words = spv::write_vec(&module, &info, &options, None).unwrap_or_else(|e| fail(&e.to_string()));
    let name = format!("{}.spv", specialization.file);
    if let Some(error) = spirv_val.and_then(|v| spirv_error(v, &name, &words)) {
        fail(&error);
    }
    if stores::stores_components(&module, &info) {
        fail("a component of a shared vector is stored");
    }
    let options = msl::Options { lang_version: (2, 3), ..Default::default() };
    if (format.size, format.lanes) == (8, 32) {
        msl::write_string(&module, &info, &options, &Default::default()).unwrap_or_else(|e| fail(&e.to_string()));
    }
}
