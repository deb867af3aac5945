// Gradients of K and V on cooperative matrices, f16 products with f32 sums. One workgroup computes KEYS keys of one
// key-value head; two subgroups, a pair, share KEY_MATRICES · M of them, M being the size of a matrix.
//
//     dK = 0, dV = 0
//     for each query head that reads these keys, for each tile of ROWS rows that may see some of them:
//         one subgroup                              the other
//         S^T = K Q^T                               dP^T = V dO^T
//         P^T = 2^(score(S^T) - lse)                dS^T = P^T (dP^T - delta) score'
//         dV = dV + P^T dO                          dK = dK + dS^T Q
//     dK = scale dK
//
// Keys are rows here, so that P^T and dS^T become left operands where they lie; lse, in base 2, and delta belong to
// columns. Two subgroups do the same products on other operands; each keeps one left operand and one sum in registers, and
// the first passes P^T score' on through workgroup memory.
enable f16;
enable wgpu_cooperative_matrix;
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"
#include "common/matrices.wgsl"
#include "common/elements_f16.wgsl"

// Read only, but as in forward_coop.wgsl loads stay where they are written.
@group(0) @binding(1) var<storage, read_write> query: InElements;
@group(0) @binding(2) var<storage, read_write> key: InElements;
@group(0) @binding(3) var<storage, read_write> value: InElements;
@group(0) @binding(7) var<storage, read_write> rows: array<vec2f>;
@group(0) @binding(11) var<storage, read_write> grad_out: InElements;
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;
#include "common/matrix_elements.wgsl"
#include "common/read_f16.wgsl" tensor=query
#include "common/read_f16.wgsl" tensor=key
#include "common/read_f16.wgsl" tensor=value
#include "common/read_f16.wgsl" tensor=grad_out
#include "common/write_f16.wgsl" tensor=grad_key
#include "common/write_f16.wgsl" tensor=grad_value

const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
const PAIRS = SUBGROUPS / 2u;
const KEYS = PAIRS * KEY_MATRICES * M;
// Matrices across the rows of a tile, and the larger of the two head dimensions.
const RM = ROWS / M;
const WM = (max(HEAD_DIM, HEAD_DIM_V) + M - 1u) / M;
// Rows in workgroup memory: how many times eight elements are there, and how far apart rows are, in vectors of four. The
// two vectors between rows keep the rows of a matrix on different banks.
const W8 = WM * M / 8u;
const STRIDE = 2u * W8 + 2u;
// What a workgroup moves between device and workgroup memory, once: a matrix of keys of each pair, of K and of V; what each
// thread moves of one of them, and of a tile of Q, of dO and of the rows' numbers.
const STRIP = PAIRS * M;
const STRIP_MOVES = (STRIP * W8 + THREADS - 1u) / THREADS;
const TILE_MOVES = (ROWS * W8 + THREADS - 1u) / THREADS;
const NUMBER_MOVES = (ROWS + THREADS - 1u) / THREADS;

// Two tiles of Q and dO, one in use while the other is filled; before them strips of K and V, after them of dV and dK.
const TILES = 2u * max(2u * ROWS, STRIP) * STRIDE;
var<workgroup> tiles: array<vec4<f16>, TILES>;
// lse and delta of the tiles' rows.
var<workgroup> numbers: array<vec2f, 2u * ROWS>;
// P^T score' on its way from one subgroup of a pair to the other, which holds the same elements in the same lanes.
const PASSED = KEY_MATRICES * RM * LANES;
var<workgroup> passed: array<array<vec4f, 2>, PAIRS * PASSED>;

fn store_eight(place: u32, x: Eight) {
    tiles[place] = x.low;
    tiles[place + 1u] = x.high;
}

// The key in row `row` of strip r.
fn key_of(key0: u32, r: u32, row: u32) -> u32 {
    return key0 + (row / M * KEY_MATRICES + r) * M + row % M;
}

// Strip r of K and of V, with 0 in the columns past the head dimension, so that these add nothing, whatever Q and dO have
// there.
fn store_strips(at: Sequence, key0: u32, r: u32, thread: u32) {
    let last = u32(max(at.keys, 1) - 1);
    let key_start = head_start(problem.key, at.batch, at.head_kv);
    let value_start = head_start(problem.value, at.batch, at.head_kv);
    for (var n = 0u; n < STRIP_MOVES; n++) {
        let t = thread + n * THREADS;
        let d = 8u * (t % W8);
        let j = min(key_of(key0, r, t / W8), last);
        let k = first_elements(read_key(key_start + j * problem.key.row, d, HEAD_DIM), max(d, HEAD_DIM) - d);
        let v = first_elements(read_value(value_start + j * problem.value.row, d, HEAD_DIM_V), max(d, HEAD_DIM_V) - d);
        if t < STRIP * W8 {
            store_eight(t / W8 * STRIDE + d / 4u, k);
            store_eight((STRIP + t / W8) * STRIDE + d / 4u, v);
        }
    }
}

