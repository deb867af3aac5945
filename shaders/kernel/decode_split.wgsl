// What: decoding, first half: few rows, many keys (FlashDecoding, Dao et al. 2023). Workgroup x takes the x-th share of the keys that
//   some row may see; decode_combine.wgsl merges the shares.
//
//     m = LOWEST, l = 0, O = 0                      a share in which nothing counts leaves these
//     for each tile of the share:
//         S = score(Q K^T)                          ROWS x KEYS
//         m' = max(m, rowmax S)
//         P = exp(S - m')                           ROWS x KEYS
//         l = exp(m - m') l + rowsum P
//         O = exp(m - m') O + P V                   ROWS x HEAD_DIM_V
//
// Who: the rows of a tile are the queries of all heads of a group, so K and V are read once for each tile of rows. A vec4f has one number for
//   each of four rows. Loops over these vectors are written out: NVIDIA's driver keeps them otherwise, and then has the sums of O in memory.
// - S: KEY_THREADS neighbours share THREAD_KEYS keys. Thread kx takes vectors kx, kx + KEY_THREADS, ... of each key. Subgroup operations or
//   workgroup memory sum the neighbours' partial dot products. In the softmax each thread has one key, its own.
// - O: thread (slice, column) has four columns of all rows, and every SLICES-th key. The slices are summed after the last tile.
// Pipelining: K is loaded a tile ahead. Loads of K and V take a whole tile at once and need no barrier.
// Needs q, k, v. Gives O, m and l of each share. lse = m + ln l would be rounded at the size of the scores, too coarsely for a weight.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(1) var<storage, read> query: InElements;
@group(0) @binding(2) var<storage, read> key: InElements;
@group(0) @binding(3) var<storage, read> value: InElements;
// O: [splits, rows, COLUMNS4], and (m, l): [splits, rows]
@group(0) @binding(7) var<storage, read_write> split_out: array<vec4f>;
@group(0) @binding(8) var<storage, read_write> split_stats: array<vec2f>;
#include "memory/read.wgsl" tensor=query
#include "memory/read.wgsl" tensor=key
#include "memory/read.wgsl" tensor=value

const KEY_GROUPS = THREADS / KEY_THREADS;
const KEYS = KEY_GROUPS * THREAD_KEYS;
// Vectors of a key that a thread takes.
const KEY_VECTORS = (HEAD_DIM + 4u * KEY_THREADS - 1u) / (4u * KEY_THREADS);
const COLUMNS4 = (HEAD_DIM_V + 3u) / 4u;
const SLICES = min(THREADS / COLUMNS4, KEYS);
const SLICE_KEYS = (KEYS + SLICES - 1u) / SLICES;
// Q by element: element e of vector kx + c KEY_THREADS is at (4c + e) KEY_THREADS + kx, so that neighbours read neighbours.
const Q_STRIDE = 4u * KEY_VECTORS * KEY_THREADS;
// Room for all keys that threads read of P. Keys past the tile have probability 0.
const P_STRIDE = (THREADS - 1u) / COLUMNS4 + SLICES * (SLICE_KEYS - 1u) + 1u;
const PARTIAL_STRIDE = KEYS + 1u;
// A first reduction over keys leaves PARTIALS maxima (at the end, sums) of a row. Every thread reduces these itself.
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

// The number of row r among the rows of the launch.
fn launch_row(rows: Rows, r: u32) -> u32 {
    return min(rows.first + r, rows.count - 1u);
}

// The position of row r in its sequence, and the sequence of its head.
fn position(rows: Rows, r: u32) -> u32 {
    return problem.row_begin + launch_row(rows, r) % rows.queries;
}

fn sequence_of(at: Sequence, rows: Rows, r: u32) -> Sequence {
    return with_head(at, at.head + launch_row(rows, r) / rows.queries);
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
        let j = min(j0 + thread / COLUMNS4 + n * SLICES, last);
        x[n] = read_value(value_row(at, j), 4u * (thread % COLUMNS4), HEAD_DIM_V);
    }
    return x;
}

// The thread's own key in a tile, and whether it has one.
struct OwnKey {
    key: u32,
    there: bool,
}

#if SHUFFLES
// LANES threads in a row are taken to be in one subgroup, in their order, as drivers number them (seen on NVIDIA and software
// Vulkan; WGSL does not say). KEY_THREADS divides LANES, so neighbours are.
fn own_key(thread: u32) -> OwnKey {
    let kx = thread % KEY_THREADS;
    return OwnKey(thread / KEY_THREADS + kx * KEY_GROUPS, kx < THREAD_KEYS);
}

