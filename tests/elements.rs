//! Element access on cooperative matrices: the pass over SPIR-V, layouts, and the probe of a device.
//!
//! The last tests need a device with cooperative matrices (`scripts/vulkan --coop cargo test` has one); they say so where
//! there is none.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use half::f16;
use wgpu_flash_attention::facts::Facts;
use wgpu_flash_attention::matrices::{
    self, Bit, ElementModule, LayoutError, MatrixFormat, MatrixLayout, ModuleError, Rounding,
};
use wgpu_flash_attention::specialize::Specialization;
use wgpu_flash_attention::{Context, CoopForm, ElementType, Kernel, PlanOptions, Problem, Shape, modules, wgpu};

use flash_attention_testing::skipped::{NEWER_DRIVER, NO_VALIDATOR, skipped};

const FORMATS: [MatrixFormat; 5] = [
    MatrixFormat { size: 8, lanes: 8 },
    MatrixFormat { size: 8, lanes: 32 },
    MatrixFormat { size: 16, lanes: 16 },
    MatrixFormat { size: 16, lanes: 32 },
    MatrixFormat { size: 16, lanes: 64 },
];

// Layouts

/// Of an H100: 16 rows and columns, 32 lanes, 8 elements.
fn h100() -> MatrixLayout {
    MatrixLayout {
        row: vec![Bit::Lane(2), Bit::Lane(3), Bit::Lane(4), Bit::Element(2)],
        column: vec![Bit::Element(0), Bit::Lane(0), Bit::Lane(1), Bit::Element(1)],
    }
}

/// Of lavapipe: 8 rows and columns, 8 lanes, 8 elements.
fn lavapipe() -> MatrixLayout {
    MatrixLayout {
        row: vec![Bit::Element(0), Bit::Element(1), Bit::Element(2)],
        column: vec![Bit::Lane(0), Bit::Lane(1), Bit::Lane(2)],
    }
}

/// What each element of each lane holds, by a rule for row and column.
fn indices(size: u32, lanes: u32, position: impl Fn(u32, u32) -> (u32, u32)) -> Vec<u32> {
    let elements = size * size / lanes;
    (0..size * size)
        .map(|place| {
            let (row, column) = position(place / elements, place % elements);
            row * size + column
        })
        .collect()
}

#[test]
fn known_layouts_are_found() {
    let nvidia = indices(16, 32, |lane, element| {
        let (quad, column) = (lane / 4, lane % 4);
        (quad + 8 * (element >> 2), 2 * column + (element & 1) + 8 * (element >> 1 & 1))
    });
    assert_eq!(MatrixLayout::from_indices(16, 32, 8, &nvidia), Ok(h100()));
    let mesa = indices(8, 8, |lane, element| (element, lane));
    assert_eq!(MatrixLayout::from_indices(8, 8, 8, &mesa), Ok(lavapipe()));
    // All of a row in one lane, and all of the matrix.
    let rows = MatrixLayout::from_indices(8, 8, 8, &indices(8, 8, |lane, element| (lane, element))).unwrap();
    assert_eq!(rows, lavapipe().transposed());
    let whole = MatrixLayout::from_indices(8, 1, 64, &Vec::from_iter(0..64)).unwrap();
    assert_eq!(whole.position(0, 13), (1, 5));
}

#[test]
fn what_kernels_ask_of_a_layout() {
    let h100 = h100();
    assert_eq!(h100.position(0, 0), (0, 0));
    assert_eq!(h100.position(0b10110, 0), (5, 4));
    assert_eq!(h100.position(0, 0b101), (8, 1));
    assert_eq!(h100.position(0b10110, 0b101), (13, 5));
    assert_eq!(h100.row_element_bits(), [2]);
    assert_eq!(h100.row_shuffles(), [1, 2]);
    assert_eq!(h100.transposed().position(0b10110, 0b101), (5, 13));
    assert_eq!(h100.transposed().transposed(), h100);
    let lavapipe = lavapipe();
    assert_eq!(lavapipe.position(3, 6), (6, 3));
    assert_eq!(lavapipe.row_element_bits(), [0, 1, 2]);
    assert_eq!(lavapipe.row_shuffles(), [1, 2, 4]);
    // Each lane's elements in one row, four by four.
    let rows = MatrixLayout::rows(MatrixFormat { size: 16, lanes: 32 });
    assert_eq!([0, 3, 4, 7].map(|element| rows.position(0, element)), [(0, 0), (0, 3), (0, 8), (0, 11)]);
    assert_eq!([1, 2, 31].map(|lane| rows.position(lane, 0)), [(0, 4), (1, 0), (15, 4)]);
    let rows = MatrixLayout::rows(MatrixFormat { size: 8, lanes: 32 });
    assert_eq!([(1, 1), (6, 0)].map(|(lane, element)| rows.position(lane, element)), [(0, 3), (1, 4)]);
    assert_eq!(MatrixLayout::rows(MatrixFormat { size: 8, lanes: 8 }), lavapipe.transposed());
}