// Strip r of dV and of dK, out in whole rows.
fn write_strips(at: Sequence, key0: u32, r: u32, thread: u32) {
    let value_start = head_start(problem.grad_value, at.batch, at.head_kv);
    let key_start = head_start(problem.grad_key, at.batch, at.head_kv);
    for (var n = 0u; n < STRIP_MOVES; n++) {
        let t = thread + n * THREADS;
        let d = 8u * (t % W8);
        let j = key_of(key0, r, t / W8);
        if t < STRIP * W8 && j < problem.seqlen_k {
            let v = t / W8 * STRIDE + d / 4u;
            let k = v + STRIP * STRIDE;
            if d < HEAD_DIM_V {
                write_grad_value(value_start + j * problem.grad_value.row, d, HEAD_DIM_V, Eight(tiles[v], tiles[v + 1u]));
            }
            if d < HEAD_DIM {
                write_grad_key(key_start + j * problem.grad_key.row, d, HEAD_DIM, Eight(tiles[k], tiles[k + 1u]));
            }
        }
    }
}

// A tile on its way from device memory to workgroup memory.
struct Tile {
    q: array<Eight, TILE_MOVES>,
    grad: array<Eight, TILE_MOVES>,
    numbers: array<vec2f, NUMBER_MOVES>,
}

fn load_tile(batch: u32, head: u32, i0: u32, thread: u32) -> Tile {
    var x: Tile;
    let last = problem.seqlen_q - 1u;
    let query_start = head_start(problem.query, batch, head);
    let grad_start = head_start(problem.grad_out, batch, head);
    for (var n = 0u; n < TILE_MOVES; n++) {
        let t = thread + n * THREADS;
        let d = 8u * (t % W8);
        let i = min(i0 + t / W8, last);
        x.q[n] = read_query(query_start + i * problem.query.row, d, HEAD_DIM);
        x.grad[n] = read_grad_out(grad_start + i * problem.grad_out.row, d, HEAD_DIM_V);
    }
    for (var n = 0u; n < NUMBER_MOVES; n++) {
        let i = min(i0 + thread + n * THREADS, last);
        x.numbers[n] = rows[(batch * problem.heads + head) * problem.seqlen_q + i];
    }
    return x;
}

fn store_tile(x: Tile, buffer: u32, i0: u32, thread: u32) {
    for (var n = 0u; n < TILE_MOVES; n++) {
        let t = thread + n * THREADS;
        if t < ROWS * W8 {
            let place = (2u * buffer * ROWS + t / W8) * STRIDE + 2u * (t % W8);
            store_eight(place, x.q[n]);
            store_eight(place + ROWS * STRIDE, x.grad[n]);
        }
    }
    for (var n = 0u; n < NUMBER_MOVES; n++) {
        let t = thread + n * THREADS;
        if t < ROWS {
            // A row past the end is as one without keys.
            numbers[buffer * ROWS + t] = select(x.numbers[n], vec2f(NO_KEYS, 0.0), i0 + t >= problem.seqlen_q);
        }
    }
}

// Where the loop over heads and rows is.
struct Step {
    head: u32,
    i0: i32,
}

fn next_step(step: Step, first: i32, end: i32) -> Step {
    let i0 = step.i0 + i32(ROWS);
    if i0 < end {
        return Step(step.head, i0);
    }
    return Step(step.head + 1u, first);
}