// For four rows and the thread's own key: the sum of the neighbours' partial dot products.
fn sum_of_neighbours(dots: array<vec4f, THREAD_KEYS>, thread: u32) -> vec4f {
    var own_sum: vec4f;
    for (var n = 0u; n < THREAD_KEYS; n++) {
        var sum = dots[n];
        for (var k = 1u; k < KEY_THREADS; k *= 2u) {
            sum += subgroupShuffleXor(sum, k);
        }
        own_sum = select(own_sum, sum, thread % KEY_THREADS == n);
    }
    return own_sum;
}

// Stores the maxima of s over keys, for four rows, in partial_of_keys.
fn store_maxima(s: vec4f, own: OwnKey, r4: u32, thread: u32) {
    var maximum = s;
    for (var k = 1u; k < LANES; k *= 2u) {
        maximum = max(maximum, subgroupShuffleXor(maximum, k));
    }
    if thread % LANES == 0u {
        partial_of_keys[r4 * PARTIALS + thread / LANES] = maximum;
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
        p[r4 * P_STRIDE + own.key] = s;
    }
    workgroupBarrier();
    if thread < PARTIALS {
        var maximum = vec4f(MASKED);
        for (var j = thread; j < KEYS; j += PARTIALS) {
            maximum = max(maximum, p[r4 * P_STRIDE + j]);
        }
        partial_of_keys[r4 * PARTIALS + thread] = maximum;
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

    // The tiles of this share. All shares have equally many; the last ones may have fewer, or none.
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
#unroll
    for (var r4 = 0u; r4 < ROWS4; r4++) {
        m[r4] = vec4f(LOWEST);
        l[r4] = vec4f();
    }
#unroll
    for (var r = 0u; r < ROWS; r++) {
        o[r] = vec4f();
    }
    workgroupBarrier();

    // K is loaded a tile ahead, so that loads are under way while V is used.
    var k: array<array<Elements4, KEY_VECTORS>, THREAD_KEYS>;
    if begin < end {
        k = load_key(at, u32(tile(visited, begin)), last, thread);
    }
    for (var t = begin; t < end; t++) {
        let j0 = tile(visited, t);
        let full = t < visited.full;
        let v = load_value(at, u32(j0), last, thread);

        // S = Q K^T, what each score is, and whether it counts
        var s = array<vec4f, ROWS4>();
#unroll
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
            let j = j0 + i32(own.key);
            for (var r = 0u; r < 4u; r++) {
                let i = i32(position(rows, 4u * r4 + r));
                let row_sequence = sequence_of(at, rows, 4u * r4 + r);
                let counts = own.there && (full || keep(row_sequence, i, j));
                s[r4][r] = select(MASKED, scored(dot[r], row_sequence, i, j).score, counts);
            }
            store_maxima(s[r4], own, r4, thread);
        }
        workgroupBarrier();

        if t + 1 < end {
            k = load_key(at, u32(tile(visited, t + 1)), last, thread);
        }

        // m' = max(m, rowmax S),  P = exp(S - m'),  l = exp(m - m') l + rowsum P,  O = exp(m - m') O
#unroll
        for (var r4 = 0u; r4 < ROWS4; r4++) {
            var new_max = m[r4];
            for (var x = 0u; x < PARTIALS; x++) {
                new_max = max(new_max, partial_of_keys[r4 * PARTIALS + x]);
            }
            let shrink = exp2((m[r4] - new_max) * LOG2_E);
            m[r4] = new_max;
            if own.there {
                let x = exp2((s[r4] - new_max) * LOG2_E);
                p[r4 * P_STRIDE + own.key] = x;
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
#unroll
            for (var r4 = 0u; r4 < ROWS4; r4++) {
                let weight = p[r4 * P_STRIDE + thread / COLUMNS4 + n * SLICES];
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
#unroll
        for (var r4 = 0u; r4 < ROWS4; r4++) {
            p[r4 * P_STRIDE + own.key] = l[r4];
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
#unroll
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
        for (var t = thread; t < 4u * COLUMNS4; t += THREADS) {
            let r = t / COLUMNS4;
            let column = t % COLUMNS4;
            var x = vec4f();
            for (var slice = 0u; slice < SLICES; slice++) {
                x += partial[r * THREADS + slice * COLUMNS4 + column];
            }
            let row = rows.first + 4u * r4 + r;
            if row < rows.count {
                // What decode_combine.wgsl counts: the rows of this launch, those of a head one after the other.
                let place = group.x * problem.split_rows + (group.z * problem.heads + head) * queries + row;
                split_out[place * COLUMNS4 + column] = x;
                if column == 0u {
                    split_stats[place] = vec2f(m[r4][r], sum[r]);
                }
            }
        }
    }
}
