//! Decoding, and the public merge: the cases of the other forward kernels, and those that are about splits.

use flash_attention_testing::cases::{cases, dims_with, prepare};
use flash_attention_testing::skipped::skipped;
use flash_attention_testing::*;
use wgpu_flash_attention::Causal::{BottomRight, TopLeft};
use wgpu_flash_attention::tune::DecodeTile;
use wgpu_flash_attention::wgpu;
use wgpu_flash_attention::{
    Context, ElementType, Error, Kernel, MergeBuffers, MergeProblem, PlanOptions, Problem, Shape, reference,
};

fn decode() -> PlanOptions {
    PlanOptions::default().kernel(Kernel::Decode)
}

/// So many splits of the keys, in tiles of 16 keys and 4 rows.
fn small(splits: u32) -> PlanOptions {
    let tile = DecodeTile { rows: 4, threads: 64, key_threads: 8, thread_keys: 2, lanes: 0 };
    decode().decode_tile(tile).splits(splits)
}

/// The same by subgroup operations, with so many threads a key, where the adapter has them.
fn in_subgroups(splits: u32, key_threads: u32) -> Option<PlanOptions> {
    let device = full().device();
    if !device.features().contains(wgpu::Features::SUBGROUP) || device.adapter_info().subgroup_min_size < 8 {
        skipped("decoding by subgroup operations, since this adapter has no subgroups of 8 lanes");
        return None;
    }
    let tile = DecodeTile { rows: 4, threads: 64, key_threads, thread_keys: 2, lanes: 8 };
    Some(small(splits).decode_tile(tile))
}

/// All cases but those with dropout, which decoding does not have.
fn without_dropout() -> Vec<(String, Case)> {
    cases().into_iter().filter(|(_, case)| case.problem.dropout.is_none()).collect()
}

/// Cases in which there is more than one tile a split, empty splits, and a tail.
fn long_cases() -> Vec<(String, Case)> {
    let one = || case(2, [4, 2], [1, 301], [16, 12]);
    let few = || case(2, [6, 2], [3, 290], [16, 12]);
    let three = || case(3, [4, 2], [1, 300], [16, 12]);
    let all = vec![
        ("one query", one()),
        ("one query, no lse", one().no_lse()),
        ("one head for each", case(2, [3, 3], [1, 300], [16, 12])),
        ("16 heads on one", case(2, [16, 1], [1, 300], [16, 12])),
        ("17 heads on one", case(1, [17, 1], [1, 300], [16, 12])),
        ("few queries", few()),
        ("few queries, bottom-right", few().causal(BottomRight)),
        ("few queries, top-left", few().causal(TopLeft)),
        ("window", few().window(40, -1)),
        ("window on both sides", few().window(100, 3)),
        ("window of one key", one().window(0, 0)),
        ("window past a length", three().window(20, 5).seqlens(&[300, 9, 200])),
        ("lengths 0, 1, all", three().seqlens(&[0, 1, 300])),
        ("lengths between", three().seqlens(&[17, 64, 257]).causal(BottomRight)),
        ("lengths, few queries", case(3, [6, 2], [3, 290], [16, 12]).seqlens(&[2, 290, 100]).causal(BottomRight)),
        ("softcap", few().softcap(1.5)),
        ("softcap, scale below 0", few().softcap(2.0).scale(-1.5)),
        ("scale below 0", one().scale(-0.3)),
        ("huge scores", one().scale(1.0).integers(40)),
        ("huge scores, scale below 0", few().scale(-1.0).integers(40).causal(BottomRight)),
        // Splits that are merged by a rounded lse would weigh equal keys differently.
        ("equal scores", case(2, [4, 2], [1, 1000], [16, 12]).equal_scores()),
        ("equal scores of some 1,000", case(2, [4, 2], [1, 1000], [16, 12]).equal_scores().scale(200.0)),
        ("equal scores of some 100,000", case(2, [4, 2], [1, 1000], [16, 12]).equal_scores().scale(20_000.0)),
        ("BNHD", few().bnhd()),
        ("NBHD", few().nbhd()),
        ("odd strides", few().odd()),
        ("odd strides, odd head dims", case(2, [6, 2], [3, 290], [7, 5]).odd().seqlens(&[200, 1])),
        ("gaps", few().gaps()),
        ("shared k and v", few().shared_kv()),
        ("head dim 128", case(1, [8, 2], [1, 600], [128, 128]).seqlens(&[555])),
        ("head dim 64", case(1, [8, 2], [2, 600], [64, 64]).causal(BottomRight)),
        ("head dim 80", case(1, [8, 2], [1, 600], [80, 80])),
        ("head dims 256 and 200", case(1, [4, 2], [2, 270], [256, 200])),
        ("head dims 33 and 101", case(1, [4, 2], [2, 270], [33, 101])),
    ];
    all.into_iter().map(|(name, case)| (name.to_string(), case)).collect()
}

