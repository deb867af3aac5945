// Gradient of Q on cooperative matrices for f32 and bf16: products are of scaled tiles in parts, as
// common/matrix_parts.wgsl says. One workgroup computes OWN rows of one head; subgroups work in pairs, as
// common/matrix_pairs.wgsl says, with MATRICES · M rows a pair:
//
//     dQ = 0
//     for each tile of STEP keys that some row may see:
//         one half                                  the other
//         S = Q K^T                                 dP = dO V^T
//         P = exp(score(S) - lse)
//         P score'                          ->      dS = P score' (dP - delta)
//                                           <-      dS
//         dQ = dQ + dS K                            each half of the columns
//     dQ = scale dQ
enable f16;
enable wgpu_cooperative_matrix;
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"
#include "common/matrices.wgsl"
#include "common/elements.wgsl"

// Read only, but as in forward_coop.wgsl loads stay where they are written.
@group(0) @binding(1) var<storage, read_write> query: InElements;
@group(0) @binding(2) var<storage, read_write> key: InElements;
@group(0) @binding(3) var<storage, read_write> value: InElements;
#include "common/row_stats.wgsl" access=read_write
@group(0) @binding(11) var<storage, read_write> grad_out: InElements;
@group(0) @binding(13) var<storage, read_write> grad_query: OutElements;
#include "common/matrix_elements.wgsl"
#include "common/read.wgsl" tensor=query
#include "common/read.wgsl" tensor=key
#include "common/read.wgsl" tensor=value
#include "common/read.wgsl" tensor=grad_out
#include "common/write.wgsl" tensor=grad_query
// As in backward_dkdv_coop_scaled.wgsl.
const PART_ROUNDING = 0x1000u;
#include "common/matrix_parts.wgsl"
#include "common/matrix_pairs.wgsl"
// A half of dQ.
const SUM_MATRICES = ((HEAD_DIM + M - 1u) / M + 1u) / 2u;
#include "common/matrix_load.wgsl" tensor=query rows=OWN dim=HEAD_DIM
#include "common/matrix_load.wgsl" tensor=grad_out rows=OWN dim=HEAD_DIM_V
#include "common/matrix_load.wgsl" tensor=key rows=STEP dim=HEAD_DIM
#include "common/matrix_load.wgsl" tensor=value rows=STEP dim=HEAD_DIM_V

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
    if ranges[at.batch * problem.heads + at.head_q] != OURS {
        return;
    }
    // The last rows first: with a causal mask they take longest.
    let row0 = (workgroups.x - 1u - group.x) * OWN;
    let row1 = min(row0 + OWN, problem.seqlen_q);
    let pair = subgroup % PAIRS;
    let half = subgroup / PAIRS;
    let mine = row0 + pair * MATRICES * M;
    let key_start = head_start(problem.key, at.batch, at.head_kv);
    let value_start = head_start(problem.value, at.batch, at.head_kv);
    // Shapes of scores times this are scores; a shape is odd in its score.
    let size = score_sign() * score_size();

    let last_row = last_query(at);
    let owned = Owned(
        load_query(head_start(problem.query, at.batch, at.head_q), row0, last_row, thread),
        load_grad_out(head_start(problem.grad_out, at.batch, at.head_q), row0, last_row, thread),
    );
    var owned_scales: Scales;
    var lefts = owned_parts(owned, HEAD_DIM, HEAD_DIM_V, thread, subgroup, lane, &owned_scales);
    var sums: Gradients;
    // lse, or delta, of the rows that the lane holds.
    var number: array<array<f32, LANE_ROWS>, MATRICES>;
    for (var r = 0u; r < MATRICES; r++) {
        for (var d = 0u; d < SUM_MATRICES; d++) {
            sums[r][d] = Lane();
        }
        for (var e = 0u; e < ELEMENTS; e++) {
            let i = min(mine + r * M + row_of(lane, e), last_row);
            let of_row = row_stats((at.batch * problem.heads + at.head_q) * problem.seqlen_q + i);
            number[r][held_row(e)] = of_half(of_row, half);
        }
    }

    let range = key_range(at, i32(row0), i32(row1));
    let first = range.x / i32(STEP) * i32(STEP);
    let last = u32(max(at.keys, 1) - 1);
    var step: Step;
#if AHEAD
    if range.x < range.y {
        step = Step(load_key(key_start, u32(first), last, thread), load_value(value_start, u32(first), last, thread));
    }
