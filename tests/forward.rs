//! The forward pass by cases: each line is computed by every kernel, in every element type, and compared with the oracle.

use flash_attention_testing::cases::{self, cases_of_features, dims_of, many_inputs_of, plain_cases, prepare};
use flash_attention_testing::*;
use wgpu_flash_attention::Causal::BottomRight;
use wgpu_flash_attention::{Context, ElementType, Error, Layout, PlanOptions, Problem, Shape, Tensor};

fn ways(element_type: ElementType) -> Vec<(&'static str, &'static Context, PlanOptions)> {
    every_kernel(element_type, naive(), tile())
}

/// Smaller than the cases, so that there are several.
fn small_tile() -> PlanOptions {
    tiled(8, 16, (2, 4), 4, 8)
}

fn run_cases(cases: Vec<(String, Case)>, element_type: ElementType) {
    let mut ways = ways(element_type);
    // f16 and bf16 differ in how elements are read and written alone, so each goes through one of these.
    if element_type != ElementType::BF16 {
        ways.push(("tile of 8 by 16", full(), small_tile()));
    }
    // Rows and columns are no powers of two. P and V go by 36 keys: six of the twelve that a thread has, and not a multiple of the
    // ten rows of threads. Threads keep the two chunks of Q, of which the second is a part.
    if element_type != ElementType::F16 {
        ways.push(("tile of 40 by 72", full(), tiled(40, 72, (10, 6), 12, 36)));
    }
    check_all(&prepare(cases, element_type), &ways);
}

fn run_dims(element_type: ElementType) {
    check_all(&prepare(dims_of(element_type), element_type), &ways(element_type));
}

#[test]
fn cases_f32() {
    run_cases(plain_cases(), ElementType::F32);
}

/// In f32 alone: `tests/seams.rs` has each feature in each type. A test of its own, so that two processors share the work.
#[test]
fn cases_of_features_f32() {
    run_cases(cases_of_features(), ElementType::F32);
}

#[test]
fn cases_f16() {
    run_cases(plain_cases(), ElementType::F16);
}

#[test]
fn cases_bf16() {
    run_cases(plain_cases(), ElementType::BF16);
}

#[test]
fn dims_f32() {
    run_dims(ElementType::F32);
}

#[test]
fn dims_f16() {
    run_dims(ElementType::F16);
}

#[test]
fn dims_bf16() {
    run_dims(ElementType::BF16);
}

/// Each kernel in each type with wgpu's bounds checks, which would turn an access past a binding into a wrong result.
#[test]
fn within_bounds() {
    let context = full().clone().checked();
    let all = || {
        [
            ("aligned", case(2, [4, 2], [37, 45], [16, 12]).causal(BottomRight)),
            ("odd", case(2, [2, 1], [19, 23], [7, 5]).odd().seqlens(&[23, 4]).softcap(2.0)),
            ("packed", case(2, [4, 2], [35, 35], [16, 12]).packed().window(5, 3)),
            ("no keys", case(1, [1, 1], [3, 0], [16, 12])),
            ("two sums", case(1, [1, 1], [9, 4161], [16, 12]).softcap(2.0)),
        ]
    };
    for element_type in TYPES {
        let cases = all().map(|(name, case)| (name.to_string(), case));
        check_all(
            &prepare(cases, element_type),
            &[("naive", &context, naive()), ("tile", &context, tile()), ("small tile", &context, small_tile())],
        );
    }
}

#[test]
fn bytes_moved_by_the_tile_kernel() {
    let moved = |keys: u32, chunk: u32| {
        let shape = Shape { seqlen_q: 64, seqlen_k: keys, head_dim_v: 12, ..Shape::square(1, 1, 1, 16) };
        let plan = full().plan_with(&Problem::new(shape, ElementType::F32), &tiled(32, 32, (8, 8), chunk, 16)).unwrap();
        plan.bytes_moved() / 4
    };
    // Keys and values for each tile of rows, outputs once; queries once if they are one chunk, else for each tile of keys.
    assert_eq!(moved(96, 16), 2 * 96 * (16 + 12) + 64 * 16 + 64 * 12);
    assert_eq!(moved(96, 8), 2 * 96 * (16 + 12) + 64 * 3 * 16 + 64 * 12);
    // Outputs are stored once or twice more on the way, and loaded as often.
    assert_eq!(moved(8192, 8), 2 * 8192 * (16 + 12) + 64 * 256 * 16 + 3 * 64 * 12);
    assert_eq!(moved(8200, 8), 2 * 8200 * (16 + 12) + 64 * 257 * 16 + 5 * 64 * 12);
}

/// Each of q, k and v is one element in memory, so that the problem is as large as its numbers alone.
#[test]
fn bytes_past_2_to_the_64() {
    let mut problem = Problem::new(Shape::square(1, 4, 1 << 29, 1), ElementType::F32);
    for tensor in [Tensor::Query, Tensor::Key, Tensor::Value] {
        problem = problem.with_layout(tensor, Layout { offset: 0, batch: 0, head: 0, row: 0 });
    }
    // A window, without which Mesa 22.3 ends the loops of so many keys.
    let plan = full().plan_with(&problem.window(Some(5), Some(5)), &tile()).unwrap();
    assert_eq!(plan.materialized_bytes(), u64::MAX);
    let text = plan.to_string();
    // Of tensors and scores it says how large they are; what caches serve and what memory does is not in one sentence.
    let sizes = text.lines().find(|line| line.starts_with("tensors: ")).unwrap();
    assert!(sizes.ends_with("GiB; all scores: 4294967296.00 GiB, kept in no buffer"), "{sizes}");
    assert!(!text.contains("would be"), "{text}");
}

/// More inputs than fit WebGPU's limits: there they are refused by name.
#[test]
fn many_inputs() {
    for element_type in TYPES {
        for (name, case) in &cases::many_inputs() {
            let problem = case.clone().element_type(element_type).problem;
            let error = webgpu().plan_with(&problem, &tile()).unwrap_err();
            assert!(matches!(error, Error::StorageBuffers { .. }), "{name}: {error}");
            assert!(error.to_string().contains("bias"), "{error}");
        }
        let ways = [("naive", full(), naive()), ("tile", full(), tile()), ("small tile", full(), small_tile())];
        check_all(&prepare(many_inputs_of(element_type), element_type), &ways);
    }
}
