// Which probabilities of a tile of $rows rows and $keys keys are kept. All threads find it together, a call of the generator for 16
// probabilities, and leave the answers in workgroup memory.
// Needs: dropout.wgsl, THREADS, $rows, $keys. Gives: find_kept, kept_of, kept4_of.

// Blocks of 16 rows and of 32 keys that a tile lies in. A tile of whole blocks begins at one; others may begin anywhere.
const ROW_BLOCKS = ($rows + 14u) / 16u + ($rows % 16u + 15u) / 16u;
const KEY_BLOCKS = ($keys + 30u) / 32u + ($keys % 32u + 31u) / 32u;
// The calls of a block and of a tile.
const BLOCK_CALLS = 32u;
const CALLS = ROW_BLOCKS * KEY_BLOCKS * BLOCK_CALLS;
// Of each call 16 bits, by the numbers of its bytes. Where each thread has two calls or more, two share a word.
const WORD_CALLS = 1u + min(CALLS / (2u * THREADS), 1u);
var<workgroup> kept_bits: array<u32, CALLS / WORD_CALLS>;

fn bits_of_word(word: u32) -> u32 {
    let kept = vec4<bool>(is_byte_kept(word, 0u), is_byte_kept(word, 1u), is_byte_kept(word, 2u), is_byte_kept(word, 3u));
    let bits = select(vec4u(), vec4u(1u, 2u, 4u, 8u), kept);
    return bits.x | bits.y | bits.z | bits.w;
}

// For the tile whose first row is i0 and whose first key is j0. Callers have barriers before it, until all threads are done with the tile
// before, and after it.
fn find_kept(at: Sequence, i0: u32, j0: u32, thread: u32) {
    for (var t = thread; t < CALLS / WORD_CALLS; t += THREADS) {
        var bits = 0u;
        for (var n = 0u; n < WORD_CALLS; n++) {
            let call = t * WORD_CALLS + n;
            let block = call / BLOCK_CALLS;
            let i = (i0 / 16u + block / KEY_BLOCKS) * 16u + call % BLOCK_CALLS / 4u;
            let j = (j0 / 32u + block % KEY_BLOCKS) * 32u + call % 4u * 2u;
            let bytes = dropout_bytes(at, i, j);
            let low = bits_of_word(bytes.x) | (bits_of_word(bytes.y) << 4u);
            let high = bits_of_word(bytes.z) | (bits_of_word(bytes.w) << 4u);
            bits |= (low | (high << 8u)) << (16u * n);
        }
        kept_bits[t] = bits;
    }
}

// Of row i and key j of that tile.
fn kept_of(i0: u32, j0: u32, i: u32, j: u32) -> bool {
    let block = (i / 16u - i0 / 16u) * KEY_BLOCKS + j / 32u - j0 / 32u;
    let call = block * BLOCK_CALLS + i % 8u * 4u + j % 8u / 2u;
    let bits = kept_bits[call / WORD_CALLS];
    return ((bits >> (call % WORD_CALLS * 16u + dropout_byte(i, j))) & 1u) == 1u;
}

fn kept4_of(i0: u32, j0: u32, i: vec4u, j: vec4u) -> vec4<bool> {
    return vec4<bool>(kept_of(i0, j0, i.x, j.x), kept_of(i0, j0, i.y, j.y), kept_of(i0, j0, i.z, j.z), kept_of(i0, j0, i.w, j.w));
}
