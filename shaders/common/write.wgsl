// Stores x as elements d .. d + 4 of the row of $tensor that starts at element `start` and has `dim` elements, as far
// as they are in the row.
#if ALIGNED
fn write_$tensor(start: u32, d: u32, dim: u32, x: vec4f) {
    if d < dim {
#if ELEMENT_F32
        $tensor[(start + d) / 4u] = x;
#else
        $tensor[(start + d) / 4u] = pack4(x);
#endif
    }
}
#else
fn write_$tensor(start: u32, d: u32, dim: u32, x: vec4f) {
    for (var c = 0u; c < min(4u, max(d, dim) - d); c++) {
        write_one_$tensor(start + d + c, x[c]);
    }
}

fn write_one_$tensor(e: u32, x: f32) {
#if ELEMENT_F32
    $tensor[e] = x;
#else
    // Half a word: the other half may belong to another row, or to the caller, and is left as it is.
    let shift = (e & 1u) * 16u;
    atomicAnd(&$tensor[e / 2u], ~(0xffffu << shift));
    atomicOr(&$tensor[e / 2u], pack1(x) << shift);
#endif
}
#endif
