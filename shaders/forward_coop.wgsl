// Forward pass on cooperative matrices (tensor cores): the algorithm of forward_tile.wgsl, with f16 products and f32 sums.
// One workgroup computes ROWS rows of one head; each of its subgroups has ROW_MATRICES · M of them to itself, M being the
// size of a matrix.
//
//     m = -inf, l = 0, O = 0
//     for each tile of KEYS keys that some row may see:
//         S = Q K^T                                 f32 accumulators, then plain numbers in the lanes
//         m' = max(m, rowmax score(S)),  l = 2^(m - m') l,  O = 2^(m - m') O
//         P = 2^(score(S) - m')                     f16 left operands
//         l = l + rowsum P,  O = O + P V
//     O = O / l,  lse = ln 2 (m + log2 l),          maxima being in base 2
//
// Two forms. With ELEMENT_ACCESS (src/elements.rs) a lane's numbers are those it holds of the matrices, and P is made from S
// where it lies: nothing leaves the registers. Without, matrices become numbers and numbers matrices in workgroup memory;
// so O is rescaled only when a maximum grew much, and m' may be LAZY below the row's maximum.
enable f16;
enable wgpu_cooperative_matrix;
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"
#include "common/matrices.wgsl"
#include "common/elements_f16.wgsl"

#if READ_WRITE
// The inputs are never written. A compiler may move loads of read-only memory down to where their values are used;
// these stay where they are, ahead of the arithmetic that hides their latency.
@group(0) @binding(1) var<storage, read_write> query: InElements;
@group(0) @binding(2) var<storage, read_write> key: InElements;
@group(0) @binding(3) var<storage, read_write> value: InElements;
#else
@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#endif
@group(0) @binding(4) var<storage, read_write> out: OutElements;
#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
#if ELEMENT_ACCESS
#include "common/matrix_elements.wgsl"
#else
#include "common/matrix_exchange.wgsl"
#endif
#include "common/read_f16.wgsl" tensor=query
#include "common/read_f16.wgsl" tensor=key
#include "common/read_f16.wgsl" tensor=value

fn write_out(start: u32, d: u32, dim: u32, x: Eight) {
#if ALIGNED
    let e = (start + d) / 8u * 2u;
    out[e] = x.low;
    out[e + 1u] = x.high;
#else
    for (var c = 0u; c < min(8u, dim - d); c++) {
        out[start + d + c] = select(x.high[c % 4u], x.low[c % 4u], c < 4u);
    }
#endif
}

const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
const ROWS = SUBGROUPS * ROW_MATRICES * M;
// Rows in workgroup memory: how many times eight elements are there, and how far apart rows are. The eight elements
// between rows keep the rows of a matrix on different banks.
const D8 = DM * M / 8u;
const V8 = VM * M / 8u;
const K_STRIDE = (DM * M + 8u) / WIDTH;
const V_STRIDE = (VM * M + 8u) / WIDTH;
const K_SIZE = KEYS * K_STRIDE;
const V_SIZE = KEYS * V_STRIDE;
// What each thread moves of Q, O, and a tile of K and of V.
const Q_LOADS = (ROWS * D8 + THREADS - 1u) / THREADS;
const O_STORES = (ROWS * V8 + THREADS - 1u) / THREADS;
const K_LOADS = (KEYS * D8 + THREADS - 1u) / THREADS;
const V_LOADS = (KEYS * V8 + THREADS - 1u) / THREADS;
// Where maxima start: below every score and above every masked one. So no row takes its maximum from masked scores, whose
// product with the factor is rounded: exp2 of that rounding error, of a number as large as 1e15, may overflow.
const EMPTY = -1.0e14;
#if !ELEMENT_ACCESS
// How far above m a row's maximum may be, in base 2, before O is rescaled. f16 holds p up to 2^16.
const LAZY = 8.0;
// The keys at which a maximum of some row grew so much that O has to be rescaled.
// Four, since what follows in workgroup memory has to be aligned to 16 bytes.
var<workgroup> grown: array<atomic<i32>, 4>;
// O has a matrix more, of the sums of each row of P as it was multiplied, in f16. Where one key outweighs the others,
// its p is 1 in the other form, and here some number that rounds; divided by the same rounded sum it is 1 again.
#endif

