// Which tiles of keys a block of rows visits, and which tiles of rows a block of keys. A tile is `size` keys or rows, from a multiple
// of `size` on. The tiles of which all scores count come first: kernels need not ask keep about their scores.
// Needs: keep.wgsl. Gives: Tiles, key_tiles, row_tiles, tile; Walk, walk_rows, has_tile, next_tile, first_row.

struct Tiles {
    // Where the first tile begins, in the order of the sequence; how many keys or rows a tile has; how many tiles there are.
    first: i32,
    size: i32,
    count: i32,
    // Visited are the `full` tiles, all of whose scores count; then the tiles after them; then the `before` tiles that precede them.
    full: i32,
    before: i32,
#if PROBE_TILES
    // The second side of the scores: tiles of keys are visited by rows other.x .. other.y, tiles of rows by keys other.x .. other.y.
    at: Sequence,
    of_keys: bool,
    other: vec2i,
    // How many tiles the interval has; tiles full_from .. full_to of it are full without the probe.
    between: i32,
    full_from: i32,
    full_to: i32,
#endif
}

// Where the n-th tile that is visited begins. Past the end that is where the last one begins, so that loading ahead is harmless. Without any
// tile it may be below 0; a row taken from it is past the end, and loads take the last row instead.
fn tile(tiles: Tiles, n: i32) -> i32 {
#if PROBE_TILES
    return probe_tile(tiles, n);
#else
    let m = min(n, tiles.count - 1) + tiles.before;
    return tiles.first + select(m, m - tiles.count, m >= tiles.count) * tiles.size;
#endif
}

// The tiles that lie in part between between.x and between.y. Full are those that lie wholly between counting.x and counting.y.
fn tiles_between(between: vec2i, counting: vec2i, size: u32) -> Tiles {
    var tiles: Tiles;
    tiles.size = i32(size);
    tiles.first = between.x / tiles.size * tiles.size;
    tiles.count = select((between.y - tiles.first + tiles.size - 1) / tiles.size, 0, between.x >= between.y);
    let before = clamp((counting.x - tiles.first + tiles.size - 1) / tiles.size, 0, tiles.count);
    tiles.full = clamp((counting.y - tiles.first) / tiles.size, before, tiles.count) - before;
    tiles.before = select(0, before, tiles.full > 0);
    return tiles;
}

// Tiles of the keys that some of rows i0 .. i1 may see.
fn key_tiles(at: Sequence, i0: i32, i1: i32, size: u32) -> Tiles {
    var end = i1;
#if QUERY_LENGTHS
    if i0 >= at.queries {
        return tiles_between(vec2i(), vec2i(), size);
    }
    end = min(i1, at.queries);
#endif
    let some = vec2i(key_interval(at, i0).x, key_interval(at, end - 1).y);
    var all = vec2i(key_interval(at, end - 1).x, key_interval(at, i0).y);
#if QUERY_LENGTHS
    // None count for a row that is no query.
    all.y = select(all.y, all.x, i1 > at.queries);
#endif
#if ANY_MASK
    all.y = all.x;
#endif
#if PROBE_TILES
    return probe_tiles(tiles_between(some, all, size), at, true, vec2i(i0, i1));
#else
    return tiles_between(some, all, size);
#endif
}

// Tiles of the rows that may see some of keys j0 .. j1.
fn row_tiles(at: Sequence, j0: i32, j1: i32, size: u32) -> Tiles {
    let some = row_interval(at, j0, j1);
    let zero = at.queries - at.keys;
    // Key j1 - 1 must not be past the last that a row sees, nor key j0 before the first.
    var all = vec2i(
        max(0, max(zero + j1 - 1 - problem.window_right, j1 - 1 - problem.top_left)),
        min(at.queries, zero + j0 + problem.window_left + 1),
    );
    all.y = select(all.y, all.x, j1 > at.keys);
#if ANY_MASK
    all.y = all.x;
#endif
#if PROBE_TILES
    return probe_tiles(tiles_between(some, all, size), at, false, vec2i(j0, j1));
#else
    return tiles_between(some, all, size);
#endif
}

// A walk over the tiles of rows that read a block of keys: all tiles of the first query head of the group, then those of the next head.
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

// A head may have no tiles. Without TILES_BY_HEAD all heads of a group have equal tiles; then either all have tiles or none has.
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
