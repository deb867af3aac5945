//! Work that exceeds a binding or a dispatch is split. Devices are made with limits lowered on purpose.

use flash_attention_testing::backward::{Ask, backward, fused, in_small_bindings};
use flash_attention_testing::*;
use wgpu_flash_attention::Causal::BottomRight;
use wgpu_flash_attention::tune::BackwardTile;
use wgpu_flash_attention::{
    Alibi, Context, ElementType, Error, Kernel, Layout, Plan, PlanOptions, Problem, Shape, Tensor,
};

fn narrow(binding: u64, workgroups: u32) -> Context {
    with_limits(|limits| {
        limits.max_storage_buffer_binding_size = binding;
        limits.max_compute_workgroups_per_dimension = workgroups;
    })
}

/// How many parts the plan says that it has.
fn parts(plan: &Plan) -> usize {
    parts_in(&plan.to_string())
}

fn parts_in(text: &str) -> usize {
    let (_, after) = text.split_once("parts that the problem was split into: ").expect("the plan counts its parts");
    after.lines().next().unwrap().parse().unwrap()
}

/// The types that a case is tried in. Where a part begins is worked out alike for all of them, and each module of a type is
/// one to compile: the first case is tried in each, and rows that share words with others.
fn types_of(n: usize, name: &str) -> &'static [ElementType] {
    if n == 0 || name == "odd strides" { &TYPES } else { &[ElementType::F32] }
}

