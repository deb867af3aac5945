// Writes rows of $tensor, eight elements of f16 at once.
// Needs: elements_f16.wgsl, matrices.wgsl, the binding $tensor; with ACCUMULATE it is read as well. Gives: write_$tensor.
//
// Stores eight numbers as elements d .. d + 8 of the row that starts at element `start` and has `dim` elements; elements past the row's
// end are left out. With ACCUMULATE, adds the numbers to what is there.
fn write_$tensor(start: u32, d: u32, dim: u32, low: vec4f, high: vec4f) {
#if ALIGNED
    let e = (start + d) / 8u * 2u;
#if ACCUMULATE
    $tensor[e] = half4_of(vec4f($tensor[e]) + low);
    $tensor[e + 1u] = half4_of(vec4f($tensor[e + 1u]) + high);
#else
    $tensor[e] = half4_of(low);
    $tensor[e + 1u] = half4_of(high);
#endif
#else
    for (var c = 0u; c < min(8u, dim - d); c++) {
        let y = select(high[c % 4u], low[c % 4u], c < 4u);
        let e = start + d + c;
#if ACCUMULATE
        $tensor[e] = half_of(f32($tensor[e]) + y);
#else
        $tensor[e] = half_of(y);
#endif
    }
#endif
}
