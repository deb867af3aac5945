//! The table of cases that the forward kernels are tested with.

use crate::{Case, Prepared, case};
use wgpu_flash_attention::Causal::{BottomRight, TopLeft};
use wgpu_flash_attention::{Alibi, ElementType, Problem, ScoreLayout};

/// Head dims: of queries and keys, and of values.
const DIMS: &[[u32; 2]] = &[
    [1, 8],
    [2, 3],
    [3, 2],
    [5, 31],
    [8, 4],
    [8, 5],
    [31, 33],
    [32, 1],
    [33, 64],
    [64, 32],
    [80, 96],
    [96, 80],
    [127, 128],
    [128, 127],
    [128, 128],
    [200, 256],
    [256, 200],
];

/// A name and what to compute, in f32.
pub fn cases() -> Vec<(String, Case)> {
    // Most masks are tried on these: small enough for the oracle, several tiles in both directions.
    let wide = || case(2, [2, 1], [37, 70], [16, 12]);
    let tall = || case(2, [2, 2], [70, 37], [16, 12]);
    let square = || case(1, [2, 1], [67, 67], [16, 12]);
    let padded = || case(3, [4, 2], [131, 131], [16, 12]).seqlens_q(&[131, 40, 77]).seqlens(&[131, 40, 77]);
    let three = || case(3, [2, 1], [19, 40], [16, 12]);
    let all = vec![
        // Sizes
        ("one query, one key", case(1, [1, 1], [1, 1], [16, 12])),
        ("one query", case(2, [3, 1], [1, 77], [16, 12])),
        ("one key", case(2, [3, 1], [77, 1], [16, 12])),
        ("more keys", wide()),
        ("more queries", tall()),
        ("whole tiles", case(1, [1, 1], [64, 64], [16, 12])),
        ("one more than whole tiles", case(1, [1, 1], [65, 65], [16, 12])),
        ("no queries", case(2, [2, 1], [0, 5], [16, 12])),
        ("no keys", case(2, [2, 1], [5, 0], [16, 12])),
        ("no batch", case(0, [2, 1], [5, 5], [16, 12])),
        ("nothing", case(0, [2, 1], [0, 0], [16, 12])),
        ("grouped heads", case(2, [6, 2], [9, 11], [16, 12])),
        ("all heads share one", case(2, [5, 1], [9, 11], [16, 12])),
        ("no lse", wide().no_lse()),
        // The most that f32 sums up in one sum, and sums of sums
        ("4,096 keys", case(1, [1, 1], [9, 4096], [16, 12])),
        ("two sums, masked", case(1, [2, 1], [9, 4161], [16, 12]).window(4150, 0).causal(BottomRight)),
        ("two sums, softcap", case(1, [1, 1], [9, 4161], [16, 12]).softcap(2.0)),
        ("two sums, no lse", case(1, [2, 1], [19, 4161], [7, 5]).no_lse()),
        ("three sums, lengths", case(3, [1, 1], [9, 8200], [7, 5]).seqlens(&[8200, 8192, 4097])),
        // Layouts
        ("BNHD", case(2, [4, 2], [19, 23], [16, 12]).bnhd()),
        ("BNHD, odd head dims", case(2, [4, 2], [19, 23], [7, 5]).bnhd()),
        ("NBHD", case(2, [4, 2], [19, 23], [16, 12]).nbhd()),
        ("packed", case(2, [4, 2], [19, 19], [16, 12]).packed()),
        ("packed, odd head dims", case(2, [4, 2], [19, 19], [7, 5]).packed()),
        ("shared k and v", case(2, [4, 2], [19, 23], [16, 12]).shared_kv()),
        ("odd strides", case(2, [4, 2], [19, 23], [16, 12]).odd()),
        ("odd strides, odd head dims", case(2, [4, 2], [19, 23], [7, 5]).odd()),
        ("gaps", case(2, [4, 2], [19, 23], [16, 12]).gaps()),
        ("gaps, odd head dims", case(2, [4, 2], [19, 23], [7, 5]).gaps()),
        ("odd strides of one batch and head", case(1, [1, 1], [19, 23], [16, 12]).unused_odd()),
        ("odd strides of one query", case(2, [4, 2], [1, 40], [16, 12]).unused_odd()),
        // Causal
        ("bottom-right", square().causal(BottomRight)),
        ("bottom-right, more keys", wide().causal(BottomRight)),
        ("bottom-right, more queries", tall().causal(BottomRight)),
        ("bottom-right, one query", case(1, [2, 1], [1, 40], [16, 12]).causal(BottomRight)),
        ("top-left", square().causal(TopLeft)),
        ("top-left, more keys", wide().causal(TopLeft)),
        ("top-left, more queries", tall().causal(TopLeft)),
        ("top-left, one query", case(1, [2, 1], [1, 40], [16, 12]).causal(TopLeft)),
        // Windows
        ("left window", square().window(9, -1)),
        ("right window", square().window(-1, 5)),
        ("window", square().window(20, 3)),
        ("window, rows whose first tiles are masked", case(1, [1, 1], [35, 35], [16, 12]).window(5, 3)),
        ("window of one key", square().window(0, 0)),
        ("window wider than all", square().window(1 << 30, i32::MAX)),
        ("window, more keys", wide().window(10, 2)),
        ("window, more queries", tall().window(10, 2)),
        ("right window, more queries", tall().window(-1, 4)),
        ("left window and causal", wide().window(12, -1).causal(BottomRight)),
        ("window and causal", tall().window(12, 3).causal(BottomRight)),
        ("window and top-left", wide().window(30, 40).causal(TopLeft)),
        ("window that top-left empties", wide().window(3, 3).causal(TopLeft)),
        // Key lengths
        ("lengths 0, 1, all", three().seqlens(&[0, 1, 40])),
        ("lengths between", three().seqlens(&[17, 32, 39])),
        ("lengths out of range", three().seqlens(&[-3, 41, i32::MIN])),
        ("lengths far out of range", three().seqlens(&[i32::MAX, 7, -1])),
        ("lengths, bottom-right", three().seqlens(&[5, 19, 33]).causal(BottomRight)),
        ("lengths, top-left", three().seqlens(&[5, 19, 33]).causal(TopLeft)),
        ("lengths, window", three().seqlens(&[5, 19, 33]).window(6, 2)),
        ("lengths, one query", case(3, [4, 2], [1, 40], [16, 12]).seqlens(&[40, 0, 13]).causal(BottomRight)),
        ("lengths, odd strides", three().odd().seqlens(&[5, 0, 33])),
        ("lengths, no keys", case(2, [2, 1], [5, 0], [16, 12]).seqlens(&[0, 3])),
        // Query lengths, alone and with those of keys: a padded batch
        ("query lengths 0, 1, all", three().seqlens_q(&[0, 1, 19])),
        ("query lengths out of range", three().seqlens_q(&[-3, 20, i32::MIN])),
        ("query lengths, bottom-right", three().seqlens_q(&[5, 19, 12]).causal(BottomRight)),
        ("padded", three().seqlens_q(&[5, 19, 12]).seqlens(&[5, 19, 33])),
        ("padded, bottom-right", three().seqlens_q(&[5, 19, 12]).seqlens(&[5, 19, 33]).causal(BottomRight)),
        ("padded, top-left", three().seqlens_q(&[5, 19, 12]).seqlens(&[5, 0, 33]).causal(TopLeft)),
        ("padded, window, softcap", three().seqlens_q(&[7, 18, 1]).seqlens(&[7, 18, 30]).window(6, 2).softcap(2.0)),
        ("padded, several tiles", padded().causal(BottomRight)),
        ("padded, several tiles, window", padded().window(20, 3).odd()),
        ("lengths, no queries", case(2, [2, 1], [0, 5], [16, 12]).seqlens_q(&[0, 3]).seqlens(&[5, 2])),
        ("lengths of 0", case(2, [2, 1], [40, 40], [16, 12]).seqlens_q(&[0, 40]).seqlens(&[40, 0])),
        ("padded, one query", case(3, [4, 2], [1, 40], [16, 12]).seqlens_q(&[1, 0, 1]).seqlens(&[40, 7, 13])),
        // What rounds every time in the same direction, if it is one long sum
        ("alike", case(1, [1, 1], [9, 4096], [16, 12]).alike()),
        ("sorted", case(1, [1, 1], [9, 4096], [16, 12]).sorted()),
        ("alike, many queries", case(1, [1, 1], [4096, 9], [16, 12]).alike()),
        // Scale and softcap
        ("scale 0", wide().scale(0.0)),
        ("scale below 0", wide().scale(-0.3)),
        ("scale 16", wide().scale(16.0).integers(3)),
        ("softcap", wide().softcap(1.5)),
        ("softcap far above the scores", wide().softcap(1000.0)),
        ("softcap far below the scores", wide().softcap(0.01)),
        ("softcap, scale below 0", wide().softcap(2.0).scale(-1.5)),
        // Scores up to ±1e4 and beyond
        ("huge scores", wide().scale(1.0).integers(40)),
        ("huge scores, head dim 64", case(1, [2, 1], [33, 65], [64, 64]).scale(1.0).integers(30)),
        ("huge scores, scale below 0", wide().scale(-1.0).integers(40)),
        ("huge scores, masked", tall().scale(1.0).integers(40).causal(BottomRight)),
        ("huge scores, softcap", wide().scale(1.0).integers(40).softcap(30.0)),
        // Biases and masks, by what they broadcast to
        ("bias", wide().bias([2, 2, 37, 70])),
        ("bias in f32, causal", square().bias_f32([1, 2, 67, 67]).causal(BottomRight)),
        ("bias of all heads", tall().bias([2, 1, 70, 37])),
        ("bias of all batch entries, softcap", wide().bias([1, 2, 37, 70]).softcap(1.5)),
        ("bias of all rows", wide().bias([2, 2, 1, 70])),
        ("bias of all keys", tall().bias_f32([1, 2, 70, 1])),
        ("bias of a head", wide().bias([1, 2, 1, 1]).scale(-0.3)),
        ("bias of everything", wide().bias([1, 1, 1, 1])),
        ("bias with gaps", wide().bias_at(ScoreLayout::strided(5, [5507, 2741, 73, 1]))),
        ("bias, transposed", wide().bias_at(ScoreLayout::strided(0, [5180, 2590, 1, 37]))),
        ("bias, padded", three().bias([3, 1, 19, 40]).seqlens_q(&[5, 19, 12]).seqlens(&[5, 0, 33])),
        ("bias, grouped heads, window", case(2, [6, 2], [45, 51], [16, 12]).bias([1, 6, 45, 51]).window(20, 3)),
        ("bias, one query", case(2, [4, 2], [1, 140], [16, 12]).bias([2, 4, 1, 140])),
        ("bias, no keys", case(2, [2, 1], [5, 0], [16, 12]).bias([2, 2, 5, 0])),
        ("mask", wide().mask([2, 2, 37, 70])),
        ("mask of all heads, causal", square().mask([1, 1, 67, 67]).causal(TopLeft)),
        ("mask of keys", three().mask([3, 1, 1, 40])),
        ("mask of rows", tall().mask([2, 1, 70, 1])),
        ("mask with gaps", wide().mask_at(ScoreLayout::strided(5, [5507, 2741, 73, 1]))),
        ("mask, one query", case(2, [4, 2], [1, 140], [16, 12]).mask([2, 1, 1, 140])),
        // ALiBi and sinks
        ("ALiBi", wide().alibi(Alibi::PerHead)),
        ("ALiBi by batch entry, causal", tall().alibi(Alibi::PerBatchAndHead).causal(BottomRight)),
        ("ALiBi, padded", three().alibi(Alibi::PerHead).seqlens_q(&[5, 19, 12]).seqlens(&[5, 19, 33])),
        ("ALiBi, one query", case(2, [4, 2], [1, 140], [16, 12]).alibi(Alibi::PerBatchAndHead)),
        ("sinks", case(2, [4, 2], [37, 70], [16, 12]).sinks()),
        ("sinks, rows without keys", case(2, [4, 2], [70, 37], [16, 12]).sinks().causal(BottomRight)),
        ("sinks, padded, no lse", three().sinks().no_lse().seqlens_q(&[5, 19, 12]).seqlens(&[5, 0, 33])),
        ("sinks, one query", case(3, [4, 2], [1, 140], [16, 12]).sinks().seqlens(&[140, 0, 33])),
        ("sinks, no keys", case(2, [2, 1], [5, 0], [16, 12]).sinks()),
        ("ALiBi, sinks, no queries", case(2, [2, 1], [0, 5], [16, 12]).alibi(Alibi::PerHead).sinks()),
        ("ALiBi, sinks, nothing", case(2, [2, 1], [0, 0], [16, 12]).alibi(Alibi::PerBatchAndHead).sinks()),
        ("ALiBi, sinks, no batch", case(0, [2, 1], [9, 5], [16, 12]).alibi(Alibi::PerHead).sinks()),
        // Dropout
        ("dropout", wide().dropout(0.3)),
        ("dropout, causal", tall().dropout(0.1).causal(BottomRight)),
        ("dropout, window, several tiles", case(1, [2, 1], [150, 131], [16, 12]).dropout(0.5).window(60, 25)),
        ("dropout, padded, several tiles", padded().dropout(0.2).causal(BottomRight)),
        ("dropout, grouped heads, odd strides", case(2, [6, 2], [45, 51], [7, 5]).odd().dropout(0.6)),
        ("dropout, one query", case(2, [4, 2], [1, 140], [16, 12]).dropout(0.25)),
        ("dropout of nearly all", square().dropout(0.97)),
        ("dropout, softcap, scale below 0", wide().dropout(0.4).softcap(2.0).scale(-1.5)),
        ("dropout, huge scores", tall().dropout(0.3).scale(1.0).integers(40)),
        ("dropout, no keys", case(2, [2, 1], [5, 0], [16, 12]).dropout(0.5)),
        ("dropout, bias, sinks", wide().dropout(0.3).bias([1, 2, 37, 70]).sinks()),
        ("dropout, mask", wide().dropout(0.3).mask([2, 1, 1, 70])),
        ("dropout, ALiBi", wide().dropout(0.3).alibi(Alibi::PerHead).causal(BottomRight)),
        // Several at once
        ("all options", three().odd().seqlens(&[7, 40, 23]).causal(BottomRight).window(11, -1).softcap(3.0).scale(0.4)),
        (
            "all options, packed",
            case(2, [4, 2], [35, 35], [16, 12]).packed().seqlens(&[35, 20]).window(9, 4).softcap(2.0),
        ),
        ("all options, no lse", three().bnhd().no_lse().seqlens(&[40, 11, 0]).causal(TopLeft).softcap(5.0).scale(-0.2)),
    ];
    all.into_iter().map(|(name, case)| (name.to_string(), case)).collect()
}

