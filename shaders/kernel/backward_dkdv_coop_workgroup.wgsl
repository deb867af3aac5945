// What: gradients of K and V on cooperative matrices for devices without access to elements of matrices. S^T, dP^T, P^T and dS^T cross
//   workgroup memory on the way from matrices to numbers and back.
//
//     dK = 0, dV = 0
//     for each query head of the group, for each tile of ROWS rows that may see some of the keys:
//         S^T = K Q^T,  dP^T = V dO^T               to workgroup memory, f32
//         P^T = 2^(score(S^T) - lse)                f16, to workgroup memory as left operands
//         dS^T = P^T (dP^T - delta) score'          likewise; lse, an exponent of 2, and delta belong to columns
//         dV = dV + P^T dO,  dK = dK + dS^T Q
//     dK = scale dK
//
// Who: a workgroup owns KEYS keys of one key-value head. Each of its subgroups has KEY_MATRICES · M of these keys. dK and dV stay in
//   registers for the whole loop: nothing rescales them. Where registers do not hold all columns, a workgroup computes a block of COLUMNS
//   of each; S^T and dP^T are then computed once for each block. Loops over matrices are written out (src/specialize.rs): arrays of
//   matrices are registers only where indices are constants.
// Pipelining: workgroup memory has two tiles of Q and dO: one is filled while the products of the other run. A step has two barriers.
// Needs q, k, v, dO, row_stats. Gives dK and dV.
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
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;

const KEYS = SUBGROUPS * KEY_MATRICES * M;
const BLOCKS = max((ACROSS_DIM + ACROSS_DIM_BLOCK - 1u) / ACROSS_DIM_BLOCK, (ACROSS_DIM_V + ACROSS_DIM_V_BLOCK - 1u) / ACROSS_DIM_V_BLOCK);
// In f32 blocks: S^T, then dP^T from block SECOND on. In f16 blocks: P^T, then dS^T from block SECOND on.
const SECOND = SUBGROUPS * KEY_MATRICES;
const SUM_BLOCKS = 2u * SECOND;
const HALF_BLOCKS = 2u * SECOND;
#include "matrix/exchange.wgsl" columns=ROWS
#include "matrix/scores.wgsl" queries=column keys=row together=KEY_MATRICES*M
#include "memory/read_f16.wgsl" tensor=query
#include "memory/read_f16.wgsl" tensor=key
#include "memory/read_f16.wgsl" tensor=value
#include "memory/read_f16.wgsl" tensor=grad_out
#include "memory/write_f16.wgsl" tensor=grad_key
#include "memory/write_f16.wgsl" tensor=grad_value
#include "matrix/rows_in.wgsl" tensor=key rows=KEYS dim=HEAD_DIM
#include "matrix/rows_in.wgsl" tensor=value rows=KEYS dim=HEAD_DIM_V
#include "matrix/rows_out.wgsl" tensor=grad_key rows=KEYS dim=HEAD_DIM
#include "matrix/rows_out.wgsl" tensor=grad_value rows=KEYS dim=HEAD_DIM_V
const BUFFERS = 2u;
#include "matrix/coop_tiles.wgsl" first=query second=grad_out rows=ROWS
const TILES = BUFFERS * (D_SIZE + V_SIZE);
var<workgroup> tiles: array<Halves, TILES>;
// lse, in base 2, and delta of the tiles' rows.
var<workgroup> step_stats: array<vec2f, BUFFERS * ROWS>;
const STATS_LOADS = (ROWS + THREADS - 1u) / THREADS;

// A tile of rows on its way from device memory to workgroup memory.
struct Tile {
    q: array<Eight, D_LOADS>,
    grad: array<Eight, V_LOADS>,
    stats: array<vec2f, STATS_LOADS>,
}

fn load_tile(at: Sequence, i0: u32, thread: u32) -> Tile {
    var x: Tile;
    let last = last_query(at);
    x.q = load_query(at, i0, last, thread);
    x.grad = load_grad_out(at, i0, last, thread);
    for (var n = 0u; n < STATS_LOADS; n++) {
        x.stats[n] = row_stats(row_number(at, min(i0 + thread + n * THREADS, last)));
    }
    return x;
}

