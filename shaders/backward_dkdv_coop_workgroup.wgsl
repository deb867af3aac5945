// Gradients of K and V on cooperative matrices where WGSL is all there is: the algorithm of backward_dkdv_coop.wgsl,
// with scores and their gradients that cross workgroup memory on their way from matrices to numbers and back. One
// workgroup computes KEYS keys of one key-value head; each of its subgroups has KEY_MATRICES · M of them to itself, M
// being the size of a matrix.
//
//     dK = 0, dV = 0
//     for each query head that reads these keys, for each tile of ROWS rows that may see some of them:
//         S^T = K Q^T,  dP^T = V dO^T               to workgroup memory, f32
//         P^T = 2^(score(S^T) - lse)                f16, back to workgroup memory as left operands;
//         dS^T = P^T (dP^T - delta) score'          lse, in base 2, and delta belong to columns
//         dV = dV + P^T dO,  dK = dK + dS^T Q
//     dK = scale dK
//
// dK and dV stay in registers for the whole loop: nothing rescales them. There are two tiles of Q and dO in workgroup
// memory, so that a step has two barriers.
//
// Where registers do not hold all columns of dK and dV, a workgroup computes COLUMNS of each, and S^T and dP^T are
// computed once for each such block. Loops over matrices are written out (src/specialize.rs): arrays of matrices are
// registers only where indices are constants.
enable f16;
enable wgpu_cooperative_matrix;
#include "common/problem.wgsl"
#include "common/softmax.wgsl"
#include "common/score.wgsl"
#include "common/matrices.wgsl"
#include "common/elements_f16.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#include "common/row_stats.wgsl" access=read
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;

const KEYS = SUBGROUPS * KEY_MATRICES * M;
const BLOCKS = max((DM + DBM - 1u) / DBM, (VM + VBM - 1u) / VBM);
// In workgroup memory S^T and dP^T, P^T and dS^T: the second ones begin here.
const SECOND = SUBGROUPS * KEY_MATRICES;
const SUM_BLOCKS = 2u * SECOND;
const HALF_BLOCKS = 2u * SECOND;
#include "common/matrix_exchange.wgsl" columns=ROWS
#include "common/read_f16.wgsl" tensor=query
#include "common/read_f16.wgsl" tensor=key
#include "common/read_f16.wgsl" tensor=value
#include "common/read_f16.wgsl" tensor=grad_out
#include "common/write_f16.wgsl" tensor=grad_key
#include "common/write_f16.wgsl" tensor=grad_value
#include "common/matrix_rows_in.wgsl" tensor=key rows=KEYS dim=HEAD_DIM
#include "common/matrix_rows_in.wgsl" tensor=value rows=KEYS dim=HEAD_DIM_V
#include "common/matrix_rows_out.wgsl" tensor=grad_key rows=KEYS dim=HEAD_DIM
#include "common/matrix_rows_out.wgsl" tensor=grad_value rows=KEYS dim=HEAD_DIM_V
const BUFFERS = 2u;
#include "common/coop_tiles.wgsl" first=query second=grad_out rows=ROWS
const TILES = BUFFERS * (D_SIZE + V_SIZE);
var<workgroup> tiles: array<Halves, TILES>;
// lse, in base 2, and delta of the tiles' rows.
var<workgroup> numbers: array<vec2f, BUFFERS * ROWS>;
const NUMBER_LOADS = (ROWS + THREADS - 1u) / THREADS;

// The steps of a workgroup: those of each query head, one after the other, begin at its row `first`.
struct Steps {
    first: i32,
    of_head: i32,
    count: i32,
}

// A tile of rows on its way from device memory to workgroup memory.
struct Tile {
    i0: i32,
    q: array<Eight, D_LOADS>,
    grad: array<Eight, V_LOADS>,
    numbers: array<vec2f, NUMBER_LOADS>,
}

fn row_of_step(steps: Steps, n: i32) -> i32 {
    return steps.first + n % steps.of_head * i32(ROWS);
}

// The tile of step n; past the last one that again.
fn load_tile(at: Sequence, steps: Steps, n: i32, thread: u32) -> Tile {
    var x: Tile;
    let last = last_query(at);
    let step = min(n, steps.count - 1);
    let head = at.head_q + u32(step / steps.of_head);
    x.i0 = row_of_step(steps, step);
    x.q = load_query(head_start(problem.query, at.batch, head), u32(x.i0), last, thread);
    x.grad = load_grad_out(head_start(problem.grad_out, at.batch, head), u32(x.i0), last, thread);
    let first_row = (at.batch * problem.heads + head) * problem.seqlen_q;
    for (var n = 0u; n < NUMBER_LOADS; n++) {
        x.numbers[n] = row_stats(first_row + min(u32(x.i0) + thread + n * THREADS, last));
    }
    return x;
}

