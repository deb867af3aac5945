//! Numbers far from 1: what no query sees, scores and values near the ends of what kernels take, scales at their edges. Each is
//! computed forward, and from that backward, by every kernel that takes it, and compared with f64 row by row, so that a huge
//! row does not hide what it does to the others. Kernels on cooperative matrices need `scripts/vulkan --coop cargo test`.

use flash_attention_testing::backward::backward;
use flash_attention_testing::coop::{in_forms, is_software};
use flash_attention_testing::{TYPES, coop, from_bits, full, to_bits};
use wgpu_flash_attention::Causal::{BottomRight, TopLeft};
use wgpu_flash_attention::ElementType::{self, BF16, F16, F32};
use wgpu_flash_attention::tune::{CoopBackwardTile, CoopTile};
use wgpu_flash_attention::wgpu::Buffer;
use wgpu_flash_attention::{
    BackwardBuffers, Bias, Context, ForwardBuffers, Kernel, PlanOptions, Problem, ScoreLayout, Shape, reference,
};

/// A problem with gradients, q, k, v and do, as its type holds them, and the bias of each key.
#[derive(Clone)]
struct Case {
    problem: Problem,
    inputs: [Vec<f32>; 4],
    bias: Option<Vec<f32>>,
}

/// SplitMix64. The bounds here were found with its numbers, and depend on them: errors are relative to a row of a gradient, which
/// may be a difference of nearly equal numbers. With other numbers a bound for such rows is to be derived first.
struct Rng(u64);

impl Rng {
    /// From 0 to below 1.
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    }
}

/// o, lse, dq, dk and dv, contiguous.
type Results = [Vec<f64>; 5];

const NAMES: [&str; 5] = ["o", "lse", "dq", "dk", "dv"];

impl Case {
    /// One batch entry and head; q, k, v and do are between −1 and 1.
    fn random(element_type: ElementType, [rows, keys]: [u32; 2], dim: u32) -> Case {
        let shape = Shape { seqlen_k: keys, ..Shape::square(1, 1, rows, dim) };
        let mut rng = Rng(0x5eed);
        let mut tensor = |rows: u32| (0..rows * dim).map(|_| 2.0 * rng.unit() - 1.0).collect::<Vec<f32>>();
        let inputs = [tensor(rows), tensor(keys), tensor(keys), tensor(rows)];
        Case { problem: Problem::new(shape, element_type).with_gradients(), inputs, bias: None }.rounded()
    }

    /// Multiplies a row of a tensor (0 q, 1 k, 2 v, 3 do).
    fn times(mut self, tensor: usize, row: usize, factor: f32) -> Case {
        let dim = self.problem.shape.head_dim as usize;
        self.inputs[tensor][row * dim..][..dim].iter_mut().for_each(|x| *x *= factor);
        self.rounded()
    }

    /// Puts one number everywhere in a tensor.
    fn all(mut self, tensor: usize, x: f32) -> Case {
        self.inputs[tensor].fill(x);
        self.rounded()
    }

    /// A bias that masks a key of all queries, and is 0 elsewhere.
    fn bias_masks(mut self, key: usize) -> Case {
        let keys = self.problem.shape.seqlen_k;
        let mut bias = vec![0.0; keys as usize];
        bias[key] = f32::NEG_INFINITY;
        self.problem = self.problem.with_bias(Bias::new(F32, ScoreLayout::contiguous([1, 1, 1, keys])));
        self.bias = Some(bias);
        self
    }

    fn problem(mut self, change: impl FnOnce(Problem) -> Problem) -> Case {
        self.problem = change(self.problem);
        self
    }

    fn rounded(mut self) -> Case {
        let ty = self.problem.element_type;
        self.inputs.iter_mut().flatten().for_each(|x| *x = from_bits(ty, to_bits(ty, *x)));
        self
    }

    fn expected(&self) -> Results {
        let [q, k, v, grad] = &self.inputs;
        let extras = reference::Extras::default().bias(self.bias.as_deref());
        let forward = reference::forward(&self.problem, q, k, v, extras);
        let backward = reference::backward(&self.problem, [q, k, v, grad], None, extras);
        [forward.out, forward.lse, backward.query, backward.key, backward.value]
    }

