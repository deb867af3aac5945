// What: decoding, second half, and the public merge. Results over disjoint sets of keys become the result over their union.
//
//     m = max_s m_s,  l = sum_s exp(m_s - m) l_s,  o = sum_s exp(m_s - m) O_s / l,  lse = m + ln l
//
// Who: a workgroup takes ROWS rows. Thread (row, slice, column) sums four columns over every SLICES-th part. The slices then meet in
//   workgroup memory and are summed by the same formula.
// Pipelining: none.
// Needs O, m and l of each part. With MERGE the caller's parts are finished results: m_s is lse_s, l_s is 1, O_s is o_s. A part whose
//   weight is 0 adds nothing, whatever its o holds. Gives out and, with LSE, lse.
#include "attention/attention.wgsl"
#include "memory/elements.wgsl"

@group(0) @binding(4) var<storage, read_write> out: OutElements;
#if LSE
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
#endif
#include "memory/write.wgsl" tensor=out

const COLUMNS4 = (HEAD_DIM_V + 3u) / 4u;
const THREADS = ROWS * SLICES * COLUMNS4;

#if MERGE
// Parts of the caller's: [splits, rows, HEAD_DIM_V] and [splits, rows].
@group(0) @binding(9) var<storage, read> part_out: InElements;
@group(0) @binding(10) var<storage, read> part_lse: array<u32>;
#include "memory/read.wgsl" tensor=part_out

fn read_part(place: u32, column: u32) -> vec4f {
    return unpack4(read_part_out(place * HEAD_DIM_V, 4u * column, HEAD_DIM_V));
}

// -infinity is taken for MASKED: WGSL may assume that it does not occur.
fn read_stats(place: u32) -> vec2f {
    let bits = part_lse[place];
    return vec2f(bitcast<f32>(select(bits, bitcast<u32>(MASKED), bits == 0xff800000u)), 1.0);
}
#else
// Parts of decode_split.wgsl: O [splits, rows, COLUMNS4] and (m, l) [splits, rows].
@group(0) @binding(7) var<storage, read> part_out: array<vec4f>;
@group(0) @binding(8) var<storage, read> part_stats: array<vec2f>;

fn read_part(place: u32, column: u32) -> vec4f {
    return part_out[place * COLUMNS4 + column];
}

fn read_stats(place: u32) -> vec2f {
    return part_stats[place];
}
#endif

var<workgroup> slice_out: array<vec4f, THREADS>;
var<workgroup> slice_max: array<f32, ROWS * SLICES>;
var<workgroup> slice_sum: array<f32, ROWS * SLICES>;

@compute @workgroup_size(THREADS)
fn decode_combine(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let column = thread % COLUMNS4;
    let row_slice = thread / COLUMNS4;
    let row = (group.y * groups.x + group.x) * ROWS + row_slice / SLICES;
    let row_read = min(row, problem.split_rows - 1u);

    var m = LOWEST;
    for (var s = row_slice % SLICES; s < problem.splits; s += SLICES) {
        m = max(m, read_stats(s * problem.split_rows + row_read).x);
    }
    var l = 0.0;
    var o = vec4f();
    for (var s = row_slice % SLICES; s < problem.splits; s += SLICES) {
        let place = s * problem.split_rows + row_read;
        let stats = read_stats(place);
        let weight = exp_difference(stats.x, m);
        l = fma(weight, stats.y, l);
        o = fma(vec4f(weight), select(vec4f(), read_part(place, column), weight > 0.0), o);
    }
    slice_out[thread] = o;
    if column == 0u {
        slice_max[row_slice] = m;
        slice_sum[row_slice] = l;
    }
    workgroupBarrier();
    if row_slice % SLICES > 0u || row >= problem.split_rows {
        return;
    }

    for (var slice = 1u; slice < SLICES; slice++) {
        m = max(m, slice_max[row_slice + slice]);
    }
    l = 0.0;
    o = vec4f();
    for (var slice = 0u; slice < SLICES; slice++) {
        let weight = exp_difference(slice_max[row_slice + slice], m);
        l = fma(weight, slice_sum[row_slice + slice], l);
        o = fma(vec4f(weight), slice_out[thread + slice * COLUMNS4], o);
    }
    let queries = problem.row_end - problem.row_begin;
    let at = sequence(row / queries / problem.heads, row / queries % problem.heads);
    let i = problem.row_begin + row % queries;
    // A row in which some key counts has a sum of at least 1, from its largest score.
    let end = finish_row(at, m, l, l < 0.5);
    write_out(out_row(at, i), 4u * column, HEAD_DIM_V, o * end.inverse);
#if LSE
    if column == 0u {
        lse[lse_row(at, i)] = end.lse;
    }
#endif
}