#[test]
fn lanes_that_share_a_row_are_reached_by_the_shuffles() {
    for (layout, lanes) in [(h100(), 32), (lavapipe(), 8), (lavapipe().transposed(), 8)] {
        for lane in 0..lanes {
            let mut reached = vec![lane];
            for mask in layout.row_shuffles() {
                reached.extend(reached.clone().iter().map(|lane| lane ^ mask));
            }
            reached.sort_unstable();
            let row = layout.position(lane, 0).0;
            let sharing: Vec<u32> = (0..lanes).filter(|&other| layout.position(other, 0).0 == row).collect();
            assert_eq!(reached, sharing);
        }
    }
}

#[test]
fn other_layouts_are_refused() {
    let find = |indices: &[u32]| MatrixLayout::from_indices(8, 8, 8, indices).unwrap_err();
    let good = indices(8, 8, |lane, element| (element, lane));
    // Two elements have changed places: every element is there, and each bit alone is where it was.
    let mut swapped = good.clone();
    swapped.swap(7 * 8 + 7, 7 * 8 + 5);
    assert_eq!(find(&swapped), LayoutError::NotLinear { lane: 7, element: 5, found: 63, expected: 47 });
    // Lane 0 does not begin with element (0, 0).
    let mut shifted = good.clone();
    shifted.rotate_left(1);
    assert_eq!(find(&shifted), LayoutError::NotOneBit { bit: Bit::Element(1), index: 24 });
    // Rows are skewed, as to avoid bank conflicts: linear in the bits, and no permutation of them.
    let skewed = indices(8, 8, |lane, element| (element, lane ^ element));
    assert_eq!(find(&skewed), LayoutError::NotOneBit { bit: Bit::Element(0), index: 9 });
    // The upper half of the lanes holds what the lower half holds.
    let doubled = indices(8, 8, |lane, element| (element, lane & 3));
    assert_eq!(find(&doubled), LayoutError::NotOneBit { bit: Bit::Lane(2), index: 0 });
    let same = indices(8, 8, |lane, element| (element, lane & 3 | lane >> 2));
    assert_eq!(find(&same), LayoutError::SameBit { first: Bit::Lane(0), second: Bit::Lane(2) });
    // A lane wrote nothing.
    let mut unwritten = good.clone();
    unwritten[6 * 8 + 6] = u32::MAX;
    assert_eq!(find(&unwritten), LayoutError::NotLinear { lane: 6, element: 6, found: u32::MAX, expected: 54 });
    unwritten[4] = 1 << 31;
    assert_eq!(find(&unwritten), LayoutError::NotOneBit { bit: Bit::Element(2), index: 1 << 31 });
    // Not the elements of one matrix.
    for (size, lanes, elements, count) in [(8, 8, 8, 63), (8, 32, 8, 64), (12, 12, 12, 144), (0, 0, 0, 0)] {
        let error = MatrixLayout::from_indices(size, lanes, elements, &vec![0; count]).unwrap_err();
        assert_eq!(error, LayoutError::Shape { size, lanes, elements, found: count });
    }
}

// The pass

/// What a function returns.
struct Returned {
    parameters: Vec<u32>,
    /// The accesses that make the value, the last first: opcode, result type, result, operands.
    chain: Vec<Vec<u32>>,
}

const NAME: u32 = 5;
const FUNCTION: u32 = 54;
const FUNCTION_PARAMETER: u32 = 55;
const DECORATE: u32 = 71;
const COMPOSITE_EXTRACT: u32 = 81;
const COMPOSITE_INSERT: u32 = 82;
const RETURN_VALUE: u32 = 254;