    /// The forward pass, and from its o and lse the backward pass.
    fn found(&self, context: &Context, options: &PlanOptions) -> Results {
        let plan = context.plan_with(&self.problem, options).unwrap();
        let ty = self.problem.element_type;
        let upload = |numbers: &[f32]| {
            let bytes =
                numbers.iter().flat_map(|&x| to_bits(ty, x).to_le_bytes().into_iter().take(ty.bytes() as usize));
            context.upload(&bytes.collect::<Vec<u8>>()).unwrap()
        };
        let [q, k, v, grad] = &self.inputs;
        let [query, key, value, grad_out] = self.inputs.each_ref().map(|x| upload(x));
        let [out, grad_query, grad_key, grad_value] =
            [v.len() / k.len() * q.len(), q.len(), k.len(), v.len()].map(|n| upload(&vec![f32::NAN; n]));
        assert_eq!(grad.len(), q.len());
        let lse = context.upload(&vec![0xff; 4 * self.problem.shape.rows() as usize]).unwrap();
        let words = |bytes: u64| (bytes > 0).then(|| context.upload(&vec![0xff; bytes as usize]).unwrap());
        let (workspace, backward_workspace) = (words(plan.workspace_bytes()), words(plan.backward_workspace_bytes()));
        let bias = self.bias.as_ref().map(|bias| context.upload(bytemuck::cast_slice(bias)).unwrap());
        let mut encoder = context.device().create_command_encoder(&Default::default());
        let buffers = ForwardBuffers::new(&query, &key, &value, &out).lse(&lse).workspace(workspace.as_ref());
        let buffers = buffers.bias(bias.as_ref());
        plan.forward(&mut encoder, &buffers).unwrap();
        let gradients = [&grad_query, &grad_key, &grad_value];
        let buffers = BackwardBuffers::new(&buffers, &grad_out, gradients).workspace(backward_workspace.as_ref());
        plan.backward(&mut encoder, &buffers).unwrap();
        context.queue().submit([encoder.finish()]);
        let numbers = |buffer: &Buffer, ty: ElementType| -> Vec<f64> {
            let bytes = context.download(buffer, 0, buffer.size()).unwrap();
            let of = |word: &[u8]| word.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
            bytes.chunks(ty.bytes() as usize).map(|word| from_bits(ty, of(word)).into()).collect()
        };
        let [o, dq, dk, dv] = [&out, &grad_query, &grad_key, &grad_value].map(|buffer| numbers(buffer, ty));
        [o, numbers(&lse, F32), dq, dk, dv]
    }

    /// The largest error of a row, relative to the norm of that row; of lse relative to 1 or itself.
    fn errors(&self, found: &Results, expected: &Results) -> [f64; 5] {
        let dim = self.problem.shape.head_dim as usize;
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        [0, 1, 2, 3, 4].map(|n| {
            let rows =
                found[n].chunks(if n == 1 { 1 } else { dim }).zip(expected[n].chunks(if n == 1 { 1 } else { dim }));
            let of_row = |(found, expected): (&[f64], &[f64])| {
                if found == expected {
                    return 0.0;
                }
                let size = norm(&mut expected.iter().copied());
                let error = norm(&mut found.iter().zip(expected).map(|(x, e)| x - e));
                // A row that is to be 0 has nothing to be relative to.
                error
                    / if n == 1 {
                        size.max(1.0)
                    } else if size == 0.0 {
                        1.0
                    } else {
                        size
                    }
            };
            // NaN stays, whatever follows it.
            rows.map(of_row).fold(0.0, |most: f64, error| if most.is_nan() || error <= most { most } else { error })
        })
    }
}

/// A kernel, its device, and how it is asked for.
type Way = (&'static str, &'static Context, PlanOptions);

