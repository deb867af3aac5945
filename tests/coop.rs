//! The cooperative-matrix kernel on a device that has such matrices (`scripts/vulkan --coop cargo test` has one): the
//! cases of the other kernels. Says so where there is no such device.

use flash_attention_testing::cases::{plain_cases, prepare};
use flash_attention_testing::coop::{
    WGSL_FORMATS, check_bf16, check_wgsl, context, dims_of, has_bf16, in_form, in_forms, is_software, known_matrices,
    matrix_size, small_device, spirv_error, validator, workgroup_bytes,
};
use flash_attention_testing::loops::uninitialised_in_loop;
use flash_attention_testing::switches::{of_nth_shape, switched};
use flash_attention_testing::*;
use wgpu_flash_attention::Causal::BottomRight;
use wgpu_flash_attention::CoopForm::{self, Registers, WorkgroupMemory};
use wgpu_flash_attention::facts::Facts;
use wgpu_flash_attention::matrices::{self, ElementModule, MatrixFormat, MatrixLayout, Rounding};
use wgpu_flash_attention::tune::{self, CoopTile};
use wgpu_flash_attention::{
    Context, ElementType, Error, Kernel, Plan, PlanOptions, PlannedModule, Problem, Shape, modules, wgpu,
};

fn coop() -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Coop)
}

/// The kernel with this tile.
fn tiled(subgroups: u32, row_matrices: u32, keys: u32, buffers: u32) -> PlanOptions {
    coop().coop_tile(CoopTile::new(subgroups, row_matrices, keys, buffers))
}

/// The kernel in registers with steps in turns, and with some matrices of Q in workgroup memory.
fn in_turns(context: &Context, row_matrices: u32, buffers: u32, query_in_memory: u32) -> PlanOptions {
    let tile = CoopTile::new(2, row_matrices, 2 * matrix_size(context), buffers).with_turns(2, query_in_memory);
    in_form(Registers, coop().coop_tile(tile))
}

/// One subgroup, one buffer. 16 is a multiple of every size that matrices have.
fn small() -> PlanOptions {
    tiled(1, 1, 16, 1)
}

/// The table's tiles or, on a processor, in all types and forms several subgroups with a matrix each.
fn usual(context: &Context) -> PlanOptions {
    if is_software(context) { tiled(4, 1, 8, 1) } else { coop() }
}

#[test]
fn all_cases() {
    let Some(context) = context() else { return };
    for element_type in TYPES {
        let all: Vec<_> = plain_cases().into_iter().filter(|(name, _)| !is_alike(name)).collect();
        check_all(&prepare(all, element_type), &in_forms(element_type, &[("coop", &context, usual(&context))]));
    }
}

/// Cases of values that are alike: O has one sum of all tiles, which loses more the more there are.
fn is_alike(name: &str) -> bool {
    ["alike", "sorted"].contains(&name)
}

/// In tiles of as many keys as GPUs have.
#[test]
fn values_that_are_alike() {
    let Some(context) = context() else { return };
    for element_type in TYPES {
        let alike: Vec<_> = plain_cases().into_iter().filter(|(name, _)| is_alike(name)).collect();
        let ways = in_forms(element_type, &[("coop", &context, tiled(1, 1, 32, 1))]);
        check_all(&prepare(alike, element_type), &ways);
    }
}

/// On a processor, only head dims up to 64.
#[test]
fn all_dims() {
    let Some(context) = context() else { return };
    for element_type in TYPES {
        let ways = in_forms(element_type, &[("coop", &context, usual(&context))]);
        check_all(&prepare(dims_of(&context), element_type), &ways);
    }
}

