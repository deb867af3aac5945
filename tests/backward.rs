//! The backward pass by cases: each line is computed by every kernel, in every element type, and compared with the oracle.

use flash_attention_testing::backward::{Ask, backward, check_all, fused, in_small_bindings, prepare, two_kernels};
use flash_attention_testing::cases::{cases, cases_of_features, dims_of, many_inputs_of, plain_cases};
use flash_attention_testing::{Case, TYPES, assert_split, case, every_kernel, full, with_limits};
use wgpu_flash_attention::Causal::BottomRight;
use wgpu_flash_attention::tune::FusedTile;
use wgpu_flash_attention::{Context, ElementType, Kernel, PlanOptions, ScoreLayout};

fn ways(element_type: ElementType) -> Vec<(&'static str, &'static Context, PlanOptions)> {
    every_kernel(element_type, backward(Kernel::Naive), backward(Kernel::Tile))
}

/// All gradients at once, in blocks of one tile, smaller than the cases, so that there are several rounds. A thread has several
/// vectors of keys, or of rows.
fn by_keys() -> PlanOptions {
    fused([64, 32], 8, 8, 16, [64, 32])
}

fn by_rows() -> PlanOptions {
    fused([32, 64], 8, 8, 16, [32, 64])
}

fn run_cases(cases: Vec<(String, Case)>, element_type: ElementType) {
    let mut ways = ways(element_type);
    // f16 and bf16 differ in how elements are read and written alone; `within_bounds` has this tile in each type.
    if element_type != ElementType::F16 {
        ways.push(("tile of 12 by 24", full(), two_kernels()));
    }
    check_all(&prepare(cases, element_type, Ask::default()), &ways);
}

/// Whether there are sums of sums over rows or keys.
fn is_long((_, case): &(String, Case)) -> bool {
    case.problem.shape.seqlen_q.max(case.problem.shape.seqlen_k) >= 4096
}

#[test]
fn cases_fused() {
    let (long, short): (Vec<_>, Vec<_>) = cases().into_iter().partition(is_long);
    let ways = [("fused tile of 64 by 32", full(), by_keys()), ("fused tile of 32 by 64", full(), by_rows())];
    check_all(&prepare(short, ElementType::F32, Ask::default()), &ways);
    // Blocks as large as plans have them for such lengths, with several sums in a block: blocks of one tile would meet in some
    // hundred rounds, which a processor takes a minute for.
    let blocks = fused([32, 64], 8, 8, 16, [1024, 2048]);
    check_all(&prepare(long, ElementType::F32, Ask::default()), &[("fused, large blocks", full(), blocks)]);
}

