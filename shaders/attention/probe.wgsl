// Variants of attention that only tests plan (Probe in src/problem/probe.rs). Each goes through one seam between attention and kernels: a
// kernel that has its own idea of a position, a head, a row, a tile or a row's end gives wrong results with one of them.
// Needs: sequence.wgsl. Gives: the probe_ functions that the other files of this folder call.

#if PROBE_ROWS
// Queries change places with their neighbours, keys lie in reverse order.
fn probe_query(i: u32) -> u32 {
    return select(i, i ^ 1u, (i ^ 1u) < problem.seqlen_q);
}

fn probe_key(j: u32) -> u32 {
    return problem.seqlen_k - 1u - min(j, problem.seqlen_k - 1u);
}
#endif

#if PROBE_TILES
// Scores are cut into squares, of which in each head a quarter does not count, and half of the scores of another quarter.
const PROBE_SQUARE = 48;

fn probe_kind(at: Sequence, a: i32, b: i32) -> i32 {
    return (a + 2 * b + i32(at.head)) % 4;
}

fn probe_keep(at: Sequence, i: i32, j: i32) -> bool {
    let kind = probe_kind(at, i / PROBE_SQUARE, j / PROBE_SQUARE);
    return kind > 1 || (kind == 1 && (i + j) % 2 == 0);
}

// Of rows i0 .. i1 and keys j0 .. j1: 0 if no score counts, 2 if all do, 1 otherwise. Squares that are cut count whole.
fn probe_box(at: Sequence, i0: i32, i1: i32, j0: i32, j1: i32) -> i32 {
    var some = false;
    var all = true;
    for (var a = i0 / PROBE_SQUARE; a * PROBE_SQUARE < i1; a++) {
        for (var b = j0 / PROBE_SQUARE; b * PROBE_SQUARE < j1; b++) {
            let kind = probe_kind(at, a, b);
            some = some || kind > 0;
            all = all && kind > 1;
        }
    }
    return select(select(0, 1, some), 2, all);
}

fn probe_tiles(interval: Tiles, at: Sequence, of_keys: bool, other: vec2i) -> Tiles {
    var tiles = interval;
    tiles.at = at;
    tiles.of_keys = of_keys;
    tiles.other = other;
    tiles.between = interval.count;
    tiles.full_from = interval.before;
    tiles.full_to = interval.before + interval.full;
    tiles.count = 0;
    tiles.full = 0;
    for (var m = 0; m < tiles.between; m++) {
        let kind = probe_kind_of_tile(tiles, m);
        tiles.count += select(0, 1, kind > 0);
        tiles.full += select(0, 1, kind == 2);
    }
    return tiles;
}

// Of the m-th tile of the interval: 0 if no score counts, 2 if all do.
fn probe_kind_of_tile(tiles: Tiles, m: i32) -> i32 {
    let x = tiles.first + m * tiles.size;
    var kind = probe_box(tiles.at, tiles.other.x, tiles.other.y, x, x + tiles.size);
    if !tiles.of_keys {
        kind = probe_box(tiles.at, x, x + tiles.size, tiles.other.x, tiles.other.y);
    }
    return select(min(kind, 1), kind, m >= tiles.full_from && m < tiles.full_to);
}

// Full tiles first, then those that count in part. Found by counting.
fn probe_tile(tiles: Tiles, n: i32) -> i32 {
    let wanted = min(n, tiles.count - 1);
    var seen = 0;
    var found = tiles.first;
    for (var kind = 2; kind > 0; kind--) {
        for (var m = 0; m < tiles.between; m++) {
            if probe_kind_of_tile(tiles, m) == kind {
                if seen == wanted {
                    found = tiles.first + m * tiles.size;
                }
                seen++;
            }
        }
    }
    return found;
}
#endif
