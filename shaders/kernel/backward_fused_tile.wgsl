// What: all gradients at once, in tiles and f32: five products instead of the seven of backward_dkdv_tile.wgsl and backward_dq_tile.wgsl.
//   A dispatch is a round of a tournament: each block of keys meets another block of rows, so no two workgroups add to one gradient, and
//   no atomics are needed. Round 0 has the diagonal. If keys j meet rows i in a round, keys i meet rows j in it. A causal mask
//   leaves one of the two meetings, so the workgroups of a round take equally long.
//
//     for each tile of OWN keys of the block, for each query head of the group, for each FOLD_ROWS rows of the block:
//         dK = 0, dV = 0
//         for each tile of STEP of these rows:
//             S = score(Q K^T),  P = exp(S - lse),  dP = dO V^T,  dS = P (dP - delta) score'
//             dV = dV + P^T dO,  dK = dK + dS^T Q,  dQ in memory += dS K
//         dK, dV in memory += dK, dV                or = in the first round, the first time
//
// Who: thread (ty, tx) of the grid has vectors of four: scores of keys ty, ty + THREADS_Y, ... with rows tx, tx + THREADS_X, ... ; columns
//   4(tx + THREADS_X u) .. + 4 of dK and dV of keys ty, ty + THREADS_Y, ... and of dQ of rows ty, ty + THREADS_Y, ... Workgroup memory holds
//   CHUNK columns of both operands of the scores; for the gradients P or dS, and LINES rows of the second operand.
// Pipelining: while one product runs, the next operands are loaded into registers. A tile ends by storing the next tile's first chunk.
// Needs q, k, v, dO, row_stats, problem.round; dQ cleared by backward_delta.wgsl. Gives dQ, dK, dV.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"
#include "tile/threads.wgsl"
#include "tile/columns.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
#include "memory/row_stats.wgsl" access=read
@group(0) @binding(11) var<storage, read> grad_out: InElements;
@group(0) @binding(13) var<storage, read_write> grad_query: OutElements;
@group(0) @binding(14) var<storage, read_write> grad_key: OutElements;
@group(0) @binding(15) var<storage, read_write> grad_value: OutElements;
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "memory/read.wgsl" tensor=grad_out
#include "memory/read.wgsl" tensor=grad_query
#include "memory/read.wgsl" tensor=grad_key
#include "memory/read.wgsl" tensor=grad_value
#include "memory/write.wgsl" tensor=grad_query
#include "memory/write.wgsl" tensor=grad_key
#include "memory/write.wgsl" tensor=grad_value

const THREADS = THREADS_X * THREADS_Y;
// A thread has DQ_PIECES vectors of four rows of dQ, KEY_PIECES vectors of four keys of dK, dV and the scores, and the scores of
// ROW_PIECES vectors of four rows.
const DQ_PIECES = STEP / (4u * THREADS_Y);
// Vectors of columns that a thread has of a gradient with the head dim of K, and of V.
const TK = (HEAD_DIM + 4u * THREADS_X - 1u) / (4u * THREADS_X);
const TV = (HEAD_DIM_V + 4u * THREADS_X - 1u) / (4u * THREADS_X);
// The rows of a piece of scores: four for each thread of a row of the grid. The keys of a piece: four for each thread of a column.
const ROW_PIECE = 4u * THREADS_X;
const KEY_PIECE = 4u * THREADS_Y;
const OWN4 = OWN / 4u;
const STEP4 = STEP / 4u;
// Operands come first in workgroup memory, a chunk or lines; then P or dS, a row being a line of vectors of keys, or KEY_PIECE
// keys of dS, a key being a line of vectors of rows. The lengths of lines, in vectors, keep threads that store side by side in
// different banks.
const STEP_AT = CHUNK * OWN4 + GAPS;
const P_AT = max(STEP_AT + CHUNK * STEP4 + GAPS, LINES * max(TK, TV) * THREADS_X);
const ROW_STRIDE = (OWN4 + 5u) / 8u * 8u + 2u;
const KEY_STRIDE = (STEP4 + 3u) / 8u * 8u + 4u;
var<workgroup> tiles: array<vec4f, P_AT + max(STEP * ROW_STRIDE, KEY_PIECE * KEY_STRIDE)>;

