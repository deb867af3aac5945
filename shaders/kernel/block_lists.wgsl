// What: lists of blocks, second half: from the kind of each block the entries of each row and of each column, in ascending order.
//   BlockMask::of in src/block_mask.rs does the same on the host.
//
//     number of entries of each line;  where each line begins: the sum of those before;  the entries
//
// Who: workgroup (direction, list) has all lines of a list, rows in direction 0 and columns in direction 1. Each thread has lines that follow
//   one another.
// Needs the kinds. Gives the rest of the list, as attention/blocks.wgsl describes it.
#include "attention/problem.wgsl"

@group(0) @binding(28) var<storage, read_write> blocks: array<u32>;

// Of each thread, the entries of its lines.
var<workgroup> entries_of: array<u32, THREADS>;

// The kind of a block: 0, 1 if it is listed as partial, 2 if it is listed as full only.
fn kind(place: u32, row: u32, column: u32) -> u32 {
    let bits = (blocks[place + row * row_words(problem.blocks) + column / 16u] >> (2u * (column % 16u))) & 3u;
    return select(bits, 1u, bits == 3u);
}

fn kind_in_line(place: u32, by_keys: bool, line: u32, n: u32) -> u32 {
    return kind(place, select(line, n, by_keys), select(n, line, by_keys));
}

@compute @workgroup_size(THREADS)
fn lists(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let b = problem.blocks;
    let by_keys = group.x == 1u;
    let list = group.y * list_words(b);
    let place = list + b.down * row_words(b) + select(0u, 2u * b.down + 1u + b.entries, by_keys);
    let lines = select(b.down, b.across, by_keys);
    let of_line = select(b.across, b.down, by_keys);
    let each = (lines + THREADS - 1u) / THREADS;
    let begin = min(thread * each, lines);
    let end = min(begin + each, lines);

    var own = 0u;
    for (var line = begin; line < end; line++) {
        for (var n = 0u; n < of_line; n++) {
            own += select(0u, 1u, kind_in_line(list, by_keys, line, n) != 0u);
        }
    }
    entries_of[thread] = own;
    workgroupBarrier();
    var next = 0u;
    for (var t = 0u; t < thread; t++) {
        next += entries_of[t];
    }

    let entries = place + 2u * lines + 1u;
    for (var line = begin; line < end; line++) {
        let first = next;
        blocks[place + line] = first;
        // Full blocks, then partial ones.
        for (var wanted = 2u; wanted > 0u; wanted--) {
            for (var n = 0u; n < of_line; n++) {
                if kind_in_line(list, by_keys, line, n) == wanted && next < b.entries {
                    blocks[entries + next] = n;
                    next++;
                }
            }
            if wanted == 2u {
                blocks[place + lines + 1u + line] = next - first;
            }
        }
    }
    // The end of the last line, and what no line has.
    var all = 0u;
    for (var t = 0u; t < THREADS; t++) {
        all += entries_of[t];
    }
    all = min(all, b.entries);
    if thread == 0u {
        blocks[place + lines] = all;
    }
    for (var n = all + thread; n < b.entries; n += THREADS) {
        blocks[entries + n] = 0u;
    }
}
