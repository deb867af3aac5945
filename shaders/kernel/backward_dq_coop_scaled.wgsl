// What: gradient of Q on cooperative matrices for f32 and scaled bf16. Each tile is scaled and cut into PARTS f16 parts (matrix/parts.wgsl).
//
//     dQ = 0
//     for each tile of STEP keys that some row may see:
//         half 0 of a pair                          half 1 of the pair
//         S = Q K^T                                 dP = dO V^T
//         P = exp(score(S) - lse)
//         P score'               exchange ->        dS = P score' (dP - delta)
//         dS                  <- exchange           dS
//         dQ = dQ + dS K                            dQ = dQ + dS K, the other columns
//     dQ = scale dQ
//
// Who: a workgroup owns OWN rows of one head. A pair of subgroups has MATRICES · M of these rows (matrix/pairs.wgsl). Each half has one
//   half of the columns of dQ.
// Pipelining: with AHEAD, the next step of K and V is loaded into registers while the products of this step run.
// Needs q, k, v, dO, row_stats, and the range of the head (coop_ranges.wgsl). Gives dQ.
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
@group(0) @binding(13) var<storage, read_write> grad_query: OutElements;
#include "matrix/elements.wgsl"
#include "matrix/scores.wgsl" queries=row keys=column together=STEP
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "memory/read.wgsl" tensor=grad_out
#include "memory/write.wgsl" tensor=grad_query
// As in backward_dkdv_coop_scaled.wgsl.
const PART_ROUNDING = 0x1000u;
#include "matrix/parts.wgsl"
#include "matrix/pairs.wgsl"
// A half of the pair has one half of the columns of dQ.
const SUM_MATRICES = ((HEAD_DIM + M - 1u) / M + 1u) / 2u;
#include "matrix/load.wgsl" tensor=query rows=OWN dim=HEAD_DIM
#include "matrix/load.wgsl" tensor=grad_out rows=OWN dim=HEAD_DIM_V
#include "matrix/load.wgsl" tensor=key rows=STEP dim=HEAD_DIM
#include "matrix/load.wgsl" tensor=value rows=STEP dim=HEAD_DIM_V

