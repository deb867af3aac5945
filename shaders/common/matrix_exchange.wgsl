// Elements of matrices through workgroup memory, in WGSL alone: each subgroup stores its accumulators there and reads
// numbers, stores numbers and loads left operands. It has room for a row of matrices, M by KEYS, of f32 and of f16. A
// lane's numbers all lie in one row, four at a time in one vector, and the lanes of a row are neighbours
// (MatrixLayout::rows in src/elements.rs).
//
// The barriers between are the caller's. Rows are eight elements longer than KEYS, which keeps them on different banks.
#include "common/matrix_layout.wgsl"

alias Lane = array<f32, ELEMENTS>;
const EXCHANGE_STRIDE = (KEYS + 8u) / WIDTH;
const EXCHANGE = M * EXCHANGE_STRIDE;
var<workgroup> sums: array<Sums, SUBGROUPS * EXCHANGE>;
var<workgroup> halves: array<Halves, SUBGROUPS * EXCHANGE>;

// Matrix c of the row, from and to whole matrices.
fn put_accumulator(x: Accumulator, subgroup: u32, c: u32) {
    let place = subgroup * EXCHANGE + c * M / WIDTH;
    coopStoreT(x, &sums[place], EXCHANGE_STRIDE);
}

fn get_accumulator(subgroup: u32) -> Accumulator {
    let place = subgroup * EXCHANGE;
    return coopLoadT<Accumulator>(&sums[place], EXCHANGE_STRIDE);
}

fn get_left(subgroup: u32, c: u32) -> Left {
    let place = subgroup * EXCHANGE + c * M / WIDTH;
    return coopLoadT<Left>(&halves[place], EXCHANGE_STRIDE);
}

// The same, a lane's elements: place of element e, and of the three that follow.
fn exchange_place(subgroup: u32, lane: u32, c: u32, e: u32) -> u32 {
    let row = subgroup * M + row_of(lane, 0u);
    return row * EXCHANGE_STRIDE + (c * M + column_of(lane, 0u) + column_of(0u, e)) / WIDTH;
}

fn get_elements(subgroup: u32, lane: u32, c: u32) -> Lane {
    var x: Lane;
    for (var e = 0u; e < ELEMENTS; e += WIDTH) {
        let y = sums[exchange_place(subgroup, lane, c, e)];
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

fn put_elements(x: Lane, subgroup: u32, lane: u32, c: u32) {
    for (var e = 0u; e < ELEMENTS; e += WIDTH) {
#if SCALARS
        let y = x[e];
#else
        let y = vec4f(x[e], x[e + 1u], x[e + 2u], x[e + 3u]);
#endif
        halves[exchange_place(subgroup, lane, c, e)] = Halves(y);
    }
}

fn scale_elements(subgroup: u32, lane: u32, factor: f32) {
    for (var e = 0u; e < ELEMENTS; e += WIDTH) {
        sums[exchange_place(subgroup, lane, 0u, e)] *= factor;
    }
}

fn exchanged(x: Accumulator, subgroup: u32, lane: u32) -> Lane {
    subgroupBarrier();
    put_accumulator(x, subgroup, 0u);
    subgroupBarrier();
    return get_elements(subgroup, lane, 0u);
}

fn exchange_ones(subgroup: u32, lane: u32) -> Right {
    var x: Lane;
    for (var e = 0u; e < ELEMENTS; e++) {
        x[e] = 1.0;
    }
    put_elements(x, subgroup, lane, 0u);
    subgroupBarrier();
    let place = subgroup * EXCHANGE;
    return coopLoadT<Right>(&halves[place], EXCHANGE_STRIDE);
}
