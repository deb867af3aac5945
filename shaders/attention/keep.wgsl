// Which scores count. Rows i and keys j are positions in the sequence.
// Needs: sequence.wgsl, blocks.wgsl, given.wgsl, mods.wgsl. Gives: keep, keep2, keep_keys, keep_rows, all_count; key_interval and
// row_interval for tiles.wgsl.

// The keys that the causal mask, the window and the lengths leave row i, if it is a query: from x to before y. As i grows, neither bound
// falls.
fn key_interval(at: Sequence, i: i32) -> vec2i {
    let diagonal = i + at.keys - at.queries;
    let first = max(0, diagonal - problem.window_left);
    let last = min(diagonal + problem.window_right, i + problem.top_left);
    return vec2i(first, min(at.keys, last + 1));
}

// Which rows may see some of keys j0 .. j1: from x to before y.
fn row_interval(at: Sequence, j0: i32, j1: i32) -> vec2i {
    // The row of which key 0 is the diagonal.
    let zero = at.queries - at.keys;
    let first = max(0, max(zero + j0 - problem.window_right, j0 - problem.top_left));
    let end = min(at.queries, zero + min(j1, at.keys) + problem.window_left);
    return select(vec2i(first, end), vec2i(), j0 >= at.keys);
}

// Does key j count for row i? Either may be past the end, or below 0. Tiles that are visited lie in listed blocks (tiles.wgsl), so that block lists
// are asked only by kernels without tiles, with BLOCKS_BY_PAIR.
fn keep(at: Sequence, i: i32, j: i32) -> bool {
    var counts = keep_but_mask(at, i, j);
#if MASK
    counts = counts && mask_of(at, i, j);
#endif
    return counts;
}

// `keep` of keys j and j + 1, of which j is even.
fn keep2(at: Sequence, i: i32, j: i32) -> vec2<bool> {
    var counts = vec2<bool>(keep_but_mask(at, i, j), keep_but_mask(at, i, j + 1));
#if MASK
    counts = counts & mask2_of(at, i, j);
#endif
    return counts;
}

// `keep` of keys j .. j + 3 for row i. j is a multiple of four, so that they may be read from a mask as one word.
fn keep_keys(at: Sequence, i: i32, j: i32) -> vec4<bool> {
    var counts = vec4<bool>(
        keep_but_mask(at, i, j),
        keep_but_mask(at, i, j + 1),
        keep_but_mask(at, i, j + 2),
        keep_but_mask(at, i, j + 3),
    );
#if MASK
    counts = counts & mask4_of(at, i, j);
#endif
    return counts;
}

// `keep` of key j for rows i .. i + 3. Rows of a mask may lie anywhere, so that each is read by itself.
fn keep_rows(at: Sequence, i: i32, j: i32) -> vec4<bool> {
    return vec4<bool>(keep(at, i, j), keep(at, i + 1, j), keep(at, i + 2, j), keep(at, i + 3, j));
}

fn keep_but_mask(at: Sequence, i: i32, j: i32) -> bool {
    let interval = key_interval(at, i);
#if QUERY_LENGTHS
    if i >= at.queries {
        return false;
    }
#endif
#if PROBE_TILES
    if !probe_keep(at, i, j) {
        return false;
    }
#endif
#if BLOCKS_BY_PAIR
    if !is_listed(at, i, j) {
        return false;
    }
#endif
    var counts = j >= interval.x && j < interval.y;
#if MASK_MOD
    counts = counts && mods_keep(mod_position(at, i, j));
#endif
    return counts;
}

// Do all scores of rows i0 .. i1 with keys j0 .. j1 count? Then keep need not be called for any of them. `false` is
// always allowed.
fn all_count(at: Sequence, i0: i32, i1: i32, j0: i32, j1: i32) -> bool {
    var known = true;
#if PROBE_TILES
    known = false;
#endif
#if BLOCKS_BY_PAIR
    known = false;
#endif
#if ANY_MASK
    known = false;
#endif
#if QUERY_LENGTHS
    known = known && i1 <= at.queries;
#endif
    return known && j0 >= key_interval(at, i1 - 1).x && j1 <= key_interval(at, i0).y;
}
