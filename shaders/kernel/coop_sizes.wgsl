// What: finds how large the numbers are that the coop kernels for f32 and scaled bf16 will scale.
//
//     of each tensor:  largest and smallest size, other than 0, of groups of four elements of rows that count
//
// Who: workgroup (x, head, batch entry) takes the x-th share of the rows of Q, K, V and, with GRADIENTS, dO.
// Needs q, k, v, dO. Gives the sizes of each share, which coop_ranges.wgsl reads.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"
#include "matrix/sizes.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#if GRADIENTS
@group(0) @binding(11) var<storage, read> grad_out: InElements;
#include "memory/read.wgsl" tensor=grad_out
#include "matrix/row_sizes.wgsl" tensor=grad_out
#endif
// For each head of the launch and each share: the sizes of Q and K, then the sizes of V and dO, as sizes_of gives them.
@group(0) @binding(18) var<storage, read_write> sizes: array<vec4u>;
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "matrix/row_sizes.wgsl" tensor=query
#include "matrix/row_sizes.wgsl" tensor=key
#include "matrix/row_sizes.wgsl" tensor=value

// Sizes of Q, K, V and dO.
var<workgroup> all: array<atomic<u32>, 8>;

fn add_sizes(tensor: u32, sizes: vec2u) {
    atomicMax(&all[2u * tensor], sizes.x);
    atomicMax(&all[2u * tensor + 1u], sizes.y);
}

// The first row of share n of so many rows, and the number of rows.
fn rows_of_share(rows: u32, n: u32) -> vec2u {
    let each = (rows + SHARES - 1u) / SHARES;
    let first = min(n * each, rows);
    return vec2u(first, min(each, rows - first));
}

@compute @workgroup_size(THREADS)
fn find_sizes(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let at = sequence(group.z, group.y);
    if thread < 8u {
        atomicStore(&all[thread], 0u);
    }
    workgroupBarrier();
    let queries = rows_of_share(max(min(problem.row_end, u32(at.queries)), problem.row_begin) - problem.row_begin, group.x);
    let keys = rows_of_share(u32(at.keys), group.x);
    add_sizes(0u, row_sizes_query(at, problem.row_begin + queries.x, queries.y, HEAD_DIM, thread));
    add_sizes(1u, row_sizes_key(at, keys.x, keys.y, HEAD_DIM, thread));
    add_sizes(2u, row_sizes_value(at, keys.x, keys.y, HEAD_DIM_V, thread));
#if GRADIENTS
    add_sizes(3u, row_sizes_grad_out(at, problem.row_begin + queries.x, queries.y, HEAD_DIM_V, thread));
#endif
    workgroupBarrier();
    if thread < 2u {
        let place = ((group.z * problem.heads + group.y) * SHARES + group.x) * 2u + thread;
        let t = 4u * thread;
        sizes[place] = vec4u(atomicLoad(&all[t]), atomicLoad(&all[t + 1u]), atomicLoad(&all[t + 2u]), atomicLoad(&all[t + 3u]));
    }
}
