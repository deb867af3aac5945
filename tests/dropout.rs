//! Dropout: FlashAttention-2's results on a GPU, the mask of each kernel bit by bit, the generator's arithmetic, and what is refused.

use flash_attention_testing::backward::{PreparedBackward, backward, fused};
use flash_attention_testing::coop::{WGSL_FORMATS, context, in_forms, known_matrices};
use flash_attention_testing::*;
use safetensors::SafeTensors;
use wgpu_flash_attention::facts::Facts;
use wgpu_flash_attention::matrices::{MatrixFormat, MatrixLayout};
use wgpu_flash_attention::reference::dropout_mask;
use wgpu_flash_attention::specialize::Specialization;
use wgpu_flash_attention::tune::{CoopBackwardTile, CoopTile};
use wgpu_flash_attention::wgpu::{BufferBinding, BufferUsages};
use wgpu_flash_attention::{
    Causal, Context, Dropout, ElementType, Error, ForwardBuffers, Kernel, PlanOptions, PlannedModule, Problem, Shape,
    modules, wgpu,
};

/// What PyTorch 2.11 computed with FlashAttention-2 on an H200, in f16.
struct Fixture {
    name: &'static str,
    problem: Problem,
    dropout: Dropout,
    /// q, k, v and do.
    given: [Vec<f32>; 4],
    /// o, lse, dq, dk and dv.
    results: [Vec<f32>; 5],
}