/// Every kernel that takes a type: for both passes, or decode and then tile.
fn ways(element_type: ElementType) -> Vec<Way> {
    let with = |kernel, backward_kernel| backward(backward_kernel).kernel(kernel);
    let mut ways = vec![
        ("naive", full(), with(Kernel::Naive, Kernel::Naive)),
        ("tile", full(), with(Kernel::Tile, Kernel::Tile)),
        ("decode, tile", full(), with(Kernel::Decode, Kernel::Tile)),
    ];
    if let Some(context) = coop::context() {
        let context: &'static Context = Box::leak(Box::new(context));
        let mut options = with(Kernel::Coop, Kernel::Coop);
        if is_software(context) {
            // A processor takes its time to compile the table's.
            options.coop_tile = Some(CoopTile::new(4, 1, 8, 1));
            let tile = CoopBackwardTile { subgroups: 4, matrices: 1, step: 8, columns: 256, ahead: true };
            options.coop_backward_tiles = Some([tile; 2]);
        }
        ways.extend(in_forms(element_type, &[("coop", context, options)]));
        if element_type == BF16 && coop::has_bf16(context) {
            ways.push(("coop, scaled", context, options.scaled_bf16(true)));
        }
        if element_type == F32 {
            // Several matrices of rows, keys and steps.
            options.coop_tile = Some(CoopTile::new(2, 2, 16, 1));
            let tile = CoopBackwardTile { subgroups: 4, matrices: 2, step: 16, columns: 256, ahead: false };
            options.coop_backward_tiles = Some([tile; 2]);
            ways.push(("coop, larger tile", context, options));
        }
    }
    ways
}

/// Runs each case in each way; `bounds` of o, lse, dq, dk and dv say what the way may be off by.
fn check(cases: &[(String, Case)], bounds: impl Fn(&str, &Case) -> [f64; 5]) {
    check_some(cases, |_| true, bounds);
}

