// Sizes of elements, and the powers of two that bring them to where f16 holds them.
// Needs: PARTS, HEAD_DIM. Gives: are_apart, size_of, sizes_of, scale_for, power_of_two, unscaled, largest_product.

// How many powers of two elements may be apart before rows have scales of their own: 16 in f32, and 24 in bf16,
// whose 8 bits are in one f16 down to 2^-32 of the largest.
const APART = 32u - 8u * PARTS;

// Whether the exponents of a largest size and of a smallest one, both as sizes_of has them, are too far apart for one scale.
fn are_apart(sizes: vec2u) -> bool {
    return sizes.x >> 23u > ((0u - sizes.y) >> 23u) + APART;
}

// The size of elements is the largest absolute value.
fn size_of(x: vec4f) -> f32 {
    return max(max(abs(x.x), abs(x.y)), max(abs(x.z), abs(x.w)));
}

// Gives two numbers of these elements: the size, and 2^32 less the size. Their maxima over a tile are its largest and smallest size.
fn sizes_of(x: vec4f) -> vec2u {
    let bits = bitcast<u32>(size_of(x));
    return vec2u(bits, 0u - bits);
}

// The power of two that brings a size, given as bits, to between 2^14 and 2^15, or 2^126 if that is not enough.
fn scale_for(bits: u32) -> f32 {
    return bitcast<f32>((268u - max(bits >> 23u, 15u)) << 23u);
}

// 2^exponent, or the nearest one that f32 has.
fn power_of_two(exponent: i32) -> f32 {
    return bitcast<f32>(u32(clamp(exponent, -126, 127) + 127) << 23u);
}

// Two factors that give 1 / (a b) together, for powers of two. Their product may be too small or too large for f32.
fn inverse_halves(a: f32, b: f32) -> vec2f {
    let power = 254 - i32(bitcast<u32>(a) >> 23u) - i32(bitcast<u32>(b) >> 23u);
    let half = power / 2;
    return vec2f(power_of_two(half), power_of_two(power - half));
}

// x / (a b) for powers of two.
fn unscaled(x: f32, a: f32, b: f32) -> f32 {
    let halves = inverse_halves(a, b);
    return x * halves.x * halves.y;
}

// A bound on the products of two rows whose scales are at least a and b: scaled elements are below 2^15. It is at most 3e36.
fn largest_product(a: f32, b: f32) -> f32 {
    return min(unscaled(1.0, a, b), 1.0e25) * (1073741824.0 * f32(HEAD_DIM));
}