// Scores lie as vectors of four keys of a row.
#include "tile/scores.wgsl" vectors=KEY_PIECES count4=OWN4 others=ROW_PIECES other_count4=STEP4 at=STEP_AT
#include "tile/chunks.wgsl" scores=s own=key step=query
#include "tile/chunks.wgsl" scores=dp own=value step=grad_out
#include "tile/lines.wgsl" tensor=grad_out columns=TV lines=LINES at=0u
#include "tile/lines.wgsl" tensor=query columns=TK lines=LINES at=0u
#include "tile/lines.wgsl" tensor=key columns=TK lines=LINES at=0u
#if DROPOUT
#include "tile/dropout.wgsl" rows=STEP keys=OWN
#endif
#include "tile/outer.wgsl" result=dv vectors=KEY_PIECES columns=TV stride=ROW_STRIDE lines=LINES from=P_AT at=0u
#include "tile/outer.wgsl" result=dk vectors=KEY_PIECES columns=TK stride=ROW_STRIDE lines=LINES from=P_AT at=0u
#include "tile/outer.wgsl" result=dq vectors=DQ_PIECES columns=TK stride=KEY_STRIDE lines=LINES from=P_AT at=0u

// A chunk of both operands of scores: of each thread some vectors of four columns, each of four rows.
const CHUNK_LOADS = ((OWN4 + STEP4) * CHUNK4 + THREADS - 1u) / THREADS;
alias Chunks = array<array<vec4f, 4>, CHUNK_LOADS>;

fn store_chunks(x: Chunks, d0: u32, dim: u32, thread: u32) {
    for (var n = 0u; n < CHUNK_LOADS; n++) {
        let t = thread + n * THREADS;
        let d = d0 + 4u * (t % CHUNK4);
        var y = array<vec4f, 4>();
        for (var r = 0u; r < 4u; r++) {
            y[r] = first_elements(x[n][r], select(4u, max(d, dim) - d, dim % CHUNK > 0u));
        }
        if t < OWN4 * CHUNK4 {
            store_columns(y, 0u, OWN4, t);
        } else if t < (OWN4 + STEP4) * CHUNK4 {
            store_columns(y, STEP_AT, STEP4, t - OWN4 * CHUNK4);
        }
    }
}

const LINES_LOADS = (LINES * max(TK, TV) * THREADS_X + THREADS - 1u) / THREADS;
alias Lines = array<Elements4, LINES_LOADS>;

// dQ as it is in memory. Past the head dim this reads an element that another thread may be writing; it is not used.
alias OldQuery = array<array<vec4f, TK>, 4u * DQ_PIECES>;

fn load_old(at: Sequence, i0: u32, last_row: u32, ty: u32, tx: u32) -> OldQuery {
    var x: OldQuery;
    for (var c = 0u; c < 4u * DQ_PIECES; c++) {
        let i = min(i0 + c / 4u * KEY_PIECE + 4u * ty + c % 4u, last_row);
        for (var u = 0u; u < TK; u++) {
            x[c][u] = read_grad_query(grad_query_row(at, i), 4u * (u * THREADS_X + tx), HEAD_DIM);
        }
    }
    return x;
}

// The block of rows that block j of keys meets. There are n blocks of each; n is even, or 1. In round 0, j meets block j. Later i and j
// meet if (i + j) mod (n - 1) = problem.round - 1; the block that would meet itself meets block n - 1.
fn opponent(j: u32, n: u32) -> u32 {
    if problem.round == 0u {
        return j;
    }
    let t = problem.round - 1u;
    let last = n - 1u;
    if j == last {
        return select(t + last, t, t % 2u == 0u) / 2u;
    }
    let i = (t + last - j) % last;
    return select(i, last, i == j);
}

// The line of a thread's row of scores.
fn place_of_row(c: u32, tx: u32) -> u32 {
    return P_AT + (c / 4u * ROW_PIECE + c % 4u * THREADS_X + tx) * ROW_STRIDE;
}

