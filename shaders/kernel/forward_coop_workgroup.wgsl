// What: forward pass on cooperative matrices for devices without access to elements of matrices. S and P cross workgroup memory on the way
//   from matrices to numbers and back.
//
//     m = EMPTY, l = 0, O = 0
//     for each tile of KEYS keys that some row may see:
//         S of the next tile = Q K^T                runs beside the softmax of this tile, which uses other units
//         where rowmax S > m + GROWTH:              m' = rowmax S,  l = 2^(m - m') l,  O = 2^(m - m') O;  else m' = m
//         P = 2^(S - m')                            f16, at most 2^GROWTH
//         l = l + rowsum P,  O = O + P V
//     O = O / l,  lse = ln 2 (m + log2 l)           m is an exponent of 2
//
// Who: a workgroup owns ROWS rows of one head. Each of its subgroups has ROW_MATRICES · M of these rows. To rescale O, O too has to cross
//   workgroup memory, so that is done only where a maximum grew much. Then p of a row's largest score is not 1, and f16 rounds it by half a step at most; l
//   sums p before it is rounded. Loops over matrices are written out (src/specialize.rs): arrays of
//   matrices are registers only where indices are constants.
// Pipelining: the step of a tile multiplies Q with the next tile of K, and loads the tile of K after it and the next tile of V.
// Needs q, k, v. Gives out and, with LSE, lse.
enable f16;
enable wgpu_cooperative_matrix;
#include "attention/attention.wgsl"
#include "matrix/matrices.wgsl"
#include "memory/elements_f16.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
// Elements by themselves: lanes that have parts of a vector must not write to the same one.
@group(0) @binding(4) var<storage, read_write> out: array<f16>;
#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
const SUM_BLOCKS = SUBGROUPS * ROW_MATRICES;
const HALF_BLOCKS = SUM_BLOCKS;
#include "matrix/exchange.wgsl" columns=KEYS
#include "matrix/scores.wgsl" queries=row keys=column together=KEYS
#include "memory/read_f16.wgsl" tensor=key
#include "memory/read_f16.wgsl" tensor=value

const ROWS = SUBGROUPS * ROW_MATRICES * M;
#include "matrix/coop_tiles.wgsl" first=key second=value rows=KEYS
// A tile of K, and one of V.
const TILES = D_SIZE + V_SIZE;
var<workgroup> tiles: array<Halves, TILES>;
// The last step in which a maximum grew by more than GROWTH. Four, since the next variable has to be aligned to 16 bytes.
var<workgroup> grown: array<atomic<i32>, 4>;

// A lane's elements of a matrix of Q, whose row starts at element `start` and whose columns at `column`: 0 past the
// head dimension, so that they add nothing, whatever K has there.
fn query_elements(start: u32, column: u32, lane: u32) -> Lane {
    var x: Lane;
    for (var e = 0u; e < ELEMENTS; e++) {
        let d = column + column_of(lane, e);
        let place = start + min(d, HEAD_DIM - 1u);
#if ALIGNED
        let y = query[place / 4u][place % 4u];
#else
        let y = query[place];
#endif
        x[e] = select(0.0, f32(y), d < HEAD_DIM);
    }
    return x;
}

// The same of O.
fn write_elements(start: u32, column: u32, lane: u32, x: Lane) {
    for (var e = 0u; e < ELEMENTS; e++) {
        let d = column + column_of(lane, e);
        if d < HEAD_DIM_V {
            out[start + d] = half_of(x[e]);
        }
    }
}

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
    // The first block of this subgroup, and a lane's row in it. The lane's rows in later blocks are M apart.
    let own_block = subgroup * ROW_MATRICES;
    let lane_row = row0 + own_block * M + row_of(lane, 0u);
    // Held scores times this are exponents of 2.
    let factor = max(score_factor(), SMALLEST_FACTOR);
    // masked_score · factor = -1e15 is far below EMPTY.
    let masked_score = -1.0e15 / factor;

    var q: array<array<Left, ACROSS_DIM>, ROW_MATRICES>;
#unroll
    for (var d = 0u; d < ACROSS_DIM; d++) {
        for (var r = 0u; r < ROW_MATRICES; r++) {
            let row = query_row(at, min(lane_row + r * M, last_query(at)));
            put_elements(query_elements(row, d * M, lane), own_block + r, 0u, lane);
        }
        workgroupBarrier();
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
            q[r][d] = get_left(own_block + r, 0u);
        }
        workgroupBarrier();
    }
    if thread == 0u {
        atomicStore(&grown[0], -2);
    }

    var o: array<array<Accumulator, ACROSS_DIM_V>, ROW_MATRICES>;
    var m: array<f32, ROW_MATRICES>;
    var l: array<f32, ROW_MATRICES>;
#unroll
    for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
        for (var d = 0u; d < ACROSS_DIM_V; d++) {
            o[r][d] = Accumulator();
        }
        // S of the step before the first tile
#unroll
        for (var c = 0u; c < ACROSS_KEYS; c++) {
            put_accumulator(Accumulator(), own_block + r, c);
        }
        m[r] = EMPTY;
        l[r] = 0.0;
    }

    let visited = key_tiles(at, i32(row0), i32(row1), KEYS);
    let last = last_key(at);
    var key_next: array<Eight, D_LOADS>;
    var value_next: array<Eight, V_LOADS>;
    // Step -1 belongs to no tile: it only computes S of the first tile.
    var n = visited.count;
    if visited.count > 0 {
        n = -1;
        store_key(load_key(at, u32(tile(visited, 0)), last, thread), 0u, thread);
        key_next = load_key(at, u32(tile(visited, 1)), last, thread);
        value_next = load_value(at, u32(tile(visited, 0)), last, thread);
    }
    workgroupBarrier();
    for (; n < visited.count; n++) {
        // In step -1 the keys are past the end, so none counts.
        let j0 = select(tile(visited, n), at.keys, n < 0);
        var x = array<array<Lane, ACROSS_KEYS>, ROW_MATRICES>();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                x[r][c] = get_elements(own_block + r, c, lane);
            }
        }

        // What each score is, and whether it counts
