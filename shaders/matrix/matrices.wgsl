// The device's cooperative matrices, M by M: operands of f16, sums of f32.
// Needs: the features f16 and cooperative matrices. Gives: Accumulator, Left, Right, M; Sums, Halves, WIDTH; half_of, half4_of.
//
// With BF16_MATRICES each f16 here stands for bf16: src/matrices/bf16_words.rs makes it so in the SPIR-V. So a kernel for both types does no
// arithmetic on f16, which bf16 does not have, and makes f16 of f32 by half_of and half4_of.
#if MATRIX16
alias Accumulator = coop_mat16x16<f32, C>;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
const M = 16u;
#else
alias Accumulator = coop_mat8x8<f32, C>;
alias Left = coop_mat8x8<f16, A>;
alias Right = coop_mat8x8<f16, B>;
const M = 8u;
#endif

// Elements of workgroup memory that matrices are loaded from and stored to: WIDTH numbers. Metal's functions take
// pointers to numbers only.
#if SCALARS
alias Sums = f32;
alias Halves = f16;
const WIDTH = 1u;
#else
alias Sums = vec4f;
alias Halves = vec4<f16>;
const WIDTH = 4u;
#endif

// The f16 (or bf16) that is nearest to x. The conversion is the device's, and some devices cut off what is below the last bit. There the
// number is rounded first, as bits, so that the conversion has nothing to lose. The carry of a number that rounds up goes into the exponent,
// as it should. Only the bits of a NaN may become those of a number: inputs have to be finite.
#if ROUND_BF16
// No bits are left below the last one, whatever the device would do to them.
fn half_of(x: f32) -> f16 {
    return f16(bitcast<f32>((bitcast<u32>(x) + 0x8000u) & 0xffff0000u));
}
#endif
#if ROUND_F16
fn half_of(x: f32) -> f16 {
    let rounded = bitcast<f32>((bitcast<u32>(x) + 0x1000u) & 0xffffe000u);
    // Below 2^-14 f16 has the multiples of 2^-24, which are those of f32 from 1/2 to 1.
    let small = (abs(x) + 0.5) - 0.5;
    return f16(select(rounded, select(small, -small, x < 0.0), abs(x) < 6.103515625e-5));
}
#endif
#if ROUND
fn half4_of(x: vec4f) -> vec4<f16> {
    return vec4<f16>(half_of(x.x), half_of(x.y), half_of(x.z), half_of(x.w));
}
#else
fn half_of(x: f32) -> f16 {
    return f16(x);
}

fn half4_of(x: vec4f) -> vec4<f16> {
    return vec4<f16>(x);
}
#endif
