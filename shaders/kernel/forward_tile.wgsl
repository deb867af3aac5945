// What: forward pass in tiles with an online softmax (FlashAttention-2, Dao 2023, algorithm 1). Scores never leave the chip.
//
//     m = -inf, l = 0, O = 0
//     for each tile of KEYS keys that some row may see:
//         S = score(Q K^T)                          ROWS x KEYS; held as q·k itself, or with SHAPED as the score
//         m' = max(m, rowmax S)
//         P = exp(S - m')                           ROWS x KEYS; computed as exp2((s - m') · factor)
//         l = exp(m - m') l + rowsum P
//         O = exp(m - m') O + P V                   ROWS x HEAD_DIM_V; with DROPOUT only what is kept of P; with TILE_SUMS, P V is summed apart first
//         with FOLDS, after each FOLD_TILES tiles but the last:  out = shrunk out + O,  O = 0
//     out = O / l (with FOLDS the shrunk out is added to O first),  lse = m + ln l
//
// Who: a workgroup owns ROWS rows of one head. Thread (ty, tx) of the grid has rows 4(ty + THREADS_Y r) .. + 4: in registers their
//   scores with keys tx + THREADS_X c, and columns 4(tx + THREADS_X u) .. + 4 of O. Both products are sums of outer products of two
//   vectors of four. Workgroup memory holds f32: CHUNK columns of Q and of K, or VALUE_KEYS columns of P and as many rows of V.
// Pipelining: while one product runs, the next chunk of Q and K (or of V) is loaded into registers. The next barrier stores it. V that is
//   not packed is loaded during the softmax. A tile ends by storing the next tile's first chunk. KEPT chunks of Q stay in registers.
// Needs q, k, v. Gives out and, with LSE, lse.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"
#include "tile/threads.wgsl"
#include "tile/columns.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
@group(0) @binding(4) var<storage, read_write> out: OutElements;
#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value
#include "memory/write.wgsl" tensor=out
#if FOLDS
#include "memory/read.wgsl" tensor=out
#endif

const THREADS = THREADS_X * THREADS_Y;
// What one thread holds: scores of TR vectors of four rows by TC keys, in PIECES vectors of four; 4 TR rows by TV vectors of output.
const TR = ROWS / (4u * THREADS_Y);
const TC = 4u * PIECES;
const TV = (HEAD_DIM_V + 4u * THREADS_X - 1u) / (4u * THREADS_X);
// Lengths in vectors: of a column of Q and of K, from one column of P to the next, which four threads that store to
// neighbouring columns must find in other banks, and of a row of V.
const ROWS4 = ROWS / 4u;
const KEYS4 = KEYS / 4u;
const P_STRIDE = (ROWS4 + 5u) / 8u * 8u + 2u;
const V_STRIDE = TV * THREADS_X;
// Whether threads have only columns of output that there are.
const WHOLE_OUT = 4u * V_STRIDE == HEAD_DIM_V;
// Q, and P in its place once S is there; then K, and V behind P.
const K_AT = CHUNK * ROWS4 + GAPS;
const V_AT = VALUE_KEYS * P_STRIDE;
// Partial maxima (or sums) of each thread for each of its vectors of four rows, to be reduced over a row of threads. They lie behind K;
// V is not stored there yet.
const PARTIAL_AT = max(V_AT, K_AT + CHUNK * KEYS4 + GAPS);
var<workgroup> tiles: array<vec4f, max(PARTIAL_AT + THREADS_X * ROWS4, V_AT + VALUE_KEYS * V_STRIDE)>;
// Each row has its maximum m here, and exp(m - m'), by which its sums shrink.
var<workgroup> maxima: array<f32, ROWS>;
var<workgroup> shrinks: array<f32, ROWS>;

// Scores lie as vectors of four rows of a key.
#include "tile/scores.wgsl" vectors=TR count4=ROWS4 others=PIECES other_count4=KEYS4 at=K_AT
#if DROPOUT
#include "tile/dropout.wgsl" rows=ROWS keys=KEYS
#endif
#include "tile/outer.wgsl" result=output vectors=TR columns=TV stride=P_STRIDE lines=VALUE_KEYS from=0u at=V_AT

