// Scores of one side with the other, as outer products over CHUNK columns of both in workgroup memory: $vectors vectors of four
// rows, of the $count4 vectors at 0, by four times $others rows, of the $other_count4 vectors at $at.
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
#if THERE_AND_BACK
            // Over b there and back, each product shares an operand with the one before, which NVIDIA's registers need not give
            // again: they give two a cycle.
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
