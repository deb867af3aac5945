// Materialised attention, step 2 of 3: each row of S becomes P = exp(S - max) / sum, in place. One workgroup a row.
#include "common/problem.wgsl"
#include "common/softmax.wgsl"

#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
@group(0) @binding(7) var<storage, read_write> scores: array<f32>;

var<workgroup> reduced: array<f32, 64>;

@compute @workgroup_size(64)
fn softmax(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let rows = problem.row_end - problem.row_begin;
    let start = (group.z * rows + group.x) * problem.seqlen_k;

    var most = LOWEST;
    for (var j = thread; j < problem.seqlen_k; j += 64u) {
        most = max(most, scores[start + j]);
    }
    reduced[thread] = most;
    for (var half = 32u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            reduced[thread] = max(reduced[thread], reduced[thread + half]);
        }
    }
    workgroupBarrier();
    let m = reduced[0];
    workgroupBarrier();

    var sum = 0.0;
    for (var j = thread; j < problem.seqlen_k; j += 64u) {
        sum += exp_difference(scores[start + j], m);
    }
    reduced[thread] = sum;
    for (var half = 32u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            reduced[thread] += reduced[thread + half];
        }
    }
    workgroupBarrier();
    let l = reduced[0];
    let inverse = inverse_sum(l);

    for (var j = thread; j < problem.seqlen_k; j += 64u) {
        scores[start + j] = exp_difference(scores[start + j], m) * inverse;
    }
#if LSE
    if thread == 0u {
        lse[head_start(problem.lse, group.z / problem.heads, group.z % problem.heads) + group.x] = lse_bits(m, l);
    }
#endif
}
