// What: forward pass on cooperative matrices (tensor cores), with f16 (or bf16) products and f32 sums. Scores and probabilities stay in registers.
//
//     m = EMPTY, l = 0, O = 0
//     for each tile of KEYS keys that some row may see, for each turn of ACROSS_TURN · M of them (matrix/coop_step.wgsl):
//         S = score(Q K^T)                          f32 accumulators, then numbers in the lanes that hold them
//         if rowmax S > m + GROWTH for some row of the subgroup:
//             m' = max(m, rowmax S),  l = 2^(m - m') l,  O = 2^(m - m') O
//         P = 2^(S - m)                             f16 left operands, made in the lanes that hold S
//         l = l + rowsum P,  O = O + P V
//     O = O / l,  lse = ln 2 (m + log2 l)           m is an exponent of 2
//
// Who: a workgroup owns ROWS rows of one head. Each of its subgroups has ROW_MATRICES · M of these rows, with O, S and P of a turn, and
//   Q_HELD matrices of Q in registers. Workgroup memory holds BUFFERS tiles of K and of V, and Q_REST matrices of Q.
// Pipelining: the next tile of K and V is loaded into registers while the products of this tile run. With two BUFFERS it is stored
//   beside the tile in use, so a tile needs one barrier instead of two.
// Needs q, k, v, and a device where accumulators and left operands have their elements in the same lanes (src/matrices/). For devices
//   without access to elements there is forward_coop_workgroup.wgsl. Gives out and, with LSE, lse.
enable f16;
enable wgpu_cooperative_matrix;
#include "attention/attention.wgsl"
#include "matrix/matrices.wgsl"
#include "memory/elements_f16.wgsl"

// read_write, though the inputs are never written: a compiler may move loads of read-only memory down to where their values are used.
// Loads of read_write memory stay where they are written, ahead of the arithmetic that hides their latency.
@group(0) @binding(1) var<storage, read_write> query: InElements;
@group(0) @binding(2) var<storage, read_write> key: InElements;
@group(0) @binding(3) var<storage, read_write> value: InElements;
@group(0) @binding(4) var<storage, read_write> out: OutElements;
#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
#include "matrix/elements.wgsl"
#include "matrix/scores.wgsl" queries=row keys=column together=ACROSS_TURN*M
#include "memory/read_f16.wgsl" tensor=query
#include "memory/read_f16.wgsl" tensor=key
#include "memory/read_f16.wgsl" tensor=value

fn write_out(start: u32, d: u32, dim: u32, x: Eight) {
#if ALIGNED
    let e = (start + d) / 8u * 2u;
    out[e] = x.low;
    out[e + 1u] = x.high;
#else
    for (var c = 0u; c < min(8u, dim - d); c++) {
        out[start + d + c] = select(x.high[c % 4u], x.low[c % 4u], c < 4u);
    }
#endif
}

const ROWS = SUBGROUPS * ROW_MATRICES * M;
#include "matrix/coop_tiles.wgsl" first=key second=value rows=KEYS
#include "matrix/staged_rows.wgsl"
// Workgroup memory. In the loop: BUFFERS tiles of K and of V, of two of which one is filled while the second is in use, then the Q_REST
// matrices of Q. Before the loop: the Q_HELD matrices of Q, block by block. After the loop: O, block by block.
const REST_AT = BUFFERS * (D_SIZE + V_SIZE);
const TILES = max(REST_AT + ROWS * REST_STRIDE, STAGED * max(Q_STRIDE, O_STRIDE));
var<workgroup> tiles: array<Halves, TILES>;

@compute @workgroup_size(THREADS)
fn forward(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    let at = sequence(group.z, group.y);
    // The last rows first: with a causal mask they take longest.
    let row0 = problem.row_begin + (workgroups.x - 1u - group.x) * ROWS;
    let row1 = min(row0 + ROWS, problem.row_end);
    let own_row = subgroup * ROW_MATRICES * M;
    // Held scores times this are exponents of 2.
    let factor = max(score_factor(), SMALLEST_FACTOR);
    // masked_score · factor = -1e15 is far below EMPTY.
    let masked_score = -1.0e15 / factor;

    // Q
    var q: array<array<Left, Q_BLOCKS * Q_BLOCK>, ROW_MATRICES>;
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
        for (var b = 0u; b < Q_BLOCKS; b++) {
            stage_query(at, row0, r, b, thread);
            workgroupBarrier();
#unroll
            for (var d = 0u; d < Q_BLOCK; d++) {
                let place = subgroup * M * Q_STRIDE + d * M / WIDTH;
                q[r][b * Q_BLOCK + d] = coopLoadT<Left>(&tiles[place], Q_STRIDE);
            }
            workgroupBarrier();
        }
    }