fn fixture(name: &'static str) -> Fixture {
    let bytes = std::fs::read(format!("{}/tests/data/{name}.safetensors", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let said = |key: &str| metadata.metadata().as_ref().unwrap()[key].clone();
    let halves = |name: &str| -> Vec<f32> {
        let halves: Vec<half::f16> = bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data());
        halves.into_iter().map(f32::from).collect()
    };
    let lse = bytemuck::pod_collect_to_vec(file.tensor("lse").unwrap().data());
    let &[batch, heads, seqlen, head_dim] = file.tensor("q").unwrap().shape() else { panic!("q has 4 dimensions") };
    let shape = Shape::square(batch as u32, heads as u32, seqlen as u32, head_dim as u32);
    let probability = said("p").parse().unwrap();
    let mut problem = Problem::new(shape, ElementType::F16).with_gradients().with_dropout(probability);
    problem.causal = (said("causal") == "1").then_some(Causal::BottomRight);
    let dropout = Dropout { probability, seed: said("seed").parse().unwrap(), offset: said("offset").parse().unwrap() };
    let [o, dq, dk, dv] = ["o", "dq", "dk", "dv"].map(halves);
    Fixture { name, problem, dropout, given: ["q", "k", "v", "do"].map(halves), results: [o, lse, dq, dk, dv] }
}

fn fixtures() -> [Fixture; 2] {
    ["flash2_dropout_half", "flash2_dropout_fifth_causal"].map(fixture)
}

impl Fixture {
    fn forward(&self, element_type: ElementType) -> Prepared {
        let mut problem = self.problem.clone();
        problem.element_type = element_type;
        let [q, k, v, _] = self.given.clone();
        Prepared::new(&problem, [q, k, v], Extras { dropout: Some(self.dropout), ..Default::default() }, false)
    }

    fn backward(&self, element_type: ElementType) -> PreparedBackward {
        let forward = self.forward(element_type);
        let problem = forward.problem.clone();
        PreparedBackward::new(&problem, forward, self.given[3].clone(), None, None)
    }

    /// That numbers are the file's, but for what f16 rounded there, and may round here: 2.4e-4 to 3.6e-4 of f64.
    fn compare(&self, way: &str, n: usize, found: &[f64]) {
        let name = ["o", "lse", "dq", "dk", "dv"][n];
        let file = &self.results[n];
        assert_eq!(found.len(), file.len(), "{name}");
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let off = norm(&mut found.iter().zip(file).map(|(x, &y)| x - f64::from(y)));
        let error = off / norm(&mut file.iter().map(|&x| x.into()));
        assert!(error < if n == 1 { 1e-6 } else { 8e-4 }, "{}, {way}: {name} is off by {error:e}", self.name);
    }

    fn compare_bits(&self, way: &str, n: usize, ty: ElementType, bits: &[u32]) {
        self.compare(way, n, &bits.iter().map(|&x| from_bits(ty, x).into()).collect::<Vec<_>>());
    }
}

#[test]
fn the_oracle_agrees_with_flash_attention_2() {
    for fixture in fixtures() {
        let forward = fixture.forward(ElementType::F32).expected;
        fixture.compare("oracle", 0, &forward.out);
        fixture.compare("oracle", 1, &forward.lse);
        for (n, gradient) in fixture.backward(ElementType::F32).expected.iter().enumerate() {
            fixture.compare("oracle", 2 + n, gradient);
        }
    }
}

fn check_fixtures(element_type: ElementType, ways: &[(&str, &Context, PlanOptions)]) {
    for fixture in fixtures() {
        let (forward, backward) = (fixture.forward(element_type), fixture.backward(element_type));
        for (way, context, options) in ways {
            let plan = context.plan_with(&forward.problem, options).unwrap();
            let bits = forward.run(context, &plan, 0).unwrap();
            forward.compare(&bits).unwrap_or_else(|error| panic!("{}, {way}: {error}", fixture.name));
            fixture.compare_bits(way, 0, element_type, &bits.0);
            fixture.compare_bits(way, 1, ElementType::F32, &bits.1);
            let gradients = backward.run(context, &plan, 0).unwrap();
            backward.compare(&gradients).unwrap_or_else(|error| panic!("{}, {way}: {error}", fixture.name));
            for (n, bits) in gradients.iter().enumerate() {
                fixture.compare_bits(way, 2 + n, element_type, bits);
            }
        }
    }
}

#[test]
fn kernels_agree_with_flash_attention_2() {
    let of = |kernel| PlanOptions::default().kernel(kernel).backward(kernel);
    let (naive, tile) = (of(Kernel::Naive), of(Kernel::Tile));
    let ways = [("naive", full(), naive), ("tile", full(), tile), ("tile within WebGPU's limits", webgpu(), tile)];
    check_fixtures(ElementType::F16, &ways);
    let all = [ways[1], ("fused", full(), fused([32, 64], 8, 8, 16, [64, 64]))];
    check_fixtures(ElementType::F32, &all);
}

#[test]
fn coop_agrees_with_flash_attention_2() {
    let Some(context) = context() else { return };
    let coop = PlanOptions::default().kernel(Kernel::Coop).backward(Kernel::Coop);
    for element_type in [ElementType::F16, ElementType::F32] {
        check_fixtures(element_type, &in_forms(element_type, &[("coop", &context, coop)]));
    }
}

/// A problem from whose o, and from whose dv, the mask can be read: all scores are 0, rows of v and of do are those of the unit matrix.
fn readable(probability: f32) -> (Problem, Dropout, [Vec<f32>; 4]) {
    let shape = Shape { head_dim: 8, head_dim_v: 64, ..Shape::square(2, 3, 64, 8) };
    let problem = Problem::new(shape, ElementType::F32).with_gradients().with_dropout(probability);
    // Of few heads the offset needs the 33rd bit.
    let dropout = Dropout { probability, seed: 0xfedc_ba98_7654_3210, offset: (1 << 32) - 50 };
    let units: Vec<f32> = (0..2 * 3 * 64 * 64).map(|n| if n / 64 % 64 == n % 64 { 1.0 } else { 0.0 }).collect();
    let zeros = vec![0.0; 2 * 3 * 64 * 8];
    (problem, dropout, [zeros.clone(), zeros, units.clone(), units])
}

/// That kernels keep what the mask says, forward and backward, and nothing else.
fn check_masks(element_type: ElementType, ways: &[(&str, &Context, PlanOptions)]) {
    for probability in [0.1, 0.5, 0.999] {
        let (mut problem, dropout, [q, k, v, grad_out]) = readable(probability);
        problem.element_type = element_type;
        let expected = dropout_mask(&problem.shape, &dropout);
        let extras = Extras { dropout: Some(dropout), ..Default::default() };
        let forward = || Prepared::new(&problem, [q.clone(), k.clone(), v.clone()], extras.clone(), false);
        let backward = PreparedBackward::new(&problem, forward(), grad_out, None, None);
        let forward = forward();
        for (way, context, options) in ways {
            let plan = context.plan_with(&problem, options).unwrap();
            let weight = f64::from(dropout.scale()) / 64.0;
            let kept = |bits: &[u32]| -> Vec<bool> {
                let kept = |&bits: &u32| {
                    let x = f64::from(from_bits(element_type, bits));
                    assert!(x == 0.0 || (x / weight - 1.0).abs() < 0.01, "{way}: {x}, neither 0 nor {weight}");
                    x != 0.0
                };
                bits.iter().map(kept).collect()
            };
            let (out, _) = forward.run(context, &plan, 0).unwrap();
            assert!(kept(&out) == expected, "{way}, {element_type}, {probability}: another mask forward");
            let dv = kept(&backward.run(context, &plan, 0).unwrap()[2]);
            let transposed = (0..dv.len()).map(|n| dv[n / 4096 * 4096 + n % 64 * 64 + n / 64 % 64]);
            assert!(
                transposed.eq(expected.iter().copied()),
                "{way}, {element_type}, {probability}: another mask backward"
            );
        }
    }
}

#[test]
fn the_mask_of_each_kernel() {
    let of = |kernel| PlanOptions::default().kernel(kernel).backward(kernel);
    for element_type in TYPES {
        let mut ways = every_kernel(element_type, of(Kernel::Naive), of(Kernel::Tile));
        ways.push(("small tile", full(), tiled(8, 16, (2, 4), 4, 8).backward(Kernel::Tile)));
        if element_type == ElementType::F32 {
            ways.push(("fused", full(), fused([32, 64], 8, 8, 16, [32, 64])));
        }
        check_masks(element_type, &ways);
    }
}

#[test]
fn coop_drops_the_mask() {
    let Some(context) = context() else { return };
    let coop = PlanOptions::default().kernel(Kernel::Coop).backward(Kernel::Coop);
    for element_type in TYPES {
        check_masks(element_type, &in_forms(element_type, &[("coop", &context, coop)]));
    }
}

/// One plan and one bound pass for any seed and offset.
#[test]
fn the_state_is_read_when_a_pass_runs() {
    let (problem, dropout, [q, k, v, _]) = readable(0.5);
    let context = webgpu();
    let plan = context.plan(&problem).unwrap();
    let [q, k, v] = [q, k, v].map(|x| context.upload(bytemuck::cast_slice(&x)).unwrap());
    let [out, lse] = [64, 1].map(|dim| context.upload(&vec![0; 4 * 2 * 3 * 64 * dim]).unwrap());
    let state = context.upload(&[0xff; 512]).unwrap();
    let part = BufferBinding { buffer: &state, offset: 256, size: None };
    let workspace = plan.create_workspace().unwrap();
    let buffers = ForwardBuffers::new(&q, &k, &v, &out).lse(&lse).rng_state(part).workspace(workspace.as_ref());
    let bound = plan.bind_forward(&buffers).unwrap();
    for dropout in [dropout, dropout.next(&problem.shape), Dropout { seed: 3, ..dropout }] {
        context.queue().write_buffer(&state, 256, &dropout.rng_state());
        let mut encoder = context.device().create_command_encoder(&Default::default());
        bound.record(&mut encoder.begin_compute_pass(&Default::default()));
        context.queue().submit([encoder.finish()]);
        let bytes = context.download(&out, 0, out.size()).unwrap();
        let found = bytemuck::pod_collect_to_vec::<u8, f32>(&bytes).into_iter().map(|x| x != 0.0);
        assert!(found.eq(dropout_mask(&problem.shape, &dropout)), "{dropout:?}");
    }
}

/// What a shader makes of a buffer that begins as this: `main` of the text, with the buffer at binding 0, in so many workgroups.
fn run(context: &Context, text: &str, begin: &[u32], [x, y]: [u32; 2]) -> Vec<u32> {
    let device = context.device();
    let source = wgpu::ShaderSource::Wgsl(text.into());
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    let data = context.upload(bytemuck::cast_slice(begin)).unwrap();
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[wgpu::BindGroupEntry { binding: 0, resource: data.as_entire_binding() }],
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(x, y, 1);
    }
    context.queue().submit([encoder.finish()]);
    bytemuck::pod_collect_to_vec(&context.download(&data, 0, data.size()).unwrap())
}

