// What: forward pass on cooperative matrices for f32 and scaled bf16. Matrix operands are f16, so each tile is scaled and cut into PARTS f16 parts
//   (matrix/parts.wgsl).
//
//     m = EMPTY, l = 0, O = 0
//     for each tile of KEYS keys that some row may see:
//         S = score(Q K^T)                          numbers in the lanes that hold them
//         m' = max(m, rowmax S - HEADROOM)
//         P = 2^(S - m')                            left operands of PARTS parts, made in the lanes that hold S
//         l = 2^(m - m') l + rowsum P
//         O = 2^(m - m') O + P V                    tensor cores truncate sums, so they sum P V of one tile only
//     O = O / l,  lse = ln 2 (m + log2 l)           m is an exponent of 2
//
// Who: a workgroup owns ROWS rows of one head. Each of its subgroups has ROW_MATRICES · M of these rows, with Q, S, P and O in registers.
// Scales: Q, each tile of K and each tile of V has one scale. With BY_ROWS, where elements are far apart, each row has a scale of its own.
//   Then S is divided by the scales of Q and K, P is divided by those of V, and the rows of P are scaled in turn.
// Pipelining: the next tile of K and V is loaded into registers while the products of this tile run.
// Needs q, k, v, and the range of the head (coop_ranges.wgsl). Gives out and, with LSE, lse.
enable f16;
enable wgpu_cooperative_matrix;
#include "attention/attention.wgsl"
#include "matrix/matrices.wgsl"
#include "memory/elements.wgsl"

// read_write, though the inputs are never written: see forward_coop.wgsl.
@group(0) @binding(1) var<storage, read_write> query: InElements;
@group(0) @binding(2) var<storage, read_write> key: InElements;
@group(0) @binding(3) var<storage, read_write> value: InElements;
#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
#include "memory/row_stats.wgsl" access=read
#include "matrix/elements.wgsl"
#include "matrix/scores.wgsl" queries=row keys=column together=KEYS
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#if SINGLE_BF16
// Each bf16 is stored as the f16 of the same bits: write.wgsl has atomics here, and naga does not declare what they
// need in a module with matrices (the capability VulkanMemoryModelDeviceScope).
@group(0) @binding(4) var<storage, read_write> out: array<f16>;

fn write_out(start: u32, d: u32, dim: u32, x: vec4f) {
    for (var c = 0u; c < min(4u, max(d, dim) - d); c++) {
        out[start + d + c] = coop_bits(vec2u(pack1(x[c]), 0u)).x;
    }
}
#else
@group(0) @binding(4) var<storage, read_write> out: OutElements;
#include "memory/write.wgsl" tensor=out
#endif

const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
const ROWS = SUBGROUPS * ROW_MATRICES * M;
// Matrices across the keys of a tile, the head dimension, and the values' dimension.
const ACROSS_KEYS = KEYS / M;
const ACROSS_DIM = (HEAD_DIM + M - 1u) / M;
const ACROSS_DIM_V = (HEAD_DIM_V + M - 1u) / M;
// Rows in workgroup memory: how many vectors of four are there, and how far apart rows are. The two vectors between
// rows keep the rows of a matrix on different banks.
const D4 = ACROSS_DIM * M / 4u;
const V4 = ACROSS_DIM_V * M / 4u;
const K_STRIDE = D4 + 2u;
const V_STRIDE = V4 + 2u;
const K_SIZE = KEYS * K_STRIDE;
const V_SIZE = KEYS * V_STRIDE;
// How many vectors each thread loads of Q, and of a tile of K and of V.
const Q_LOADS = (ROWS * D4 + THREADS - 1u) / THREADS;
const K_LOADS = (KEYS * D4 + THREADS - 1u) / THREADS;
const V_LOADS = (KEYS * V4 + THREADS - 1u) / THREADS;
// The largest P is 2^HEADROOM, so that the second part of small ones is not lost below the smallest f16.
const HEADROOM = 8.0;
// The largest factor that scores are multiplied with. A product of scaled rows times this is still finite.
const LARGEST_FACTOR = 1.0e25;

// The parts of a tile of K, then the parts of a tile of V. Before the loop: Q, a part at a time.
var<workgroup> tiles: array<vec4<f16>, max(PARTS * (K_SIZE + V_SIZE), ROWS * K_STRIDE)>;
// One matrix of O of each subgroup, to be written in whole rows.
var<workgroup> rows_out: array<f32, SUBGROUPS * M * M>;

