//! Every module that a plan can build: naga accepts it, every backend can write it, and it keeps within what it says
//! of itself and within WebGPU's default limits. Needs no GPU.

use std::collections::HashSet;

use flash_attention_testing::TYPES;
use flash_attention_testing::coop::workgroup_sizes;
use flash_attention_testing::loops::uninitialised_in_loop;
use flash_attention_testing::stores::stores_components;
use flash_attention_testing::switches::{of_nth_shape, switched, switched_with_gradients};
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess};
use wgpu_flash_attention::facts::Facts;
use wgpu_flash_attention::matrices::{MatrixFormat, MatrixLayout};
use wgpu_flash_attention::specialize::{Source, Specialization};
use wgpu_flash_attention::tune::{backward_tiles, decode_tile, fused_tile};
use wgpu_flash_attention::{
    Alibi, Bias, BlockLists, BlockSource, ElementType, Error, Kernel, MergeProblem, PlanOptions, PlannedModule, Probe,
    Problem, ScoreLayout, Shape, Tensor, block_modules, merge_module, modules, wgpu,
};

const DIMS: &[[u32; 2]] = &[
    [1, 1],
    [2, 7],
    [8, 8],
    [12, 16],
    [31, 33],
    [32, 32],
    [64, 64],
    [64, 20],
    [80, 96],
    [128, 128],
    [256, 200],
    [256, 256],
];

/// The shapes of problems that differ in a constant, each with the number of its head dims.
fn shapes() -> impl Iterator<Item = (usize, (Shape, ElementType))> {
    let of_type = |element_type| {
        // With 8,192 keys f32 has sums of sums.
        let seqlens: &[u32] = if element_type == ElementType::F32 { &[8, 8192] } else { &[8] };
        seqlens.iter().map(move |&seqlen| (seqlen, element_type))
    };
    let all = DIMS.iter().enumerate();
    let all = all.flat_map(move |dims| TYPES.into_iter().flat_map(of_type).map(move |rest| (dims, rest)));
    all.map(|((n, &[head_dim, head_dim_v]), (seqlen, element_type))| {
        (n, (Shape { head_dim_v, ..Shape::square(2, 2, seqlen, head_dim) }, element_type))
    })
}

/// The problems with a scale of 0, with rows in whole vectors and not.
fn of_scale_0(problem: Problem) -> [Problem; 2] {
    let layout = problem.layout(Tensor::Query).at(1);
    [problem.clone(), problem.with_layout(Tensor::Query, layout)].map(|problem| problem.scale(0.0))
}

/// Problems that differ in a switch or a constant.
fn problems() -> Vec<Problem> {
    let of_shape = |(n, (shape, element_type))| {
        let mut all = of_nth_shape(n, switched(shape, element_type));
        all.extend(of_scale_0(Problem::new(shape, element_type).with_lse()));
        all
    };
    shapes().flat_map(of_shape).chain(of_probes(Problem::with_lse)).chain(of_places(Problem::with_lse)).collect()
}

/// Biases in each type, and all gradients besides dq, dk and dv, of one element for each score and of one for many.
fn of_biases() -> impl Iterator<Item = Problem> {
    let sizes = [[2, 2, 8, 8], [1, 2, 1, 8], [2, 1, 8, 1], [1, 1, 1, 1]];
    let all = TYPES.into_iter().flat_map(move |ty| sizes.map(|sizes| (ty, sizes)));
    all.flat_map(|(ty, sizes)| {
        [ElementType::F32, ty].map(|bias| {
            let problem =
                Problem::new(Shape::square(2, 2, 8, 64), ty).with_bias(Bias::new(bias, ScoreLayout::contiguous(sizes)));
            let problem = problem.with_alibi(Alibi::PerBatchAndHead).with_sinks().with_grad_bias();
            problem.with_grad_sinks().with_grad_alibi_slopes()
        })
    })
}

/// A bias and a mask whose rows begin at multiples of four elements, at even elements, and at odd ones, in each type.
fn of_places(and: fn(Problem) -> Problem) -> impl Iterator<Item = Problem> {
    let of_type = move |ty| {
        [0, 2, 1].map(|first| {
            let layout = ScoreLayout::contiguous([2, 2, 8, 8]).at(first);
            let problem = Problem::new(Shape::square(2, 2, 8, 64), ty).with_bias(Bias::new(ty, layout));
            and(problem.with_mask(layout))
        })
    };
    TYPES.into_iter().flat_map(of_type)
}