// A tile of K and one of V, or two of each, one in use while the other is filled; before them Q, and after them O.
const TILES = max(BUFFERS * (K_SIZE + V_SIZE), ROWS * max(K_STRIDE, V_STRIDE));
var<workgroup> tiles: array<Halves, TILES>;

#if SCALARS
fn store_eight(place: u32, x: Eight) {
    for (var c = 0u; c < 4u; c++) {
        tiles[place + c] = x.low[c];
        tiles[place + 4u + c] = x.high[c];
    }
}

fn load_eight(place: u32) -> Eight {
    let p = place;
    return Eight(
        vec4<f16>(tiles[p], tiles[p + 1u], tiles[p + 2u], tiles[p + 3u]),
        vec4<f16>(tiles[p + 4u], tiles[p + 5u], tiles[p + 6u], tiles[p + 7u]),
    );
}

fn store_one(row: u32, column: u32, x: f32) {
    tiles[row * V_STRIDE + column] = f16(x);
}
#else
fn store_eight(place: u32, x: Eight) {
    tiles[place] = x.low;
    tiles[place + 1u] = x.high;
}

fn load_eight(place: u32) -> Eight {
    return Eight(tiles[place], tiles[place + 1u]);
}

fn store_one(row: u32, column: u32, x: f32) {
    tiles[row * V_STRIDE + column / 4u][column % 4u] = f16(x);
}
#endif

#if STEP
fn load_key_at(at: array<u32, K_LOADS>, thread: u32) -> array<Eight, K_LOADS> {
    var x: array<Eight, K_LOADS>;
    for (var n = 0u; n < K_LOADS; n++) {
        x[n] = read_key(at[n], 8u * ((thread + n * THREADS) % D8), HEAD_DIM);
    }
    return x;
}
fn load_value_at(at: array<u32, V_LOADS>, thread: u32) -> array<Eight, V_LOADS> {
    var x: array<Eight, V_LOADS>;
    for (var n = 0u; n < V_LOADS; n++) {
        x[n] = read_value(at[n], 8u * ((thread + n * THREADS) % V8), HEAD_DIM_V);
    }
    return x;
}
#endif
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

fn store_tile(k: array<Eight, K_LOADS>, v: array<Eight, V_LOADS>, buffer: u32, thread: u32) {
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * D8 {
            store_eight(buffer * K_SIZE + t / D8 * K_STRIDE + 8u / WIDTH * (t % D8), k[n]);
        }
    }
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * V8 {
            store_eight(BUFFERS * K_SIZE + buffer * V_SIZE + t / V8 * V_STRIDE + 8u / WIDTH * (t % V8), v[n]);
        }
    }
}

@compute @workgroup_size(THREADS)
fn forward(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let at = sequence(group.z, group.y);
    // The last rows first: with a causal mask they take longest.
    let row0 = problem.row_begin + (groups.x - 1u - group.x) * ROWS;
    let row1 = min(row0 + ROWS, problem.row_end);
    let mine = subgroup * ROW_MATRICES * M;
    let query_start = head_start(problem.query, at.batch, at.head_q);
    let key_start = head_start(problem.key, at.batch, at.head_kv);
    let value_start = head_start(problem.value, at.batch, at.head_kv);
    // Scores times this are exponents of 2. It is not negative: a negative scale turns Q around.
    let factor = max(score_factor(), 1.0e-22);
    // Times the factor it is far below EMPTY, whatever the factor.
    let masked = -1.0e15 / factor;

    // Q, with 0 in the columns past the head dimension, so that they add nothing, whatever K has there
    for (var n = 0u; n < Q_LOADS; n++) {
        let t = thread + n * THREADS;
        let i = min(row0 + t / D8, problem.row_end - 1u) - problem.row_begin;
        let d = 8u * (t % D8);
        let x = first_elements(read_query(query_start + i * problem.query.row, d, HEAD_DIM), max(d, HEAD_DIM) - d);
        if t < ROWS * D8 {
            let sign = f16(score_sign());
            store_eight(t / D8 * K_STRIDE + 8u / WIDTH * (t % D8), Eight(x.low * sign, x.high * sign));
        }
    }
    workgroupBarrier();
    var q: array<array<Left, DM>, ROW_MATRICES>;
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
        for (var d = 0u; d < DM; d++) {
            let place = (mine + r * M) * K_STRIDE + d * M / WIDTH;
            q[r][d] = coopLoadT<Left>(&tiles[place], K_STRIDE);
        }
    }
    workgroupBarrier();

    var o: array<array<Accumulator, OM>, ROW_MATRICES>;
    var m: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
    var l: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
        for (var d = 0u; d < OM; d++) {
            o[r][d] = Accumulator();
        }
        for (var h = 0u; h < LANE_ROWS; h++) {
            m[r][h] = EMPTY;
            l[r][h] = 0.0;
        }
    }

