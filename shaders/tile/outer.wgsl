// $result += what is in workgroup memory at $from from line l0 on, times the $lines lines at $at: 4 $vectors rows of $columns vectors
// a thread, as outer products.
fn add_to_$result($result: ptr<function, array<array<vec4f, $columns>, 4u * $vectors>>, l0: u32, ty: u32, tx: u32) {
#if WRITTEN_OUT
#unroll
#endif
    for (var l = 0u; l < $lines; l++) {
        var b = array<vec4f, $columns>();
        for (var u = 0u; u < $columns; u++) {
            b[u] = tiles[$at + l * $columns * THREADS_X + u * THREADS_X + tx];
        }
        for (var r = 0u; r < $vectors; r++) {
            let a = tiles[$from + (l0 + l) * $stride + r * THREADS_Y + ty];
#if THERE_AND_BACK
            // As in tile/scores.wgsl.
            for (var e = 0u; e < 4u; e += 2u) {
                for (var u = 0u; u < $columns; u++) {
                    (*$result)[4u * r + e][u] = fma(vec4f(a[e]), b[u], (*$result)[4u * r + e][u]);
                }
                for (var n = 1u; n <= $columns; n++) {
                    let u = $columns - n;
                    let sum = (*$result)[4u * r + e + 1u][u].wzyx;
                    (*$result)[4u * r + e + 1u][u] = fma(vec4f(a[e + 1u]), b[u].wzyx, sum).wzyx;
                }
            }
#else
            for (var e = 0u; e < 4u; e++) {
                for (var u = 0u; u < $columns; u++) {
                    (*$result)[4u * r + e][u] = fma(vec4f(a[e]), b[u], (*$result)[4u * r + e][u]);
                }
            }
#endif
        }
    }
}