/// Many steps of the loop, in which maxima grow and do not, and several matrices of rows and of keys.
#[test]
fn many_keys() {
    let Some(context) = context() else { return };
    let size = matrix_size(&context);
    let long = case(1, [2, 1], [70, 1000], [16, 12]);
    let cases = [
        ("scale 1", long.clone().scale(1.0)),
        ("causal", long.clone().causal(BottomRight)),
        ("window", long.clone().window(300, -1)),
        ("huge scores", long.scale(1.0).integers(40)),
    ];
    let cases = cases.map(|(name, case)| (format!("many keys, {name}"), case));
    for element_type in TYPES {
        let ways = [("coop", &context, coop()), ("large tile", &context, tiled(2, 3, 2 * size, 1))];
        check_all(&prepare(cases.clone(), element_type), &in_forms(element_type, &ways));
    }
    let two_buffers = [("two buffers", &context, in_form(Registers, tiled(2, 3, 2 * size, 2)))];
    check_all(&prepare(cases, ElementType::F16), &two_buffers);
}

/// Steps in turns, and matrices of Q in workgroup memory: what wide heads take. Maxima grow within a step; the last turn of a step has no keys.
#[test]
fn steps_in_turns() {
    let Some(context) = context() else { return };
    let usual = case(2, [4, 2], [70, 150], [24, 16]);
    let named = |(name, case): (&str, Case)| (format!("turns, {name}"), case);
    let plain = [
        ("huge scores", usual.clone().scale(1.0).integers(40)),
        ("causal", usual.clone().causal(BottomRight)),
        ("window and lengths", usual.clone().window(30, 5).seqlens(&[17, 130])),
        ("odd, softcap", usual.clone().odd().softcap(2.0)),
    ];
    let features = [
        ("ALiBi", usual.clone().causal(BottomRight).alibi(wgpu_flash_attention::Alibi::PerHead)),
        ("dropout", usual.clone().dropout(0.3)),
        ("bias", usual.bias([1, 4, 70, 150])),
    ];
    // Software Vulkan scales bf16 to f16, in a kernel that takes no turns. Matrices of bf16 have the text of f16.
    let of_plain = [("some of Q held", &context, in_turns(&context, 2, 2, 1))];
    check_all(&prepare(plain.map(named), ElementType::F16), &of_plain);
    // Software Vulkan takes too much memory for two matrices of rows with features.
    let of_features = [("all of Q held", &context, in_turns(&context, 1, 1, 0))];
    check_all(&prepare(features.map(named), ElementType::F16), &of_features);
}

/// What f16 does not hold: f32 and bf16 are scaled to it.
#[test]
fn magnitudes() {
    let Some(context) = context() else { return };
    let square = case(1, [2, 1], [37, 70], [16, 12]);
    let cases = [
        [1e30, 1e-30, 1.0],
        [1e-30, 1e30, 1e30],
        [1e4, 1e-4, 1e-30],
        [1e-20, 1e-20, 1e-3],
        [0.0, 1.0, 1.0],
        [1.0, 0.0, 1e5],
        [1.0, 1.0, 0.0],
    ];
    let cases = cases.map(|factors| (format!("q, k, v times {factors:?}"), square.clone().times(factors)));
    for element_type in [ElementType::F32, ElementType::BF16] {
        check_all(
            &prepare(cases.clone(), element_type),
            &[("coop", &context, usual(&context)), ("small tile", &context, small())],
        );
    }
}

/// With bounds checks, which would turn an access past a binding into a wrong result.
#[test]
fn within_bounds() {
    let Some(context) = context() else { return };
    let context = context.checked();
    let cases = [
        ("aligned", case(2, [4, 2], [37, 45], [16, 8]).causal(BottomRight)),
        ("odd", case(2, [2, 1], [19, 23], [7, 5]).odd().seqlens(&[23, 4]).softcap(2.0)),
        ("packed", case(2, [4, 2], [35, 35], [16, 8]).packed().window(5, 3)),
        ("no keys", case(1, [1, 1], [3, 0], [16, 8])),
    ];
    let cases = cases.map(|(name, case)| (name.to_string(), case));
    for element_type in TYPES {
        let ways = [("coop", &context, usual(&context)), ("small tile", &context, small())];
        check_all(&prepare(cases.clone(), element_type), &in_forms(element_type, &ways));
    }
}

fn kernel_line(plan: &Plan) -> String {
    plan.to_string().lines().find(|line| line.starts_with("kernel:")).unwrap().to_string()
}

