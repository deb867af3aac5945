//! Random problems, layouts, types and tiles: each is computed as the oracle does.

use std::sync::OnceLock;

use flash_attention_testing::backward::{Ask, backward, fused};
use flash_attention_testing::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use wgpu_flash_attention::Causal::{BottomRight, TopLeft};
use wgpu_flash_attention::{Context, ElementType, Kernel, PlanOptions};

/// WebGPU's limits, but so few workgroups that nearly everything is split.
fn cramped() -> &'static Context {
    static CONTEXT: OnceLock<Context> = OnceLock::new();
    CONTEXT.get_or_init(|| with_limits(|limits| limits.max_compute_workgroups_per_dimension = 3))
}

#[derive(Clone, Debug)]
enum Order {
    Bhnd,
    Bnhd,
    Nbhd,
    Odd,
    Gaps,
    SharedKv,
    Packed,
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (0..4u32, 1..4u32, 1..4u32, 0..50u32, 0..70u32);
    // Two pairs of head dims, in whole vectors and not, since each is a module of its own to compile.
    let dims = prop::sample::select(vec![[8, 12], [5, 3]]);
    let order = prop::sample::select(vec![
        Order::Bhnd,
        Order::Bnhd,
        Order::Nbhd,
        Order::Odd,
        Order::Gaps,
        Order::SharedKv,
        Order::Packed,
    ]);
    let causal = prop::sample::select(vec![None, None, Some(BottomRight), Some(TopLeft)]);
    let side = || prop_oneof![2 => Just(-1), 1 => 0..70];
    let lengths = prop::option::weighted(0.3, prop::collection::vec(-5..80, 4));
    let scale = prop::option::weighted(0.3, -1.0..1.0f32);
    let softcap = prop::option::weighted(0.2, 0.1..10.0f32);
    let element_type = prop::sample::select(TYPES.to_vec());
    let masks = (causal, side(), side(), lengths);
    let scores = (scale, softcap, prop::bool::weighted(0.9));
    (sizes, dims, order, masks, scores, element_type).prop_map(
        |(
            (batch, heads_kv, group, seqlen_q, seqlen_k),
            dims,
            order,
            (causal, left, right, lengths),
            (scale, softcap, lse),
            element_type,
        )| {
            let seqlen_k = if matches!(order, Order::Packed) { seqlen_q } else { seqlen_k };
            let mut case = case(batch, [heads_kv * group, heads_kv], [seqlen_q, seqlen_k], dims);
            case = match order {
                Order::Bhnd => case,
                Order::Bnhd => case.bnhd(),
                Order::Nbhd => case.nbhd(),
                Order::Odd => case.odd(),
                Order::Gaps => case.gaps(),
                Order::SharedKv => case.shared_kv(),
                Order::Packed => case.packed(),
            };
            if let Some(lengths) = lengths {
                case = case.seqlens(&lengths[..batch as usize]);
            }
            case.problem.causal = causal;
            case.problem.scale = scale;
            case.problem.softcap = softcap;
            case.problem.lse = lse;
            case.window(left, right).element_type(element_type)
        },
    )
}

fn ways() -> impl Strategy<Value = PlanOptions> {
    prop::sample::select(vec![naive(), tile(), tiled(8, 16, (2, 4), 4, 8)])
}

fn run<Ways: std::fmt::Debug>(
    fewest: u32,
    strategy: impl Strategy<Value = (Case, Ways)>,
    check: impl Fn(&Case, &Ways) -> Result<(), String>,
) {
    // Most cases are a module of their own, which software Vulkan takes a second or more to compile. PROPTEST_CASES=1000, say,
    // tries more of them.
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|count| count.parse().ok());
    let cases = asked.unwrap_or(fewest);
    let config = Config { cases, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let result = runner.run(&strategy, |(case, options)| check(&case, &options).map_err(TestCaseError::fail));
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn any_problem() {
    run(100, (cases(), ways()), |case, options| case.prepare().check(webgpu(), options));
}

#[test]
fn any_problem_in_parts() {
    let tiles = prop::sample::select(vec![tile(), tiled(8, 16, (2, 4), 4, 8)]);
    run(30, (cases(), tiles), |case, options| case.prepare().check(cramped(), options));
}

#[test]
fn any_gradients() {
    let ways = prop::sample::select(vec![backward(Kernel::Naive), backward(Kernel::Tile)]);
    let asks = (any::<bool>(), any::<bool>()).prop_map(|(grad_lse, accumulate)| Ask { grad_lse, accumulate });
    run(60, (cases(), (ways, asks)), |case, (options, ask)| case.prepare_backward(*ask).check(webgpu(), options));
}

/// The same by the kernel that computes all gradients at once, in f32, in several rounds of blocks; with key lengths it binds
/// more buffers than every device has.
#[test]
fn any_gradients_at_once() {
    let options = fused([16, 16], 4, 8, 8, [32, 16]);
    let asks = (any::<bool>(), any::<bool>()).prop_map(|(grad_lse, accumulate)| Ask { grad_lse, accumulate });
    let cases = cases().prop_map(|case| case.element_type(ElementType::F32));
    run(40, (cases, asks), |case, ask| case.prepare_backward(*ask).check(full(), &options));
}
