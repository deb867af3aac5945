// What: gradient of a bias that has all rows and all keys, on cooperative matrices, with operands of f16 (or bf16) and sums of f32.
//
//     for each batch entry and head that shares this tile of the bias:
//         S = Q K^T,  dP = dO V^T
//         P = 2^(score(S) - lse)                    lse is an exponent of 2
//         sum = sum + P (dP - delta)                the gradient of a score
//     dbias = sum
//
// Who: a workgroup owns ROWS rows by KEYS keys of the bias. Each of its subgroups has ROW_MATRICES · M of these rows. SHARED_BATCH and
//   SHARED_HEADS say whether the bias has one batch entry, or one head, for all. One workgroup sums each element in one order, so sums have
//   the same bits on every run. backward_scores_tile.wgsl is for biases with one row or one key, and for devices without access to elements.
// Pipelining: none within a workgroup; two and more of them share a multiprocessor.
// Needs q, k, v, dO, row_stats, what is given of scores, and access to elements of matrices. Gives dbias.
enable f16;
enable wgpu_cooperative_matrix;
#include "attention/attention.wgsl"
#include "matrix/matrices.wgsl"
#include "memory/elements_f16.wgsl"
#include "memory/pairs.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#include "memory/row_stats.wgsl" access=read
@group(0) @binding(11) var<storage, read> grad_out: InElements;
// f32, or two elements of 16 bits a word.
@group(0) @binding(23) var<storage, read_write> grad_bias: array<u32>;
#include "matrix/elements.wgsl"
#include "matrix/scores.wgsl" queries=row keys=column together=M
#include "memory/read_f16.wgsl" tensor=query
#include "memory/read_f16.wgsl" tensor=key
#include "memory/read_f16.wgsl" tensor=value
#include "memory/read_f16.wgsl" tensor=grad_out

const ROWS = SUBGROUPS * ROW_MATRICES * M;
#include "matrix/coop_tiles.wgsl" first=key second=value rows=KEYS
#include "matrix/own_rows.wgsl" tensor=query eights=D8 stride=D_STRIDE
#include "matrix/own_rows.wgsl" tensor=grad_out eights=V8 stride=V_STRIDE
// Workgroup memory: Q and then dO on their way to registers, then a tile of K and one of V.
const TILES = max(D_SIZE + V_SIZE, ROWS * max(D_STRIDE, V_STRIDE));
var<workgroup> tiles: array<Halves, TILES>;

// Stores the gradient of an element. `adds`: to what is there.
fn write_one(place: u32, x: f32, adds: bool) {
#if BIAS_WORDS
    grad_bias[place] = bitcast<u32>(select(x, x + bitcast<f32>(grad_bias[place]), adds));
#else
    // The other half of the word is not the gradient's. No other thread writes to it.
    let word = grad_bias[place / 2u];
    let low = place % 2u == 0u;
    let before = unpack2(word);
    let sum = select(x, x + select(before.y, before.x, low), adds);
    let bits = pack2(vec2f(sum));
    grad_bias[place / 2u] = select((word & 0xffffu) | (bits & 0xffff0000u), (word & 0xffff0000u) | (bits & 0xffffu), low);
#endif
}

// Stores the gradients of two keys in a row, of which the first is even.
fn write_two(place: u32, x: vec2f, adds: bool) {
#if BIAS_WORDS
    write_one(place, x.x, adds);
    write_one(place + problem.bias_column, x.y, adds);
#else
    grad_bias[place / 2u] = pack2(select(x, x + unpack2(grad_bias[place / 2u]), adds));
#endif
}