/// Opcode and operands of each instruction.
fn instructions(words: &[u32]) -> Vec<Vec<u32>> {
    let (mut all, mut rest) = (vec![], &words[5..]);
    while let Some(first) = rest.first() {
        let (instruction, next) = rest.split_at((first >> 16) as usize);
        all.push([&[first & 0xffff], &instruction[1..]].concat());
        rest = next;
    }
    all
}

/// What each named function returns.
fn functions(words: &[u32]) -> HashMap<String, Returned> {
    let mut names = HashMap::new();
    let mut functions: HashMap<String, Returned> = HashMap::new();
    let mut results: HashMap<u32, Vec<u32>> = HashMap::new();
    let mut name = String::new();
    for instruction in instructions(words) {
        match instruction[0] {
            NAME => {
                let bytes = instruction[2..].iter().flat_map(|w| w.to_le_bytes()).take_while(|&b| b != 0).collect();
                names.insert(instruction[1], String::from_utf8(bytes).unwrap());
            }
            FUNCTION => {
                name = names[&instruction[2]].clone();
                functions.insert(name.clone(), Returned { parameters: vec![], chain: vec![] });
            }
            FUNCTION_PARAMETER => functions.get_mut(&name).unwrap().parameters.push(instruction[2]),
            COMPOSITE_EXTRACT | COMPOSITE_INSERT => {
                let before = results.insert(instruction[2], instruction.clone());
                assert_eq!(before, None, "an id with two results");
                assert!(instruction[2] < words[3], "an id past the bound");
            }
            RETURN_VALUE => {
                let mut value = instruction[1];
                while let Some(made) = results.get(&value) {
                    functions.get_mut(&name).unwrap().chain.push(made.clone());
                    value = *made[3..].iter().rev().nth(1).unwrap();
                }
            }
            _ => {}
        }
    }
    functions
}

const EIGHT: MatrixFormat = MatrixFormat { size: 8, lanes: 32 };

/// Directives, types and an entry point around functions.
fn module(functions: &str) -> String {
    format!(
        "enable f16;\nenable wgpu_cooperative_matrix;\n\
         alias MatrixC = coop_mat8x8<f32, C>;\nalias MatrixA = coop_mat8x8<f16, A>;\n{functions}\n\
         @compute @workgroup_size(32, 2) fn main() {{}}\n"
    )
}

#[test]
fn placeholders_get_and_set_elements() {
    let text = module(
        "fn coop_get_1(m: MatrixC) -> f32 { return 0.0; }\n\
         fn coop_get_left_0(m: MatrixA) -> f16 { if true { return 0.0h; } return 1.0h; }\n\
         fn coop_set(m: MatrixA, x: f16, y: f16) -> MatrixA { return m; }\n\
         fn coop_set_one(m: coop_mat8x8<f32, C>, x: f32) -> MatrixC { return m; }\n\
         fn cooperate(m: MatrixC) -> f32 { return coop_get_1(m); }",
    );
    let module = ElementModule::new(&text, EIGHT, &[], false).unwrap();
    assert_eq!(module.entry_points(), [("main".to_string(), [32, 2, 1])]);
    let functions = functions(module.spirv());

    let get = &functions["coop_get_1"];
    assert_eq!(get.chain.len(), 1);
    assert_eq!(get.chain[0][0], COMPOSITE_EXTRACT);
    assert_eq!(get.chain[0][3..], [get.parameters[0], 1]);
    // Every return of a function.
    let left = &functions["coop_get_left_0"];
    assert_eq!(left.chain.len(), 2);
    assert!(left.chain.iter().all(|made| made[3..] == [left.parameters[0], 0]));

    let set = &functions["coop_set"];
    let [second, first] = &set.chain[..] else { panic!("{} steps", set.chain.len()) };
    assert_eq!([first[0], second[0]], [COMPOSITE_INSERT; 2]);
    assert_eq!(first[3..], [set.parameters[1], set.parameters[0], 0]);
    assert_eq!(second[3..], [set.parameters[2], first[2], 1]);
    assert_eq!(functions["coop_set_one"].chain.len(), 1);

    assert!(functions["cooperate"].chain.is_empty());
    assert!(functions["main"].chain.is_empty());
}

