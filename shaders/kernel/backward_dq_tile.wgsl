// What: gradient of Q in tiles (FlashAttention-2, Dao 2023, algorithm 2, with the loops exchanged: one workgroup writes a row of dQ).
//
//     dQ = 0
//     for each tile of STEP keys that some row may see:
//         S = score(Q K^T)                          OWN x STEP
//         P = exp(S - lse)
//         dP = dO V^T
//         dS = P (dP - delta) score'                score' is d score / d (scale · q·k)
//         dQ = dQ + dS K                            OWN x HEAD_DIM
//
// Who: a workgroup owns OWN rows of one head. tile/products.wgsl says what each thread holds.
// Pipelining: while one product runs, the next chunk of its operands is loaded into registers.
// Needs q, k, v, dO, row_stats. Gives dQ.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"
#include "tile/threads.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#include "memory/row_stats.wgsl" access=read
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(13) var<storage, read_write> grad_query: OutElements;
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "memory/read.wgsl" tensor=grad_out
#include "memory/write.wgsl" tensor=grad_query
#include "tile/products.wgsl"
#if DROPOUT
#include "tile/dropout.wgsl" rows=OWN keys=STEP
#endif
#include "tile/load.wgsl" tensor=query count=OWN columns=TK
#include "tile/load.wgsl" tensor=key count=STEP columns=TK
#include "tile/load.wgsl" tensor=value count=STEP columns=TV
#include "tile/load.wgsl" tensor=grad_out count=OWN columns=TV
#include "tile/result.wgsl" columns=TK

@compute @workgroup_size(THREADS)
fn dq(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    let at = sequence(group.z, group.y);
    // The last rows first: with a causal mask they take longest.
    let i0 = (workgroups.x - 1u - group.x) * OWN;
    let i1 = min(i0 + OWN, problem.seqlen_q);
    let visited = key_tiles(at, i32(i0), i32(i1), STEP);
    let last_row = last_query(at);
    let last = last_key(at);
    var stats: array<vec2f, TR>;
    for (var r = 0u; r < TR; r++) {
        let i = min(i0 + r * THREADS_Y + ty, last_row);
        stats[r] = row_stats(row_number(at, i));
    }

    var dq: array<array<vec4f, TK>, TR>;
#if STEP_SUMS
    // A step has a sum of its own, as in backward_dkdv_tile.wgsl.
    var dq_step: array<array<vec4f, TK>, TR>;
#endif
    let first = u32(tile(visited, 0));
    var query_next = load_chunk_query(at, i0, last_row, 0u, HEAD_DIM, thread);
    var grad_next = load_chunk_grad_out(at, i0, last_row, 0u, HEAD_DIM_V, thread);
    var key_next: Chunk_key;
    var value_next: Chunk_value;
    var key_rows: Block_key;
    if visited.count > 0 {
        key_next = load_chunk_key(at, first, last, 0u, HEAD_DIM, thread);
        value_next = load_chunk_value(at, first, last, 0u, HEAD_DIM_V, thread);
        key_rows = load_block_key(at, first, last, HEAD_DIM, thread);
    }
    for (var t = 0; t < visited.count; t++) {
        let j0 = u32(tile(visited, t));
        let j1 = u32(tile(visited, t + 1));
#if DROPOUT
        find_kept(at, i0, j0, thread);
#endif
        // S = Q K^T, dP = dO V^T
        var s = Scores();
        for (var d0 = 0u; d0 < HEAD_DIM; d0 += CHUNK) {
            workgroupBarrier();
            store_chunk_query(query_next, 0u, 1u, d0, HEAD_DIM, thread);
            store_chunk_key(key_next, STEP_AT, TC, d0, HEAD_DIM, thread);
            workgroupBarrier();
            // The next chunk: of this tile, or the first of the next tile.
            let more = d0 + CHUNK < HEAD_DIM;
            let d1 = select(0u, d0 + CHUNK, more);
            query_next = load_chunk_query(at, i0, last_row, d1, HEAD_DIM, thread);
            key_next = load_chunk_key(at, select(j1, j0, more), last, d1, HEAD_DIM, thread);
            add_scores(&s, ty, tx);
        }
        var ds = Scores();
        for (var d0 = 0u; d0 < HEAD_DIM_V; d0 += CHUNK) {
            workgroupBarrier();
            store_chunk_grad_out(grad_next, 0u, 1u, d0, HEAD_DIM_V, thread);
            store_chunk_value(value_next, STEP_AT, TC, d0, HEAD_DIM_V, thread);
            workgroupBarrier();
            let more = d0 + CHUNK < HEAD_DIM_V;
            let d1 = select(0u, d0 + CHUNK, more);
            grad_next = load_chunk_grad_out(at, i0, last_row, d1, HEAD_DIM_V, thread);
            value_next = load_chunk_value(at, select(j1, j0, more), last, d1, HEAD_DIM_V, thread);
            add_scores(&ds, ty, tx);
        }

        // dS, 0 where a row does not see a key
        for (var r = 0u; r < TR; r++) {
            let i = i0 + r * THREADS_Y + ty;
            for (var c = 0u; c < TC4; c++) {
                let j = j0 + tx * TC + 4u * c;
                let x = scored_keys(s[r][c], at, i32(i), i32(j));
                var p = exp2((x.score - stats[r].x) * LOG2_E);
                if t >= visited.full {
                    p = select(vec4f(), p, keep_keys(at, i32(i), i32(j)));
                }
#if DROPOUT
                let kept = kept4_of(i0, j0, vec4u(i), vec4u(j) + vec4u(0u, 1u, 2u, 3u));
                ds[r][c] = select(vec4f(), ds[r][c] * problem.dropout_scale, kept);
#endif
                // dP of a key that does not count may be infinite.
                ds[r][c] = select(vec4f(), p * (ds[r][c] - stats[r].y) * x.slope, p > vec4f());
            }
        }

        // dQ = dQ + dS K
        workgroupBarrier();
        store_scores(ds, ty, tx);
        for (var n = 0u; n < STEP; n += BLOCK) {
            if n > 0u {
                workgroupBarrier();
            }
            store_block_key(key_rows, HEAD_DIM, thread);
            workgroupBarrier();
            key_rows = load_block_key(at, select(j1, j0 + n + BLOCK, n + BLOCK < STEP), last, HEAD_DIM, thread);
#if STEP_SUMS
            add_result_TK(&dq_step, n, ty, tx);
#else
            add_result_TK(&dq, n, ty, tx);
#endif
        }
#if STEP_SUMS
        for (var r = 0u; r < TR; r++) {
            for (var u = 0u; u < TK; u++) {
                let before = dq[r][u];
                dq[r][u] += dq_step[r][u];
                dq_step[r][u] -= dq[r][u] - before;
            }
        }
#endif
    }

    for (var r = 0u; r < TR; r++) {
        let i = i0 + r * THREADS_Y + ty;
        if i < i1 {
            for (var u = 0u; u < TK; u++) {
                write_grad_query(grad_query_row(at, i), 4u * (u * THREADS_X + tx), HEAD_DIM, dq[r][u] * problem.scale);
            }
        }
    }
}
