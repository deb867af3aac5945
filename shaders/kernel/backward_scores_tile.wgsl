// What: gradients of what is added to scores, in tiles: of the bias and of ALiBi's slopes.
//
//     for each tile of scores that shares elements of the result:
//         S = score(Q K^T),  P = exp(S - lse)       OWN x STEP
//         G = P (dO V^T - delta)                    the gradient of a score
//         sum = sum + G
//     dbias = sum, over batch entries, heads, rows and keys that share an element
//     row_sums_i = - sum over j of |i + keys - queries - j| G_ij, of which backward_heads.wgsl makes the gradient of a slope
//
// Who: with GRAD_BIAS a workgroup owns OWN rows by STEP keys of the bias; where the bias has one row, or one key, for all, it owns that.
//   SHARED_BATCH, SHARED_HEADS, SHARED_ROWS and SHARED_KEYS say which these are. Without GRAD_BIAS it owns OWN rows of a head. Each
//   element is summed by one workgroup in one order, so sums have the same bits on every run. tile/products.wgsl says what each thread
//   holds.
// Pipelining: none.
// Needs q, k, v, dO, row_stats, and what is given of scores. Gives dbias with GRAD_BIAS, else row_sums.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"
#include "tile/threads.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
@group(0) @binding(11) var<storage, read> grad_out: InElements;
#if GRAD_BIAS
#include "memory/row_stats.wgsl" access=read
#if BIAS_WORDS
@group(0) @binding(23) var<storage, read_write> grad_bias: array<f32>;
#else
@group(0) @binding(23) var<storage, read_write> grad_bias: array<atomic<u32>>;
#endif
#else
// Not written here, but in one buffer with the sums: a dispatch may see parts of a buffer only if all are writable.
#include "memory/row_stats.wgsl" access=read_write
@group(0) @binding(26) var<storage, read_write> row_sums: array<f32>;
#endif
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "memory/read.wgsl" tensor=grad_out
#include "tile/products.wgsl"
#if DROPOUT
#include "tile/dropout.wgsl" rows=OWN keys=STEP
#endif
#include "tile/load.wgsl" tensor=query count=OWN columns=TK
#include "tile/load.wgsl" tensor=key count=STEP columns=TK
#include "tile/load.wgsl" tensor=value count=STEP columns=TV
#include "tile/load.wgsl" tensor=grad_out count=OWN columns=TV

// G of rows i0 .. i0 + OWN and keys j0 .. j0 + STEP, 0 where a score does not count. Has barriers.
fn score_gradients(at: Sequence, i0: u32, j0: u32, thread: u32) -> Scores {
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    let last_row = last_query(at);
    let last = last_key(at);
    var s = Scores();
    for (var d0 = 0u; d0 < HEAD_DIM; d0 += CHUNK) {
        workgroupBarrier();
        store_chunk_query(load_chunk_query(at, i0, last_row, d0, HEAD_DIM, thread), 0u, 1u, d0, HEAD_DIM, thread);
        store_chunk_key(load_chunk_key(at, j0, last, d0, HEAD_DIM, thread), STEP_AT, TC, d0, HEAD_DIM, thread);
        workgroupBarrier();
        add_scores(&s, ty, tx);
    }
#if DROPOUT
    // All threads have begun this tile, since they have met above.
    find_kept(at, i0, j0, thread);
#endif
    var gradients = Scores();
    for (var d0 = 0u; d0 < HEAD_DIM_V; d0 += CHUNK) {
        workgroupBarrier();
        store_chunk_grad_out(load_chunk_grad_out(at, i0, last_row, d0, HEAD_DIM_V, thread), 0u, 1u, d0, HEAD_DIM_V, thread);
        store_chunk_value(load_chunk_value(at, j0, last, d0, HEAD_DIM_V, thread), STEP_AT, TC, d0, HEAD_DIM_V, thread);
        workgroupBarrier();
        add_scores(&gradients, ty, tx);
    }
    let full = all_count(at, i32(i0), i32(i0 + OWN), i32(j0), i32(j0 + STEP)) && i0 + OWN <= problem.seqlen_q;
    for (var r = 0u; r < TR; r++) {
        let i = i0 + r * THREADS_Y + ty;
        let stats = row_stats(row_number(at, min(i, last_row)));
        for (var c = 0u; c < TC4; c++) {
            let j = j0 + tx * TC + 4u * c;
            let score = scored_keys(s[r][c], at, i32(i), i32(j)).score;
            var p = exp2((score - stats.x) * LOG2_E);
            if i >= problem.seqlen_q {
                p = vec4f();
            } else if !full {
                p = select(vec4f(), p, keep_keys(at, i32(i), i32(j)));
            }
#if DROPOUT
            let kept = kept4_of(i0, j0, vec4u(i), vec4u(j) + vec4u(0u, 1u, 2u, 3u));
            gradients[r][c] = select(vec4f(), gradients[r][c] * problem.dropout_scale, kept);
#endif
            // The difference may be infinite, or no number, of a row that nothing reads, and of a key that does not count.
            gradients[r][c] = select(vec4f(), p * (gradients[r][c] - stats.y), p > vec4f());
        }
    }
    return gradients;
}

