// What: decides for each query head which modules of the coop kernels for f32 and scaled bf16 compute it. The range of a head is 1 for the
//   modules with BY_ROWS, where each row of a tile may have a scale of its own (matrix/parts.wgsl), and 0 for those without.
//
//     range = 1 if the largest and the smallest size of a tensor are far apart, or scores may be so large that exponents of 2 are rounded
//
// Who: one thread a head reads the sizes of the head's shares.
// Needs the sizes that coop_sizes.wgsl wrote. Gives the ranges, in the buffer of row_stats.wgsl and, with LENGTHS, the lengths before them.
#include "attention/attention.wgsl"
#include "matrix/sizes.wgsl"

// Not written here, but in one buffer with the ranges: a dispatch may see parts of a buffer only if all are writable.
@group(0) @binding(18) var<storage, read_write> sizes: array<vec4u>;
#include "memory/row_stats.wgsl" access=read_write

@compute @workgroup_size(THREADS)
fn find_ranges(@builtin(global_invocation_id) id: vec3u) {
    let head = id.x;
    if head >= problem.heads {
        return;
    }
    let first = (id.y * problem.heads + head) * SHARES * 2u;
    var query_and_key = vec4u();
    var value_and_grad = vec4u();
    for (var n = 0u; n < SHARES; n++) {
        query_and_key = max(query_and_key, sizes[first + 2u * n]);
        value_and_grad = max(value_and_grad, sizes[first + 2u * n + 1u]);
    }
    let apart = are_apart(query_and_key.xy) || are_apart(query_and_key.zw) || are_apart(value_and_grad.xy)
        || are_apart(value_and_grad.zw);
    // A tile's scale is at least that of its tensor, so no tile has a larger product.
    let largest = largest_product(scale_for(query_and_key.x), scale_for(query_and_key.z));
    let large = exponent_bound(largest) >= LARGEST_EXPONENT;
    let at = sequence(id.y, head);
    rows[range_number(at)] = vec2u(u32(apart || large), 0u);
#if LENGTHS
    if head == 0u {
        rows[problem.lengths_at + at.batch] = vec2u(u32(at.queries), u32(at.keys));
    }
#endif
}
