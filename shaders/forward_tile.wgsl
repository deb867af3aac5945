// Forward pass in tiles with an online softmax (FlashAttention-2, Dao 2023, algorithm 1). One workgroup computes
// ROWS rows of one head and walks over the keys, KEYS at a time; scores never leave the chip.
//
//     m = -inf, l = 0, O = 0
//     for each tile of keys that some row may see:
//         S = score(Q K^T)                          ROWS x KEYS
//         m' = max(m, rowmax S)
//         P = exp(S - m')                           ROWS x KEYS
//         l = exp(m - m') l + rowsum P
//         O = exp(m - m') O + P V                   ROWS x HEAD_DIM_V
//     O = O / l,  lse = m + ln l
//
// Threads form a grid of THREADS_Y x THREADS_X. Thread (ty, tx) keeps, in registers, for rows
// ty, ty + THREADS_Y, ... : the scores of keys 4(tx + THREADS_X c) .. + 4, output columns 4(tx + THREADS_X u) .. + 4.
// Workgroup memory holds Q and K (CHUNK columns at a time), P (PIECE keys at a time), V (VALUE_KEYS rows at a time),
// all as f32. Scores are products as they come (or, with a softcap, tanh of them); exponents of 2 are differences of
// scores times `factor`: one multiplication a score. If the tile says so, the products are written out, so that loads
// of the next vectors are among the products of these.
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"
#include "common/elements.wgsl"
#include "common/tile_threads.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
@group(0) @binding(4) var<storage, read_write> out: OutElements;
#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
#include "common/read.wgsl" tensor=query
#include "common/read.wgsl" tensor=key
#include "common/read.wgsl" tensor=value
#include "common/write.wgsl" tensor=out

const THREADS = THREADS_X * THREADS_Y;
// What one thread holds: TR rows by PIECES vectors of scores, TR rows by TV vectors of output.
const PIECE = 4u * THREADS_X;
const TR = ROWS / THREADS_Y;
const TC = 4u * PIECES;
const TV = (HEAD_DIM_V + PIECE - 1u) / PIECE;
// Row lengths in workgroup memory, in vectors. An odd length spreads a column over all banks.
const CHUNK_STRIDE = CHUNK4 | 1u;
const P_STRIDE = THREADS_X | 1u;
const PARTIAL_STRIDE = (THREADS_X / 4u) | 1u;
const V_STRIDE = TV * THREADS_X;
const CHUNKS = (HEAD_DIM + CHUNK - 1u) / CHUNK;
// Q stays when one chunk holds it. P takes the place of what is not needed once S is there.
const Q_AT = 0u;
const K_AT = Q_AT + ROWS * CHUNK_STRIDE;
const P_AT = select(Q_AT, K_AT, CHUNKS == 1u);
const V_AT = P_AT + ROWS * P_STRIDE;
// A number of each thread for each of its rows, to be reduced over a row of threads: beside K, where V is not yet.
const PARTIAL_AT = max(V_AT, K_AT + KEYS * CHUNK_STRIDE);
var<workgroup> tiles: array<vec4f, max(PARTIAL_AT + ROWS * PARTIAL_STRIDE, V_AT + VALUE_KEYS * V_STRIDE)>;
// Of each row: m, and exp(m - m') by which its sums shrink.
var<workgroup> maxima: array<vec2f, ROWS>;

// What each thread moves of a tile: loaded to registers while the tile before is in use, then stored.
const QUERY_LOADS = (ROWS * CHUNK4 + THREADS - 1u) / THREADS;
const KEY_LOADS = (KEYS * CHUNK4 + THREADS - 1u) / THREADS;
const VALUE_LOADS = (VALUE_KEYS * V_STRIDE + THREADS - 1u) / THREADS;