#if !ELEMENT_ACCESS
    let ones = exchange_ones(subgroup, lane);
    if thread == 0u {
        atomicStore(&grown[0], -1);
    }
#endif
    let range = key_range(at, i32(row0), i32(row1));
    let first = range.x / i32(KEYS) * i32(KEYS);
    let last = u32(max(at.keys, 1) - 1);
    var key_next: array<Eight, K_LOADS>;
    var value_next: array<Eight, V_LOADS>;
#if AHEAD
    const LEAD = KEYS;
#else
    const LEAD = 0u;
#endif
    if range.x < range.y {
        key_next = load_key(key_start, u32(first), last, thread);
        value_next = load_value(value_start, u32(first) - LEAD, last, thread);
    }
#if STEP
    var key_at: array<u32, K_LOADS>;
    var value_at: array<u32, V_LOADS>;
    let key_last = key_start + last * problem.key.row;
    let value_last = value_start + last * problem.value.row;
    let key_step = KEYS * min(problem.key.row, 0x80000000u / KEYS);
    let value_step = KEYS * min(problem.value.row, 0x80000000u / KEYS);
    for (var n = 0u; n < K_LOADS; n++) {
        key_at[n] = key_start + min(u32(first) + (thread + n * THREADS) / D8, last) * problem.key.row;
    }
    for (var n = 0u; n < V_LOADS; n++) {
        value_at[n] = value_start + min(u32(first) + (thread + n * THREADS) / V8, last) * problem.value.row;
    }
#endif
    if BUFFERS == 2u {
        store_tile(key_next, value_next, 0u, thread);
        workgroupBarrier();
    }
    var buffer = 0u;
#if AHEAD
    var s: array<array<Accumulator, KM>, ROW_MATRICES>;
#endif
    for (var j0 = first - i32(LEAD); j0 < range.y; j0 += i32(KEYS)) {
        if BUFFERS == 1u {
            workgroupBarrier();
            store_tile(key_next, value_next, 0u, thread);
            workgroupBarrier();
        }
#if STEP
        for (var n = 0u; n < K_LOADS; n++) {
            key_at[n] += min(key_step, key_last - key_at[n]);
        }
        key_next = load_key_at(key_at, thread);
#if AHEAD
        value_next = load_value_at(value_at, thread);
#endif
        for (var n = 0u; n < V_LOADS; n++) {
            value_at[n] += min(value_step, value_last - value_at[n]);
        }
#if !AHEAD
        value_next = load_value_at(value_at, thread);
#endif
#else
        key_next = load_key(key_start, u32(j0) + KEYS + LEAD, last, thread);
        value_next = load_value(value_start, u32(j0) + KEYS, last, thread);
#endif

#if !AHEAD
        // S = Q K^T
        var s: array<array<Accumulator, KM>, ROW_MATRICES>;
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
            for (var c = 0u; c < KM; c++) {
                s[r][c] = Accumulator();
            }
        }
