// Score, mask and dropout on what a lane holds of a matrix, which has row i0 of the sequence and key j0 in its first element. Queries are
// the matrix's $queries and keys its $keys, each `row` or `column`.
// Needs: attention.wgsl, Lane, layout.wgsl. Gives: ShapedLane, shaped, added_lane, masked; held_delta, held_factor; with
// BF16_MATRICES and BIAS of_what_counts; with DROPOUT Kept, kept_lane, what_is_kept, grad_of_kept.

// The scores (products, unless SHAPED), and d score / d (scale · q·k), from the products and what added_lane gives.
struct ShapedLane {
    score: Lane,
    slope: Lane,
}

fn shaped(x: Lane, added: Lane, at: Sequence, i0: i32, j0: i32, lane: u32) -> ShapedLane {
    var y: ShapedLane;
#if SOFTCAP
    let tanhs = tanhs_of_caps(x);
#endif
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
#if SHAPED
        let i = i0 + held_$queries_place(lane, e);
        let j = j0 + held_$keys_place(lane, e);
#if SOFTCAP
        let of_pair = scored_of_tanh(tanhs[e], at, i, j);
#else
        let of_pair = scored_alone(x[e], at, i, j);
#endif
        y.score[e] = of_pair.score;
#if ADDED
        y.score[e] += added[e];
#if BIAS
#if !SMALL_SCORES
        // The score may be so large that the sum would count.
        y.score[e] = select(y.score[e], MASKED, added[e] < -1.0e30);
#endif
#endif
#endif
        y.slope[e] = of_pair.slope;
#else
        y.score[e] = x[e];
#if ADDED
        y.score[e] += added[e];
#endif
        y.slope[e] = 1.0;
#endif
    }
    return y;
}

#if SOFTCAP
// tanh of scores over the cap, from products. A lane whose scores are all small takes no exponential: the unit for exponentials is the slowest of those
// used here. Lanes may take different branches, and meet again behind them, before the next product of matrices.
fn tanhs_of_caps(x: Lane) -> Lane {
    var y = Lane();
    var largest = 0.0;
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
        y[e] = over_cap(x[e]);
        largest = max(largest, abs(y[e]));
    }
    if largest < SMALL_FOR_TANH {
#unroll
        for (var e = 0u; e < ELEMENTS; e++) {
            y[e] = tanh_of_small(y[e]);
        }
    } else {
#unroll
        for (var e = 0u; e < ELEMENTS; e++) {
            y[e] = tanh_exact(y[e]);
        }
    }
    return y;
}
#endif

// What bias and ALiBi add to the scores of the n-th of the matrices along the keys: below -1e30 for a score that the bias masks. n is a constant
// where loops are written out, by us or by the driver, so that matrices share what depends on the distance of query and key alone. With
// SMALL_SCORES, of products of f16, kernels take the sum as it is, for one operation less: it stays below EMPTY while scale · q·k is below 1e38.
fn added_lane(at: Sequence, i0: i32, j0: i32, n: u32, lane: u32) -> Lane {
    var y = Lane();
#if ALIBI
    // From the first element on, since whole numbers take long to become numbers of f32.
    let steps = steps_behind(at, i0 + held_$queries_place(lane, 0u), j0 + held_$keys_place(lane, 0u));
    // Without SHAPED it is added to products.
    let slope = alibi_slope(at) / score_unit();
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
        y[e] = alibi_of(slope, steps + f32(held_$queries_place(0u, e) - held_$keys_place(0u, e) - i32(n * M)));
    }
#endif
#if BIAS
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
        let i = i0 + held_$queries_place(lane, e);
        let step = n * M + u32(held_$keys_place(0u, e));
        let j = j0 + held_$keys_place(lane, 0u);
        if $keys_next == 0u {
            y[e] += bias_of(at, i, j + i32(step));
        } else if (e & $keys_next) == 0u {
            let of_two = bias2_of(at, i, j, step);
            y[e] += of_two.x;
            y[e | $keys_next] += of_two.y;
        }
    }
#endif
    return y;
}

// x with `value` in place of the scores that do not count.
fn masked(x: Lane, at: Sequence, i0: i32, j0: i32, lane: u32, value: f32) -> Lane {
    var y = x;
#unroll
    for (var e = 0u; e < ELEMENTS; e++) {
        let i = i0 + held_$queries_place(lane, e);
        let j = j0 + held_$keys_place(lane, e);
        if $keys_next == 0u {
            y[e] = select(value, x[e], keep(at, i, j));
        } else if (e & $keys_next) == 0u {
            let of_two = keep2(at, i, j);
            y[e] = select(value, x[e], of_two.x);
            y[e | $keys_next] = select(value, x[e | $keys_next], of_two.y);
        }
    }
    return y;
}