const PART_ROUNDING = 0u;
// Rows of Q, of K and of V.
const SIZED_ROWS = ROWS + 2u * KEYS;
#include "matrix/parts.wgsl"

fn load_key(at: Sequence, j0: u32, last: u32, thread: u32) -> array<Elements4, K_LOADS> {
    var x: array<Elements4, K_LOADS>;
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_key(key_row(at, min(j0 + t / D4, last)), 4u * (t % D4), HEAD_DIM);
    }
    return x;
}

fn load_value(at: Sequence, j0: u32, last: u32, thread: u32) -> array<Elements4, V_LOADS> {
    var x: array<Elements4, V_LOADS>;
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_value(value_row(at, min(j0 + t / V4, last)), 4u * (t % V4), HEAD_DIM_V);
    }
    return x;
}

// Gives the scale of a row of Q.
fn query_scale(scales: Scales, row: u32) -> f32 {
    return select(scales.tile.x, row_scale(row), scales.apart);
}

// Stores a tile of K and a tile of V in workgroup memory, each row times its own scale. Has barriers.
fn store_by_rows(keys: array<Elements4, K_LOADS>, values: array<Elements4, V_LOADS>, thread: u32) {
    clear_sizes(ROWS, 2u * KEYS, thread);
    workgroupBarrier();
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * D4 {
            add_size(ROWS + t / D4, unpack4(keys[n]));
        }
    }
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * V4 {
            add_size(ROWS + KEYS + t / V4, unpack4(values[n]));
        }
    }
    workgroupBarrier();
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * D4 {
            store_parts(t / D4 * K_STRIDE + t % D4, K_SIZE, unpack4(keys[n]) * row_scale(ROWS + t / D4));
        }
    }
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * V4 {
            let place = PARTS * K_SIZE + t / V4 * V_STRIDE + t % V4;
            store_parts(place, V_SIZE, unpack4(values[n]) * row_scale(ROWS + KEYS + t / V4));
        }
    }
}

@compute @workgroup_size(THREADS)
fn forward(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    let at = sequence(group.z, group.y);
    // All threads have one answer, which naga does not know. It takes matrices under such a condition only in a function of their own.
    if range_of(at) == OURS {
        forward_rows(at, group.x, workgroups.x, thread, subgroup, lane);
    }
}

