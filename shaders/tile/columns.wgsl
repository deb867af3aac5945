// Columns in workgroup memory, CHUNK of them at a time, as vectors of four rows. Threads that load neighbouring columns of the same rows
// store them at the same time, and would all meet in one bank; so a gap follows each four columns.
// Needs: CHUNK4, tiles. Gives: GAP, GAPS, column_at, store_columns.

const GAP = max(8u / CHUNK4, 1u);
const GAPS = CHUNK4 * GAP;

// Where column d begins, if columns have `count` vectors.
fn column_at(d: u32, count: u32) -> u32 {
    return d * count + d / 4u * GAP;
}

// Stores the t-th four rows by four columns of a chunk, each of y being a row, as vectors of four rows: threads must not write to
// the same vector. The columns lie at `at`, with `count` vectors each.
fn store_columns(y: array<vec4f, 4>, at: u32, count: u32, t: u32) {
    // column_at(4 (t % CHUNK4) + e), but one sum for all of e.
    let place = at + t % CHUNK4 * (4u * count + GAP) + t / CHUNK4;
    for (var e = 0u; e < 4u; e++) {
        tiles[place + e * count] = vec4f(y[0][e], y[1][e], y[2][e], y[3][e]);
    }
}
