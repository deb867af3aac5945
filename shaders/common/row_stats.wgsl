// What backward_delta.wgsl leaves of each row: lse and delta, as bits, [batch, heads, seqlen_q] of this launch. Behind them, where the
// problem has lengths, are the numbers of valid queries and keys of each batch entry. Kernels then need no binding for lengths.
#if LENGTHS_IN_ROWS
// What is only read is the same for all threads, as loops with barriers want it of a length.
@group(0) @binding(7) var<storage, read> rows: array<vec2u>;
#else
@group(0) @binding(7) var<storage, $access> rows: array<vec2u>;
#endif

// lse and delta of a row.
fn row_stats(row: u32) -> vec2f {
    return bitcast<vec2f>(rows[row]);
}
