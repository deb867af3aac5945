// Two elements of f16 or bf16 in a word.
// Needs: nothing. Gives: unpack2, pack2.
#if ELEMENT_F16
fn unpack2(word: u32) -> vec2f {
    return unpack2x16float(word);
}

fn pack2(x: vec2f) -> u32 {
    return pack2x16float(x);
}
#else
fn unpack2(word: u32) -> vec2f {
    return vec2f(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}

// Round to nearest, ties to even.
fn pack2(x: vec2f) -> u32 {
    let bits = bitcast<vec2u>(x);
    let rounded = (bits + 0x7fffu + ((bits >> vec2u(16u)) & vec2u(1u))) >> vec2u(16u);
    return rounded.x | (rounded.y << 16u);
}
#endif