fn run(element_type: ElementType) {
    let [chosen, split] = [("decode", webgpu(), decode()), ("3 splits", full(), small(3))];
    check_all(&prepare(without_dropout(), element_type), &[split]);
    let long = prepare(long_cases(), element_type);
    check_all(&long, &[chosen, split, ("1 split", full(), small(1)), ("100 splits", full(), small(100))]);
    // 16-bit types differ only in how elements are read; each tile is a module to compile for every pair of head dims.
    let by_subgroups = match element_type {
        ElementType::F32 => vec![in_subgroups(1, 8), in_subgroups(100, 4)],
        ElementType::F16 => vec![in_subgroups(1, 8)],
        _ => vec![in_subgroups(100, 4)],
    };
    let by_subgroups = by_subgroups.into_iter().flatten().map(|options| ("by subgroups", full(), options));
    check_all(&long, &by_subgroups.collect::<Vec<_>>());
}

#[test]
fn cases_f32() {
    run(ElementType::F32);
}

#[test]
fn cases_f16() {
    run(ElementType::F16);
}

#[test]
fn cases_bf16() {
    run(ElementType::BF16);
}

/// Up to 128; larger ones are among the long cases, and take software adapters long to compile. So do tiles of many rows, which
/// other cases have.
#[test]
fn head_dims() {
    let some = dims_with([3, 45])
        .into_iter()
        .filter(|(_, case)| case.problem.shape.head_dim.max(case.problem.shape.head_dim_v) <= 128);
    check_all(&prepare(some, ElementType::F16), &[("decode", full(), decode())]);
}

#[test]
fn within_bounds() {
    let context = full().clone().checked();
    let mut ways = vec![("decode", &context, decode()), ("small", &context, small(3))];
    ways.extend(in_subgroups(3, 8).map(|options| ("by subgroups", &context, options)));
    for element_type in TYPES {
        let some = long_cases().into_iter().step_by(4);
        check_all(&prepare(some, element_type), &ways);
    }
}

/// Bindings and dispatches too small for the whole problem.
#[test]
fn parts() {
    let cases = || {
        let three = || case(3, [4, 2], [3, 140], [16, 12]);
        let all = vec![
            ("plain", three()),
            ("one head for all", case(2, [5, 1], [3, 140], [16, 12])),
            ("lengths, causal", three().seqlens(&[9, 140, 33]).causal(BottomRight)),
            ("odd strides", three().odd().seqlens(&[9, 140, 33])),
            ("no lse", three().no_lse()),
        ];
        all.into_iter().map(|(name, case)| (name.to_string(), case))
    };
    let by_workgroups = with_limits(|limits| limits.max_compute_workgroups_per_dimension = 2);
    // Enough for the keys of one head, 140 · 16 · 4 bytes, with strides of their own in some cases.
    let by_binding = with_limits(|limits| limits.max_storage_buffer_binding_size = 12 << 10);
    for element_type in TYPES {
        check_all(
            &prepare(cases(), element_type),
            &[
                ("workgroups", &by_workgroups, decode()),
                ("workgroups, small", &by_workgroups, small(2)),
                ("binding", &by_binding, small(3)),
            ],
        );
    }
    // K alone would not fit.
    let plan = by_binding.plan_with(&case(3, [4, 2], [3, 140], [16, 12]).problem, &small(3)).unwrap();
    assert!(!plan.to_string().contains("split into: 1"), "{plan}");
}

