// What: gradients of K and V on cooperative matrices, with operands of f16 or bf16 (P and dS are rounded to it) and sums of f32.
//
//     dK = 0, dV = 0
//     for each query head of the group, for each tile of ROWS rows that may see some of the keys:
//         S^T = K Q^T,  dP^T = V dO^T
//         P^T = 2^(factor score(S^T) - lse)         lse is times log2(e) here; lse and delta belong to columns
//         dS^T = P^T (dP^T - delta) score'          score' is d score / d (scale · q·k)
//         dV = dV + P^T dO,  dK = dK + dS^T Q
//     dK = scale dK
//
// With dropout dP is that of what is kept; dS is held without the factor of what is kept (matrix/scores.wgsl).
//
// Who: a workgroup owns KEYS keys of one key-value head. Each of its subgroups has KEY_MATRICES · M of these keys. Keys are rows of the
//   matrices, so P^T and dS^T become left operands in the lanes that hold them. Where registers do not hold all columns of dK and dV, each
//   block of COLUMNS has a workgroup of its own, which computes all of S^T and dP^T again.
// Pipelining: with AHEAD, the next tile of Q and dO is loaded into registers while the products of this tile run.
// Needs q, k, v, dO, row_stats, and access to elements of matrices. Gives dK and dV.
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
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;
#include "matrix/elements.wgsl"
#include "matrix/scores.wgsl" queries=column keys=row together=KEY_MATRICES*M
#include "memory/read_f16.wgsl" tensor=query
#include "memory/read_f16.wgsl" tensor=key
#include "memory/read_f16.wgsl" tensor=value
#include "memory/read_f16.wgsl" tensor=grad_out
#include "memory/write_f16.wgsl" tensor=grad_key
#include "memory/write_f16.wgsl" tensor=grad_value

const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
const KEYS = SUBGROUPS * KEY_MATRICES * M;
// Matrices across the rows of a tile, the head dimension, the values' dimension, and the columns of a block.
const ACROSS_ROWS = ROWS / M;
const ACROSS_DIM = (HEAD_DIM + M - 1u) / M;
const ACROSS_DIM_V = (HEAD_DIM_V + M - 1u) / M;
const ACROSS_DK_BLOCK = min(ACROSS_DIM, COLUMNS / M);
const ACROSS_DV_BLOCK = min(ACROSS_DIM_V, COLUMNS / M);
const K_BLOCKS = (ACROSS_DIM + ACROSS_DK_BLOCK - 1u) / ACROSS_DK_BLOCK;
const V_BLOCKS = (ACROSS_DIM_V + ACROSS_DV_BLOCK - 1u) / ACROSS_DV_BLOCK;
const BLOCKS = max(K_BLOCKS, V_BLOCKS);
// Rows in workgroup memory, whole rows (D, V) and rows of a block of columns: ..8 counts their groups of eight elements; ..STRIDE is the
// distance of rows in vectors of four. The two vectors between rows keep the rows of a matrix on different banks.
const D8 = ACROSS_DIM * M / 8u;
const V8 = ACROSS_DIM_V * M / 8u;
const DK8 = ACROSS_DK_BLOCK * M / 8u;
const DV8 = ACROSS_DV_BLOCK * M / 8u;
const D_STRIDE = 2u * D8 + 2u;
const V_STRIDE = 2u * V8 + 2u;
const DK_STRIDE = 2u * DK8 + 2u;
const DV_STRIDE = 2u * DV8 + 2u;
// How many loads each thread does of a block of K or dK, of a block of V or dV, and of a tile of Q, of dO and of row_stats.
const DK_LOADS = (KEYS * DK8 + THREADS - 1u) / THREADS;
const DV_LOADS = (KEYS * DV8 + THREADS - 1u) / THREADS;
const Q_LOADS = (ROWS * D8 + THREADS - 1u) / THREADS;
const DO_LOADS = (ROWS * V8 + THREADS - 1u) / THREADS;
const STATS_LOADS = (ROWS + THREADS - 1u) / THREADS;

// Workgroup memory. In the loop: V, unless registers hold it, then a tile of Q and a tile of dO. Before the loop: blocks of K and V on
// their way to registers. After the loop: dK and dV on their way to device memory.
#if HOLD_VALUE
const Q_AT = 0u;
#else
const Q_AT = KEYS * V_STRIDE;
#endif
const DO_AT = Q_AT + ROWS * D_STRIDE;
const TILES = max(DO_AT + ROWS * V_STRIDE, KEYS * max(DK_STRIDE, DV_STRIDE));
var<workgroup> tiles: array<vec4<f16>, TILES>;
// lse, in base 2, and delta of the tile's rows.
var<workgroup> step_stats: array<vec2f, ROWS>;

