// What: lists of blocks, first half: of each block, whether the problem's masks leave some of its scores, or all.
//
//     kind = 0 if no score counts, 2 if all do and the block is not cut short, 1 otherwise
//
// Who: a workgroup has the 16 blocks of one word. Its threads look at every score of them, of each sequence that shares the list.
// Needs what keep.wgsl needs. Gives the kinds, as attention/blocks.wgsl describes them.
#include "attention/attention.wgsl"

@group(0) @binding(28) var<storage, read_write> blocks: array<u32>;

// A bit for each block: does some score of it count, and does some not.
var<workgroup> some: atomic<u32>;
var<workgroup> missing: atomic<u32>;

@compute @workgroup_size(THREADS)
fn kinds_of_mask(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let b = problem.blocks;
    if thread == 0u {
        atomicStore(&some, 0u);
        atomicStore(&missing, 0u);
    }
    workgroupBarrier();
    // The batch entries and the heads that share the list. There are so many lists for each batch entry.
    let lists = select(1u, problem.heads, b.head > 0u);
    let of_batch = group.z / lists;
    let of_head = group.z % lists;
    let batch_end = select(problem.batches, of_batch + 1u, b.batch > 0u);
    let head_end = select(problem.heads, of_head + 1u, b.head > 0u);
    // Only rows and keys that exist are counted: the size of a block, and its end, may be past what u32 holds.
    let i0 = group.y * b.queries;
    let rows = min(b.queries, problem.seqlen_q - i0);
    var own_some = 0u;
    var own_missing = 0u;
    for (var batch = select(0u, of_batch, b.batch > 0u); batch < batch_end; batch++) {
        for (var head = select(0u, of_head, b.head > 0u); head < head_end; head++) {
            let at = sequence(batch, head);
            for (var n = 0u; n < 16u; n++) {
                let column = 16u * group.x + n;
                if column >= b.across {
                    break;
                }
                let j0 = column * b.keys;
                let keys = min(b.keys, problem.seqlen_k - j0);
                own_missing |= select(0u, 1u << n, rows < b.queries || keys < b.keys);
                // Every THREADS-th score of the block, row by row.
                var i = thread / keys;
                var j = thread % keys;
                while i < rows {
                    let counts = keep(at, i32(i0 + i), i32(j0 + j));
                    own_some |= select(0u, 1u << n, counts);
                    own_missing |= select(1u << n, 0u, counts);
                    i += THREADS / keys;
                    j += THREADS % keys;
                    if j >= keys {
                        j -= keys;
                        i++;
                    }
                }
            }
        }
    }
    atomicOr(&some, own_some);
    atomicOr(&missing, own_missing);
    workgroupBarrier();
    if thread == 0u {
        let listed = atomicLoad(&some);
        let full = listed & ~atomicLoad(&missing);
        var word = 0u;
        for (var n = 0u; n < 16u; n++) {
            word |= (((listed >> n) & 1u) << ((full >> n) & 1u)) << (2u * n);
        }
        blocks[group.z * list_words(b) + group.y * row_words(b) + group.x] = word;
    }
}