/// The items of a module with these names: functions, structs, aliases, constants and variables.
fn items(text: &str, names: &[&str]) -> String {
    let heads = |name: &str| {
        ["fn {}(", "struct {} {", "alias {} =", "const {} =", "var<private> {}:"].map(|head| head.replace("{}", name))
    };
    let item = |name: &&str| {
        let place = heads(name).iter().find_map(|head| text.find(&format!("\n{head}")));
        let place = place.unwrap_or_else(|| panic!("no {name} in the module")) + 1;
        let rest = &text[place..];
        let mut depth = 0;
        let end = rest.find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0 && (c == '}' || c == ';')
        });
        rest[..=end.unwrap()].to_string() + "\n"
    };
    names.iter().map(item).collect()
}

/// The arithmetic of `shaders/attention/dropout.wgsl`, against products of 64 bits and known vectors.
#[test]
fn the_generator_in_wgsl() {
    check_generator(webgpu(), vec!["DROPOUT"]);
    if full().device().features().contains(wgpu::Features::SHADER_INT64) {
        check_generator(full(), vec!["DROPOUT", "INT64"]);
    } else {
        skipped::skipped("dropout's products of 64 bits: the device has no SHADER_INT64");
    }
}

fn check_generator(context: &Context, switches: Vec<&'static str>) {
    let file = "kernel/naive_softmax.wgsl";
    let module = Specialization { file, entry: "softmax", switches, constants: vec![] };
    let functions = items(&module.source().unwrap().text, &["Wide", "coop_mul_wide", "philox_round", "philox"]);
    let text = format!(
        "{functions}
        // Pairs of numbers and their products; then counters, and what is drawn by them.
        struct Data {{ products: array<vec4u, 100032>, drawn: array<vec4u, 3> }}
        @group(0) @binding(0) var<storage, read_write> data: Data;
        @compute @workgroup_size(64)
        fn main(@builtin(global_invocation_id) id: vec3u) {{
            let pair = data.products[id.x].xy;
            let x = coop_mul_wide(pair.x, pair.y);
            data.products[id.x] = vec4u(pair, x.low, x.high);
            if id.x < 3u {{
                data.drawn[id.x] = philox(data.drawn[id.x], data.drawn[id.x].xy);
            }}
        }}"
    );
    let corners = [0, 1, 2, 0xffff, 0x1_0000, 0x1_0001, 0x7fff_ffff, 0x8000_0000, 0xffff_0000, 0xffff_ffff];
    let mut numbers: Vec<[u32; 4]> = corners.iter().flat_map(|&a| corners.map(|b| [a, b, 0, 0])).collect();
    let mut rng = fastrand::Rng::with_seed(1);
    numbers.resize_with(100_032, || [rng.u32(..), rng.u32(..), 0, 0]);
    let counters = [[0; 4], [u32::MAX; 4], [1, 2, 3, 4]];
    let found = run(context, &text, [&numbers[..], &counters].concat().as_flattened(), [100_032 / 64, 1]);
    let (products, drawn) = found.split_at(4 * 100_032);
    for product in products.chunks_exact(4) {
        let [a, b, low, high] = product.iter().copied().map(u64::from).collect::<Vec<_>>()[..] else { panic!() };
        assert_eq!(a * b, low | high << 32, "{a} times {b}");
    }
    let expected = counters.map(|counter| philox7(counter, [counter[0], counter[1]]));
    assert_eq!(expected[0], [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
    assert_eq!(drawn, expected.as_flattened());
}

/// Seven rounds, by multiplications of 64 bits.
fn philox7(mut counter: [u32; 4], [k, l]: [u32; 2]) -> [u32; 4] {
    for round in 0..7u32 {
        let [a, b, c, d] = counter;
        let (x, y) = (0xd251_1f53 * u64::from(a), 0xcd9e_8d57 * u64::from(c));
        let key = [(k, 0x9e37_79b9u32), (l, 0xbb67_ae85)].map(|(k, step)| k.wrapping_add(round.wrapping_mul(step)));
        counter = [(y >> 32) as u32 ^ b ^ key[0], y as u32, (x >> 32) as u32 ^ d ^ key[1], x as u32];
    }
    counter
}

/// A probability of 0 is no dropout: the same bits, and no state is needed, though it may be given.
#[test]
fn a_probability_of_0() {
    let plain = case(2, [4, 2], [37, 70], [16, 12]);
    let mut none = plain.clone();
    none.problem = none.problem.with_dropout(0.0);
    let given = plain.clone().dropout(0.0);
    for options in [naive(), tile(), PlanOptions::default().kernel(Kernel::Decode)] {
        let bits = [&plain, &none, &given].map(|case| {
            let prepared = case.prepare();
            prepared.run(full(), &full().plan_with(&prepared.problem, &options).unwrap(), 0).unwrap()
        });
        assert!(bits[1] == bits[0] && bits[2] == bits[0]);
    }
}

#[test]
fn probabilities_that_are_none() {
    let problem = case(1, [1, 1], [4, 4], [4, 4]).problem;
    for probability in [-0.1, 1.0, 2.0, f32::INFINITY, f32::NEG_INFINITY] {
        let error = problem.clone().with_dropout(probability).validate().unwrap_err();
        assert_eq!(error, Error::Dropout(probability));
        assert!(error.to_string().contains("dropout is"), "{error}");
    }
    assert!(matches!(problem.clone().with_dropout(f32::NAN).validate(), Err(Error::Dropout(_))));
    problem.with_dropout(1.0f32.next_down()).validate().unwrap();
}

/// Decoding has no dropout: plans take another kernel, and who asks for it is told so.
#[test]
fn decoding() {
    let problem = case(1, [8, 1], [1, 4096], [64, 64]).problem;
    assert_eq!(full().plan(&problem).unwrap().kernel(), Kernel::Decode);
    let problem = problem.with_dropout(0.1);
    assert_eq!(full().plan(&problem).unwrap().kernel(), Kernel::Tile);
    let error = full().plan_with(&problem, &PlanOptions::default().kernel(Kernel::Decode)).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Decode, .. }), "{error}");
    assert!(error.to_string().contains("decode") && error.to_string().contains("dropout"), "{error}");
}