#if QUERY_IN_MEMORY
    store_rest(at, row0, thread);
#endif

    var o: array<array<Accumulator, O_BLOCKS * O_BLOCK>, ROW_MATRICES>;
    var m: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
    var l: array<array<f32, LANE_ROWS>, ROW_MATRICES>;
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
        for (var d = 0u; d < ACROSS_DIM_V; d++) {
            o[r][d] = Accumulator();
        }
#unroll
        for (var h = 0u; h < LANE_ROWS; h++) {
            m[r][h] = EMPTY;
            l[r][h] = 0.0;
        }
    }

    // Tiles all of whose scores count come first, in a loop without a branch for others: drivers write it out several times,
    // and then need not move O and the loads about between its trips. They do not write out longer steps than plain
    // attention has: then STEPS of them are here.
    let visited = key_tiles(at, i32(row0), i32(row1), KEYS);
    let last = last_key(at);
    var j0 = tile(visited, 0);
    var key_next: array<Eight, D_LOADS>;
    var value_next: array<Eight, V_LOADS>;
    if visited.count > 0 {
        key_next = load_key(at, u32(j0), last, thread);
        value_next = load_value(at, u32(j0), last, thread);
    }
    if BUFFERS == 2u {
        store_key(key_next, 0u, thread);
        store_value(value_next, 0u, thread);
        workgroupBarrier();
    }
    var buffer = 0u;
    let full = visited.full / i32(STEPS) * i32(STEPS);
    for (var n = 0; n < full; n += i32(STEPS)) {
#unroll
        for (var step = 0u; step < STEPS; step++) {
#include "matrix/coop_step.wgsl" ahead=i32(step)+1 some_masked=false
        }
    }
    for (var n = full; n < visited.count; n++) {
#include "matrix/coop_step.wgsl" ahead=1 some_masked=true
    }
    workgroupBarrier();

    // O / l to workgroup memory, then out in whole rows
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
        var ends = array<Row, LANE_ROWS>();
#unroll
        for (var h = 0u; h < LANE_ROWS; h++) {
            ends[h] = finish_row(at, m[r][h] / LOG2_E, row_sum(l[r][h]), m[r][h] == EMPTY);
        }
#if LSE
#unroll
        for (var e = 0u; e < ELEMENTS; e++) {
            let i = row0 + own_row + r * M + row_of(lane, e);
            if column_of(lane, e) == 0u && i < row1 {
                lse[lse_row(at, i)] = ends[held_row(e)].lse;
            }
        }
#endif
#unroll
        for (var b = 0u; b < O_BLOCKS; b++) {
#unroll
            for (var d = 0u; d < O_BLOCK; d++) {
                let y = elements_of(o[r][b * O_BLOCK + d]);
#unroll
                for (var e = 0u; e < ELEMENTS; e++) {
                    let row = subgroup * M + row_of(lane, 0u) + row_of(0u, e);
                    let column = d * M + column_of(lane, 0u) + column_of(0u, e);
                    // Lanes store components of one vector. That is no race here: modules with access to elements run on Vulkan only, where a store
                    // to a component leaves the others alone.
                    tiles[row * O_STRIDE + column / 4u][column % 4u] = half_of(y[e] * ends[held_row(e)].inverse);
                }
            }
            workgroupBarrier();
            for (var n = 0u; n < O_STORES; n++) {
                let t = thread + n * THREADS;
                let i = row0 + staged_row(t / O8, r);
                let d = b * O_BLOCK * M + 8u * (t % O8);
                if t < STAGED * O8 && i < row1 && d < HEAD_DIM_V {
                    let place = t / O8 * O_STRIDE + 8u / WIDTH * (t % O8);
                    write_out(out_row(at, i), d, HEAD_DIM_V, Eight(tiles[place], tiles[place + 1u]));
                }
            }
            workgroupBarrier();
        }
    }
}