#[test]
fn the_plan_chooses_by_shape() {
    let chosen = |heads_q, seqlen_q, seqlen_k| {
        let shape = Shape { heads_q, heads_kv: 2, seqlen_q, seqlen_k, ..Shape::square(1, 2, 1, 64) };
        let plan = webgpu().plan(&Problem::new(shape, ElementType::F16)).unwrap();
        let text = plan.to_string();
        assert_eq!(text.contains("kernel: decode (few queries:"), plan.kernel() == Kernel::Decode, "{text}");
        assert_eq!(plan.workspace_bytes() > 0, plan.kernel() == Kernel::Decode);
        plan.kernel()
    };
    assert_eq!(chosen(8, 1, 4096), Kernel::Decode);
    assert_eq!(chosen(8, 4, 256), Kernel::Decode);
    assert_eq!(chosen(8, 16, 4096), Kernel::Decode);
    assert_eq!(chosen(2, 16, 4096), Kernel::Decode);
    assert_eq!(chosen(2, 17, 4096), Kernel::Tile);
    assert_eq!(chosen(8, 1, 1), Kernel::Decode);
    assert_eq!(chosen(8, 1, 255), Kernel::Decode);
    assert_eq!(chosen(8, 4, 16), Kernel::Decode);
    assert_eq!(chosen(128, 1, 4096), Kernel::Decode);
    assert_eq!(chosen(130, 1, 4096), Kernel::Tile);
    assert_eq!(chosen(8, 0, 4096), Kernel::Tile);
}

#[test]
fn splits_are_as_asked_for() {
    let problem = case(1, [8, 2], [1, 4096], [64, 64]).problem;
    let plan = full().plan_with(&problem, &decode().splits(7)).unwrap();
    assert!(plan.to_string().contains("splits of the keys: 7\n"), "{plan}");
    assert!(plan.to_string().contains(" rows (queries of the heads that share keys) by "), "{plan}");
    let most = webgpu().device().limits().max_compute_workgroups_per_dimension;
    for found in [0, most + 1] {
        for options in [decode(), PlanOptions::default()] {
            let error = webgpu().plan_with(&problem, &options.splits(found)).unwrap_err();
            assert_eq!(error, Error::Splits { found, most });
            assert!(error.to_string().contains(&format!("splits: {found} were asked for")), "{error}");
        }
    }
    assert!(webgpu().plan_with(&problem, &decode().splits(1)).is_ok());
}

#[test]
fn tiles_that_do_not_divide_are_refused() {
    let problem = case(1, [8, 2], [1, 4096], [64, 64]).problem;
    let fine = DecodeTile { rows: 4, threads: 64, key_threads: 8, thread_keys: 2, lanes: 0 };
    for (tile, why) in [
        (DecodeTile { rows: 6, ..fine }, "rows must be a multiple of 4"),
        (DecodeTile { threads: 0, ..fine }, "every size must be from 1 to 1024"),
        (DecodeTile { lanes: 24, ..fine }, "lanes must be 0, or a power of two that divides threads"),
        (DecodeTile { lanes: 128, ..fine }, "lanes must be 0, or a power of two that divides threads"),
        (DecodeTile { lanes: 4, ..fine }, "lanes must be 0, or a multiple of key_threads"),
        (
            DecodeTile { lanes: 8, ..fine },
            "lanes must be at most those of the device's smallest subgroup, and 0 without Features::SUBGROUP",
        ),
    ] {
        let error = webgpu().plan_with(&problem, &decode().decode_tile(tile)).unwrap_err();
        assert_eq!(error, Error::Tile(why));
    }
}

/// Fewer threads than maxima are first reduced to, and rows whose only score is far below 0.
#[test]
fn the_smallest_tile() {
    let tile = DecodeTile { rows: 4, threads: 4, key_threads: 4, thread_keys: 1, lanes: 0 };
    let options = decode().decode_tile(tile);
    let cases = [case(4, [8, 2], [1, 1], [1, 4]), case(2, [4, 2], [2, 30], [4, 16])];
    let cases = cases.map(|case| ("smallest tile".to_string(), case.scale(1.0).integers(40)));
    check_all(&prepare(cases, ElementType::F32), &[("4 threads", full(), options)]);
}

