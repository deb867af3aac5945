// What: gradient of Q on cooperative matrices, with f16 (or bf16) products and f32 sums.
//
//     dQ = 0
//     for each tile of KEYS keys that some row may see:
//         S = Q K^T,  dP = dO V^T
//         P = 2^(score(S) - lse)                    lse is an exponent of 2
//         dS = P (dP - delta) score'                f16 left operand, made in the lanes that hold dP
//         dQ = dQ + dS K
//     dQ = scale dQ
//
// With dropout dP is that of what is kept; dS is held without the factor of what is kept (matrix/scores.wgsl).
//
// Who: a workgroup owns ROWS rows of one head. Each of its subgroups has ROW_MATRICES · M of these rows. Where registers do not hold all
//   columns of dQ, a workgroup computes a block of COLUMNS of it; S and dP are then computed once for each block.
// Pipelining: with AHEAD, the next tile of K and V is loaded into registers while the products of this tile run.
// Needs q, k, v, dO, row_stats, and access to elements of matrices. Gives dQ.
enable f16;
enable wgpu_cooperative_matrix;
#include "attention/attention.wgsl"
#include "matrix/matrices.wgsl"
#include "memory/elements_f16.wgsl"

// read_write, though the inputs are never written: see forward_coop.wgsl.
@group(0) @binding(1) var<storage, read_write> query: InElements;
@group(0) @binding(2) var<storage, read_write> key: InElements;
@group(0) @binding(3) var<storage, read_write> value: InElements;
#include "memory/row_stats.wgsl" access=read_write
@group(0) @binding(11) var<storage, read_write> grad_out: InElements;
@group(0) @binding(13) var<storage, read_write> grad_query: OutElements;
#include "matrix/elements.wgsl"
#include "matrix/scores.wgsl" queries=row keys=column together=KEYS
#include "memory/read_f16.wgsl" tensor=query
#include "memory/read_f16.wgsl" tensor=key
#include "memory/read_f16.wgsl" tensor=value
#include "memory/read_f16.wgsl" tensor=grad_out
#include "memory/write_f16.wgsl" tensor=grad_query

const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
const ROWS = SUBGROUPS * ROW_MATRICES * M;
// Matrices across the keys of a tile, the head dimension, the values' dimension, and the columns of a block.
const ACROSS_KEYS = KEYS / M;
const ACROSS_DIM = (HEAD_DIM + M - 1u) / M;
const ACROSS_DIM_V = (HEAD_DIM_V + M - 1u) / M;
const ACROSS_DQ_BLOCK = min(ACROSS_DIM, COLUMNS / M);
const ACROSS_DO_BLOCK = min(ACROSS_DIM_V, COLUMNS / M);
const BLOCKS = (ACROSS_DIM + ACROSS_DQ_BLOCK - 1u) / ACROSS_DQ_BLOCK;
const DO_BLOCKS = (ACROSS_DIM_V + ACROSS_DO_BLOCK - 1u) / ACROSS_DO_BLOCK;
// Rows in workgroup memory, whole rows (D, V) and rows of a block of columns: ..8 counts their groups of eight elements; ..STRIDE is the
// distance of rows in vectors of four. The two vectors between rows keep the rows of a matrix on different banks.
const D8 = ACROSS_DIM * M / 8u;
const V8 = ACROSS_DIM_V * M / 8u;
const DQ8 = ACROSS_DQ_BLOCK * M / 8u;
const DO8 = ACROSS_DO_BLOCK * M / 8u;
const D_STRIDE = 2u * D8 + 2u;
const V_STRIDE = 2u * V8 + 2u;
const DQ_STRIDE = 2u * DQ8 + 2u;
const DO_STRIDE = 2u * DO8 + 2u;
// How many loads each thread does of a block of Q or dQ, of a block of dO, and of a tile of K and of V.
const DQ_LOADS = (ROWS * DQ8 + THREADS - 1u) / THREADS;
const DO_LOADS = (ROWS * DO8 + THREADS - 1u) / THREADS;
const K_LOADS = (KEYS * D8 + THREADS - 1u) / THREADS;
const V_LOADS = (KEYS * V8 + THREADS - 1u) / THREADS;

// Workgroup memory. In the loop: a tile of K and a tile of V. Before the loop: blocks of Q and dO on their way to registers. After the
// loop: dQ on its way to device memory.
const V_AT = KEYS * D_STRIDE;
const TILES = max(V_AT + KEYS * V_STRIDE, ROWS * max(DQ_STRIDE, DO_STRIDE));
var<workgroup> tiles: array<vec4<f16>, TILES>;

fn store_eight(place: u32, x: Eight) {
    tiles[place] = x.low;
    tiles[place + 1u] = x.high;
}

// A block of columns of Q, from column d0 on, and one of dO. Past the head dimension they have 0, so that these columns add
// nothing, whatever K and V have there.
fn store_queries(at: Sequence, row0: u32, last_row: u32, d0: u32, thread: u32) {
    for (var n = 0u; n < DQ_LOADS; n++) {
        let t = thread + n * THREADS;
        let d = d0 + 8u * (t % DQ8);
        let i = min(row0 + t / DQ8, last_row);
        let x = read_query(query_row(at, i), d, HEAD_DIM);
        if t < ROWS * DQ8 {
            store_eight(t / DQ8 * DQ_STRIDE + 2u * (t % DQ8), first_elements(x, max(d, HEAD_DIM) - d));
        }
    }
}

