// What is given of each score or head beside Q, K and V: bias, boolean mask, slopes of ALiBi, sinks.
// Needs: softmax.wgsl, sequence.wgsl. Gives: with BIAS bias_of, with MASK mask_of, with ALIBI alibi_slope_of, with SINKS sink_of.

#if BIAS
// f32, or two elements of 16 bits a word.
@group(0) @binding(19) var<storage, read> bias: array<u32>;

// MASKED for -infinity and whatever is below -1e30. WGSL may assume that infinity does not occur, so bits are compared.
fn bias_of(at: Sequence, i: i32, j: i32) -> f32 {
    let place = place_of_score(problem.bias, problem.bias_column, at, i, j);
#if BIAS_F16
    let half = (bias[place / 2u] >> (16u * (place & 1u))) & 0xffffu;
    return select(unpack2x16float(half).x, MASKED, half == 0xfc00u);
#else
#if BIAS_BF16
    let bits = (bias[place / 2u] >> (16u * (place & 1u))) << 16u;
#else
    let bits = bias[place];
#endif
    return bitcast<f32>(select(bits, bitcast<u32>(MASKED), bits > BELOW_MASKS));
#endif
}
#endif

#if MASK
// A byte for each score.
@group(0) @binding(20) var<storage, read> mask: array<u32>;

fn mask_of(at: Sequence, i: i32, j: i32) -> bool {
    let place = place_of_score(problem.mask, problem.mask_column, at, i, j);
    return ((mask[place / 4u] >> (8u * (place & 3u))) & 0xffu) != 0u;
}
#endif

#if ALIBI
@group(0) @binding(21) var<storage, read> alibi_slopes: array<f32>;

fn alibi_slope_of(at: Sequence) -> f32 {
    return alibi_slopes[at.batch * problem.slopes_batch + at.head];
}
#endif

#if SINKS
@group(0) @binding(22) var<storage, read> sinks: array<u32>;

// MASKED for a sink that is none: -infinity, or below -1e30.
fn sink_of(at: Sequence) -> f32 {
    let bits = sinks[at.head];
    return bitcast<f32>(select(bits, bitcast<u32>(MASKED), bits > BELOW_MASKS));
}
#endif

// The bits of -1e30: larger bits are a lower number, -infinity, or a negative NaN.
const BELOW_MASKS = 0xf149f2cau;

// Kernels ask about rows and keys past the ends too: of the last ones they get what is there.
fn place_of_score(t: Tensor, column: u32, at: Sequence, i: i32, j: i32) -> u32 {
    let row = u32(clamp(i, i32(problem.row_begin), i32(problem.row_end) - 1));
    let key = u32(clamp(j, 0, i32(problem.seqlen_k) - 1));
    return row_of_tensor(t, at.batch, at.head, row) + key * column;
}