/// The variants that only tests plan, in each type.
fn of_probes(and: fn(Problem) -> Problem) -> impl Iterator<Item = Problem> {
    let of_type = move |ty| Probe::ALL.map(|probe| and(Problem::new(Shape::square(2, 2, 8, 64), ty).with_probe(probe)));
    TYPES.into_iter().flat_map(of_type)
}

/// The same with gradients, and what only they have.
fn problems_with_gradients() -> Vec<Problem> {
    let of_shape = |(n, (shape, element_type))| {
        let mut all = of_nth_shape(n, switched_with_gradients(shape, element_type));
        all.extend(of_scale_0(Problem::new(shape, element_type).with_gradients()));
        all
    };
    let of_places = of_places(|problem| problem.with_gradients().with_grad_bias());
    shapes().flat_map(of_shape).chain(of_probes(Problem::with_gradients)).chain(of_biases()).chain(of_places).collect()
}

/// Line `line` of a module, for a message.
fn place(specialization: &Specialization, source: &Source, line: Option<u32>) -> String {
    let origin = line.and_then(|line| source.origin(line as usize));
    let (file, line) = origin.unwrap_or((specialization.file, 0));
    format!("shaders/{file}:{line} in {specialization:?}")
}

fn validate(specialization: &Specialization, source: &Source) -> (Module, ModuleInfo) {
    if let Some((line, text)) = uninitialised_in_loop(&source.text) {
        let place = place(specialization, source, Some(line as u32));
        panic!("{place}: browsers do not zero this variable in each iteration, give it a value: {text}");
    }
    let module = naga::front::wgsl::parse_str(&source.text).unwrap_or_else(|error| {
        let line = error.location(&source.text).map(|location| location.line_number);
        panic!("{}: {}", place(specialization, source, line), error.emit_to_string(&source.text))
    });
    // What WebGPU has without any feature; naga counts unpack2x16float among what a device may lack. One form of decoding
    // wants a feature, and one of dropout.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SUBGROUP, specialization.switches.contains(&"SHUFFLES"));
    capabilities.set(Capabilities::SHADER_INT64, specialization.switches.contains(&"INT64"));
    let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module).unwrap_or_else(|error| {
        let line = error.location(&source.text).map(|location| location.line_number);
        panic!("{}: {}", place(specialization, source, line), error.emit_to_string(&source.text))
    });
    // The same where inputs are in a buffer with outputs, if the lengths or the block lists among them say how often loops with barriers go round:
    // what may be written counts as different in each invocation.
    if !["SEQLENS_K", "BLOCKS"].iter().any(|name| specialization.switches.contains(name)) {
        return (module, info);
    }
    let mut shared = module.clone();
    for (_, variable) in shared.global_variables.iter_mut() {
        if let AddressSpace::Storage { access } = &mut variable.space {
            *access |= StorageAccess::STORE;
        }
    }
    let valid = Validator::new(ValidationFlags::all(), capabilities).validate(&shared);
    let valid = valid.map_err(|error| error.emit_to_string(&source.text));
    if let Err(error) = valid {
        panic!("{} with inputs that are declared as outputs: {error}", place(specialization, source, None));
    }
    (module, info)
}

fn write(specialization: &Specialization, module: &Module, info: &ModuleInfo) {
    let failed = |backend: &str, error: &dyn std::error::Error| panic!("{backend}: {error}: {specialization:?}");
    assert!(!stores_components(module, info), "a component of a shared vector is stored: {specialization:?}");
    if let Err(error) = spv::write_vec(module, info, &spv::Options::default(), None) {
        failed("SPIR-V", &error);
    }
    if let Err(error) = msl::write_string(module, info, &msl::Options::default(), &msl::PipelineOptions::default()) {
        failed("MSL", &error);
    }
    let (options, pipeline) = (hlsl::Options::default(), hlsl::PipelineOptions::default());
    if let Err(error) = hlsl::Writer::new(&mut String::new(), &options, &pipeline).write(module, info, None) {
        failed("HLSL", &error);
    }
}

/// A module that is valid, which every backend can write, and which needs what the plan says and no more than these limits.
fn check(planned: &PlannedModule, source: &Source, limits: &wgpu::Limits) {
    let specialization = &planned.specialization;
    let (module, info) = validate(specialization, source);
    write(specialization, &module, &info);
    fits(&module, limits);
    assert_eq!(workgroup_sizes(&module).iter().sum::<u32>(), planned.workgroup_bytes, "{planned:?}");
    assert_eq!(module.entry_points[0].workgroup_size.iter().product::<u32>(), planned.threads, "{planned:?}");
}

