// What is given of each score or head beside Q, K and V: bias, boolean mask, slopes of ALiBi, sinks.
// Needs: softmax.wgsl, sequence.wgsl. Gives: with BIAS bias_of, bias2_of, bias4_of; with MASK mask_of, mask2_of, mask4_of; with ALIBI
// alibi_slope, alibi_of, steps_behind; with SINKS sink_of.

#if BIAS
// f32, or two elements of 16 bits a word.
#if BIAS_AHEAD
// read_write for kernels that ask about it ahead: see forward_coop.wgsl.
@group(0) @binding(19) var<storage, read_write> bias: array<u32>;
#else
@group(0) @binding(19) var<storage, read> bias: array<u32>;
#endif

// MASKED for -infinity and whatever is below -1e30.
fn bias_of(at: Sequence, i: i32, j: i32) -> f32 {
#if BIAS_PAIRED
    // Each row begins at an even element.
    let shift = 16u * (u32(j) & 1u);
    let place = place_of_score(problem.bias, 1u, at, i, j);
#else
    let place = place_of_score(problem.bias, problem.bias_column, at, i, j);
    let shift = 16u * (place & 1u);
#endif
#if BIAS_F16
    return bias_of_half(unpack2x16float(bias_word(place / 2u) >> shift).x);
#else
#if BIAS_BF16
    return bias_of_bits((bias_word(place / 2u) >> shift) << 16u);
#else
    return bias_of_bits(bias_word(place));
#endif
#endif
}

// Gives the bias of keys j + step and j + step + 1. j and step are even: with BIAS_PAIRED both keys lie in one word. step is a constant, so that a
// driver computes one address a row and adds constants.
fn bias2_of(at: Sequence, i: i32, j: i32, step: u32) -> vec2f {
#if BIAS_PAIRED
    let word = bias_word(place_of_score(problem.bias, 1u, at, i, j) / 2u + step / 2u);
#if BIAS_F16
    let two = unpack2x16float(word);
    return vec2f(bias_of_half(two.x), bias_of_half(two.y));
#else
    return vec2f(bias_of_bits(word << 16u), bias_of_bits(word & 0xffff0000u));
#endif
#else
    let first = j + i32(step);
    return vec2f(bias_of(at, i, first), bias_of(at, i, first + 1));
#endif
}

// Gives the bias of keys j .. j + 3. j is a multiple of four: with BIAS_PAIRED they lie in two words. An f32 bias takes four loads, since kernels declare a
// bias of any type as words.
fn bias4_of(at: Sequence, i: i32, j: i32) -> vec4f {
    return vec4f(bias2_of(at, i, j, 0u), bias2_of(at, i, j, 2u));
}

fn bias_word(n: u32) -> u32 {
    return bias[min(n, arrayLength(&bias) - 1u)];
}

// Bits are compared, since WGSL may assume that infinity does not occur.
fn bias_of_bits(bits: u32) -> f32 {
    return bitcast<f32>(select(bits, bitcast<u32>(MASKED), bits > BELOW_MASKS));
}

// Of numbers of f16 only -infinity is below -1e30.
fn bias_of_half(x: f32) -> f32 {
#if BIAS_AHEAD
    // One operation instead of two. Kernels that ask ahead run on Vulkan only, whose drivers take the maximum of infinity and a number for what it is.
    return max(x, MASKED);
#else
    return bias_of_bits(bitcast<u32>(x));
#endif
}
#endif

#if MASK
// A byte for each score.
@group(0) @binding(20) var<storage, read> mask: array<u32>;

fn mask_of(at: Sequence, i: i32, j: i32) -> bool {
    let place = place_of_score(problem.mask, problem.mask_column, at, i, j);
    return ((mask_word(place / 4u) >> (8u * (place & 3u))) & 0xffu) != 0u;
}

// Gives the mask of keys j and j + 1. j is even: with MASK_PAIRED both keys lie in one word.
fn mask2_of(at: Sequence, i: i32, j: i32) -> vec2<bool> {
#if MASK_PAIRED
    let place = place_of_score(problem.mask, 1u, at, i, j);
    let bytes = mask_word(place / 4u) >> (8u * (place & 2u));
    return vec2<bool>((bytes & 0xffu) != 0u, (bytes & 0xff00u) != 0u);
#else
    return vec2<bool>(mask_of(at, i, j), mask_of(at, i, j + 1));
#endif
}

// Gives the mask of keys j .. j + 3. j is a multiple of four: with MASK_QUADS each row begins at a word, so that all four keys lie in one word. Past
// the buffer's end mask_word gives its last word, and keep_keys drops all of those keys.
fn mask4_of(at: Sequence, i: i32, j: i32) -> vec4<bool> {
#if MASK_QUADS
    let bytes = mask_word(place_of_score(problem.mask, 1u, at, i, j) / 4u);
    return (vec4u(bytes) & vec4u(0xffu, 0xff00u, 0xff0000u, 0xff000000u)) != vec4u();
#else
    return vec4<bool>(mask2_of(at, i, j), mask2_of(at, i, j + 2));
#endif
}

fn mask_word(n: u32) -> u32 {
    return mask[min(n, arrayLength(&mask) - 1u)];
}
#endif

#if ALIBI
@group(0) @binding(21) var<storage, read> alibi_slopes: array<f32>;

fn alibi_slope(at: Sequence) -> f32 {
    return alibi_slopes[at.batch * problem.slopes_batch + at.head];
}

// What ALiBi adds to the score of a query and a key that is so many steps behind the query. Steps below 0 are ahead of it.
fn alibi_of(slope: f32, steps: f32) -> f32 {
    return -slope * abs(steps);
}

// How many steps key j is behind query i, the last query being at the last key.
fn steps_behind(at: Sequence, i: i32, j: i32) -> f32 {
    return f32(i + at.keys - at.queries - j);
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

// Kernels ask about rows past the ends too. They get elements of the last row, since what lies behind it may be infinite, and 0 times that is
// no number. Keys past the ends get any element of the buffer: `keep` leaves them out.
fn place_of_score(t: Tensor, column: u32, at: Sequence, i: i32, j: i32) -> u32 {
    let row = u32(clamp(i, i32(problem.row_begin), i32(problem.row_end) - 1));
    return row_of_tensor(t, at.batch, at.head, row) + u32(j) * column;
}
