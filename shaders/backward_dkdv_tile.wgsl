// Gradients of keys and values, in tiles (FlashAttention-2, Dao 2023, algorithm 2, whose outer loop this is). One workgroup
// owns OWN keys of one key-value head and walks over the rows that may see them, STEP at a time, of every query head
// that shares them. Scores are recomputed from q, k and lse, and never leave the chip; nothing is added up by atomics.
//
//     dK = 0, dV = 0
//     for each query head of the group, for each tile of rows that may see some key:
//         S^T = score(K Q^T)                        OWN x STEP
//         P^T = exp(S^T - lse)
//         dP^T = V dO^T
//         dS^T = P^T (dP^T - delta) score'
//         dV = dV + P^T dO                          OWN x HEAD_DIM_V
//         dK = dK + dS^T Q                          OWN x HEAD_DIM
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"
#include "common/elements.wgsl"
#include "common/tile_threads.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#include "common/row_stats.wgsl" access=read
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;
#include "common/read.wgsl" tensor=query
#include "common/read.wgsl" tensor=key
#include "common/read.wgsl" tensor=value
#include "common/read.wgsl" tensor=grad_out
#include "common/write.wgsl" tensor=grad_key
#include "common/write.wgsl" tensor=grad_value
#include "common/tile_products.wgsl"
#include "common/tile_load.wgsl" tensor=query count=STEP columns=TK
#include "common/tile_load.wgsl" tensor=key count=OWN columns=TK
#include "common/tile_load.wgsl" tensor=value count=OWN columns=TV
#include "common/tile_load.wgsl" tensor=grad_out count=STEP columns=TV
#include "common/tile_result.wgsl" columns=TK
#include "common/tile_result.wgsl" columns=TV

