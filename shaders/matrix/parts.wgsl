// Numbers as operands of f16: a tile X is multiplied by a power of two, its scale s(X), that brings its largest element to between 2^14
// and 2^15. Then s(X) X is split into PARTS matrices of f16. Each holds the leading bits of what the parts before it left. Two parts hold
// 22 bits of an f32, one holds a bf16. A product is the sum over parts, less what lies below the last bit:
//
//     X Y = sum over a + b < PARTS of X_a Y_b / (s(X) s(Y))
//
// The small products come first, because tensor cores truncate what they add to the size of the sum. Sums over many tiles are plain
// numbers, to which the sum of a tile is added.
//
// Elements below 2^-16 of the largest lose bits (of a bf16, 2^-32). With BY_ROWS a tile whose elements are that far apart has a scale for
// each of its rows: then a key that no query may see, however large, takes no bits from its neighbours. Code for that costs a quarter
// of the speed even where it does not run. So there are modules with and without it, and coop_ranges.wgsl says which is for a head.
//
// Needs: PARTS, PART_ROUNDING, SIZED_ROWS, SUBGROUPS, THREADS, tiles, row_stats.wgsl. Gives: Scales, scales_of, range_of, OURS, clear_sizes, add_size,
// row_scale, inverse, part4_of, store_parts, left_parts.

#include "matrix/sizes.wgsl"

// What each subgroup found in its share of two tiles: of each tile the largest size, and 2^32 less the smallest size other than 0. A size
// is the bits of an absolute value, which are larger for larger numbers.
var<workgroup> subgroup_sizes: array<vec4u, SUBGROUPS>;
// Holds the sizes of rows, where tiles have a scale for each row. The kernel defines SIZED_ROWS.
var<workgroup> row_sizes: array<atomic<u32>, SIZED_ROWS>;

// The scales of two tiles, and whether the sizes of their elements, four by four, are far apart in one of them.
struct Scales {
    tile: vec2f,
    apart: bool,
}

// Gives the scales of two tiles, of which this thread holds elements of these sizes. Has a barrier.
fn scales_of(first: vec2u, second: vec2u, subgroup: u32, lane: u32) -> Scales {
#if BY_ROWS
    let own_sizes = vec4u(subgroupMax(first.x), subgroupMax(first.y), subgroupMax(second.x), subgroupMax(second.y));
#else
    let own_sizes = vec4u(subgroupMax(first.x), 0u, subgroupMax(second.x), 0u);
#endif
    if lane == 0u {
        subgroup_sizes[subgroup] = own_sizes;
    }
    workgroupBarrier();
    let other_sizes = subgroup_sizes[lane % SUBGROUPS];
#if BY_ROWS
    let sizes = vec4u(subgroupMax(other_sizes.x), subgroupMax(other_sizes.y), subgroupMax(other_sizes.z), subgroupMax(other_sizes.w));
    return Scales(vec2f(scale_for(sizes.x), scale_for(sizes.z)), are_apart(sizes.xy) || are_apart(sizes.zw));
#else
    return Scales(vec2f(scale_for(subgroupMax(other_sizes.x)), scale_for(subgroupMax(other_sizes.z))), false);
#endif
}

// Which modules are for a query head: 1 if they are those with BY_ROWS.
fn range_of(at: Sequence) -> u32 {
    return rows[range_number(at)].x;
}

#if BY_ROWS
const OURS = 1u;
#else
const OURS = 0u;
#endif

// Sizes of rows: clear_sizes sets them to 0; after a barrier add_size takes the maximum of what threads have of a row.
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

// Gives 1 / scale, if scale is a power of two.
fn inverse(scale: f32) -> f32 {
    return bitcast<f32>((254u << 23u) - bitcast<u32>(scale));
}

// The bits of `rest` that this part holds: the 11 bits that f16 holds; all, and rounded by the conversion, in the last one.
// PART_ROUNDING is half the last bit, or 0 to cut off what is below it, for one instruction less and twice the error. Bits,
// since a compiler may take f32(f16(x)) for x.
fn part_of(rest: f32, part: u32) -> f32 {
    return select(rest, bitcast<f32>((bitcast<u32>(rest) + PART_ROUNDING) & 0xffffe000u), part + 1u < PARTS);
}

fn part4_of(rest: vec4f, part: u32) -> vec4f {
    return vec4f(part_of(rest.x, part), part_of(rest.y, part), part_of(rest.z, part), part_of(rest.w, part));
}

// Stores x in PARTS parts, which lie `size` apart.
fn store_parts(place: u32, size: u32, x: vec4f) {
    var rest = x;
    for (var part = 0u; part < PARTS; part++) {
        let now = part4_of(rest, part);
        tiles[place + part * size] = half4_of(now);
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