fn store_grads(at: Sequence, row0: u32, last_row: u32, d0: u32, thread: u32) {
    for (var n = 0u; n < DO_LOADS; n++) {
        let t = thread + n * THREADS;
        let d = d0 + 8u * (t % DO8);
        let i = min(row0 + t / DO8, last_row);
        let x = read_grad_out(grad_out_row(at, i), d, HEAD_DIM_V);
        if t < ROWS * DO8 {
            store_eight(t / DO8 * DO_STRIDE + 2u * (t % DO8), first_elements(x, max(d, HEAD_DIM_V) - d));
        }
    }
}

// A tile of keys on its way from device memory to workgroup memory.
struct Tile {
    k: array<Eight, K_LOADS>,
    v: array<Eight, V_LOADS>,
}

fn load_tile(at: Sequence, j0: u32, last: u32, thread: u32) -> Tile {
    var x: Tile;
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        x.k[n] = read_key(key_row(at, min(j0 + t / D8, last)), 8u * (t % D8), HEAD_DIM);
    }
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        x.v[n] = read_value(value_row(at, min(j0 + t / V8, last)), 8u * (t % V8), HEAD_DIM_V);
    }
    return x;
}

fn store_tile(x: Tile, thread: u32) {
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * D8 {
            store_eight(t / D8 * D_STRIDE + 2u * (t % D8), x.k[n]);
        }
    }
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * V8 {
            store_eight(V_AT + t / V8 * V_STRIDE + 2u * (t % V8), x.v[n]);
        }
    }
}

@compute @workgroup_size(THREADS)
fn dq(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    let at = sequence(group.z, group.y);
    // The last rows first: with a causal mask they take longest.
    let row0 = (workgroups.x - 1u - group.x) / BLOCKS * ROWS;
    let row1 = min(row0 + ROWS, problem.seqlen_q);
    let last_row = last_query(at);
    let own_row = subgroup * ROW_MATRICES * M;
    // The first matrix of columns of dQ.
    let dq0 = group.x % BLOCKS * ACROSS_DQ_BLOCK;
    // Held scores times this are exponents of 2.
    let factor = score_factor();

    var q: array<array<Left, BLOCKS * ACROSS_DQ_BLOCK>, ROW_MATRICES>;
    for (var b = 0u; b < BLOCKS; b++) {
        store_queries(at, row0, last_row, b * ACROSS_DQ_BLOCK * M, thread);
        workgroupBarrier();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var d = 0u; d < ACROSS_DQ_BLOCK; d++) {
                let place = (own_row + r * M) * DQ_STRIDE + d * M / 4u;
                q[r][b * ACROSS_DQ_BLOCK + d] = coopLoadT<Left>(&tiles[place], DQ_STRIDE);
            }
        }
        workgroupBarrier();
    }
    var grad: array<array<Left, DO_BLOCKS * ACROSS_DO_BLOCK>, ROW_MATRICES>;
    for (var b = 0u; b < DO_BLOCKS; b++) {
        store_grads(at, row0, last_row, b * ACROSS_DO_BLOCK * M, thread);
        workgroupBarrier();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var d = 0u; d < ACROSS_DO_BLOCK; d++) {
                let place = (own_row + r * M) * DO_STRIDE + d * M / 4u;
                grad[r][b * ACROSS_DO_BLOCK + d] = coopLoadT<Left>(&tiles[place], DO_STRIDE);
            }
        }
        workgroupBarrier();
    }

    var dq: array<array<Accumulator, ACROSS_DQ_BLOCK>, ROW_MATRICES>;
    // lse, in base 2, and delta of the rows that the lane holds.
    var lane_stats: array<array<vec2f, LANE_ROWS>, ROW_MATRICES>;
    for (var r = 0u; r < ROW_MATRICES; r++) {
        for (var d = 0u; d < ACROSS_DQ_BLOCK; d++) {
            dq[r][d] = Accumulator();
        }
        for (var e = 0u; e < ELEMENTS; e++) {
            let i = min(row0 + own_row + r * M + row_of(lane, e), last_row);
            let stats = row_stats(row_number(at, i));
            lane_stats[r][held_row(e)] = vec2f(stats.x * LOG2_E, held_delta(stats.y));
        }
    }

    let visited = key_tiles(at, i32(row0), i32(row1), KEYS);
    let last = last_key(at);
    var next: Tile;
#if AHEAD
    if visited.count > 0 {
        next = load_tile(at, u32(tile(visited, 0)), last, thread);
    }
