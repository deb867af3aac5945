//! Scores and masks that a user wrote, in every kernel, form and type, forward and backward, whole and split: compared with the reference,
//! which runs the same text on the host, and with the library's own features.

use flash_attention_testing::backward::{self, Ask, backward, fused, in_small_bindings, two_kernels};
use flash_attention_testing::coop::{check_passes, context};
use flash_attention_testing::*;
use wgpu_flash_attention::Causal::{BottomRight, TopLeft};
use wgpu_flash_attention::{
    Alibi, BackwardBuffers, ElementType, Error, ForwardBuffers, Kernel, ModBufferFault, Mods, PlanOptions, Problem,
    Shape, reference, wgpu,
};

const NONE: &[(&str, &[u32])] = &[];

/// Every number of a position, differently in each head and batch entry, and by the order of query and key.
const POSITIONS: &str = "
    fn score_mod(score: f32, at: Position) -> f32 {
        let far = f32(at.h + 2u * at.b + 1u) * 0.015625 * f32(i32(at.j) - i32(at.i));
        let lengths = f32(at.queries % 7u) * 0.125 - f32(at.keys % 5u) * 0.25 + f32(at.shift) * 0.015625;
        return score * (1.0 + 0.25 * f32(at.h)) + far + lengths * f32(at.j % 3u);
    }
";

/// Functions, a branch, loops, variables.
const STATEMENTS: &str = "
    const bend = 0.3;
    fn squash(x: f32, power: u32) -> f32 {
        var y = x;
        for (var n = 0u; n < power; n++) {
            y = y / (1.0 + bend * abs(y));
            if abs(y) < 0.25 {
                break;
            }
        }
        return y;
    }
    fn score_mod(score: f32, at: Position) -> f32 {
        if at.j > at.i + 20u {
            return max(score, -0.5) - 0.5 * sin(score);
        }
        let both = vec2f(squash(score, 1u + at.h), tanh(0.5 * score));
        return dot(both, vec2f(0.75, 2.0));
    }
";

/// Rows without keys, a head without any, and tiles of every kind.
const EMPTY_ROWS: &str = "
    fn mask_mod(at: Position) -> bool {
        let square = (at.i / 40u + 2u * (at.j / 40u) + at.h) % 4u;
        return at.i % 5u != 3u && at.h != 2u && square != 0u && (square > 1u || (at.i + at.j) % 2u == 0u);
    }
";

const DOCUMENTS: &str = "
    var<storage, read> document: array<u32>;
    fn mask_mod(at: Position) -> bool { return document[at.i] == document[at.j]; }
";

/// Both, with indices that are past the end but for the first few keys: of reads, and of writes to vectors and to what a pointer points to.
/// The last element stands for all that there are not.
const TABLE: &str = "
    var<storage, read> table: array<f32>;
    fn store(values: ptr<function, array<f32, 3>>, n: u32, x: f32) { (*values)[n] = x; }
    fn score_mod(score: f32, at: Position) -> f32 {
        var values = array<f32, 3>(0.5, 0.25, 1.0);
        var of_score = vec3f();
        var two = vec2f(0.75, 0.5);
        of_score[at.j] = 0.125 * score;
        store(&values, at.i + 4000000000u, values[0] + 0.5);
        two[i32(at.j) - 5] = 1.5;
        return score * table[at.j] + table[i32(at.h) - 1] + of_score[0] + of_score[2] * two.y + values[2] * two.x;
    }
    fn mask_mod(at: Position) -> bool { return table[at.i + 4000000000u] > 0.0 && at.j % 4u != at.i % 4u; }
";

const BY_HAND: &str = "
    fn score_mod(score: f32, at: Position) -> f32 { return bitcast<f32>(bitcast<u32>(score) ^ 0x80000000u) * 0.5; }
    fn score_mod_slope(score: f32, at: Position) -> f32 { return -0.5; }
";

/// Documents of 23 positions.
fn documents() -> Vec<u32> {
    (0..150).map(|n| n / 23).collect()
}

