// Lists of blocks: which blocks of scores count, and which of their tiles a workgroup visits.
// Needs: sequence.wgsl. Gives: with BLOCKS Line, row_of_blocks, column_of_blocks, entry; with BLOCKS_BY_PAIR is_listed.
//
// A list, that of a batch entry and a head, is:
// - of each block two bits, 1 for a partial and 2 for a full one, 3 for one that was listed as both, which counts as partial: 16 blocks a
//   word, each row of blocks from a new word on;
// - by rows: where each row's entries begin, `down` + 1 numbers; how many of them are full, `down` numbers; the entries;
// - by keys: the same with rows and columns exchanged.
// Nothing here trusts the numbers in the buffer: they are clamped, so that wrong ones are no reads past its end.

#if BLOCKS
@group(0) @binding(28) var<storage, read> blocks: array<u32>;

// The entries of a row of blocks, or of a column: where they begin, how many of them are full, how many there are, and the last place that an
// entry may have.
struct Line {
    first: u32,
    full: i32,
    count: i32,
    last: u32,
}

// Where the list of a sequence begins.
fn list_of(at: Sequence) -> u32 {
    let b = problem.blocks;
    return (at.batch * b.batch + at.head * b.head) * list_words(b);
}

// The entries of the row of blocks that query i is in.
fn row_of_blocks(at: Sequence, i: u32) -> Line {
    let b = problem.blocks;
    return line(list_of(at) + b.down * row_words(b), b.down, i / b.queries, b.across);
}

// The entries of the column of blocks that key j is in.
fn column_of_blocks(at: Sequence, j: u32) -> Line {
    let b = problem.blocks;
    return line(list_of(at) + b.down * row_words(b) + 2u * b.down + 1u + b.entries, b.across, j / b.keys, b.down);
}

// Line n of `lines`, whose numbers begin at `place`. A line has at most `most` blocks.
fn line(place: u32, lines: u32, n: u32, most: u32) -> Line {
    let m = min(n, max(lines, 1u) - 1u);
    let entries = problem.blocks.entries;
    let first = min(blocks[place + m], entries);
    let count = min(min(max(blocks[place + m + 1u], first), entries) - first, most);
    let full = min(blocks[place + lines + 1u + m], count);
    let at = place + 2u * lines + 1u;
    return Line(at + first, i32(full), i32(count), at + entries - 1u);
}

// The n-th entry of a line: the number of a block, of `number`.
fn entry(x: Line, n: i32, number: u32) -> i32 {
    return i32(min(blocks[min(x.first + u32(n), x.last)], max(number, 1u) - 1u));
}

#if BLOCKS_BY_PAIR
// Is the block of query i and key j listed?
fn is_listed(at: Sequence, i: i32, j: i32) -> bool {
    let b = problem.blocks;
    let row = min(u32(i) / b.queries, b.down - 1u);
    let column = min(u32(j) / b.keys, b.across - 1u);
    return ((blocks[list_of(at) + row * row_words(b) + column / 16u] >> (2u * (column % 16u))) & 3u) != 0u;
}
#endif
#endif
