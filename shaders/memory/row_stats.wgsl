// What earlier kernels leave of a launch's rows, batch entries and heads, one after the other in one buffer:
// - in the backward pass lse and delta of each row, as bits, [batch, heads, seqlen_q] (backward_delta.wgsl);
// - where the problem has lengths, the numbers of valid queries and keys of each batch entry, so that kernels need no binding for lengths;
// - for f32 and scaled bf16 on matrices, the range of each head (coop_ranges.wgsl).
// Needs: problem.wgsl. Gives: rows, row_stats.
#if LENGTHS_IN_ROWS
// Read only: a browser takes a length from it as the bound of a loop with barriers, which it does not from a buffer that may be
// written.
@group(0) @binding(7) var<storage, read> rows: array<vec2u>;
#else
@group(0) @binding(7) var<storage, $access> rows: array<vec2u>;
#endif

// lse and delta of a row.
fn row_stats(row: u32) -> vec2f {
    return bitcast<vec2f>(rows[row]);
}