fn cases() -> Vec<(String, Case)> {
    let both = || case(2, [4, 2], [110, 150], [16, 12]);
    let lengths = || both().seqlens(&[150, 77]).seqlens_q(&[61, 110]);
    let table = [0.5f32, 1.25, -0.5, 0.75];
    let all = [
        ("positions, lengths", lengths().causal(BottomRight).mods(POSITIONS, NONE)),
        ("odd strides", case(1, [4, 2], [111, 149], [7, 5]).odd().scale(-0.4).softcap(3.0).mods(POSITIONS, NONE)),
        ("empty rows", both().mods(EMPTY_ROWS, NONE)),
        ("statements", both().window(70, 20).mods(&[STATEMENTS, EMPTY_ROWS].concat(), NONE)),
        ("statements, lengths", lengths().mods(&[STATEMENTS, EMPTY_ROWS].concat(), NONE)),
        (
            "documents",
            case(2, [4, 2], [150, 150], [16, 12]).causal(TopLeft).mods(DOCUMENTS, &[("document", &documents())]),
        ),
        ("past the end", both().mods(TABLE, &[("table", &table)])),
        ("slope by hand", case(2, [3, 3], [150, 110], [12, 16]).mods(BY_HAND, NONE)),
        ("with a mask and sinks", both().mask([1, 4, 110, 1]).sinks().mods(POSITIONS, NONE)),
        ("with bias and ALiBi", both().bias([2, 1, 110, 150]).alibi(Alibi::PerHead).mods(STATEMENTS, NONE)),
    ];
    all.map(|(name, case)| (name.to_string(), case)).into()
}

/// All in f32, and some of them in the other types: a type changes how elements are read and written.
fn cases_of(element_type: ElementType) -> Vec<(String, Case)> {
    let mut all = cases();
    if element_type != ElementType::F32 {
        all.truncate(3);
    }
    all
}

/// Without those that bind more than WebGPU's eight buffers.
fn of_webgpu(cases: Vec<(String, Case)>) -> Vec<(String, Case)> {
    cases.into_iter().filter(|(name, _)| !name.starts_with("with ")).collect()
}

#[test]
fn forward() {
    let small = tiled(8, 16, (2, 4), 4, 8);
    for element_type in TYPES {
        let mut ways = every_kernel(element_type, naive(), tile());
        ways.extend([("decode", full(), decode(1)), ("decode in 3 splits", full(), decode(3))]);
        ways.push(("small tile", full(), small));
        check_all(&cases::prepare(of_webgpu(cases_of(element_type)), element_type), &ways);
    }
    let rest = cases().into_iter().filter(|(name, _)| name.starts_with("with "));
    check_all(&cases::prepare(rest, ElementType::F32), &[("tile", full(), tile()), ("decode", full(), decode(2))]);
}

fn check_backward(element_type: ElementType) {
    let ask = Ask { grad_lse: true, ..Ask::default() };
    let mut ways = every_kernel(element_type, backward(Kernel::Naive), backward(Kernel::Tile));
    ways.push(("two kernels", full(), two_kernels()));
    if element_type == ElementType::F32 {
        ways.push(("fused", full(), fused([32, 64], 8, 8, 16, [32, 64])));
    }
    let cases = backward::prepare(of_webgpu(cases_of(element_type)), element_type, ask);
    backward::check_all(&cases, &ways);
}

#[test]
fn backward_f32() {
    check_backward(ElementType::F32);
}

#[test]
fn backward_f16() {
    check_backward(ElementType::F16);
}

#[test]
fn backward_bf16() {
    check_backward(ElementType::BF16);
}

/// More buffers than WebGPU's eight.
#[test]
fn backward_with_many_buffers() {
    let ask = Ask { grad_lse: true, ..Ask::default() };
    let rest = cases().into_iter().filter(|(name, _)| name.starts_with("with "));
    backward::check_all(&backward::prepare(rest, ElementType::F32, ask), &[("two kernels", full(), two_kernels())]);
}