// Whether some score of a tile may count, as one thread finds it for all: a browser does not take a number from a buffer that may be
// written, which lengths may come from, as the same for all threads.
var<workgroup> may_count: u32;

// Adds the gradients of one tile of scores to the sums, if some of them may count. Has barriers.
fn add_tile(sums: ptr<function, Scores>, at: Sequence, i0: u32, j0: u32, thread: u32) {
    let i1 = min(i0 + OWN, problem.seqlen_q);
    let first = key_interval(at, i32(i0)).x;
    let end = key_interval(at, i32(i1) - 1).y;
    if thread == 0u {
        may_count = u32(i32(j0) < end && i32(j0 + STEP) > first);
    }
    if workgroupUniformLoad(&may_count) == 1u {
        let gradients = score_gradients(at, i0, j0, thread);
        for (var r = 0u; r < TR; r++) {
            for (var c = 0u; c < TC4; c++) {
#if GRAD_BIAS
                (*sums)[r][c] += gradients[r][c];
#else
                let i = i32(i0 + r * THREADS_Y + thread_y(thread));
                let j = vec4i(i32(j0 + thread_x(thread) * TC + 4u * c)) + vec4i(0, 1, 2, 3);
                (*sums)[r][c] -= vec4f(abs(vec4i(i + at.keys - at.queries) - j)) * gradients[r][c];
#endif
            }
        }
    }
}

// The sum over each row of the tile, in every thread. Has barriers.
fn sums_of_rows(sums: Scores, thread: u32) -> array<f32, TR> {
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    var all = array<f32, TR>();
    for (var r = 0u; r < TR; r++) {
        var sum = vec4f();
        for (var c = 0u; c < TC4; c++) {
            sum += sums[r][c];
        }
        workgroupBarrier();
        tiles[ty * THREADS_X + tx] = sum;
        workgroupBarrier();
        for (var x = 0u; x < THREADS_X; x++) {
            all[r] += sum4(tiles[ty * THREADS_X + x]);
        }
    }
    return all;
}

#if GRAD_BIAS
// The sum over each column of the tile, in every thread. Has barriers.
fn sums_of_columns(sums: Scores, thread: u32) -> array<vec4f, TC4> {
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    var all = array<vec4f, TC4>();
    for (var c = 0u; c < TC4; c++) {
        var sum = vec4f();
        for (var r = 0u; r < TR; r++) {
            sum += sums[r][c];
        }
        workgroupBarrier();
        tiles[ty * THREADS_X + tx] = sum;
        workgroupBarrier();
        for (var y = 0u; y < THREADS_Y; y++) {
            all[c] += tiles[y * THREADS_X + tx];
        }
    }
    return all;
}