#[test]
fn plans_say_what_share_is_kept() {
    let text = full().plan(&case(1, [1, 1], [4, 4], [4, 4]).problem.with_dropout(0.1)).unwrap().to_string();
    assert!(text.contains("dropout: 0.1; 230 of 256 probabilities are kept, 0.8984 of them"), "{text}");
}

/// What can be wrong with the buffer of the state.
#[test]
fn states_that_are_refused() {
    let problem = case(1, [1, 1], [4, 4], [4, 4]).problem.with_dropout(0.5).with_gradients();
    let context = webgpu();
    let plan = context.plan_with(&problem, &tile()).unwrap();
    let numbers = || context.upload(&[0; 1024]).unwrap();
    let [q, k, v, out, lse, state] = [(); 6].map(|()| numbers());
    let good = || ForwardBuffers::new(&q, &k, &v, &out).lse(&lse).rng_state(&state);
    let with = |state: Option<BufferBinding<'_>>| {
        let mut buffers = good();
        buffers.rng_state = None;
        let buffers = buffers.rng_state(state);
        plan.bind_forward(&buffers).map(drop)
    };
    fn part(buffer: &wgpu::Buffer, offset: u64, size: u64) -> Option<BufferBinding<'_>> {
        Some(BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) })
    }
    plan.bind_forward(&good()).unwrap();
    with(part(&state, 256, 16)).unwrap();
    with(part(&q, 256, 16)).unwrap();
    let argument = "rng_state";
    assert_eq!(with(None).unwrap_err(), Error::BufferMissing { argument, bytes: 16 });
    assert_eq!(with(part(&state, 0, 12)).unwrap_err(), Error::BufferTooSmall { argument, needed: 16, found: 12 });
    let error = with(part(&state, 16, 16)).unwrap_err();
    assert_eq!(error, Error::UniformOffset { argument, offset: 16, alignment: 256 });
    assert_eq!(with(part(&out, 512, 16)).unwrap_err(), Error::UniformShared { argument, output: "out" });
    assert_eq!(with(part(&lse, 512, 16)).unwrap_err(), Error::UniformShared { argument, output: "lse" });
    let (size, usage) = (1024, BufferUsages::STORAGE | BufferUsages::COPY_DST);
    let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
    let storage = context.device().create_buffer(&descriptor);
    let needed = BufferUsages::UNIFORM;
    assert_eq!(with(part(&storage, 0, 16)).unwrap_err(), Error::BufferUsage { argument, found: usage, needed });
    // Without dropout.
    let plain = context.plan_with(&case(1, [1, 1], [4, 4], [4, 4]).problem, &tile()).unwrap();
    let error = plain.bind_forward(&good()).unwrap_err();
    assert_eq!(error, Error::BufferUnexpected { argument });
}