// How much each thread loads to registers before it stores it in workgroup memory: of a chunk of Q and of K vectors of four columns, each
// of four rows; of V the vectors of its own columns of output, of every THREADS_Y-th row. Addresses of rows are in units of UNIT elements.
// KEPT chunks of Q are in registers: all CHUNKS, or the next one only.
const QUERY_LOADS = (ROWS4 * CHUNK4 + THREADS - 1u) / THREADS;
const KEY_LOADS = (KEYS4 * CHUNK4 + THREADS - 1u) / THREADS;
const VALUE_LOADS = (VALUE_KEYS + THREADS_Y - 1u) / THREADS_Y;
// Whether chunks have only columns that Q and K have.
const WHOLE_CHUNKS = HEAD_DIM % CHUNK == 0u;
alias Queries = array<array<Elements4, 4>, QUERY_LOADS>;
alias Keys = array<array<Elements4, 4>, KEY_LOADS>;
alias KeyRows = array<array<u32, 4>, KEY_LOADS>;
alias Values = array<array<Elements4, TV>, VALUE_LOADS>;

fn load_query(at: Sequence, row0: u32, d0: u32, thread: u32) -> Queries {
    var x: Queries;
    for (var n = 0u; n < QUERY_LOADS; n++) {
        let t = thread + n * THREADS;
        // A thread without a vector loads none. Where all threads have one there is no branch.
        if QUERY_LOADS * THREADS == ROWS4 * CHUNK4 || t < ROWS4 * CHUNK4 {
            for (var r = 0u; r < 4u; r++) {
                let row = query_row(at, min(row0 + 4u * (t / CHUNK4) + r, last_query(at))) / UNIT;
                x[n][r] = read_vector_query(row, d0 / 4u + t % CHUNK4, HEAD_DIM, WHOLE_CHUNKS);
            }
        }
    }
    return x;
}

// Columns past the head dimension are 0 here, so that they add nothing to a score, whatever K has there.
fn store_query(x: Queries, d0: u32, thread: u32) {
    for (var n = 0u; n < QUERY_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < ROWS4 * CHUNK4 {
            var q = array<vec4f, 4>();
            for (var r = 0u; r < 4u; r++) {
                q[r] = unpack4(x[n][r]);
                if HEAD_DIM % CHUNK > 0u {
                    let d = d0 + 4u * (t % CHUNK4);
                    q[r] = first_elements(q[r], max(d, HEAD_DIM) - d);
                }
            }
            store_columns(q, 0u, ROWS4, t);
        }
    }
}

// Where the rows of K begin that a thread loads, for all chunks of a tile. A piece is 4 THREADS_X keys, one vector for each thread of a
// row of the grid. A vector has four keys THREADS_X apart, so that the columns of P are in the order of the keys.
fn key_rows(at: Sequence, j0: u32, thread: u32) -> KeyRows {
    var rows: KeyRows;
    for (var n = 0u; n < KEY_LOADS; n++) {
        let vector = (thread + n * THREADS) / CHUNK4;
        // That is vector / THREADS_X * 4 THREADS_X + vector % THREADS_X.
        let first = j0 + (vector + vector / THREADS_X * 3u * THREADS_X);
        for (var r = 0u; r < 4u; r++) {
            rows[n][r] = key_row(at, min(first + r * THREADS_X, last_key(at))) / UNIT;
        }
    }
    return rows;
}

fn load_key(rows: KeyRows, d0: u32, thread: u32) -> Keys {
    var x: Keys;
    for (var n = 0u; n < KEY_LOADS; n++) {
        for (var r = 0u; r < 4u; r++) {
            x[n][r] = read_vector_key(rows[n][r], d0 / 4u + (thread + n * THREADS) % CHUNK4, HEAD_DIM, WHOLE_CHUNKS);
        }
    }
    return x;
}

fn store_key(x: Keys, thread: u32) {
    for (var n = 0u; n < KEY_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < KEYS4 * CHUNK4 {
            var k = array<vec4f, 4>();
            for (var r = 0u; r < 4u; r++) {
                k[r] = unpack4(x[n][r]);
            }
            store_columns(k, K_AT, KEYS4, t);
        }
    }
}

