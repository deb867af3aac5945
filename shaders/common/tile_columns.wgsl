// Columns in workgroup memory, CHUNK of them at a time, as vectors of four rows. The place of vector n in a column that has
// `count` of them; `column4` is the number of the column, over 4. Threads that load neighbouring columns of the same rows store
// them at the same time, and would all meet in one bank; so each four columns have their vectors in another order.
fn place(n: u32, column4: u32, count: u32) -> u32 {
    const SPREAD = max(8u / CHUNK4, 1u);
    // A number below the largest power of two that divides count.
    let most = min(count & (~count + 1u), 8u) - 1u;
    return n ^ ((column4 * SPREAD) & most);
}

// Stores the t-th four rows by four columns of a chunk, each of y being a row, as vectors of four rows: threads must not write to
// the same vector. The columns lie at `at`, with `count` vectors each.
fn store_columns(y: array<vec4f, 4>, at: u32, count: u32, t: u32) {
    for (var e = 0u; e < 4u; e++) {
        let column = at + (4u * (t % CHUNK4) + e) * count;
        tiles[column + place(t / CHUNK4, t % CHUNK4, count)] = vec4f(y[0][e], y[1][e], y[2][e], y[3][e]);
    }
}