/// The same in the ways that are `taken`.
fn check_some(cases: &[(String, Case)], taken: impl Fn(&str) -> bool, bounds: impl Fn(&str, &Case) -> [f64; 5]) {
    let mut failed = vec![];
    let has = |ty| cases.iter().any(|(_, case)| case.problem.element_type == ty);
    let ways = TYPES.map(|ty| if has(ty) { ways(ty) } else { vec![] });
    for (name, case) in cases {
        let ty = case.problem.element_type;
        let expected = case.expected();
        for (way, context, options) in
            ways[TYPES.iter().position(|&x| x == ty).unwrap()].iter().filter(|(way, ..)| taken(way))
        {
            let errors = case.errors(&case.found(context, options), &expected);
            println!(
                "{name}, {ty}, {way}: {}",
                NAMES.iter().zip(errors).map(|(n, e)| format!("{n} {e:.1e}")).collect::<Vec<_>>().join(", ")
            );
            for ((name_of, error), bound) in NAMES.iter().zip(errors).zip(bounds(way, case)) {
                // Written so that NaN does not pass.
                if !matches!(error.partial_cmp(&bound), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
                    failed.push(format!("{name}, {ty}, {way}: {name_of} is off by {error:e} > {bound:e}"));
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} failed\n{}", failed.len(), failed.join("\n"));
}

/// Keys, values, queries and their gradients that are huge beside others change only what depends on them.
#[test]
fn huge_rows_leave_others_alone() {
    let mut cases = vec![];
    for ty in [F32, BF16] {
        let never = || Case::random(ty, [37, 70], 16).problem(|problem| problem.causal(TopLeft));
        let later = || Case::random(ty, [44, 44], 16).problem(|problem| problem.causal(BottomRight));
        for huge in [1e4, 1e6, 1e8, 1e10, 1e20, 1e30, 1e38] {
            cases.push((format!("a key of {huge:e} that no query sees"), never().times(1, 38, huge)));
            cases.push((format!("a value of {huge:e} that no query sees"), never().times(2, 38, huge)));
        }
        // Queries of 0, so that the key's scores are none that f32 rounds by more than 1.
        let zeros = (20..44).fold(later(), |case, row| case.times(0, row, 0.0));
        cases.push(("a key of 1e10 that later queries see".into(), zeros.times(1, 20, 1e10)));
        cases.push(("a value of 1e10 that later queries see".into(), later().times(2, 20, 1e10)));
        // The query's scores are 0.
        cases.push(("a query of 1e10".into(), later().times(0, 20, 1e10).all(1, 0.0)));
        cases.push(("a gradient of 1e-10".into(), later().times(3, 20, 1e-10)));
    }
    let bounds = |_: &str, case: &Case| match case.problem.element_type {
        F32 => [2e-6, 2e-6, 1e-5, 1e-5, 1e-5],
        _ => [1e-2, 1e-2, 2e-2, 2e-2, 2e-2],
    };
    check(&cases, bounds);
    // Of a huge gradient of o, dk is a multiple of one query. Its factors p (dp - delta) are differences of nearly equal numbers, and delta = do · o is as
    // uncertain as o. In bf16 o is rounded, and so are the probabilities that it is made of, each by 2^-9 at most.
    for ty in [F32, BF16] {
        let row = 20;
        let later = Case::random(ty, [44, 44], 16).problem(|problem| problem.causal(BottomRight));
        let case = later.times(3, row, 1e10);
        let of_row = |x: &[f32], row: usize| x[row * 16..][..16].iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let (grad, out) = (of_row(&case.inputs[3], row), case.expected()[0][row * 16..][..16].to_vec());
        let delta = product(&grad, &out);
        let differences = (0..=row).map(|j| (product(&grad, &of_row(&case.inputs[2], j)) - delta).abs());
        let least = differences.fold(f64::INFINITY, f64::min);
        let size = (product(&grad, &grad) * product(&out, &out)).sqrt();
        let of_key = 2.0 * 2f64.powi(-9) * size / least;
        assert!(of_key < 0.25, "{of_key} says little");
        check(&[("a gradient of 1e10".into(), case)], |way, case| {
            let mut bounds = bounds(way, case);
            if ty == BF16 {
                bounds[3] = of_key;
            }
            bounds
        });
    }
}

/// A value whose product with the gradient of o is infinite in f32 changes nothing where a mask or a bias of -infinity excludes its key.
#[test]
fn infinite_products_that_do_not_count() {
    let mut cases = vec![];
    for ty in [F32, BF16] {
        let case = || {
            let mut case = Case::random(ty, [37, 70], 16).all(3, 1.0);
            case.inputs[2][38 * 16..][..16].fill(3e38);
            case.rounded()
        };
        cases.push((
            "a value of 3e38 that a causal mask excludes".into(),
            case().problem(|problem| problem.causal(TopLeft)),
        ));
        cases.push(("a value of 3e38 that a bias excludes".into(), case().bias_masks(38)));
    }
    check(&cases, |_, case| match case.problem.element_type {
        F32 => [2e-6, 2e-6, 1e-5, 1e-5, 1e-5],
        _ => [1e-2, 1e-2, 2e-2, 2e-2, 2e-2],
    });
}

/// No bound, but neither infinity nor NaN passes.
const FINITE: f64 = f64::MAX;

/// All scores are this or a little more or less, and exact in f32.
fn equal_scores(element_type: ElementType, score: f32) -> Case {
    let x = (score.abs() / 4.0).sqrt().round();
    let case = Case::random(element_type, [19, 45], 16);
    case.all(0, x).all(1, if score < 0.0 { -x } else { x })
}

/// q and k as large as f16 has them: nothing is infinite, and the softmax is right but on cooperative matrices, whose range of scores
/// ends before.
#[test]
fn the_largest_f16() {
    let most = 65504.0;
    let all = Case::random(F16, [37, 70], 16).all(0, most).all(1, most);
    let mut signs = Case::random(F16, [37, 70], 16);
    // Less than the most, so that sums are exact in f32 and equal scores stay equal.
    signs.inputs[..2].iter_mut().flatten().for_each(|x| *x = 61440.0f32.copysign(*x));
    let cases = [
        ("all 65504", all.clone()),
        ("all 65504, negative scores", all.clone().problem(|problem| problem.scale(-0.25))),
        ("all 65504, scores of 4e13", all.clone().problem(|problem| problem.scale(582.0))),
        ("all 65504, scores of -4e13", all.problem(|problem| problem.scale(-582.0))),
        ("61440 of either sign", signs.clone()),
        ("61440 of either sign, causal", signs.problem(|problem| problem.causal(BottomRight))),
    ];
    let cases = cases.map(|(name, case)| (name.to_string(), case));
    check(&cases, |way, _| match way.starts_with("coop") {
        true => [FINITE; 5],
        false => [1e-3, 1e-6, FINITE, FINITE, FINITE],
    });
    let ends = [1e7, -1e7].map(|score| (format!("equal scores of {score:e}"), equal_scores(F16, score)));
    check(&ends, |_, _| [1e-3, 1e-6, FINITE, FINITE, FINITE]);
}

/// The backward pass has lse as the forward pass rounded it: probabilities are off by |lse| · 2^-24, in the kernels on cooperative
/// matrices, whose lse is rounded in base 2 too, by twice that. Of q's gradient, a difference of nearly equal numbers here, this
/// says nothing.
#[test]
fn gradients_lose_what_lse_loses() {
    let mut cases = vec![];
    for ty in [F32, F16] {
        for score in [900.0, -900.0, 1e3, 1e4, 1e5] {
            cases.push((format!("equal scores of {score:e}"), equal_scores(ty, score)));
        }
    }
    check(&cases, |way, case| {
        let largest = case.expected()[1].iter().fold(0.0, |most, lse| f64::max(most, lse.abs()));
        let lost = largest * 2f64.powi(if way.starts_with("coop") { -23 } else { -24 });
        match case.problem.element_type {
            F32 => [2e-6, 1e-6, FINITE, 1e-5 + lost, 1e-5 + lost],
            // o as rounded to f16 is in the gradients of k.
            _ => [1e-3, 1e-6, FINITE, 1e-2 + lost, 1e-3 + lost],
        }
    });
}

/// With one key, probabilities are 1. The naive kernel, with which others are compared, computes scores in both passes alike.
#[test]
fn one_key_of_large_scores() {
    let case = Case::random(F32, [19, 1], 16).problem(|problem| problem.scale(300.0));
    check(&[("one key".to_string(), case)], |way, case| {
        let largest = case.expected()[1].iter().fold(0.0, |most, lse| f64::max(most, lse.abs()));
        let lost = if way == "naive" { 0.0 } else { largest * 2f64.powi(-22) };
        [1e-6, 1e-6, FINITE, FINITE, 1e-6 + lost]
    });
}

/// Scales down to 0 and up to the largest, with products of q and k that make scores of some size or none.
#[test]
fn scales_at_their_edges() {
    let mut cases = vec![];
    for ty in [F32, BF16] {
        for (scale, q, k) in [
            (0.0, 1.0, 1.0),
            (1e-37, 1e18, 1e18),
            (1e-31, 1.0, 1e31),
            (-1e-31, 1e31, 1.0),
            (1e-32, 1e16, 1e16),
            (5e-31, 1e15, 1e15),
            (1e-29, 1e15, 1e14),
            (1e-27, 1e14, 1e13),
            (1e-24, 1e12, 1e12),
            (1e30, 1e-15, 1e-15),
            (-1e30, 1e-6, 1e-24),
        ] {
            let mut case = Case::random(ty, [37, 70], 16).problem(|problem| problem.scale(scale));
            case.inputs[0].iter_mut().for_each(|x| *x *= q);
            case.inputs[1].iter_mut().for_each(|x| *x *= k);
            cases.push((format!("scale {scale:e}, q times {q:e}, k times {k:e}"), case.rounded()));
        }
    }
    cases.push(("scale 0".into(), Case::random(F16, [37, 70], 16).problem(|problem| problem.scale(0.0))));
    check(&cases, |_, case| match case.problem.element_type {
        F32 => [2e-6, 2e-6, 1e-5, 1e-5, 1e-5],
        _ => [1e-2, 1e-2, 2e-2, 2e-2, 2e-2],
    });
}

#[test]
fn softcaps_at_their_edges() {
    let mut cases = vec![];
    for ty in [F32, BF16] {
        for softcap in [1e-30, 1e30] {
            let case = Case::random(ty, [37, 70], 16).problem(|problem| problem.softcap(softcap));
            cases.push((format!("softcap {softcap:e}"), case));
        }
    }
    check(&cases, |_, case| match case.problem.element_type {
        F32 => [2e-6, 2e-6, 1e-5, 1e-5, 1e-5],
        _ => [1e-2, 1e-2, 2e-2, 2e-2, 2e-2],
    });
}

/// As large as docs/kernels/numbers.md says that scores and values may be.
#[test]
fn scores_and_values_at_the_ends_of_their_ranges() {
    let bounds = |_: &str, _: &Case| [2e-6, 1e-6, FINITE, FINITE, FINITE];
    let cases =
        |score: f32| [score, -score].map(|score| (format!("equal scores of {score:e}"), equal_scores(F32, score)));
    check(&cases(4e13), bounds);
    // With a scale of 1/4, and with one of 1.
    let largest = cases(1.25e37).into_iter().flat_map(|(name, case)| {
        let of_one = case.clone().problem(|problem| problem.scale(1.0));
        [(name.clone(), case), (name + " times 4", of_one)]
    });
    check_some(&largest.collect::<Vec<_>>(), |way| !way.starts_with("coop"), bounds);
    let values = |of: f32| {
        let case = Case::random(F32, [5, 100], 16).all(0, 1.0).all(1, 1.0).all(2, of);
        [(format!("values of {of:e}, 100 equal keys"), case)]
    };
    let bounds = |_: &str, _: &Case| [2e-6, 1e-6, FINITE, FINITE, 1e-5];
    check(&values(1e33), bounds);
    check_some(&values(1e36), |way| !way.starts_with("coop"), bounds);
    check_some(&values(1e37), |way| way == "naive", bounds);
}

/// What a row does to itself in two parts of f16: elements below 2^-16 of the row's largest lose up to 2^-39 of that one. Those
/// above lose nothing.
#[test]
fn a_column_of_huge_values() {
    let mut case = Case::random(F32, [37, 70], 16);
    case.inputs[2].chunks_mut(16).for_each(|row| row[7] *= 1e10);
    let expected = case.expected();
    for (way, context, options) in ways(F32) {
        let found = case.found(context, &options);
        let others = found[0].iter().zip(&expected[0]).enumerate().filter(|(n, _)| n % 16 != 7);
        let error = others.map(|(_, (x, e))| (x - e).abs()).fold(0.0, f64::max);
        println!("{way}: {error:e}");
        let bound = if way.starts_with("coop") { 1e10 * 2f64.powi(-39) } else { 1e-6 };
        assert!(error <= bound, "{way}: {error:e} > {bound:e}");
    }
    let mut case = Case::random(F32, [37, 70], 16);
    for (tensor, factor) in [(0, 1.0 / 6e4), (1, 6e4)] {
        case.inputs[tensor].chunks_mut(16).for_each(|row| row[7] *= factor);
    }
    check(&[("a column of k times 6e4, of q over 6e4".into(), case)], |_, _| [2e-6, 2e-6, 5e-5, 1e-5, 1e-5]);
}

/// With gradients, plans for few queries of f32 take kernels that recompute each score as it was computed.
#[test]
fn probabilities_are_recomputed_as_they_were() {
    for keys in [12, 300] {
        // The deviation of the scores is 20.
        let case = Case::random(F32, [2, keys], 64).problem(|problem| problem.scale(7.5));
        let plan = full().plan(&case.problem).unwrap();
        let both = if keys == 12 { Kernel::Naive } else { Kernel::Tile };
        assert_eq!((plan.kernel(), plan.backward_kernel()), (both, Some(both)), "{keys} keys");
        let (found, expected) = (case.found(full(), &PlanOptions::default()), case.expected());
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error =
            norm(&mut found[4].iter().zip(&expected[4]).map(|(x, e)| x - e)) / norm(&mut expected[4].iter().copied());
        assert!(error <= 5e-6, "{keys} keys: dv is off by {error:e}");
    }
    // Without gradients, and in 16 bits, where the difference does not show, decode is taken.
    let few = |ty| Case::random(ty, [2, 300], 64).problem;
    assert_eq!(full().plan(&few(F16)).unwrap().kernel(), Kernel::Decode);
    let mut forward = few(F32);
    forward.gradients = None;
    assert_eq!(full().plan(&forward).unwrap().kernel(), Kernel::Decode);
}