#if SHAPED
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                let i = i32(row0 + (own_block + r) * M);
                let j = j0 + i32(c * M);
                x[r][c] = shaped(x[r][c], added_lane(at, i, j, 0u, lane), at, i, j, lane).score;
            }
        }
#endif
        if n < 0 || n >= visited.full {
            for (var r = 0u; r < ROW_MATRICES; r++) {
                for (var c = 0u; c < ACROSS_KEYS; c++) {
                    let i = i32(row0 + (own_block + r) * M);
                    x[r][c] = masked(x[r][c], at, i, j0 + i32(c * M), lane, masked_score);
                }
            }
        }

        // S of the next tile = Q K^T
        var s = array<array<Accumulator, ACROSS_KEYS>, ROW_MATRICES>();
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                s[r][c] = Accumulator();
            }
        }
#unroll
        for (var d = 0u; d < ACROSS_DIM; d++) {
#unroll
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                let place = c * M * D_STRIDE + d * M / WIDTH;
                let k = coopLoad<Right>(&tiles[place], D_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    s[r][c] = coopMultiplyAdd(q[r][d], k, s[r][c]);
                }
            }
        }

        // m', l = 2^(m - m') l, and what O is to be multiplied by
        var shrink = array<f32, ROW_MATRICES>();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            var tile_max = masked_score;
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    tile_max = max(tile_max, x[r][c][e]);
                }
            }
            let new_max = above(row_max(tile_max) * factor);
            let grows = new_max - m[r] > GROWTH;
            if grows {
                atomicStore(&grown[0], n);
            }
            shrink[r] = select(1.0, exp2(m[r] - new_max), grows);
            m[r] = select(m[r], new_max, grows);
            l[r] *= shrink[r];
        }

        // P = 2^(S - m'),  l = l + rowsum P
        for (var r = 0u; r < ROW_MATRICES; r++) {
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[r][c][e] = exp2(fma(x[r][c][e], factor, -m[r]));
                    l[r] += x[r][c][e];
                }
#if DROPOUT
                let i = i32(row0 + (own_block + r) * M);
                x[r][c] = what_is_kept(x[r][c], kept_lane(at, i, j0 + i32(c * M), c, lane));
#endif
                put_elements(x[r][c], own_block + r, c, lane);
            }
        }
        store_value(value_next, 0u, thread);
        workgroupBarrier();

        // O = 2^(m - m') O, in all subgroups or in none, since all meet at the barriers. It is a loop of no or one
        // trip, since naga takes the condition for one that may differ between threads.
        for (var once = u32(atomicLoad(&grown[0]) == n); once > 0u; once--) {
#unroll
            for (var d = 0u; d < ACROSS_DIM_V; d++) {
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    put_accumulator(o[r][d], own_block + r, 0u);
                }
                workgroupBarrier();
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    scale_elements(shrink[r], own_block + r, lane);
                }
                workgroupBarrier();
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    o[r][d] = get_accumulator(own_block + r);
                }
                workgroupBarrier();
            }
        }

        // O = O + P V
#unroll
        for (var c = 0u; c < ACROSS_KEYS; c++) {
            var p = array<Left, ROW_MATRICES>();
#unroll
            for (var r = 0u; r < ROW_MATRICES; r++) {
                p[r] = get_left(own_block + r, c);
            }
#unroll
            for (var d = 0u; d < ACROSS_DIM_V; d++) {
                let place = D_SIZE + c * M * V_STRIDE + d * M / WIDTH;
                let v = coopLoadT<Right>(&tiles[place], V_STRIDE);
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
                    o[r][d] = coopMultiplyAdd(p[r], v, o[r][d]);
                }
            }
        }

        // S of the next tile, and K of the tile after it. A compiler may move loads down to their use, but not into
        // the next trip.
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
            for (var c = 0u; c < ACROSS_KEYS; c++) {
                put_accumulator(s[r][c], own_block + r, c);
            }
        }
        store_key(key_next, 0u, thread);
        key_next = load_key(at, u32(tile(visited, n + 3)), last, thread);
        value_next = load_value(at, u32(tile(visited, n + 1)), last, thread);
        workgroupBarrier();
    }

    // O / l
    var ends: array<Row, ROW_MATRICES>;
    for (var r = 0u; r < ROW_MATRICES; r++) {
        ends[r] = finish_row(at, m[r] / LOG2_E, row_sum(l[r]), m[r] == EMPTY);
    }
#unroll
    for (var d = 0u; d < ACROSS_DIM_V; d++) {
#unroll
        for (var r = 0u; r < ROW_MATRICES; r++) {
            put_accumulator(o[r][d], own_block + r, 0u);
        }
        workgroupBarrier();
        for (var r = 0u; r < ROW_MATRICES; r++) {
            let i = lane_row + r * M;
            var y = get_elements(own_block + r, 0u, lane);
            if i < row1 {
                for (var e = 0u; e < ELEMENTS; e++) {
                    y[e] *= ends[r].inverse;
                }
                write_elements(out_row(at, i), d * M, lane, y);
            }
        }
        workgroupBarrier();
    }
#if LSE
    for (var r = 0u; r < ROW_MATRICES; r++) {
        let i = lane_row + r * M;
        if column_of(lane, 0u) == 0u && i < row1 {
            lse[lse_row(at, i)] = ends[r].lse;
        }
    }
#endif
}
