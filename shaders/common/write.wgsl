// Stores the first `count` of four consecutive elements of $tensor from element e on.
#if ALIGNED
// e is a multiple of 4, and count is 0 or at least 4.
fn write_$tensor(e: u32, count: u32, x: vec4f) {
    if count > 0u {
#if ELEMENT_F32
        $tensor[e / 4u] = x;
#else
        $tensor[e / 4u] = pack4(x);
#endif
    }
}
#else
fn write_$tensor(e: u32, count: u32, x: vec4f) {
    if count > 0u {
        write_one_$tensor(e, x.x);
    }
    if count > 1u {
        write_one_$tensor(e + 1u, x.y);
    }
    if count > 2u {
        write_one_$tensor(e + 2u, x.z);
    }
    if count > 3u {
        write_one_$tensor(e + 3u, x.w);
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
