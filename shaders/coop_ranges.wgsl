// Which modules of the coop kernels for f32 and bf16 are for a query head: 1 if they are those with BY_ROWS, where each row of a tile may
// have a scale of its own (common/matrix_parts.wgsl), because its numbers are far apart. One workgroup a head reads Q, K, V and,
// with GRADIENTS, dO once, which is little beside what follows.
//
//     of each tensor:  largest and smallest size, other than 0, of groups of four elements of rows that count
//     far apart:       a tensor whose two sizes are; or scores that may be so large that exponents of 2 are rounded
#include "attention/attention.wgsl"
#include "common/elements.wgsl"
#include "common/sizes.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#if GRADIENTS
@group(0) @binding(11) var<storage, read> grad_out: InElements;
#include "common/read.wgsl" tensor=grad_out
#include "common/row_sizes.wgsl" tensor=grad_out
#endif
#if GRADIENTS
#include "common/row_stats.wgsl" access=read_write
#else
@group(0) @binding(18) var<storage, read_write> ranges: array<u32>;
#endif
#include "common/read.wgsl" tensor=query
#include "common/read.wgsl" tensor=key
#include "common/read.wgsl" tensor=value
#include "common/row_sizes.wgsl" tensor=query
#include "common/row_sizes.wgsl" tensor=key
#include "common/row_sizes.wgsl" tensor=value

// As in forward_coop_scaled.wgsl.
const LARGEST_SUM = 1073741824.0 * f32(PADDED_DIM);

// Sizes of Q, K, V and dO, as sizes_of has them.
var<workgroup> all: array<atomic<u32>, 8>;

fn add_sizes(tensor: u32, sizes: vec2u) {
    atomicMax(&all[2u * tensor], sizes.x);
    atomicMax(&all[2u * tensor + 1u], sizes.y);
}

fn sizes_of_tensor(tensor: u32) -> vec2u {
    return vec2u(atomicLoad(&all[2u * tensor]), atomicLoad(&all[2u * tensor + 1u]));
}

@compute @workgroup_size(THREADS)
fn find_ranges(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let at = sequence(group.y, group.x);
    if thread < 8u {
        atomicStore(&all[thread], 0u);
    }
    workgroupBarrier();
    let queries = max(min(problem.row_end, u32(at.queries)), problem.row_begin) - problem.row_begin;
    add_sizes(0u, row_sizes_query(at, problem.row_begin, queries, HEAD_DIM, thread));
    add_sizes(1u, row_sizes_key(at, 0u, u32(at.keys), HEAD_DIM, thread));
    add_sizes(2u, row_sizes_value(at, 0u, u32(at.keys), HEAD_DIM_V, thread));
#if GRADIENTS
    add_sizes(3u, row_sizes_grad_out(at, problem.row_begin, queries, HEAD_DIM_V, thread));
#endif
    workgroupBarrier();
    if thread == 0u {
        var apart = false;
        for (var tensor = 0u; tensor < 4u; tensor++) {
            apart = apart || are_apart(sizes_of_tensor(tensor));
        }
        // A tile's scale is at least that of its tensor, so no tile has a larger factor.
#if SHAPED
        // Those are always rounded.
        let large = false;
#else
        let scales = vec2f(scale_for(sizes_of_tensor(0u).x), scale_for(sizes_of_tensor(1u).x));
        let large = unscaled(score_factor(), scales.x, scales.y) * LARGEST_SUM >= LARGEST_EXPONENT;
#endif
#if GRADIENTS
        rows[range_number(at)] = vec2u(u32(apart || large), 0u);
#else
        ranges[range_number(at)] = u32(apart || large);
#endif
    }
}
