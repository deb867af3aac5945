// What: gradients of K and V on cooperative matrices for f32 and scaled bf16. Each tile is scaled and cut into PARTS f16 parts
//   (matrix/parts.wgsl).
//
//     dK = 0, dV = 0
//     for each query head of the group, for each tile of STEP rows that may see some of the keys:
//         half 0 of a pair                          half 1 of the pair
//         S^T = K Q^T                               dP^T = V dO^T
//         P^T = exp(score(S^T) - lse)
//         P^T score'             exchange ->        dS^T = P^T score' (dP^T - delta)
//         dV = dV + P^T dO                          dK = dK + dS^T Q
//     dK = scale dK
//
// Who: a workgroup owns OWN keys of one key-value head. A pair of subgroups has MATRICES · M of these keys (matrix/pairs.wgsl). Keys are
//   rows of the matrices, so P^T and dS^T become left operands in the lanes that hold them; lse and delta belong to columns.
// Pipelining: with AHEAD, the next step of Q and dO is loaded into registers while the products of this step run.
// Needs q, k, v, dO, row_stats, and the range of the head (coop_ranges.wgsl). Gives dK and dV.
enable f16;
enable wgpu_cooperative_matrix;
#include "attention/attention.wgsl"
#include "matrix/matrices.wgsl"
#include "memory/elements.wgsl"

// read_write, though the inputs are never written: see forward_coop.wgsl.
@group(0) @binding(1) var<storage, read_write> query: InElements;
@group(0) @binding(2) var<storage, read_write> key: InElements;
@group(0) @binding(3) var<storage, read_write> value: InElements;
#include "memory/row_stats.wgsl" access=read_write
@group(0) @binding(11) var<storage, read_write> grad_out: InElements;
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;
#include "matrix/elements.wgsl"
#include "matrix/scores.wgsl" queries=column keys=row together=M
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "memory/read.wgsl" tensor=grad_out
#include "memory/write.wgsl" tensor=grad_key
#include "memory/write.wgsl" tensor=grad_value
// Parts are rounded. If they were cut off, scores far above a softcap would exceed the error bound: 6.3e-6 in dQ instead of 2.5e-6.
const PART_ROUNDING = 0x1000u;
#include "matrix/parts.wgsl"
#include "matrix/pairs.wgsl"
// A half has all columns of dV, or of dK.
const SUM_MATRICES = ACROSS_WIDER;
#include "matrix/load.wgsl" tensor=key rows=OWN dim=HEAD_DIM
#include "matrix/load.wgsl" tensor=value rows=OWN dim=HEAD_DIM_V
#include "matrix/load.wgsl" tensor=query rows=STEP dim=HEAD_DIM
#include "matrix/load.wgsl" tensor=grad_out rows=STEP dim=HEAD_DIM_V

const STATS_LOADS = (STEP + THREADS - 1u) / THREADS;
// lse of the step's rows, then their delta.
var<workgroup> step_stats: array<f32, 2u * STEP>;

fn load_step(at: Sequence, i0: u32, thread: u32) -> Step {
    let last = last_query(at);
    return Step(load_query(at, i0, last, thread), load_grad_out(at, i0, last, thread));
}

fn load_stats(at: Sequence, i0: u32, thread: u32) -> array<vec2f, STATS_LOADS> {
    var x: array<vec2f, STATS_LOADS>;
    for (var n = 0u; n < STATS_LOADS; n++) {
        let i = min(i0 + thread + n * THREADS, last_query(at));
        x[n] = row_stats(row_number(at, i));
    }
    return x;
}

fn store_stats(at: Sequence, x: array<vec2f, STATS_LOADS>, i0: u32, thread: u32) {
    for (var n = 0u; n < STATS_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < STEP {
            // A row past the end is treated as a row that sees no key.
            step_stats[t] = select(x[n].x, NO_KEYS, i0 + t > last_query(at));
            step_stats[STEP + t] = x[n].y;
        }
    }
}

