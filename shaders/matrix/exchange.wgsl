// Elements of matrices through workgroup memory, in WGSL alone: accumulators are stored and numbers read; numbers are stored and left
// operands loaded. There is room for SUM_BLOCKS rows of matrices, M by $columns, in f32, and for HALF_BLOCKS in f16; `block` counts them
// through the workgroup. A lane's numbers all lie in one row, four at a time in one vector, and the lanes of a row are neighbours
// (MatrixLayout::rows in src/matrices/).
// Needs: matrices.wgsl, SUM_BLOCKS, HALF_BLOCKS. Gives: Lane, put_accumulator, get_accumulator, get_left, get_right, get_elements,
// put_elements, scale_elements.
//
// Callers put workgroupBarrier between writes and reads: what naga writes for subgroupBarrier orders no memory. Rows are eight elements
// longer than $columns, which keeps them on different banks.
#include "matrix/layout.wgsl"

alias Lane = array<f32, ELEMENTS>;
const EXCHANGE_STRIDE = ($columns + 8u) / WIDTH;
const EXCHANGE_SIZE = M * EXCHANGE_STRIDE;
var<workgroup> sums: array<Sums, SUM_BLOCKS * EXCHANGE_SIZE>;
var<workgroup> halves: array<Halves, HALF_BLOCKS * EXCHANGE_SIZE>;

// Matrix c of a block, from and to whole matrices.
fn put_accumulator(x: Accumulator, block: u32, c: u32) {
    let place = block * EXCHANGE_SIZE + c * M / WIDTH;
    coopStoreT(x, &sums[place], EXCHANGE_STRIDE);
}

fn get_accumulator(block: u32) -> Accumulator {
    let place = block * EXCHANGE_SIZE;
    return coopLoadT<Accumulator>(&sums[place], EXCHANGE_STRIDE);
}

fn get_left(block: u32, c: u32) -> Left {
    let place = block * EXCHANGE_SIZE + c * M / WIDTH;
    return coopLoadT<Left>(&halves[place], EXCHANGE_STRIDE);
}

fn get_right(block: u32) -> Right {
    let place = block * EXCHANGE_SIZE;
    return coopLoadT<Right>(&halves[place], EXCHANGE_STRIDE);
}

// The place of a lane's element e of matrix c of a block, and of the three elements that follow it.
fn exchange_place(block: u32, c: u32, lane: u32, e: u32) -> u32 {
    let row = block * M + row_of(lane, 0u);
    return row * EXCHANGE_STRIDE + (c * M + column_of(lane, 0u) + column_of(0u, e)) / WIDTH;
}

fn get_elements(block: u32, c: u32, lane: u32) -> Lane {
    var x: Lane;
    for (var e = 0u; e < ELEMENTS; e += WIDTH) {
        let y = sums[exchange_place(block, c, lane, e)];
#if SCALARS
        x[e] = y;
#else
        x[e] = y.x;
        x[e + 1u] = y.y;
        x[e + 2u] = y.z;
        x[e + 3u] = y.w;
#endif
    }
    return x;
}

fn put_elements(x: Lane, block: u32, c: u32, lane: u32) {
    for (var e = 0u; e < ELEMENTS; e += WIDTH) {
#if SCALARS
        halves[exchange_place(block, c, lane, e)] = half_of(x[e]);
#else
        halves[exchange_place(block, c, lane, e)] = half4_of(vec4f(x[e], x[e + 1u], x[e + 2u], x[e + 3u]));
#endif
    }
}

fn scale_elements(factor: f32, block: u32, lane: u32) {
    for (var e = 0u; e < ELEMENTS; e += WIDTH) {
        sums[exchange_place(block, 0u, lane, e)] *= factor;
    }
}