// Bounded for every head dimension: without, f16 was slower at 128 on an H100, though f32 faster at 64.
fn load_value(at: Sequence, j0: u32, thread: u32) -> Values {
    var x: Values;
    for (var n = 0u; n < VALUE_LOADS; n++) {
        let row = value_row(at, min(j0 + thread / THREADS_X + n * THREADS_Y, last_key(at))) / UNIT;
        for (var u = 0u; u < TV; u++) {
            x[n][u] = read_vector_value(row, u * THREADS_X + thread % THREADS_X, HEAD_DIM_V, false);
        }
    }
    return x;
}

fn store_value(x: Values, thread: u32) {
    for (var n = 0u; n < VALUE_LOADS; n++) {
        let l = thread / THREADS_X + n * THREADS_Y;
        if VALUE_KEYS % THREADS_Y == 0u || l < VALUE_KEYS {
            for (var u = 0u; u < TV; u++) {
                tiles[V_AT + l * V_STRIDE + u * THREADS_X + thread % THREADS_X] = unpack4(x[n][u]);
            }
        }
    }
}

#if FOLDS
// A sum of sums loses less to rounding than one long sum. So after each FOLD_TILES tiles O is added to the O in memory, and begins at 0.
struct Folded {
    // The factor by which the O in memory of each row has to shrink.
    since: array<vec4f, TR>,
    // Whether memory has an O.
    any: bool,
}

fn with_folded(folded: Folded, start: u32, d: u32, r: u32, e: u32, o: vec4f) -> vec4f {
    // Columns past the end have no place of their own.
    if !WHOLE_OUT && d >= HEAD_DIM_V {
        return o;
    }
    return o + select(vec4f(), read_out(start, d, HEAD_DIM_V) * folded.since[r][e], folded.any);
}
#endif

