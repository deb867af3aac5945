// What backward_delta.wgsl leaves of each row: lse and delta, as bits, [batch, heads, seqlen_q] of this launch. Behind them, where the
// problem has lengths, are the numbers of valid queries and keys of each batch entry. Kernels then need no binding for lengths.
// Behind those, for f32 and bf16 on matrices, is what coop_ranges.wgsl says of each head.
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