@compute @workgroup_size(THREADS)
fn bias_gradient(
    @builtin(workgroup_id) group: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let j0 = group.x * KEYS;
    let row0 = group.y * ROWS;
    let row1 = min(row0 + ROWS, problem.seqlen_q);
    let own_row = subgroup * ROW_MATRICES * M;
    // The first batch entry and head that share the tile, and how many there are.
    let heads = select(problem.heads, 1u, SHARED_HEADS == 1u);
    let first_batch = group.z / heads;
    let first_head = group.z % heads;
    let batches = select(1u, problem.batches, SHARED_BATCH == 1u);
    let sharing_heads = select(1u, problem.heads, SHARED_HEADS == 1u);
    // Held scores times this are exponents of 2.
    let factor = score_factor();

    var sums = array<array<Lane, ACROSS_KEYS>, ROW_MATRICES>();
    for (var n = 0u; n < batches * sharing_heads; n++) {
        let at = sequence(first_batch + n / sharing_heads, first_head + n % sharing_heads);
        let some_count = i32(j0) < key_interval(at, i32(row1) - 1).y && i32(j0 + KEYS) > key_interval(at, i32(row0)).x;
        // A loop of one trip at most: naga takes the condition for one that may differ between threads.
        for (var once = u32(some_count); once > 0u; once--) {
            let last_row = last_query(at);
            let last = last_key(at);
            let keys = load_key(at, j0, last, thread);
            let values = load_value(at, j0, last, thread);
            // All are done with the tiles of the batch entry, or head, before.
            workgroupBarrier();
            // Q, and after it dO
            store_own_query(at, row0, HEAD_DIM, thread);
            workgroupBarrier();
            var q = array<array<Left, ACROSS_DIM>, ROW_MATRICES>();
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                for (var d = 0u; d < ACROSS_DIM; d++) {
                    let place = (own_row + r * M) * D_STRIDE + d * M / WIDTH;
                    q[r][d] = coopLoadT<Left>(&tiles[place], D_STRIDE);
                }
            }
            workgroupBarrier();
            store_own_grad_out(at, row0, HEAD_DIM_V, thread);
            workgroupBarrier();
            var grad = array<array<Left, ACROSS_DIM_V>, ROW_MATRICES>();
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                for (var d = 0u; d < ACROSS_DIM_V; d++) {
                    let place = (own_row + r * M) * V_STRIDE + d * M / WIDTH;
                    grad[r][d] = coopLoadT<Left>(&tiles[place], V_STRIDE);
                }
            }
            workgroupBarrier();
            store_key(keys, 0u, thread);
            store_value(values, 0u, thread);
            // lse, in base 2, and delta of the rows that the lane holds
            var lane_stats = array<array<vec2f, LANE_ROWS>, ROW_MATRICES>();
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                for (var e = 0u; e < ELEMENTS; e++) {
                    let i = min(row0 + own_row + r * M + row_of(lane, e), last_row);
                    let stats = row_stats(row_number(at, i));
                    lane_stats[r][held_row(e)] = vec2f(stats.x * LOG2_E, held_delta(stats.y));
                }
            }
            workgroupBarrier();

            let full = all_count(at, i32(row0), i32(row0 + ROWS), i32(j0), i32(j0 + KEYS));
#unroll
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                let j = i32(j0 + c * M);
                // S = Q K^T,  dP = dO V^T
                var s = array<Accumulator, ROW_MATRICES>();
                var dp = array<Accumulator, ROW_MATRICES>();
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    s[r] = Accumulator();
                    dp[r] = Accumulator();
                }
#unroll
                for (var d = 0u; d < ACROSS_DIM; d++) {
                    let place = c * M * D_STRIDE + d * M / WIDTH;
                    let k = coopLoad<Right>(&tiles[place], D_STRIDE);
#unroll
                    for (var r = 0u; r < ROW_MATRICES; r++) {
                        s[r] = coopMultiplyAdd(q[r][d], k, s[r]);
                    }
                }
#unroll
                for (var d = 0u; d < ACROSS_DIM_V; d++) {
                    let place = D_SIZE + c * M * V_STRIDE + d * M / WIDTH;
                    let v = coopLoad<Right>(&tiles[place], V_STRIDE);
#unroll
                    for (var r = 0u; r < ROW_MATRICES; r++) {
                        dp[r] = coopMultiplyAdd(grad[r][d], v, dp[r]);
                    }
                }
                // P = 2^(score(S) - lse),  sum = sum + P (dP - delta)
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    let i = i32(row0 + own_row + r * M);
                    var x = shaped(elements_of(s[r]), added_lane(at, i, j, 0u, lane), at, i, j, lane).score;
                    var y = elements_of(dp[r]);
#if DROPOUT
                    y = what_is_kept(y, kept_lane(at, i, j, c, lane));
#endif
#unroll
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[e] = fma(x[e], factor, -lane_stats[r][held_row(e)].x);
                    }
                    if !full {
                        x = masked(x, at, i, j, lane, MASKED);
                    }
#unroll
                    for (var e = 0u; e < ELEMENTS; e++) {
#if BF16_MATRICES
                        y[e] = of_what_counts(y[e], x[e]);
#endif
                        sums[r][c][e] = fma(exp2(x[e]), y[e] - lane_stats[r][held_row(e)].y, sums[r][c][e]);
                    }
                }
            }
        }
    }

    // Of a head or a batch entry that an earlier launch began.
    var adds = (SHARED_BATCH == 1u && problem.batch_begin > 0u) || (SHARED_HEADS == 1u && problem.head_begin > 0u);
#if ACCUMULATE
    adds = true;
#endif
    let place = row_of_tensor(problem.bias, problem.batch_begin + first_batch, problem.head_begin + first_head, 0u);
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
        for (var c = 0u; c < ACROSS_KEYS; c++) {
#unroll
            for (var e = 0u; e < ELEMENTS; e++) {
                let i = row0 + own_row + r * M + row_of(lane, 0u) + row_of(0u, e);
                let j = j0 + c * M + column_of(lane, 0u) + column_of(0u, e);
                let element = place + i * problem.bias.row + j * problem.bias_column;
                // Pairs of keys share words, so a lane that does not hold both cannot write one.
                let two = vec2f(sums[r][c][e], sums[r][c][e | column_next]) * held_factor();
                if (e & column_next) == 0u && i < row1 {
                    if column_next > 0u && j + 1u < problem.seqlen_k {
                        write_two(element, two, adds);
                    } else if j < problem.seqlen_k {
                        write_one(element, two.x, adds);
                    }
                }
            }
        }
    }
}
