// Decoding, first half: few rows, many keys (FlashDecoding, Dao et al. 2023). The rows of a tile are the queries of all
// heads that share a key-value head, so that K and V are read once. Workgroup x takes the x-th share of the keys that
// some row may see and leaves O, m and l over these keys alone; decode_combine.wgsl merges the shares. Merging by lse = m + ln l
// would weigh them by a number that was rounded at the size of the scores.
//
//     m = -inf, l = 0, O = 0
//     for each tile of the share:
//         S = score(Q K^T)                          ROWS x KEYS
//         m' = max(m, rowmax S)
//         P = exp(S - m')                           ROWS x KEYS
//         l = exp(m - m') l + rowsum P
//         O = exp(m - m') O + P V                   ROWS x HEAD_DIM_V
//     m, l and O of this share; m is LOWEST, l and O are 0 if nothing in it counts
//
// A vec4f holds one number of each of four rows. Loads of K and V cover a tile at once and need no barrier:
// - S: KEY_THREADS neighbours share THREAD_KEYS keys. Thread kx takes vectors kx, kx + KEY_THREADS, ... of each key, and
//   the neighbours' partial dot products are summed, for four rows at a time, by subgroup operations or through
//   workgroup memory.
// - softmax: one thread a key, its own.
// - O: thread (slice, column) keeps four columns of all rows, over every SLICES-th key of the tile. The slices are summed
//   once, after the last tile.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
// O: [splits, rows, COLUMNS], and (m, l): [splits, rows]
@group(0) @binding(7) var<storage, read_write> split_out: array<vec4f>;
@group(0) @binding(8) var<storage, read_write> split_stats: array<vec2f>;
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value

const KEY_GROUPS = THREADS / KEY_THREADS;
const KEYS = KEY_GROUPS * THREAD_KEYS;
const ROWS4 = ROWS / 4u;
// Vectors of a key that a thread takes.
const KEY_VECTORS = (HEAD_DIM + 4u * KEY_THREADS - 1u) / (4u * KEY_THREADS);
const COLUMNS = (HEAD_DIM_V + 3u) / 4u;
const SLICES = min(THREADS / COLUMNS, KEYS);
const SLICE_KEYS = (KEYS + SLICES - 1u) / SLICES;
// Q by element: element e of vector kx + c KEY_THREADS is at (4c + e) KEY_THREADS + kx, so that neighbours read neighbours.
const Q_STRIDE = 4u * KEY_VECTORS * KEY_THREADS;
// Keys that threads without a key of their own read as well: probability 0.
const P_STRIDE = (THREADS - 1u) / COLUMNS + SLICES * (SLICE_KEYS - 1u) + 1u;
const PARTIAL_STRIDE = KEYS + 1u;
// Maxima (at the end, sums) of all keys that are left after a first reduction. Every thread reduces these.
#if SHUFFLES
const PARTIALS = THREADS / LANES;
const DOTS = 0u;
#else
const PARTIALS = min(8u, THREADS);
const DOTS = KEY_THREADS * PARTIAL_STRIDE;
#endif

var<workgroup> q: array<vec4f, ROWS4 * Q_STRIDE>;
// S if there are no subgroup operations, then P; after the last tile, l of each key.
var<workgroup> p: array<vec4f, ROWS4 * P_STRIDE>;
// If there are no subgroup operations, dot products of each thread of a key; after the last tile, O of each thread.
var<workgroup> partial: array<vec4f, max(DOTS, 4u * THREADS)>;
var<workgroup> partial_of_keys: array<vec4f, ROWS4 * PARTIALS>;

// The rows of a tile: row r is query r % queries of head r / queries of the group. Rows past the last repeat it.
struct Rows {
    first: u32,
    count: u32,
    queries: u32,
}

fn row_of(rows: Rows, r: u32) -> u32 {
    return min(rows.first + r, rows.count - 1u);
}

// Its position, and the sequence of its head.
fn position(rows: Rows, r: u32) -> u32 {
    return problem.row_begin + row_of(rows, r) % rows.queries;
}