/// Those of [`cases`] without bias, boolean mask, ALiBi, sinks and dropout: on matrices, which a processor takes long to compile for,
/// `tests/seams.rs` has each of these.
pub fn plain_cases() -> Vec<(String, Case)> {
    cases().into_iter().filter(|(_, case)| is_plain(&case.problem)).collect()
}

/// The rest of [`cases`].
pub fn cases_of_features() -> Vec<(String, Case)> {
    cases().into_iter().filter(|(_, case)| !is_plain(&case.problem)).collect()
}

fn is_plain(problem: &Problem) -> bool {
    let given = problem.bias.is_some() || problem.mask.is_some() || problem.alibi.is_some() || problem.sinks;
    !given && problem.dropout.is_none()
}

/// Cases with more inputs than kernels can bind within WebGPU's limits: all in f32, and half of them in each other type, which changes how
/// elements are read and written. `tests/seams.rs` has each feature in each type.
pub fn many_inputs_of(element_type: ElementType) -> Vec<(String, Case)> {
    let (first, step) = match element_type {
        ElementType::F16 => (0, 2),
        ElementType::BF16 => (1, 2),
        _ => (0, 1),
    };
    many_inputs().into_iter().skip(first).step_by(step).collect()
}

/// Cases with more inputs than kernels can bind within WebGPU's limits.
pub fn many_inputs() -> Vec<(String, Case)> {
    let wide = || case(2, [4, 2], [37, 70], [16, 12]).sinks().seqlens(&[70, 31]);
    let all = [
        ("mask and bias", wide().mask([2, 1, 1, 70]).bias([1, 4, 37, 70])),
        ("ALiBi, bias, softcap", wide().alibi(Alibi::PerHead).bias([1, 1, 37, 70]).softcap(2.0)),
        ("dropout, ALiBi, bias", wide().dropout(0.3).alibi(Alibi::PerHead).bias([2, 4, 1, 70])),
        (
            "all inputs",
            wide().alibi(Alibi::PerBatchAndHead).bias([2, 1, 37, 70]).mask([1, 4, 37, 1]).seqlens_q(&[20, 37]),
        ),
        (
            "large head dims",
            case(1, [2, 1], [37, 70], [136, 200])
                .sinks()
                .alibi(Alibi::PerHead)
                .bias([1, 2, 37, 70])
                .mask([1, 1, 37, 70])
                .dropout(0.2),
        ),
    ];
    all.into_iter().map(|(name, case)| (name.to_string(), case)).collect()
}

/// A small case for each pair of head dims.
pub fn dims() -> Vec<(String, Case)> {
    dims_with([37, 45])
}

/// Those of [`dims`] with so many queries and keys.
pub fn dims_with(seqlens: [u32; 2]) -> Vec<(String, Case)> {
    DIMS.iter().map(|&dims| (format!("dims {dims:?}"), case(1, [2, 1], seqlens, dims))).collect()
}

/// Those of [`dims`] that a type is tried with: each pair of head dims is a module to compile for each kernel. f16 and bf16 lie in
/// memory in the same way and are read by the same text but for one conversion, so each of them has half of the pairs.
pub fn dims_of(element_type: ElementType) -> Vec<(String, Case)> {
    let every_second = |first| dims().into_iter().skip(first).step_by(2).collect();
    match element_type {
        ElementType::F16 => every_second(0),
        ElementType::BF16 => every_second(1),
        _ => dims(),
    }
}

/// Inputs and expected results of cases in an element type.
pub fn prepare(cases: impl IntoIterator<Item = (String, Case)>, element_type: ElementType) -> Vec<(String, Prepared)> {
    cases
        .into_iter()
        .map(|(name, case)| (format!("{name}, {element_type}"), case.element_type(element_type).prepare()))
        .collect()
}
