// Stores x as elements d .. d + 8 of the row of $tensor that starts at element `start` and has `dim` elements, as far as
// they are in the row.
fn write_$tensor(start: u32, d: u32, dim: u32, x: Eight) {
#if ALIGNED
    let e = (start + d) / 8u * 2u;
#if ACCUMULATE
    $tensor[e] += x.low;
    $tensor[e + 1u] += x.high;
#else
    $tensor[e] = x.low;
    $tensor[e + 1u] = x.high;
#endif
#else
    for (var c = 0u; c < min(8u, dim - d); c++) {
        let y = select(x.high[c % 4u], x.low[c % 4u], c < 4u);
#if ACCUMULATE
        $tensor[start + d + c] += y;
#else
        $tensor[start + d + c] = y;
#endif
    }
#endif
}