#[test]
fn plans_choose_it() {
    let Some(context) = context() else { return };
    let of_bf16 = match has_bf16(&context) {
        true => "kernel: coop (the device has cooperative matrices for bf16)",
        false => "kernel: coop (the device has cooperative matrices; bf16 is scaled to f16)",
    };
    for (element_type, dim, line) in [
        (ElementType::F16, 16, "kernel: coop (the device has cooperative matrices for f16)"),
        (ElementType::BF16, 16, of_bf16),
        (
            ElementType::F32,
            128,
            "kernel: coop (the device has cooperative matrices; f32 is multiplied in two parts of f16)",
        ),
        (
            ElementType::F32,
            136,
            "kernel: tile (registers do not hold the rows of the coop kernel in f32 at this head dim)",
        ),
    ] {
        let problem = case(1, [2, 1], [37, 45], [dim, 12]).element_type(element_type).problem;
        let plan = context.plan(&problem).unwrap();
        assert_eq!(kernel_line(&plan), line);
        assert!(line.contains(&plan.kernel().to_string()));
        let asked = context.plan_with(&problem, &coop()).unwrap();
        assert_eq!(kernel_line(&asked), "kernel: coop (asked for)");
    }
}

#[test]
fn tiles_that_do_not_divide_are_refused() {
    let Some(context) = context() else { return };
    let problem = case(1, [2, 1], [37, 45], [16, 12]).element_type(ElementType::F16).problem;
    let two_buffers = in_form(WorkgroupMemory, tiled(1, 1, 16, 2));
    let turns =
        |turns, query_in_memory| coop().coop_tile(CoopTile::new(1, 1, 32, 1).with_turns(turns, query_in_memory));
    let workgroup = in_form(WorkgroupMemory, turns(2, 0));
    let many_rows = in_form(Registers, tiled(1, 9, 16, 1));
    // turns(1, 2): rows of 16 elements have two matrices at most.
    for options in [turns(0, 0), turns(3, 0), turns(1, 2), workgroup, many_rows] {
        let error = context.plan_with(&problem, &options).unwrap_err();
        assert!(matches!(error, Error::Tile(_)), "{error}");
    }
    for options in [tiled(1, 1, 12, 1), tiled(0, 1, 16, 2), tiled(1, 1025, 16, 1), two_buffers] {
        let error = context.plan_with(&problem, &options).unwrap_err();
        assert!(matches!(error, Error::Tile(_)), "{error}");
    }
    let mut problem = problem;
    problem.element_type = ElementType::F32;
    for options in [tiled(1, 1, 12, 1), tiled(1, 1, 16, 2), tiled(64, 1, 16, 1)] {
        let error = context.plan_with(&problem, &options).unwrap_err();
        assert!(matches!(error, Error::Tile(_)), "{error}");
    }
}

/// Of more queries than the decode kernel is for.
fn plan_of(context: &Context, head_dim: u32) -> Plan {
    context.plan(&Problem::new(Shape::square(1, 1, 64, head_dim), ElementType::F16)).unwrap()
}

/// The tile kernel where the coop kernel's tile does not fit.
#[test]
fn small_limits_fall_back_to_the_tile_kernel() {
    let Some(context) = small_device(matrices::FEATURES, [16 << 10; 2]) else { return };
    assert_eq!(plan_of(&context, 32).coop_form(), Some(Registers));
    let plan = plan_of(&context, 256);
    assert_eq!(plan.kernel(), Kernel::Tile);
    assert!(plan.to_string().contains("limits are too small"), "{plan}");
}

#[test]
fn without_access_to_elements_they_cross_workgroup_memory() {
    // The tile for a head dim of 64 fits, that for 256 does not.
    let bytes = [16 << 10, 24 << 10];
    let Some(context) = small_device(wgpu_flash_attention::COOPERATIVE_MATRIX_FEATURES, bytes) else { return };
    let plan = plan_of(&context, 64);
    assert_eq!((plan.kernel(), plan.coop_form()), (Kernel::Coop, Some(WorkgroupMemory)));
    let why = "form: through workgroup memory (no access to the elements of matrices: the device was created without";
    assert!(plan.to_string().contains(why), "{plan}");
    let plan = plan_of(&context, 256);
    assert_eq!(plan.kernel(), Kernel::Tile);
    assert!(plan.to_string().contains("limits are too small"), "{plan}");
    let problem = Problem::new(Shape::square(1, 1, 64, 32), ElementType::F16);
    let error = context.plan_with(&problem, &in_form(Registers, coop())).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Coop, .. }), "{error}");
}

