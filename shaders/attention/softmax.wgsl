// Constants and functions of the softmax. Scores are held as they are; exponentials are taken as exp2 of differences times log2(e).
// Needs: nothing. Gives: LOG2_E, the large numbers that stand for infinity, GROWTH, SMALLEST_FACTOR, LARGEST_EXPONENT, above,
// exp_difference.

const LOG2_E = 1.4426950408889634;
// WGSL may assume that infinity does not occur. A masked score is MASKED; a running maximum starts at LOWEST,
// so far above MASKED that exp2(MASKED - LOWEST) vanishes, and below every score. (MASKED - NO_KEYS) · LOG2_E is finite.
const MASKED = -1.2e38;
const LOWEST = -1.0e38;
// Where the coop kernels' maxima start: below every score and above every masked one. So no row takes its maximum from
// masked scores, whose product with the factor is rounded: exp2 of that rounding error, of a number as large as 1e15,
// may overflow.
const EMPTY = -1.0e14;
// How far the maximum of a row may pass its m, as an exponent of 2, before forward_coop.wgsl and forward_coop_workgroup.wgsl rescale O.
// So p is at most 2^8; f16 holds p up to 2^16.
const GROWTH = 8.0;
// The smallest factor that the coop kernels for the forward pass multiply scores with. A smaller one is replaced by it. The quotient of
// a masked score and the factor then stays finite.
const SMALLEST_FACTOR = 1.0e-22;
// With exponents of 2 larger than this, the coop kernel for f32 and scaled bf16 rounds them before it subtracts the maximum.
const LARGEST_EXPONENT = 33554432.0;
// lse in the backward pass of a row that sees no key: exp of any score less this vanishes.
const NO_KEYS = 1.0e38;

// A little more than a product that was rounded. The coop kernels take exponents by an fma, whose product is not rounded: less a
// maximum that was rounded down, an exponent of 1e10 could be 1,000, and p infinite. All p of a row are smaller by the same factor.
fn above(rounded: f32) -> f32 {
    return fma(abs(rounded), 2.4e-7, rounded);
}

// exp(x - reference).
fn exp_difference(x: f32, reference: f32) -> f32 {
    return exp2((x - reference) * LOG2_E);
}