// Computes block `block` of the `blocks` blocks of rows of a head.
fn forward_rows(at: Sequence, block: u32, blocks: u32, thread: u32, subgroup: u32, lane: u32) {
    // The last rows first: with a causal mask they take longest.
    let row0 = problem.row_begin + (blocks - 1u - block) * ROWS;
    let row1 = min(row0 + ROWS, problem.row_end);
    let own_row = subgroup * ROW_MATRICES * M;

    // Q, with 0 in the columns past the head dimension, so that they add nothing, whatever K has there
    var query_rest: array<vec4f, Q_LOADS>;
    var query_sizes = vec2u();
    for (var n = 0u; n < Q_LOADS; n++) {
        let t = thread + n * THREADS;
        let d = 4u * (t % D4);
        let x = unpack4(read_query(query_row(at, min(row0 + t / D4, last_query(at))), d, HEAD_DIM));
        query_rest[n] = first_elements(x, max(d, HEAD_DIM) - d);
        query_sizes = max(query_sizes, sizes_of(query_rest[n]));
    }
    let query_scales = scales_of(query_sizes, vec2u(), subgroup, lane);
    // A loop of one trip at most: naga takes the condition for one that may differ between threads.
    for (var once = u32(query_scales.apart); once > 0u; once--) {
        clear_sizes(0u, ROWS, thread);
        workgroupBarrier();
        for (var n = 0u; n < Q_LOADS; n++) {
            let row = (thread + n * THREADS) / D4;
            if row < ROWS {
                add_size(row, query_rest[n]);
            }
        }
        workgroupBarrier();
    }
    for (var n = 0u; n < Q_LOADS; n++) {
        let row = min((thread + n * THREADS) / D4, ROWS - 1u);
        query_rest[n] *= query_scale(query_scales, row);
    }
    var q: array<array<array<Left, PARTS>, ACROSS_DIM>, ROW_MATRICES>;
    for (var part = 0u; part < PARTS; part++) {
        for (var n = 0u; n < Q_LOADS; n++) {
            let t = thread + n * THREADS;
            let now = part4_of(query_rest[n], part);
            query_rest[n] -= now;
            if t < ROWS * D4 {
                tiles[t / D4 * K_STRIDE + t % D4] = vec4<f16>(now);
            }
        }
        workgroupBarrier();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var d = 0u; d < ACROSS_DIM; d++) {
                let place = (own_row + r * M) * K_STRIDE + d * M / 4u;
                q[r][d][part] = coopLoadT<Left>(&tiles[place], K_STRIDE);
            }
        }
        workgroupBarrier();
    }

    var o: array<array<Lane, ACROSS_DIM_V>, ROW_MATRICES>;
    var m: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
    var l: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
    for (var r = 0u; r < ROW_MATRICES; r++) {
        for (var d = 0u; d < ACROSS_DIM_V; d++) {
            o[r][d] = Lane();
        }
        for (var h = 0u; h < LANE_ROWS; h++) {
            m[r][h] = EMPTY;
            l[r][h] = 0.0;
        }
    }

    let visited = key_tiles(at, i32(row0), i32(row1), KEYS);
    let last = last_key(at);
    var key_next: array<Elements4, K_LOADS>;
    var value_next: array<Elements4, V_LOADS>;
    if visited.count > 0 {
        key_next = load_key(at, u32(tile(visited, 0)), last, thread);
        value_next = load_value(at, u32(tile(visited, 0)), last, thread);
    }
    for (var step = 0; step < visited.count; step++) {
        let j0 = tile(visited, step);
        // K and V to workgroup memory
        var key_sizes = vec2u();
        var value_sizes = vec2u();
        for (var n = 0u; n < K_LOADS; n++) {
            key_sizes = max(key_sizes, sizes_of(unpack4(key_next[n])));
        }
        for (var n = 0u; n < V_LOADS; n++) {
            value_sizes = max(value_sizes, sizes_of(unpack4(value_next[n])));
        }
        let scales = scales_of(key_sizes, value_sizes, subgroup, lane);
        let key_scale = scales.tile.x;
        let value_scale = scales.tile.y;
        // Held scores times this are exponents of 2.
#if SHAPED
        var factor = score_factor();
#else
        var factor = clamp(unscaled(score_factor(), query_scales.tile.x, key_scale), SMALLEST_FACTOR, LARGEST_FACTOR);
#endif
        // Whether each row of Q, K and V has a scale of its own, and scores are rounded.
#if BY_ROWS
        let large = exponent_bound(largest_product(query_scales.tile.x, key_scale)) >= LARGEST_EXPONENT;
        let by_rows = query_scales.apart || scales.apart || large;
#else
        let by_rows = false;
#endif
        if !by_rows {
            for (var n = 0u; n < K_LOADS; n++) {
                let t = thread + n * THREADS;
                if t < KEYS * D4 {
                    store_parts(t / D4 * K_STRIDE + t % D4, K_SIZE, unpack4(key_next[n]) * key_scale);
                }
            }
            for (var n = 0u; n < V_LOADS; n++) {
                let t = thread + n * THREADS;
                if t < KEYS * V4 {
                    let place = PARTS * K_SIZE + t / V4 * V_STRIDE + t % V4;
                    store_parts(place, V_SIZE, unpack4(value_next[n]) * value_scale);
                }
            }
        }
        for (var once = u32(by_rows); once > 0u; once--) {
            store_by_rows(key_next, value_next, thread);
        }
        workgroupBarrier();
        key_next = load_key(at, u32(tile(visited, step + 1)), last, thread);
        value_next = load_value(at, u32(tile(visited, step + 1)), last, thread);

        // S = Q K^T
        var x = array<array<Lane, ACROSS_KEYS>, ROW_MATRICES>();
        for (var c = 0u; c < ACROSS_KEYS; c++) {
            var sum = array<Accumulator, ROW_MATRICES>();
            for (var r = 0u; r < ROW_MATRICES; r++) {
                sum[r] = Accumulator();
            }
            for (var n = 0u; n < PARTS; n++) {
                for (var d = 0u; d < ACROSS_DIM; d++) {
                    for (var b = 0u; b + n < PARTS; b++) {
                        let place = b * K_SIZE + c * M * K_STRIDE + d * M / 4u;
                        let k = coopLoad<Right>(&tiles[place], K_STRIDE);
                        for (var r = 0u; r < ROW_MATRICES; r++) {
                            sum[r] = coopMultiplyAdd(q[r][d][PARTS - 1u - n - b], k, sum[r]);
                        }
                    }
                }
            }
            for (var r = 0u; r < ROW_MATRICES; r++) {
                x[r][c] = elements_of(sum[r]);
            }
        }

        // What each score is, and whether it counts
#if SHAPED
        let halves = inverse_halves(query_scales.tile.x, key_scale);
#endif
        if by_rows {
            for (var r = 0u; r < ROW_MATRICES; r++) {
                for (var c = 0u; c < ACROSS_KEYS; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let row = own_row + r * M + row_of(lane, e);
                        let scale_of_row = query_scale(query_scales, row);
                        let scale_of_key = row_scale(ROWS + c * M + column_of(lane, e));
#if SHAPED
                        x[r][c][e] = unscaled(x[r][c][e], scale_of_row, scale_of_key);
#else
                        x[r][c][e] *= min(unscaled(score_factor(), scale_of_row, scale_of_key), LARGEST_FACTOR);
#endif
                    }
                }
            }
        }