/// Needs no such device.
#[test]
fn contexts_without_matrices_refuse_it() {
    let problem = case(1, [2, 1], [37, 45], [16, 12]).element_type(ElementType::F16).problem;
    let error = full().plan_with(&problem, &coop()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Coop, .. }), "{error}");
    assert_eq!(full().plan(&problem).unwrap().kernel(), Kernel::Tile);
}

/// Problems that differ in a switch or a constant of the module, each with whether it has none or all of the switches.
fn problems(element_types: &[ElementType]) -> Vec<(bool, Problem)> {
    let mut all = vec![];
    let dims = [[1, 1], [8, 24], [31, 33], [64, 64], [128, 128], [256, 200]];
    for (n, [head_dim, head_dim_v]) in dims.into_iter().enumerate() {
        let shape = Shape { head_dim_v, ..Shape::square(2, 2, 8, head_dim) };
        for &element_type in element_types {
            let switched = of_nth_shape(n, switched(shape, element_type)).into_iter().enumerate();
            all.extend(switched.map(|(row, problem)| (row < 2, problem)));
            all.push((false, Problem::new(shape, element_type).with_lse().scale(0.0)));
        }
    }
    all
}

/// The table's tile and small ones, and their workgroup memory.
fn tiles(form: CoopForm, format: MatrixFormat, problem: &Problem) -> Vec<(CoopTile, u32)> {
    let (size, shape) = (format.size, &problem.shape);
    let small = |buffers| CoopTile::new(1, 1, 16, buffers);
    let with_bytes = |tile: CoopTile| match problem.element_type {
        ElementType::F16 => (tile, tile.workgroup_bytes(form, size, shape.head_dim, shape.head_dim_v)),
        ElementType::F32 => (tile, tile.scaled_workgroup_bytes(size, 2, shape.head_dim, shape.head_dim_v)),
        _ => (tile, tile.scaled_workgroup_bytes(size, 1, shape.head_dim, shape.head_dim_v)),
    };
    let mut tiles = match problem.element_type {
        ElementType::F16 => {
            let mut tiles = vec![tune::coop_tile(form, size, shape.head_dim, shape.head_dim_v), small(1)];
            tiles.extend(tune::long_coop_tile(form, size, shape.head_dim, shape.head_dim_v));
            // Plans take it for plain scores. Its modules are long, and naga takes its time with them.
            let given = problem.bias.is_some() || problem.alibi.is_some() || problem.mask.is_some();
            let plain = !given && problem.mods.is_none() && problem.softcap.is_none() && problem.dropout.is_none();
            let wide = || tune::wide_coop_tile(form, size, shape.head_dim, shape.head_dim_v);
            tiles.extend(plain.then(wide).flatten());
            tiles
        }
        other => vec![tune::coop_scaled_tile(size, other, shape.head_dim, shape.head_dim_v), small(1)],
    };
    if form == Registers && problem.element_type == ElementType::F16 {
        let query_in_memory = shape.head_dim.div_ceil(size) / 2;
        tiles.push(CoopTile::new(1, 1, 2 * size, 1).with_turns(2, query_in_memory));
        tiles.push(small(2));
    }
    tiles.into_iter().map(with_bytes).collect()
}

/// The modules with matrices that a plan with this tile compiles on a device with such matrices.
fn modules_of(
    problem: &Problem,
    form: CoopForm,
    tile: CoopTile,
    format: MatrixFormat,
    layout: Option<MatrixLayout>,
) -> Vec<PlannedModule> {
    let mut facts = Facts::with_limits(wgpu::Limits::unlimited()).matrices(format, layout);
    // So that modules with integers of 64 bits have their turn, and those without.
    facts.int64 = format.size == 16;
    let mut modules = modules(problem, &facts, &coop().coop_form(form).coop_tile(tile)).unwrap();
    modules.retain(|module| module.specialization.entry == "forward");
    modules
}