/// Each case, in at least `least` parts.
fn check_split(context: &Context, options: &PlanOptions, least: usize, cases: &[(&str, Case)]) {
    let mut failed = vec![];
    for (n, (name, case)) in cases.iter().enumerate() {
        for &element_type in types_of(n, name) {
            let prepared = case.clone().element_type(element_type).prepare();
            let plan = context.plan_with(&prepared.problem, options).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(parts(&plan) >= least, "{name}, {element_type}: {plan}");
            if let Err(error) = prepared.check_plan(context, &plan) {
                failed.push(format!("{name}, {element_type}, {} parts: {error}", parts(&plan)));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// What a part must get right: its place in the batch, in the heads and their groups, and in the rows.
fn cases() -> Vec<(&'static str, Case)> {
    let three = || case(3, [4, 2], [37, 40], [16, 12]);
    vec![
        ("plain", three()),
        ("one head for each", case(3, [3, 3], [37, 40], [16, 12])),
        ("one head for all", case(2, [5, 1], [37, 40], [16, 12])),
        ("no lse", three().no_lse()),
        ("causal", three().causal(BottomRight)),
        ("causal, more queries", case(2, [4, 2], [70, 33], [16, 12]).causal(BottomRight)),
        ("window", three().window(7, 3)),
        ("lengths", three().seqlens(&[40, 0, 17])),
        ("lengths, causal, softcap", three().seqlens(&[9, 40, 33]).causal(BottomRight).softcap(2.0)),
        ("odd strides", three().odd().seqlens(&[9, 40, 33])),
        ("BNHD", three().bnhd().causal(BottomRight)),
        ("packed", case(3, [4, 2], [37, 37], [8, 4]).packed()),
        ("shared k and v", three().shared_kv()),
        ("dropout, causal", three().dropout(0.3).causal(BottomRight)),
    ]
}

fn small() -> PlanOptions {
    tiled(8, 16, (2, 4), 4, 8)
}

#[test]
fn by_workgroups_the_tile_kernel() {
    // 37 rows are 5 tiles of 8; 3 batch entries and 4 heads exceed 2 as well.
    check_split(&narrow(128 << 20, 2), &small(), 9, &cases());
}

#[test]
fn by_workgroups_the_naive_kernel() {
    // Each head of each batch entry is a workgroup of the third dimension.
    let many = || case(3, [8, 4], [9, 11], [16, 12]);
    let cases = [
        ("plain", many()),
        ("dropout", many().dropout(0.3)),
        ("causal, lengths, softcap", many().seqlens(&[3, 11, 0]).causal(BottomRight).softcap(2.0)),
        ("odd strides", many().odd()),
    ];
    check_split(&narrow(128 << 20, 10), &naive(), 3, &cases);
}

#[test]
fn by_binding_the_tile_kernel() {
    // Enough for one batch entry of the packed q, k and v, 37 · 56 · 4 bytes; less than all of q in any case.
    check_split(&narrow(9 << 10, 65535), &small(), 2, &cases());
}

#[test]
fn by_binding_the_naive_kernel() {
    // Enough for the scores of a head, 70 · 33 · 4 bytes.
    check_split(&narrow(10 << 10, 65535), &naive(), 2, &cases());
}

#[test]
fn rows_of_one_head() {
    // k and v take 640 bytes or less; q and o take more than one binding.
    let cases = [
        ("plain", case(1, [1, 1], [100, 10], [16, 12])),
        ("causal, lengths", case(1, [1, 1], [100, 10], [16, 12]).causal(BottomRight).seqlens(&[7])),
        ("grouped heads", case(2, [4, 2], [100, 10], [16, 12])),
        ("dropout", case(2, [4, 2], [100, 10], [16, 12]).dropout(0.3)),
        ("grouped heads, odd strides", case(2, [4, 2], [100, 10], [13, 11]).odd()),
    ];
    check_split(&narrow(1 << 10, 65535), &small(), 4, &cases);
}

#[test]
fn both_limits_at_once() {
    let cases = [("all", case(3, [4, 2], [37, 40], [16, 12]).seqlens(&[9, 40, 33]).causal(BottomRight).softcap(2.0))];
    check_split(&narrow(3 << 10, 3), &small(), 9, &cases);
}

/// Backward passes: as [`check_split`].
fn check_backward_split(context: &Context, kernel: Kernel, least: usize, cases: &[(&str, Case)]) {
    let tile = BackwardTile { own: 8, step: 8, threads_y: 4, threads_x: 2, chunk: 8, block: 8, written_out: false };
    let options = backward(kernel).backward_tile((kernel == Kernel::Tile).then_some(tile));
    check_backward_split_with(context, &options, least, cases);
}

fn check_backward_split_with(context: &Context, options: &PlanOptions, least: usize, cases: &[(&str, Case)]) {
    let options = &in_small_bindings(*options);
    let fused = options.fused_tile.is_some();
    for (n, (name, case)) in cases.iter().enumerate() {
        for &element_type in if fused { &[ElementType::F32] } else { types_of(n, name) } {
            let ask = Ask { grad_lse: true, accumulate: false };
            let prepared = case.clone().element_type(element_type).prepare_backward(ask);
            let plan = context.plan_with(&prepared.problem, options).unwrap_or_else(|error| panic!("{name}: {error}"));
            let text = plan.to_string();
            let (_, of_backward) = text.split_once("backward kernel").expect("the plan explains its backward pass");
            assert!(parts_in(of_backward) >= least, "{name}, {element_type}: {plan}");
            if let Err(error) = prepared.check(context, options) {
                panic!("{name}, {element_type}: {error}");
            }
        }
    }
}

/// Each part goes through all rounds of its own heads.
#[test]
fn fused_backward_by_binding() {
    let options = fused([32, 32], 8, 16, 16, [32, 32]);
    let plain = || case(7, [4, 2], [37, 40], [16, 12]);
    let cases = [("plain", plain()), ("dropout", plain().dropout(0.3))];
    check_backward_split_with(&narrow(12 << 10, 65535), &options, 2, &cases);
}

#[test]
fn backward_by_workgroups() {
    // 70 rows are 9 tiles of 8, which no part may exceed; groups of heads and batch entries are parts of their own.
    let all: Vec<_> = cases().into_iter().filter(|(name, _)| *name != "one head for all").collect();
    check_backward_split(&narrow(128 << 20, 9), Kernel::Tile, 1, &all);
    let many = [
        ("plain", case(7, [4, 2], [37, 40], [16, 12])),
        ("lengths", case(6, [14, 7], [9, 40], [16, 12]).seqlens(&[40, 0, 17, 1, 39, 40]).causal(BottomRight)),
    ];
    check_backward_split(&narrow(128 << 20, 5), Kernel::Tile, 2, &many);
}

#[test]
fn backward_by_binding() {
    // Enough for one batch entry of the packed q, k and v, 37 · 56 · 4 bytes.
    let all: Vec<_> = cases().into_iter().filter(|(name, _)| !name.contains("odd strides")).collect();
    check_backward_split(&narrow(12 << 10, 65535), Kernel::Tile, 1, &all);
    check_backward_split(&narrow(12 << 10, 65535), Kernel::Tile, 2, &[("plain", case(7, [4, 2], [37, 40], [16, 12]))]);
    // P and dS of a head, 37 · 40 · 8 bytes.
    check_backward_split(&narrow(12 << 10, 65535), Kernel::Naive, 3, &[("plain", case(3, [3, 3], [37, 40], [16, 12]))]);
}

/// Gradients of what batch entries or heads share are sums over parts.
#[test]
fn shared_gradients_by_binding() {
    let plain = || case(7, [4, 2], [37, 40], [16, 12]);
    let cases = [
        ("bias of all batch entries", plain().bias([1, 4, 37, 40])),
        ("bias of all heads", plain().bias([7, 1, 37, 40])),
        ("bias of all rows", plain().bias([1, 4, 1, 40])),
        ("bias of all keys", plain().bias_f32([1, 1, 37, 1])),
        ("bias of everything", plain().bias_f32([1, 1, 1, 1])),
        ("ALiBi, sinks", plain().alibi(Alibi::PerHead).sinks().causal(BottomRight)),
    ];
    // For the naive kernel P and dS of a group of heads, 2 · 37 · 40 · 8 bytes.
    for (kernel, binding) in [(Kernel::Tile, 12 << 10), (Kernel::Naive, 24 << 10)] {
        check_backward_split(&narrow(binding, 65535), kernel, 2, &cases);
    }
}

/// Heads that share a key-value head are one sum.
#[test]
fn a_group_of_heads_is_not_split() {
    let problem = case(1, [4, 1], [100, 10], [16, 12]).problem.with_gradients();
    let error = refused(&narrow(16 << 10, 65535), &problem, &tile());
    assert_eq!(error, Error::BindingTooLarge { argument: "query", bytes: 25600, limit: 16 << 10 });
}

fn refused(context: &Context, problem: &Problem, options: &PlanOptions) -> Error {
    match context.plan_with(problem, options) {
        Err(error) => error,
        Ok(plan) => panic!("not refused:\n{plan}"),
    }
}

#[test]
fn keys_of_one_head_are_not_split() {
    let context = narrow(1 << 10, 65535);
    let long = case(1, [1, 1], [10, 100], [16, 1]).problem;
    for options in [tile(), naive()] {
        let error = refused(&context, &long, &options);
        assert_eq!(error, Error::BindingTooLarge { argument: "key", bytes: 6400, limit: 1024 });
    }
    let wide = case(1, [1, 1], [10, 100], [1, 16]).problem;
    let error = refused(&context, &wide, &tile());
    assert_eq!(error, Error::BindingTooLarge { argument: "value", bytes: 6400, limit: 1024 });
}

/// Of each part, what kernels are told of it.
#[test]
fn more_parts_than_a_buffer_can_tell_of() {
    let context = with_limits(|limits| {
        limits.max_storage_buffer_binding_size = 1 << 10;
        limits.max_buffer_size = 8 << 10;
    });
    let problem = |batch| case(batch, [1, 1], [16, 16], [16, 16]).problem;
    context.plan_with(&problem(8), &tile()).unwrap();
    let error = refused(&context, &problem(64), &tile());
    assert!(matches!(error, Error::BindingTooLarge { argument: "uniforms", limit: 8192, .. }), "{error}");
}

#[test]
fn keys_of_one_row_are_not_split() {
    // The scores' dispatch has a workgroup for every 16 keys.
    let error = refused(&narrow(128 << 20, 4), &case(1, [1, 1], [1, 65], [4, 4]).problem, &naive());
    let limit = "max_compute_workgroups_per_dimension";
    assert_eq!(error, Error::DeviceLimit { kernel: Kernel::Naive, limit, needed: 5, found: 4 });
}

#[test]
fn the_scores_of_a_long_sequence_do_not_fit() {
    // Not of more keys: Mesa 22.3 ends the loops over them.
    let shape = Shape { seqlen_k: 8192, ..Shape::square(1, 16, 1 << 18, 64) };
    let long = Problem::new(shape, ElementType::F32);
    let error = refused(webgpu(), &long, &naive());
    assert!(matches!(error, Error::BindingTooLarge { argument: "workspace", .. }), "{error}");
    let plan = webgpu().plan_with(&long, &tile()).unwrap();
    assert_eq!(plan.workspace_bytes(), 0);
}

#[test]
fn offsets_past_2_to_the_32() {
    let shape = Shape { batch: 3, ..Shape::square(1, 2, 8, 16) };
    let contiguous = Problem::new(shape, ElementType::F16);
    let far = |layout: Layout| Layout { batch: (1 << 33) + 4, ..layout.at(1 << 34) };
    let [query, key, value, out] =
        [Tensor::Query, Tensor::Key, Tensor::Value, Tensor::Out].map(|tensor| far(contiguous.layout(tensor)));
    let all = contiguous
        .clone()
        .with_layout(Tensor::Query, query)
        .with_layout(Tensor::Key, key)
        .with_layout(Tensor::Value, value)
        .with_layout(Tensor::Out, out);
    // Batch entries are far apart: each is a part of its own, with small numbers.
    let plan = webgpu().plan(&all).unwrap();
    assert_eq!(parts(&plan), 3);
    // So are rows: those of q and o are parts of their own, those of k and v must be bound at once.
    let apart = |layout: Layout| Layout { row: 1 << 33, batch: 1 << 40, head: 1 << 36, ..layout };
    let rows = contiguous.clone().with_layout(Tensor::Query, apart(query)).with_layout(Tensor::Out, apart(out));
    let decode = PlanOptions::default().kernel(Kernel::Decode);
    let plan = webgpu().plan_with(&rows, &decode).unwrap();
    assert_eq!(parts(&plan), 3 * 2 * 8);
    for (far, argument) in [
        (contiguous.clone().with_layout(Tensor::Key, apart(key)), "key"),
        (contiguous.clone().with_layout(Tensor::Value, apart(value)), "value"),
        // The rows of a tile are bound at once.
        (contiguous.clone().with_layout(Tensor::Query, apart(query)), "query"),
        (contiguous.clone().with_layout(Tensor::Out, apart(out)), "out"),
    ] {
        let error = refused(webgpu(), &far, &tile());
        assert!(matches!(error, Error::BindingTooLarge { argument: found, .. } if found == argument), "{error}");
    }
}