@compute @workgroup_size(THREADS)
fn dq(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    let at = sequence(group.z, group.y);
    if range_of(at) != OURS {
        return;
    }
    // The last rows first: with a causal mask they take longest.
    let row0 = (workgroups.x - 1u - group.x) * OWN;
    let row1 = min(row0 + OWN, problem.seqlen_q);
    let pair = subgroup % PAIRS;
    let half = subgroup / PAIRS;
    let own_i = row0 + pair * MATRICES * M;
    let last_row = last_query(at);
    let owned = Owned(load_query(at, row0, last_row, thread), load_grad_out(at, row0, last_row, thread));
    var owned_scales: Scales;
    var lefts = owned_parts(owned, HEAD_DIM, HEAD_DIM_V, thread, subgroup, lane, &owned_scales);
    var sums: Gradients;
    // lse, or delta, of the rows that the lane holds.
    var lane_stat: array<array<f32, LANE_ROWS>, MATRICES>;
    for (var r = 0u; r < MATRICES; r++) {
        for (var d = 0u; d < SUM_MATRICES; d++) {
            sums[r][d] = Lane();
        }
        for (var e = 0u; e < ELEMENTS; e++) {
            let i = min(own_i + r * M + row_of(lane, e), last_row);
            let stats = row_stats(row_number(at, i));
            lane_stat[r][held_row(e)] = of_half(stats, half);
        }
    }

    let visited = key_tiles(at, i32(row0), i32(row1), STEP);
    let last = last_key(at);
    var step: Step;
#if AHEAD
    if visited.count > 0 {
        let j0 = u32(tile(visited, 0));
        step = Step(load_key(at, j0, last, thread), load_value(at, j0, last, thread));
    }
#endif
    for (var n = 0; n < visited.count; n++) {
        let j0 = tile(visited, n);
#if !AHEAD
        step = Step(load_key(at, u32(j0), last, thread), load_value(at, u32(j0), last, thread));
#endif
        let scales = store_step(step, owned_scales, thread, subgroup, lane);
        workgroupBarrier();
#if AHEAD
        let j1 = u32(tile(visited, n + 1));
        step = Step(load_key(at, j1, last, thread), load_value(at, j1, last, thread));
#endif

        // S = Q K^T, or dP = dO V^T
        var x = products(&lefts, half);
        let unscaling = unscaling_of(&x, owned_scales, scales, pair, half, lane);

        // P score' = exp(score(S) - lse) score', then dS = P score' (dP - delta)
        if half == 0u {
            var slope = Scores();
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < ACROSS_STEP; c++) {
                    let i = i32(own_i + r * M);
                    let j = j0 + i32(c * M);
#if SHAPED
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] *= unscaling.halves.x;
                        x[r][c][e] *= unscaling.halves.y;
                    }
#endif
                    let scores = shaped(x[r][c], added_lane(at, i, j, 0u, lane), at, i, j, lane);
                    slope[r][c] = scores.slope;
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let lse = lane_stat[r][held_row(e)];
#if SHAPED
                        x[r][c][e] = scores.score[e] - lse;
#else
                        x[r][c][e] = fma(x[r][c][e], unscaling.factor, -lse);
#endif
                    }
                }
            }
            if n >= visited.full {
                for (var r = 0u; r < MATRICES; r++) {
                    for (var c = 0u; c < ACROSS_STEP; c++) {
                        x[r][c] = masked(x[r][c], at, i32(own_i + r * M), j0 + i32(c * M), lane, MASKED);
                    }
                }
            }
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < ACROSS_STEP; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] = exp2(x[r][c][e] * LOG2_E) * slope[r][c][e];
                    }
                    send_lane((pair * MATRICES + r) * ACROSS_STEP + c, lane, x[r][c]);
                }
            }
        }
        workgroupBarrier();
        if half == 1u {
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < ACROSS_STEP; c++) {
                    let p = receive_lane((pair * MATRICES + r) * ACROSS_STEP + c, lane);
#if DROPOUT
                    let kept = kept_lane(at, i32(own_i + r * M), j0 + i32(c * M), c, lane);
                    x[r][c] = grad_of_kept(x[r][c], kept);
#endif
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let dp = x[r][c][e] * unscaling.halves.x;
                        x[r][c][e] = p[e] * fma(dp, unscaling.halves.y, -lane_stat[r][held_row(e)]);
                    }
                    send_lane((pair * MATRICES + r) * ACROSS_STEP + c, lane, x[r][c]);
                }
            }
        }
        workgroupBarrier();
        if half == 0u {
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < ACROSS_STEP; c++) {
                    x[r][c] = receive_lane((pair * MATRICES + r) * ACROSS_STEP + c, lane);
                }
            }
        }

        // dQ = dQ + dS K
        add_products(&sums, x, 0u, scales, half * SUM_MATRICES, lane);
    }

    // Out in whole rows, a matrix of each subgroup at a time
    for (var n = 0u; n < MATRICES * SUM_MATRICES; n++) {
        workgroupBarrier();
        send_sums(&sums, n, subgroup, lane);
        workgroupBarrier();
        let i = own_i + n / SUM_MATRICES * M + lane * ELEMENTS / M;
        if i < row1 {
            for (var e = 0u; e < ELEMENTS; e += 4u) {
                let d = (half * SUM_MATRICES + n % SUM_MATRICES) * M + (lane * ELEMENTS + e) % M;
                let y = exchange[(subgroup * M * M + lane * ELEMENTS + e) / 4u];
                write_grad_query(grad_query_row(at, i), d, HEAD_DIM, y * problem.scale);
            }
        }
    }
}
