// Which sequence a workgroup works on, how long it is, and where its rows lie.
// Needs: with LENGTHS_IN_ROWS, `rows` of memory/row_stats.wgsl. Gives: Sequence, sequence, with_head; last_query, last_key; query_row,
// key_row, value_row, out_row, grad_..._row; lse_row, row_number, range_number; in_order, ordered, TILES_LAST.

#include "attention/problem.wgsl"

#if SEQLENS_K
@group(0) @binding(6) var<storage, read> seqlens_k: array<i32>;
#endif
#if SEQLENS_Q
@group(0) @binding(17) var<storage, read> seqlens_q: array<i32>;
#endif

// All are numbers of the problem, whatever part of it the launch computes: batch entry, query head, key-value head, and how many
// queries and keys of the batch entry are valid.
struct Sequence {
    batch: u32,
    head: u32,
    head_kv: u32,
    queries: i32,
    keys: i32,
}

// The sequence of a batch entry and a query head of this launch, both counted from 0.
fn sequence(batch: u32, head: u32) -> Sequence {
    let of_problem = problem.head_begin + head;
    let lengths = lengths_of(problem.batch_begin + batch);
    return Sequence(problem.batch_begin + batch, of_problem, of_problem / problem.group, lengths.x, lengths.y);
}

// Another query head of the batch entry that reads the keys of this one.
fn with_head(at: Sequence, head: u32) -> Sequence {
    return Sequence(at.batch, head, at.head_kv, at.queries, at.keys);
}

// The numbers of valid queries and keys of a batch entry.
fn lengths_of(batch: u32) -> vec2i {
    var lengths = vec2i(i32(problem.seqlen_q), i32(problem.seqlen_k));
#if LENGTHS_IN_ROWS
    // Clamped, for without rows nothing has been written there.
    lengths = clamp(vec2i(rows[problem.lengths_at + batch]), vec2i(), lengths);
#endif
#if SEQLENS_Q
    lengths.x = clamp(seqlens_q[batch], 0, lengths.x);
#endif
#if SEQLENS_K
    lengths.y = clamp(seqlens_k[batch], 0, lengths.y);
#endif
    return lengths;
}

// The last of this launch's rows that is a query. Without any it is the first row, which then sees no key.
fn last_query(at: Sequence) -> u32 {
#if QUERY_LENGTHS
    return max(min(problem.row_end, u32(at.queries)), problem.row_begin + 1u) - 1u;
#else
    return problem.row_end - 1u;
#endif
}

// The last key that is valid. Without any it is key 0, which no row sees.
fn last_key(at: Sequence) -> u32 {
    return u32(max(at.keys, 1) - 1);
}

// Where rows begin: the element at which row i of the sequence's query head, or key-value head, begins in its binding.
fn query_row(at: Sequence, i: u32) -> u32 {
    return row_of_query(problem.query, at, i);
}

fn key_row(at: Sequence, j: u32) -> u32 {
    return row_of_key(problem.key, at, j);
}

fn value_row(at: Sequence, j: u32) -> u32 {
    return row_of_key(problem.value, at, j);
}

fn out_row(at: Sequence, i: u32) -> u32 {
    return row_of_query(problem.out, at, i);
}

fn grad_out_row(at: Sequence, i: u32) -> u32 {
    return row_of_query(problem.grad_out, at, i);
}

fn grad_query_row(at: Sequence, i: u32) -> u32 {
    return row_of_query(problem.grad_query, at, i);
}

fn grad_key_row(at: Sequence, j: u32) -> u32 {
    return row_of_key(problem.grad_key, at, j);
}

fn grad_value_row(at: Sequence, j: u32) -> u32 {
    return row_of_key(problem.grad_value, at, j);
}

// The one place that knows where the row of a query, or of a key, is in its tensor.
fn row_of_query(t: Tensor, at: Sequence, i: u32) -> u32 {
#if PROBE_ROWS
    return row_of_tensor(t, at.batch, at.head, probe_query(i));
#else
    return row_of_tensor(t, at.batch, at.head, i);
#endif
}

fn row_of_key(t: Tensor, at: Sequence, j: u32) -> u32 {
#if PROBE_ROWS
    return row_of_tensor(t, at.batch, at.head_kv, probe_key(j));
#else
    return row_of_tensor(t, at.batch, at.head_kv, j);
#endif
}

fn row_of_tensor(t: Tensor, batch: u32, head: u32, i: u32) -> u32 {
    return t.base + batch * t.batch + head * t.head + i * t.row;
}

// The number of row i in the caller's buffers of one number a row: lse, and the gradient of lse.
fn lse_row(at: Sequence, i: u32) -> u32 {
    return row_of_query(problem.lse, at, i);
}

// The number of row i among the rows that this launch computes: of what the workspace has of each row.
fn row_number(at: Sequence, i: u32) -> u32 {
    return row_of_query(problem.rows, at, i);
}

// The number of a head among the ranges of coop_ranges.wgsl.
fn range_number(at: Sequence) -> u32 {
    return problem.ranges_at + at.batch * problem.heads + at.head;
}

// In which order workgroups start, as bits of problem.order. Without any of them a kernel's tiles of one head follow one another, for they read
// the keys and values of that head.
// The first tiles of all heads start first. Under a causal mask they are the longest, and short ones fill the device at the end.
const TILES_LAST = 1u;
// Heads, or batch entries, that share a bias or a mask follow one another in each tile. The first of them reads it from memory, and the others from
// the cache.
const HEADS_ABREAST = 2u;
const BATCHES_ABREAST = 4u;

// The tile, head and batch entry of a workgroup.
fn in_order(group: vec3u, groups: vec3u) -> vec3u {
    return ordered(group, groups, problem.order);
}

fn ordered(group: vec3u, groups: vec3u, order: u32) -> vec3u {
    let n = (group.z * groups.y + group.y) * groups.x + group.x;
    let heads_abreast = (order & HEADS_ABREAST) != 0u;
    let batches_abreast = (order & BATCHES_ABREAST) != 0u;
    // How many workgroups follow one another in a tile, and how many times as many there are in it.
    let abreast = select(1u, groups.y, heads_abreast) * select(1u, groups.z, batches_abreast);
    let others = groups.y * groups.z / abreast;
    let m = n / abreast;
    let tiles_last = (order & TILES_LAST) != 0u;
    let tile = select(m % groups.x, m / others, tiles_last);
    let other = select(m / groups.x, m % others, tiles_last);
    if batches_abreast && !heads_abreast {
        return vec3u(tile, other, n % abreast);
    }
    let head = other * abreast + n % abreast;
    return vec3u(tile, head % groups.y, head / groups.y);
}