fn store_tile(at: Sequence, x: Tile, buffer: u32, thread: u32) {
    store_query(x.q, buffer, thread);
    store_grad_out(x.grad, buffer, thread);
    for (var n = 0u; n < NUMBER_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < ROWS {
            // A row past the end is as one without keys.
            let number = select(x.numbers[n], vec2f(NO_KEYS, 0.0), u32(x.i0) + t > last_query(at));
            numbers[buffer * ROWS + t] = vec2f(number.x * LOG2_E, number.y);
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
    let key0 = group.x / BLOCKS * KEYS;
    // The first row of matrices of this subgroup; and a lane's key there, of which the others are M further.
    let mine = subgroup * KEY_MATRICES;
    let my_key = i32(key0 + mine * M + row_of(lane, 0u));
    // The first matrix of columns of dK and of dV.
    let dk0 = group.x % BLOCKS * DBM;
    let dv0 = group.x % BLOCKS * VBM;
    let last = u32(max(at.keys, 1) - 1);
    // Shapes of scores times this are exponents of 2; a shape is odd in its score.
    let factor = score_sign() * score_factor();

    var k: array<array<Left, DM>, KEY_MATRICES>;
#unroll
    for (var d = 0u; d < DM; d++) {
        put_key(head_start(problem.key, at.batch, at.head_kv), key0, last, d * M, thread);
        workgroupBarrier();
#unroll
        for (var r = 0u; r < KEY_MATRICES; r++) {
            k[r][d] = get_left(mine + r, 0u);
        }
        workgroupBarrier();
    }
    var v: array<array<Left, VM>, KEY_MATRICES>;
#unroll
    for (var d = 0u; d < VM; d++) {
        put_value(head_start(problem.value, at.batch, at.head_kv), key0, last, d * M, thread);
        workgroupBarrier();
#unroll
        for (var r = 0u; r < KEY_MATRICES; r++) {
            v[r][d] = get_left(mine + r, 0u);
        }
        workgroupBarrier();
    }

    var dk: array<array<Accumulator, DBM>, KEY_MATRICES>;
    var dv: array<array<Accumulator, VBM>, KEY_MATRICES>;
#unroll
    for (var r = 0u; r < KEY_MATRICES; r++) {
#unroll
        for (var d = 0u; d < DBM; d++) {
            dk[r][d] = Accumulator();
        }
#unroll
        for (var d = 0u; d < VBM; d++) {
            dv[r][d] = Accumulator();
        }
    }

    let range = row_range(at, i32(key0), i32(key0 + KEYS));
    var steps: Steps;
    steps.first = range.x / i32(ROWS) * i32(ROWS);
    steps.of_head = max((range.y - steps.first + i32(ROWS) - 1) / i32(ROWS), 1);
    steps.count = select(steps.of_head * i32(problem.group), 0, range.x >= range.y);
    var next: Tile;
    if steps.count > 0 {
        store_tile(at, load_tile(at, steps, 0, thread), 0u, thread);
#if AHEAD
        next = load_tile(at, steps, 1, thread);
#endif
    }
    workgroupBarrier();
    for (var n = 0; n < steps.count; n++) {
        let buffer = u32(n) % 2u;
        let q_place = buffer * D_SIZE;
        let grad_place = BUFFERS * D_SIZE + buffer * V_SIZE;

        // S^T = K Q^T,  dP^T = V dO^T. No array of matrices has c for an index: this loop need not be written out.
        for (var c = 0u; c < CM; c++) {
            var s = array<Accumulator, KEY_MATRICES>();
            var dp = array<Accumulator, KEY_MATRICES>();
#unroll
            for (var r = 0u; r < KEY_MATRICES; r++) {
                s[r] = Accumulator();
                dp[r] = Accumulator();
            }
#unroll
            for (var d = 0u; d < DM; d++) {
                let place = q_place + c * M * D_STRIDE + d * M / WIDTH;
                let q = coopLoad<Right>(&tiles[place], D_STRIDE);
#unroll
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    s[r] = coopMultiplyAdd(k[r][d], q, s[r]);
                }
            }
#unroll
            for (var d = 0u; d < VM; d++) {
                let place = grad_place + c * M * V_STRIDE + d * M / WIDTH;
                let grad = coopLoad<Right>(&tiles[place], V_STRIDE);
#unroll
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    dp[r] = coopMultiplyAdd(v[r][d], grad, dp[r]);
                }
            }
#unroll
            for (var r = 0u; r < KEY_MATRICES; r++) {
                put_accumulator(s[r], mine + r, c);
                put_accumulator(dp[r], SECOND + mine + r, c);
            }
        }
        workgroupBarrier();

        // P^T = 2^(score(S^T) - lse),  dS^T = P^T (dP^T - delta) score'
        let i0 = row_of_step(steps, n);
        let full = tile_is_full(at, i0, i0 + i32(ROWS), i32(key0), i32(key0 + KEYS));
        for (var c = 0u; c < CM; c++) {
            for (var r = 0u; r < KEY_MATRICES; r++) {
                var x = get_elements(mine + r, c, lane);
                var y = get_elements(SECOND + mine + r, c, lane);
                for (var e = 0u; e < ELEMENTS; e++) {
                    let number = numbers[buffer * ROWS + c * M + column_of(lane, 0u) + column_of(0u, e)];
                    let shape = score_shape(x[e]);
                    x[e] = fma(shape, factor, -number.x);
                    y[e] = (y[e] - number.y) * score_slope(shape);
                }
                if !full {
                    for (var e = 0u; e < ELEMENTS; e++) {
                        let i = i0 + i32(c * M + column_of(lane, 0u) + column_of(0u, e));
                        x[e] = select(MASKED, x[e], keep(at, i, my_key + i32(r * M)));
                    }
                }
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[e] = exp2(x[e]);
                    y[e] *= x[e];
                }
                put_elements(x, mine + r, c, lane);
                put_elements(y, SECOND + mine + r, c, lane);
            }
        }
#if !AHEAD
        next = load_tile(at, steps, n + 1, thread);
#endif
        store_tile(at, next, 1u - buffer, thread);
        workgroupBarrier();

        // dV = dV + P^T dO,  dK = dK + dS^T Q
        for (var c = 0u; c < CM; c++) {
            var p = array<Left, KEY_MATRICES>();
            var ds = array<Left, KEY_MATRICES>();
#unroll
            for (var r = 0u; r < KEY_MATRICES; r++) {
                p[r] = get_left(mine + r, c);
                ds[r] = get_left(SECOND + mine + r, c);
            }
#unroll
            for (var d = 0u; d < VBM; d++) {
                let place = grad_place + c * M * V_STRIDE + min(dv0 + d, VM - 1u) * M / WIDTH;
                let grad = coopLoadT<Right>(&tiles[place], V_STRIDE);
#unroll
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    dv[r][d] = coopMultiplyAdd(p[r], grad, dv[r][d]);
                }
            }
#unroll
            for (var d = 0u; d < DBM; d++) {
                let place = q_place + c * M * D_STRIDE + min(dk0 + d, DM - 1u) * M / WIDTH;
                let q = coopLoadT<Right>(&tiles[place], D_STRIDE);
#unroll
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    dk[r][d] = coopMultiplyAdd(ds[r], q, dk[r][d]);
                }
            }
        }
#if AHEAD
        // A compiler may move loads down to their use, but not into the next trip.
        next = load_tile(at, steps, n + 2, thread);
#endif
    }

    // To workgroup memory a matrix of columns at a time, then out
    let key_start = head_start(problem.grad_key, at.batch, at.head_kv);
#unroll
    for (var d = 0u; d < DBM; d++) {
        workgroupBarrier();
#unroll
        for (var r = 0u; r < KEY_MATRICES; r++) {
            put_accumulator(dk[r][d], mine + r, 0u);
        }
        workgroupBarrier();
        write_columns_grad_key(key_start, key0, problem.seqlen_k, (dk0 + d) * M, problem.scale, thread);
    }
    let value_start = head_start(problem.grad_value, at.batch, at.head_kv);
#unroll
    for (var d = 0u; d < VBM; d++) {
        workgroupBarrier();
#unroll
        for (var r = 0u; r < KEY_MATRICES; r++) {
            put_accumulator(dv[r][d], mine + r, 0u);
        }
        workgroupBarrier();
        write_columns_grad_value(value_start, key0, problem.seqlen_k, (dv0 + d) * M, 1.0, thread);
    }
}