/// A seed and an offset for each pass: passes that follow each other draw other numbers.
#[test]
fn gradients_by_the_plans_own_choice() {
    let case = case(2, [4, 2], [45, 51], [16, 12]).dropout(0.3).causal(Causal::BottomRight);
    for element_type in TYPES {
        let prepared = case.clone().element_type(element_type).prepare_backward(Default::default());
        prepared.check(full(), &PlanOptions::default()).unwrap();
        prepared.check(webgpu(), &backward(Kernel::Tile)).unwrap();
    }
}

/// Of a kernel on matrices that lie so, what its lanes ask about the mask, without a matrix: several rows of matrices, `together` keys each.
fn check_lanes(module: &PlannedModule, keys_are_rows: bool, size: u32, lanes: u32, together: u32) {
    let specialization = &module.specialization;
    let text = specialization.source().unwrap().text;
    let mut names =
        vec!["Sequence", "Wide", "coop_mul_wide", "philox_round", "philox", "dropout_bytes", "dropout_byte"];
    names.extend(["is_byte_kept", "source_bit", "row_of", "column_of", "held_row_place", "held_column_place", "M"]);
    names.extend(["row_bit_0", "row_next", "row_lane", "column_bit_0", "column_next", "column_lane"]);
    names.extend(if size == 16 { &["row_bit_3", "column_bit_3"][..] } else { &[] });
    names.extend(["byte_number", "call_number", "Kept", "SHARING", "bytes_of_calls", "find_bytes", "kept_lane"]);
    names.extend(specialization.constants.iter().map(|&(name, _)| name));
    // A workgroup stands for a subgroup, which software Vulkan has smaller ones of.
    let text = items(&format!("\n{text}"), &names).replace("subgroupShuffleXor(", "exchanged(");
    let [query, key] = if keys_are_rows { ["column", "row"] } else { ["row", "column"] };
    let (heads_q, probability) = (5, 0.3);
    // Several of the blocks of 16 rows and 32 keys that calls of the generator are for.
    let (rows, keys) = (96, 3 * together.max(32));
    let shape = Shape { seqlen_k: keys, ..Shape::square(3, heads_q, rows, 8) };
    let dropout = Dropout { probability, seed: 0xfedc_ba98_7654_3210, offset: (1 << 32) - 300 };
    let (last, seed) = ((dropout.kept_of_256() << 24) - 1, dropout.seed);
    let text = format!(
        "struct Problem {{ heads_q: u32, dropout_last: u32 }}
        const problem = Problem({heads_q}u, {last}u);
        const rng_state = vec4u({}u, {}u, {}u, {}u);
        {text}
        var<private> own_lane: u32;
        var<workgroup> exchange: array<vec4u, {lanes}>;
        fn exchanged(x: vec4u, lanes: u32) -> vec4u {{
            workgroupBarrier();
            exchange[own_lane] = x;
            workgroupBarrier();
            return exchange[own_lane ^ lanes];
        }}
        @group(0) @binding(0) var<storage, read_write> mask: array<u32>;
        @compute @workgroup_size({lanes})
        fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {{
            own_lane = lane;
            let at = Sequence(1u, 3u, 0u, {rows}, {keys});
            let i0 = i32(group.x * {size}u);
            for (var n = 0u; n < {together}u / {size}u; n++) {{
                let j0 = i32(group.y * {together}u + n * {size}u);
                let kept = kept_lane(at, i0, j0, n, lane);
                for (var e = 0u; e < ELEMENTS; e++) {{
                    let i = u32(i0 + held_{query}_place(lane, e));
                    let j = u32(j0 + held_{key}_place(lane, e));
                    mask[i * {keys}u + j] = u32(kept[e]);
                }}
            }}
        }}",
        seed as u32,
        seed >> 32,
        dropout.offset as u32,
        dropout.offset >> 32
    );
    let found = run(webgpu(), &text, &vec![2; (rows * keys) as usize], [rows / size, keys / together]);
    let all = dropout_mask(&shape, &dropout);
    let of_head = &all[(heads_q as usize + 3) * found.len()..][..found.len()];
    let wrong = (0..found.len()).find(|&n| found[n] != u32::from(of_head[n]));
    let place = wrong.map(|n| (n as u32 / keys, n as u32 % keys));
    assert!(place.is_none(), "another mask at {place:?}: {specialization:?}");
}

