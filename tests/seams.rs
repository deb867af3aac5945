//! The questions that kernels ask of `shaders/attention/`: features, and variants of attention that only tests plan, each of which is wrong
//! in a kernel that answers one of these questions by itself. Every kernel, form and type, forward and backward, whole and split.

use flash_attention_testing::backward::{self, Ask, backward, fused, in_small_bindings, two_kernels};
use flash_attention_testing::coop::{check_passes, context};
use flash_attention_testing::*;
use wgpu_flash_attention::Causal::{BottomRight, TopLeft};
use wgpu_flash_attention::{Alibi, Context, ElementType, Kernel, PlanOptions, Probe};

/// What a case is given.
type Feature = fn(Case) -> Case;

/// More queries and keys than a tile of any kernel has here, several heads a group, and every mask.
fn cases(feature: Feature) -> Vec<(String, Case)> {
    let both = || case(2, [4, 2], [110, 150], [16, 12]);
    let cases = [
        ("plain", both()),
        ("causal", both().causal(BottomRight)),
        ("top-left, one head for each", case(2, [3, 3], [150, 110], [12, 16]).causal(TopLeft)),
        ("window", both().window(70, 20)),
        ("lengths", both().seqlens(&[150, 77]).seqlens_q(&[61, 110]).causal(BottomRight)),
        ("softcap, scale below 0, odd strides", case(1, [4, 2], [111, 149], [7, 5]).odd().scale(-0.4).softcap(3.0)),
    ];
    cases.map(|(name, case)| (name.to_string(), feature(case))).into()
}

/// The cases in f32, and two of them in the other types: a type changes how elements are read and written.
fn cases_of(feature: Feature, element_type: ElementType) -> Vec<(String, Case)> {
    let all = cases(feature);
    if element_type == ElementType::F32 { all } else { vec![all[1].clone(), all[5].clone()] }
}

/// A device whose bindings are so small that the work of the cases in f32 is split between batch entries and heads. A bias of a group of
/// heads, which the backward pass does not split, has 132,000 bytes. The fused kernel with a feature's input has nine storage buffers.
fn narrow(feature: Feature, kib: u64) -> Context {
    let has_bias = cases(feature)[0].1.problem.bias.is_some();
    with_limits(|limits| {
        limits.max_storage_buffer_binding_size = (if has_bias { kib.max(140) } else { kib }) << 10;
        limits.max_storage_buffers_per_shader_stage = 10;
    })
}

fn check_forward(feature: Feature) {
    let (_, plain) = &cases(feature)[0];
    let small = tiled(8, 16, (2, 4), 4, 8);
    let (narrow, less_narrow) = (narrow(feature, 20), narrow(feature, 70));
    // Decoding has no dropout.
    let decodes = |options: &PlanOptions| options.kernel != Some(Kernel::Decode) || plain.problem.dropout.is_none();
    for (context, options) in [(&narrow, small), (&narrow, decode(2)), (&less_narrow, naive())] {
        if decodes(&options) {
            assert_split(&plain.problem, context, options);
        }
    }
    for element_type in TYPES {
        let mut ways = every_kernel(element_type, naive(), tile());
        ways.extend([("decode", full(), decode(1)), ("decode in 3 splits", full(), decode(3))]);
        ways.extend([("small tile", full(), small), ("small tile, split", &narrow, small)]);
        if element_type == ElementType::F32 {
            ways.extend([("naive, split", &less_narrow, naive()), ("decode, split", &narrow, decode(2))]);
        }
        ways.retain(|(_, _, options)| decodes(options));
        check_all(&cases::prepare(cases_of(feature, element_type), element_type), &ways);
    }
}

fn check_backward(feature: Feature) {
    let (_, plain) = &cases(feature)[0];
    let (narrow, less_narrow) = (narrow(feature, 20), narrow(feature, 280));
    let at_once = fused([32, 64], 8, 8, 16, [32, 64]);
    let split = [two_kernels(), at_once, backward(Kernel::Naive)].map(in_small_bindings);
    let [two_split, at_once_split, naive_split] = split;
    for (context, options) in [(&narrow, two_split), (&narrow, at_once_split), (&less_narrow, naive_split)] {
        assert_split(&plain.problem, context, options);
    }
    for element_type in TYPES {
        let mut ways = every_kernel(element_type, backward(Kernel::Naive), backward(Kernel::Tile));
        ways.extend([("two kernels", full(), two_kernels())]);
        if element_type == ElementType::F32 {
            ways.extend([("naive, split", &less_narrow, naive_split)]);
            ways.extend([("fused", full(), at_once), ("fused, split", &narrow, at_once_split)]);
            ways.extend([("two kernels, split", &narrow, two_split)]);
        }
        let ask = Ask { grad_lse: true, accumulate: false };
        backward::check_all(&backward::prepare(cases_of(feature, element_type), element_type, ask), &ways);
    }
}

/// On matrices, where the driver has them: both forms in f16, registers in f32 and bf16.
fn check_coop(feature: Feature) {
    let Some(context) = context() else { return };
    for element_type in TYPES {
        // In f32 the first four of the six: a processor takes long to compile these kernels.
        let cases = cases_of(feature, element_type).into_iter().take(4).collect();
        check_passes(&context, cases, element_type);
    }
}

macro_rules! seam {
    ($name:ident, $feature:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn forward() {
                check_forward($feature);
            }

            #[test]
            fn backward() {
                check_backward($feature);
            }

            #[test]
            fn coop() {
                check_coop($feature);
            }
        }
    };
}

// Scores with terms that differ by head and batch entry, and by the order of query and key.
seam!(position_and_head, |case| case.alibi(Alibi::PerBatchAndHead));
// A term of each score's own, from a buffer that is cut as queries are.
seam!(bias, |case| {
    let s = case.problem.shape;
    case.bias([s.batch, s.heads_q, s.seqlen_q, s.seqlen_k])
});
// Whether a score counts, of all batch entries and heads.
seam!(mask, |case| {
    let s = case.problem.shape;
    case.mask([1, 1, s.seqlen_q, s.seqlen_k])
});
// Rows in another order than that of their numbers.
seam!(rows, |case| case.probe(Probe::Rows));
// A board of squares, full ones, partial ones and empty ones, that differs by head.
seam!(tiles, |case| case.probe(Probe::Tiles));
// Probabilities that are dropped, by their batch entry, head, query and key.
seam!(dropout, |case| case.dropout(0.3));
// A sink in each row's denominator.
seam!(end_of_a_row, |case| case.sinks());