/// Modules of different texts.
#[derive(Default)]
struct Seen(HashSet<String>);

impl Seen {
    /// Checks the modules that a plan of the problem compiles and `which` picks, unless they were checked before.
    fn check(
        &mut self,
        problem: &Problem,
        facts: &Facts,
        options: &PlanOptions,
        which: impl Fn(&PlannedModule) -> bool,
    ) {
        // A problem may have more inputs than WebGPU's eight storage buffers.
        let mut facts = facts.clone();
        facts.limits.max_storage_buffers_per_shader_stage = 16;
        let modules = match modules(problem, &facts, options) {
            Ok(modules) => modules,
            // Of bf16 the coop kernel's backward pass takes whole vectors only.
            Err(Error::Unsupported { kernel: Kernel::Coop, element_type: ElementType::BF16, .. }) => return,
            Err(error) => panic!("{error}: {problem:?}"),
        };
        for planned in &modules {
            // WebGPU has eight storage buffers. One is left for a bias, say, where scores are computed from q (1) and k (2). The kernel that
            // computes all gradients at once has none left; plans take two kernels instead.
            let PlannedModule { specialization, bindings, .. } = planned;
            let given = bindings
                .iter()
                .filter(|number| (19..=22).contains(*number) || **number == 28 || **number >= 40)
                .count();
            // 0 and 27 are uniforms.
            let storage = bindings.iter().filter(|&&number| number > 0 && number != 27).count() - given;
            let has_scores = bindings.contains(&1) && bindings.contains(&2);
            let most = if has_scores && specialization.entry != "fused" { 7 } else { 8 };
            assert!(storage <= most, "{storage} storage buffers: {specialization:?}");
        }
        for planned in modules.iter().filter(|planned| which(planned)) {
            self.check_module(planned, &facts.limits);
        }
    }

    /// Checks a module, unless one of this text was checked before.
    fn check_module(&mut self, planned: &PlannedModule, limits: &wgpu::Limits) {
        let source = planned.source().unwrap();
        if !self.0.contains(&source.text) {
            check(planned, &source, limits);
            self.0.insert(source.text);
        }
    }
}

fn fits(module: &Module, limits: &wgpu::Limits) {
    let [entry] = &module.entry_points[..] else { panic!("one entry point a module") };
    let name = &entry.name;
    let [x, y, z] = entry.workgroup_size;
    assert!(x * y * z <= limits.max_compute_invocations_per_workgroup, "{name}");
    assert!(x <= limits.max_compute_workgroup_size_x && y <= limits.max_compute_workgroup_size_y, "{name}");
    let storage = module.global_variables.iter().filter(|(_, v)| matches!(v.space, AddressSpace::Storage { .. }));
    assert!(storage.count() <= limits.max_storage_buffers_per_shader_stage as usize, "{name}");
    // As WebGPU counts it: each variable rounded up to 16.
    let bytes: u32 = workgroup_sizes(module).iter().map(|bytes| bytes.next_multiple_of(16)).sum();
    assert!(bytes <= limits.max_compute_workgroup_storage_size, "{name}: {bytes}");
}

/// A device with these limits. One with more workgroup memory than WebGPU's has integers of 64 bits too.
fn facts(limits: &wgpu::Limits) -> Facts {
    let mut facts = Facts::with_limits(limits.clone());
    facts.int64 = *limits != wgpu::Limits::default();
    facts
}

/// Every module of the forward pass by this kernel. Returns how many there are.
fn check_forward(kernel: Kernel, limits: &wgpu::Limits) -> usize {
    let (mut seen, facts) = (Seen::default(), facts(limits));
    for problem in problems() {
        seen.check(&problem, &facts, &PlanOptions::default().kernel(kernel), |_| true);
    }
    seen.0.len()
}

#[test]
fn naive() {
    let count = check_forward(Kernel::Naive, &wgpu::Limits::default());
    assert!(count >= 100, "only {count} modules");
}

fn check_tile(limits: &wgpu::Limits) {
    let count = check_forward(Kernel::Tile, limits);
    assert!(count >= 250, "only {count} modules");
}

