// Gradient of Q on cooperative matrices where WGSL is all there is: the algorithm of backward_dq_coop.wgsl, with scores
// and their gradients that cross workgroup memory on their way from matrices to numbers and back. One workgroup computes
// ROWS rows of one head; each of its subgroups has ROW_MATRICES · M of them to itself, M being the size of a matrix.
//
//     dQ = 0
//     for each tile of KEYS keys that some row may see:
//         S = Q K^T,  dP = dO V^T                   to workgroup memory, f32
//         P = 2^(score(S) - lse)                    lse in base 2
//         dS = P (dP - delta) score'                f16, back to workgroup memory as left operands
//         dQ = dQ + dS K
//     dQ = scale dQ
//
// As in backward_dkdv_coop_workgroup.wgsl, dQ stays in registers, there are two tiles of K and V in workgroup memory, and
// loops over matrices are written out. Where registers do not hold all columns of dQ, a workgroup computes COLUMNS of it,
// and S and dP are computed once for each such block.
enable f16;
enable wgpu_cooperative_matrix;
#include "attention/attention.wgsl"
#include "matrix/matrices.wgsl"
#include "memory/elements_f16.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#include "memory/row_stats.wgsl" access=read
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(13) var<storage, read_write> grad_query: OutElements;

const ROWS = SUBGROUPS * ROW_MATRICES * M;
const BLOCKS = (DM + DBM - 1u) / DBM;
// In workgroup memory S and dP, which begins here, and dS.
const SECOND = SUBGROUPS * ROW_MATRICES;
const SUM_BLOCKS = 2u * SECOND;
const HALF_BLOCKS = SECOND;
#include "matrix/exchange.wgsl" columns=KEYS
#include "matrix/scores.wgsl"
#include "memory/read_f16.wgsl" tensor=query
#include "memory/read_f16.wgsl" tensor=key
#include "memory/read_f16.wgsl" tensor=value
#include "memory/read_f16.wgsl" tensor=grad_out
#include "memory/write_f16.wgsl" tensor=grad_query
#include "matrix/rows_in.wgsl" tensor=query rows=ROWS dim=HEAD_DIM
#include "matrix/rows_in.wgsl" tensor=grad_out rows=ROWS dim=HEAD_DIM_V
#include "matrix/rows_out.wgsl" tensor=grad_query rows=ROWS dim=HEAD_DIM
const BUFFERS = 2u;
#include "matrix/coop_tiles.wgsl" first=key second=value rows=KEYS
const TILES = BUFFERS * (D_SIZE + V_SIZE);
var<workgroup> tiles: array<Halves, TILES>;

// A tile of keys on its way from device memory to workgroup memory.
struct Tile {
    k: array<Eight, D_LOADS>,
    v: array<Eight, V_LOADS>,
}

fn load_tile(at: Sequence, j0: i32, last: u32, thread: u32) -> Tile {
    let k = load_key(at, u32(j0), last, thread);
    let v = load_value(at, u32(j0), last, thread);
    return Tile(k, v);
}

fn store_tile(x: Tile, buffer: u32, thread: u32) {
    store_key(x.k, buffer, thread);
    store_value(x.v, buffer, thread);
}

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
    // The last rows first: with a causal mask they take longest.
    let row0 = (workgroups.x - 1u - group.x) / BLOCKS * ROWS;
    let row1 = min(row0 + ROWS, problem.seqlen_q);
    // The first row of matrices of this subgroup; and a lane's row there, of which the others are M further.
    let mine = subgroup * ROW_MATRICES;
    let my_row = row0 + mine * M + row_of(lane, 0u);
    // The first matrix of columns of dQ.
    let dq0 = group.x % BLOCKS * DBM;
    // What is held of scores, times this, are exponents of 2.
    let factor = score_factor();

    let last_row = last_query(at);
    var q: array<array<Left, DM>, ROW_MATRICES>;
#unroll
    for (var d = 0u; d < DM; d++) {
        put_query(at, row0, last_row, d * M, thread);
        workgroupBarrier();
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
            q[r][d] = get_left(mine + r, 0u);
        }
        workgroupBarrier();
    }
    var grad: array<array<Left, VM>, ROW_MATRICES>;
