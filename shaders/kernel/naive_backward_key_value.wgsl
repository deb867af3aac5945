// Materialised backward pass, step 2 of 3: dv_j = sum of P[i, j] dO_i and dk_j = scale · sum of dS[i, j] q_i, over all rows i of all
// query heads that share the key. One invocation four columns of each.
// Needs q, dO, P, dS. Gives dK, dV.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;
@group(0) @binding(16) var<storage, read> scores: array<vec2f>;
#if LENGTHS_IN_ROWS
#include "memory/row_stats.wgsl" access=read
#endif
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=grad_out
#include "memory/write.wgsl" tensor=grad_key
#include "memory/write.wgsl" tensor=grad_value

@compute @workgroup_size(16, 16)
fn gradients_of(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let heads_kv = problem.heads / problem.group;
    let of_group = sequence(group.z / heads_kv, group.z % heads_kv * problem.group);
    let j = group.y * 16u + local.y;
    let d = (group.x * 16u + local.x) * 4u;
    if j >= problem.seqlen_k || d >= max(HEAD_DIM, HEAD_DIM_V) {
        return;
    }
    let queries = u32(of_group.queries);
    var dk = vec4f();
    var dv = vec4f();
    // Sums of sums, as in naive_output.wgsl.
    var dk_sum = vec4f();
    var dv_sum = vec4f();
    for (var head = of_group.head; head < of_group.head + problem.group; head++) {
        let at = with_head(of_group, head);
        for (var i0 = 0u; i0 < queries; i0 += 128u) {
            for (var i = i0; i < min(i0 + 128u, queries); i++) {
                let p_and_ds = scores[row_number(at, i) * problem.seqlen_k + j];
                dv_sum += p_and_ds.x * unpack4(read_grad_out(grad_out_row(at, i), d, HEAD_DIM_V));
                dk_sum += p_and_ds.y * unpack4(read_query(query_row(at, i), d, HEAD_DIM));
            }
            let before = array<vec4f, 2>(dk, dv);
            dk += dk_sum;
            dv += dv_sum;
            dk_sum -= dk - before[0];
            dv_sum -= dv - before[1];
        }
    }
    write_grad_key(grad_key_row(of_group, j), d, HEAD_DIM, dk * problem.scale);
    write_grad_value(grad_value_row(of_group, j), d, HEAD_DIM_V, dv);
}
