// What: gradients of what a head has, as sums over its rows.
//
//     dsink = - sum over i of exp(sink - lse_i) delta_i
//     dslope = sum over i of row_sums_i             that backward_scores_tile.wgsl has left
//
// Who: a workgroup sums the rows of one head, of all batch entries of the launch or, with PER_BATCH, of one. Each thread takes every
//   THREADS-th row; the threads' sums are added as a tree.
// Pipelining: none.
// Needs row_stats; with OF_SINKS sinks, else row_sums. Gives dsink or dslope.
#include "attention/attention.wgsl"

#if OF_SINKS
#include "memory/row_stats.wgsl" access=read
@group(0) @binding(24) var<storage, read_write> result: array<f32>;
#else
#if LENGTHS_IN_ROWS
// Not written here, but in one buffer with the sums.
#include "memory/row_stats.wgsl" access=read_write
#endif
@group(0) @binding(25) var<storage, read_write> result: array<f32>;
@group(0) @binding(26) var<storage, read_write> row_sums: array<f32>;
#endif

var<workgroup> partial: array<f32, THREADS>;

fn of_row(at: Sequence, i: u32) -> f32 {
#if OF_SINKS
    let sink = sink_of(at);
    let stats = row_stats(row_number(at, i));
    return select(-exp_difference(sink, stats.x) * stats.y, 0.0, sink == MASKED);
#else
    return row_sums[row_number(at, i)];
#endif
}

@compute @workgroup_size(THREADS)
fn heads(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
#if PER_BATCH
    let end = group.y + 1u;
#else
    let end = problem.batches;
#endif
    for (var b = group.y; b < end; b++) {
        let at = sequence(b, group.x);
        // Rows that are no queries have no gradient, and may hold anything.
        for (var i = thread; i < u32(at.queries); i += THREADS) {
            sum += of_row(at, i);
        }
    }
    partial[thread] = sum;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            partial[thread] += partial[thread + half];
        }
    }
    if thread == 0u {
        let at = sequence(group.y, group.x);
#if OF_SINKS
        let place = at.head;
#else
        let place = at.batch * problem.slopes_batch + at.head;
#endif
        var adds = false;
#if !PER_BATCH
        // Of batch entries of earlier launches.
        adds = problem.batch_begin > 0u;
#endif
#if ACCUMULATE
        adds = true;
#endif
        result[place] = select(partial[0], partial[0] + result[place], adds);
    }
}
