//! The backward pass on cooperative matrices (`scripts/vulkan --coop cargo test` has a device with some): the cases of the other
//! backward kernels, in all element types. Says so where there is no such device.

use flash_attention_testing::backward::{Ask, PreparedBackward, backward, check_all, prepare};
use flash_attention_testing::cases::plain_cases;
use flash_attention_testing::coop::{
    WGSL_FORMATS, check_bf16, check_wgsl, context, dims_of, has_bf16, in_forms, is_software, known_matrices,
    matrix_size, small_device, spirv_error, validator, workgroup_bytes,
};
use flash_attention_testing::loops::uninitialised_in_loop;
use flash_attention_testing::switches::{of_nth_shape, switched_with_gradients};
use flash_attention_testing::{Case, TYPES, case, full};
use wgpu_flash_attention::Causal::BottomRight;
use wgpu_flash_attention::CoopForm::{self, Registers, WorkgroupMemory};
use wgpu_flash_attention::facts::Facts;
use wgpu_flash_attention::matrices::{self, ElementModule, MatrixFormat, MatrixLayout, Rounding};
use wgpu_flash_attention::tune::{self, CoopBackwardTile};
use wgpu_flash_attention::{
    Context, ElementType, Error, Kernel, PlanOptions, PlannedModule, Problem, ScoreLayout, Shape, Tensor, modules, wgpu,
};

fn tile(subgroups: u32, matrices: u32, step: u32, columns: u32, ahead: bool) -> CoopBackwardTile {
    CoopBackwardTile { subgroups, matrices, step, columns, ahead }
}

fn tiled(tiles: [CoopBackwardTile; 2]) -> PlanOptions {
    backward(Kernel::Coop).coop_backward_tiles(tiles)
}

/// The table's tiles or, on a processor, in all types two pairs of subgroups with a matrix each.
fn usual(context: &Context) -> PlanOptions {
    if is_software(context) { tiled([tile(4, 1, 8, 256, true); 2]) } else { backward(Kernel::Coop) }
}

/// Several pairs of subgroups, several matrices of keys and rows and of a step, no loads ahead.
fn large_scaled(context: &Context) -> PlanOptions {
    let size = matrix_size(context);
    tiled([tile(4, 2, 2 * size, 64, false), tile(6, 2, size, 64, false)])
}

/// The cases that the coop kernel takes: in bf16, those of rows of multiples of 4 elements.
fn taken(
    context: &Context,
    cases: impl IntoIterator<Item = (String, Case)>,
    element_type: ElementType,
    ask: Ask,
) -> Vec<(String, PreparedBackward)> {
    let mut cases = prepare(cases, element_type, ask);
    let refused = |error| {
        let bf16 = ElementType::BF16;
        matches!(error, Error::Unsupported { element_type, .. } if element_type == bf16)
    };
    cases.retain(|(_, case)| !context.plan_with(&case.problem, &backward(Kernel::Coop)).is_err_and(refused));
    cases
}

/// Gradients in blocks of one matrix of columns, several matrices of keys and rows, no loads ahead.
fn blocks(context: &Context) -> PlanOptions {
    let size = matrix_size(context);
    tiled([tile(2, 2, 2 * size, size, false); 2])
}

fn named<const N: usize>(cases: [(&str, Case); N]) -> [(String, Case); N] {
    cases.map(|(name, case)| (name.to_string(), case))
}

#[test]
fn all_cases() {
    let Some(context) = context() else { return };
    let ways = [("coop", &context, usual(&context))];
    check_all(&prepare(plain_cases(), ElementType::F16, Ask::default()), &in_forms(ElementType::F16, &ways));
}

#[test]
fn all_cases_scaled() {
    let Some(context) = context() else { return };
    for (element_type, most) in [(ElementType::F32, 0), (ElementType::BF16, 10)] {
        let all = plain_cases();
        let ways = [("coop", &context, usual(&context))];
        let count = all.len();
        let taken = taken(&context, all, element_type, Ask::default());
        assert!(count - taken.len() <= most, "{} of {count} in {element_type}", taken.len());
        check_all(&taken, &ways);
    }
}