#[test]
fn wrong_placeholders_are_refused() {
    let first = "its first parameter must be a cooperative matrix";
    let number = "its name must end in _ and the number of an element";
    let second = "it must have no second parameter";
    let element = "its result must be of the type of the matrix' elements";
    let scalars = "its parameters after the first must be of the type of the matrix' elements";
    let result = "its result must be of the type of its first parameter";
    for (text, function, expected) in [
        ("fn coop_get_0() -> f32 { return 0.0; }", "coop_get_0", first),
        ("fn coop_get_0(m: f32) -> f32 { return 0.0; }", "coop_get_0", first),
        ("fn coop_get_0(n: u32, m: MatrixC) -> f32 { return 0.0; }", "coop_get_0", first),
        ("fn coop_get_first(m: MatrixC) -> f32 { return 0.0; }", "coop_get_first", number),
        ("fn coop_get_0x(m: MatrixC) -> f32 { return 0.0; }", "coop_get_0x", number),
        ("fn coop_get_99999999999(m: MatrixC) -> f32 { return 0.0; }", "coop_get_99999999999", number),
        ("fn coop_get_0(m: MatrixC, n: u32) -> f32 { return 0.0; }", "coop_get_0", second),
        ("fn coop_get_0(m: MatrixC, n: MatrixC) -> f32 { return 0.0; }", "coop_get_0", second),
        ("fn coop_get_0(m: MatrixA) -> f32 { return 0.0; }", "coop_get_0", element),
        ("fn coop_get_0(m: MatrixC) -> vec2f { return vec2f(); }", "coop_get_0", element),
        ("fn coop_get_0(m: MatrixC) {}", "coop_get_0", element),
        ("fn coop_set() -> f32 { return 0.0; }", "coop_set", first),
        ("fn coop_set(m: MatrixA, x: f32) -> MatrixA { return m; }", "coop_set", scalars),
        ("fn coop_set(m: MatrixC, x: f32, y: MatrixC) -> MatrixC { return m; }", "coop_set", scalars),
        ("fn coop_set(m: MatrixC, n: u32) -> MatrixC { return m; }", "coop_set", scalars),
        ("fn coop_set(m: MatrixC, x: f32) -> f32 { return x; }", "coop_set", result),
        ("fn coop_set(m: MatrixC, x: f32) -> MatrixA { return MatrixA(); }", "coop_set", result),
        ("fn coop_set(m: MatrixC, x: f32) {}", "coop_set", result),
    ] {
        let error = ElementModule::new(&module(text), EIGHT, &[], false).unwrap_err();
        assert_eq!(error, ModuleError::Signature { function: function.into(), expected }, "{text}");
    }
    for (text, function) in [
        ("fn coop_ge_0(m: MatrixC) -> f32 { return 0.0; }", "coop_ge_0"),
        ("fn coop_get(m: MatrixC) -> f32 { return 0.0; }", "coop_get"),
        ("fn coop_(m: MatrixC) {}", "coop_"),
    ] {
        let error = ElementModule::new(&module(text), EIGHT, &[], false).unwrap_err();
        assert_eq!(error, ModuleError::UnknownPlaceholder { function: function.into() });
    }
    // Of a matrix of 64 elements each of 32 lanes is sure to hold two.
    for (text, function) in [
        ("fn coop_get_2(m: MatrixC) -> f32 { return 0.0; }", "coop_get_2"),
        ("fn coop_set(m: MatrixC, x: f32, y: f32, z: f32) -> MatrixC { return m; }", "coop_set"),
    ] {
        let error = ElementModule::new(&module(text), EIGHT, &[], false).unwrap_err();
        assert_eq!(error, ModuleError::Element { function: function.into(), element: 2, elements: 2 });
    }
}

#[test]
fn other_matrices_and_features_are_refused() {
    let refuse = |text: &str| ElementModule::new(&module(text), EIGHT, &[], false).unwrap_err();
    for found in ["coop_mat16x16<f32, C>", "coop_mat8x8<f16, C>", "coop_mat8x8<f32, A>", "coop_mat8x8<f32, B>"] {
        let error = refuse(&format!("fn f(m: {found}) {{}}"));
        assert_eq!(error, ModuleError::Matrix { found: found.into(), size: 8 });
    }
    for text in ["fn f() -> f32 { return 0u; }", "fn f( {}", "var<private> x: f64;"] {
        assert!(matches!(refuse(text), ModuleError::Naga(_)), "{text}");
    }
}