fn sequence_of(at: Sequence, rows: Rows, r: u32) -> Sequence {
    return with_head(at, at.head + row_of(rows, r) / rows.queries);
}

fn load_query(at: Sequence, rows: Rows, thread: u32) {
    for (var t = thread; t < ROWS4 * KEY_VECTORS * KEY_THREADS; t += THREADS) {
        let vector = t % (KEY_VECTORS * KEY_THREADS);
        let r4 = t / (KEY_VECTORS * KEY_THREADS);
        // Columns past the head dimension are 0, so that they add nothing to a score, whatever K has there.
        let inside = max(4u * vector, HEAD_DIM) - 4u * vector;
        var x = array<vec4f, 4>();
        for (var r = 0u; r < 4u; r++) {
            let row = query_row(sequence_of(at, rows, 4u * r4 + r), position(rows, 4u * r4 + r));
            x[r] = first_elements(unpack4(read_query(row, 4u * vector, HEAD_DIM)), inside);
        }
        let place = r4 * Q_STRIDE + vector / KEY_THREADS * 4u * KEY_THREADS + vector % KEY_THREADS;
        q[place] = vec4f(x[0].x, x[1].x, x[2].x, x[3].x);
        q[place + KEY_THREADS] = vec4f(x[0].y, x[1].y, x[2].y, x[3].y);
        q[place + 2u * KEY_THREADS] = vec4f(x[0].z, x[1].z, x[2].z, x[3].z);
        q[place + 3u * KEY_THREADS] = vec4f(x[0].w, x[1].w, x[2].w, x[3].w);
    }
}

// Key g + n KEY_GROUPS of the tile is the n-th of key group g.
fn load_key(at: Sequence, j0: u32, last: u32, thread: u32) -> array<array<Elements4, KEY_VECTORS>, THREAD_KEYS> {
    var x: array<array<Elements4, KEY_VECTORS>, THREAD_KEYS>;
    for (var n = 0u; n < THREAD_KEYS; n++) {
        let row = key_row(at, min(j0 + thread / KEY_THREADS + n * KEY_GROUPS, last));
        for (var c = 0u; c < KEY_VECTORS; c++) {
            x[n][c] = read_key(row, 4u * (thread % KEY_THREADS + c * KEY_THREADS), HEAD_DIM);
        }
    }
    return x;
}

fn load_value(at: Sequence, j0: u32, last: u32, thread: u32) -> array<Elements4, SLICE_KEYS> {
    var x: array<Elements4, SLICE_KEYS>;
    for (var n = 0u; n < SLICE_KEYS; n++) {
        let j = min(j0 + thread / COLUMNS + n * SLICES, last);
        x[n] = read_value(value_row(at, j), 4u * (thread % COLUMNS), HEAD_DIM_V);
    }
    return x;
}

// The thread's own key in a tile, and whether it has one.
struct OwnKey {
    number: u32,
    there: bool,
}

#if SHUFFLES
// LANES threads in a row are taken to be in one subgroup, in their order, as drivers number them (seen on NVIDIA and software
// Vulkan; WGSL does not say). KEY_THREADS divides LANES, so neighbours are.
fn own_key(thread: u32) -> OwnKey {
    let kx = thread % KEY_THREADS;
    return OwnKey(thread / KEY_THREADS + kx * KEY_GROUPS, kx < THREAD_KEYS);
}

// Sums over the neighbours what they have for four rows and the thread's own key.
fn sum_of_neighbours(dots: array<vec4f, THREAD_KEYS>, thread: u32) -> vec4f {
    var mine: vec4f;
    for (var n = 0u; n < THREAD_KEYS; n++) {
        var sum = dots[n];
        for (var k = 1u; k < KEY_THREADS; k *= 2u) {
            sum += subgroupShuffleXor(sum, k);
        }
        mine = select(mine, sum, thread % KEY_THREADS == n);
    }
    return mine;
}

// To partial_of_keys: the maxima of s, of four rows.
fn store_maxima(s: vec4f, own: OwnKey, r4: u32, thread: u32) {
    var most = s;
    for (var k = 1u; k < LANES; k *= 2u) {
        most = max(most, subgroupShuffleXor(most, k));
    }
    if thread % LANES == 0u {
        partial_of_keys[r4 * PARTIALS + thread / LANES] = most;
    }
}
#else
fn own_key(thread: u32) -> OwnKey {
    return OwnKey(thread, thread < KEYS);
}

