// Which probabilities are dropped: FlashAttention-2's mask, bit for bit. A call of Philox4x32-7 (Salmon et al. 2011) gives 16 bytes, one for
// each of 16 probabilities: rows i and i + 8 with keys j, j + 1 and those 8, 16 and 24 further, in a block of 16 rows and 32 keys. A probability
// is kept if its byte is at most the highest byte of problem.dropout_last. It depends on positions in the sequence alone, whatever the tile.
// Needs: sequence.wgsl. Gives: dropout_bytes, dropout_byte, is_byte_kept, is_kept.

// The seed, then the offset: 64 bits each, the low word first.
@group(0) @binding(27) var<uniform> rng_state: vec4u;

struct Wide {
    low: u32,
    high: u32,
}

// The product, of 64 bits. In modules with access to the elements of matrices src/matrices/spirv.rs replaces the body by the one instruction for
// it, which WGSL does not have. INT64 is for devices that have numbers of 64 bits.
fn coop_mul_wide(a: u32, b: u32) -> Wide {
#if INT64
    let product = u64(a) * u64(b);
    return Wide(u32(product), u32(product >> 32u));
#else
    let al = a & 0xffffu;
    let ah = a >> 16u;
    let bl = b & 0xffffu;
    let bh = b >> 16u;
    // No sum here is above 2^32 - 1.
    let middle = ah * bl + ((al * bl) >> 16u);
    let carried = (middle & 0xffffu) + al * bh;
    return Wide(a * b, ah * bh + (middle >> 16u) + (carried >> 16u));
#endif
}

fn philox_round(counter: vec4u, key: vec2u) -> vec4u {
    let x = coop_mul_wide(0xd2511f53u, counter.x);
    let y = coop_mul_wide(0xcd9e8d57u, counter.z);
    return vec4u(y.high ^ counter.y ^ key.x, y.low, x.high ^ counter.w ^ key.y, x.low);
}

// Seven rounds. The key grows by a constant from round to round. They are written out, for some drivers count the trips of loops.
fn philox(counter: vec4u, key: vec2u) -> vec4u {
    let step = vec2u(0x9e3779b9u, 0xbb67ae85u);
    var x = philox_round(counter, key);
    x = philox_round(x, key + step);
    x = philox_round(x, key + 2u * step);
    x = philox_round(x, key + 3u * step);
    x = philox_round(x, key + 4u * step);
    x = philox_round(x, key + 5u * step);
    return philox_round(x, key + 6u * step);
}

// The 16 bytes of the call that the probability of row i and key j has its byte from, four in a word.
fn dropout_bytes(at: Sequence, i: u32, j: u32) -> vec4u {
    // The offset + 32 · (number of the head) + number of the call among the 32 of a block.
    let head = at.batch * problem.heads_q + at.head;
    let low = rng_state.z + (32u * head + i % 8u * 4u + j % 8u / 2u);
    let carry = select(0u, 1u, low < rng_state.z);
    return philox(vec4u(low, rng_state.w + (head >> 27u) + carry, i / 16u, j / 32u), rng_state.xy);
}

// The number of that byte.
fn dropout_byte(i: u32, j: u32) -> u32 {
    return j % 32u / 8u * 4u + i % 16u / 8u * 2u + j % 2u;
}

// Whether byte n of a word keeps its probability. The byte is moved to the top; the bytes below it decide nothing, since those of
// problem.dropout_last are 255.
fn is_byte_kept(word: u32, n: u32) -> bool {
    return (word << (24u - 8u * n)) <= problem.dropout_last;
}

// Whether the probability of row i and key j is kept. It takes a call for one byte: who has more rows or keys shares calls (tile/dropout.wgsl,
// matrix/scores.wgsl).
fn is_kept(at: Sequence, i: u32, j: u32) -> bool {
    let byte = dropout_byte(i, j);
    return is_byte_kept(dropout_bytes(at, i, j)[byte / 4u], byte % 4u);
}