@compute @workgroup_size(THREADS)
fn dkdv(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    // The first of the heads that share these keys.
    let of_group = sequence(group.z, group.y * problem.group);
    // If the range of one head of the group asks for BY_ROWS, the modules with BY_ROWS compute the whole group.
    var by_rows = 0u;
    for (var head = 0u; head < problem.group; head++) {
        by_rows |= range_of(with_head(of_group, of_group.head + head));
    }
    if by_rows != OURS {
        return;
    }
    let key0 = group.x * OWN;
    let pair = subgroup % PAIRS;
    let half = subgroup / PAIRS;
    let own_j = key0 + pair * MATRICES * M;
    let last = last_key(of_group);
    let owned = Owned(load_key(of_group, key0, last, thread), load_value(of_group, key0, last, thread));
    var owned_scales: Scales;
    var lefts = owned_parts(owned, HEAD_DIM, HEAD_DIM_V, thread, subgroup, lane, &owned_scales);
    // dV in half 0, dK in half 1.
    var sums: Gradients;
    for (var r = 0u; r < MATRICES; r++) {
        for (var d = 0u; d < SUM_MATRICES; d++) {
            sums[r][d] = Lane();
        }
    }

    var walk = walk_rows(of_group, i32(key0), i32(key0 + OWN), STEP);
    var step: Step;
    var stats_next: array<vec2f, STATS_LOADS>;
#if AHEAD
    if has_tile(walk) {
        step = load_step(walk.at, u32(first_row(walk)), thread);
        stats_next = load_stats(walk.at, u32(first_row(walk)), thread);
    }
#endif
    while has_tile(walk) {
        let at = walk.at;
        let row0 = first_row(walk);
        let full = walk.n < walk.tiles.full;
#if !AHEAD
        step = load_step(at, u32(row0), thread);
        stats_next = load_stats(at, u32(row0), thread);
#endif
        let scales = store_step(step, owned_scales, thread, subgroup, lane);
        store_stats(at, stats_next, u32(row0), thread);
        workgroupBarrier();
        walk = next_tile(walk, i32(key0), i32(key0 + OWN), STEP);
#if AHEAD
        // After the last tile this loads a tile that nothing uses.
        step = load_step(walk.at, u32(first_row(walk)), thread);
        stats_next = load_stats(walk.at, u32(first_row(walk)), thread);
#endif

        // S^T = K Q^T, or dP^T = V dO^T
        var x = products(&lefts, half);
        let unscaling = unscaling_of(&x, owned_scales, scales, pair, half, lane);

        // P^T = exp(score(S^T) - lse), or dS^T = P^T score' (dP^T - delta)
        if half == 0u {
            var slope = Scores();
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < ACROSS_STEP; c++) {
                    let i = row0 + i32(c * M);
                    let j = i32(own_j + r * M);
#if SHAPED
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] *= unscaling.halves.x;
                        x[r][c][e] *= unscaling.halves.y;
                    }
#endif
                    let scores = shaped(x[r][c], added_lane(at, i, j, 0u, lane), at, i, j, lane);
                    slope[r][c] = scores.slope;
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let lse = step_stats[c * M + column_of(lane, 0u) + column_of(0u, e)];
#if SHAPED
                        x[r][c][e] = scores.score[e] - lse;
#else
                        x[r][c][e] = fma(x[r][c][e], unscaling.factor, -lse);
#endif
                    }
                }
            }
            if !full {
                for (var r = 0u; r < MATRICES; r++) {
                    for (var c = 0u; c < ACROSS_STEP; c++) {
                        x[r][c] = masked(x[r][c], at, row0 + i32(c * M), i32(own_j + r * M), lane, MASKED);
                    }
                }
            }
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < ACROSS_STEP; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] = exp2(x[r][c][e] * LOG2_E);
                        slope[r][c][e] *= x[r][c][e];
                    }
                    send_lane((pair * MATRICES + r) * ACROSS_STEP + c, lane, slope[r][c]);
#if DROPOUT
                    let kept = kept_lane(at, row0 + i32(c * M), i32(own_j + r * M), 0u, lane);
                    x[r][c] = what_is_kept(x[r][c], kept);
#endif
                }
            }
        }
        workgroupBarrier();
        if half == 1u {
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < ACROSS_STEP; c++) {
                    let p = receive_lane((pair * MATRICES + r) * ACROSS_STEP + c, lane);
#if DROPOUT
                    let kept = kept_lane(at, row0 + i32(c * M), i32(own_j + r * M), 0u, lane);
                    x[r][c] = grad_of_kept(x[r][c], kept);
#endif
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let delta = step_stats[STEP + c * M + column_of(lane, 0u) + column_of(0u, e)];
                        let dp = x[r][c][e] * unscaling.halves.x;
                        x[r][c][e] = p[e] * fma(dp, unscaling.halves.y, -delta);
                    }
                }
            }
        }

        // dV = dV + P^T dO, or dK = dK + dS^T Q
        let other = 1u - half;
        add_products(&sums, x, other, scales, 0u, lane);
    }

    // Out in whole rows, a matrix of each subgroup at a time
    for (var n = 0u; n < MATRICES * SUM_MATRICES; n++) {
        workgroupBarrier();
        send_sums(&sums, n, subgroup, lane);
        workgroupBarrier();
        let j = own_j + n / SUM_MATRICES * M + lane * ELEMENTS / M;
        if j < problem.seqlen_k {
            for (var e = 0u; e < ELEMENTS; e += 4u) {
                let d = n % SUM_MATRICES * M + (lane * ELEMENTS + e) % M;
                var y = exchange[(subgroup * M * M + lane * ELEMENTS + e) / 4u];
                if half == 0u {
#if DROPOUT
                    y *= problem.dropout_scale;
#endif
                    write_grad_value(grad_value_row(of_group, j), d, HEAD_DIM_V, y);
                } else {
                    write_grad_key(grad_key_row(of_group, j), d, HEAD_DIM, y * problem.scale);
                }
            }
        }
    }
}
