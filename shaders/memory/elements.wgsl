// Elements in memory: f32 as it is, f16 and bf16 in pairs in u32 words, so that no device feature is needed.
// Needs: nothing. Gives: UNIT; InElements and OutElements, the types of input and output bindings; Elements4, four elements as one read
// leaves them, still packed where they lie in whole words; unpack4, which makes numbers of them; sum4, dot4, first_elements.

// Rows start at multiples of so many elements.
#if ALIGNED
const UNIT = 4u;
#else
const UNIT = 1u;
#endif

#if ELEMENT_F32
#if ALIGNED
alias InElements = array<vec4f>;
alias OutElements = array<vec4f>;
#else
alias InElements = array<f32>;
alias OutElements = array<f32>;
#endif
#else
#if ALIGNED
alias InElements = array<vec2u>;
alias OutElements = array<vec2u>;
#else
alias InElements = array<u32>;
alias OutElements = array<atomic<u32>>;
#endif

#include "memory/pairs.wgsl"

fn pack4(x: vec4f) -> vec2u {
    return vec2u(pack2(x.xy), pack2(x.zw));
}

fn unpack1(word: u32, e: u32) -> f32 {
    let both = unpack2(word);
    return select(both.x, both.y, (e & 1u) == 1u);
}

fn pack1(x: f32) -> u32 {
    return pack2(vec2f(x, 0.0));
}
#endif

#if PACKED
alias Elements4 = vec2u;

fn unpack4(x: Elements4) -> vec4f {
    return vec4f(unpack2(x.x), unpack2(x.y));
}
#else
alias Elements4 = vec4f;

fn unpack4(x: Elements4) -> vec4f {
    return x;
}
#endif

fn sum4(x: vec4f) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

// acc + (a·b0, a·b1, a·b2, a·b3)
fn dot4(a: vec4f, b0: vec4f, b1: vec4f, b2: vec4f, b3: vec4f, acc: vec4f) -> vec4f {
    let x = fma(vec4f(a.x), vec4f(b0.x, b1.x, b2.x, b3.x), acc);
    let y = fma(vec4f(a.y), vec4f(b0.y, b1.y, b2.y, b3.y), x);
    let z = fma(vec4f(a.z), vec4f(b0.z, b1.z, b2.z, b3.z), y);
    return fma(vec4f(a.w), vec4f(b0.w, b1.w, b2.w, b3.w), z);
}

// x with 0 for the elements from `count` on.
fn first_elements(x: vec4f, count: u32) -> vec4f {
    return select(vec4f(), x, vec4u(0u, 1u, 2u, 3u) < vec4u(count));
}