/// Parts begin at batch entries, heads and rows that are not 0: the user is told the numbers of the problem.
#[test]
fn split_launches() {
    let (narrow, less_narrow, wide) = (with_bindings(20), with_bindings(100), with_bindings(400));
    let (small, at_once) = (tiled(8, 16, (2, 4), 4, 8), fused([32, 64], 8, 8, 16, [32, 64]));
    let all: Vec<_> = of_webgpu(cases()).into_iter().filter(|(name, _)| !name.contains("odd")).collect();
    let ways = [("tile", &narrow, small), ("decode", &narrow, decode(2)), ("naive", &less_narrow, naive())];
    for (_, context, options) in &ways {
        assert_split(&all[1].1.problem, context, *options);
    }
    check_all(&cases::prepare(all.clone(), ElementType::F32), &ways);
    let ways =
        [("two", &narrow, two_kernels()), ("naive", &wide, backward(Kernel::Naive)), ("fused", &narrow, at_once)]
            .map(|(name, context, options)| (name, context, in_small_bindings(options)));
    for (_, context, options) in &ways {
        assert_split(&all[1].1.problem, context, *options);
    }
    // The kernel that computes all gradients at once has no binding left for a buffer of a user's.
    let (with_buffers, without): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(_, case)| !case.extras.mod_buffers.is_empty());
    backward::check_all(&backward::prepare(without, ElementType::F32, Ask::default()), &ways);
    backward::check_all(&backward::prepare(with_buffers, ElementType::F32, Ask::default()), &ways[..2]);
}

/// On matrices, where the driver has them: both forms in f16, registers in f32 and bf16.
fn check_coop(element_type: ElementType) {
    let Some(context) = context() else { return };
    // A processor takes long to compile these kernels.
    let names = ["positions, lengths", "odd strides", "statements", "past the end"];
    let cases = cases().into_iter().filter(|(name, _)| names.contains(&name.as_str()));
    check_passes(&context, cases.collect(), element_type);
}

#[test]
fn coop_f16() {
    check_coop(ElementType::F16);
}

#[test]
fn coop_f32() {
    check_coop(ElementType::F32);
}

#[test]
fn coop_bf16() {
    check_coop(ElementType::BF16);
}

/// A feature of the library, and how a user writes it.
fn twins() -> Vec<(&'static str, Case, Case)> {
    let both = || case(2, [4, 2], [110, 150], [16, 12]);
    let slopes: &[f32] = &[0.5, -0.03125, 0.125, 0.0625];
    let square = || case(2, [4, 2], [150, 150], [16, 12]);
    let of_documents = || {
        let ids = documents();
        square().mask_where(|i, j| ids[i] == ids[j])
    };
    vec![
        ("identity", both(), both().mods("fn score_mod(score: f32, at: Position) -> f32 { return score; }", NONE)),
        (
            "softcap",
            both().softcap(4.0),
            both().mods("fn score_mod(score: f32, at: Position) -> f32 { return 4.0 * tanh(score / 4.0); }", NONE),
        ),
        (
            "ALiBi",
            both().alibi(Alibi::PerHead).seqlens(&[150, 77]),
            both().seqlens(&[150, 77]).mods(
                "var<storage, read> slopes: array<f32>;
                fn score_mod(score: f32, at: Position) -> f32 {
                    return score - slopes[at.h] * f32(abs(i32(at.i) + at.shift - i32(at.j)));
                }",
                &[("slopes", slopes)],
            ),
        ),
        ("documents", of_documents(), square().mods(DOCUMENTS, &[("document", &documents())])),
        (
            "causal",
            both().causal(BottomRight).seqlens(&[150, 77]).seqlens_q(&[61, 110]),
            both()
                .seqlens(&[150, 77])
                .seqlens_q(&[61, 110])
                .mods("fn mask_mod(at: Position) -> bool { return i32(at.j) <= i32(at.i) + at.shift; }", NONE),
        ),
        (
            "window",
            both().window(70, 20),
            both().mods(
                "fn mask_mod(at: Position) -> bool {
                    let far = i32(at.j) - i32(at.i) - at.shift;
                    return far >= -70 && far <= 20;
                }",
                NONE,
            ),
        ),
    ]
}