#unroll
        for (var d = 0u; d < DM; d++) {
#unroll
            for (var c = 0u; c < KM; c++) {
                let place = buffer * K_SIZE + c * M * K_STRIDE + d * M / WIDTH;
                let k = coopLoad<Right>(&tiles[place], K_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    s[r][c] = coopMultiplyAdd(q[r][d], k, s[r][c]);
                }
            }
        }
#endif
        var x: array<array<Lane, KM>, ROW_MATRICES>;
#if ELEMENT_ACCESS
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < KM; c++) {
                x[r][c] = elements_of(s[r][c]);
            }
        }
#else
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
            for (var c = 0u; c < KM; c++) {
                put_accumulator(s[r][c], subgroup, c);
            }
            subgroupBarrier();
#unroll
            for (var c = 0u; c < KM; c++) {
                x[r][c] = get_elements(subgroup, lane, c);
            }
            subgroupBarrier();
        }
#endif

        // What each score is, and whether it counts
#if SOFTCAP
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < KM; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[r][c][e] = score_shape(x[r][c][e]);
                }
            }
        }
#endif
        let full = tile_is_full(at, i32(row0), i32(row1), j0, j0 + i32(KEYS));
        if !full {
            for (var r = 0u; r < ROW_MATRICES; r++) {
                for (var c = 0u; c < KM; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let i = i32(row0 + mine + r * M + row_of(lane, 0u) + row_of(0u, e));
                        let j = j0 + i32(c * M + column_of(lane, 0u) + column_of(0u, e));
                        x[r][c][e] = select(masked, x[r][c][e], keep(at, i, j));
                    }
                }
            }
        }

#if AHEAD
        // S = Q K^T
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
            for (var c = 0u; c < KM; c++) {
                s[r][c] = Accumulator();
            }
        }
#unroll
        for (var d = 0u; d < DM; d++) {
#unroll
            for (var c = 0u; c < KM; c++) {
                let place = buffer * K_SIZE + c * M * K_STRIDE + d * M / WIDTH;
                let k = coopLoad<Right>(&tiles[place], K_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    s[r][c] = coopMultiplyAdd(q[r][d], k, s[r][c]);
                }
            }
        }
#endif
        // m' = max(m, rowmax S),  l = 2^(m - m') l,  O = 2^(m - m') O
#if !ELEMENT_ACCESS
        var shrinks: array<f32, ROW_MATRICES>;
#endif
        for (var r = 0u; r < ROW_MATRICES; r++) {
            var most: array<f32, LANE_ROWS>;
            for (var h = 0u; h < LANE_ROWS; h++) {
                most[h] = masked;
            }
            for (var c = 0u; c < KM; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    most[held_row(e)] = max(most[held_row(e)], x[r][c][e]);
                }
            }
#if ELEMENT_ACCESS
            var shrink: array<f32, LANE_ROWS>;
            for (var h = 0u; h < LANE_ROWS; h++) {
                let larger = max(m[r][h], row_max(most[h]) * factor);
                shrink[h] = exp2(m[r][h] - larger);
                m[r][h] = larger;
                l[r][h] *= shrink[h];
            }
            for (var d = 0u; d < VM; d++) {
                var y = elements_of(o[r][d]);
                for (var e = 0u; e < ELEMENTS; e++) {
                    y[e] *= shrink[held_row(e)];
                }
                o[r][d] = accumulator(y);
            }
#else
            let larger = row_max(most[0]) * factor;
            let grows = larger > m[r][0] + LAZY;
            shrinks[r] = select(1.0, exp2(m[r][0] - larger), grows);
            m[r][0] = select(m[r][0], larger, grows);
            l[r][0] *= shrinks[r];
            if grows {
                atomicStore(&grown[0], j0);
            }
#endif
        }

        // P = 2^(S - m'),  l = l + rowsum P
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < KM; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    let p = exp2(fma(x[r][c][e], factor, -m[r][held_row(e)]));
                    x[r][c][e] = p;
                    l[r][held_row(e)] += p;
                }
            }
        }
#if !ELEMENT_ACCESS
        var p_matrices: array<array<Left, KM>, ROW_MATRICES>;
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
            for (var c = 0u; c < KM; c++) {
                put_elements(x[r][c], subgroup, lane, c);
            }
            subgroupBarrier();