#if SHAPED
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[r][c][e] = select(x[r][c][e] * halves.x * halves.y, x[r][c][e], by_rows);
                }
                let i = i32(row0 + own_row + r * M);
                let j = j0 + i32(c * M);
                x[r][c] = shaped(x[r][c], added_lane(at, i, j, 0u, lane), at, i, j, lane).score;
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[r][c][e] *= select(1.0, factor, by_rows);
                }
            }
        }
#endif
        factor = select(factor, 1.0, by_rows);
        // masked_score · factor = -1e15 is far below EMPTY.
        let masked_score = -1.0e15 / factor;
        if step >= visited.full {
            for (var r = 0u; r < ROW_MATRICES; r++) {
                for (var c = 0u; c < ACROSS_KEYS; c++) {
                    x[r][c] = masked(x[r][c], at, i32(row0 + own_row + r * M), j0 + i32(c * M), lane, masked_score);
                }
            }
        }

        // P = 2^(S - m'),  l = 2^(m - m') l + rowsum P
        var shrink = array<array<f32, LANE_ROWS>, ROW_MATRICES>();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            var tile_max = array<f32, LANE_ROWS>();
            var sum = array<f32, LANE_ROWS>();
            for (var h = 0u; h < LANE_ROWS; h++) {
                tile_max[h] = masked_score;
                sum[h] = 0.0;
            }
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    tile_max[held_row(e)] = max(tile_max[held_row(e)], x[r][c][e]);
                }
            }
            for (var h = 0u; h < LANE_ROWS; h++) {
                var largest = row_max(tile_max[h]) * factor;
#if SHAPED
                // What is added to scores may be so large that exponents are rounded.
                largest = above(largest);
#endif
                let new_max = max(m[r][h], largest - HEADROOM);
                shrink[r][h] = exp2(m[r][h] - new_max);
                m[r][h] = new_max;
            }
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[r][c][e] = exp2(fma(x[r][c][e], factor, -m[r][held_row(e)]));
                    sum[held_row(e)] += x[r][c][e];
                }
#if DROPOUT
                let i = i32(row0 + own_row + r * M);
                x[r][c] = what_is_kept(x[r][c], kept_lane(at, i, j0 + i32(c * M), c, lane));