#[test]
fn tile_within_the_default_limits() {
    check_tile(&wgpu::Limits::default());
}

#[test]
fn tile_with_32_kib() {
    check_tile(&wgpu::Limits { max_compute_workgroup_storage_size: 32 << 10, ..Default::default() });
}

#[test]
fn tile_with_48_kib() {
    check_tile(&wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..Default::default() });
}

/// The backward pass on devices with these limits, or the naive one.
fn check_backward(limits: &wgpu::Limits, kernel: Kernel) {
    let (mut seen, facts) = (Seen::default(), facts(limits));
    for problem in problems_with_gradients() {
        let Shape { head_dim, head_dim_v, .. } = problem.shape;
        let mut options = PlanOptions::default().kernel(Kernel::Tile).backward(kernel);
        if kernel == Kernel::Tile {
            let [tile, other] = backward_tiles(head_dim, head_dim_v, limits);
            assert_eq!(tile, other);
            options = options.backward_tile(tile);
        }
        seen.check(&problem, &facts, &options, |module| module.is_backward);
    }
    assert!(seen.0.len() >= 300, "only {} modules", seen.0.len());
}

#[test]
fn backward_naive() {
    check_backward(&wgpu::Limits::default(), Kernel::Naive);
}

#[test]
fn backward_within_the_default_limits() {
    check_backward(&wgpu::Limits::default(), Kernel::Tile);
}

#[test]
fn backward_with_48_kib() {
    check_backward(&wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..Default::default() }, Kernel::Tile);
}

#[test]
fn fused_backward_with_48_kib() {
    let limits = wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..Default::default() };
    let (mut seen, facts) = (Seen::default(), facts(&limits));
    for mut problem in problems_with_gradients().into_iter().filter(|p| p.element_type == ElementType::F32) {
        // It takes no block lists.
        problem.blocks = None;
        let Shape { head_dim, head_dim_v, .. } = problem.shape;
        for uneven in [false, true] {
            let Some(tile) = fused_tile(&Shape { batch: 200, ..problem.shape }, uneven, &limits) else {
                assert!(head_dim.max(head_dim_v) > 128);
                continue;
            };
            tile.validate().unwrap();
            let options = PlanOptions::default().kernel(Kernel::Tile).backward(Kernel::Tile).fused_tile(tile);
            seen.check(&problem, &facts, &options, |module| module.is_backward);
        }
    }
    assert!(seen.0.len() >= 100, "only {} modules", seen.0.len());
}

/// Four keys of a mask are read as one word only where each row begins at a word and its keys lie side by side, and two keys only where they are in one
/// word.
#[test]
fn masks_are_read_in_words_where_they_lie_so() {
    let facts = facts(&wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..Default::default() });
    let tile = PlanOptions::default().kernel(Kernel::Tile).backward(Kernel::Tile);
    let (bytes, pairs, quads) = ([false, false], [true, false], [true, true]);
    for (layout, expected) in [
        (ScoreLayout::contiguous([2, 2, 40, 44]), quads),
        (ScoreLayout::contiguous([1, 1, 1, 43]), quads),
        (ScoreLayout::strided(4, [0, 1760, 44, 1]), quads),
        (ScoreLayout::strided(4, [1760, 0, 0, 1]), quads),
        (ScoreLayout::contiguous([2, 2, 40, 42]), pairs),
        (ScoreLayout::strided(2, [3520, 1760, 44, 1]), pairs),
        (ScoreLayout::strided(4, [3522, 1760, 44, 1]), pairs),
        (ScoreLayout::strided(4, [3600, 1762, 44, 1]), pairs),
        (ScoreLayout::contiguous([2, 2, 40, 43]), bytes),
        (ScoreLayout::strided(1, [3520, 1760, 44, 1]), bytes),
        (ScoreLayout::strided(0, [0, 0, 4, 160]), bytes),
        (ScoreLayout::contiguous([2, 2, 40, 1]), bytes),
    ] {
        // As many keys as rows of the layout have, and 44 where it says nothing.
        let seqlen_k = layout.sizes.map_or(44, |sizes| if sizes[3] > 1 { sizes[3] } else { 44 });
        let shape = Shape { seqlen_q: 40, seqlen_k, ..Shape::square(2, 2, 40, 16) };
        let problem = Problem::new(shape, ElementType::F32).with_mask(layout).with_gradients();
        for planned in modules(&problem, &facts, &tile).unwrap() {
            let switches = &planned.specialization.switches;
            if switches.contains(&"MASK") {
                let found = ["MASK_PAIRED", "MASK_QUADS"].map(|name| switches.contains(&name));
                assert_eq!(found, expected, "{layout:?}: {}", planned.specialization.entry);
            }
        }
    }
}

