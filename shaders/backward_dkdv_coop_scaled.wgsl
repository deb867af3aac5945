// Gradients of K and V on cooperative matrices for f32 and bf16: products are of scaled tiles in parts, as
// common/matrix_parts.wgsl says. One workgroup computes OWN keys of one key-value head; subgroups work in pairs, as
// common/matrix_pairs.wgsl says, with MATRICES · M keys a pair:
//
//     dK = 0, dV = 0
//     for each query head that reads these keys, for each tile of STEP rows that may see some of them:
//         one half                                  the other
//         S^T = K Q^T                               dP^T = V dO^T
//         P^T = exp(score(S^T) - lse)
//         P^T score'                        ->      dS^T = P^T score' (dP^T - delta)
//         dV = dV + P^T dO                          dK = dK + dS^T Q
//     dK = scale dK
//
// P^T and dS^T become left operands where they lie: keys are rows here, lse and delta belong to columns.
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
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;
#include "common/matrix_elements.wgsl"
#include "common/read.wgsl" tensor=query
#include "common/read.wgsl" tensor=key
#include "common/read.wgsl" tensor=value
#include "common/read.wgsl" tensor=grad_out
#include "common/write.wgsl" tensor=grad_key
#include "common/write.wgsl" tensor=grad_value
// Cut-off parts exceed the bounds with scores far above a softcap: 6.3e-6 in dQ where rounded ones have 2.5e-6.
const PART_ROUNDING = 0x1000u;
#include "common/matrix_parts.wgsl"
#include "common/matrix_pairs.wgsl"
// All of dV, or of dK.
const SUM_MATRICES = WM;
#include "common/matrix_load.wgsl" tensor=key rows=OWN dim=HEAD_DIM
#include "common/matrix_load.wgsl" tensor=value rows=OWN dim=HEAD_DIM_V
#include "common/matrix_load.wgsl" tensor=query rows=STEP dim=HEAD_DIM
#include "common/matrix_load.wgsl" tensor=grad_out rows=STEP dim=HEAD_DIM_V

const NUMBER_LOADS = (STEP + THREADS - 1u) / THREADS;
// lse of the tile's rows, then delta.
var<workgroup> numbers: array<f32, 2u * STEP>;

fn load_step(at: Sequence, head: u32, i0: u32, thread: u32) -> Step {
    let last = last_query(at);
    return Step(
        load_query(head_start(problem.query, at.batch, head), i0, last, thread),
        load_grad_out(head_start(problem.grad_out, at.batch, head), i0, last, thread),
    );
}

fn load_numbers(at: Sequence, head: u32, i0: u32, thread: u32) -> array<vec2f, NUMBER_LOADS> {
    var x: array<vec2f, NUMBER_LOADS>;
    for (var n = 0u; n < NUMBER_LOADS; n++) {
        let i = min(i0 + thread + n * THREADS, last_query(at));
        x[n] = row_stats((at.batch * problem.heads + head) * problem.seqlen_q + i);
    }
    return x;
}

