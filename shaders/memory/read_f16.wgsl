// Reads rows of $tensor, eight elements of f16 at once.
// Needs: elements_f16.wgsl, the binding $tensor; where ALIGNED without NO_ELEMENT_ACCESS, coop_bits of matrix/elements.wgsl.
// Gives: read_$tensor.
//
// Elements d .. d + 8 of the row that starts at element `start` and has `dim` elements. As in read.wgsl, a read past the row's end gives
// some element of the row.
fn read_$tensor(start: u32, d: u32, dim: u32) -> Eight {
#if ALIGNED
#if NO_ELEMENT_ACCESS
    let e = (start + min(d, dim - 8u)) / 4u;
    return Eight($tensor[e], $tensor[e + 1u]);
#else
    let x = $tensor[(start + min(d, dim - 8u)) / 8u];
    return Eight(coop_bits(x.xy), coop_bits(x.zw));
#endif
#else
    let e = start + min(vec4u(d) + vec4u(0u, 1u, 2u, 3u), vec4u(dim - 1u));
    let f = start + min(vec4u(d) + vec4u(4u, 5u, 6u, 7u), vec4u(dim - 1u));
    return Eight(
        vec4<f16>($tensor[e.x], $tensor[e.y], $tensor[e.z], $tensor[e.w]),
        vec4<f16>($tensor[f.x], $tensor[f.y], $tensor[f.z], $tensor[f.w]),
    );
#endif
}
