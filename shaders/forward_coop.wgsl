// Forward pass on cooperative matrices (tensor cores): the algorithm of forward_tile.wgsl, with f16 products, f32 sums,
// and scores and probabilities that stay in registers. One workgroup computes ROWS rows of one head; each of its
// subgroups has ROW_MATRICES · M of them to itself, M being the size of a matrix.
//
//     m = -inf, l = 0, O = 0
//     for each tile of KEYS keys that some row may see:
//         S = score(Q K^T)                          f32 accumulators, then plain numbers in the lanes that hold them
//         if some row's maximum grew by more than LAZY:
//             m' = max(m, rowmax S),  l = 2^(m - m') l,  O = 2^(m - m') O
//         P = 2^(S - m)                             f16 left operands, made from S where it lies
//         l = l + rowsum P,  O = O + P V
//     O = O / l,  lse = ln 2 (m + log2 l)
//
// Maxima are in base 2. A maximum that grew a little is left as it is (FlashAttention-4): P is then at most 2^LAZY,
// which f16 holds, and O / l does not change.
//
// Which elements of a matrix a lane holds is asked of the device (src/elements.rs); accumulators and left operands have
// to agree, so that P is where S was.
enable f16;
enable wgpu_cooperative_matrix;
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"

#if MATRIX16
alias Accumulator = coop_mat16x16<f32, C>;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
const M = 16u;
#else
alias Accumulator = coop_mat8x8<f32, C>;
alias Left = coop_mat8x8<f16, A>;
alias Right = coop_mat8x8<f16, B>;
const M = 8u;
#endif

#if ALIGNED
alias Elements = array<vec4<f16>>;
#else
alias Elements = array<f16>;
#endif
// The inputs are never written. A compiler may move loads of read-only memory down to where their values are used;
// these stay where they are, ahead of the arithmetic that hides their latency.
@group(0) @binding(1) var<storage, read_write> query: Elements;
@group(0) @binding(2) var<storage, read_write> key: Elements;
@group(0) @binding(3) var<storage, read_write> value: Elements;
@group(0) @binding(4) var<storage, read_write> out: Elements;
#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
#include "common/matrix_layout.wgsl"
#include "common/elements_f16.wgsl" tensor=query
#include "common/elements_f16.wgsl" tensor=key
#include "common/elements_f16.wgsl" tensor=value

fn write_out(start: u32, d: u32, dim: u32, x: vec4<f16>) {
#if ALIGNED
    out[(start + d) / 4u] = x;
#else
    for (var c = 0u; c < min(4u, dim - d); c++) {
        out[start + d + c] = x[c];
    }
#endif
}