fn store_eight(place: u32, x: Eight) {
    tiles[place] = x.low;
    tiles[place + 1u] = x.high;
}

// These two store a block of columns of K, from column d0 on, and one of V. Columns past the head dimension are 0. Q and dO have some other
// element of the row there (read_f16.wgsl), which is finite, so these columns add nothing.
fn store_keys(at: Sequence, key0: u32, d0: u32, last: u32, thread: u32) {
    for (var n = 0u; n < DK_LOADS; n++) {
        let t = thread + n * THREADS;
        let d = d0 + 8u * (t % DK8);
        let x = read_key(key_row(at, min(key0 + t / DK8, last)), d, HEAD_DIM);
        if t < KEYS * DK8 {
            store_eight(t / DK8 * DK_STRIDE + 2u * (t % DK8), first_elements(x, max(d, HEAD_DIM) - d));
        }
    }
}

fn store_values(at: Sequence, key0: u32, d0: u32, last: u32, thread: u32) {
    for (var n = 0u; n < DV_LOADS; n++) {
        let t = thread + n * THREADS;
        let d = d0 + 8u * (t % DV8);
        let x = read_value(value_row(at, min(key0 + t / DV8, last)), d, HEAD_DIM_V);
        if t < KEYS * DV8 {
            store_eight(t / DV8 * DV_STRIDE + 2u * (t % DV8), first_elements(x, max(d, HEAD_DIM_V) - d));
        }
    }
}

// A tile of rows on its way from device memory to workgroup memory.
struct Tile {
    q: array<Eight, Q_LOADS>,
    grad: array<Eight, DO_LOADS>,
    stats: array<vec2f, STATS_LOADS>,
}

fn load_tile(at: Sequence, i0: u32, thread: u32) -> Tile {
    var x: Tile;
    let last = last_query(at);
    for (var n = 0u; n < Q_LOADS; n++) {
        let t = thread + n * THREADS;
        x.q[n] = read_query(query_row(at, min(i0 + t / D8, last)), 8u * (t % D8), HEAD_DIM);
    }
    for (var n = 0u; n < DO_LOADS; n++) {
        let t = thread + n * THREADS;
        x.grad[n] = read_grad_out(grad_out_row(at, min(i0 + t / V8, last)), 8u * (t % V8), HEAD_DIM_V);
    }
    for (var n = 0u; n < STATS_LOADS; n++) {
        x.stats[n] = row_stats(row_number(at, min(i0 + thread + n * THREADS, last)));
    }
    return x;
}

fn store_tile(at: Sequence, x: Tile, i0: u32, thread: u32) {
    for (var n = 0u; n < Q_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < ROWS * D8 {
            store_eight(Q_AT + t / D8 * D_STRIDE + 2u * (t % D8), x.q[n]);
        }
    }
    for (var n = 0u; n < DO_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < ROWS * V8 {
            store_eight(DO_AT + t / V8 * V_STRIDE + 2u * (t % V8), x.grad[n]);
        }
    }
    for (var n = 0u; n < STATS_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < ROWS {
            // A row past the end is as one without keys.
            let stats = select(x.stats[n], vec2f(NO_KEYS, 0.0), i0 + t > last_query(at));
            step_stats[t] = vec2f(stats.x * LOG2_E, held_delta(stats.y));
        }
    }
}