@compute @workgroup_size(THREADS)
fn backward_dkdv(
    @builtin(workgroup_id) group: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let at = sequence(group.z, group.y * problem.group);
    let key0 = group.x * KEYS;
    let pair = subgroup % PAIRS;
    let has_keys = subgroup / PAIRS;
    let mine = pair * KEY_MATRICES * M;
    // Shapes of scores times this are exponents of 2; a shape is odd in its score.
    let factor = score_sign() * score_factor();

    // K for the subgroup of dV, V for that of dK
    var kept: array<array<Left, WM>, KEY_MATRICES>;
    var sum: array<array<Accumulator, WM>, KEY_MATRICES>;
    for (var r = 0u; r < KEY_MATRICES; r++) {
        store_strips(at, key0, r, thread);
        workgroupBarrier();
        for (var d = 0u; d < WM; d++) {
            let place = (has_keys * STRIP + pair * M) * STRIDE + d * M / 4u;
            kept[r][d] = coopLoadT<Left>(&tiles[place], STRIDE);
            sum[r][d] = Accumulator();
        }
        workgroupBarrier();
    }

    let range = row_range(at, i32(key0), i32(key0 + KEYS));
    let first = range.x / i32(ROWS) * i32(ROWS);
    let last_head = at.head_q + problem.group - 1u;
    var step = Step(at.head_q, first);
    var ahead = step;
    var next: Tile;
    if range.x < range.y {
        store_tile(load_tile(at.batch, step.head, u32(first), thread), 0u, u32(first), thread);
        ahead = next_step(step, first, range.y);
        next = load_tile(at.batch, min(ahead.head, last_head), u32(ahead.i0), thread);
    } else {
        step.head = last_head + 1u;
    }
    var buffer = 0u;
    for (; step.head <= last_head; step = next_step(step, first, range.y)) {
        workgroupBarrier();

        // S^T = K Q^T, or dP^T = V dO^T
        var s: array<array<Accumulator, RM>, KEY_MATRICES>;
        for (var r = 0u; r < KEY_MATRICES; r++) {
            for (var c = 0u; c < RM; c++) {
                s[r][c] = Accumulator();
            }
        }
        for (var d = 0u; d < WM; d++) {
            for (var c = 0u; c < RM; c++) {
                let place = ((2u * buffer + has_keys) * ROWS + c * M) * STRIDE + d * M / 4u;
                let right = coopLoad<Right>(&tiles[place], STRIDE);
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    s[r][c] = coopMultiplyAdd(kept[r][d], right, s[r][c]);
                }
            }
        }
        var x: array<array<Lane, RM>, KEY_MATRICES>;
        var of_column: array<array<vec2f, LANE_COLUMNS>, RM>;
        for (var c = 0u; c < RM; c++) {
            for (var e = 0u; e < ELEMENTS; e++) {
                of_column[c][held_column(e)] = numbers[buffer * ROWS + c * M + column_of(lane, 0u) + column_of(0u, e)];
            }
            for (var r = 0u; r < KEY_MATRICES; r++) {
                x[r][c] = elements_of(s[r][c]);
            }
        }

        // P^T = 2^(score(S^T) - lse)
        if has_keys == 0u {
            let full = tile_is_full(at, step.i0, step.i0 + i32(ROWS), i32(key0), i32(key0 + KEYS));
            for (var r = 0u; r < KEY_MATRICES; r++) {
                for (var c = 0u; c < RM; c++) {
                    var slope: Lane;
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let shape = score_shape(x[r][c][e]);
                        slope[e] = score_slope(shape);
                        x[r][c][e] = fma(shape, factor, -of_column[c][held_column(e)].x);
                    }
                    if !full {
                        for (var e = 0u; e < ELEMENTS; e++) {
                            let i = step.i0 + i32(c * M + column_of(lane, 0u) + column_of(0u, e));
                            let j = i32(key0 + mine + r * M + row_of(lane, 0u) + row_of(0u, e));
                            x[r][c][e] = select(MASKED, x[r][c][e], keep(at, i, j));
                        }
                    }
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] = exp2(x[r][c][e]);
                        slope[e] *= x[r][c][e];
                    }
                    let place = pair * PASSED + (r * RM + c) * LANES + lane;
                    passed[place][0] = vec4f(slope[0], slope[1], slope[2], slope[3]);
                    passed[place][1] = vec4f(slope[4], slope[5], slope[6], slope[7]);
                }
            }
        }
        workgroupBarrier();
        buffer = 1u - buffer;
        store_tile(next, buffer, u32(ahead.i0), thread);
        ahead = next_step(ahead, first, range.y);
        // The last one is loaded for nothing.
        next = load_tile(at.batch, min(ahead.head, last_head), u32(ahead.i0), thread);

        // dS^T = P^T (dP^T - delta) score'
        if has_keys == 1u {
            for (var r = 0u; r < KEY_MATRICES; r++) {
                for (var c = 0u; c < RM; c++) {
                    let place = pair * PASSED + (r * RM + c) * LANES + lane;
                    let low = passed[place][0];
                    let high = passed[place][1];
                    let p = Lane(low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w);
                    for (var e = 0u; e < ELEMENTS; e++) {
                        x[r][c][e] = p[e] * (x[r][c][e] - of_column[c][held_column(e)].y);
                    }
                }
            }
        }

        // dV = dV + P^T dO, or dK = dK + dS^T Q
        for (var c = 0u; c < RM; c++) {
            var p: array<Left, KEY_MATRICES>;
            for (var r = 0u; r < KEY_MATRICES; r++) {
                p[r] = left(x[r][c]);
            }
            for (var d = 0u; d < WM; d++) {
                let place = ((2u * (1u - buffer) + 1u - has_keys) * ROWS + c * M) * STRIDE + d * M / 4u;
                let right = coopLoadT<Right>(&tiles[place], STRIDE);
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    sum[r][d] = coopMultiplyAdd(p[r], right, sum[r][d]);
                }
            }
        }
    }

    // dV and scale dK to workgroup memory, then out in whole rows
    let unit = select(1.0, problem.scale, has_keys == 1u);
    for (var r = 0u; r < KEY_MATRICES; r++) {
        workgroupBarrier();
        for (var d = 0u; d < WM; d++) {
            let y = elements_of(sum[r][d]);
            for (var e = 0u; e < ELEMENTS; e++) {
                let row = has_keys * STRIP + pair * M + row_of(lane, 0u) + row_of(0u, e);
                let column = d * M + column_of(lane, 0u) + column_of(0u, e);
                tiles[row * STRIDE + column / 4u][column % 4u] = f16(y[e] * unit);
            }
        }
        workgroupBarrier();
        write_strips(at, key0, r, thread);
    }
}
