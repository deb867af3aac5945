// Materialised backward pass, step 3 of 3: dq_i = scale · sum over j of dS[i, j] k_j. One invocation four columns.
// Needs k, dS. Gives dQ.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(13) var<storage, read_write> grad_query: OutElements;
@group(0) @binding(16) var<storage, read> scores: array<vec2f>;
#if LENGTHS_IN_ROWS
#include "memory/row_stats.wgsl" access=read
#endif
#include "memory/read.wgsl" tensor=key
#include "memory/write.wgsl" tensor=grad_query

@compute @workgroup_size(16, 16)
fn gradient_of(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let at = sequence(group.z / problem.heads, group.z % problem.heads);
    let i = group.y * 16u + local.y;
    let d = (group.x * 16u + local.x) * 4u;
    if i >= problem.seqlen_q || d >= HEAD_DIM {
        return;
    }
    let row = row_number(at, i) * problem.seqlen_k;
    var dq = vec4f();
    // A sum of sums, as in naive_output.wgsl.
    var sum = vec4f();
    for (var j0 = 0u; j0 < u32(at.keys); j0 += 128u) {
        for (var j = j0; j < min(j0 + 128u, u32(at.keys)); j++) {
            sum += scores[row + j].y * unpack4(read_key(key_row(at, j), d, HEAD_DIM));
        }
        let before = dq;
        dq += sum;
        sum -= dq - before;
    }
    write_grad_query(grad_query_row(at, i), d, HEAD_DIM, dq * problem.scale);
}
