// Scores as outer products over CHUNK columns of two operands in workgroup memory. A thread has $vectors vectors of four rows of the
// operand at 0, whose columns have $count4 vectors, by four times $others rows of the operand at $at, whose columns have $other_count4.
// Needs: columns.wgsl, CHUNK, THREADS_X, THREADS_Y, tiles. Gives: Scores, add_scores.

alias Scores = array<array<vec4f, $vectors>, 4u * $others>;

fn add_scores(scores: ptr<function, Scores>, ty: u32, tx: u32) {
#if WRITTEN_OUT
#unroll
#endif
    for (var d = 0u; d < CHUNK; d++) {
        var b = array<vec4f, $vectors>();
        for (var r = 0u; r < $vectors; r++) {
            b[r] = tiles[column_at(d, $count4) + r * THREADS_Y + ty];
        }
        for (var c = 0u; c < $others; c++) {
            let a = tiles[$at + column_at(d, $other_count4) + c * THREADS_X + tx];
#if SERPENTINE
            // Serpentine: even e go up through b, odd e go down. Neighbouring multiply-adds then share an operand, which NVIDIA's
            // operand cache keeps. The register file delivers two operands a cycle.
            for (var e = 0u; e < 4u; e += 2u) {
                for (var r = 0u; r < $vectors; r++) {
                    (*scores)[4u * c + e][r] = fma(vec4f(a[e]), b[r], (*scores)[4u * c + e][r]);
                }
                for (var n = 1u; n <= $vectors; n++) {
                    let r = $vectors - n;
                    let sum = (*scores)[4u * c + e + 1u][r].wzyx;
                    (*scores)[4u * c + e + 1u][r] = fma(vec4f(a[e + 1u]), b[r].wzyx, sum).wzyx;
                }
            }
#else
            for (var e = 0u; e < 4u; e++) {
                for (var r = 0u; r < $vectors; r++) {
                    (*scores)[4u * c + e][r] = fma(vec4f(a[e]), b[r], (*scores)[4u * c + e][r]);
                }
            }
#endif
        }
    }
}