fn load_query(start: u32, row0: u32, d0: u32, thread: u32) -> array<Elements4, QUERY_LOADS> {
    var x: array<Elements4, QUERY_LOADS>;
    for (var n = 0u; n < QUERY_LOADS; n++) {
        let t = thread + n * THREADS;
        let i = min(row0 + t / CHUNK4, problem.row_end - 1u) - problem.row_begin;
        x[n] = read_query(start + i * problem.query.row, d0 + 4u * (t % CHUNK4), HEAD_DIM);
    }
    return x;
}

// Columns past the head dimension are 0 here, so that they add nothing to a score, whatever K has there.
fn store_query(x: array<Elements4, QUERY_LOADS>, d0: u32, thread: u32) {
    for (var n = 0u; n < QUERY_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < ROWS * CHUNK4 {
            var q = unpack4(x[n]) * score_sign();
            if HEAD_DIM % CHUNK > 0u {
                let d = d0 + 4u * (t % CHUNK4);
                q = first_elements(q, max(d, HEAD_DIM) - d);
            }
            tiles[Q_AT + t / CHUNK4 * CHUNK_STRIDE + t % CHUNK4] = q;
        }
    }
}

fn load_key(start: u32, j0: u32, last: u32, d0: u32, thread: u32) -> array<Elements4, KEY_LOADS> {
    var x: array<Elements4, KEY_LOADS>;
    for (var n = 0u; n < KEY_LOADS; n++) {
        let t = thread + n * THREADS;
        let j = min(j0 + t / CHUNK4, last);
        x[n] = read_key(start + j * problem.key.row, d0 + 4u * (t % CHUNK4), HEAD_DIM);
    }
    return x;
}

// Key j of the tile goes where a thread finds its keys THREADS_X rows apart: neighbours read neighbours.
fn store_key(x: array<Elements4, KEY_LOADS>, thread: u32) {
    for (var n = 0u; n < KEY_LOADS; n++) {
        let t = thread + n * THREADS;
        let j = t / CHUNK4;
        if t < KEYS * CHUNK4 {
            let row = (j / PIECE * 4u + j % 4u) * THREADS_X + j / 4u % THREADS_X;
            tiles[K_AT + row * CHUNK_STRIDE + t % CHUNK4] = unpack4(x[n]);
        }
    }
}

fn load_value(start: u32, j0: u32, last: u32, thread: u32) -> array<Elements4, VALUE_LOADS> {
    var x: array<Elements4, VALUE_LOADS>;
    for (var n = 0u; n < VALUE_LOADS; n++) {
        let t = thread + n * THREADS;
        let j = min(j0 + t / V_STRIDE, last);
        x[n] = read_value(start + j * problem.value.row, 4u * (t % V_STRIDE), HEAD_DIM_V);
    }
    return x;
}

fn store_value(x: array<Elements4, VALUE_LOADS>, thread: u32) {
    for (var n = 0u; n < VALUE_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < VALUE_KEYS * V_STRIDE {
            tiles[V_AT + t] = unpack4(x[n]);
        }
    }
}

fn max4(x: vec4f) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

fn store_partial(x: f32, row: u32, tx: u32) {
    tiles[PARTIAL_AT + row * PARTIAL_STRIDE + tx / 4u][tx % 4u] = x;
}