fn store_numbers(at: Sequence, x: array<vec2f, NUMBER_LOADS>, i0: u32, thread: u32) {
    for (var n = 0u; n < NUMBER_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < STEP {
            // A row past the end is as one without keys.
            numbers[t] = select(x[n].x, NO_KEYS, i0 + t > last_query(at));
            numbers[STEP + t] = x[n].y;
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
    let at = sequence(group.z, group.y * problem.group);
    // Heads that share keys are for the modules with BY_ROWS if one of them is.
    var by_rows = 0u;
    for (var head = 0u; head < problem.group; head++) {
        by_rows |= ranges[at.batch * problem.heads + at.head_q + head];
    }
    if by_rows != OURS {
        return;
    }
    let key0 = group.x * OWN;
    let pair = subgroup % PAIRS;
    let half = subgroup / PAIRS;
    let mine = key0 + pair * MATRICES * M;
    // Shapes of scores times this are scores; a shape is odd in its score.
    let size = score_sign() * score_size();

    let last = u32(max(at.keys, 1) - 1);
    let owned = Owned(
        load_key(head_start(problem.key, at.batch, at.head_kv), key0, last, thread),
        load_value(head_start(problem.value, at.batch, at.head_kv), key0, last, thread),
    );
    var owned_scales: Scales;
    var lefts = owned_parts(owned, HEAD_DIM, HEAD_DIM_V, thread, subgroup, lane, &owned_scales);
    // dV in one half, dK in the other.
    var sums: Gradients;
    for (var r = 0u; r < MATRICES; r++) {
        for (var d = 0u; d < SUM_MATRICES; d++) {
            sums[r][d] = Lane();
        }
    }

    let range = row_range(at, i32(key0), i32(key0 + OWN));
    let first = range.x / i32(STEP) * i32(STEP);
    let tiles_of_head = select((range.y - first + i32(STEP) - 1) / i32(STEP), 0, range.x >= range.y);
    let count = tiles_of_head * i32(problem.group);
    var head = at.head_q;
    var i0 = first;
    var step: Step;
    var step_numbers: array<vec2f, NUMBER_LOADS>;
#if AHEAD
    if count > 0 {
        step = load_step(at, head, u32(i0), thread);
        step_numbers = load_numbers(at, head, u32(i0), thread);
    }
#endif
    for (var n = 0; n < count; n++) {
#if !AHEAD
        step = load_step(at, head, u32(i0), thread);
        step_numbers = load_numbers(at, head, u32(i0), thread);
#endif
        let scales = store_step(step, owned_scales, thread, subgroup, lane);
        store_numbers(at, step_numbers, u32(i0), thread);
        workgroupBarrier();
        let row0 = i0;
        i0 += i32(STEP);
        if i0 >= range.y {
            i0 = first;
            head++;
        }
#if AHEAD
        // The last one is loaded for nothing.
        let next = min(head, at.head_q + problem.group - 1u);
        step = load_step(at, next, u32(i0), thread);
        step_numbers = load_numbers(at, next, u32(i0), thread);
#endif

        // S^T = K Q^T, or dP^T = V dO^T
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

        // P^T = exp(score(S^T) - lse), or dS^T = P^T score' (dP^T - delta)
        if half == 0u {
            var slope = Scores();
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < SM; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
#if SHAPED
                        let shape = score_shape(x[r][c][e] * factor);
                        slope[r][c][e] = score_slope(shape);
                        x[r][c][e] = fma(shape, size, -numbers[c * M + column_of(lane, 0u) + column_of(0u, e)]);
#else
                        slope[r][c][e] = 1.0;
                        x[r][c][e] = fma(x[r][c][e], factor, -numbers[c * M + column_of(lane, 0u) + column_of(0u, e)]);
#endif
                    }
                }
            }
            if !tile_is_full(at, row0, row0 + i32(STEP), i32(key0), i32(key0 + OWN)) {
                for (var r = 0u; r < MATRICES; r++) {
                    for (var c = 0u; c < SM; c++) {
                        for (var e = 0u; e < ELEMENTS; e++) {
                            let i = row0 + i32(c * M + column_of(lane, 0u) + column_of(0u, e));
                            let j = i32(mine + r * M + row_of(lane, 0u) + row_of(0u, e));
                            x[r][c][e] = select(MASKED, x[r][c][e], keep(at, i, j));
                        }
                    }
                }
            }
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < SM; c++) {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] = exp2(x[r][c][e] * LOG2_E);
                        slope[r][c][e] *= x[r][c][e];
                    }
                    tell((pair * MATRICES + r) * SM + c, lane, slope[r][c]);
                }
            }
        }
        workgroupBarrier();
        if half == 1u {
            for (var r = 0u; r < MATRICES; r++) {
                for (var c = 0u; c < SM; c++) {
                    let p = hear((pair * MATRICES + r) * SM + c, lane);
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let delta = numbers[STEP + c * M + column_of(lane, 0u) + column_of(0u, e)];
                        // One scale after the other: both at once, 2^-128 with a V of 1e-30, may be no f32.
                        let dp = x[r][c][e] * unscale.x;
                        x[r][c][e] = p[e] * fma(dp, unscale.y, -delta);
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
        tell_sums(&sums, n, subgroup, lane);
        workgroupBarrier();
        let j = mine + n / SUM_MATRICES * M + lane * ELEMENTS / M;
        if j < problem.seqlen_k {
            for (var e = 0u; e < ELEMENTS; e += 4u) {
                let d = n % SUM_MATRICES * M + (lane * ELEMENTS + e) % M;
                let y = told[(subgroup * M * M + lane * ELEMENTS + e) / 4u];
                if half == 0u {
                    let start = head_start(problem.grad_value, at.batch, at.head_kv) + j * problem.grad_value.row;
                    write_grad_value(start, d, HEAD_DIM_V, y);
                } else {
                    let start = head_start(problem.grad_key, at.batch, at.head_kv) + j * problem.grad_key.row;
                    write_grad_key(start, d, HEAD_DIM, y * problem.scale);
                }
            }
        }
    }
}
