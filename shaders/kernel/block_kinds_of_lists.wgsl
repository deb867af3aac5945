// What: lists of blocks, first half: of each block, whether FlexAttention's lists have it, as a partial block or as a full one.
// Who: a workgroup has a row of blocks of one list. It sets the row's words to 0, then its threads set a bit for each entry: bits that are set
//   do not depend on the order.
// Needs the lists: of each row of blocks how many blocks it lists, and which ones, `columns` numbers a row. Numbers that are none of a block are
// clamped to the first or the last one. Gives the kinds, as attention/blocks.wgsl describes them.
#include "attention/problem.wgsl"

@group(0) @binding(28) var<storage, read_write> blocks: array<atomic<u32>>;
@group(0) @binding(29) var<storage, read> kv_num_blocks: array<i32>;
@group(0) @binding(30) var<storage, read> kv_indices: array<i32>;
#if FULL_LISTS
@group(0) @binding(31) var<storage, read> full_kv_num_blocks: array<i32>;
@group(0) @binding(32) var<storage, read> full_kv_indices: array<i32>;
#endif

@compute @workgroup_size(THREADS)
fn kinds_of_lists(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let b = problem.blocks;
    let words = row_words(b);
    let place = group.y * list_words(b) + group.x * words;
    for (var n = thread; n < words; n += THREADS) {
        atomicStore(&blocks[place + n], 0u);
    }
    storageBarrier();
    if b.across == 0u {
        return;
    }
    let row = group.y * b.down + group.x;
    let partial = u32(clamp(kv_num_blocks[row], 0, i32(b.columns)));
    for (var n = thread; n < partial; n += THREADS) {
        let column = u32(clamp(kv_indices[row * b.columns + n], 0, i32(b.across) - 1));
        atomicOr(&blocks[place + column / 16u], 1u << (2u * (column % 16u)));
    }
#if FULL_LISTS
    let full = u32(clamp(full_kv_num_blocks[row], 0, i32(b.columns)));
    for (var n = thread; n < full; n += THREADS) {
        let column = u32(clamp(full_kv_indices[row * b.columns + n], 0, i32(b.across) - 1));
        atomicOr(&blocks[place + column / 16u], 2u << (2u * (column % 16u)));
    }
#endif
}
