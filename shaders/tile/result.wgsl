// result += scores · rows of the step, both in workgroup memory. The rows are first .. first + BLOCK of the step; a thread has $columns
// vectors of columns of the result.
// Needs: products.wgsl. Gives: add_result_$columns.

fn add_result_$columns(result: ptr<function, array<array<vec4f, $columns>, TR>>, first: u32, ty: u32, tx: u32) {
#unroll
    for (var k = 0u; k < BLOCK4; k++) {
        var b = array<array<vec4f, $columns>, 4>();
        for (var n = 0u; n < 4u; n++) {
            for (var u = 0u; u < $columns; u++) {
                b[n][u] = tiles[BLOCK_AT + (4u * k + n) * $columns * THREADS_X + u * THREADS_X + tx];
            }
        }
        for (var r = 0u; r < TR; r++) {
            let p = tiles[(r * THREADS_Y + ty) * P_STRIDE + first / 4u + k];
            for (var u = 0u; u < $columns; u++) {
                let x = fma(vec4f(p.x), b[0][u], (*result)[r][u]);
                let y = fma(vec4f(p.y), b[1][u], x);
                let z = fma(vec4f(p.z), b[2][u], y);
                (*result)[r][u] = fma(vec4f(p.w), b[3][u], z);
            }
        }
    }
}
