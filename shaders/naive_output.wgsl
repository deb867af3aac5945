// Materialised attention, step 3 of 3: o_i = sum over j of P[i, j] v_j. One invocation four output columns.
#include "common/problem.wgsl"
#include "common/elements.wgsl"

@group(0) @binding(3) var<storage, read> value: InElements;
@group(0) @binding(4) var<storage, read_write> out: OutElements;
@group(0) @binding(7) var<storage, read> scores: array<f32>;
#include "common/read.wgsl" tensor=value
#include "common/write.wgsl" tensor=out

@compute @workgroup_size(16, 16)
fn output(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let at = sequence(group.z / problem.heads, group.z % problem.heads);
    let row = group.y * 16u + local.y;
    let d = (group.x * 16u + local.x) * 4u;
    let rows = problem.row_end - problem.row_begin;
    if row >= rows || d >= HEAD_DIM_V {
        return;
    }
    let p = (group.z * rows + row) * problem.seqlen_k;
    let v = head_start(problem.value, at.batch, at.head_kv);
    var o = vec4f();
    // A sum of sums: one long sum would round every time in the same direction where values are alike. What the addition of a sum
    // loses is what the next one begins with, so that the number of sums does not count.
    var sum = vec4f();
    for (var j0 = 0u; j0 < u32(at.keys); j0 += 128u) {
        for (var j = j0; j < min(j0 + 128u, u32(at.keys)); j++) {
            sum += scores[p + j] * unpack4(read_value(v + j * problem.value.row, d, HEAD_DIM_V));
        }
        let before = o;
        o += sum;
        sum -= o - before;
    }
    let start = head_start(problem.out, at.batch, at.head_q) + row * problem.out.row;
    write_out(start, d, HEAD_DIM_V, o);
}
