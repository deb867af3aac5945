// Four consecutive elements of $tensor from element e on, of which the first `count` exist; the others are 0.
#if ALIGNED
// e is a multiple of 4, and count is 0 or at least 4.
fn read_$tensor(e: u32, count: u32) -> vec4f {
    if count == 0u {
        return vec4f();
    }
#if ELEMENT_F32
    return $tensor[e / 4u];
#else
    return unpack4($tensor[e / 4u]);
#endif
}
#else
fn read_$tensor(e: u32, count: u32) -> vec4f {
    var x = vec4f();
    if count > 0u {
        x.x = read_one_$tensor(e);
    }
    if count > 1u {
        x.y = read_one_$tensor(e + 1u);
    }
    if count > 2u {
        x.z = read_one_$tensor(e + 2u);
    }
    if count > 3u {
        x.w = read_one_$tensor(e + 3u);
    }
    return x;
}

fn read_one_$tensor(e: u32) -> f32 {
#if ELEMENT_F32
    return $tensor[e];
#else
    return unpack1($tensor[e / 2u], e);
#endif
}
#endif