#[test]
fn workgroups_are_whole_subgroups() {
    let text = module("").replace("(32, 2)", "(48, 2)");
    let error = ElementModule::new(&text, EIGHT, &[], false).unwrap_err();
    assert_eq!(error, ModuleError::Workgroup { entry_point: "main".into(), width: 48, lanes: 32 });
    let format = MatrixFormat { lanes: 16, ..EIGHT };
    assert!(ElementModule::new(&text, format, &[], false).is_ok());
}

#[test]
fn bindings_are_numbered_as_wgpu_does() {
    let text = module(
        "@group(0) @binding(6) var<storage, read_write> x: array<f32>;\n\
         @group(0) @binding(2) var<uniform> y: vec4f;",
    );
    let module = ElementModule::new(&text, EIGHT, &[6, 0, 2], false).unwrap();
    let mut bindings: Vec<u32> =
        instructions(module.spirv()).iter().filter(|i| i[0] == DECORATE && i[2] == 33).map(|i| i[3]).collect();
    bindings.sort_unstable();
    assert_eq!(bindings, [1, 2]);
    let error = ElementModule::new(&text, EIGHT, &[0, 6], false).unwrap_err();
    assert!(matches!(&error, ModuleError::Naga(what) if what.contains("binding")), "{error}");
}

#[test]
fn checks_are_added_on_request() {
    let text = module(
        "var<workgroup> tile: array<f32, 8>;\n\
         fn f(n: u32) -> f32 { loop { if tile[n] > 1.0 { break; } } return tile[n]; }\n\
         fn coop_get_1(m: MatrixC) -> f32 { return 0.0; }",
    );
    let [checked, plain] = [true, false].map(|checked| ElementModule::new(&text, EIGHT, &[], checked).unwrap());
    assert!(checked.spirv().len() > plain.spirv().len());
    assert_eq!(functions(checked.spirv())["coop_get_1"].chain.len(), 1);
}

/// The functions that tell kernels where the elements of a matrix lie, with the constants that a plan gives a kernel.
fn layout_part(format: MatrixFormat, layout: &MatrixLayout) -> Specialization {
    let facts = Facts::with_limits(wgpu::Limits::unlimited()).matrices(format, Some(layout.clone()));
    let options = PlanOptions::default().kernel(Kernel::Coop).coop_form(CoopForm::Registers);
    let problem = Problem::new(Shape::square(1, 1, 16, 16), ElementType::F16);
    let [kernel] = &modules(&problem, &facts, &options).unwrap()[..] else { panic!("one module") };
    Specialization { file: "matrix/layout.wgsl", entry: "", ..kernel.specialization.clone() }
}

/// Reads and makes matrices of each role through the layout that was found; bindings 0, 3 and 7.
fn round_trip(format: MatrixFormat, layout: &MatrixLayout) -> String {
    let size = format.size;
    let each = |term: &dyn Fn(u32) -> String| Vec::from_iter((0..format.elements()).map(term));
    let mut text = format!(
        "enable f16;\nenable wgpu_cooperative_matrix;\nconst SIZE = {size}u;\n\
         alias MatrixC = coop_mat{size}x{size}<f32, C>;\nalias MatrixA = coop_mat{size}x{size}<f16, A>;\n\
         alias MatrixB = coop_mat{size}x{size}<f16, B>;\n{}{}\n",
        layout_part(format, layout).source().unwrap().text,
        each(&|n| format!("fn coop_get_{n}(m: MatrixC) -> f32 {{ return 0.0; }}\n")).concat(),
    );
    for (role, scalar) in [("C", "f32"), ("A", "f16"), ("B", "f16")] {
        let parameters = each(&|n| format!("x{n}: {scalar}")).join(", ");
        text += &format!("fn coop_set_{role}(m: Matrix{role}, {parameters}) -> Matrix{role} {{ return m; }}\n");
    }
    text += &format!(
        "@group(0) @binding(0) var<storage, read_write> x: array<f32>;
         @group(0) @binding(3) var<storage, read_write> identity: array<f16>;
         @group(0) @binding(7) var<storage, read_write> out: array<f32>;

         fn is_in_place(value: f32, lane: u32, element: u32) -> f32 {{
             let row = row_of(lane, element);
             let column = column_of(lane, element);
             return select(0.0, 1.0, value == x[row * SIZE + column]);
         }}

         @compute @workgroup_size({lanes})
         fn main(@builtin(subgroup_invocation_id) lane: u32) {{
             let m = coopLoadT<MatrixC>(&x[0], SIZE);
             let negated = coop_set_C(MatrixC(), {negated});
             coopStoreT(negated, &out[0], SIZE);
             let as_left = coop_set_A(MatrixA(), {halves});
             let left = coopMultiplyAdd(as_left, coopLoadT<MatrixB>(&identity[0], SIZE), MatrixC());
             coopStoreT(left, &out[SIZE * SIZE], SIZE);
             let as_right = coop_set_B(MatrixB(), {halves});
             let right = coopMultiplyAdd(coopLoadT<MatrixA>(&identity[0], SIZE), as_right, MatrixC());
             coopStoreT(right, &out[2u * SIZE * SIZE], SIZE);
             out[3u * SIZE * SIZE + lane] = {in_place};
         }}\n",
        lanes = format.lanes,
        negated = each(&|n| format!("-coop_get_{n}(m)")).join(", "),
        halves = each(&|n| format!("f16(coop_get_{n}(m))")).join(", "),
        in_place = each(&|n| format!("is_in_place(coop_get_{n}(m), lane, {n}u)")).join(" + "),
    );
    text
}

