// Score and mask on what a lane holds of a matrix, which has row i0 of the sequence and key j0 in its first element. Queries are the matrix's
// $queries and keys its $keys, each `row` or `column`.
// Needs: attention.wgsl, Lane, layout.wgsl. Gives: ShapedLane, shaped, masked.

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

// Row and column of an element: what the lane adds, plus what the element's number adds, which is a constant.
fn held_row_place(lane: u32, e: u32) -> i32 {
    return i32(row_of(lane, 0u) + row_of(0u, e));
}

fn held_column_place(lane: u32, e: u32) -> i32 {
    return i32(column_of(lane, 0u) + column_of(0u, e));
}
