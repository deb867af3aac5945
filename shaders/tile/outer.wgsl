// $result += A B as outer products. A is in workgroup memory from $from on, from line l0 on; B is the $lines lines at $at. A thread has
// 4 $vectors rows by $columns vectors of $result.
// Needs: THREADS_X, THREADS_Y, tiles. Gives: add_to_$result.

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
#if SERPENTINE
            // Serpentine: even e go up through b, odd e go down. Neighbouring multiply-adds then share an operand, which NVIDIA's
            // operand cache keeps. The register file delivers two operands a cycle.
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