/// Matrices as GPUs have them, which software Vulkan has not: each way in which elements lie, with rows of keys and of queries, with calls that
/// several matrices share and without.
fn check_mask_of_lanes(
    element_type: ElementType,
    layouts: impl IntoIterator<Item = (MatrixFormat, Option<MatrixLayout>)>,
) {
    for (format, layout) in layouts {
        let size = format.size;
        let facts = Facts::with_limits(wgpu::Limits {
            max_compute_workgroup_storage_size: 1 << 20,
            max_compute_invocations_per_workgroup: 1024,
            max_compute_workgroup_size_x: 1024,
            ..Default::default()
        });
        let facts = facts.matrices(format, layout);
        let shape = Shape::square(3, 5, 64, 32);
        let problem = Problem::new(shape, element_type).with_gradients().with_dropout(0.3);
        for (keys, matrices) in [(16, 1), (32, 2), (64, 4), (96, 3)] {
            let tile = CoopTile::new(2, 1, keys, 1);
            let backward = |step| CoopBackwardTile { subgroups: 4, matrices, step, columns: 32, ahead: false };
            let options = PlanOptions::default().kernel(Kernel::Coop).backward(Kernel::Coop);
            let options = options.coop_tile(tile).coop_backward_tiles([backward(32), backward(keys)]);
            let modules = modules(&problem, &facts, &options).unwrap();
            let of_kernels = modules.iter().filter(|module| module.specialization.switches.contains(&"DROPOUT"));
            let of_kernels: Vec<_> = of_kernels.collect();
            assert!(of_kernels.len() >= 3);
            for module in of_kernels {
                let file = module.specialization.file;
                let (keys_are_rows, together) = match module.specialization.entry {
                    // Where a kernel asks about one matrix after the other, none share calls.
                    "dkdv" if file.contains("scaled") => (true, size),
                    "dkdv" => (true, matrices * size),
                    "dq" if file.contains("workgroup") => (false, size),
                    _ => (false, keys),
                };
                check_lanes(module, keys_are_rows, size, format.lanes, together);
            }
        }
    }
}

#[test]
fn the_mask_of_lanes_that_know_their_elements() {
    for element_type in [ElementType::F16, ElementType::F32] {
        check_mask_of_lanes(element_type, known_matrices().map(|(format, layout)| (format, Some(layout))));
    }
}

#[test]
fn the_mask_of_lanes_through_workgroup_memory() {
    check_mask_of_lanes(ElementType::F16, WGSL_FORMATS.map(|format| (format, None)));
}