/// o and lse, o as values of its type.
type Partial = (Vec<f32>, Vec<f32>);

/// Merges on the device.
fn merged(context: &Context, element_type: ElementType, head_dim_v: u32, parts: &[&Partial]) -> Partial {
    let rows = parts.first().map_or(3, |(_, lse)| lse.len()) as u32;
    merge(context, &MergeProblem::new(parts.len() as u32, rows, head_dim_v, element_type), parts, None)
}

/// Merges on the device, with sinks if the problem has them.
fn merge(context: &Context, problem: &MergeProblem, parts: &[&Partial], sinks: Option<&[f32]>) -> Partial {
    let MergeProblem { element_type, head_dim_v, rows, .. } = *problem;
    let bytes = element_type.bytes() as usize;
    let encode = |x: f32| to_bits(element_type, x).to_le_bytes().into_iter().take(bytes);
    let out: Vec<u8> = parts.iter().flat_map(|(out, _)| out.iter().copied().flat_map(encode)).collect();
    let lse: Vec<f32> = parts.iter().flat_map(|(_, lse)| lse.iter().copied()).collect();
    let (part_out, part_lse) = (context.upload(&out).unwrap(), context.upload(bytemuck::cast_slice(&lse)).unwrap());
    let elements = (rows * head_dim_v) as usize;
    let (out, lse) = (
        context.upload(&vec![0xff; elements * bytes]).unwrap(),
        context.upload(&vec![0xff; rows as usize * 4]).unwrap(),
    );
    let plan = context.plan_merge(problem).unwrap();
    let sinks = sinks.map(|sinks| context.upload(bytemuck::cast_slice(sinks)).unwrap());
    let mut encoder = context.device().create_command_encoder(&Default::default());
    let buffers = MergeBuffers::new([&part_out, &part_lse], [&out, &lse]).sinks(sinks.as_ref());
    plan.merge(&mut encoder, &buffers).unwrap();
    context.queue().submit([encoder.finish()]);
    let out = context.download(&out, 0, out.size()).unwrap();
    let out = out.chunks(bytes).take(elements).map(|chunk| {
        let mut bits = [0; 4];
        bits[..bytes].copy_from_slice(chunk);
        from_bits(element_type, u32::from_le_bytes(bits))
    });
    let lse = context.download(&lse, 0, rows as u64 * 4).unwrap();
    (out.collect(), bytemuck::pod_collect_to_vec(&lse))
}

/// Attention over each range of keys, from the oracle, rounded to the type; and over all of them.
fn partials(element_type: ElementType, [dim, dim_v]: [u32; 2], cuts: &[usize]) -> (Vec<Partial>, reference::Forward) {
    let keys = *cuts.last().unwrap();
    let shape = |keys: usize| Shape {
        batch: 2,
        heads_q: 2,
        heads_kv: 1,
        seqlen_q: 5,
        seqlen_k: keys as u32,
        head_dim: dim,
        head_dim_v: dim_v,
    };
    let mut rng = fastrand::Rng::with_seed(7);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| 3.0 * rng.f32() - 1.2).collect() };
    let query = random(2 * 2 * 5 * dim as usize);
    let (key, value) = (random(2 * keys * dim as usize), random(2 * keys * dim_v as usize));
    let attend = |first: usize, end: usize| {
        let of = |x: &[f32], dim: u32| -> Vec<f32> {
            let rows = x.chunks(keys * dim as usize);
            rows.flat_map(|x| x[first * dim as usize..end * dim as usize].to_vec()).collect()
        };
        let problem = Problem::new(shape(end - first), ElementType::F32).scale(1.0);
        reference::forward(&problem, &query, &of(&key, dim), &of(&value, dim_v), None)
    };
    let round = |x: &f64| from_bits(element_type, to_bits(element_type, *x as f32));
    let part = |cut: &[usize]| {
        let part = attend(cut[0], cut[1]);
        (part.out.iter().map(round).collect(), part.lse.iter().map(|&x| x as f32).collect())
    };
    (cuts.windows(2).map(part).collect(), attend(0, keys))
}

