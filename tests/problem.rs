//! Problems as plain data: what they are equal to, and that the order of calls does not matter.

use std::collections::{HashMap, HashSet};

use wgpu_flash_attention::{
    Alibi, Bias, Causal, ElementType, Error, Layout, Problem, ScoreLayout, Shape, Tensor, alibi_slopes,
};

const TENSORS: [Tensor; 8] = [
    Tensor::Query,
    Tensor::Key,
    Tensor::Value,
    Tensor::Out,
    Tensor::GradOut,
    Tensor::GradQuery,
    Tensor::GradKey,
    Tensor::GradValue,
];

fn problem() -> Problem {
    Problem::new(Shape { heads_kv: 2, seqlen_k: 9, head_dim_v: 4, ..Shape::square(2, 4, 6, 8) }, ElementType::F32)
}

fn layouts(problem: &Problem) -> [Layout; 8] {
    TENSORS.map(|tensor| problem.layout(tensor))
}

/// Each method in each place among the others gives the same problem, with the same layouts.
#[test]
fn the_order_of_calls_does_not_matter() {
    type Step = fn(Problem) -> Problem;
    let steps: [Step; 6] = [
        |p| p.bnhd(),
        |p| p.with_gradients(),
        |p| p.with_grad_lse(),
        |p| p.accumulate(),
        |p| p.with_layout(Tensor::Key, Layout { offset: 3, batch: 500, head: 50, row: 8 }),
        |p| p.with_layout(Tensor::GradQuery, Layout { offset: 0, batch: 900, head: 90, row: 9 }),
    ];
    let forward = steps.iter().fold(problem(), |p, step| step(p));
    let backward = steps.iter().rev().fold(problem(), |p, step| step(p));
    assert_eq!(forward, backward);
    for first in 0..steps.len() {
        for second in 0..steps.len() {
            let rest = (0..steps.len()).filter(|n| ![first, second].contains(n));
            let order: Vec<_> = [second, first].into_iter().chain(rest).chain([first]).collect();
            let found = order.iter().fold(problem(), |p, &n| steps[n](p));
            assert_eq!(found, forward, "{order:?}");
            assert_eq!(layouts(&found), layouts(&forward), "{order:?}");
        }
    }
    let gradients = forward.gradients.unwrap();
    assert!(gradients.lse && gradients.accumulate && forward.lse);
}

#[test]
fn a_gradient_lies_as_its_tensor_does_unless_it_is_placed() {
    let placed = Layout { offset: 3, batch: 500, head: 50, row: 8 };
    let problem = problem().with_gradients().with_layout(Tensor::Key, placed).bnhd();
    assert_eq!(problem.layout(Tensor::Key), placed);
    assert_eq!(problem.layout(Tensor::GradKey), placed);
    assert_eq!(problem.layout(Tensor::GradQuery), Layout::bnhd(4, 6, 8));
    assert_eq!(problem.layout(Tensor::GradOut), Layout::bnhd(4, 6, 4));
    let contiguous = Layout::bhnd(2, 9, 8);
    let problem = problem.with_layout(Tensor::GradKey, contiguous);
    assert_eq!((problem.layout(Tensor::Key), problem.layout(Tensor::GradKey)), (placed, contiguous));
}

/// A shape that is changed after the fact leaves no layout of the old one behind.
#[test]
fn layouts_follow_the_shape() {
    let mut changed = problem().bnhd();
    changed.shape.seqlen_k = 100;
    let made = Problem::new(changed.shape, ElementType::F32).bnhd();
    assert_eq!(layouts(&changed), layouts(&made));
    assert_eq!(changed, made);
}

#[test]
fn problems_are_keys_of_a_map() {
    let mut plans = HashMap::new();
    let bias = Bias::new(ElementType::F32, ScoreLayout::contiguous([2, 4, 6, 9]));
    let all = [
        problem(),
        problem().causal(Causal::TopLeft),
        problem().causal(Causal::BottomRight),
        problem().scale(0.0),
        problem().scale(-0.0),
        problem().softcap(0.0),
        problem().scale(f32::NAN),
        problem().scale(1.0),
        problem().window(Some(1), None),
        problem().window(None, Some(1)),
        problem().with_lse(),
        problem().with_seqlens_k(),
        problem().with_gradients(),
        problem().with_grad_lse(),
        problem().accumulate(),
        problem().with_bias(bias),
        problem().with_bias(Bias::new(ElementType::F16, bias.layout)),
        problem().with_bias(Bias::new(ElementType::F32, bias.layout.at(1))),
        problem().with_bias(bias).with_grad_bias(),
        problem().with_mask(bias.layout),
        problem().with_alibi(Alibi::PerHead),
        problem().with_alibi(Alibi::PerBatchAndHead),
        problem().with_alibi(Alibi::PerHead).with_grad_alibi_slopes(),
        problem().with_sinks(),
        problem().with_dropout(0.0),
        problem().with_dropout(0.1),
        problem().with_sinks().with_grad_sinks(),
        problem().bnhd(),
        problem().with_layout(Tensor::Query, Layout::bhnd(4, 6, 8).at(1)),
        problem().with_layout(Tensor::GradQuery, Layout::bhnd(4, 6, 8).at(1)),
        Problem::new(problem().shape, ElementType::F16),
    ];
    for (n, problem) in all.iter().enumerate() {
        assert_eq!(plans.insert(problem.clone(), n), None, "{problem:?}");
    }
    for (n, problem) in all.iter().enumerate() {
        assert_eq!(plans.get(&problem.clone()), Some(&n));
    }
    // NaN too: a key that is not equal to itself could never be found again.
    assert_eq!(all.iter().cloned().collect::<HashSet<_>>().len(), all.len());
}

