// Materialised attention, step 2 of 3: each row of S becomes P = exp(S - max) / sum, in place. One workgroup a row.
// Needs S. Gives P and, with LSE, lse.
#include "attention/attention.wgsl"

#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
@group(0) @binding(7) var<storage, read_write> scores: array<f32>;

var<workgroup> reduced: array<f32, 64>;

@compute @workgroup_size(64)
fn softmax(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let at = sequence(group.z / problem.heads, group.z % problem.heads);
    let i = problem.row_begin + group.x;
    let start = row_number(at, i) * problem.seqlen_k;

    var maximum = LOWEST;
    for (var j = thread; j < problem.seqlen_k; j += 64u) {
        maximum = max(maximum, scores[start + j]);
    }
    reduced[thread] = maximum;
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
    // A row in which some key counts has a sum of at least 1, from its largest score.
    let row = finish_row(at, m, reduced[0], reduced[0] < 0.5);

    for (var j = thread; j < problem.seqlen_k; j += 64u) {
        scores[start + j] = exp_difference(scores[start + j], m) * row.inverse;
#if DROPOUT
        scores[start + j] = select(0.0, scores[start + j], is_kept(at, i, j));
#endif
    }
#if LSE
    if thread == 0u {
        lse[lse_row(at, i)] = row.lse;
    }
#endif
}
