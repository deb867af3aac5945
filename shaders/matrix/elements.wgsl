// What a lane holds of a matrix, as numbers. Left operands and accumulators of f32 lie alike.
// Needs: matrices.wgsl, and function bodies that src/matrices/spirv.rs puts in. Gives: Lane, elements_of, accumulator, left, coop_bits.
#include "matrix/layout.wgsl"

// The bodies of these are put in by src/matrices/spirv.rs: element e of a matrix, a matrix of given elements, and the four
// f16 in 64 bits.
fn coop_get_0(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_1(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_2(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_3(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_4(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_5(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_6(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_7(m: Accumulator) -> f32 { return 0.0; }
fn coop_set_accumulator(z: Accumulator, a: f32, b: f32, c: f32, d: f32, e: f32, f: f32, g: f32, h: f32) -> Accumulator { return z; }
fn coop_bits(x: vec2u) -> vec4<f16> { return vec4<f16>(); }
fn coop_set_left(z: Left, a: f16, b: f16, c: f16, d: f16, e: f16, f: f16, g: f16, h: f16) -> Left { return z; }

alias Lane = array<f32, ELEMENTS>;

fn elements_of(m: Accumulator) -> Lane {
    return Lane(coop_get_0(m), coop_get_1(m), coop_get_2(m), coop_get_3(m), coop_get_4(m), coop_get_5(m), coop_get_6(m), coop_get_7(m));
}

fn accumulator(x: Lane) -> Accumulator {
    return coop_set_accumulator(Accumulator(), x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]);
}

#if ROUND_BF16
// Two numbers are rounded and packed as bits, and nothing is converted.
fn rounded_pair(x: f32, y: f32) -> u32 {
    return ((bitcast<u32>(x) + 0x8000u) >> 16u) | ((bitcast<u32>(y) + 0x8000u) & 0xffff0000u);
}

fn left(x: Lane) -> Left {
    let a = coop_bits(vec2u(rounded_pair(x[0], x[1]), rounded_pair(x[2], x[3])));
    let b = coop_bits(vec2u(rounded_pair(x[4], x[5]), rounded_pair(x[6], x[7])));
    return coop_set_left(Left(), a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w);
}
#else
fn left(x: Lane) -> Left {
    return coop_set_left(Left(), half_of(x[0]), half_of(x[1]), half_of(x[2]), half_of(x[3]), half_of(x[4]), half_of(x[5]), half_of(x[6]), half_of(x[7]));
}
#endif