/// Sizes that no plan takes have words for them, not a panic of the arithmetic, however they are asked about.
#[test]
fn shapes_that_no_plan_takes_can_be_asked_about() {
    let no_heads = Shape { heads_kv: 0, ..Shape::square(1, 4, 6, 8) };
    assert_eq!(no_heads.group(), 0);
    let max = u32::MAX;
    let huge =
        Shape { batch: max, heads_q: max, heads_kv: 1, seqlen_q: max, seqlen_k: max, head_dim: max, head_dim_v: max };
    assert_eq!(huge.rows(), u64::MAX);
    for shape in [no_heads, huge, Shape { heads_q: 0, ..no_heads }, Shape { batch: 0, ..huge }] {
        let problem = Problem::new(shape, ElementType::F32).bnhd().with_grad_lse();
        assert!(problem.forward_flops() >= 0.0 && problem.backward_flops().is_finite());
        let _ = (problem.key_interval(max, max), problem.effective_scale(), layouts(&problem));
        assert!(problem.validate().is_err());
    }
}

/// The slopes of the paper for 8 heads, and of its code for 12, of which the last four are those of 16 heads at odd places.
#[test]
fn slopes_of_alibi() {
    assert_eq!(alibi_slopes(0), []);
    assert_eq!(alibi_slopes(1), [1.0 / 256.0]);
    assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
    let of_12 = [&alibi_slopes(8)[..], &[0.70710677, 0.35355338, 0.17677669, 0.088388346]].concat();
    assert_eq!(alibi_slopes(12), of_12);
}

#[test]
fn what_is_wrong_with_what_scores_are_given() {
    let layout = ScoreLayout::contiguous([2, 4, 6, 9]);
    let strides = |layout: ScoreLayout| ScoreLayout { sizes: None, ..layout };
    assert_eq!(strides(layout), ScoreLayout::strided(0, [216, 54, 9, 1]));
    assert_eq!(strides(ScoreLayout::contiguous([2, 1, 6, 1])), ScoreLayout::strided(0, [6, 0, 1, 0]));
    let bias = |layout| problem().with_bias(Bias::new(ElementType::F32, layout));
    for (problem, expected, named) in [
        (problem().with_grad_bias(), Error::GradientOfNothing { argument: "bias" }, "no bias"),
        (problem().with_grad_sinks(), Error::GradientOfNothing { argument: "sinks" }, "no sinks"),
        (problem().with_grad_alibi_slopes(), Error::GradientOfNothing { argument: "alibi_slopes" }, "no alibi_slopes"),
        (
            problem().with_bias(Bias::new(ElementType::F16, layout)),
            Error::BiasType { found: ElementType::F16, problem: ElementType::F32 },
            "must be f32",
        ),
        (bias(ScoreLayout { batch: u64::MAX, ..layout }), Error::LayoutOverflow { argument: "bias" }, "bias"),
        (
            bias(ScoreLayout::contiguous([1, 4, 9, 6])),
            Error::ScoreSizes { argument: "bias", found: [1, 4, 9, 6], needed: [2, 4, 6, 9] },
            "each must be 1 or",
        ),
        (
            problem().with_mask(ScoreLayout::contiguous([3, 1, 1, 9])),
            Error::ScoreSizes { argument: "mask", found: [3, 1, 1, 9], needed: [2, 4, 6, 9] },
            "mask",
        ),
        (bias(layout.at(u64::MAX)), Error::LayoutOverflow { argument: "bias" }, "bias"),
        (
            problem().with_mask(ScoreLayout { column: u64::MAX / 4, ..layout }),
            Error::LayoutOverflow { argument: "mask" },
            "mask",
        ),
        (
            bias(ScoreLayout { row: 8, ..layout }).with_grad_bias(),
            Error::OutputOverlap { argument: "grad_bias" },
            "grad_bias",
        ),
        (
            bias(ScoreLayout { head: 53, ..layout }).with_grad_bias(),
            Error::OutputOverlap { argument: "grad_bias" },
            "grad_bias",
        ),
    ] {
        let error = problem.validate().unwrap_err();
        assert_eq!(error, expected);
        assert!(error.to_string().contains(named), "{error}");
    }
    // Inputs may overlap themselves, and a gradient is one where its bias broadcasts.
    bias(ScoreLayout { row: 8, ..layout }).validate().unwrap();
    bias(ScoreLayout { head: 0, ..layout }).with_grad_bias().validate().unwrap();
}