/// Some layout of a format: rows in the high bits of lane and element.
fn some_layout(format: MatrixFormat) -> MatrixLayout {
    let indices = Vec::from_iter(0..format.size * format.size);
    MatrixLayout::from_indices(format.size, format.lanes, format.elements(), &indices).unwrap()
}

#[test]
fn modules_pass_the_validator_of_spirv() {
    let validator = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/mesa/spirv-val");
    if !validator.exists() {
        return skipped(NO_VALIDATOR);
    }
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("elements.spv");
    let validate = |words: &[u32]| {
        std::fs::write(&file, bytemuck::cast_slice::<u32, u8>(words)).unwrap();
        Command::new(&validator).args(["--target-env", "vulkan1.3"]).arg(&file).output().unwrap()
    };
    for format in FORMATS {
        let round_trip = round_trip(format, &some_layout(format));
        for (text, bindings) in [(matrices::probe_text(format), [0, 1, 2]), (round_trip, [0, 3, 7])] {
            for checked in [false, true] {
                let module = ElementModule::new(&text, format, &bindings, checked).unwrap();
                for module in [module.clone(), module.into_bf16().unwrap()] {
                    let output = validate(module.spirv());
                    assert!(output.status.success(), "{format:?}: {}", String::from_utf8_lossy(&output.stderr));
                }
            }
        }
    }
    // It does look: a module that returns an id of another type.
    let mut broken =
        ElementModule::new(&matrices::probe_text(EIGHT), EIGHT, &[0, 1, 2], false).unwrap().spirv().to_vec();
    let at = (5..broken.len()).find(|&at| broken[at] == 5 << 16 | COMPOSITE_EXTRACT).unwrap();
    broken[at + 3] = broken[at + 1];
    assert!(!validate(&broken).status.success());
}

// On a device

/// A device whose adapter has cooperative matrices, and what matrices it has.
fn coop_device() -> Option<(Context, MatrixFormat)> {
    let opened = pollster::block_on(async {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let adapters = instance.enumerate_adapters(wgpu::Backends::all()).await;
        let adapter = adapters.into_iter().find(|adapter| adapter.features().contains(matrices::FEATURES))?;
        let descriptor = wgpu::DeviceDescriptor {
            required_features: matrices::FEATURES,
            required_limits: adapter.limits(),
            // SAFETY: cooperative matrices are what is tested here.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            ..Default::default()
        };
        let (device, queue) = adapter.request_device(&descriptor).await.unwrap();
        let format = MatrixFormat::of(&device, &adapter.cooperative_matrix_properties()).unwrap();
        Some((Context::new(&device, &queue), format))
    });
    if opened.is_none() {
        skipped(&format!("the probe of layouts: no adapter has cooperative matrices and takes SPIR-V. {NEWER_DRIVER}"));
    }
    opened
}