fn largest(found: &[f32], expected: impl Iterator<Item = f64>) -> f64 {
    found.iter().zip(expected).fold(0.0, |most, (&x, y)| {
        let error = (x as f64 - y).abs();
        if error.is_nan() { f64::INFINITY } else { f64::max(most, error) }
    })
}

/// Roundings of o to the type: half a unit of its last place at the largest |o|, below 2.
fn rounding(element_type: ElementType) -> f64 {
    match element_type {
        ElementType::F32 => 0.5f64.powi(23),
        ElementType::F16 => 0.5f64.powi(11),
        _ => 0.5f64.powi(8),
    }
}

#[test]
fn merge_of_splits_is_attention_over_all_keys() {
    let many: Vec<usize> = (0..=50).collect();
    for element_type in TYPES {
        for dims in [[16, 12], [8, 1], [7, 5], [64, 128], [16, 256], [33, 255]] {
            for cuts in [&[0, 40][..], &[0, 13, 40], &[0, 1, 20, 20, 50], &many] {
                let (parts, all) = partials(element_type, dims, cuts);
                for context in [full(), webgpu()] {
                    let parts: Vec<_> = parts.iter().collect();
                    let (out, lse) = merged(context, element_type, dims[1], &parts);
                    let [of_out, of_lse] =
                        [largest(&out, all.out.iter().copied()), largest(&lse, all.lse.iter().copied())];
                    // One rounding of each part and one of the result, and a few of f32.
                    let bound = 2.0 * rounding(element_type) + 1e-6;
                    assert!(of_out <= bound, "{element_type} {dims:?} {cuts:?}: {of_out:e} > {bound:e}");
                    assert!(of_lse <= 1e-5, "{element_type} {dims:?} {cuts:?}: lse {of_lse:e}");
                }
            }
        }
    }
}

/// A sink joins once, when the parts are merged.
#[test]
fn sinks_join_in_the_merge() {
    for element_type in TYPES {
        let (parts, all) = partials(element_type, [16, 12], &[0, 13, 40]);
        let sinks = [0.75, 4.5];
        // Two batch entries of two heads with five queries.
        let problem = MergeProblem::new(2, 20, 12, element_type).with_sinks(2, 5);
        let (out, lse) = merge(full(), &problem, &parts.iter().collect::<Vec<_>>(), Some(&sinks));
        let with_sink = |row: usize| {
            let (lse, sink) = (all.lse[row], f64::from(sinks[row / 5 % 2]));
            lse.max(sink) + (-(lse - sink).abs()).exp().ln_1p()
        };
        let of_lse = largest(&lse, (0..20).map(with_sink));
        let expected = all.out.iter().enumerate().map(|(n, x)| x * (all.lse[n / 12] - with_sink(n / 12)).exp());
        let of_out = largest(&out, expected);
        assert!(
            of_out <= 2.0 * rounding(element_type) + 1e-6 && of_lse <= 1e-5,
            "{element_type}: {of_out:e} {of_lse:e}"
        );
    }
    let refused = full().plan_merge(&MergeProblem::new(2, 21, 12, ElementType::F32).with_sinks(2, 5)).unwrap_err();
    assert_eq!(refused, Error::MergeRows { rows: 21, heads: 2, queries: 5 });
}