@compute @workgroup_size(THREADS)
fn fused(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    // In this order, workgroups that run at the same time have blocks that take equally long.
    let group = ordered(workgroup_id, workgroups, TILES_LAST);
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    let block = group.x;
    // The first of the heads that share these keys.
    let of_group = sequence(group.z, group.y * problem.group);
    let row_blocks = (problem.seqlen_q + problem.block_rows - 1u) / problem.block_rows;
    // n as in FusedTile::rounds. Where there are fewer blocks of rows than of keys, some blocks of keys meet none.
    let blocks = (max(workgroups.x, row_blocks) + 1u) / 2u * 2u;
    let row0 = min(opponent(block, blocks), row_blocks) * problem.block_rows;
    let row1 = min(row0 + problem.block_rows, problem.seqlen_q);
    let key0 = block * problem.block_keys;
    let key1 = min(key0 + problem.block_keys, problem.seqlen_k);
    let last = last_key(of_group);
    let last_row = last_query(of_group);
#if ADD_AT_FIRST
    let add = true;
#else
    let add = problem.round > 0u;
#endif

    for (var j0 = key0; j0 < key1; j0 += OWN) {
        let range = row_interval(of_group, i32(j0), i32(j0 + OWN));
        let first = max(u32(range.x) / STEP * STEP, row0);
        let end = min(u32(max(range.y, 0)), row1);
        if first >= end && add {
            continue;
        }
        // Without rows that see a key, zeros are written.
        let heads = select(1u, problem.group, first < end);
        for (var head = of_group.head; head < of_group.head + heads; head++) {
            let at = with_head(of_group, head);
            // Each FOLD_ROWS rows have sums of their own, for one sum over all rows would round every time in the same direction
            // where gradients are alike.
            for (var fold0 = first; fold0 < max(end, first + 1u); fold0 += FOLD_ROWS) {
                var dk = array<array<vec4f, TK>, 4u * KEY_PIECES>();
                var dv = array<array<vec4f, TV>, 4u * KEY_PIECES>();
                // The next operands of workgroup memory: they are loaded while a product runs.
                var next = load_chunks_s(at, j0, last, fold0, last_row, 0u, HEAD_DIM, thread);
                store_chunks(next, 0u, HEAD_DIM, thread);
                workgroupBarrier();
                var lines_next = Lines();
                for (var i0 = fold0; i0 < min(fold0 + FOLD_ROWS, end); i0 += STEP) {
                    // Each row of scores has its lse and delta. Rows that are not there have an lse above every score.
                    var stats = array<vec2f, 4u * ROW_PIECES>();
                    for (var c = 0u; c < 4u * ROW_PIECES; c++) {
                        let i = i0 + c / 4u * ROW_PIECE + 4u * tx + c % 4u;
                        stats[c] = row_stats(row_number(at, min(i, last_row)));
                        stats[c].x = select(stats[c].x, NO_KEYS, i > last_row);
                    }

#if DROPOUT
                    find_kept(at, i0, j0, thread);
#endif
                    // S = Q K^T
                    var s = Scores();
                    for (var d0 = 0u; d0 < HEAD_DIM; d0 += CHUNK) {
                        let d1 = d0 + CHUNK;
                        if d1 < HEAD_DIM {
                            next = load_chunks_s(at, j0, last, i0, last_row, d1, HEAD_DIM, thread);
                        } else {
                            next = load_chunks_dp(at, j0, last, i0, last_row, 0u, HEAD_DIM_V, thread);
                        }
                        add_scores(&s, ty, tx);
                        if d1 < HEAD_DIM {
                            workgroupBarrier();
                            store_chunks(next, d1, HEAD_DIM, thread);
                            workgroupBarrier();
                        }
                    }

#if DROPOUT
                    workgroupBarrier();
#endif
                    // P, 0 where a row does not see a key. It waits in workgroup memory, so that registers have S or dP, not both (but
                    // for what the derivative of a softcap needs).
                    let full = all_count(at, i32(i0), i32(i0 + STEP), i32(j0), i32(j0 + OWN));
                    for (var c = 0u; c < 4u * ROW_PIECES; c++) {
                        let i = i0 + c / 4u * ROW_PIECE + 4u * tx + c % 4u;
                        for (var r = 0u; r < KEY_PIECES; r++) {
                            let j = j0 + r * KEY_PIECE + 4u * ty;
                            let x = scored_keys(s[c][r], at, i32(i), i32(j));
#if SHAPED
                            s[c][r] = x.slope;
#endif
                            var p = exp2((x.score - stats[c].x) * LOG2_E);
                            if !full {
                                p = select(vec4f(), p, keep_keys(at, i32(i), i32(j)));
                            }
#if DROPOUT
                            // dV takes what is kept of P from workgroup memory, and dS all of P, times score', from registers.
                            s[c][r] = p * x.slope;
                            p = select(vec4f(), p, kept4_of(i0, j0, vec4u(i), vec4u(j) + vec4u(0u, 1u, 2u, 3u)));
#endif
                            tiles[place_of_row(c, tx) + r * THREADS_Y + ty] = p;
                        }
                    }

                    // dP = dO V^T
                    var ds = Scores();
                    workgroupBarrier();
                    store_chunks(next, 0u, HEAD_DIM_V, thread);
                    workgroupBarrier();
                    for (var d0 = 0u; d0 < HEAD_DIM_V; d0 += CHUNK) {
                        let d1 = d0 + CHUNK;
                        if d1 < HEAD_DIM_V {
                            next = load_chunks_dp(at, j0, last, i0, last_row, d1, HEAD_DIM_V, thread);
                        } else {
                            lines_next = load_lines_grad_out(at, i0, last_row, THREADS_X, 0u, HEAD_DIM_V, thread);
                        }
                        add_scores(&ds, ty, tx);
                        if d1 < HEAD_DIM_V {
                            workgroupBarrier();
                            store_chunks(next, d1, HEAD_DIM_V, thread);
                            workgroupBarrier();
                        }
                    }

                    // dV = dV + P^T dO
                    for (var l = 0u; l < STEP; l += LINES) {
                        workgroupBarrier();
                        store_lines_grad_out(lines_next, thread);
                        workgroupBarrier();
                        let l1 = l + LINES;
                        if l1 < STEP {
                            lines_next = load_lines_grad_out(at, i0, last_row, THREADS_X, l1, HEAD_DIM_V, thread);
                        } else {
                            lines_next = load_lines_query(at, i0, last_row, THREADS_X, 0u, HEAD_DIM, thread);
                        }
                        add_to_dv(&dv, l, ty, tx);
                    }

                    // dS = P (dP - delta) score'. A thread reads the P that it wrote. dP of a key that does not count may be infinite.
                    for (var c = 0u; c < 4u * ROW_PIECES; c++) {
                        for (var r = 0u; r < KEY_PIECES; r++) {
#if DROPOUT
                            let i = vec4u(i0 + c / 4u * ROW_PIECE + 4u * tx + c % 4u);
                            let j = vec4u(j0 + r * KEY_PIECE + 4u * ty) + vec4u(0u, 1u, 2u, 3u);
                            let kept = kept4_of(i0, j0, i, j);
                            let dp = select(vec4f(), ds[c][r] * problem.dropout_scale, kept);
                            ds[c][r] = select(vec4f(), s[c][r] * (dp - stats[c].y), s[c][r] != vec4f());
#else
                            let p = tiles[place_of_row(c, tx) + r * THREADS_Y + ty];
                            ds[c][r] = select(vec4f(), p * (ds[c][r] - stats[c].y), p > vec4f());
#if SHAPED
                            ds[c][r] *= s[c][r];
#endif
#endif
                        }
                    }

                    // dK = dK + dS^T Q
                    workgroupBarrier();
                    for (var c = 0u; c < 4u * ROW_PIECES; c++) {
                        for (var r = 0u; r < KEY_PIECES; r++) {
                            tiles[place_of_row(c, tx) + r * THREADS_Y + ty] = ds[c][r];
                        }
                    }
                    for (var l = 0u; l < STEP; l += LINES) {
                        if l > 0u {
                            workgroupBarrier();
                        }
                        store_lines_query(lines_next, thread);
                        workgroupBarrier();
                        let l1 = l + LINES;
                        if l1 < STEP {
                            lines_next = load_lines_query(at, i0, last_row, THREADS_X, l1, HEAD_DIM, thread);
                        } else {
                            lines_next = load_lines_key(at, j0, last, THREADS_Y, 0u, HEAD_DIM, thread);
                        }
                        add_to_dk(&dk, l, ty, tx);
                    }

                    // dQ += dS K, in memory. A thread always has the same elements of it.
                    var dq = array<array<vec4f, TK>, 4u * DQ_PIECES>();
                    // Written out, since r must be a constant for dS to be in registers.
#unroll
                    for (var r = 0u; r < KEY_PIECES; r++) {
                        workgroupBarrier();
                        for (var e = 0u; e < 4u; e++) {
                            for (var c = 0u; c < ROW_PIECES; c++) {
                                let of_key = vec4f(ds[4u * c][r][e], ds[4u * c + 1u][r][e], ds[4u * c + 2u][r][e], ds[4u * c + 3u][r][e]);
                                tiles[P_AT + (e * THREADS_Y + ty) * KEY_STRIDE + c * THREADS_X + tx] = of_key;
                            }
                        }
                        for (var l = 0u; l < KEY_PIECE; l += LINES) {
                            if l > 0u {
                                workgroupBarrier();
                            }
                            store_lines_key(lines_next, thread);
                            workgroupBarrier();
                            let l1 = r * KEY_PIECE + l + LINES;
                            if l1 < OWN {
                                lines_next = load_lines_key(at, j0, last, THREADS_Y, l1, HEAD_DIM, thread);
                            } else {
                                next = load_chunks_s(at, j0, last, i0 + STEP, last_row, 0u, HEAD_DIM, thread);
                            }
                            add_to_dq(&dq, l, ty, tx);
                        }
                    }
                    // dQ is loaded while the next tile's first chunk is stored.
                    let old = load_old(at, i0, last_row, ty, tx);
                    workgroupBarrier();
                    store_chunks(next, 0u, HEAD_DIM, thread);
                    workgroupBarrier();
                    for (var c = 0u; c < 4u * DQ_PIECES; c++) {
                        let i = i0 + c / 4u * KEY_PIECE + 4u * ty + c % 4u;
                        if i <= last_row {
                            for (var u = 0u; u < TK; u++) {
                                let d = 4u * (u * THREADS_X + tx);
                                let x = fma(dq[c][u], vec4f(problem.scale), old[c][u]);
                                write_grad_query(grad_query_row(at, i), d, HEAD_DIM, x);
                            }
                        }
                    }
                }

                for (var c = 0u; c < 4u * KEY_PIECES; c++) {
                    for (var u = 0u; u < TK; u++) {
                        dk[c][u] *= problem.scale;
                    }
#if DROPOUT
                    for (var u = 0u; u < TV; u++) {
                        dv[c][u] *= problem.dropout_scale;
                    }
#endif
                }
                if add || head > of_group.head || fold0 > first {
                    // All loads before the first store, so that they overlap. What is past the last key or the head dim is not used.
                    for (var c = 0u; c < 4u * KEY_PIECES; c++) {
                        let j = min(j0 + c / 4u * KEY_PIECE + 4u * ty + c % 4u, problem.seqlen_k - 1u);
                        for (var u = 0u; u < TK; u++) {
                            dk[c][u] += read_grad_key(grad_key_row(at, j), 4u * (u * THREADS_X + tx), HEAD_DIM);
                        }
                        for (var u = 0u; u < TV; u++) {
                            dv[c][u] += read_grad_value(grad_value_row(at, j), 4u * (u * THREADS_X + tx), HEAD_DIM_V);
                        }
                    }
                }
                for (var c = 0u; c < 4u * KEY_PIECES; c++) {
                    let j = j0 + c / 4u * KEY_PIECE + 4u * ty + c % 4u;
                    if j < problem.seqlen_k {
                        for (var u = 0u; u < TK; u++) {
                            write_grad_key(grad_key_row(at, j), 4u * (u * THREADS_X + tx), HEAD_DIM, dk[c][u]);
                        }
                        for (var u = 0u; u < TV; u++) {
                            write_grad_value(grad_value_row(at, j), 4u * (u * THREADS_X + tx), HEAD_DIM_V, dv[c][u]);
                        }
                    }
                }
            }
        }
    }
}
