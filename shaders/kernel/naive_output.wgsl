// Materialised attention, step 3 of 3: o_i = sum over j of P[i, j] v_j. One invocation four output columns.
// Needs v, P. Gives out.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(3) var<storage, read> value: InElements;
@group(0) @binding(4) var<storage, read_write> out: OutElements;
@group(0) @binding(7) var<storage, read> scores: array<f32>;
#include "memory/read.wgsl" tensor=value
#include "memory/write.wgsl" tensor=out

@compute @workgroup_size(16, 16)
fn output(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let at = sequence(group.z / problem.heads, group.z % problem.heads);
    let i = problem.row_begin + group.y * 16u + local.y;
    let d = (group.x * 16u + local.x) * 4u;
    if i >= problem.row_end || d >= HEAD_DIM_V {
        return;
    }
    let p = row_number(at, i) * problem.seqlen_k;
    var o = vec4f();
    // A sum of sums: one long sum would round every time in the same direction where values are alike. What rounding loses
    // when a sum is added is where the next sum begins, so the error does not grow with the number of sums.
    var sum = vec4f();
    for (var j0 = 0u; j0 < u32(at.keys); j0 += 128u) {
        for (var j = j0; j < min(j0 + 128u, u32(at.keys)); j++) {
            sum += scores[p + j] * unpack4(read_value(value_row(at, j), d, HEAD_DIM_V));
        }
        let before = o;
        o += sum;
        sum -= o - before;
    }
    write_out(out_row(at, i), d, HEAD_DIM_V, o);
}
