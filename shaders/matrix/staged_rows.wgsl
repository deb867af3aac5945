// Rows of Q on their way to registers, and of O on their way out. A workgroup's rows pass through workgroup memory one matrix of rows of each
// subgroup at a time, in blocks of columns: Q_BLOCK, or O_BLOCK, matrices. All rows and columns at once might not fit.
// Needs: coop_tiles.wgsl, rows_in.wgsl, ROWS, ROW_MATRICES, HEAD_DIM, Q_HELD, Q_REST, Q_BLOCK, O_BLOCK; REST_AT, where workgroup memory keeps
// the Q_REST matrices of Q. Gives: STAGED, staged_row, stage_query, O_STORES, O8; Q_STRIDE, O_STRIDE, REST_STRIDE; with QUERY_IN_MEMORY store_rest.

const STAGED = SUBGROUPS * M;
// How many times eight elements a row of a block has, and how far apart rows are.
const Q8 = Q_BLOCK * M / 8u;
const O8 = O_BLOCK * M / 8u;
const Q_STRIDE = (Q_BLOCK * M + 8u) / WIDTH;
const O_STRIDE = (O_BLOCK * M + 8u) / WIDTH;
// How many times eight elements each thread moves of a block.
const Q_MOVES = (STAGED * Q8 + THREADS - 1u) / THREADS;
const O_STORES = (STAGED * O8 + THREADS - 1u) / THREADS;

// The row of the workgroup that is the n-th of those staged, which are the r-th matrices of the subgroups.
fn staged_row(n: u32, r: u32) -> u32 {
    return (n / M * ROW_MATRICES + r) * M + n % M;
}

// Stores the b-th block of columns of Q, with 0 in the columns past the head dimension, so that they add nothing, whatever they are
// multiplied with.
fn stage_query(at: Sequence, row0: u32, r: u32, b: u32, thread: u32) {
    for (var n = 0u; n < Q_MOVES; n++) {
        let t = thread + n * THREADS;
        let row = query_row(at, min(row0 + staged_row(t / Q8, r), last_query(at)));
        let d = b * Q_BLOCK * M + 8u * (t % Q8);
        let x = first_elements(read_query(row, d, HEAD_DIM), max(d, HEAD_DIM) - d);
        if t < STAGED * Q8 {
            store_eight(t / Q8 * Q_STRIDE + 8u / WIDTH * (t % Q8), x);
        }
    }
}

#if QUERY_IN_MEMORY
const REST8 = Q_REST * M / 8u;
const REST_STRIDE = (Q_REST * M + 8u) / WIDTH;
const REST_MOVES = (ROWS * REST8 + THREADS - 1u) / THREADS;

// Stores the Q_REST matrices of Q, which workgroup memory keeps for the whole loop.
fn store_rest(at: Sequence, row0: u32, thread: u32) {
    for (var n = 0u; n < REST_MOVES; n++) {
        let t = thread + n * THREADS;
        let row = query_row(at, min(row0 + t / REST8, last_query(at)));
        let d = Q_HELD * M + 8u * (t % REST8);
        let x = first_elements(read_query(row, d, HEAD_DIM), max(d, HEAD_DIM) - d);
        if t < ROWS * REST8 {
            store_eight(REST_AT + t / REST8 * REST_STRIDE + 8u / WIDTH * (t % REST8), x);
        }
    }
}
#else
const REST_STRIDE = 0u;
#endif