/// What f16 does not hold: f32 and bf16 are scaled to it, and so are probabilities and their gradients.
#[test]
fn magnitudes() {
    let Some(context) = context() else { return };
    let square = case(1, [2, 1], [37, 70], [16, 12]);
    let cases = [
        [1e30, 1e-30, 1.0],
        [1e-30, 1e30, 1.0],
        [1e4, 1e-3, 1e-30],
        [1e-20, 1e-20, 1e-3],
        [1e-10, 1e-10, 1e30],
        [0.0, 1.0, 1.0],
        [1.0, 0.0, 1e5],
        [1.0, 1.0, 0.0],
    ];
    let cases = cases.map(|factors| (format!("q, k, v times {factors:?}"), square.clone().times(factors)));
    let ways = [("coop", &context, usual(&context)), ("large tile", &context, large_scaled(&context))];
    check_all(&prepare(cases, ElementType::F32, Ask::default()), &ways);
}

/// On a processor, only head dims up to 64.
#[test]
fn all_dims() {
    let Some(context) = context() else { return };
    let dims = dims_of(&context);
    let ways = [("coop", &context, usual(&context))];
    check_all(&prepare(dims.clone(), ElementType::F16, Ask::default()), &in_forms(ElementType::F16, &ways));
    for element_type in [ElementType::F32, ElementType::BF16] {
        check_all(&taken(&context, dims.clone(), element_type, Ask::default()), &ways);
    }
}

/// Gradients whose columns no workgroup has all of.
#[test]
fn blocks_of_columns() {
    let Some(context) = context() else { return };
    let size = matrix_size(&context);
    let cases = named([
        ("both head dims", case(2, [2, 1], [37, 70], [5 * size / 2, 2 * size + 1]).causal(BottomRight)),
        ("head dim of the values", case(1, [2, 2], [70, 37], [size, 5 * size / 2]).softcap(2.0)),
        ("head dim", case(1, [2, 1], [20, 20], [2 * size + 1, 7]).odd()),
    ]);
    let ways = in_forms(ElementType::F16, &[("blocks", &context, blocks(&context))]);
    check_all(&prepare(cases, ElementType::F16, Ask::default()), &ways);
}

/// Many steps of the loop.
#[test]
fn many_keys_and_rows() {
    let Some(context) = context() else { return };
    let cases = named([
        ("many keys", case(1, [2, 1], [70, 1000], [16, 12]).causal(BottomRight)),
        ("many rows", case(1, [2, 1], [1000, 70], [16, 12]).window(300, -1)),
        ("huge scores", case(1, [2, 1], [300, 300], [16, 12]).scale(1.0).integers(40)),
    ]);
    let ways = in_forms(ElementType::F16, &[("coop", &context, backward(Kernel::Coop))]);
    check_all(&prepare(cases.clone(), ElementType::F16, Ask::default()), &ways);
    for element_type in [ElementType::F32, ElementType::BF16] {
        let ways = [("coop", &context, backward(Kernel::Coop)), ("large tile", &context, large_scaled(&context))];
        check_all(&prepare(cases.clone(), element_type, Ask::default()), &ways);
    }
}

fn few() -> [(String, Case); 5] {
    named([
        ("aligned", case(2, [4, 2], [37, 45], [16, 8]).causal(BottomRight)),
        ("odd", case(2, [2, 1], [19, 23], [7, 5]).odd().seqlens(&[23, 4]).softcap(2.0)),
        ("packed", case(2, [4, 2], [35, 35], [16, 8]).packed().window(5, 3)),
        ("no keys", case(1, [1, 1], [3, 0], [16, 8])),
        ("no queries", case(1, [2, 1], [0, 3], [16, 8])),
    ])
}

