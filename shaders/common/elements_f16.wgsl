// Elements d .. d + 4 of the row of $tensor that starts at element `start` and has `dim` elements. As in read.wgsl, what
// would be past the row's end is some other element of it.
fn read_$tensor(start: u32, d: u32, dim: u32) -> vec4<f16> {
#if ALIGNED
    return $tensor[(start + min(d, dim - 4u)) / 4u];
#else
    let e = start + min(vec4u(d) + vec4u(0u, 1u, 2u, 3u), vec4u(dim - 1u));
    return vec4<f16>($tensor[e.x], $tensor[e.y], $tensor[e.z], $tensor[e.w]);
#endif
}