#endif
            }
            for (var h = 0u; h < LANE_ROWS; h++) {
                l[r][h] = fma(l[r][h], shrink[r][h], sum[h]);
            }
        }

        // The factor of each row that undoes the scales of P and V
        var unscale = array<array<f32, LANE_ROWS>, ROW_MATRICES>();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var h = 0u; h < LANE_ROWS; h++) {
                unscale[r][h] = inverse(value_scale);
            }
        }
        if by_rows {
            // A power of two that keeps P over the scales of V from falling below the smallest numbers of f32.
            let lift = min(value_scale * 0x1p100, 0x1p126);
            for (var r = 0u; r < ROW_MATRICES; r++) {
                var row_largest = array<f32, LANE_ROWS>();
                for (var c = 0u; c < ACROSS_KEYS; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] *= lift * inverse(row_scale(ROWS + KEYS + c * M + column_of(lane, e)));
                        row_largest[held_row(e)] = max(row_largest[held_row(e)], x[r][c][e]);
                    }
                }
                var scale = array<f32, LANE_ROWS>();
                for (var h = 0u; h < LANE_ROWS; h++) {
                    scale[h] = scale_for(bitcast<u32>(row_max(row_largest[h])));
                    unscale[r][h] = unscaled(1.0, scale[h], lift);
                }
                for (var c = 0u; c < ACROSS_KEYS; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] *= scale[held_row(e)];
                    }
                }
            }
        }
        var p = array<array<array<Left, PARTS>, ACROSS_KEYS>, ROW_MATRICES>();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                p[r][c] = left_parts(x[r][c]);
            }
        }

        // O = 2^(m - m') O + P V
        for (var d = 0u; d < ACROSS_DIM_V; d++) {
            var sum = array<Accumulator, ROW_MATRICES>();
            for (var r = 0u; r < ROW_MATRICES; r++) {
                sum[r] = Accumulator();
            }
            for (var n = 0u; n < PARTS; n++) {
                for (var c = 0u; c < ACROSS_KEYS; c++) {
                    for (var b = 0u; b + n < PARTS; b++) {
                        let place = PARTS * K_SIZE + b * V_SIZE + c * M * V_STRIDE + d * M / 4u;
                        let v = coopLoadT<Right>(&tiles[place], V_STRIDE);
                        for (var r = 0u; r < ROW_MATRICES; r++) {
                            sum[r] = coopMultiplyAdd(p[r][c][PARTS - 1u - n - b], v, sum[r]);
                        }
                    }
                }
            }
            for (var r = 0u; r < ROW_MATRICES; r++) {
                let y = elements_of(sum[r]);
                for (var e = 0u; e < ELEMENTS; e++) {
                    o[r][d][e] = fma(o[r][d][e], shrink[r][held_row(e)], y[e] * unscale[r][held_row(e)]);
                }
            }
        }
    }

    // O / l, out in whole rows, a matrix of each subgroup at a time
    for (var r = 0u; r < ROW_MATRICES; r++) {
        var ends = array<Row, LANE_ROWS>();
        for (var h = 0u; h < LANE_ROWS; h++) {
            ends[h] = finish_row(at, m[r][h] / LOG2_E, row_sum(l[r][h]), m[r][h] == EMPTY);
        }
        for (var d = 0u; d < ACROSS_DIM_V; d++) {
            for (var e = 0u; e < ELEMENTS; e++) {
                o[r][d][e] *= ends[held_row(e)].inverse;
            }
        }
#if LSE
        for (var e = 0u; e < ELEMENTS; e++) {
            let i = row0 + own_row + r * M + row_of(lane, e);
            if column_of(lane, e) == 0u && i < row1 {
                lse[lse_row(at, i)] = ends[held_row(e)].lse;
            }
        }
#endif
    }
    for (var n = 0u; n < ROW_MATRICES * ACROSS_DIM_V; n++) {
        // A driver that does not unroll this loop, with its barriers, would have o in memory for o[n / ACROSS_DIM_V][n % ACROSS_DIM_V].
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var d = 0u; d < ACROSS_DIM_V; d++) {
                if r * ACROSS_DIM_V + d == n {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        rows_out[subgroup * M * M + row_of(lane, e) * M + column_of(lane, e)] = o[r][d][e];
                    }
                }
            }
        }
        workgroupBarrier();
        let i = row0 + own_row + n / ACROSS_DIM_V * M + lane * ELEMENTS / M;
        if i < row1 {
            for (var e = 0u; e < ELEMENTS; e += 4u) {
                let t = subgroup * M * M + lane * ELEMENTS + e;
                let column = n % ACROSS_DIM_V * M + (lane * ELEMENTS + e) % M;
                write_out(out_row(at, i), column, HEAD_DIM_V, vec4f(rows_out[t], rows_out[t + 1u], rows_out[t + 2u], rows_out[t + 3u]));
            }
        }
        workgroupBarrier();
    }
}
