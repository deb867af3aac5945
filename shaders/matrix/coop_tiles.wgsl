// Moves tiles of $first, whose rows have HEAD_DIM elements, and of $second, whose rows have HEAD_DIM_V, from device memory to registers and
// on to the array `tiles` in workgroup memory, from which matrices are loaded. $first lies before $second. A tile has $rows rows.
// Needs: matrices.wgsl, BUFFERS, SUBGROUPS, ACROSS_DIM, ACROSS_DIM_V, tiles, read_$first, read_$second.
// Gives: LANES, THREADS, D_... and V_... sizes; load_$first, load_$second, store_$first, store_$second.

const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
// How many times eight elements are in a row, and how far apart rows are. The eight elements between rows keep the rows
// of a matrix on different banks.
const D8 = ACROSS_DIM * M / 8u;
const V8 = ACROSS_DIM_V * M / 8u;
const D_STRIDE = (ACROSS_DIM * M + 8u) / WIDTH;
const V_STRIDE = (ACROSS_DIM_V * M + 8u) / WIDTH;
const D_SIZE = $rows * D_STRIDE;
const V_SIZE = $rows * V_STRIDE;
// How many times eight elements each thread loads of a tile.
const D_LOADS = ($rows * D8 + THREADS - 1u) / THREADS;
const V_LOADS = ($rows * V8 + THREADS - 1u) / THREADS;

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

fn load_$first(at: Sequence, i0: u32, last: u32, thread: u32) -> array<Eight, D_LOADS> {
    var x: array<Eight, D_LOADS>;
    for (var n = 0u; n < D_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_$first($first_row(at, min(i0 + t / D8, last)), 8u * (t % D8), HEAD_DIM);
    }
    return x;
}

fn load_$second(at: Sequence, i0: u32, last: u32, thread: u32) -> array<Eight, V_LOADS> {
    var x: array<Eight, V_LOADS>;
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_$second($second_row(at, min(i0 + t / V8, last)), 8u * (t % V8), HEAD_DIM_V);
    }
    return x;
}

fn store_$first(x: array<Eight, D_LOADS>, buffer: u32, thread: u32) {
    for (var n = 0u; n < D_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < $rows * D8 {
            store_eight(buffer * D_SIZE + t / D8 * D_STRIDE + 8u / WIDTH * (t % D8), x[n]);
        }
    }
}

fn store_$second(x: array<Eight, V_LOADS>, buffer: u32, thread: u32) {
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < $rows * V8 {
            store_eight(BUFFERS * D_SIZE + buffer * V_SIZE + t / V8 * V_STRIDE + 8u / WIDTH * (t % V8), x[n]);
        }
    }
}