#[test]
fn gradients_of_lse_and_sums_with_what_is_there() {
    let Some(context) = context() else { return };
    let ways = [("coop", &context, usual(&context))];
    for (grad_lse, accumulate) in [(true, false), (false, true), (true, true)] {
        for element_type in TYPES {
            let cases = taken(&context, few(), element_type, Ask { grad_lse, accumulate });
            check_all(&cases, &in_forms(element_type, &ways));
        }
    }
}

/// With bounds checks, which would turn an access past a binding into a wrong result.
fn check_within_bounds(element_types: &[ElementType], other: fn(&Context) -> PlanOptions) {
    let Some(context) = context() else { return };
    let context = context.checked();
    let ways = [("coop", &context, usual(&context)), ("other tile", &context, other(&context))];
    for &element_type in element_types {
        let cases = taken(&context, few(), element_type, Ask { grad_lse: true, accumulate: true });
        check_all(&cases, &in_forms(element_type, &ways));
    }
}

#[test]
fn within_bounds() {
    check_within_bounds(&[ElementType::F16], blocks);
}

#[test]
fn within_bounds_scaled() {
    check_within_bounds(&[ElementType::F32, ElementType::BF16], large_scaled);
}

#[test]
fn plans_choose_it() {
    let Some(context) = context() else { return };
    let problem = |element_type, dim| Problem::new(Shape::square(1, 2, 64, dim), element_type).with_gradients();
    for (element_type, dim, kernel) in [
        (ElementType::F16, 16, Kernel::Coop),
        (ElementType::F16, 7, Kernel::Coop),
        (ElementType::F32, 16, Kernel::Coop),
        (ElementType::F32, 7, Kernel::Coop),
        (ElementType::F32, 136, Kernel::Tile),
        (ElementType::BF16, 16, Kernel::Coop),
        (ElementType::BF16, 7, if has_bf16(&context) { Kernel::Coop } else { Kernel::Tile }),
    ] {
        let plan = context.plan(&problem(element_type, dim)).unwrap();
        assert_eq!(plan.backward_kernel(), Some(kernel), "{element_type} {dim}");
    }
    let scaled = backward(Kernel::Coop).scaled_bf16(true);
    let error = context.plan_with(&problem(ElementType::BF16, 7), &scaled).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Coop, .. }), "{error}");
    assert!(error.to_string().contains("multiples of 4"), "{error}");
}

/// Workgroup memory as devices with matrices have it: as much as Metal has with those of 8, and 48 KiB with those of 16.
const USUAL: [u32; 2] = [32 << 10, 48 << 10];

/// A problem with gradients that plans of small devices are asked for.
fn small_problem(element_type: ElementType) -> Problem {
    Problem::new(Shape::square(1, 1, 64, 16), element_type).with_gradients()
}

