// Materialised attention, step 1 of 3: S[i, j] = score(q_i · k_j), or MASKED. One invocation a score.
// Needs q, k. Gives scores.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(7) var<storage, read_write> scores: array<f32>;
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "kernel/naive_product.wgsl"

@compute @workgroup_size(16, 16)
fn scores_of(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let heads = problem.heads;
    let at = sequence(group.z / heads, group.z % heads);
    let i = problem.row_begin + group.y * 16u + local.y;
    let j = group.x * 16u + local.x;
    if i >= problem.row_end || j >= problem.seqlen_k {
        return;
    }
    var s = MASKED;
    if keep(at, i32(i), i32(j)) {
        s = scored(query_times_key(query_row(at, i), key_row(at, j)), at, i32(i), i32(j)).score;
    }
    scores[row_number(at, i) * problem.seqlen_k + j] = s;
}
