// Tiles of K and V on their way from device memory to the workgroup memory that matrices are loaded from: the array
// `tiles` of the kernel, where K comes first.
const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
// How many times eight elements are in a row, and how far apart rows are. The eight elements between rows keep the rows
// of a matrix on different banks.
const D8 = DM * M / 8u;
const V8 = VM * M / 8u;
const K_STRIDE = (DM * M + 8u) / WIDTH;
const V_STRIDE = (VM * M + 8u) / WIDTH;
const K_SIZE = KEYS * K_STRIDE;
const V_SIZE = KEYS * V_STRIDE;
// What each thread moves.
const K_LOADS = (KEYS * D8 + THREADS - 1u) / THREADS;
const V_LOADS = (KEYS * V8 + THREADS - 1u) / THREADS;
// Where maxima start: below every score and above every masked one. So no row takes its maximum from masked scores,
// whose product with the factor is rounded: exp2 of that rounding error, of a number as large as 1e15, may overflow.
const EMPTY = -1.0e14;

fn store_eight(place: u32, x: Eight) {
#if SCALARS
    for (var c = 0u; c < 4u; c++) {
        tiles[place + c] = x.low[c];
        tiles[place + 4u + c] = x.high[c];
    }
#else
    tiles[place] = x.low;
    tiles[place + 1u] = x.high;
#endif
}

fn load_key(start: u32, j0: u32, last: u32, thread: u32) -> array<Eight, K_LOADS> {
    var x: array<Eight, K_LOADS>;
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_key(start + min(j0 + t / D8, last) * problem.key.row, 8u * (t % D8), HEAD_DIM);
    }
    return x;
}

fn load_value(start: u32, j0: u32, last: u32, thread: u32) -> array<Eight, V_LOADS> {
    var x: array<Eight, V_LOADS>;
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_value(start + min(j0 + t / V8, last) * problem.value.row, 8u * (t % V8), HEAD_DIM_V);
    }
    return x;
}

fn store_key(k: array<Eight, K_LOADS>, buffer: u32, thread: u32) {
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * D8 {
            store_eight(buffer * K_SIZE + t / D8 * K_STRIDE + 8u / WIDTH * (t % D8), k[n]);
        }
    }
}

fn store_value(v: array<Eight, V_LOADS>, buffer: u32, thread: u32) {
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * V8 {
            store_eight(BUFFERS * K_SIZE + buffer * V_SIZE + t / V8 * V_STRIDE + 8u / WIDTH * (t % V8), v[n]);
        }
    }
}
