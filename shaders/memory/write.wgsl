// Writes rows of $tensor, four elements at once.
// Needs: elements.wgsl, the binding $tensor; with ACCUMULATE it is read as well. Gives: write_$tensor.
//
// Stores x as elements d .. d + 4 of the row that starts at element `start` and has `dim` elements; elements past the row's end are left
// out. With ACCUMULATE, adds x to what is there.
#if ALIGNED
fn write_$tensor(start: u32, d: u32, dim: u32, x: vec4f) {
    if d < dim {
        let e = (start + d) / 4u;
        var y = x;
#if ACCUMULATE
        y += unpack4($tensor[e]);
#endif
#if ELEMENT_F32
        $tensor[e] = y;
#else
        $tensor[e] = pack4(y);
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
    var y = x;
#if ELEMENT_F32
#if ACCUMULATE
    y += $tensor[e];
#endif
    $tensor[e] = y;
#else
#if ACCUMULATE
    y += unpack1(atomicLoad(&$tensor[e / 2u]), e);
#endif
    // Half a word: the other half may belong to another row, or to the caller, and is left as it is.
    let shift = (e & 1u) * 16u;
    atomicAnd(&$tensor[e / 2u], ~(0xffffu << shift));
    atomicOr(&$tensor[e / 2u], pack1(y) << shift);
#endif
}
#endif
