// Score, mask and dropout on what a lane holds of a matrix, which has row i0 of the sequence and key j0 in its first element. Queries are
// the matrix's $queries and keys its $keys, each `row` or `column`.
// Needs: attention.wgsl, Lane, layout.wgsl. Gives: ShapedLane, shaped, masked; with DROPOUT Kept, kept_lane, what_is_kept, grad_of_kept.

// The scores (products as they are, unless SHAPED), and d score / d (scale · q·k).
struct ShapedLane {
    score: Lane,
    slope: Lane,
}

fn shaped(x: Lane, at: Sequence, i0: i32, j0: i32, lane: u32) -> ShapedLane {
    var y: ShapedLane;
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
#if SHAPED
        let of_pair = scored(x[e], at, i0 + held_$queries_place(lane, e), j0 + held_$keys_place(lane, e));
        y.score[e] = of_pair.score;
        y.slope[e] = of_pair.slope;
#else
        y.score[e] = x[e];
        y.slope[e] = 1.0;
#endif
    }
    return y;
}

// x with `value` in place of the scores that do not count.
fn masked(x: Lane, at: Sequence, i0: i32, j0: i32, lane: u32, value: f32) -> Lane {
    var y = x;
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
        let counts = keep(at, i0 + held_$queries_place(lane, e), j0 + held_$keys_place(lane, e));
        y[e] = select(value, x[e], counts);
    }
    return y;
}

#if DROPOUT
// Which of a lane's probabilities are kept.
alias Kept = array<bool, ELEMENTS>;

// A call of the generator has bytes for matrices that lie side by side along the keys, as far as they lie in one block of 32 keys. A
// subgroup asks about $together keys at a time, from a multiple of that on: so many matrices share calls, in turns of that length.
const SHARING = min(((($together) ^ (($together) - 1u)) + 1u) / 2u, 32u) / M;
// The bytes of the calls for the matrices of a turn, by the first element of a matrix that has a byte of the call.
var<private> bytes_of_calls: array<vec4u, ELEMENTS>;

// The number of a lane's byte among those of its call, as far as a place in the matrix decides; and that of an element's call.
fn byte_number(lane: u32, e: u32) -> u32 {
    return dropout_byte(u32(held_$queries_place(lane, e)), u32(held_$keys_place(lane, e)));
}

fn call_number(e: u32) -> i32 {
    return 4 * (held_$queries_place(0u, e) % 8) + held_$keys_place(0u, e) % 8 / 2;
}

// Of the n-th of the matrices along $together keys. A caller asks about all of them in their order, with one i0, or $together is M.
fn kept_lane(at: Sequence, i0: i32, j0: i32, n: u32, lane: u32) -> Kept {
    var kept = Kept();
#unroll
    for (var a = 0u; a < ELEMENTS; a++) {
        if byte_number(0u, a) == 0u {
            if n % SHARING == 0u {
                let i = u32(i0 + held_$queries_place(lane, a));
                bytes_of_calls[a] = dropout_bytes(at, i, u32(j0 + held_$keys_place(lane, a)));
            }
            let bytes = bytes_of_calls[a];
#if MATRIX16
            // A matrix has one half of the words, and begins at byte 0. Where calls are shared n says which half: a constant, where loops are
            // written out.
            let half = select(u32(j0) % 32u / 16u, n % 2u, SHARING == 2u);
            let words = select(bytes.xy, bytes.zw, half == 1u);
            let first = 0u;
#else
            let words = vec2u(bytes[u32(j0) % 32u / 8u]);
            let first = dropout_byte(u32(i0), 0u);
#endif
#unroll
            for (var e = 0u; e < ELEMENTS; e++) {
                if call_number(e) == call_number(a) {
                    let byte = first + byte_number(lane, 0u) + byte_number(0u, e);
                    kept[e] = is_byte_kept(words[byte / 4u], byte % 4u);
                }
            }
        }
    }
    return kept;
}

// x with 0 in place of what is dropped.
fn what_is_kept(x: Lane, kept: Kept) -> Lane {
    var y = x;
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
        y[e] = select(0.0, x[e], kept[e]);
    }
    return y;
}

// The gradient of the probabilities before dropout, from that of what dropout leaves.
fn grad_of_kept(x: Lane, kept: Kept) -> Lane {
    var y = x;
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
#if BY_ROWS
        // Of a pair that does not count it may be as large as NO_KEYS, and must stay finite.
        let most = NO_KEYS / problem.dropout_scale;
        y[e] = select(0.0, clamp(x[e], -most, most) * problem.dropout_scale, kept[e]);
#else
        y[e] = select(0.0, x[e] * problem.dropout_scale, kept[e]);
#endif
    }
    return y;
}
#endif

// Row and column of an element: what the lane adds, plus what the element's number adds, which is a constant.
fn held_row_place(lane: u32, e: u32) -> i32 {
    return i32(row_of(lane, 0u) + row_of(0u, e));
}

fn held_column_place(lane: u32, e: u32) -> i32 {
    return i32(column_of(lane, 0u) + column_of(0u, e));
}