/// Needs no device: naga takes every module, its workgroup memory is what the tile says, and so does the validator of
/// SPIR-V, where it is there.
fn check_modules((format, layout): (MatrixFormat, MatrixLayout)) {
    let validator = validator();
    for (at_an_end, problem) in problems(&TYPES) {
        let tiles = tiles(Registers, format, &problem);
        let modules = |&(tile, said): &(CoopTile, u32)| {
            let modules = modules_of(&problem, Registers, tile, format, Some(layout.clone()));
            modules.into_iter().map(move |module| (module, tile, said))
        };
        for (planned, tile, said) in tiles.iter().flat_map(modules) {
            let text = planned.source().unwrap().text;
            let PlannedModule { specialization, bindings, element_access, threads, workgroup_bytes: planned, .. } =
                planned;
            assert!(element_access);
            assert_eq!((planned, threads), (said, tile.subgroups * format.lanes), "{specialization:?}");
            assert_eq!(workgroup_bytes(&text), said, "{specialization:?}");
            let loops = uninitialised_in_loop(&text);
            assert_eq!(loops, None, "a variable in a loop without a value: {specialization:?}");
            assert!(said <= 48 << 10, "{specialization:?}");
            let module = ElementModule::new(&text, format, &bindings, problem.lse)
                .unwrap_or_else(|error| panic!("{specialization:?}: {error}"));
            assert_eq!(module.entry_points()[0].1, [tile.subgroups * format.lanes, 1, 1]);
            // With none and with all of the switches; the validator takes its time, a process for each module.
            let validator = validator.as_deref().filter(|_| at_an_end);
            let refused = |path| spirv_error(path, "coop.spv", module.spirv());
            if let Some(error) = validator.and_then(refused) {
                panic!("{specialization:?}: {error}");
            }
        }
    }
}

#[test]
fn modules_on_matrices_of_an_h100_are_valid() {
    let [h100, _] = known_matrices();
    check_modules(h100);
}

#[test]
fn modules_on_matrices_of_lavapipe_are_valid() {
    let [_, lavapipe] = known_matrices();
    check_modules(lavapipe);
}

/// Needs no device. Modules on bf16 are those on f16 but for what they read of a bias and how they round. naga takes each of them, and the
/// validator what is made of them; all ways to round have their turn.
#[test]
fn modules_on_bf16_are_valid() {
    let validator = validator();
    let mut ways = [Rounding::Truncated, Rounding::Nearest, Rounding::Other].into_iter().cycle();
    for (format, layout) in known_matrices() {
        for (at_an_end, problem) in problems(&[ElementType::BF16]) {
            let mut twin = problem.clone();
            twin.element_type = ElementType::F16;
            for (tile, said) in tiles(Registers, format, &twin) {
                let facts = Facts::with_limits(wgpu::Limits::unlimited()).matrices(format, Some(layout.clone()));
                let options = coop().coop_form(Registers).coop_tile(tile);
                let all = modules(&problem, &facts.bf16_matrices(ways.next().unwrap()), &options).unwrap();
                let [module] = &all[..] else { panic!("one module, without ranges") };
                assert_eq!((module.workgroup_bytes, module.bf16_matrices), (said, true));
                check_bf16(module, format, problem.lse, validator.as_deref().filter(|_| at_an_end));
            }
        }
    }
}

/// Needs no device. See [`check_wgsl`].
#[test]
fn modules_in_wgsl_alone_are_valid() {
    let spirv_val = validator();
    for format in WGSL_FORMATS {
        for (at_an_end, problem) in problems(&[ElementType::F16]) {
            // The validator takes its time, a process for each module.
            let spirv_val = spirv_val.as_deref().filter(|_| at_an_end);
            for (tile, said) in tiles(WorkgroupMemory, format, &problem) {
                for module in modules_of(&problem, WorkgroupMemory, tile, format, None) {
                    assert!(!module.element_access);
                    check_wgsl(&module, format, said, spirv_val);
                }
            }
        }
    }
}