// Stores the gradient of an element. `adds`: an earlier launch has left a part of the sum there.
fn write_bias(place: u32, x: f32, adds: bool) {
#if BIAS_WORDS
    grad_bias[place] = select(x, x + grad_bias[place], adds);
#else
    let shift = (place & 1u) * 16u;
    let before = unpack1(atomicLoad(&grad_bias[place / 2u]), place);
    let bits = pack1(select(x, x + before, adds)) & 0xffffu;
    // The second half of the word belongs to another element, of which another thread may be writing.
    atomicAnd(&grad_bias[place / 2u], ~(0xffffu << shift));
    atomicOr(&grad_bias[place / 2u], bits << shift);
#endif
}
#endif

@compute @workgroup_size(THREADS)
fn scores(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    var sums = Scores();
    // The first batch entry, head, row and key that it owns.
    let heads = select(problem.heads, 1u, SHARED_HEADS == 1u);
    let b0 = group.z / heads;
    let h0 = group.z % heads;
    let i0 = group.y * OWN;
    let j0 = group.x * STEP;
    let batches = select(1u, problem.batches, SHARED_BATCH == 1u);
    let all_heads = select(1u, problem.heads, SHARED_HEADS == 1u);
    let row_end = select(i0 + 1u, problem.seqlen_q, SHARED_ROWS == 1u);
    let key_end = select(j0 + 1u, problem.seqlen_k, SHARED_KEYS == 1u);
    for (var b = b0; b < b0 + batches; b++) {
        for (var h = h0; h < h0 + all_heads; h++) {
            let at = sequence(b, h);
            for (var i = i0; i < row_end; i += OWN) {
                for (var j = j0; j < key_end; j += STEP) {
                    add_tile(&sums, at, i, j, thread);
                }
            }
        }
    }

#if GRAD_BIAS
    // Of a head or a batch entry that an earlier launch began.
    var adds = (SHARED_BATCH == 1u && problem.batch_begin > 0u) || (SHARED_HEADS == 1u && problem.head_begin > 0u);
#if ACCUMULATE
    adds = true;
#endif
    let place = row_of_tensor(problem.bias, problem.batch_begin + b0, problem.head_begin + h0, 0u);
    if SHARED_ROWS == 1u && SHARED_KEYS == 1u {
        // Of each column in the first row, then of the first row.
        let columns = sums_of_columns(sums, thread);
        sums = Scores();
        if ty == 0u {
            sums[0] = columns;
        }
        let all = sums_of_rows(sums, thread);
        if tx == 0u && ty == 0u {
            write_bias(place, all[0], adds);
        }
    } else if SHARED_ROWS == 1u {
        let columns = sums_of_columns(sums, thread);
        for (var c = 0u; c < TC; c++) {
            let j = j0 + tx * TC + c;
            if ty == 0u && j < problem.seqlen_k {
                write_bias(place + j * problem.bias_column, columns[c / 4u][c % 4u], adds);
            }
        }
    } else if SHARED_KEYS == 1u {
        let all = sums_of_rows(sums, thread);
        for (var r = 0u; r < TR; r++) {
            let i = i0 + r * THREADS_Y + ty;
            if tx == 0u && i < problem.seqlen_q {
                write_bias(place + i * problem.bias.row, all[r], adds);
            }
        }
    } else {
        for (var r = 0u; r < TR; r++) {
            let i = i0 + r * THREADS_Y + ty;
            for (var c = 0u; c < TC; c++) {
                let j = j0 + tx * TC + c;
                if i < problem.seqlen_q && j < problem.seqlen_k {
                    write_bias(place + i * problem.bias.row + j * problem.bias_column, sums[r][c / 4u][c % 4u], adds);
                }
            }
        }
    }
#else
    let all = sums_of_rows(sums, thread);
    let at = sequence(b0, h0);
    for (var r = 0u; r < TR; r++) {
        let i = i0 + r * THREADS_Y + ty;
        if tx == 0u && i < problem.seqlen_q {
            row_sums[row_number(at, i)] = all[r];
        }
    }
#endif
}