#[test]
fn decode_within_the_default_limits() {
    let mut seen = Seen::default();
    for mut problem in problems() {
        // It takes no block lists and no dropout.
        (problem.blocks, problem.dropout) = (None, None);
        for (rows, splits, lanes) in [
            (1, 3, None),
            (7, 64, None),
            (1, 64, Some(32)),
            (7, 3, Some(16)),
            (7, 3, Some(64)),
            (12, 3, None),
            (16, 3, Some(32)),
        ] {
            let mut facts = Facts::with_limits(wgpu::Limits::default());
            facts.lanes = lanes;
            let (d, dv) = (problem.shape.head_dim, problem.shape.head_dim_v);
            let tile = decode_tile(rows, d, dv, problem.element_type.bytes(), lanes, &facts.limits);
            let options = PlanOptions::default().kernel(Kernel::Decode).decode_tile(tile).splits(splits);
            seen.check(&problem, &facts, &options, |_| true);
        }
    }
    assert!(seen.0.len() >= 300, "only {} modules", seen.0.len());
}

#[test]
fn block_lists() {
    let mut seen = Seen::default();
    for mut problem in problems().into_iter().chain([Problem::new(Shape::square(2, 2, 8, 16), ElementType::F32)]) {
        problem.blocks = Some(BlockLists::new());
        for source in [BlockSource::Masks, BlockSource::Lists { full: true }, BlockSource::Lists { full: false }] {
            for planned in block_modules(&problem, source).unwrap() {
                seen.check_module(&planned, &wgpu::Limits::default());
            }
        }
    }
}

#[test]
fn merge() {
    let mut seen = Seen::default();
    for element_type in [ElementType::F32, ElementType::F16, ElementType::BF16] {
        for head_dim_v in [1, 7, 12, 64, 128, 255, 256] {
            for parts in [1, 2, 5, 100] {
                let problem = MergeProblem::new(parts, 10, head_dim_v, element_type);
                for problem in [problem, problem.with_sinks(2, 5)] {
                    seen.check_module(&merge_module(&problem), &wgpu::Limits::default());
                }
            }
        }
    }
}

#[test]
fn variables_in_loops_without_a_value_are_found() {
    for (text, line) in [
        (
            "fn f() {\n  var a: u32;\n  for (var i = 0u; i < 2u; i++) {\n    var b = vec2f();\n  }\n  var c: f32;\n}",
            None,
        ),
        ("fn f() {\n  for (var i = 0u; i < 2u; i++) {\n    var b: array<f32, 2>; // zero = 0\n  }\n}", Some(3)),
        ("fn f() {\n  loop {\n    if x {\n      var b: f32;\n    }\n  }\n}", Some(4)),
        ("fn f() {\n  while x\n  {\n    { var b: f32; }\n  }\n}", Some(4)),
        ("fn f() { for (;;) { } var b: f32; }\nvar<private> p: f32;", None),
    ] {
        assert_eq!(uninitialised_in_loop(text).map(|(line, _)| line), line, "{text}");
    }
}

/// What the coop kernels for f32 and bf16 ask of each head beforehand. It needs no matrices itself.
#[test]
fn ranges() {
    let format = MatrixFormat { size: 16, lanes: 32 };
    let facts = Facts::with_limits(wgpu::Limits {
        max_compute_workgroup_storage_size: 48 << 10,
        max_compute_invocations_per_workgroup: 1024,
        max_compute_workgroup_size_x: 1024,
        ..Default::default()
    });
    let facts = facts.matrices(format, Some(MatrixLayout::rows(format)));
    let mut seen = Seen::default();
    let coop = PlanOptions::default().kernel(Kernel::Coop);
    let forward = problems().into_iter().map(|problem| (problem, coop));
    let backward = problems_with_gradients().into_iter().map(|problem| (problem, coop.backward(Kernel::Coop)));
    for (problem, options) in forward.chain(backward) {
        seen.check(&problem, &facts, &options, |module| {
            ["find_sizes", "find_ranges"].contains(&module.specialization.entry)
        });
    }
    assert!(seen.0.len() >= 100, "only {} modules", seen.0.len());
}
