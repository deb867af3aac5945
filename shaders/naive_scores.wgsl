// Materialised attention, step 1 of 3: S[i, j] = score(q_i · k_j), or MASKED. One invocation a score.
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"
#include "common/elements.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(7) var<storage, read_write> scores: array<f32>;
#include "common/read.wgsl" tensor=query
#include "common/read.wgsl" tensor=key
#include "common/naive_product.wgsl"

@compute @workgroup_size(16, 16)
fn scores_of(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let heads = problem.heads;
    let at = sequence(group.z / heads, group.z % heads);
    let row = group.y * 16u + local.y;
    let j = group.x * 16u + local.x;
    let rows = problem.row_end - problem.row_begin;
    if row >= rows || j >= problem.seqlen_k {
        return;
    }
    let i = i32(problem.row_begin + row);
    var s = MASKED;
    if keep(at, i, i32(j)) {
        let q = head_start(problem.query, at.batch, at.head_q) + row * problem.query.row;
        let k = head_start(problem.key, at.batch, at.head_kv) + j * problem.key.row;
        s = score(query_times_key(q, k), at, i, i32(j));
    }
    scores[(group.z * rows + row) * problem.seqlen_k + j] = s;
}