@compute @workgroup_size(THREADS)
fn forward(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    let at = sequence(group.z, group.y);
    // The last rows first: with a causal mask they take longest.
    let row0 = problem.row_begin + (groups.x - 1u - group.x) * ROWS;
    let row1 = min(row0 + ROWS, problem.row_end);
    let query_start = head_start(problem.query, at.batch, at.head_q);
    let key_start = head_start(problem.key, at.batch, at.head_kv);
    let value_start = head_start(problem.value, at.batch, at.head_kv);

    // Not 0, so that a masked score vanishes with a scale of 0 as well.
    let factor = max(score_factor(), 1.0e-30);
    // MASKED and LOWEST of scores, of which differences times factor are finite.
    let masked = MASKED / max(factor, 1.0);
    let lowest = LOWEST / max(factor, 1.0);

    var o: array<array<vec4f, TV>, TR>;
    var l: array<f32, TR>;
    if thread < ROWS {
        maxima[thread] = vec2f(lowest, 1.0);
    }

    let range = key_range(at, i32(row0), i32(row1));
    let first = range.x / i32(KEYS) * i32(KEYS);
    let last = u32(max(at.keys, 1) - 1);
    var query_next = load_query(query_start, row0, 0u, thread);
    var key_next: array<Elements4, KEY_LOADS>;
    var value_next: array<Elements4, VALUE_LOADS>;
    if range.x < range.y {
        key_next = load_key(key_start, u32(first), last, 0u, thread);
        value_next = load_value(value_start, u32(first), last, thread);
    }
    if CHUNKS == 1u {
        store_query(query_next, 0u, thread);
    }
    for (var j0 = first; j0 < range.y; j0 += i32(KEYS)) {
        // S = Q K^T
        var s: array<array<vec4f, PIECES>, TR>;
        for (var d0 = 0u; d0 < HEAD_DIM; d0 += CHUNK) {
            workgroupBarrier();
            store_key(key_next, thread);
            if CHUNKS > 1u {
                store_query(query_next, d0, thread);
            }
            workgroupBarrier();
            // The next chunk: of this tile, or the first of the next tile.
            let more = CHUNKS > 1u && d0 + CHUNK < HEAD_DIM;
            let d1 = select(0u, d0 + CHUNK, more);
            key_next = load_key(key_start, select(u32(j0) + KEYS, u32(j0), more), last, d1, thread);
            if CHUNKS > 1u {
                query_next = load_query(query_start, row0, d1, thread);
            }
#if WRITTEN_OUT
#unroll
#endif
            for (var d = 0u; d < CHUNK4; d++) {
                var k: array<vec4f, TC>;
                for (var c = 0u; c < TC; c++) {
                    k[c] = tiles[K_AT + (c * THREADS_X + tx) * CHUNK_STRIDE + d];
                }
                for (var r = 0u; r < TR; r++) {
                    let q = tiles[Q_AT + (r * THREADS_Y + ty) * CHUNK_STRIDE + d];
                    for (var c = 0u; c < PIECES; c++) {
                        s[r][c] = dot4(q, k[4u * c], k[4u * c + 1u], k[4u * c + 2u], k[4u * c + 3u], s[r][c]);
                    }
                }
            }
        }

        // What each score is, and whether it counts
#if SOFTCAP
        for (var r = 0u; r < TR; r++) {
            for (var c = 0u; c < PIECES; c++) {
                let x = s[r][c];
                s[r][c] = vec4f(score_shape(x.x), score_shape(x.y), score_shape(x.z), score_shape(x.w));
            }
        }
#endif
        if !tile_is_full(at, i32(row0), i32(row1), j0, j0 + i32(KEYS)) {
            for (var r = 0u; r < TR; r++) {
                let i = i32(row0 + r * THREADS_Y + ty);
                for (var c = 0u; c < PIECES; c++) {
                    let j = j0 + i32(c * PIECE + 4u * tx);
                    let kept = vec4<bool>(keep(at, i, j), keep(at, i, j + 1), keep(at, i, j + 2), keep(at, i, j + 3));
                    s[r][c] = select(vec4f(masked), s[r][c], kept);
                }
            }
        }

        // m' = max(m, rowmax S). One thread a row reduces: if all threads of a row did, each would read what all have.
        for (var r = 0u; r < TR; r++) {
            var most = s[r][0];
            for (var c = 1u; c < PIECES; c++) {
                most = max(most, s[r][c]);
            }
            store_partial(max4(most), r * THREADS_Y + ty, tx);
        }
        workgroupBarrier();
        if thread < ROWS {
            let m = maxima[thread].x;
            var most = vec4f(m);
            for (var x = 0u; x < THREADS_X / 4u; x++) {
                most = max(most, tiles[PARTIAL_AT + thread * PARTIAL_STRIDE + x]);
            }
            let larger = max4(most);
            maxima[thread] = vec2f(larger, exp2((m - larger) * factor));
        }
        workgroupBarrier();

        // P = exp(S - m'),  l = exp(m - m') l + rowsum P
        var shrink: array<f32, TR>;
        for (var r = 0u; r < TR; r++) {
            let most = maxima[r * THREADS_Y + ty];
            shrink[r] = most.y;
            var sum = vec4f();
            for (var c = 0u; c < PIECES; c++) {
                s[r][c] = exp2((s[r][c] - vec4f(most.x)) * factor);
                sum += s[r][c];
            }
            l[r] = fma(l[r], shrink[r], sum4(sum));
        }

        // O = exp(m - m') O + P V. P V is summed by itself first: a sum of sums loses less than one long sum does.
        var pv: array<array<vec4f, TV>, TR>;
        // Written out, since c must be a constant for S to be in registers.
#unroll
        for (var c = 0u; c < PIECES; c++) {
            if c > 0u {
                workgroupBarrier();
            }
            for (var r = 0u; r < TR; r++) {
                tiles[P_AT + (r * THREADS_Y + ty) * P_STRIDE + tx] = s[r][c];
            }
            for (var v0 = 0u; v0 < PIECE; v0 += VALUE_KEYS) {
                if v0 > 0u {
                    workgroupBarrier();
                }
                store_value(value_next, thread);
                workgroupBarrier();
                value_next = load_value(value_start, u32(j0) + c * PIECE + v0 + VALUE_KEYS, last, thread);
#if WRITTEN_OUT
#unroll
#endif
                for (var j4 = 0u; j4 < VALUE_KEYS4; j4++) {
                    var v: array<array<vec4f, TV>, 4>;
                    for (var jj = 0u; jj < 4u; jj++) {
                        for (var u = 0u; u < TV; u++) {
                            v[jj][u] = tiles[V_AT + (4u * j4 + jj) * V_STRIDE + u * THREADS_X + tx];
                        }
                    }
                    for (var r = 0u; r < TR; r++) {
                        let p = tiles[P_AT + (r * THREADS_Y + ty) * P_STRIDE + v0 / 4u + j4];
                        for (var u = 0u; u < TV; u++) {
                            let x = fma(vec4f(p.x), v[0][u], pv[r][u]);
                            let y = fma(vec4f(p.y), v[1][u], x);
                            let z = fma(vec4f(p.z), v[2][u], y);
                            pv[r][u] = fma(vec4f(p.w), v[3][u], z);
                        }
                    }
                }
            }
        }
        for (var r = 0u; r < TR; r++) {
            for (var u = 0u; u < TV; u++) {
                o[r][u] = fma(o[r][u], vec4f(shrink[r]), pv[r][u]);
            }
        }
    }

    // l of a row is spread over its threads.
    workgroupBarrier();
    for (var r = 0u; r < TR; r++) {
        store_partial(l[r], r * THREADS_Y + ty, tx);
    }
    workgroupBarrier();
    for (var r = 0u; r < TR; r++) {
        let row = r * THREADS_Y + ty;
        var sums = vec4f();
        for (var x = 0u; x < THREADS_X / 4u; x++) {
            sums += tiles[PARTIAL_AT + row * PARTIAL_STRIDE + x];
        }
        let sum = sum4(sums);
        let i = row0 + row;
        if i < row1 {
            let inverse = inverse_sum(sum);
            let start = head_start(problem.out, at.batch, at.head_q) + (i - problem.row_begin) * problem.out.row;
            for (var u = 0u; u < TV; u++) {
                write_out(start, 4u * (u * THREADS_X + tx), HEAD_DIM_V, o[r][u] * inverse);
            }
#if LSE
            if tx == 0u {
                let m = score_size() * maxima[row].x;
                lse[head_start(problem.lse, at.batch, at.head_q) + i - problem.row_begin] = lse_bits(m, sum);
            }
#endif
        }
    }
}
