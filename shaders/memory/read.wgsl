// Reads rows of $tensor, four elements at once.
// Needs: elements.wgsl, the binding $tensor. Gives: read_$tensor, read_vector_$tensor.
//
// Elements d .. d + 4 of the row that starts at element `start` and has `dim` elements, as they are in memory. A read past the row's end
// gives some element of the row: there is no branch, and nothing depends on the value read, so loads overlap with arithmetic before their
// use.
fn read_$tensor(start: u32, d: u32, dim: u32) -> Elements4 {
#if ALIGNED
    return $tensor[(start + min(d, dim - 4u)) / 4u];
#else
    let e = start + min(vec4u(d) + vec4u(0u, 1u, 2u, 3u), vec4u(dim - 1u));
    return Elements4(read_one_$tensor(e.x), read_one_$tensor(e.y), read_one_$tensor(e.z), read_one_$tensor(e.w));
#endif
}

// The same of vector v of a row, with `start` in units of UNIT elements, so that an address is a sum with nothing to divide, and
// with no bound, where aligned, if all vectors asked for are `inside` the row.
fn read_vector_$tensor(start: u32, v: u32, dim: u32, inside: bool) -> Elements4 {
#if ALIGNED
    return $tensor[start + select(min(v, dim / 4u - 1u), v, inside)];
#else
    return read_$tensor(start, 4u * v, dim);
#endif
}

#if !ALIGNED
fn read_one_$tensor(e: u32) -> f32 {
#if ELEMENT_F32
    return $tensor[e];
#else
    return unpack1($tensor[e / 2u], e);
#endif
}
#endif