/// What the library has built in gives the same as a mod: exactly on the host, and the same bits on the device where tiles are visited
/// in one order and scores are held alike.
#[test]
fn mods_are_what_is_built_in() {
    for (name, of_library, of_user) in twins() {
        let [library, user] = [&of_library, &of_user].map(Case::prepare);
        let [expected, found] = [&library, &user].map(|prepared| &prepared.expected);
        let close = |x: &[f64], y: &[f64]| x.iter().zip(y).all(|(x, y)| x == y || (x - y).abs() < 1e-12);
        assert!(close(&expected.out, &found.out) && close(&expected.lse, &found.lse), "{name}: on the host");
        let same = |prepared: [&Prepared; 2], options: PlanOptions| {
            let [x, y] = prepared.map(|prepared| {
                let plan = full().plan_with(&prepared.problem, &options).unwrap();
                prepared.run(full(), &plan, 0).unwrap()
            });
            x == y
        };
        let both = [&library, &user];
        assert!(same(both, naive()), "{name}: other bits by the naive kernel");
        // Where a mask leaves whole tiles, these come first; without one, products are held instead of scores.
        if !["causal", "window", "identity"].contains(&name) {
            assert!(same(both, tile()), "{name}: other bits by the tile kernel");
            assert!(same(both, decode(2)), "{name}: other bits by the decode kernel");
        }
        let of_gradients = [&of_library, &of_user].map(|case| case.prepare_backward(Ask::default()));
        let [x, y] = of_gradients.each_ref().map(|prepared| {
            let plan = full().plan_with(&prepared.problem, &backward(Kernel::Naive)).unwrap();
            prepared.run(full(), &plan, 0).unwrap()
        });
        // dq, dk and dv; the library's ALiBi has a gradient of its own.
        assert!(x[..3] == y[..3], "{name}: other bits of gradients by the naive kernel");
        check_all(&[(name.to_string(), user)], &[("tile", full(), tile()), ("decode", full(), decode(2))]);
    }
}

/// A loop that the user forgot to end ends. (Each invocation runs it once, for a software driver of old counts loops, too.)
#[test]
fn loops_without_an_end() {
    let of_scores = "
        fn score_mod(score: f32, at: Position) -> f32 {
            var n = 0u;
            loop {
                n++;
                if at.i > 1000u { break; }
            }
            return score + select(0.0, f32(at.j), n > 60000u);
        }
    ";
    let of_masks = "fn mask_mod(at: Position) -> bool { while true { } return at.j != 1u; }";
    let all = [("scores", of_scores), ("masks", of_masks)];
    let all = all.map(|(name, text)| (name.to_string(), case(1, [1, 1], [3, 4], [4, 4]).mods(text, NONE)));
    check_all(&cases::prepare(all, ElementType::F32), &[("naive", full(), naive())]);
}

/// The gradients of the reference are the slopes of its forward pass.
#[test]
fn gradients_of_the_reference() {
    let shape = Shape { heads_q: 4, heads_kv: 2, seqlen_k: 5, head_dim_v: 2, ..Shape::square(2, 4, 4, 3) };
    let numbers = |n: usize, seed: f64| -> Vec<f64> { (0..n).map(|n| ((n as f64 + 1.0) * seed).sin()).collect() };
    for text in [POSITIONS, &[STATEMENTS, "fn mask_mod(at: Position) -> bool { return at.i != 1u; }"].concat()] {
        let problem = Problem::new(shape, ElementType::F32).softcap(1.5).with_mods(Mods::parse(text).unwrap());
        let mut inputs = [numbers(2 * 4 * 4 * 3, 0.7), numbers(2 * 2 * 5 * 3, 1.9), numbers(2 * 2 * 5 * 2, 2.3)];
        let grad_out = numbers(2 * 4 * 4 * 2, 1.3);
        let loss = |[q, k, v]: &[Vec<f64>; 3]| -> f64 {
            let out = reference::forward(&problem, q, k, v, None).out;
            out.iter().zip(&grad_out).map(|(x, y)| x * y).sum()
        };
        let [q, k, v] = &inputs;
        let found = reference::backward(&problem, [q, k, v, &grad_out], None, None);
        let found = [found.query, found.key, found.value];
        for n in 0..3 {
            for place in 0..found[n].len() {
                let (kept, step) = (inputs[n][place], 1e-5);
                inputs[n][place] = kept + step;
                let above = loss(&inputs);
                inputs[n][place] = kept - step;
                let slope = (above - loss(&inputs)) / (2.0 * step);
                inputs[n][place] = kept;
                let error = (found[n][place] - slope).abs();
                assert!(error < 1e-7, "gradient {n} at {place} is {}, not {slope}: {text}", found[n][place]);
            }
        }
    }
}

fn problem_with(text: &str) -> Problem {
    Problem::new(Shape::square(1, 2, 8, 8), ElementType::F32).with_gradients().with_mods(Mods::parse(text).unwrap())
}

