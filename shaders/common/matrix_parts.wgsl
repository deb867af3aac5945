// Numbers as operands of f16: a tile X is multiplied by a power of two, its scale s(X), that brings its largest element to
// between 2^14 and 2^15, and is split into PARTS matrices of f16, each holding the leading bits of what those before it
// left of s(X) X. Two parts hold 22 bits of an f32, one holds a bf16. A product is the sum over parts, less what lies
// below the last bit:
//
//     X Y = sum over a + b < PARTS of X_a Y_b / (s(X) s(Y))
//
// The small products come first: what tensor cores add up is truncated to the size of the sum. And sums of many tiles are
// plain numbers, to which the sum of a tile is added.
//
// Elements below 2^-16 of the largest lose bits (of a bf16, 2^-32). So a tile whose elements are that far apart has a scale for each of its
// rows: then a key that no query may see, however large, takes no bits from its neighbours.

// Of each subgroup's part of two tiles, the largest size and, as what it lacks to 2^32, the smallest size other than 0.
// Sizes are bits, which grow with the numbers.
var<workgroup> largest: array<vec4u, SUBGROUPS>;
// Where tiles have a scale for each row: the sizes of rows. SIZED_ROWS is the kernel's.
var<workgroup> row_sizes: array<atomic<u32>, SIZED_ROWS>;
// How many powers of two elements of a tile may be apart before its rows have scales of their own: 16 in f32, and 24 in bf16,
// whose 8 bits are in one f16 down to 2^-32 of the largest.
const APART = 32u - 8u * PARTS;

// The size of elements is the largest absolute value.
fn size_of(x: vec4f) -> f32 {
    return max(max(abs(x.x), abs(x.y)), max(abs(x.z), abs(x.w)));
}

// Of these elements, what the maxima over a tile are of: the size, and what it lacks to 2^32.
fn sizes_of(x: vec4f) -> vec2u {
    let bits = bitcast<u32>(size_of(x));
    return vec2u(bits, 0u - bits);
}

// The power of two that brings a size, given as bits, to between 2^14 and 2^15, or 2^126 if that is not enough.
fn scale_for(bits: u32) -> f32 {
    return bitcast<f32>((268u - max(bits >> 23u, 15u)) << 23u);
}

// The scales of two tiles, and whether the sizes of their elements, four by four, are far apart in one of them.
struct Scales {
    tile: vec2f,
    apart: bool,
}

// Of two tiles, of which this thread holds elements of these sizes. Has a barrier.
fn scales_of(first: vec2u, second: vec2u, subgroup: u32, lane: u32) -> Scales {
    let most = vec4u(subgroupMax(first.x), subgroupMax(first.y), subgroupMax(second.x), subgroupMax(second.y));
    if lane == 0u {
        largest[subgroup] = most;
    }
    workgroupBarrier();
    let some = largest[lane % SUBGROUPS];
    let all = vec4u(subgroupMax(some.x), subgroupMax(some.y), subgroupMax(some.z), subgroupMax(some.w));
    let exponents = vec4u(all.x, 0u - all.y, all.z, 0u - all.w) >> vec4u(23u);
    let apart = exponents.x > exponents.y + APART || exponents.z > exponents.w + APART;
    return Scales(vec2f(scale_for(all.x), scale_for(all.z)), apart);
}

// Sizes of rows: 0 first, then, after a barrier, the largest of what threads have of a row.
fn clear_sizes(first: u32, count: u32, thread: u32) {
    for (var t = thread; t < count; t += THREADS) {
        atomicStore(&row_sizes[first + t], 0u);
    }
}

fn add_size(row: u32, x: vec4f) {
    atomicMax(&row_sizes[row], bitcast<u32>(size_of(x)));
}

fn row_scale(row: u32) -> f32 {
    return scale_for(atomicLoad(&row_sizes[row]));
}

// 2^exponent, or the nearest one that f32 has.
fn power_of_two(exponent: i32) -> f32 {
    return bitcast<f32>(u32(clamp(exponent, -126, 127) + 127) << 23u);
}

// x / (a b) for powers of two whose product may be no f32.
fn unscaled(x: f32, a: f32, b: f32) -> f32 {
    let power = 254 - i32(bitcast<u32>(a) >> 23u) - i32(bitcast<u32>(b) >> 23u);
    let half = power / 2;
    return x * power_of_two(half) * power_of_two(power - half);
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
