// Numbers as operands of f16: a tile X is multiplied by a power of two, its scale s(X), that brings its largest element to
// between 2^14 and 2^15, and is split into PARTS matrices of f16, each holding the leading bits of what those before it
// left of s(X) X. Two parts hold 22 bits of an f32, one holds a bf16. A product is the sum over parts, less what lies
// below the last bit:
//
//     X Y = sum over a + b < PARTS of X_a Y_b / (s(X) s(Y))
//
// The small products come first: what tensor cores add up is truncated to the size of the sum. And sums of many tiles are
// plain numbers, to which the sum of a tile is added.

// The sizes of each subgroup's part of two tiles, as bits, which grow with the numbers.
var<workgroup> largest: array<vec2u, SUBGROUPS>;

// The size of elements is the largest absolute value.
fn size_of(x: vec4f) -> f32 {
    return max(max(abs(x.x), abs(x.y)), max(abs(x.z), abs(x.w)));
}

// The power of two that brings a size, given as bits, to between 2^14 and 2^15, or 2^126 if that is not enough.
fn scale_for(bits: u32) -> f32 {
    return bitcast<f32>((268u - max(bits >> 23u, 15u)) << 23u);
}

// The scales of two tiles, of which this thread holds elements of these sizes. Has a barrier.
fn scales_of(sizes: vec2f, subgroup: u32, lane: u32) -> vec2f {
    let most = vec2u(subgroupMax(bitcast<u32>(sizes.x)), subgroupMax(bitcast<u32>(sizes.y)));
    if lane == 0u {
        largest[subgroup] = most;
    }
    workgroupBarrier();
    let all = largest[lane % SUBGROUPS];
    return vec2f(scale_for(subgroupMax(all.x)), scale_for(subgroupMax(all.y)));
}

// Of a power of two.
fn inverse(scale: f32) -> f32 {
    return bitcast<f32>((254u << 23u) - bitcast<u32>(scale));
}

// What of `rest` is in this part: the 11 bits that f16 holds; all, and rounded by the conversion, in the last one.
// PART_ROUNDING is half the last bit, or 0 to cut off what is below it, for one instruction less and twice the error. Bits,
// since a compiler may take f32(f16(x)) for x.
fn part_of(rest: f32, part: u32) -> f32 {
    return select(rest, bitcast<f32>((bitcast<u32>(rest) + PART_ROUNDING) & 0xffffe000u), part + 1u < PARTS);
}

fn part4_of(rest: vec4f, part: u32) -> vec4f {
    return vec4f(part_of(rest.x, part), part_of(rest.y, part), part_of(rest.z, part), part_of(rest.w, part));
}

// x in PARTS parts, each `size` after the one before.
fn store_parts(place: u32, size: u32, x: vec4f) {
    var rest = x;
    for (var part = 0u; part < PARTS; part++) {
        let now = part4_of(rest, part);
        tiles[place + part * size] = vec4<f16>(now);
        rest -= now;
    }
}

fn left_parts(x: Lane) -> array<Left, PARTS> {
    var parts: array<Left, PARTS>;
    var rest = x;
    for (var part = 0u; part < PARTS; part++) {
        var now = Lane();
        for (var e = 0u; e < ELEMENTS; e++) {
            now[e] = part_of(rest[e], part);
            rest[e] -= now[e];
        }
        parts[part] = left(now);
    }
    return parts;
}