#endif
    for (var j0 = first; j0 < range.y; j0 += i32(STEP)) {
#if !AHEAD
        step = Step(load_key(key_start, u32(j0), last, thread), load_value(value_start, u32(j0), last, thread));
#endif
        let scales = store_step(step, owned_scales, thread, subgroup, lane);
        workgroupBarrier();
#if AHEAD
        let j1 = u32(j0) + STEP;
        step = Step(load_key(key_start, j1, last, thread), load_value(value_start, j1, last, thread));
#endif

        // S = Q K^T, or dP = dO V^T
        var x = products(&lefts, half);
        // What takes the scales of owned rows and of the step back.
        var unscale = vec2f(inverse(of_half(owned_scales.tile, half)), inverse(of_half(scales.tile, half)));
#if SHAPED
        var factor = unscale.x * unscale.y;
#else
        var factor = unscaled(size, owned_scales.tile.x, scales.tile.x);
#endif
        if scales.apart {
#if SHAPED
            take_scales_back(&x, owned_scales, 1.0, pair, half, lane);
#else
            take_scales_back(&x, owned_scales, size, pair, half, lane);
#endif
            unscale = vec2f(1.0);
            factor = 1.0;
        }

        // P score' = exp(score(S) - lse) score', then dS = P score' (dP - delta)
        if half == 0u {
            var slope = Scores();
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < SM; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
#if SHAPED
                        let shape = score_shape(x[r][c][e] * factor);
                        slope[r][c][e] = score_slope(shape);
                        x[r][c][e] = fma(shape, size, -number[r][held_row(e)]);
#else
                        slope[r][c][e] = 1.0;
                        x[r][c][e] = fma(x[r][c][e], factor, -number[r][held_row(e)]);
#endif
                    }
                }
            }
            if !tile_is_full(at, i32(row0), i32(row1), j0, j0 + i32(STEP)) {
                for (var r = 0u; r < MATRICES; r++) {
                    for (var c = 0u; c < SM; c++) {
                        for (var e = 0u; e < ELEMENTS; e++) {
                            let i = i32(mine + r * M + row_of(lane, 0u) + row_of(0u, e));
                            let j = j0 + i32(c * M + column_of(lane, 0u) + column_of(0u, e));
                            x[r][c][e] = select(MASKED, x[r][c][e], keep(at, i, j));
                        }
                    }
                }
            }
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < SM; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] = exp2(x[r][c][e] * LOG2_E) * slope[r][c][e];
                    }
                    tell((pair * MATRICES + r) * SM + c, lane, x[r][c]);
                }
            }
        }
        workgroupBarrier();
        if half == 1u {
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < SM; c++) {
                    let p = hear((pair * MATRICES + r) * SM + c, lane);
                    for (var e = 0u; e < ELEMENTS; e++) {
                        // One scale after the other: both at once, 2^-128 with a V of 1e-30, may be no f32.
                        let dp = x[r][c][e] * unscale.x;
                        x[r][c][e] = p[e] * fma(dp, unscale.y, -number[r][held_row(e)]);
                    }
                    tell((pair * MATRICES + r) * SM + c, lane, x[r][c]);
                }
            }
        }
        workgroupBarrier();
        if half == 0u {
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < SM; c++) {
                    x[r][c] = hear((pair * MATRICES + r) * SM + c, lane);
                }
            }
        }

        // dQ = dQ + dS K
        add_products(&sums, x, 0u, scales, half * SUM_MATRICES, lane);
    }

    // Out in whole rows, a matrix of each subgroup at a time
    for (var n = 0u; n < MATRICES * SUM_MATRICES; n++) {
        workgroupBarrier();
        tell_sums(&sums, n, subgroup, lane);
        workgroupBarrier();
        let i = mine + n / SUM_MATRICES * M + lane * ELEMENTS / M;
        if i < row1 {
            let start = head_start(problem.grad_query, at.batch, at.head_q) + i * problem.grad_query.row;
            for (var e = 0u; e < ELEMENTS; e += 4u) {
                let d = (half * SUM_MATRICES + n % SUM_MATRICES) * M + (lane * ELEMENTS + e) % M;
                let y = told[(subgroup * M * M + lane * ELEMENTS + e) / 4u];
                write_grad_query(start, d, HEAD_DIM, y * problem.scale);
            }
        }
    }
}