@compute @workgroup_size(THREADS)
fn dkdv(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    // The first of the heads that share these keys.
    let of_group = sequence(group.z, group.y * problem.group);
    let key0 = group.x / BLOCKS * KEYS;
    let own_key = subgroup * KEY_MATRICES * M;
    // The first matrix of columns of dK and of dV.
    let dk0 = group.x % BLOCKS * ACROSS_DK_BLOCK;
    let dv0 = group.x % BLOCKS * ACROSS_DV_BLOCK;
    let last = last_key(of_group);
    // Held scores times this are exponents of 2.
    let factor = score_factor();

    var k: array<array<Left, K_BLOCKS * ACROSS_DK_BLOCK>, KEY_MATRICES>;
    for (var b = 0u; b < K_BLOCKS; b++) {
        store_keys(of_group, key0, b * ACROSS_DK_BLOCK * M, last, thread);
        workgroupBarrier();
        for (var r = 0u; r < KEY_MATRICES; r++) {
            for (var d = 0u; d < ACROSS_DK_BLOCK; d++) {
                let place = (own_key + r * M) * DK_STRIDE + d * M / 4u;
                k[r][b * ACROSS_DK_BLOCK + d] = coopLoadT<Left>(&tiles[place], DK_STRIDE);
            }
        }
        workgroupBarrier();
    }
#if HOLD_VALUE
    var v: array<array<Left, V_BLOCKS * ACROSS_DV_BLOCK>, KEY_MATRICES>;
    for (var b = 0u; b < V_BLOCKS; b++) {
        store_values(of_group, key0, b * ACROSS_DV_BLOCK * M, last, thread);
        workgroupBarrier();
        for (var r = 0u; r < KEY_MATRICES; r++) {
            for (var d = 0u; d < ACROSS_DV_BLOCK; d++) {
                let place = (own_key + r * M) * DV_STRIDE + d * M / 4u;
                v[r][b * ACROSS_DV_BLOCK + d] = coopLoadT<Left>(&tiles[place], DV_STRIDE);
            }
        }
        workgroupBarrier();
    }
#else
    // Only tiles with one block of columns leave V here, so this is all of it.
    store_values(of_group, key0, 0u, last, thread);
#endif

    var dk: array<array<Accumulator, ACROSS_DK_BLOCK>, KEY_MATRICES>;
    var dv: array<array<Accumulator, ACROSS_DV_BLOCK>, KEY_MATRICES>;
    for (var r = 0u; r < KEY_MATRICES; r++) {
        for (var d = 0u; d < ACROSS_DK_BLOCK; d++) {
            dk[r][d] = Accumulator();
        }
        for (var d = 0u; d < ACROSS_DV_BLOCK; d++) {
            dv[r][d] = Accumulator();
        }
    }

    var walk = walk_rows(of_group, i32(key0), i32(key0 + KEYS), ROWS);
    var next: Tile;
#if AHEAD
    if has_tile(walk) {
        next = load_tile(walk.at, u32(first_row(walk)), thread);
    }
#endif
    while has_tile(walk) {
        let at = walk.at;
        let row0 = first_row(walk);
        let all_full = walk.n < walk.tiles.full;
        workgroupBarrier();
#if !AHEAD
        next = load_tile(at, u32(row0), thread);
#endif
        store_tile(at, next, u32(row0), thread);
        workgroupBarrier();
        walk = next_tile(walk, i32(key0), i32(key0 + KEYS), ROWS);
#if AHEAD
        // After the last tile this loads a tile that nothing uses.
        next = load_tile(walk.at, u32(first_row(walk)), thread);
#endif

        // One matrix of rows at a time. No array of matrices has c for an index, so that drivers may keep the loop, which takes fewer
        // registers than writing it out.
        for (var c = 0; c < i32(ACROSS_ROWS); c++) {
            // What is added to scores, asked for ahead of the products
            let i = row0 + c * i32(M);
            var added = array<Lane, KEY_MATRICES>();
            for (var r = 0u; r < KEY_MATRICES; r++) {
                added[r] = added_lane(at, i, i32(key0 + own_key), r, lane);
            }

            // S^T = K Q^T,  dP^T = V dO^T
            let q_place = Q_AT + u32(c) * M * D_STRIDE;
            let grad_place = DO_AT + u32(c) * M * V_STRIDE;
            var s = array<Accumulator, KEY_MATRICES>();
            var dp = array<Accumulator, KEY_MATRICES>();
            for (var r = 0u; r < KEY_MATRICES; r++) {
                s[r] = Accumulator();
                dp[r] = Accumulator();
            }
            for (var d = 0u; d < ACROSS_DIM; d++) {
                let place = q_place + d * M / 4u;
                let q = coopLoad<Right>(&tiles[place], D_STRIDE);
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    s[r] = coopMultiplyAdd(k[r][d], q, s[r]);
                }
            }
            for (var d = 0u; d < ACROSS_DIM_V; d++) {
                let place = grad_place + d * M / 4u;
                let grad = coopLoad<Right>(&tiles[place], V_STRIDE);
                for (var r = 0u; r < KEY_MATRICES; r++) {
#if HOLD_VALUE
                    dp[r] = coopMultiplyAdd(v[r][d], grad, dp[r]);
#else
                    let v_place = (own_key + r * M) * V_STRIDE + d * M / 4u;
                    dp[r] = coopMultiplyAdd(coopLoadT<Left>(&tiles[v_place], V_STRIDE), grad, dp[r]);
#endif
                }
            }

            // P^T = 2^(score(S^T) - lse),  dS^T = P^T (dP^T - delta) score'
            var lane_stats = array<vec2f, LANE_COLUMNS>();
            for (var e = 0u; e < ELEMENTS; e++) {
                lane_stats[held_column(e)] = step_stats[u32(c) * M + column_of(lane, 0u) + column_of(0u, e)];
            }
            let full = all_full || all_count(at, i, i + i32(M), i32(key0), i32(key0 + KEYS));
            var p = array<Left, KEY_MATRICES>();
            var ds = array<Left, KEY_MATRICES>();
            for (var r = 0u; r < KEY_MATRICES; r++) {
                let j = i32(key0 + own_key + r * M);
                let scores = shaped(elements_of(s[r]), added[r], at, i, j, lane);
                var x = Lane();
                var y = elements_of(dp[r]);
#if DROPOUT
                let kept = kept_lane(at, i, j, r, lane);
                y = what_is_kept(y, kept);
#endif
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[e] = fma(scores.score[e], factor, -lane_stats[held_column(e)].x);
                    y[e] = (y[e] - lane_stats[held_column(e)].y) * scores.slope[e];
                }
                if !full {
                    x = masked(x, at, i, j, lane, MASKED);
#if BF16_MATRICES
                    // dP may be infinite where a value that does not count is as large as bf16 has it.
                    y = masked(y, at, i, j, lane, 0.0);
#endif
                }
                for (var e = 0u; e < ELEMENTS; e++) {
#if BF16_MATRICES
#if BIAS
                    y[e] = of_what_counts(y[e], x[e]);
#endif
#endif
                    x[e] = exp2(x[e]);
                    y[e] *= x[e];
                }
#if DROPOUT
                x = what_is_kept(x, kept);
#endif
                p[r] = left(x);
                ds[r] = left(y);
            }

            // dV = dV + P^T dO,  dK = dK + dS^T Q
            for (var d = 0u; d < ACROSS_DV_BLOCK; d++) {
                let place = grad_place + min(dv0 + d, ACROSS_DIM_V - 1u) * M / 4u;
                let grad = coopLoadT<Right>(&tiles[place], V_STRIDE);
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    dv[r][d] = coopMultiplyAdd(p[r], grad, dv[r][d]);
                }
            }
            for (var d = 0u; d < ACROSS_DK_BLOCK; d++) {
                let place = q_place + min(dk0 + d, ACROSS_DIM - 1u) * M / 4u;
                let q = coopLoadT<Right>(&tiles[place], D_STRIDE);
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    dk[r][d] = coopMultiplyAdd(ds[r], q, dk[r][d]);
                }
            }
        }
    }

    // To workgroup memory, then out in whole rows
    workgroupBarrier();
    for (var r = 0u; r < KEY_MATRICES; r++) {
        for (var d = 0u; d < ACROSS_DK_BLOCK; d++) {
            let y = elements_of(dk[r][d]);
            for (var e = 0u; e < ELEMENTS; e++) {
                let row = own_key + r * M + row_of(lane, 0u) + row_of(0u, e);
                let column = d * M + column_of(lane, 0u) + column_of(0u, e);
                // Lanes store components of one vector. That is no race here: modules with access to elements run on Vulkan only, where a store to a
                // component leaves the others alone.
                tiles[row * DK_STRIDE + column / 4u][column % 4u] = half_of(y[e] * problem.scale * held_factor());
            }
        }
    }
    workgroupBarrier();
    for (var n = 0u; n < DK_LOADS; n++) {
        let t = thread + n * THREADS;
        let j = key0 + t / DK8;
        let d = dk0 * M + 8u * (t % DK8);
        if t < KEYS * DK8 && j < problem.seqlen_k && d < HEAD_DIM {
            let place = t / DK8 * DK_STRIDE + 2u * (t % DK8);
            write_grad_key(grad_key_row(of_group, j), d, HEAD_DIM, vec4f(tiles[place]), vec4f(tiles[place + 1u]));
        }
    }
    workgroupBarrier();
    for (var r = 0u; r < KEY_MATRICES; r++) {
        for (var d = 0u; d < ACROSS_DV_BLOCK; d++) {
            var y = elements_of(dv[r][d]);
#if DROPOUT
            for (var e = 0u; e < ELEMENTS; e++) {
                y[e] *= problem.dropout_scale;
            }
#endif
            for (var e = 0u; e < ELEMENTS; e++) {
                let row = own_key + r * M + row_of(lane, 0u) + row_of(0u, e);
                let column = d * M + column_of(lane, 0u) + column_of(0u, e);
                tiles[row * DV_STRIDE + column / 4u][column % 4u] = half_of(y[e]);
            }
        }
    }
    workgroupBarrier();
    for (var n = 0u; n < DV_LOADS; n++) {
        let t = thread + n * THREADS;
        let j = key0 + t / DV8;
        let d = dv0 * M + 8u * (t % DV8);
        if t < KEYS * DV8 && j < problem.seqlen_k && d < HEAD_DIM_V {
            let place = t / DV8 * DV_STRIDE + 2u * (t % DV8);
            write_grad_value(grad_value_row(of_group, j), d, HEAD_DIM_V, vec4f(tiles[place]), vec4f(tiles[place + 1u]));
        }
    }
}