fn store_tile(at: Sequence, x: Tile, i0: u32, buffer: u32, thread: u32) {
    store_query(x.q, buffer, thread);
    store_grad_out(x.grad, buffer, thread);
    for (var n = 0u; n < STATS_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < ROWS {
            // A row past the end is as one without keys.
            let stats = select(x.stats[n], vec2f(NO_KEYS, 0.0), i0 + t > last_query(at));
            step_stats[buffer * ROWS + t] = vec2f(stats.x * LOG2_E, stats.y);
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
    let key0 = group.x / BLOCKS * KEYS;
    // The first row of matrices of this subgroup.
    let own_block = subgroup * KEY_MATRICES;
    // The first matrix of columns of dK and of dV.
    let dk0 = group.x % BLOCKS * ACROSS_DIM_BLOCK;
    let dv0 = group.x % BLOCKS * ACROSS_DIM_V_BLOCK;
    let last = last_key(of_group);
    // Held scores times this are exponents of 2.
    let factor = score_factor();

    var k: array<array<Left, ACROSS_DIM>, KEY_MATRICES>;
#unroll
    for (var d = 0u; d < ACROSS_DIM; d++) {
        put_key(of_group, key0, last, d * M, thread);
        workgroupBarrier();
#unroll
        for (var r = 0u; r < KEY_MATRICES; r++) {
            k[r][d] = get_left(own_block + r, 0u);
        }
        workgroupBarrier();
    }
    var v: array<array<Left, ACROSS_DIM_V>, KEY_MATRICES>;
#unroll
    for (var d = 0u; d < ACROSS_DIM_V; d++) {
        put_value(of_group, key0, last, d * M, thread);
        workgroupBarrier();
#unroll
        for (var r = 0u; r < KEY_MATRICES; r++) {
            v[r][d] = get_left(own_block + r, 0u);
        }
        workgroupBarrier();
    }

    var dk: array<array<Accumulator, ACROSS_DIM_BLOCK>, KEY_MATRICES>;
    var dv: array<array<Accumulator, ACROSS_DIM_V_BLOCK>, KEY_MATRICES>;
#unroll
    for (var r = 0u; r < KEY_MATRICES; r++) {
#unroll
        for (var d = 0u; d < ACROSS_DIM_BLOCK; d++) {
            dk[r][d] = Accumulator();
        }
#unroll
        for (var d = 0u; d < ACROSS_DIM_V_BLOCK; d++) {
            dv[r][d] = Accumulator();
        }
    }

    // `ahead` is one tile ahead of `walk`. After the last tile it stands at no tile; then the last tile is loaded again.
    var walk = walk_rows(of_group, i32(key0), i32(key0 + KEYS), ROWS);
    var ahead = next_tile(walk, i32(key0), i32(key0 + KEYS), ROWS);
    var next: Tile;
    if has_tile(walk) {
        store_tile(walk.at, load_tile(walk.at, u32(first_row(walk)), thread), u32(first_row(walk)), 0u, thread);
#if AHEAD
        next = load_tile(ahead.at, u32(first_row(ahead)), thread);
#endif
    }
    workgroupBarrier();
    var buffer = 0u;
    while has_tile(walk) {
        let at = walk.at;
        let q_place = buffer * D_SIZE;
        let grad_place = BUFFERS * D_SIZE + buffer * V_SIZE;

        // S^T = K Q^T,  dP^T = V dO^T. No array of matrices has c for an index: this loop need not be written out.
        for (var c = 0u; c < ACROSS_STEP; c++) {
            var s = array<Accumulator, KEY_MATRICES>();
            var dp = array<Accumulator, KEY_MATRICES>();
#unroll
            for (var r = 0u; r < KEY_MATRICES; r++) {
                s[r] = Accumulator();
                dp[r] = Accumulator();
            }
#unroll
            for (var d = 0u; d < ACROSS_DIM; d++) {
                let place = q_place + c * M * D_STRIDE + d * M / WIDTH;
                let q = coopLoad<Right>(&tiles[place], D_STRIDE);
#unroll
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    s[r] = coopMultiplyAdd(k[r][d], q, s[r]);
                }
            }
#unroll
            for (var d = 0u; d < ACROSS_DIM_V; d++) {
                let place = grad_place + c * M * V_STRIDE + d * M / WIDTH;
                let grad = coopLoad<Right>(&tiles[place], V_STRIDE);
#unroll
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    dp[r] = coopMultiplyAdd(v[r][d], grad, dp[r]);
                }
            }
#unroll
            for (var r = 0u; r < KEY_MATRICES; r++) {
                put_accumulator(s[r], own_block + r, c);
                put_accumulator(dp[r], SECOND + own_block + r, c);
            }
        }
        workgroupBarrier();

        // P^T = 2^(score(S^T) - lse),  dS^T = P^T (dP^T - delta) score'
        let i0 = first_row(walk);
        for (var c = 0u; c < ACROSS_STEP; c++) {
            for (var r = 0u; r < KEY_MATRICES; r++) {
                let i = i0 + i32(c * M);
                let j = i32(key0 + (own_block + r) * M);
                let scores = shaped(get_elements(own_block + r, c, lane), added_lane(at, i, j, 0u, lane), at, i, j, lane);
                var x = Lane();
                var y = get_elements(SECOND + own_block + r, c, lane);
#if DROPOUT
                let kept = kept_lane(at, i, j, r, lane);
                y = grad_of_kept(y, kept);
#endif
                for (var e = 0u; e < ELEMENTS; e++) {
                    let stats = step_stats[buffer * ROWS + c * M + column_of(lane, 0u) + column_of(0u, e)];
                    x[e] = fma(scores.score[e], factor, -stats.x);
                    y[e] = (y[e] - stats.y) * scores.slope[e];
                }
                if walk.n >= walk.tiles.full {
                    x = masked(x, at, i, j, lane, MASKED);
                }
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[e] = exp2(x[e]);
                    y[e] *= x[e];
                }
#if DROPOUT
                x = what_is_kept(x, kept);
#endif
                put_elements(x, own_block + r, c, lane);
                put_elements(y, SECOND + own_block + r, c, lane);
            }
        }
#if !AHEAD
        next = load_tile(ahead.at, u32(first_row(ahead)), thread);
#endif
        store_tile(ahead.at, next, u32(first_row(ahead)), 1u - buffer, thread);
        workgroupBarrier();

        // dV = dV + P^T dO,  dK = dK + dS^T Q
        for (var c = 0u; c < ACROSS_STEP; c++) {
            var p = array<Left, KEY_MATRICES>();
            var ds = array<Left, KEY_MATRICES>();
#unroll
            for (var r = 0u; r < KEY_MATRICES; r++) {
                p[r] = get_left(own_block + r, c);
                ds[r] = get_left(SECOND + own_block + r, c);
            }
#unroll
            for (var d = 0u; d < ACROSS_DIM_V_BLOCK; d++) {
                let place = grad_place + c * M * V_STRIDE + min(dv0 + d, ACROSS_DIM_V - 1u) * M / WIDTH;
                let grad = coopLoadT<Right>(&tiles[place], V_STRIDE);
#unroll
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    dv[r][d] = coopMultiplyAdd(p[r], grad, dv[r][d]);
                }
            }
#unroll
            for (var d = 0u; d < ACROSS_DIM_BLOCK; d++) {
                let place = q_place + c * M * D_STRIDE + min(dk0 + d, ACROSS_DIM - 1u) * M / WIDTH;
                let q = coopLoadT<Right>(&tiles[place], D_STRIDE);
#unroll
                for (var r = 0u; r < KEY_MATRICES; r++) {
                    dk[r][d] = coopMultiplyAdd(ds[r], q, dk[r][d]);
                }
            }
        }
