// What: gradient of Q on cooperative matrices for devices without access to elements of matrices. S, dP and dS cross workgroup memory on
//   the way from matrices to numbers and back.
//
//     dQ = 0
//     for each tile of KEYS keys that some row may see:
//         S = Q K^T,  dP = dO V^T                   to workgroup memory, f32
//         P = 2^(score(S) - lse)                    lse is an exponent of 2
//         dS = P (dP - delta) score'                f16, to workgroup memory as left operands
//         dQ = dQ + dS K
//     dQ = scale dQ
//
// Who: a workgroup owns ROWS rows of one head. Each of its subgroups has ROW_MATRICES · M of these rows, and keeps dQ in registers. Where
//   registers do not hold all columns, a workgroup computes a block of COLUMNS; S and dP are then computed once for each block. Loops over
//   matrices are written out (src/specialize.rs): arrays of matrices are registers only where indices are constants.
// Pipelining: workgroup memory has two tiles of K and V: one is filled while the products of the other run. A step has two barriers.
// Needs q, k, v, dO, row_stats. Gives dQ.
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
const BLOCKS = (ACROSS_DIM + ACROSS_DIM_BLOCK - 1u) / ACROSS_DIM_BLOCK;
// In f32 blocks: S, then dP from block SECOND on. In f16 blocks: dS.
const SECOND = SUBGROUPS * ROW_MATRICES;
const SUM_BLOCKS = 2u * SECOND;
const HALF_BLOCKS = SECOND;
#include "matrix/exchange.wgsl" columns=KEYS
#include "matrix/scores.wgsl" queries=row keys=column together=M
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
    // The first block of this subgroup, and a lane's row in it. The lane's rows in later blocks are M apart.
    let own_block = subgroup * ROW_MATRICES;
    let lane_row = row0 + own_block * M + row_of(lane, 0u);
    // The first matrix of columns of dQ.
    let dq0 = group.x % BLOCKS * ACROSS_DIM_BLOCK;
    // Held scores times this are exponents of 2.
    let factor = score_factor();

    let last_row = last_query(at);
    var q: array<array<Left, ACROSS_DIM>, ROW_MATRICES>;
#unroll
    for (var d = 0u; d < ACROSS_DIM; d++) {
        put_query(at, row0, last_row, d * M, thread);
        workgroupBarrier();
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
            q[r][d] = get_left(own_block + r, 0u);
        }
        workgroupBarrier();
    }
    var grad: array<array<Left, ACROSS_DIM_V>, ROW_MATRICES>;
#unroll
    for (var d = 0u; d < ACROSS_DIM_V; d++) {
        put_grad_out(at, row0, last_row, d * M, thread);
        workgroupBarrier();
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
            grad[r][d] = get_left(own_block + r, 0u);
        }
        workgroupBarrier();
    }

    var dq: array<array<Accumulator, ACROSS_DIM_BLOCK>, ROW_MATRICES>;
    // lse, in base 2, and delta of the lane's rows.
    var lane_stats: array<vec2f, ROW_MATRICES>;
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
        for (var d = 0u; d < ACROSS_DIM_BLOCK; d++) {
            dq[r][d] = Accumulator();
        }
        let stats = row_stats(row_number(at, min(lane_row + r * M, last_row)));
        lane_stats[r] = vec2f(stats.x * LOG2_E, stats.y);
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
        for (var c = 0u; c < ACROSS_STEP; c++) {
            var s = array<Accumulator, ROW_MATRICES>();
            var dp = array<Accumulator, ROW_MATRICES>();
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
                s[r] = Accumulator();
                dp[r] = Accumulator();
            }
#unroll
            for (var d = 0u; d < ACROSS_DIM; d++) {
                let place = k_place + c * M * D_STRIDE + d * M / WIDTH;
                let k = coopLoad<Right>(&tiles[place], D_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    s[r] = coopMultiplyAdd(q[r][d], k, s[r]);
                }
            }
#unroll
            for (var d = 0u; d < ACROSS_DIM_V; d++) {
                let place = v_place + c * M * V_STRIDE + d * M / WIDTH;
                let v = coopLoad<Right>(&tiles[place], V_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    dp[r] = coopMultiplyAdd(grad[r][d], v, dp[r]);
                }
            }
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
                put_accumulator(s[r], own_block + r, c);
                put_accumulator(dp[r], SECOND + own_block + r, c);
            }
        }
        workgroupBarrier();

        // P = 2^(score(S) - lse),  dS = P (dP - delta) score'
        for (var c = 0u; c < ACROSS_STEP; c++) {
            for (var r = 0u; r < ROW_MATRICES; r++) {
                let i = i32(row0 + (own_block + r) * M);
                let j = j0 + i32(c * M);
                let scores = shaped(get_elements(own_block + r, c, lane), added_lane(at, i, j, 0u, lane), at, i, j, lane);
                var x = Lane();
                var y = get_elements(SECOND + own_block + r, c, lane);
#if DROPOUT
                y = grad_of_kept(y, kept_lane(at, i, j, 0u, lane));
#endif
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[e] = fma(scores.score[e], factor, -lane_stats[r].x);
                    y[e] = (y[e] - lane_stats[r].y) * scores.slope[e];
                }
                if n >= visited.full {
                    x = masked(x, at, i, j, lane, MASKED);
                }
                for (var e = 0u; e < ELEMENTS; e++) {
                    y[e] *= exp2(x[e]);
                }
                put_elements(y, own_block + r, c, lane);
            }
        }
#if !AHEAD
        next = load_tile(at, tile(visited, n + 1), last, thread);
#endif
        store_tile(next, 1u - buffer, thread);
        workgroupBarrier();

        // dQ = dQ + dS K
        for (var c = 0u; c < ACROSS_STEP; c++) {
            var ds = array<Left, ROW_MATRICES>();
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
                ds[r] = get_left(own_block + r, c);
            }
#unroll
            for (var d = 0u; d < ACROSS_DIM_BLOCK; d++) {
                let place = k_place + c * M * D_STRIDE + min(dq0 + d, ACROSS_DIM - 1u) * M / WIDTH;
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
    for (var d = 0u; d < ACROSS_DIM_BLOCK; d++) {
        workgroupBarrier();
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
            put_accumulator(dq[r][d], own_block + r, 0u);
        }
        workgroupBarrier();
        write_columns_grad_query(at, row0, row1, (dq0 + d) * M, problem.scale, thread);
    }
}