// The bodies of these are put in by src/elements.rs: element e of a matrix, and a matrix of given elements.
fn coop_get_0(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_1(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_2(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_3(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_4(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_5(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_6(m: Accumulator) -> f32 { return 0.0; }
fn coop_get_7(m: Accumulator) -> f32 { return 0.0; }
fn coop_set_accumulator(z: Accumulator, a: f32, b: f32, c: f32, d: f32, e: f32, f: f32, g: f32, h: f32) -> Accumulator { return z; }
fn coop_set_left(z: Left, a: f16, b: f16, c: f16, d: f16, e: f16, f: f16, g: f16, h: f16) -> Left { return z; }

const ELEMENTS = 8u;
alias Lane = array<f32, ELEMENTS>;

fn elements_of(m: Accumulator) -> Lane {
    return Lane(coop_get_0(m), coop_get_1(m), coop_get_2(m), coop_get_3(m), coop_get_4(m), coop_get_5(m), coop_get_6(m), coop_get_7(m));
}

fn accumulator(x: Lane) -> Accumulator {
    return coop_set_accumulator(Accumulator(), x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]);
}

fn left(x: Lane) -> Left {
    return coop_set_left(Left(), f16(x[0]), f16(x[1]), f16(x[2]), f16(x[3]), f16(x[4]), f16(x[5]), f16(x[6]), f16(x[7]));
}

const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
const ROWS = SUBGROUPS * ROW_MATRICES * M;
// Matrices across the keys of a tile, the head dimension, and the values' dimension.
const KM = KEYS / M;
const DM = (HEAD_DIM + M - 1u) / M;
const VM = (HEAD_DIM_V + M - 1u) / M;
// Rows in workgroup memory, in vectors of four: what is there, and how far apart. The two vectors between rows keep the
// rows of a matrix on different banks.
const D4 = DM * M / 4u;
const V4 = VM * M / 4u;
const K_STRIDE = D4 + 2u;
const V_STRIDE = V4 + 2u;
const K_SIZE = KEYS * K_STRIDE;
const V_SIZE = KEYS * V_STRIDE;
// What each thread moves of Q, O, and a tile of K and of V.
const Q_LOADS = (ROWS * D4 + THREADS - 1u) / THREADS;
const O_STORES = (ROWS * V4 + THREADS - 1u) / THREADS;
const K_LOADS = (KEYS * D4 + THREADS - 1u) / THREADS;
const V_LOADS = (KEYS * V4 + THREADS - 1u) / THREADS;
const LAZY = 8.0;

// Two tiles of K and two of V, one in use while the other is filled; before them Q, and after them O.
const TILES = max(2u * (K_SIZE + V_SIZE), ROWS * max(K_STRIDE, V_STRIDE));
var<workgroup> tiles: array<vec4<f16>, TILES>;

fn load_key(start: u32, j0: u32, last: u32, thread: u32) -> array<vec4<f16>, K_LOADS> {
    var x: array<vec4<f16>, K_LOADS>;
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_key(start + min(j0 + t / D4, last) * problem.key.row, 4u * (t % D4), HEAD_DIM);
    }
    return x;
}

fn load_value(start: u32, j0: u32, last: u32, thread: u32) -> array<vec4<f16>, V_LOADS> {
    var x: array<vec4<f16>, V_LOADS>;
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_value(start + min(j0 + t / V4, last) * problem.value.row, 4u * (t % V4), HEAD_DIM_V);
    }
    return x;
}

fn store_tile(k: array<vec4<f16>, K_LOADS>, v: array<vec4<f16>, V_LOADS>, buffer: u32, thread: u32) {
    for (var n = 0u; n < K_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * D4 {
            tiles[buffer * K_SIZE + t / D4 * K_STRIDE + t % D4] = k[n];
        }
    }
    for (var n = 0u; n < V_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS * V4 {
            tiles[2u * K_SIZE + buffer * V_SIZE + t / V4 * V_STRIDE + t % V4] = v[n];
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
    let factor = score_factor();

    // Q, with 0 in the columns past the head dimension, so that they add nothing, whatever K has there
    for (var n = 0u; n < Q_LOADS; n++) {
        let t = thread + n * THREADS;
        let i = min(row0 + t / D4, problem.row_end - 1u) - problem.row_begin;
        let d = 4u * (t % D4);
        let x = read_query(query_start + i * problem.query.row, d, HEAD_DIM) * f16(score_sign());
        if t < ROWS * D4 {
            tiles[t / D4 * K_STRIDE + t % D4] = select(vec4<f16>(), x, vec4u(d) + vec4u(0u, 1u, 2u, 3u) < vec4u(HEAD_DIM));
        }
    }
    workgroupBarrier();
    var q: array<array<Left, DM>, ROW_MATRICES>;
    for (var r = 0u; r < ROW_MATRICES; r++) {
        for (var d = 0u; d < DM; d++) {
            let place = (mine + r * M) * K_STRIDE + d * M / 4u;
            q[r][d] = coopLoadT<Left>(&tiles[place], K_STRIDE);
        }
    }
    workgroupBarrier();

    var o: array<array<Accumulator, VM>, ROW_MATRICES>;
    var m: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
    var l: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
    for (var r = 0u; r < ROW_MATRICES; r++) {
        for (var d = 0u; d < VM; d++) {
            o[r][d] = Accumulator();
        }
        for (var h = 0u; h < LANE_ROWS; h++) {
            m[r][h] = LOWEST;
            l[r][h] = 0.0;
        }
    }

    let range = key_range(at, i32(row0), i32(row1));
    let first = range.x / i32(KEYS) * i32(KEYS);
    let last = u32(max(at.keys, 1) - 1);
    if range.x < range.y {
        store_tile(load_key(key_start, u32(first), last, thread), load_value(value_start, u32(first), last, thread), 0u, thread);
    }
    workgroupBarrier();
    var buffer = 0u;
    for (var j0 = first; j0 < range.y; j0 += i32(KEYS)) {
        let key_next = load_key(key_start, u32(j0) + KEYS, last, thread);
        let value_next = load_value(value_start, u32(j0) + KEYS, last, thread);

        // S = Q K^T
        var s: array<array<Accumulator, KM>, ROW_MATRICES>;
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < KM; c++) {
                s[r][c] = Accumulator();
            }
        }
        for (var d = 0u; d < DM; d++) {
            for (var c = 0u; c < KM; c++) {
                let place = buffer * K_SIZE + c * M * K_STRIDE + d * M / 4u;
                let k = coopLoad<Right>(&tiles[place], K_STRIDE);
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    s[r][c] = coopMultiplyAdd(q[r][d], k, s[r][c]);
                }
            }
        }
        var x: array<array<Lane, KM>, ROW_MATRICES>;
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < KM; c++) {
                x[r][c] = elements_of(s[r][c]);
            }
        }

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
                        x[r][c][e] = select(MASKED, x[r][c][e], keep(at, i, j));
                    }
                }
            }
        }

        // m' = max(m, rowmax S), if it grew by much:  l = 2^(m - m') l,  O = 2^(m - m') O
        var most: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
        var grew = false;
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var h = 0u; h < LANE_ROWS; h++) {
                most[r][h] = MASKED;
            }
            for (var c = 0u; c < KM; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    most[r][held_row(e)] = max(most[r][held_row(e)], x[r][c][e]);
                }
            }
            for (var h = 0u; h < LANE_ROWS; h++) {
                most[r][h] = row_max(most[r][h]) * factor;
                grew = grew || most[r][h] > m[r][h] + LAZY;
            }
        }
        // Uniform in the subgroup, which naga cannot see under an `if`.
        for (var once = u32(subgroupAny(grew)); once > 0u; once--) {
            for (var r = 0u; r < ROW_MATRICES; r++) {
                var shrink: array<f32, LANE_ROWS>;
                for (var h = 0u; h < LANE_ROWS; h++) {
                    let larger = max(m[r][h], most[r][h]);
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
            }
        }

        // P = 2^(S - m),  l = l + rowsum P
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < KM; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    var p = exp2(fma(x[r][c][e], factor, -m[r][held_row(e)]));
                    if !full {
                        p = select(p, 0.0, x[r][c][e] == MASKED);
                    }
                    x[r][c][e] = p;
                    l[r][held_row(e)] += p;
                }
            }
        }

        // O = O + P V
        for (var c = 0u; c < KM; c++) {
            var p: array<Left, ROW_MATRICES>;
            for (var r = 0u; r < ROW_MATRICES; r++) {
                p[r] = left(x[r][c]);
            }
            for (var d = 0u; d < VM; d++) {
                let place = 2u * K_SIZE + buffer * V_SIZE + c * M * V_STRIDE + d * M / 4u;
                let v = coopLoadT<Right>(&tiles[place], V_STRIDE);
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    o[r][d] = coopMultiplyAdd(p[r], v, o[r][d]);
                }
            }
        }

        buffer = 1u - buffer;
        store_tile(key_next, value_next, buffer, thread);
        workgroupBarrier();
    }

    // O / l to workgroup memory, then out in whole rows
    for (var r = 0u; r < ROW_MATRICES; r++) {
        for (var h = 0u; h < LANE_ROWS; h++) {
            l[r][h] = row_sum(l[r][h]);
        }
        for (var d = 0u; d < VM; d++) {
            let y = elements_of(o[r][d]);
            for (var e = 0u; e < ELEMENTS; e++) {
                let row = mine + r * M + row_of(lane, 0u) + row_of(0u, e);
                let column = d * M + column_of(lane, 0u) + column_of(0u, e);
                tiles[row * V_STRIDE + column / 4u][column % 4u] = f16(y[e] * inverse_sum(l[r][held_row(e)]));
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
        let i = row0 + t / V4;
        let d = 4u * (t % V4);
        if t < ROWS * V4 && i < row1 && d < HEAD_DIM_V {
            let start = head_start(problem.out, at.batch, at.head_q) + (i - problem.row_begin) * problem.out.row;
            write_out(start, d, HEAD_DIM_V, tiles[t / V4 * V_STRIDE + t % V4]);
        }
    }
}