/// Each buffer is one of eight of a stage.
#[test]
fn too_many_buffers_for_a_device() {
    let text: String = (0..4).map(|n| format!("var<storage, read> x{n}: array<f32>;\n")).collect();
    let problem = problem_with(&(text + "fn mask_mod(at: Position) -> bool { return x0[0] + x3[0] > x1[0] + x2[0]; }"));
    let error = webgpu().plan(&problem).err();
    let Some(Error::StorageBuffers { backward: true, needed: 9.., found: 8, inputs, .. }) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(inputs, &["x0", "x1", "x2", "x3"]);
    assert!(full().plan(&problem).is_ok());
}

#[test]
fn errors_name_the_buffer() {
    let plan = full().plan(&problem_with(TABLE)).unwrap();
    let storage = wgpu::BufferUsages::STORAGE;
    let buffer = |size: u64, usage| {
        full().device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let [q, k, v, o, lse, g, dq, dk, dv] = [(); 9].map(|()| buffer(1024, storage));
    let [workspace, of_gradients] =
        [plan.workspace_bytes(), plan.backward_workspace_bytes()].map(|n| buffer(n.max(4), storage));
    let (table, uniform) = (buffer(16, storage), buffer(16, wgpu::BufferUsages::UNIFORM));
    let part = |buffer, offset, size| wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(size) };
    let forward = || ForwardBuffers::new(&q, &k, &v, &o).lse(&lse).workspace(&workspace);
    let whole = || part(&table, 0, 16);
    let unknown =
        |known: &[&str]| ModBufferFault::Unknown { known: known.iter().map(|name| name.to_string()).collect() };
    let faults = [
        (forward(), "table", ModBufferFault::Missing),
        (forward().mod_buffer("tabel", &table), "tabel", unknown(&["table"])),
        (forward().mod_buffer("table", &table).mod_buffer("table", &table), "table", ModBufferFault::Twice),
        (
            forward().mod_buffer("table", &uniform),
            "table",
            ModBufferFault::Usage { found: wgpu::BufferUsages::UNIFORM },
        ),
        (forward().mod_buffer("table", part(&table, 0, 3)), "table", ModBufferFault::TooSmall { found: 3 }),
        (
            forward().mod_buffer("table", part(&table, 4, 4)),
            "table",
            ModBufferFault::Offset {
                offset: 4,
                alignment: full().device().limits().min_storage_buffer_offset_alignment.into(),
            },
        ),
    ];
    for (buffers, name, fault) in faults {
        let expected = Error::ModBuffer { name: name.into(), fault };
        assert_eq!(plan.bind_forward(&buffers).err().as_ref(), Some(&expected));
        let backward = BackwardBuffers::new(&buffers, &g, [&dq, &dk, &dv]).workspace(&of_gradients);
        assert_eq!(plan.bind_backward(&backward).err().as_ref(), Some(&expected));
        let text = expected.to_string();
        assert!(text.contains(&format!("buffer {name} ")), "{text}");
    }
    let right = forward().mod_buffer("table", whole());
    assert_eq!(plan.bind_forward(&right).err(), None);
    assert_eq!(
        plan.bind_backward(&BackwardBuffers::new(&right, &g, [&dq, &dk, &dv]).workspace(&of_gradients)).err(),
        None
    );
    // Nothing that is written may lie there.
    let error = plan.bind_forward(&forward().mod_buffer("table", &o)).err();
    let expected = Error::BufferAliased { output: "out", other: "mod_buffers[0]" };
    assert_eq!(error, Some(expected));
    // A problem without mods has no buffers.
    let plain = full().plan(&Problem::new(Shape::square(1, 2, 8, 8), ElementType::F32)).unwrap();
    let error = plain.bind_forward(&ForwardBuffers::new(&q, &k, &v, &o).mod_buffer("table", &table)).err();
    assert_eq!(error, Some(Error::ModBuffer { name: "table".into(), fault: unknown(&[]) }));
}

/// Other texts are other pipelines, and problems with them are not equal.
#[test]
fn plans_by_text() {
    let text = |n: u32| format!("fn mask_mod(at: Position) -> bool {{ return at.j == {n}u; }}");
    let of = |n: u32| case(1, [1, 1], [4, 4], [4, 4]).mods(&text(n), NONE);
    assert_ne!(of(0).problem, of(1).problem);
    assert_eq!(of(1).problem, of(1).problem);
    let all = [("first".to_string(), of(0)), ("second".to_string(), of(1))];
    check_all(&cases::prepare(all, ElementType::F32), &[("tile", full(), tile()), ("naive", full(), naive())]);
}
