// What: first step of the backward pass (FlashAttention-2, Dao 2023, algorithm 2). It writes two numbers of each row, its row_stats.
//
//     delta_i = sum over d of dO[i, d] O[i, d], less dlse_i where lse has a gradient of its own
//     row_stats_i = (lse_i, delta_i)                lse_i is NO_KEYS for a row that sees no key, and a little larger where it is huge
//
// Who: ROW_THREADS threads share a row.
// Pipelining: none.
// Needs out, lse, dO. Gives row_stats. With LENGTHS the numbers of valid queries and keys of each batch entry follow them, for the kernels
//   that run later. With CLEAR, dQ is set to 0; backward_fused_tile.wgsl then adds to it.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(4) var<storage, read> out: InElements;
@group(0) @binding(5) var<storage, read> lse: array<u32>;
#include "memory/row_stats.wgsl" access=read_write
@group(0) @binding(11) var<storage, read> grad_out: InElements;
#if GRAD_LSE
@group(0) @binding(12) var<storage, read> grad_lse: array<f32>;
#endif
#if CLEAR
@group(0) @binding(13) var<storage, read_write> grad_query: OutElements;
#include "memory/write.wgsl" tensor=grad_query
#endif
#include "memory/read.wgsl" tensor=out
#include "memory/read.wgsl" tensor=grad_out

var<workgroup> partial: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn delta(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let row = group.x * (THREADS / ROW_THREADS) + thread / ROW_THREADS;
    let i = min(row, problem.seqlen_q - 1u);
    let at = sequence(group.z, group.y);
    let out_start = out_row(at, i);
    let grad_start = grad_out_row(at, i);
    var sum = vec4f();
    for (var d = 4u * (thread % ROW_THREADS); d < HEAD_DIM_V; d += 4u * ROW_THREADS) {
        let x = unpack4(read_out(out_start, d, HEAD_DIM_V)) * unpack4(read_grad_out(grad_start, d, HEAD_DIM_V));
        sum += first_elements(x, HEAD_DIM_V - d);
    }
#if CLEAR
    if row < problem.seqlen_q {
        let start = grad_query_row(at, i);
        for (var d = 4u * (thread % ROW_THREADS); d < HEAD_DIM; d += 4u * ROW_THREADS) {
            write_grad_query(start, d, HEAD_DIM, vec4f());
        }
    }
#endif
    partial[thread] = sum4(sum);
    workgroupBarrier();
    if thread % ROW_THREADS == 0u && row < problem.seqlen_q {
        var delta = 0.0;
        for (var n = 0u; n < ROW_THREADS; n++) {
            delta += partial[thread + n];
        }
        let place = lse_row(at, i);
#if GRAD_LSE
        delta -= grad_lse[place];
#endif
        // WGSL may assume that infinity does not occur, so an empty row is told by its bits.
        let is_empty = lse[place] == 0xff800000u;
        // From 4 million on the rounding of lse is so many units that exp(score - lse) of a largest score could be infinite. So
        // much more makes it finite. It is right only below.
        let given = bitcast<f32>(lse[place]);
        let row_lse = select(given + max(abs(given) * 0x1p-20 - 4.0, 0.0), NO_KEYS, is_empty);
        rows[row_number(at, i)] = bitcast<vec2u>(vec2f(row_lse, delta));
    }
#if LENGTHS
    if group.x == 0u && group.y == 0u && thread == 0u {
        rows[problem.lengths_at + at.batch] = vec2u(u32(at.queries), u32(at.keys));
    }
#endif
}
