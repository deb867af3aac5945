// The problem's run-time numbers; src/kernel/uniform.rs writes the same fields in the same order.
// Needs: nothing. Gives: Tensor, Blocks, row_words, list_words, Problem, problem.

// Element (batch, head, i, d) of a tensor is at base + batch · t.batch + head · t.head + i · t.row + d of its binding. batch, head and
// i are numbers of the problem, whatever part of it a launch computes: base may be below 0, and the sum wraps.
struct Tensor {
    base: u32,
    batch: u32,
    head: u32,
    row: u32,
}

// Lists of blocks (attention/blocks.wgsl). The list of batch entry b and head h is number b · batch + h · head.
struct Blocks {
    // Queries and keys of a block.
    queries: u32,
    keys: u32,
    batch: u32,
    head: u32,
    // Blocks down the queries, and across the keys.
    down: u32,
    across: u32,
    // Room for entries in each direction of a list.
    entries: u32,
    // Columns of the indices that lists are made from.
    columns: u32,
}

// Words of a row of kinds.
fn row_words(b: Blocks) -> u32 {
    return (b.across + 15u) / 16u;
}

// Words of a list: its kinds, then of rows and of columns where they begin, how many full blocks they have, and their entries.
fn list_words(b: Blocks) -> u32 {
    return b.down * row_words(b) + 2u * (b.down + b.across + 1u + b.entries);
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
    // The rows of this launch in the workspace, without gaps.
    rows: Tensor,
    blocks: Blocks,
    // Of scores: key j of a row is `column` times j elements behind key 0.
    bias: Tensor,
    mask: Tensor,
    seqlen_q: u32,
    seqlen_k: u32,
    // This launch computes rows row_begin .. row_end of each of its heads.
    row_begin: u32,
    row_end: u32,
    // This launch begins at this batch entry and query head of the whole problem.
    batch_begin: u32,
    head_begin: u32,
    // Query heads and batch entries of this launch.
    heads: u32,
    batches: u32,
    // How many query heads share a key-value head.
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
    // In which order workgroups start: see in_order.
    order: u32,
    // backward_fused_tile.wgsl reads the blocks' sizes, and which pairs of blocks a dispatch computes.
    block_keys: u32,
    block_rows: u32,
    round: u32,
    // Where batch entry 0 of the problem has its lengths in the workspace, and head 0 of it its range (coop_ranges.wgsl).
    lengths_at: u32,
    ranges_at: u32,
    bias_column: u32,
    mask_column: u32,
    // From the slopes of a batch entry to those of the next.
    slopes_batch: u32,
    // Query heads of the problem.
    heads_q: u32,
    // The highest word of random bits whose highest byte keeps a probability; and what that is multiplied by then.
    dropout_last: u32,
    dropout_scale: f32,
}

@group(0) @binding(0) var<uniform> problem: Problem;
