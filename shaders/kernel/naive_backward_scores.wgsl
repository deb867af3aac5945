// Materialised backward pass, step 1 of 3: P[i, j] = exp(S[i, j] - lse_i) and dS[i, j] = P[i, j] (dO_i · v_j - delta_i) score', the
// gradient of scale · q·k. score' is d score / d (scale · q·k). One invocation a pair.
// Needs q, k, v, dO, row_stats. Gives (P, dS) of each pair.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
// Not written here, but in one buffer with the scores: a dispatch may see parts of a buffer only if all are writable.
#include "memory/row_stats.wgsl" access=read_write
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(16) var<storage, read_write> scores: array<vec2f>;
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "memory/read.wgsl" tensor=grad_out
#include "kernel/naive_product.wgsl"

@compute @workgroup_size(16, 16)
fn scores_of(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let heads = problem.heads;
    let at = sequence(group.z / heads, group.z % heads);
    let i = group.y * 16u + local.y;
    let j = group.x * 16u + local.x;
    if i >= problem.seqlen_q || j >= problem.seqlen_k {
        return;
    }
    let row = row_number(at, i);
    var p_and_ds = vec2f();
    if keep(at, i32(i), i32(j)) {
        let x = scored(query_times_key(query_row(at, i), key_row(at, j)), at, i32(i), i32(j));
        let g = grad_out_row(at, i);
        let v = value_row(at, j);
        var dp = vec4f();
        for (var d = 0u; d < HEAD_DIM_V; d += 4u) {
            let grad = first_elements(unpack4(read_grad_out(g, d, HEAD_DIM_V)), HEAD_DIM_V - d);
            dp += grad * unpack4(read_value(v, d, HEAD_DIM_V));
        }
        // The larger of the two, which is the score: no compiler makes the product and the difference one fma, which would not
        // round the score as the forward pass did.
        let p = exp_difference(max(x.score, MASKED), row_stats(row).x);
#if DROPOUT
        let factor = select(0.0, problem.dropout_scale, is_kept(at, i, j));
        p_and_ds = vec2f(p * factor, p * (sum4(dp) * factor - row_stats(row).y) * x.slope);
#else
        p_and_ds = vec2f(p, p * (sum4(dp) - row_stats(row).y) * x.slope);
#endif
        // dP of a key that a bias masks may be infinite.
        p_and_ds.y = select(0.0, p_and_ds.y, p > 0.0);
    }
    scores[row * problem.seqlen_k + j] = p_and_ds;
}