#[test]
fn merge_is_associative_to_rounding() {
    for element_type in TYPES {
        let (parts, _) = partials(element_type, [16, 20], &[0, 9, 10, 31, 60]);
        let [a, b, c, d] = &parts[..] else { unreachable!() };
        let merge = |parts: &[&Partial]| merged(full(), element_type, 20, parts);
        let at_once = merge(&[a, b, c, d]);
        let one_by_one = merge(&[&merge(&[&merge(&[a, b]), c]), d]);
        let in_pairs = merge(&[&merge(&[d, c]), &merge(&[b, a])]);
        for other in [one_by_one, in_pairs] {
            let [out, lse] =
                [(&at_once.0, &other.0), (&at_once.1, &other.1)].map(|(x, y)| largest(x, y.iter().map(|&y| y as f64)));
            // Each step rounds once: at most three here, one there.
            assert!(out <= 4.0 * rounding(element_type) + 1e-6, "{element_type}: {out:e}");
            assert!(lse <= 1e-5, "{element_type}: lse {lse:e}");
        }
    }
}

#[test]
fn a_part_without_keys_adds_nothing() {
    const EMPTY: f32 = f32::NEG_INFINITY;
    for element_type in TYPES {
        // The second row has no keys anywhere, the third none in the first part. What o holds there does not matter.
        let a = (vec![1.0, -2.0, 0.5, f32::NAN, f32::NAN, f32::NAN, f32::NAN, 7.0, 7.0], vec![0.5, EMPTY, EMPTY]);
        let b = (vec![7.0, 7.0, f32::NAN, 3.0, 3.0, 3.0, 4.0, 5.0, -6.0], vec![EMPTY, EMPTY, -3e4]);
        for parts in [[&a, &b], [&b, &a]] {
            let (out, lse) = merged(full(), element_type, 3, &parts);
            assert_eq!(out, [1.0, -2.0, 0.5, 0.0, 0.0, 0.0, 4.0, 5.0, -6.0]);
            assert_eq!(lse, [0.5, EMPTY, -3e4]);
        }
        assert_eq!(merged(full(), element_type, 3, &[]), (vec![0.0; 9], vec![EMPTY; 3]));
        // A sink of -infinity is none, and one is all that a row without keys has.
        let problem = MergeProblem::new(2, 3, 3, element_type).with_sinks(3, 1);
        let (out, lse) = merge(full(), &problem, &[&a, &b], Some(&[EMPTY, 1.5, EMPTY]));
        assert_eq!(out, [1.0, -2.0, 0.5, 0.0, 0.0, 0.0, 4.0, 5.0, -6.0]);
        assert_eq!(lse, [0.5, 1.5, -3e4]);
    }
}

#[test]
fn lse_far_apart() {
    let a = (vec![1.0, 2.0], vec![1e4]);
    let b = (vec![-5.0, 3.0], vec![-1e4]);
    assert_eq!(merged(full(), ElementType::F32, 2, &[&a, &b]), a);
    assert_eq!(merged(full(), ElementType::F32, 2, &[&b, &a]), a);
}

#[test]
fn a_wrong_merge_is_refused() {
    let context = webgpu();
    let good = MergeProblem::new(2, 10, 8, ElementType::F32);
    let refused = |problem| context.plan_merge(&problem).unwrap_err();
    let error = refused(MergeProblem::new(2, 10, 0, ElementType::F32));
    assert_eq!(error, Error::HeadDim { argument: "head_dim_v", found: 0 });
    let error = refused(MergeProblem::new(2, u32::MAX, 8, ElementType::F32));
    assert!(matches!(error, Error::BindingTooLarge { argument: "part_out", .. }), "{error}");

    let plan = context.plan_merge(&good).unwrap();
    let buffer = |bytes: usize| context.upload(&vec![0; bytes]).unwrap();
    let (part_out, part_lse, out, lse) = (buffer(640), buffer(80), buffer(320), buffer(40));
    let merge =
        |buffers: MergeBuffers| plan.merge(&mut context.device().create_command_encoder(&Default::default()), &buffers);
    assert_eq!(merge(MergeBuffers::new([&part_out, &part_lse], [&out, &lse])), Ok(()));
    assert_eq!(
        merge(MergeBuffers::new([&out, &part_lse], [&part_out, &lse])),
        Err(Error::BufferTooSmall { argument: "part_out", needed: 640, found: 320 })
    );
    assert_eq!(
        merge(MergeBuffers::new([&part_out, &part_lse], [&part_out, &lse])),
        Err(Error::BufferAliased { output: "out", other: "part_out" })
    );
}