fn sum_of_neighbours(dots: array<vec4f, THREAD_KEYS>, thread: u32) -> vec4f {
    for (var n = 0u; n < THREAD_KEYS; n++) {
        partial[thread % KEY_THREADS * PARTIAL_STRIDE + thread / KEY_THREADS + n * KEY_GROUPS] = dots[n];
    }
    workgroupBarrier();
    var sum: vec4f;
    if thread < KEYS {
        for (var kx = 0u; kx < KEY_THREADS; kx++) {
            sum += partial[kx * PARTIAL_STRIDE + thread];
        }
    }
    return sum;
}

fn store_maxima(s: vec4f, own: OwnKey, r4: u32, thread: u32) {
    if own.there {
        p[r4 * P_STRIDE + own.number] = s;
    }
    workgroupBarrier();
    if thread < PARTIALS {
        var most = vec4f(MASKED);
        for (var j = thread; j < KEYS; j += PARTIALS) {
            most = max(most, p[r4 * P_STRIDE + j]);
        }
        partial_of_keys[r4 * PARTIALS + thread] = most;
    }
}
#endif

@compute @workgroup_size(THREADS)
fn decode_split(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    // A launch has whole groups of heads, or some heads of one group.
    let heads = min(problem.group, problem.heads);
    let queries = problem.row_end - problem.row_begin;
    let tiles_of_rows = (heads * queries + ROWS - 1u) / ROWS;
    let head = group.y / tiles_of_rows * heads;
    let at = sequence(group.z, head);
    let rows = Rows(group.y % tiles_of_rows * ROWS, heads * queries, queries);

    // This share: whole tiles, as evenly as they go.
    let visited = key_tiles(at, i32(problem.row_begin), i32(problem.row_end), KEYS);
    let share = (visited.count + i32(groups.x) - 1) / i32(groups.x);
    let begin = i32(group.x) * share;
    let end = min(begin + share, visited.count);
    let last = last_key(at);

    let own = own_key(thread);
    load_query(at, rows, thread);
    for (var t = thread; t < ROWS4 * P_STRIDE; t += THREADS) {
        p[t] = vec4f();
    }
    var o: array<vec4f, ROWS>;
    var m: array<vec4f, ROWS4>;
    // Each thread sums over its own keys only.
    var l: array<vec4f, ROWS4>;
    for (var r4 = 0u; r4 < ROWS4; r4++) {
        m[r4] = vec4f(LOWEST);
        l[r4] = vec4f();
    }
    for (var r = 0u; r < ROWS; r++) {
        o[r] = vec4f();
    }
    workgroupBarrier();

    // K is loaded a tile ahead, so that there are loads under way while V is in use.
    var k: array<array<Elements4, KEY_VECTORS>, THREAD_KEYS>;
    if begin < end {
        k = load_key(at, u32(tile(visited, begin)), last, thread);
    }
    for (var t = begin; t < end; t++) {
        let j0 = tile(visited, t);
        let v = load_value(at, u32(j0), last, thread);

        // S = Q K^T, what each score is, and whether it counts
        var s = array<vec4f, ROWS4>();
        for (var r4 = 0u; r4 < ROWS4; r4++) {
            var dots = array<vec4f, THREAD_KEYS>();
            for (var c = 0u; c < KEY_VECTORS; c++) {
                let place = r4 * Q_STRIDE + c * 4u * KEY_THREADS + thread % KEY_THREADS;
                let q0 = q[place];
                let q1 = q[place + KEY_THREADS];
                let q2 = q[place + 2u * KEY_THREADS];
                let q3 = q[place + 3u * KEY_THREADS];
                for (var n = 0u; n < THREAD_KEYS; n++) {
                    let x = unpack4(k[n][c]);
                    dots[n] = fma(q3, vec4f(x.w), fma(q2, vec4f(x.z), fma(q1, vec4f(x.y), fma(q0, vec4f(x.x), dots[n]))));
                }
            }
            let dot = sum_of_neighbours(dots, thread);
            let j = j0 + i32(own.number);
            for (var r = 0u; r < 4u; r++) {
                let i = i32(position(rows, 4u * r4 + r));
                let of_row = sequence_of(at, rows, 4u * r4 + r);
                let counts = own.there && (t < visited.full || keep(of_row, i, j));
                s[r4][r] = select(MASKED, scored(dot[r], of_row, i, j).score, counts);
            }
            store_maxima(s[r4], own, r4, thread);
        }
        workgroupBarrier();

        if t + 1 < end {
            k = load_key(at, u32(tile(visited, t + 1)), last, thread);
        }

        // m' = max(m, rowmax S),  P = exp(S - m'),  l = exp(m - m') l + rowsum P,  O = exp(m - m') O
        for (var r4 = 0u; r4 < ROWS4; r4++) {
            var most = m[r4];
            for (var x = 0u; x < PARTIALS; x++) {
                most = max(most, partial_of_keys[r4 * PARTIALS + x]);
            }
            let shrink = exp2((m[r4] - most) * LOG2_E);
            m[r4] = most;
            if own.there {
                let x = exp2((s[r4] - most) * LOG2_E);
                p[r4 * P_STRIDE + own.number] = x;
                l[r4] = fma(l[r4], shrink, x);
            }
            o[4u * r4] *= shrink.x;
            o[4u * r4 + 1u] *= shrink.y;
            o[4u * r4 + 2u] *= shrink.z;
            o[4u * r4 + 3u] *= shrink.w;
        }
        workgroupBarrier();

        // O = O + P V
        for (var n = 0u; n < SLICE_KEYS; n++) {
            let x = unpack4(v[n]);
            for (var r4 = 0u; r4 < ROWS4; r4++) {
                let weight = p[r4 * P_STRIDE + thread / COLUMNS + n * SLICES];
                o[4u * r4] = fma(vec4f(weight.x), x, o[4u * r4]);
                o[4u * r4 + 1u] = fma(vec4f(weight.y), x, o[4u * r4 + 1u]);
                o[4u * r4 + 2u] = fma(vec4f(weight.z), x, o[4u * r4 + 2u]);
                o[4u * r4 + 3u] = fma(vec4f(weight.w), x, o[4u * r4 + 3u]);
            }
        }
    }

    // l is spread over the threads with a key.
    workgroupBarrier();
    if own.there {
        for (var r4 = 0u; r4 < ROWS4; r4++) {
            p[r4 * P_STRIDE + own.number] = l[r4];
        }
    }
    workgroupBarrier();
    for (var t = thread; t < ROWS4 * PARTIALS; t += THREADS) {
        var sum = vec4f();
        for (var j = t % PARTIALS; j < KEYS; j += PARTIALS) {
            sum += p[t / PARTIALS * P_STRIDE + j];
        }
        partial_of_keys[t] = sum;
    }

    // O is spread over the slices.
    for (var r4 = 0u; r4 < ROWS4; r4++) {
        workgroupBarrier();
        for (var r = 0u; r < 4u; r++) {
            partial[r * THREADS + thread] = o[4u * r4 + r];
        }
        workgroupBarrier();
        var sum = vec4f();
        for (var x = 0u; x < PARTIALS; x++) {
            sum += partial_of_keys[r4 * PARTIALS + x];
        }
        for (var t = thread; t < 4u * COLUMNS; t += THREADS) {
            let r = t / COLUMNS;
            let column = t % COLUMNS;
            var x = vec4f();
            for (var slice = 0u; slice < SLICES; slice++) {
                x += partial[r * THREADS + slice * COLUMNS + column];
            }
            let row = rows.first + 4u * r4 + r;
            if row < rows.count {
                let number = row_number(sequence_of(at, rows, 4u * r4 + r), position(rows, 4u * r4 + r));
                let place = group.x * problem.split_rows + number;
                split_out[place * COLUMNS + column] = x;
                if column == 0u {
                    split_stats[place] = vec2f(m[r4][r], sum[r]);
                }
            }
        }
    }
}