@compute @workgroup_size(THREADS)
fn forward(
    @builtin(workgroup_id) workgroup_id: vec3u,
    @builtin(num_workgroups) workgroups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let group = in_order(workgroup_id, workgroups);
    let tx = thread_x(thread);
    let ty = thread_y(thread);
    let p_at = tx * P_STRIDE + ty;
    let at = sequence(group.z, group.y);
    // The last rows first: with a causal mask they take longest.
    let row0 = problem.row_begin + (workgroups.x - 1u - group.x) * ROWS;
    let row1 = min(row0 + ROWS, problem.row_end);

    // Never 0, so that the exponential of a masked score vanishes with a scale of 0 too.
    let factor = max(score_factor(), 1.0e-30);
    // MASKED and LOWEST of scores, of which differences times factor are finite.
    let masked = MASKED / max(factor, 1.0);
    let lowest = LOWEST / max(factor, 1.0);

    var o: array<array<vec4f, TV>, 4u * TR>;
    var l: array<vec4f, TR>;
#if FOLDS
    var folded: Folded;
#endif
    if thread < ROWS {
        maxima[thread] = lowest;
    }

    let visited = key_tiles(at, i32(row0), i32(row1), KEYS);
    // Loops over chunks are written out, since c must be a constant for Q to be in registers.
    var queries: array<Queries, KEPT>;
#unroll
    for (var c = 0u; c < KEPT; c++) {
        queries[c] = load_query(at, row0, c * CHUNK, thread);
    }
    var key_next: Keys;
    var value_next: Values;
    var rows: KeyRows;
    if visited.count > 0 {
        rows = key_rows(at, u32(tile(visited, 0)), thread);
        key_next = load_key(rows, 0u, thread);
#if PACKED
        value_next = load_value(at, u32(tile(visited, 0)), thread);
#endif
    }
    store_key(key_next, thread);
    store_query(queries[0], 0u, thread);
    workgroupBarrier();
    for (var n = 0; n < visited.count; n++) {
        let j0 = tile(visited, n);
        let j1 = u32(tile(visited, n + 1));
#if DROPOUT
        find_kept(at, row0, u32(j0), thread);
#endif
        // S = Q K^T
        var s = Scores();
        for (var d0 = 0u; d0 < HEAD_DIM; d0 += CHUNK) {
            // The next chunk: of this tile, or the first of the next tile.
            let more = d0 + CHUNK < HEAD_DIM;
            let d1 = select(0u, d0 + CHUNK, more);
            if !more {
                rows = key_rows(at, j1, thread);
            }
            key_next = load_key(rows, d1, thread);
            if KEPT < CHUNKS {
                queries[0] = load_query(at, row0, d1, thread);
            }
            add_scores(&s, ty, tx);
            if more {
                workgroupBarrier();
                store_key(key_next, thread);
                // Chunk d1: one of the kept chunks, or the only one.
#unroll
                for (var c = 0u; c < KEPT; c++) {
                    if KEPT < CHUNKS || d1 == c * CHUNK {
                        store_query(queries[c], d1, thread);
                    }
                }
                workgroupBarrier();
            }
        }

#if !PACKED
        value_next = load_value(at, u32(j0), thread);
#endif

        // What each score is, and whether it counts
#if SHAPED
        for (var c = 0u; c < TC; c++) {
            let j = j0 + i32(c * THREADS_X + tx);
            for (var r = 0u; r < TR; r++) {
                let i = i32(row0 + 4u * (r * THREADS_Y + ty));
                s[c][r] = scored_rows(s[c][r], at, i, j).score;
            }
        }
#endif
        if n >= visited.full {
            for (var c = 0u; c < TC; c++) {
                let j = j0 + i32(c * THREADS_X + tx);
                for (var r = 0u; r < TR; r++) {
                    let i = i32(row0 + 4u * (r * THREADS_Y + ty));
                    s[c][r] = select(vec4f(masked), s[c][r], keep_rows(at, i, j));
                }
            }
        }

        // m' = max(m, rowmax S). One thread a row reduces: if all threads of a row did, each would read what all have.
        for (var r = 0u; r < TR; r++) {
            var tile_max = s[0][r];
            for (var c = 1u; c < TC; c++) {
                tile_max = max(tile_max, s[c][r]);
            }
            tiles[PARTIAL_AT + tx * ROWS4 + r * THREADS_Y + ty] = tile_max;
        }
        workgroupBarrier();
        if thread < ROWS {
            let m = maxima[thread];
            var new_max = m;
            for (var x = 0u; x < THREADS_X; x++) {
                new_max = max(new_max, tiles[PARTIAL_AT + x * ROWS4 + thread / 4u][thread % 4u]);
            }
            maxima[thread] = new_max;
            shrinks[thread] = exp2((m - new_max) * factor);
        }
        workgroupBarrier();

        // P = exp(S - m'),  l = exp(m - m') l + rowsum P
        var shrink = array<vec4f, TR>();
        for (var r = 0u; r < TR; r++) {
            var new_max = vec4f();
            for (var e = 0u; e < 4u; e++) {
                new_max[e] = maxima[4u * (r * THREADS_Y + ty) + e];
                shrink[r][e] = shrinks[4u * (r * THREADS_Y + ty) + e];
            }
            var sum = vec4f();
            for (var c = 0u; c < TC; c++) {
                s[c][r] = exp2((s[c][r] - new_max) * factor);
                sum += s[c][r];
#if DROPOUT
                let i = vec4u(row0 + 4u * (r * THREADS_Y + ty)) + vec4u(0u, 1u, 2u, 3u);
                s[c][r] = select(vec4f(), s[c][r], kept4_of(row0, u32(j0), i, vec4u(u32(j0) + c * THREADS_X + tx)));
#endif
            }
            l[r] = fma(l[r], shrink[r], sum);
        }

        // O = exp(m - m') O + P V
        for (var r = 0u; r < 4u * TR; r++) {
            for (var u = 0u; u < TV; u++) {
                o[r][u] *= shrink[r / 4u][r % 4u];
            }
        }
#if FOLDS
        for (var r = 0u; r < TR; r++) {
            folded.since[r] *= shrink[r];
        }
#endif
#if TILE_SUMS
        // One f32 sum over n keys rounds every time in the same direction where values are alike, which is a relative error of
        // about 8e-9 n. So a tile has a sum of its own.
        var of_tile = array<array<vec4f, TV>, 4u * TR>();
#endif
        for (var v0 = 0u; v0 < KEYS; v0 += VALUE_KEYS) {
            store_value(value_next, thread);
            // Written out, since c must be a constant for S to be in registers.
#unroll
            for (var c = 0u; c < PIECES; c++) {
                for (var e = 0u; e < 4u; e++) {
                    // The key of the first thread of a row of the grid.
                    let j = (4u * c + e) * THREADS_X;
                    if j / VALUE_KEYS * VALUE_KEYS == v0 {
                        for (var r = 0u; r < TR; r++) {
                            tiles[p_at + (j % VALUE_KEYS * P_STRIDE + r * THREADS_Y)] = s[4u * c + e][r];
                        }
                    }
                }
            }
            workgroupBarrier();
#if PACKED
            // After the tile's last rows of V come the first rows of the next tile. Packed rows are few enough registers to be held during S.
            value_next = load_value(at, select(j1, u32(j0) + v0 + VALUE_KEYS, v0 + VALUE_KEYS < KEYS), thread);
#else
            if v0 + VALUE_KEYS < KEYS {
                value_next = load_value(at, u32(j0) + v0 + VALUE_KEYS, thread);
            }
#endif
#if TILE_SUMS
            add_to_output(&of_tile, 0u, ty, tx);
#else
            add_to_output(&o, 0u, ty, tx);
#endif
            workgroupBarrier();
        }
#if TILE_SUMS
        for (var r = 0u; r < 4u * TR; r++) {
            for (var u = 0u; u < TV; u++) {
                o[r][u] += of_tile[r][u];
            }
        }
#endif
#if FOLDS
        if u32(n + 1) % FOLD_TILES == 0u && n + 1 < visited.count {
            for (var r = 0u; r < 4u * TR; r++) {
                let i = row0 + 4u * (r / 4u * THREADS_Y + ty) + r % 4u;
                let start = out_row(at, i);
                for (var u = 0u; u < TV; u++) {
                    let d = 4u * (u * THREADS_X + tx);
                    // Rows from row1 on belong to another launch, or do not exist.
                    if i < row1 {
                        write_out(start, d, HEAD_DIM_V, with_folded(folded, start, d, r / 4u, r % 4u, o[r][u]));
                    }
                    o[r][u] = vec4f();
                }
            }
            for (var r = 0u; r < TR; r++) {
                folded.since[r] = vec4f(1.0);
            }
            folded.any = true;
        }
#endif
        store_key(key_next, thread);
        store_query(queries[0], 0u, thread);
        workgroupBarrier();
    }

    // l of a row is spread over its threads.
    for (var r = 0u; r < TR; r++) {
        tiles[PARTIAL_AT + tx * ROWS4 + r * THREADS_Y + ty] = l[r];
    }
    workgroupBarrier();
    for (var r = 0u; r < TR; r++) {
        let rows4 = r * THREADS_Y + ty;
        var sums = vec4f();
        for (var x = 0u; x < THREADS_X; x++) {
            sums += tiles[PARTIAL_AT + x * ROWS4 + rows4];
        }
        for (var e = 0u; e < 4u; e++) {
            let sum = sums[e];
            let i = row0 + 4u * rows4 + e;
            if i < row1 {
                // A row in which some key counts has a sum of at least 1, from its largest score.
                let row = finish_row(at, score_unit() * maxima[4u * rows4 + e], sum, sum < 0.5);
                let start = out_row(at, i);
                for (var u = 0u; u < TV; u++) {
                    let d = 4u * (u * THREADS_X + tx);
                    var x = o[4u * r + e][u];
#if FOLDS
                    x = with_folded(folded, start, d, r, e, x);
#endif
                    write_out(start, d, HEAD_DIM_V, x * row.inverse);
                }
#if LSE
                if tx == 0u {
                    lse[lse_row(at, i)] = row.lse;
                }
#endif
            }
        }
    }
}
