// Which tiles of keys a block of rows visits, and which tiles of rows a block of keys. A tile is `size` keys or rows, from a multiple
// of `size` on. Those of which all scores count come first: kernels ask nothing about their scores.

struct Tiles {
    // The first key or row of the tiles from which `before` are counted, and how many there are.
    first: i32,
    size: i32,
    count: i32,
    // Visited first: so many tiles all of whose scores count. So many others precede them in the sequence, and are visited last.
    full: i32,
    before: i32,
}

// The first key (row) of the n-th tile that is visited. Past the end it is that of the last one, so that loading ahead is harmless.
fn tile(tiles: Tiles, n: i32) -> i32 {
    let m = min(n, tiles.count - 1) + tiles.before;
    return tiles.first + select(m, m - tiles.count, m >= tiles.count) * tiles.size;
}

// The tiles between x and y, and those of them that lie between the two numbers of `counting`.
fn tiles_between(between: vec2i, counting: vec2i, size: i32) -> Tiles {
    let first = between.x / size * size;
    let count = select((between.y - first + size - 1) / size, 0, between.x >= between.y);
    let before = clamp((counting.x - first + size - 1) / size, 0, count);
    let full = clamp((counting.y - first) / size, before, count) - before;
    return Tiles(first, size, count, full, select(0, before, full > 0));
}

// Tiles of the keys that some of rows i0 .. i1 may see.
fn key_tiles(at: Sequence, i0: i32, i1: i32, size: u32) -> Tiles {
    var end = i1;
#if QUERY_LENGTHS
    if i0 >= at.queries {
        return Tiles(0, i32(size), 0, 0, 0);
    }
    end = min(i1, at.queries);
#endif
    let some = vec2i(key_interval(at, i0).x, key_interval(at, end - 1).y);
    var all = vec2i(key_interval(at, end - 1).x, key_interval(at, i0).y);
#if QUERY_LENGTHS
    // None count for a row that is no query.
    all.y = select(all.y, all.x, i1 > at.queries);
#endif
    return tiles_between(some, all, i32(size));
}

// Tiles of the rows that may see some of keys j0 .. j1.
fn row_tiles(at: Sequence, j0: i32, j1: i32, size: u32) -> Tiles {
    if j0 >= at.keys {
        return Tiles(0, i32(size), 0, 0, 0);
    }
    let some = row_interval(at, j0, j1);
    let zero = at.queries - at.keys;
    // Key j1 - 1 must not be past the last that a row sees, nor key j0 before the first.
    var all = vec2i(
        max(0, max(zero + j1 - 1 - problem.window_right, j1 - 1 - problem.top_left)),
        min(at.queries, zero + j0 + problem.window_left + 1),
    );
    all.y = select(all.y, all.x, j1 > at.keys);
    return tiles_between(some, all, i32(size));
}

// A walk over the tiles of rows that read a block of keys, of all query heads that share it: those of a head one after the other.
struct Walk {
    at: Sequence,
    tiles: Tiles,
    n: i32,
    // Heads that follow.
    heads_left: u32,
}

// Begins with the first tile of the group's heads, `first` being the first of them. The keys are j0 .. j1.
fn walk_rows(first: Sequence, j0: i32, j1: i32, size: u32) -> Walk {
    let walk = Walk(first, row_tiles(first, j0, j1, size), 0, problem.group - 1u);
    return past_heads_without_tiles(walk, j0, j1, size);
}

fn has_tile(walk: Walk) -> bool {
    return walk.n < walk.tiles.count;
}

// The next tile. There is none after the last one of the last head.
fn next_tile(walk: Walk, j0: i32, j1: i32, size: u32) -> Walk {
    var next = walk;
    next.n++;
    return past_heads_without_tiles(next, j0, j1, size);
}

// A head may have no tiles. Where all heads have the same ones, none of them has.
fn past_heads_without_tiles(walk: Walk, j0: i32, j1: i32, size: u32) -> Walk {
    var x = walk;
#if TILES_BY_HEAD
    while x.n >= x.tiles.count && x.heads_left > 0u {
        x.at = with_head(x.at, x.at.head + 1u);
        x.tiles = row_tiles(x.at, j0, j1, size);
        x.n = 0;
        x.heads_left--;
    }
#else
    if x.n >= x.tiles.count && x.heads_left > 0u {
        x.at = with_head(x.at, x.at.head + 1u);
        x.n = 0;
        x.heads_left--;
    }
#endif
    return x;
}

// The first row of the tile.
fn first_row(walk: Walk) -> i32 {
    return tile(walk.tiles, walk.n);
}