#if AHEAD
        // A compiler may move loads down to their use, but not into the next trip.
        let after = next_tile(ahead, i32(key0), i32(key0 + KEYS), ROWS);
        next = load_tile(after.at, u32(first_row(after)), thread);
#endif
        walk = ahead;
        ahead = next_tile(ahead, i32(key0), i32(key0 + KEYS), ROWS);
        buffer = 1u - buffer;
    }

    // To workgroup memory a matrix of columns at a time, then out
#unroll
    for (var d = 0u; d < ACROSS_DIM_BLOCK; d++) {
        workgroupBarrier();
#unroll
        for (var r = 0u; r < KEY_MATRICES; r++) {
            put_accumulator(dk[r][d], own_block + r, 0u);
        }
        workgroupBarrier();
        write_columns_grad_key(of_group, key0, problem.seqlen_k, (dk0 + d) * M, problem.scale, thread);
    }
#unroll
    for (var d = 0u; d < ACROSS_DIM_V_BLOCK; d++) {
        workgroupBarrier();
#unroll
        for (var r = 0u; r < KEY_MATRICES; r++) {
            put_accumulator(dv[r][d], own_block + r, 0u);
        }
        workgroupBarrier();
#if DROPOUT
        write_columns_grad_value(of_group, key0, problem.seqlen_k, (dv0 + d) * M, problem.dropout_scale, thread);
#else
        write_columns_grad_value(of_group, key0, problem.seqlen_k, (dv0 + d) * M, 1.0, thread);
#endif
    }
}