#unroll
            for (var c = 0u; c < KM; c++) {
                p_matrices[r][c] = get_left(subgroup, c);
            }
            subgroupBarrier();
        }

        // O through workgroup memory, where a maximum grew: in all subgroups or in none, since all meet at its barriers.
        workgroupBarrier();
        for (var once = u32(atomicLoad(&grown[0]) == j0); once > 0u; once--) {
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                for (var d = 0u; d < OM; d++) {
                    put_accumulator(o[r][d], subgroup, 0u);
                    subgroupBarrier();
                    scale_elements(subgroup, lane, shrinks[r]);
                    subgroupBarrier();
                    o[r][d] = get_accumulator(subgroup);
                    subgroupBarrier();
                }
            }
        }
#endif

        // O = O + P V
#unroll
        for (var c = 0u; c < KM; c++) {
            var p: array<Left, ROW_MATRICES>;
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
#if ELEMENT_ACCESS
                p[r] = left(x[r][c]);
#else
                p[r] = p_matrices[r][c];
#endif
            }
#unroll
            for (var d = 0u; d < VM; d++) {
                let place = BUFFERS * K_SIZE + buffer * V_SIZE + c * M * V_STRIDE + d * M / WIDTH;
                let v = coopLoadT<Right>(&tiles[place], V_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    o[r][d] = coopMultiplyAdd(p[r], v, o[r][d]);
                }
            }
#if !ELEMENT_ACCESS
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
                o[r][VM] = coopMultiplyAdd(p[r], ones, o[r][VM]);
            }
#endif
        }

        if BUFFERS == 2u {
            buffer = 1u - buffer;
            store_tile(key_next, value_next, buffer, thread);
            workgroupBarrier();
        }
    }
    workgroupBarrier();

    // O / l to workgroup memory, then out in whole rows
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
        for (var h = 0u; h < LANE_ROWS; h++) {
            // The largest p of a row is 1 up to the rounding of m, or more, so a row with keys is told from an empty one by m.
            l[r][h] = select(max(row_sum(l[r][h]), 0.5), 0.0, m[r][h] == EMPTY);
        }
#if !ELEMENT_ACCESS
        let sum = exchanged(o[r][VM], subgroup, lane);
#endif
#unroll
        for (var d = 0u; d < VM; d++) {
#if ELEMENT_ACCESS
            let y = elements_of(o[r][d]);
#else
            let y = exchanged(o[r][d], subgroup, lane);
#endif
            for (var e = 0u; e < ELEMENTS; e++) {
                let row = mine + r * M + row_of(lane, 0u) + row_of(0u, e);
                let column = d * M + column_of(lane, 0u) + column_of(0u, e);
#if ELEMENT_ACCESS
                let inverse = inverse_sum(l[r][held_row(e)]);
#else
                let inverse = inverse_sum(select(sum[0], 0.0, m[r][0] == EMPTY));
#endif
                store_one(row, column, y[e] * inverse);
            }
        }
#if LSE
        for (var e = 0u; e < ELEMENTS; e++) {
            let i = row0 + mine + r * M + row_of(lane, e);
            if column_of(lane, e) == 0u && i < row1 {
                let h = held_row(e);
                lse[head_start(problem.lse, at.batch, at.head_q) + i - problem.row_begin] = lse_bits(m[r][h] / LOG2_E, l[r][h]);
            }
        }
#endif
    }
    workgroupBarrier();
    for (var n = 0u; n < O_STORES; n++) {
        let t = thread + n * THREADS;
        let i = row0 + t / V8;
        let d = 8u * (t % V8);
        if t < ROWS * V8 && i < row1 && d < HEAD_DIM_V {
            let start = head_start(problem.out, at.batch, at.head_q) + (i - problem.row_begin) * problem.out.row;
            let place = t / V8 * V_STRIDE + 8u / WIDTH * (t % V8);
            write_out(start, d, HEAD_DIM_V, load_eight(place));
        }
    }
}