#[test]
fn elements_are_where_the_probe_found_them() {
    let Some((context, format)) = coop_device() else { return };
    let layouts = pollster::block_on(matrices::probe(context.device(), context.queue(), format)).unwrap();
    println!("{format:?}: {layouts:?}");
    // Both drivers that these tests have run on do.
    assert_eq!(layouts.rounding, Rounding::Nearest);
    assert_eq!(pollster::block_on(matrices::probe(context.device(), context.queue(), format)).unwrap(), layouts);

    let size = format.size as usize;
    let x = Vec::from_iter((0..size * size).map(|n| ((n / size * 37 + n % size * 11) % 97) as f32 + 1.0));
    let identity = Vec::from_iter((0..size * size).map(|n| f16::from_f32((n / size == n % size) as u32 as f32)));
    for checked in [false, true] {
        let text = round_trip(format, &layouts.c);
        let module = ElementModule::new(&text, format, &[0, 3, 7], checked).unwrap();
        let out = run(&context, &module, &x, &identity, 3 * size * size + format.lanes as usize);
        let (matrices, in_place) = out.split_at(3 * size * size);
        let [negated, left, right] = [0, 1, 2].map(|n| &matrices[n * size * size..][..size * size]);
        assert_eq!(in_place, vec![format.elements() as f32; format.lanes as usize]);
        assert_eq!(negated, Vec::from_iter(x.iter().map(|x| -x)));
        // In the probe's words: scores can be left operands where they lie, and right operands transposed.
        let transposed = Vec::from_iter((0..size * size).map(|n| x[n % size * size + n / size]));
        assert_eq!(left == x, layouts.c == layouts.a);
        assert_eq!(right == transposed, layouts.c == layouts.b.transposed());
    }
}

/// Runs a module of one workgroup on x, identity and a result of this length, at bindings 0, 3 and 7.
fn run(context: &Context, module: &ElementModule, x: &[f32], identity: &[f16], out: usize) -> Vec<f32> {
    let device = context.device();
    let [(name, [x_size, y_size, z_size])] = module.entry_points() else { panic!("one entry point") };
    let entry = wgpu::PassthroughShaderEntryPoint { name: name.into(), workgroup_size: (*x_size, *y_size, *z_size) };
    let descriptor = wgpu::ShaderModuleDescriptorPassthrough {
        entry_points: vec![entry].into(),
        spirv: Some(module.spirv().into()),
        ..Default::default()
    };
    // SAFETY: naga validated the module, and its only unusual instructions are what is tested here.
    let shader = unsafe { device.create_shader_module_passthrough(descriptor) };
    let entries = [0, 3, 7].map(|binding| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: false },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    });
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: None,
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: Some(&pipeline_layout),
        module: &shader,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    let buffers = [
        context.upload(bytemuck::cast_slice(x)).unwrap(),
        context.upload(bytemuck::cast_slice(identity)).unwrap(),
        context.upload(bytemuck::cast_slice(&vec![f32::NAN; out])).unwrap(),
    ];
    let entries = Vec::from_iter(
        [0, 3, 7]
            .into_iter()
            .zip(&buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() }),
    );
    let group =
        device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries });
    let mut encoder = device.create_command_encoder(&Default::default());
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
    context.queue().submit([encoder.finish()]);
    bytemuck::pod_collect_to_vec(&context.download(&buffers[2], 0, 4 * out as u64).unwrap())
}

#[test]
fn a_device_without_the_features_is_refused() {
    let context = Context::headless().unwrap();
    let missing = matrices::FEATURES - context.device().features();
    assert!(!missing.is_empty(), "Context::headless asks for no experimental features");
    let probed = pollster::block_on(matrices::probe(context.device(), context.queue(), EIGHT)).unwrap_err();
    assert_eq!(probed, matrices::NoElementAccess::Features(missing));
    let missing = matrices::MATRIX_FEATURES - context.device().features();
    let error = MatrixFormat::of(context.device(), &[]).unwrap_err();
    assert_eq!(error, wgpu_flash_attention::NoMatrices::Features(missing));
    // In words, with the name to look for.
    let text = error.to_string();
    assert!(text.contains("cooperative matrices (Features::EXPERIMENTAL_COOPERATIVE_MATRIX)"), "{text}");
    assert!(!text.contains("FeaturesWGPU") && !text.contains('{'), "{text}");
}
