// Materialised backward pass, step 1 of 3: P[i, j] = exp(S[i, j] - lse_i) and dS[i, j] = P[i, j] (dO_i · v_j - delta_i) score', the
// gradient of the score as scaled, score' being what a softcap leaves of it. One invocation a pair.
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"
#include "common/elements.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
// Not written; in the buffer of the scores, of which a dispatch may only see all parts as writable.
#include "common/row_stats.wgsl" access=read_write
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(16) var<storage, read_write> scores: array<vec2f>;
#include "common/read.wgsl" tensor=query
#include "common/read.wgsl" tensor=key
#include "common/read.wgsl" tensor=value
#include "common/read.wgsl" tensor=grad_out
#include "common/naive_product.wgsl"

@compute @workgroup_size(16, 16)
fn scores_of(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let heads = problem.heads;
    let at = sequence(group.z / heads, group.z % heads);
    let i = group.y * 16u + local.y;
    let j = group.x * 16u + local.x;
    if i >= problem.seqlen_q || j >= problem.seqlen_k {
        return;
    }
    let row = group.z * problem.seqlen_q + i;
    var p_and_ds = vec2f();
    if keep(at, i32(i), i32(j)) {
        let q = head_start(problem.query, at.batch, at.head_q) + i * problem.query.row;
        let k = head_start(problem.key, at.batch, at.head_kv) + j * problem.key.row;
        let dot = query_times_key(q, k);
        let g = head_start(problem.grad_out, at.batch, at.head_q) + i * problem.grad_out.row;
        let v = head_start(problem.value, at.batch, at.head_kv) + j * problem.value.row;
        var dp = vec4f();
        for (var d = 0u; d < HEAD_DIM_V; d += 4u) {
            let x = first_elements(unpack4(read_grad_out(g, d, HEAD_DIM_V)), HEAD_DIM_V - d);
            dp += x * unpack4(read_value(v, d, HEAD_DIM_V));
        }
        let shape = score_shape(score_sign() * dot);
        // The larger of the two, which is the score: no compiler makes the product and the difference one fma, which would not
        // round the score as the forward pass did.
        let p = exp_difference(max(score_size() * shape, MASKED), row_stats(row).x);
        p_and_ds = vec2f(p, p * (sum4(dp) - row_stats(row).y) * score_slope(shape));
    }
    scores[row * problem.seqlen_k + j] = p_and_ds;
}
