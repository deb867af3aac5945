// Which tiles of keys a block of rows visits, and which tiles of rows a block of keys. A tile is `size` keys or rows, from a multiple
// of `size` on. The tiles of which all scores count come first: kernels need not ask keep about their scores.
// With BLOCKS they are those of listed blocks, each of which a tile's size divides.
// Needs: keep.wgsl, blocks.wgsl; with BLOCKS constants BLOCK_QUERIES and BLOCK_KEYS.
// Gives: Tiles, key_tiles, row_tiles, tile; Walk, walk_rows, has_tile, next_tile, first_row.

struct Tiles {
    // Where the first tile begins, in the order of the sequence; how many keys or rows a tile has; how many tiles there are.
    first: i32,
    size: i32,
    count: i32,
    // Visited are the `full` tiles, all of whose scores count; then the tiles after them; then the `before` tiles that precede them.
    full: i32,
    before: i32,
#if BLOCKS
    // The entries; how many blocks there are, and of how many keys or rows and how many tiles each is.
    line: Line,
    blocks: u32,
    block: u32,
    of_block: u32,
    // The tiles of a line are numbered in the order of its entries. Visited are those of full blocks from `first_full` on, then those from
    // `full_begin` on up to there, which are `of_full` in all, then those of partial blocks from `partial_begin` on.
    first_full: i32,
    full_begin: i32,
    of_full: i32,
    partial_begin: i32,
#endif
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
#if BLOCKS
    let m = min(n, tiles.count - 1);
    let of_full = select(m, m - tiles.of_full, m >= tiles.of_full - (tiles.first_full - tiles.full_begin)) + tiles.first_full;
    return listed_tile(tiles, select(of_full, m - tiles.of_full + tiles.partial_begin, m >= tiles.of_full));
#else
#if PROBE_TILES
    return probe_tile(tiles, n);
#else
    let m = min(n, tiles.count - 1) + tiles.before;
    return tiles.first + select(m, m - tiles.count, m >= tiles.count) * tiles.size;
#endif
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

#if BLOCKS
// Where tile m of a line begins.
fn listed_tile(tiles: Tiles, m: i32) -> i32 {
    let n = u32(max(m, 0));
    let block = entry(tiles.line, i32(n / tiles.of_block), tiles.blocks);
    return block * i32(tiles.block) + i32(n % tiles.of_block) * tiles.size;
}

// The first of tiles begin .. end of a line that begins at x or later, all of them being of full blocks, or of partial ones: their beginnings ascend.
// Masks mostly leave all of them or none, so that the ends are looked at first, and nothing is read where x is before or behind all blocks.
fn first_from(tiles: Tiles, begin: i32, end: i32, x: i32) -> i32 {
    if begin >= end || x <= 0 || listed_tile(tiles, begin) >= x {
        return begin;
    }
    if x > i32(tiles.blocks * tiles.block) - tiles.size || listed_tile(tiles, end - 1) < x {
        return end;
    }
    // The beginning of `low` is below x, that of `high` is not.
    var low = begin;
    var high = end - 1;
    while high - low > 1 {
        let middle = (low + high) / 2;
        if listed_tile(tiles, middle) < x {
            low = middle;
        } else {
            high = middle;
        }
    }
    return high;
}

// The tiles of a line's blocks that lie in part between between.x and between.y. Full are those of full blocks that lie wholly between counting.x
// and counting.y. There are `number` blocks of `block` keys or rows.
fn tiles_of_line(line: Line, number: u32, block: u32, between: vec2i, counting: vec2i, size: u32) -> Tiles {
    var tiles: Tiles;
    tiles.size = i32(size);
    tiles.line = line;
    tiles.blocks = number;
    tiles.block = block;
    tiles.of_block = block / size;
    if between.x >= between.y {
        return tiles;
    }
    let partial = line.full * i32(tiles.of_block);
    let all = line.count * i32(tiles.of_block);
    // A tile that ends after x begins after x - size.
    let after = between.x - tiles.size + 1;
    tiles.full_begin = first_from(tiles, 0, partial, after);
    let full_end = first_from(tiles, tiles.full_begin, partial, between.y);
    tiles.partial_begin = first_from(tiles, partial, all, after);
    tiles.of_full = full_end - tiles.full_begin;
    tiles.count = tiles.of_full + first_from(tiles, tiles.partial_begin, all, between.y) - tiles.partial_begin;
    tiles.first_full = first_from(tiles, tiles.full_begin, full_end, counting.x);
    tiles.full = first_from(tiles, tiles.first_full, full_end, counting.y - tiles.size + 1) - tiles.first_full;
    tiles.first_full = select(tiles.full_begin, tiles.first_full, tiles.full > 0);
    return tiles;
}
#endif

// Tiles of the keys that some of rows i0 .. i1 may see.
fn key_tiles(at: Sequence, i0: i32, i1: i32, size: u32) -> Tiles {
    var end = i1;
#if QUERY_LENGTHS
    end = max(min(i1, at.queries), i0 + 1);
#endif
    var some = vec2i(key_interval(at, i0).x, key_interval(at, end - 1).y);
    var all = vec2i(key_interval(at, end - 1).x, key_interval(at, i0).y);
#if QUERY_LENGTHS
    // None count for a row that is no query, and without a query there are no tiles.
    all.y = select(all.y, all.x, i1 > at.queries);
    some = select(some, vec2i(), i0 >= at.queries);
#endif
#if ASKED_EVERYWHERE
    all.y = all.x;
#endif
#if BLOCKS
    return tiles_of_line(row_of_blocks(at, u32(i0)), problem.blocks.across, BLOCK_KEYS, some, all, size);
#else
#if PROBE_TILES
    return probe_tiles(tiles_between(some, all, size), at, true, vec2i(i0, i1));
#else
    return tiles_between(some, all, size);
#endif
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
#if ASKED_EVERYWHERE
    all.y = all.x;
#endif
#if BLOCKS
    return tiles_of_line(column_of_blocks(at, u32(j0)), problem.blocks.down, BLOCK_QUERIES, some, all, size);
#else
#if PROBE_TILES
    return probe_tiles(tiles_between(some, all, size), at, false, vec2i(j0, j1));
#else
    return tiles_between(some, all, size);
#endif
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
