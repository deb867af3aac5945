// Scores are held as they are; exponentials are taken in base 2 of differences times log2(e).
const LOG2_E = 1.4426950408889634;
// WGSL may assume that infinity does not occur. A masked score is MASKED; a running maximum starts at LOWEST,
// so far above MASKED that exp2(MASKED - LOWEST) vanishes, and below every score.
const MASKED = -2.0e38;
const LOWEST = -1.0e38;
// Where the coop kernels' maxima start: below every score and above every masked one. So no row takes its maximum from
// masked scores, whose product with the factor is rounded: exp2 of that rounding error, of a number as large as 1e15,
// may overflow.
const EMPTY = -1.0e14;
// Exponents of 2 that are larger than this are rounded before the largest is subtracted in the coop kernel for f32 and bf16.
const LARGEST_EXPONENT = 33554432.0;
// What the backward pass takes for lse where a row sees no key: exp of any score less this vanishes.
const NO_KEYS = 1.0e38;

// A little more than a product that was rounded. The coop kernels take exponents by an fma, whose product is not rounded: less a
// maximum that was rounded down, an exponent of 1e10 could be 1,000, and p infinite. All p of a row are smaller by the same factor.
fn above(rounded: f32) -> f32 {
    return fma(abs(rounded), 2.4e-7, rounded);
}

// The coop kernels multiply a row by 1 / sum, and by 0 where no key counts. There the maximum is still EMPTY.
fn inverse_of_row(m: f32, sum: f32) -> f32 {
    return select(1.0 / max(sum, 1.0e-30), 0.0, m == EMPTY);
}

// Gives the bits of a row's lse. The coop kernels have the maximum m in base 2.
fn lse_bits_of_row(m: f32, sum: f32) -> u32 {
    return select(bitcast<u32>(m / LOG2_E + log(max(sum, 1.0e-30))), 0xff800000u, m == EMPTY);
}

fn exp_difference(x: f32, reference: f32) -> f32 {
    return exp2((x - reference) * LOG2_E);
}

// A row in which some key counts has a sum of at least 1, from its largest score.
fn row_is_empty(sum: f32) -> bool {
    return sum < 0.5;
}

// 1 / sum, and 0 for an empty row, whose output is 0.
fn inverse_sum(sum: f32) -> f32 {
    return select(1.0 / max(sum, 0.5), 0.0, row_is_empty(sum));
}

// m + ln(sum) and, for an empty row, -infinity: as bits, since WGSL may assume that infinity does not occur.
fn lse_bits(m: f32, sum: f32) -> u32 {
    return select(bitcast<u32>(m + log(max(sum, 0.5))), 0xff800000u, row_is_empty(sum));
}
