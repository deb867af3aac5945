// The problem's run-time numbers; src/kernel/uniform.rs writes the same fields in the same order.

// Element (b, h, i, d) of a tensor is at base + b·batch + h·head + i·row + d of its binding.
struct Tensor {
    base: u32,
    batch: u32,
    head: u32,
    row: u32,
}

struct Problem {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    seqlen_q: u32,
    seqlen_k: u32,
    // This launch computes rows row_begin .. row_end of each of its heads; they are stored from row 0 of its bindings.
    row_begin: u32,
    row_end: u32,
    // This launch begins at this batch entry and query head of the whole problem.
    batch_begin: u32,
    head_begin: u32,
    // Query heads of this launch, and how many share a key-value head.
    heads: u32,
    group: u32,
    // Keys from diagonal - window_left to diagonal + window_right count, and those up to i + top_left.
    window_left: i32,
    window_right: i32,
    top_left: i32,
    scale: f32,
    softcap: f32,
    // Results over parts of the keys that decode_combine.wgsl merges, and rows of each.
    splits: u32,
    split_rows: u32,
    // Whether workgroups go by heads first: see in_order.
    heads_first: u32,
    // backward_fused_tile.wgsl reads the blocks' sizes, and which pairs of blocks a dispatch computes.
    block_keys: u32,
    block_rows: u32,
    round: u32,
    // Where lengths are in the buffer of row_stats.wgsl.
    lengths_at: u32,
}

@group(0) @binding(0) var<uniform> problem: Problem;
#if SEQLENS_K
@group(0) @binding(6) var<storage, read> seqlens_k: array<i32>;
#endif
#if SEQLENS_Q
@group(0) @binding(17) var<storage, read> seqlens_q: array<i32>;
#endif

// Which sequence a workgroup works on: its place in the bindings, and its numbers of valid queries and keys.
struct Sequence {
    batch: u32,
    head_q: u32,
    head_kv: u32,
    queries: i32,
    keys: i32,
}

fn sequence(batch: u32, head: u32) -> Sequence {
    let head_kv = (problem.head_begin + head) / problem.group - problem.head_begin / problem.group;
    let lengths = lengths_of(batch);
    return Sequence(batch, head, head_kv, lengths.x, lengths.y);
}

// The numbers of valid queries and keys of a batch entry. With LENGTHS_IN_ROWS needs `rows` of row_stats.wgsl.
fn lengths_of(batch: u32) -> vec2i {
    var lengths = vec2i(i32(problem.seqlen_q), i32(problem.seqlen_k));
#if LENGTHS_IN_ROWS
    // Clamped, for without rows nothing has been written there.
    lengths = clamp(vec2i(rows[problem.lengths_at + batch]), vec2i(), lengths);
#endif
#if SEQLENS_Q
    lengths.x = clamp(seqlens_q[problem.batch_begin + batch], 0, lengths.x);
#endif
#if SEQLENS_K
    lengths.y = clamp(seqlens_k[problem.batch_begin + batch], 0, lengths.y);
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

// First element of row 0 of a head.
fn head_start(t: Tensor, batch: u32, head: u32) -> u32 {
    return t.base + batch * t.batch + head * t.head;
}

// The tile, head and batch entry of a workgroup, numbered as they start. A kernel's tiles of one head follow one another,
// which read the same keys and values. But where a mask makes some tiles longer than others, the first tiles of all heads
// come first, the longest ones, and short ones fill the device at the end.
fn in_order(group: vec3u, groups: vec3u) -> vec3u {
    return select(group, by_heads(group, groups), problem.heads_first != 0u);
}

fn by_heads(group: vec3u, groups: vec3u) -> vec3u {
    let heads = groups.y * groups.z;
    let n = (group.z * groups.y + group.y) * groups.x + group.x;
    let head = n % heads;
    return vec3u(n / heads, head % groups.y, head / groups.y);
}