fn run_dims(element_type: ElementType) {
    let mut ways = ways(element_type);
    if element_type == ElementType::F32 {
        // Half of the keys and rows of a thread that `by_rows` has, and half of the text to compile.
        ways.push(("fused", full(), fused([32, 32], 8, 8, 16, [32, 32])));
    }
    check_all(&prepare(dims_of(element_type), element_type, Ask::default()), &ways);
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

/// A few cases, aligned and not, with grouped heads, masks and lengths.
fn few() -> Vec<(String, Case)> {
    let all = [
        ("aligned", case(2, [4, 2], [37, 45], [16, 12]).causal(BottomRight)),
        ("odd", case(2, [2, 1], [19, 23], [7, 5]).odd().seqlens(&[23, 4]).softcap(2.0)),
        ("packed", case(2, [4, 2], [35, 35], [16, 12]).packed().window(5, 3)),
        ("no keys", case(1, [1, 1], [3, 0], [16, 12])),
        ("no queries", case(1, [2, 1], [0, 3], [16, 12])),
    ];
    all.into_iter().map(|(name, case)| (name.to_string(), case)).collect()
}

#[test]
fn gradients_of_lse_and_sums_with_what_is_there() {
    for element_type in TYPES {
        let mut ways = ways(element_type);
        if element_type == ElementType::F32 {
            ways.push(("fused", full(), by_rows()));
            let mut written_out = by_keys();
            written_out.fused_tile = written_out.fused_tile.map(|tile| FusedTile { written_out: true, ..tile });
            ways.push(("fused, written out", full(), written_out));
        }
        // Both at once: see `within_bounds`.
        for (grad_lse, accumulate) in [(true, false), (false, true)] {
            check_all(&prepare(few(), element_type, Ask { grad_lse, accumulate }), &ways);
        }
    }
}

/// Blocks of several tiles both ways, more blocks of keys than of rows, and the other way around.
#[test]
fn blocks_of_several_tiles() {
    let all = [
        ("more keys", case(2, [2, 1], [70, 300], [16, 12]).causal(BottomRight)),
        ("wide, softcap", case(1, [2, 1], [70, 130], [40, 72]).softcap(3.0).scale(-0.4)),
        ("more rows", case(1, [2, 2], [300, 70], [12, 16]).seqlens(&[66])),
        ("window", case(1, [1, 1], [200, 200], [8, 8]).window(40, 3)),
    ];
    let cases: Vec<_> = all.into_iter().map(|(name, case)| (name.to_string(), case)).collect();
    let options = |block_keys, block_rows| ("fused", full(), fused([32, 64], 8, 8, 16, [block_keys, block_rows]));
    // Each shape of block once, and each way to store: every module takes software Vulkan seconds to compile.
    for (accumulate, blocks) in [(false, options(96, 64)), (true, options(64, 128))] {
        let prepared = prepare(cases.clone(), ElementType::F32, Ask { grad_lse: false, accumulate });
        check_all(&prepared, &[blocks]);
    }
}

/// Each kernel in each type with wgpu's bounds checks, which would turn an access past a binding into a wrong result.
#[test]
fn within_bounds() {
    let context = full().clone().checked();
    for element_type in TYPES {
        let mut ways = vec![
            ("naive", &context, backward(Kernel::Naive)),
            ("tile", &context, backward(Kernel::Tile)),
            ("small tile", &context, two_kernels()),
        ];
        if element_type == ElementType::F32 {
            ways.push(("fused", &context, by_keys()));
        }
        check_all(&prepare(few(), element_type, Ask { grad_lse: true, accumulate: true }), &ways);
    }
}

/// More inputs than fit WebGPU's limits.
#[test]
fn many_inputs() {
    let ways = [backward(Kernel::Naive), backward(Kernel::Tile), two_kernels()]
        .map(|options| ("on all limits", full(), options));
    for element_type in TYPES {
        let ask = Ask { grad_lse: true, accumulate: true };
        check_all(&prepare(many_inputs_of(element_type), element_type, ask), &ways);
    }
}

/// Masks, each with a bias in the same places, that are read by words of four and of two keys, and by single keys. Rows have 70 keys, which no whole
/// words hold, and the buffers end with the last key.
fn by_places() -> Vec<(String, Case)> {
    let wide = || case(2, [2, 1], [37, 70], [16, 12]);
    let both = |case: Case, first, strides| {
        let layout = ScoreLayout::strided(first, strides);
        case.mask_at(layout).bias_at(layout)
    };
    let quads = [5504, 2748, 72, 1];
    let all = [
        ("rows begin at words", both(wide(), 8, quads)),
        ("rows begin at words, causal", both(wide(), 8, quads).causal(BottomRight)),
        ("rows begin at words, lengths", both(wide(), 8, quads).seqlens(&[69, 14]).seqlens_q(&[37, 22])),
        ("rows begin at words, softcap, window", both(wide(), 8, quads).softcap(2.0).window(30, 9)),
        ("rows begin at words, dropout", both(wide(), 8, quads).dropout(0.3)),
        ("the first element is even", both(wide(), 6, quads)),
        ("the first element is odd", both(wide(), 5, quads)),
        ("rows are odd", both(wide(), 8, [5504, 2748, 73, 1])),
        ("rows are even", both(wide(), 8, [5504, 2748, 74, 1])),
        ("heads are odd", both(wide(), 8, [5504, 2747, 72, 1])),
        ("batch entries are even", both(wide(), 8, [5502, 2748, 72, 1])),
        ("keys are apart", both(wide(), 8, [20720, 10360, 4, 148])),
        ("rows are shorter than a word", both(case(2, [2, 1], [37, 3], [16, 12]), 4, [296, 148, 4, 1])),
        ("of all batch entries", both(wide(), 4, [0, 2748, 72, 1])),
        ("of all heads", both(wide(), 4, [2664, 0, 72, 1])),
        ("of all rows", both(wide(), 4, [144, 72, 0, 1])),
        ("of all but keys", both(wide(), 4, [0, 0, 0, 1])),
    ];
    all.into_iter().map(|(name, case)| (name.to_string(), case)).collect()
}

/// All in f32, and half of them in each other type. Types change how the bias is read: each of them has rows at words, at even elements and at odd ones.
#[test]
fn masks_and_biases_by_places() {
    for element_type in TYPES {
        let (first, step) = match element_type {
            ElementType::F16 => (0, 2),
            ElementType::BF16 => (1, 2),
            _ => (0, 1),
        };
        let cases = by_places().into_iter().skip(first).step_by(step);
        let mut ways = vec![("tile", full(), backward(Kernel::Tile)), ("tile of 12 by 24", full(), two_kernels())];
        if element_type == ElementType::F32 {
            ways.extend([("fused by keys", full(), by_keys()), ("fused by rows", full(), by_rows())]);
        }
        check_all(&prepare(cases, element_type, Ask::default()), &ways);
    }
}

/// A mask whose rows begin at words, of which each part of the work binds another piece.
#[test]
fn masks_in_words_in_parts() {
    // The fused kernel with a mask has nine storage buffers.
    let narrow = with_limits(|limits| {
        limits.max_storage_buffer_binding_size = 20 << 10;
        limits.max_storage_buffers_per_shader_stage = 10;
    });
    let layout = ScoreLayout::strided(4, [110 * 152, 0, 152, 1]);
    let case = case(2, [4, 2], [110, 150], [16, 12]).mask_at(layout);
    let ways = [two_kernels(), fused([32, 64], 8, 8, 16, [32, 64])].map(in_small_bindings);
    let ways = ways.map(|options| {
        assert_split(&case.problem, &narrow, options);
        ("split", &narrow, options)
    });
    check_all(&prepare([("in parts".to_string(), case)], ElementType::F32, Ask::default()), &ways);
}