#if BF16_MATRICES
#if BIAS
// exp2 of anything below this is 0 in f32.
const VANISHES = -150.0;

// The gradient y of a probability 2^x, or 0 where the probability vanishes. A bias of -infinity may mask the key there, and the key's value may be as
// large as bf16 has it. Then y is infinite, and y times a probability of 0 would be NaN.
fn of_what_counts(y: f32, x: f32) -> f32 {
    return select(y, 0.0, x < VANISHES);
}
#endif
#endif

#if DROPOUT
// Which of a lane's probabilities are kept.
alias Kept = array<bool, ELEMENTS>;

// A call of the generator has bytes for matrices that lie side by side along the keys, as far as they lie in one block of 32 keys. A
// subgroup asks about $together keys at a time, from a multiple of that on: so many matrices share calls, in runs of that length.
const SHARING = min(((($together) ^ (($together) - 1u)) + 1u) / 2u, 32u) / M;
// The bytes of the calls for the matrices of a run, by the first element of a matrix that has a byte of the call.
var<private> bytes_of_calls: array<vec4u, ELEMENTS>;

// The number of an element's byte in its call, and the number of that call. Both leave out what the lane adds.
fn byte_number(e: u32) -> u32 {
    return dropout_byte(u32(held_$queries_place(0u, e)), u32(held_$keys_place(0u, e)));
}

fn call_number(e: u32) -> i32 {
    return 4 * (held_$queries_place(0u, e) % 8) + held_$keys_place(0u, e) % 8 / 2;
}

// Sets the bytes of the calls of which a matrix has its first byte in element a. Where a lane holds two queries in a row of one key, its neighbour
// along the keys needs both calls too: each makes one of them, and gives it to its neighbour.
fn find_bytes(at: Sequence, i0: i32, j0: i32, a: u32, lane: u32) {
    let i = u32(i0 + held_$queries_place(lane, a));
    let j = u32(j0 + held_$keys_place(lane, a));
    if $keys_next > 0u || $queries_next == 0u {
        bytes_of_calls[a] = dropout_bytes(at, i, j);
    } else if (a & $queries_next) == 0u {
        let second = $keys_bit_0(lane, 0u);
        let own = dropout_bytes(at, i + second, j);
        let neighbours = subgroupShuffleXor(own, $keys_lane);
        bytes_of_calls[a] = select(own, neighbours, second == 1u);
        bytes_of_calls[a | $queries_next] = select(neighbours, own, second == 1u);
    }
}

// Of the n-th of the matrices along $together keys. A caller asks about all of them in their order, with one i0, or $together is M.
fn kept_lane(at: Sequence, i0: i32, j0: i32, n: u32, lane: u32) -> Kept {
    var kept = Kept();
#unroll
    for (var a = 0u; a < ELEMENTS; a++) {
        if byte_number(a) == 0u {
            if n % SHARING == 0u {
                find_bytes(at, i0, j0, a, lane);
            }
            let bytes = bytes_of_calls[a];
#if MATRIX16
            // A matrix has one half of the words. Where calls are shared n says which half: a constant, where loops are written out.
            let half = select(u32(j0) % 32u / 16u, n % 2u, SHARING == 2u);
            let words = select(bytes.xy, bytes.zw, half == 1u);
#else
            let word = bytes[u32(j0) % 32u / 8u];
#endif
#unroll
            for (var e = 0u; e < ELEMENTS; e++) {
                if call_number(e) == call_number(a) {
#if MATRIX16
                    let word = select(words.x, words.y, $keys_bit_3(lane, e) == 1u);
                    let row = $queries_bit_3(lane, e);
#else
                    let row = u32(i0) % 16u / 8u;
#endif
                    kept[e] = is_byte_kept(word, 2u * row + $keys_bit_0(lane, e));
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

// The gradient of the probabilities before dropout, from that of what dropout leaves. A kernel that holds gradients of scores without the factor
// dropout_scale, for one multiplication less, takes what_is_kept instead, with held_delta and held_factor.
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

// delta as gradients of scores need it that are held without the factor dropout_scale, and that factor.
fn held_delta(delta: f32) -> f32 {
#if DROPOUT
    return delta / problem.dropout_scale;
#else
    return delta;
#endif
}

fn held_factor() -> f32 {
#if DROPOUT
    return problem.dropout_scale;
#else
    return 1.0;
#endif
}

// Row and column of an element: what the lane adds, plus what the element's number adds, which is a constant.
fn held_row_place(lane: u32, e: u32) -> i32 {
    return i32(row_of(lane, 0u) + row_of(0u, e));
}

fn held_column_place(lane: u32, e: u32) -> i32 {
    return i32(column_of(lane, 0u) + column_of(0u, e));
}