#unroll
    for (var d = 0u; d < VM; d++) {
        put_grad_out(at, row0, last_row, d * M, thread);
        workgroupBarrier();
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
            grad[r][d] = get_left(mine + r, 0u);
        }
        workgroupBarrier();
    }

    var dq: array<array<Accumulator, DBM>, ROW_MATRICES>;
    // lse, in base 2, and delta of the lane's rows.
    var of_row: array<vec2f, ROW_MATRICES>;
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
        for (var d = 0u; d < DBM; d++) {
            dq[r][d] = Accumulator();
        }
        let number = row_stats(row_number(at, min(my_row + r * M, last_row)));
        of_row[r] = vec2f(number.x * LOG2_E, number.y);
    }

    let visited = key_tiles(at, i32(row0), i32(row1), KEYS);
    let last = last_key(at);
    var next: Tile;
    if visited.count > 0 {
        store_tile(load_tile(at, tile(visited, 0), last, thread), 0u, thread);
#if AHEAD
        next = load_tile(at, tile(visited, 1), last, thread);
#endif
    }
    workgroupBarrier();
    var buffer = 0u;
    for (var n = 0; n < visited.count; n++) {
        let j0 = tile(visited, n);
        let k_place = buffer * D_SIZE;
        let v_place = BUFFERS * D_SIZE + buffer * V_SIZE;

        // S = Q K^T,  dP = dO V^T
        for (var c = 0u; c < CM; c++) {
            var s = array<Accumulator, ROW_MATRICES>();
            var dp = array<Accumulator, ROW_MATRICES>();
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
                s[r] = Accumulator();
                dp[r] = Accumulator();
            }
#unroll
            for (var d = 0u; d < DM; d++) {
                let place = k_place + c * M * D_STRIDE + d * M / WIDTH;
                let k = coopLoad<Right>(&tiles[place], D_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    s[r] = coopMultiplyAdd(q[r][d], k, s[r]);
                }
            }
#unroll
            for (var d = 0u; d < VM; d++) {
                let place = v_place + c * M * V_STRIDE + d * M / WIDTH;
                let v = coopLoad<Right>(&tiles[place], V_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    dp[r] = coopMultiplyAdd(grad[r][d], v, dp[r]);
                }
            }
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
                put_accumulator(s[r], mine + r, c);
                put_accumulator(dp[r], SECOND + mine + r, c);
            }
        }
        workgroupBarrier();

        // P = 2^(score(S) - lse),  dS = P (dP - delta) score'
        for (var c = 0u; c < CM; c++) {
            for (var r = 0u; r < ROW_MATRICES; r++) {
                let i = i32(row0 + (mine + r) * M);
                let j = j0 + i32(c * M);
                let scores = shaped(get_elements(mine + r, c, lane), at, i, j, lane);
                var x = Lane();
                var y = get_elements(SECOND + mine + r, c, lane);
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[e] = fma(scores.score[e], factor, -of_row[r].x);
                    y[e] = (y[e] - of_row[r].y) * scores.slope[e];
                }
                if n >= visited.full {
                    x = masked(x, at, i, j, lane, MASKED);
                }
                for (var e = 0u; e < ELEMENTS; e++) {
                    y[e] *= exp2(x[e]);
                }
                put_elements(y, mine + r, c, lane);
            }
        }
#if !AHEAD
        next = load_tile(at, tile(visited, n + 1), last, thread);
#endif
        store_tile(next, 1u - buffer, thread);
        workgroupBarrier();

        // dQ = dQ + dS K
        for (var c = 0u; c < CM; c++) {
            var ds = array<Left, ROW_MATRICES>();
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
                ds[r] = get_left(mine + r, c);
            }
#unroll
            for (var d = 0u; d < DBM; d++) {
                let place = k_place + c * M * D_STRIDE + min(dq0 + d, DM - 1u) * M / WIDTH;
                let k = coopLoadT<Right>(&tiles[place], D_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    dq[r][d] = coopMultiplyAdd(ds[r], k, dq[r][d]);
                }
            }
        }
#if AHEAD
        // A compiler may move loads down to their use, but not into the next trip.
        next = load_tile(at, tile(visited, n + 2), last, thread);
#endif
        buffer = 1u - buffer;
    }

    // To workgroup memory a matrix of columns at a time, then out
#unroll
    for (var d = 0u; d < DBM; d++) {
        workgroupBarrier();
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
            put_accumulator(dq[r][d], mine + r, 0u);
        }
        workgroupBarrier();
        write_columns_grad_query(at, row0, row1, (dq0 + d) * M, problem.scale, thread);
    }
}
