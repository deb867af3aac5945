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

fn exp_difference(x: f32, reference: f32) -> f32 {
    return exp2((x - reference) * LOG2_E);
}
