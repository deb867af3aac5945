// What: gradients of K and V in tiles (FlashAttention-2, Dao 2023, algorithm 2). Scores are recomputed from q, k and lse, and never leave
//   the chip. There are no atomics.
//
//     dK = 0, dV = 0
//     for each query head of the group, for each tile of STEP rows that may see some key:
//         S^T = score(K Q^T)                        OWN x STEP
//         P^T = exp(S^T - lse)
//         dP^T = V dO^T
//         dS^T = P^T (dP^T - delta) score'          score' is d score / d (scale · q·k)
//         dV = dV + P^T dO                          OWN x HEAD_DIM_V
//         dK = dK + dS^T Q                          OWN x HEAD_DIM
//
// Who: a workgroup owns OWN keys of one key-value head. tile/products.wgsl says what each thread holds.
// Pipelining: while one product runs, the next chunk of its operands is loaded into registers.
// Needs q, k, v, dO, row_stats. Gives dK and dV.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"
#include "tile/threads.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#include "memory/row_stats.wgsl" access=read
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "memory/read.wgsl" tensor=grad_out
#include "memory/write.wgsl" tensor=grad_key
#include "memory/write.wgsl" tensor=grad_value
#include "tile/products.wgsl"
#if DROPOUT
#include "tile/dropout.wgsl" rows=STEP keys=OWN
#endif
#include "tile/load.wgsl" tensor=query count=STEP columns=TK
#include "tile/load.wgsl" tensor=key count=OWN columns=TK
#include "tile/load.wgsl" tensor=value count=OWN columns=TV
#include "tile/load.wgsl" tensor=grad_out count=STEP columns=TV
#include "tile/result.wgsl" columns=TK
#include "tile/result.wgsl" columns=TV

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
    // The first of the heads that share these keys.
    let of_group = sequence(group.z, group.y * problem.group);
    let last = last_key(of_group);
    let last_row = last_query(of_group);

    var dk: array<array<vec4f, TK>, TR>;
    var dv: array<array<vec4f, TV>, TR>;
#if STEP_SUMS
    // One f32 sum over n rows rounds every time in the same direction where gradients are alike, which is a relative error of about
    // 8e-9 n. So a step has sums of its own. What is lost where they are added is what the next step begins with, so that the
    // number of steps does not count.
    var dk_step: array<array<vec4f, TK>, TR>;
    var dv_step: array<array<vec4f, TV>, TR>;
#endif
    for (var head = of_group.head; head < of_group.head + problem.group; head++) {
        let at = with_head(of_group, head);
        let visited = row_tiles(at, i32(j0), i32(j0 + OWN), STEP);
        // Where no row sees a key there is nothing to load.
        if visited.count == 0 {
            continue;
        }
        let first = u32(tile(visited, 0));
        var key_next = load_chunk_key(at, j0, last, 0u, HEAD_DIM, thread);
        var query_next = load_chunk_query(at, first, last_row, 0u, HEAD_DIM, thread);
        var value_next = load_chunk_value(at, j0, last, 0u, HEAD_DIM_V, thread);
        var grad_next = load_chunk_grad_out(at, first, last_row, 0u, HEAD_DIM_V, thread);
        var grad_rows = load_block_grad_out(at, first, last_row, HEAD_DIM_V, thread);
        var query_rows = load_block_query(at, first, last_row, HEAD_DIM, thread);
        for (var t = 0; t < visited.count; t++) {
            let i0 = u32(tile(visited, t));
            let i_next = u32(tile(visited, t + 1));
#if DROPOUT
            find_kept(at, i0, j0, thread);
#endif
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
                key_next = load_chunk_key(at, j0, last, d1, HEAD_DIM, thread);
                let i1 = select(i_next, i0, more);
                query_next = load_chunk_query(at, i1, last_row, d1, HEAD_DIM, thread);
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
                value_next = load_chunk_value(at, j0, last, d1, HEAD_DIM_V, thread);
                let i1 = select(i_next, i0, more);
                grad_next = load_chunk_grad_out(at, i1, last_row, d1, HEAD_DIM_V, thread);
                add_scores(&ds, ty, tx);
            }

            // P^T and dS^T, 0 where a row does not see a key
            for (var c = 0u; c < TC; c++) {
                let i = i0 + tx * TC + c;
                var stats = row_stats(row_number(at, min(i, last_row)));
                stats.x = select(stats.x, NO_KEYS, i > last_row);
                for (var r = 0u; r < TR; r++) {
                    let j = i32(j0 + r * THREADS_Y + ty);
                    let x = scored(s[r][c / 4u][c % 4u], at, i32(i), j);
                    let seen = t < visited.full || keep(at, i32(i), j);
                    let p = select(0.0, exp_difference(x.score, stats.x), seen);
                    s[r][c / 4u][c % 4u] = p;
#if DROPOUT
                    // What is dropped of P^T and dP^T. dV is multiplied at the end.
                    let kept = kept_of(i0, j0, i, u32(j));
                    s[r][c / 4u][c % 4u] = select(0.0, p, kept);
                    ds[r][c / 4u][c % 4u] = select(0.0, ds[r][c / 4u][c % 4u] * problem.dropout_scale, kept);
#endif
                    // dP of a key that does not count may be infinite.
                    ds[r][c / 4u][c % 4u] = select(0.0, p * (ds[r][c / 4u][c % 4u] - stats.y) * x.slope, p > 0.0);
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
                grad_rows = load_block_grad_out(at, select(i_next, i0 + n + BLOCK, n + BLOCK < STEP), last_row, HEAD_DIM_V, thread);
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
                query_rows = load_block_query(at, select(i_next, i0 + n + BLOCK, n + BLOCK < STEP), last_row, HEAD_DIM, thread);
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
            let dk_start = grad_key_row(of_group, j);
            for (var u = 0u; u < TK; u++) {
                write_grad_key(dk_start, 4u * (u * THREADS_X + tx), HEAD_DIM, dk[r][u] * problem.scale);
            }
            let dv_start = grad_value_row(of_group, j);
            for (var u = 0u; u < TV; u++) {
#if DROPOUT
                dv[r][u] *= problem.dropout_scale;
#endif
                write_grad_value(dv_start, 4u * (u * THREADS_X + tx), HEAD_DIM_V, dv[r][u]);
            }
        }
    }
}