#[test]
fn without_access_to_elements_they_cross_workgroup_memory() {
    let Some(context) = small_device(wgpu_flash_attention::COOPERATIVE_MATRIX_FEATURES, USUAL) else { return };
    let plan = context.plan(&small_problem(ElementType::F16)).unwrap();
    assert_eq!((plan.backward_kernel(), plan.backward_coop_form()), (Some(Kernel::Coop), Some(WorkgroupMemory)));
    let why = "backward form: through workgroup memory (no access to the elements of matrices: the device was created without";
    assert!(plan.to_string().contains(why), "{plan}");
    let plan = context.plan(&small_problem(ElementType::F32)).unwrap();
    assert_eq!((plan.backward_kernel(), plan.backward_coop_form()), (Some(Kernel::Tile), None));
    assert!(plan.to_string().contains("without access to the elements of matrices"), "{plan}");
    for (element_type, form, why) in [
        (ElementType::F16, Some(Registers), "needs access to the elements"),
        (ElementType::F32, None, "takes f16 only"),
        (ElementType::BF16, None, "takes f16 only"),
    ] {
        let options = backward(Kernel::Coop).coop_form(form);
        let error = context.plan_with(&small_problem(element_type), &options).unwrap_err();
        assert!(matches!(error, Error::Unsupported { kernel: Kernel::Coop, .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[test]
fn small_limits_fall_back_to_the_tile_kernel() {
    let Some(context) = small_device(wgpu_flash_attention::COOPERATIVE_MATRIX_FEATURES, [16 << 10; 2]) else { return };
    let problem = small_problem(ElementType::F16);
    let plan = context.plan(&problem).unwrap();
    assert_eq!(plan.backward_kernel(), Some(Kernel::Tile));
    assert!(plan.to_string().contains("backward kernel: tile (the device's limits are too small"), "{plan}");
    let error = context.plan_with(&problem, &backward(Kernel::Coop)).unwrap_err();
    assert!(matches!(error, Error::DeviceLimit { kernel: Kernel::Coop, .. }), "{error}");
    let plan = context.plan_with(&problem, &tiled([tile(1, 1, 16, 128, true); 2])).unwrap();
    assert_eq!(plan.backward_kernel(), Some(Kernel::Coop));
}

#[test]
fn plans_choose_the_form() {
    let Some(context) = small_device(matrices::FEATURES, USUAL) else { return };
    for (asked, form) in [(None, Registers), (Some(Registers), Registers), (Some(WorkgroupMemory), WorkgroupMemory)] {
        let options = PlanOptions::default().coop_form(asked);
        let plan = context.plan_with(&small_problem(ElementType::F16), &options).unwrap();
        assert_eq!((plan.coop_form(), plan.backward_coop_form()), (Some(form), Some(form)));
    }
}

#[test]
fn tiles_that_do_not_divide_are_refused() {
    let Some(context) = context() else { return };
    let problem = Problem::new(Shape::square(1, 2, 64, 16), ElementType::F16).with_gradients();
    let good = tile(1, 1, 16, 16, true);
    for bad in
        [tile(0, 1, 16, 16, true), tile(1, 1025, 16, 16, true), tile(1, 1, 12, 16, true), tile(1, 1, 16, 0, true)]
    {
        for tiles in [[good, bad], [bad, good]] {
            let error = context.plan_with(&problem, &tiled(tiles)).unwrap_err();
            assert!(matches!(error, Error::Tile(_)), "{error}");
        }
    }
    let mut problem = problem;
    problem.element_type = ElementType::F32;
    let good = tile(2, 1, 16, 16, true);
    for bad in [tile(3, 1, 16, 16, true), tile(66, 1, 16, 16, true), tile(2, 1, 12, 16, true), tile(2, 1, 16, 8, true)]
    {
        for tiles in [[good, bad], [bad, good]] {
            let error = context.plan_with(&problem, &tiled(tiles)).unwrap_err();
            assert!(matches!(error, Error::Tile(_)), "{error}");
        }
    }
}

#[test]
fn contexts_without_matrices_refuse_it() {
    let problem = Problem::new(Shape::square(1, 2, 64, 16), ElementType::F16).with_gradients();
    let error = full().plan_with(&problem, &backward(Kernel::Coop)).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Coop, .. }), "{error}");
}

/// Problems that differ in a switch or a constant of the module, each with whether it has none or all of the switches.
fn problems(element_type: ElementType) -> Vec<(bool, Problem)> {
    let mut all = vec![];
    let mut dims = vec![[1u32, 1], [8, 24], [31, 33], [64, 64], [128, 128], [256, 200]];
    // Only rows of bf16 that are aligned.
    if element_type == ElementType::BF16 {
        dims.retain(|dims| dims.iter().all(|dim| dim.is_multiple_of(4)));
    }
    for (n, [head_dim, head_dim_v]) in dims.into_iter().enumerate() {
        let shape = Shape { head_dim_v, ..Shape::square(2, 2, 8, head_dim) };
        let switched = of_nth_shape(n, switched_with_gradients(shape, element_type));
        for (row, mut problem) in switched.into_iter().enumerate() {
            if element_type == ElementType::BF16 {
                let aligned = Problem::new(shape, element_type).layout(Tensor::Query);
                problem = problem.with_layout(Tensor::Query, aligned);
            }
            if problem.bias.is_some() {
                problem = problem.with_grad_bias();
            }
            all.push((row < 2, problem));
        }
    }
    all
}

/// The tables' tiles and small ones, and their workgroup memory.
fn tiles(form: CoopForm, size: u32, problem: &Problem) -> Vec<[(CoopBackwardTile, u32); 2]> {
    let Shape { head_dim, head_dim_v, .. } = problem.shape;
    let half = |[dkdv, dq]: [CoopBackwardTile; 2]| {
        [(dkdv, dkdv.dkdv_bytes(form, size, head_dim, head_dim_v)), (dq, dq.dq_bytes(form, size, head_dim, head_dim_v))]
    };
    let scaled = |parts| {
        move |[dkdv, dq]: [CoopBackwardTile; 2]| {
            let of_dkdv = dkdv.scaled_dkdv_bytes(size, parts, head_dim, head_dim_v);
            [(dkdv, of_dkdv), (dq, dq.scaled_dq_bytes(size, parts, head_dim, head_dim_v))]
        }
    };
    let small_scaled = [tile(2, 1, 16, 256, true), tile(4, 2, 16, 256, false)];
    let table = |element_type| tune::coop_scaled_backward_tiles(size, element_type, head_dim, head_dim_v);
    match problem.element_type {
        ElementType::F16 => {
            let small = [tile(1, 1, 16, 32, true), tile(2, 2, 32, 16, false)];
            let lean = tune::lean_coop_backward_tiles(form, size, head_dim, head_dim_v);
            let usual = tune::coop_backward_tiles(form, size, head_dim, head_dim_v);
            [usual, small].into_iter().chain(lean).map(half).collect()
        }
        ElementType::F32 => Vec::from([table(ElementType::F32), small_scaled].map(scaled(2))),
        _ => Vec::from([table(ElementType::BF16), small_scaled].map(scaled(1))),
    }
}

/// The modules with matrices that a plan with these tiles compiles on a device with such matrices.
fn modules_of(
    problem: &Problem,
    form: CoopForm,
    tiles: [CoopBackwardTile; 2],
    format: MatrixFormat,
    layout: Option<MatrixLayout>,
) -> Vec<PlannedModule> {
    let mut facts = Facts::with_limits(wgpu::Limits::unlimited()).matrices(format, layout);
    // So that modules with integers of 64 bits have their turn, and those without.
    facts.int64 = format.size == 16;
    let mut modules = modules(problem, &facts, &tiled(tiles).coop_form(form)).unwrap();
    modules.retain(|module| ["dkdv", "dq", BIAS_GRADIENT].contains(&module.specialization.entry));
    modules
}

const BIAS_GRADIENT: &str = "bias_gradient";

/// What the tile of a module says of its workgroup memory and its subgroups.
fn said(module: &PlannedModule, problem: &Problem, size: u32, [dkdv, dq]: [(CoopBackwardTile, u32); 2]) -> (u32, u32) {
    let Shape { head_dim, head_dim_v, .. } = problem.shape;
    match module.specialization.entry {
        "dkdv" => (dkdv.1, dkdv.0.subgroups),
        "dq" => (dq.1, dq.0.subgroups),
        BIAS_GRADIENT => {
            let tile = tune::bias_gradient_tile(size, head_dim, head_dim_v);
            (tile.bias_gradient_bytes(size, head_dim, head_dim_v), tile.subgroups)
        }
        entry => panic!("{entry}"),
    }
}

/// Needs no device: naga takes every module, its workgroup memory is what the tile says, and so does the validator of
/// SPIR-V, where it is there.
fn check_modules((format, layout): (MatrixFormat, MatrixLayout)) {
    let validator = validator();
    let mut with_bias = false;
    for (at_an_end, problem) in TYPES.into_iter().flat_map(problems) {
        for [dkdv, dq] in tiles(Registers, format.size, &problem) {
            let modules = modules_of(&problem, Registers, [dkdv.0, dq.0], format, Some(layout.clone()));
            let has_bias = modules.iter().any(|module| module.specialization.entry == BIAS_GRADIENT);
            with_bias |= has_bias;
            for module in modules {
                let (said, subgroups) = said(&module, &problem, format.size, [dkdv, dq]);
                let text = module.source().unwrap().text;
                let PlannedModule { specialization, bindings, element_access, .. } = module;
                assert!(element_access);
                assert_eq!((module.workgroup_bytes, module.threads), (said, subgroups * format.lanes));
                assert_eq!(workgroup_bytes(&text), said, "{specialization:?}");
                let loops = uninitialised_in_loop(&text);
                assert_eq!(loops, None, "a variable in a loop without a value: {specialization:?}");
                let module = ElementModule::new(
                    &text,
                    format,
                    &bindings,
                    problem.gradients.is_some_and(|gradients| gradients.accumulate),
                )
                .unwrap_or_else(|error| panic!("{specialization:?}: {error}"));
                assert_eq!(module.entry_points()[0].1, [subgroups * format.lanes, 1, 1]);
                // With none and with all of the switches; the validator takes its time.
                let validator = validator.as_deref().filter(|_| at_an_end);
                let refused = |path| spirv_error(path, "backward_coop.spv", module.spirv());
                if let Some(error) = validator.and_then(refused) {
                    panic!("{specialization:?}: {error}");
                }
            }
        }
    }
    assert!(with_bias, "no problem has a gradient of its bias on matrices");
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

/// Biases that batch entries and heads share or have their own of, in f32 and in the element type, rows whose ends cut tiles and words, a tile that
/// no row sees, gaps with infinity. Of 16 bits a lane must hold pairs of keys, which software Vulkan's do not; plans say which kernel they take.
#[test]
fn gradients_of_the_bias() {
    let Some(context) = context() else { return };
    let even = || case(2, [4, 2], [37, 70], [16, 12]);
    let apart = |head: u64| ScoreLayout::strided(0, [0, head, 72, 1]);
    let odd = || case(2, [4, 2], [37, 69], [16, 12]);
    let cases = [
        ("shared batch", even().bias([1, 4, 37, 70])),
        ("shared heads, causal", case(2, [4, 2], [40, 72], [16, 12]).bias([2, 1, 40, 72]).causal(BottomRight)),
        ("shared by all", even().bias([1, 1, 37, 70]).window(3, 5)),
        ("its own, lengths", even().bias([2, 4, 37, 70]).seqlens(&[70, 9]).seqlens_q(&[20, 37])),
        ("rows apart, an odd last key", odd().bias_at(apart(37 * 72)).softcap(2.0)),
        ("heads apart, infinity between them", odd().bias_at(apart(50 * 72)).bias_gaps()),
        ("dropout", even().bias([1, 4, 37, 70]).dropout(0.25)),
    ];
    let in_f32 = |(name, mut case): (_, Case)| {
        case.bias_in_f32 = true;
        (format!("{name}, in f32"), case)
    };
    let of_f32: Vec<_> = cases.clone().into_iter().map(in_f32).collect();
    let of_type: Vec<_> = cases.into_iter().map(|(name, case)| (name.to_string(), case)).collect();
    let options = backward(Kernel::Coop).coop_form(Registers);
    let takes = |case: &PreparedBackward, text: &str| {
        let plan = context.plan_with(&case.problem, &options).unwrap().to_string();
        assert!(plan.contains(text), "{text:?} is not in {plan}");
    };
    // In bf16 the kernel needs matrices of bf16.
    let types = [ElementType::F16].into_iter().chain(has_bf16(&context).then_some(ElementType::BF16));
    for element_type in types {
        for accumulate in [false, true] {
            let ask = Ask { accumulate, ..Ask::default() };
            let of_f32 = prepare(of_f32.clone(), element_type, ask);
            of_f32.iter().for_each(|(_, case)| takes(case, "the gradient of the bias on matrices, too"));
            check_all(&of_f32, &[("coop", &context, options)]);
            let of_type = prepare(of_type.clone(), element_type, ask);
            if !is_software(&context) {
                of_type.iter().for_each(|(_, case)| takes(case, "the gradient of the bias on matrices, too"));
            }
            check_all(&of_type, &[("coop", &context, options)]);
        }
        let in_tiles = [
            ("odd rows", odd().bias([1, 4, 37, 69]), "rows that begin at even elements"),
            ("one row", even().bias([1, 4, 1, 70]), "queries or keys share its elements"),
        ];
        for (name, case, why) in in_tiles {
            let prepared = prepare([(name.to_string(), case)], element_type, Ask::default());
            takes(&prepared[0].1, why);
            check_all(&prepared, &[("coop", &context, options)]);
        }
    }
    let prepared = &prepare(of_f32, ElementType::F16, Ask::default())[0].1;
    let plan = context.plan_with(&prepared.problem, &options).unwrap();
    let [first, second] = [0, 0].map(|round| prepared.run(&context, &plan, round).unwrap());
    assert!(first == second, "other bits the second time");
}

/// Needs no device. Modules on bf16 are those on f16 but for what they read of a bias and how they round. naga takes each of them, and the
/// validator what is made of them; all ways to round have their turn.
#[test]
fn modules_on_bf16_are_valid() {
    let validator = validator();
    let mut ways = [Rounding::Truncated, Rounding::Nearest, Rounding::Other].into_iter().cycle();
    for (format, layout) in known_matrices() {
        for (at_an_end, twin) in problems(ElementType::F16) {
            let mut problem = twin.clone();
            problem.element_type = ElementType::BF16;
            if let Some(bias) = problem.bias.as_mut().filter(|bias| bias.element_type == ElementType::F16) {
                bias.element_type = ElementType::BF16;
            }
            for [dkdv, dq] in tiles(Registers, format.size, &twin) {
                let facts = Facts::with_limits(wgpu::Limits::unlimited()).matrices(format, Some(layout.clone()));
                let facts = facts.bf16_matrices(ways.next().unwrap());
                let mut all = modules(&problem, &facts, &tiled([dkdv.0, dq.0]).coop_form(Registers)).unwrap();
                all.retain(|module| module.is_backward && module.element_access);
                let of_bias = all.iter().filter(|module| module.specialization.entry == BIAS_GRADIENT).count();
                assert_eq!(all.len() - of_bias, 2, "one of each, whatever the ranges");
                for module in &all {
                    let (said, _) = said(module, &problem, format.size, [dkdv, dq]);
                    assert_eq!((module.workgroup_bytes, module.bf16_matrices), (said, true));
                    check_bf16(module, format, said % 3 == 0, validator.as_deref().filter(|_| at_an_end));
                }
            }
        }
    }
}

/// Needs no device. See [`check_wgsl`].
#[test]
fn modules_in_wgsl_alone_are_valid() {
    let spirv_val = validator();
    for format in WGSL_FORMATS {
        for (at_an_end, problem) in problems(ElementType::F16) {
            let spirv_val = spirv_val.as_deref().filter(|_| at_an_end);
            for [dkdv, dq] in tiles(WorkgroupMemory, format.size, &problem) {
                for module in modules_of(&problem, WorkgroupMemory, [dkdv.0, dq.0], format, None) {
                    let (said, _) = said(&module, &problem, format.size, [dkdv, dq]);
                    assert!(!module.element_access);
                    check_wgsl(&module, format, said, spirv_val);
                }
            }
        }
    }
}