@compute @workgroup_size(THREADS)
fn dkdv(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    let j0 = group.x * OWN;
    let head_kv = group.y;
    // Masks and lengths are the same for all heads of the group.
    let at = sequence(group.z, head_kv * problem.group);
    let range = row_range(at, i32(j0), i32(j0 + OWN));
    let last_key = u32(max(at.keys, 1) - 1);
    let last_row = last_query(at);
    let key_start = head_start(problem.key, at.batch, head_kv);
    let value_start = head_start(problem.value, at.batch, head_kv);

    var dk: array<array<vec4f, TK>, TR>;
    var dv: array<array<vec4f, TV>, TR>;
#if STEP_SUMS
    // One f32 sum over n rows rounds every time in the same direction where gradients are alike, which is a relative error of about
    // 8e-9 n. So a step has sums of its own. What is lost where they are added is what the next step begins with, so that the
    // number of steps does not count.
    var dk_step: array<array<vec4f, TK>, TR>;
    var dv_step: array<array<vec4f, TV>, TR>;
#endif
    // Where no row sees a key there is nothing to load.
    let heads = select(0u, problem.group, range.x < range.y);
    for (var head = head_kv * problem.group; head < head_kv * problem.group + heads; head++) {
        let query_start = head_start(problem.query, at.batch, head);
        let grad_start = head_start(problem.grad_out, at.batch, head);
        let rows_start = (at.batch * problem.heads + head) * problem.seqlen_q;
        let first = u32(range.x / i32(STEP) * i32(STEP));
        var key_next = load_chunk_key(key_start, j0, last_key, 0u, HEAD_DIM, thread);
        var query_next = load_chunk_query(query_start, first, last_row, 0u, HEAD_DIM, thread);
        var value_next = load_chunk_value(value_start, j0, last_key, 0u, HEAD_DIM_V, thread);
        var grad_next = load_chunk_grad_out(grad_start, first, last_row, 0u, HEAD_DIM_V, thread);
        var grad_rows = load_block_grad_out(grad_start, first, last_row, HEAD_DIM_V, thread);
        var query_rows = load_block_query(query_start, first, last_row, HEAD_DIM, thread);
        for (var step = range.x / i32(STEP) * i32(STEP); step < range.y; step += i32(STEP)) {
            let i0 = u32(step);
            // S^T = K Q^T, dP^T = V dO^T
            var s = Scores();
            for (var d0 = 0u; d0 < HEAD_DIM; d0 += CHUNK) {
                workgroupBarrier();
                store_chunk_key(key_next, 0u, 1u, d0, HEAD_DIM, thread);
                store_chunk_query(query_next, STEP_AT, TC, d0, HEAD_DIM, thread);
                workgroupBarrier();
                // The next chunk: of this tile, or the first of the next tile.
                let more = d0 + CHUNK < HEAD_DIM;
                let d1 = select(0u, d0 + CHUNK, more);
                key_next = load_chunk_key(key_start, j0, last_key, d1, HEAD_DIM, thread);
                let i1 = select(i0 + STEP, i0, more);
                query_next = load_chunk_query(query_start, i1, last_row, d1, HEAD_DIM, thread);
                add_scores(&s, ty, tx);
            }
            var ds = Scores();
            for (var d0 = 0u; d0 < HEAD_DIM_V; d0 += CHUNK) {
                workgroupBarrier();
                store_chunk_value(value_next, 0u, 1u, d0, HEAD_DIM_V, thread);
                store_chunk_grad_out(grad_next, STEP_AT, TC, d0, HEAD_DIM_V, thread);
                workgroupBarrier();
                let more = d0 + CHUNK < HEAD_DIM_V;
                let d1 = select(0u, d0 + CHUNK, more);
                value_next = load_chunk_value(value_start, j0, last_key, d1, HEAD_DIM_V, thread);
                let i1 = select(i0 + STEP, i0, more);
                grad_next = load_chunk_grad_out(grad_start, i1, last_row, d1, HEAD_DIM_V, thread);
                add_scores(&ds, ty, tx);
            }

            // P^T and dS^T, 0 where a row does not see a key
            let full = tile_is_full(at, step, step + i32(STEP), i32(j0), i32(j0 + OWN));
            for (var c = 0u; c < TC; c++) {
                let i = i0 + tx * TC + c;
                var row = row_stats(rows_start + min(i, last_row));
                row.x = select(row.x, NO_KEYS, i > last_row);
                for (var r = 0u; r < TR; r++) {
                    let shape = score_shape(score_sign() * s[r][c / 4u][c % 4u]);
                    let seen = full || keep(at, i32(i), i32(j0 + r * THREADS_Y + ty));
                    let p = select(0.0, exp_difference(score_size() * shape, row.x), seen);
                    s[r][c / 4u][c % 4u] = p;
                    ds[r][c / 4u][c % 4u] = p * (ds[r][c / 4u][c % 4u] - row.y) * score_slope(shape);
                }
            }

            // dV = dV + P^T dO
            workgroupBarrier();
            store_scores(s, ty, tx);
            for (var n = 0u; n < STEP; n += BLOCK) {
                if n > 0u {
                    workgroupBarrier();
                }
                store_block_grad_out(grad_rows, HEAD_DIM_V, thread);
                workgroupBarrier();
                grad_rows = load_block_grad_out(grad_start, i0 + n + BLOCK, last_row, HEAD_DIM_V, thread);
#if STEP_SUMS
                add_result_TV(&dv_step, n, ty, tx);
#else
                add_result_TV(&dv, n, ty, tx);
#endif
            }
#if STEP_SUMS
            for (var r = 0u; r < TR; r++) {
                for (var u = 0u; u < TV; u++) {
                    let before = dv[r][u];
                    dv[r][u] += dv_step[r][u];
                    dv_step[r][u] -= dv[r][u] - before;
                }
            }
#endif

            // dK = dK + dS^T Q
            workgroupBarrier();
            store_scores(ds, ty, tx);
            for (var n = 0u; n < STEP; n += BLOCK) {
                if n > 0u {
                    workgroupBarrier();
                }
                store_block_query(query_rows, HEAD_DIM, thread);
                workgroupBarrier();
                query_rows = load_block_query(query_start, i0 + n + BLOCK, last_row, HEAD_DIM, thread);
#if STEP_SUMS
                add_result_TK(&dk_step, n, ty, tx);
#else
                add_result_TK(&dk, n, ty, tx);
#endif
            }
#if STEP_SUMS
            for (var r = 0u; r < TR; r++) {
                for (var u = 0u; u < TK; u++) {
                    let before = dk[r][u];
                    dk[r][u] += dk_step[r][u];
                    dk_step[r][u] -= dk[r][u] - before;
                }
            }
#endif
        }
    }

    for (var r = 0u; r < TR; r++) {
        let j = j0 + r * THREADS_Y + ty;
        if j < problem.seqlen_k {
            let dk_start = head_start(problem.grad_key, at.batch, head_kv) + j * problem.grad_key.row;
            for (var u = 0u; u < TK; u++) {
                write_grad_key(dk_start, 4u * (u * THREADS_X + tx), HEAD_DIM, dk[r][u] * problem.scale);
            }
            let dv_start = head_start(problem.grad_value, at.batch, head_kv) + j * problem.grad_value.row;
            for (var u = 0u; u < TV; u++) {
                write_grad_value(dv_start, 4u * (u * THREADS_X + tx), HEAD_DIM_V, dv[r][u]);
            }
        }
    }
}