#endif
    for (var n = 0; n < visited.count; n++) {
        let j0 = tile(visited, n);
        workgroupBarrier();
#if !AHEAD
        next = load_tile(at, u32(j0), last, thread);
#endif
        store_tile(next, thread);
        workgroupBarrier();
#if AHEAD
        next = load_tile(at, u32(tile(visited, n + 1)), last, thread);
#endif

        // What is added to scores, asked for ahead of the products
        var added = array<array<Lane, ACROSS_KEYS>, ROW_MATRICES>();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                added[r][c] = added_lane(at, i32(row0 + own_row + r * M), j0, c, lane);
            }
        }

        // S = Q K^T,  dP = dO V^T
        var s = array<array<Accumulator, ACROSS_KEYS>, ROW_MATRICES>();
        var dp = array<array<Accumulator, ACROSS_KEYS>, ROW_MATRICES>();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                s[r][c] = Accumulator();
                dp[r][c] = Accumulator();
            }
        }
        for (var d = 0u; d < ACROSS_DIM; d++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                let place = c * M * D_STRIDE + d * M / 4u;
                let k = coopLoad<Right>(&tiles[place], D_STRIDE);
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    s[r][c] = coopMultiplyAdd(q[r][d], k, s[r][c]);
                }
            }
        }
        for (var d = 0u; d < ACROSS_DIM_V; d++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                let place = V_AT + c * M * V_STRIDE + d * M / 4u;
                let v = coopLoad<Right>(&tiles[place], V_STRIDE);
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    dp[r][c] = coopMultiplyAdd(grad[r][d], v, dp[r][c]);
                }
            }
        }

        // P = 2^(score(S) - lse),  dS = P (dP - delta) score'
        var p = array<array<Lane, ACROSS_KEYS>, ROW_MATRICES>();
        var ds = array<array<Lane, ACROSS_KEYS>, ROW_MATRICES>();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                let i = i32(row0 + own_row + r * M);
                let scores = shaped(elements_of(s[r][c]), added[r][c], at, i, j0 + i32(c * M), lane);
                ds[r][c] = elements_of(dp[r][c]);
#if DROPOUT
                ds[r][c] = what_is_kept(ds[r][c], kept_lane(at, i, j0 + i32(c * M), c, lane));
#endif
                for (var e = 0u; e < ELEMENTS; e++) {
                    let stats = lane_stats[r][held_row(e)];
                    p[r][c][e] = fma(scores.score[e], factor, -stats.x);
                    ds[r][c][e] = (ds[r][c][e] - stats.y) * scores.slope[e];
                }
            }
        }
        if n >= visited.full {
            for (var r = 0u; r < ROW_MATRICES; r++) {
                for (var c = 0u; c < ACROSS_KEYS; c++) {
                    let i = i32(row0 + own_row + r * M);
                    p[r][c] = masked(p[r][c], at, i, j0 + i32(c * M), lane, MASKED);
#if BF16_MATRICES
                    // dP may be infinite where a value that does not count is as large as bf16 has it.
                    ds[r][c] = masked(ds[r][c], at, i, j0 + i32(c * M), lane, 0.0);
#endif
                }
            }
        }
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
#if BF16_MATRICES
#if BIAS
                    ds[r][c][e] = of_what_counts(ds[r][c][e], p[r][c][e]);
#endif
#endif
                    ds[r][c][e] *= exp2(p[r][c][e]);
                }
            }
        }

        // dQ = dQ + dS K
        for (var c = 0u; c < ACROSS_KEYS; c++) {
            var ds_left = array<Left, ROW_MATRICES>();
            for (var r = 0u; r < ROW_MATRICES; r++) {
                ds_left[r] = left(ds[r][c]);
            }
            for (var d = 0u; d < ACROSS_DQ_BLOCK; d++) {
                let place = c * M * D_STRIDE + min(dq0 + d, ACROSS_DIM - 1u) * M / 4u;
                let k = coopLoadT<Right>(&tiles[place], D_STRIDE);
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    dq[r][d] = coopMultiplyAdd(ds_left[r], k, dq[r][d]);
                }
            }
        }
    }

    // scale dQ to workgroup memory, then out in whole rows
    workgroupBarrier();
    for (var r = 0u; r < ROW_MATRICES; r++) {
        for (var d = 0u; d < ACROSS_DQ_BLOCK; d++) {
            let y = elements_of(dq[r][d]);
            for (var e = 0u; e < ELEMENTS; e++) {
                let row = own_row + r * M + row_of(lane, 0u) + row_of(0u, e);
                let column = d * M + column_of(lane, 0u) + column_of(0u, e);
                // Lanes store components of one vector. That is no race here: modules with access to elements run on Vulkan only, where a store to a
                // component leaves the others alone.
                tiles[row * DQ_STRIDE + column / 4u][column % 4u] = half_of(y[e] * problem.scale * held_factor());
            }
        }
    }
    workgroupBarrier();
    for (var n = 0u; n < DQ_LOADS; n++) {
        let t = thread + n * THREADS;
        let i = row0 + t / DQ8;
        let d = dq0 * M + 8u * (t % DQ8);
        if t < ROWS * DQ8 && i < row1 && d < HEAD_DIM {
            let place = t / DQ8 * DQ_STRIDE + 2u * (t % DQ8);
            write_grad_query(grad_query_row(at, i), d, HEAD_DIM, vec4f(tiles[place]), vec4f(tiles[place + 1u]));
        }
    }
}
