// The hooks: everything that tells one variant of attention from another. Kernels know no mask by name.
// Rows i and keys j are positions in the whole sequence.

// What a score is: scale · q·k, then softcap · tanh(score / softcap).
fn score(dot: f32, at: Sequence, i: i32, j: i32) -> f32 {
#if SOFTCAP
    return problem.softcap * tanh_exact(problem.scale * dot / problem.softcap);
#else
    return problem.scale * dot;
#endif
}

// The same in parts: the sign that Q takes on, the shape, and the size, never negative.
// score(dot) = score_size() · score_shape(score_sign() · dot). Unless SHAPED, a shape is the product itself. With a TINY_SCALE, 0
// included, the shape is the score itself: a factor so small, times the difference of a masked and a real product, would not make the
// masked one vanish.
fn score_sign() -> f32 {
    return select(1.0, -1.0, problem.scale < 0.0);
}

fn score_shape(dot: f32) -> f32 {
#if SOFTCAP
    return tanh_exact(abs(problem.scale) * dot / problem.softcap);
#else
#if TINY_SCALE
    return abs(problem.scale) * dot;
#else
    return dot;
#endif
#endif
}

fn score_size() -> f32 {
#if SOFTCAP
    return problem.softcap;
#else
#if TINY_SCALE
    return 1.0;
#else
    return abs(problem.scale);
#endif
#endif
}

// What makes shaped scores exponents of 2, for a kernel that takes its exponents in one fma.
fn score_factor() -> f32 {
    return score_size() * LOG2_E;
}

// The derivative of score in dot is problem.scale times this, of a score's shape.
fn score_slope(shape: f32) -> f32 {
#if SOFTCAP
    return 1.0 - shape * shape;
#else
    return 1.0;
#endif
}

#if SOFTCAP
// tanh that neither overflows for large x nor cancels for small x, whatever the driver's own does.
fn tanh_exact(x: f32) -> f32 {
    let a = abs(x);
    let e = exp2(min(a, 20.0) * (-2.0 * LOG2_E));
    let large = (1.0 - e) / (1.0 + e);
    let y = x * x;
    let small = a * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))));
    return sign(x) * select(large, small, a < 0.25);
}
#endif

// Which keys count for row i, if it is a query: from x to before y. Neither bound falls as i grows.
fn key_interval(at: Sequence, i: i32) -> vec2i {
    let diagonal = i + at.keys - at.queries;
    let first = max(0, diagonal - problem.window_left);
    let last = min(diagonal + problem.window_right, i + problem.top_left);
    return vec2i(first, min(at.keys, last + 1));
}

// Does key j count for row i?
fn keep(at: Sequence, i: i32, j: i32) -> bool {
    let interval = key_interval(at, i);
#if QUERY_LENGTHS
    if i >= at.queries {
        return false;
    }
#endif
    return j >= interval.x && j < interval.y;
}

// The keys that any of rows i0 .. i1 may see; the others are never loaded.
fn key_range(at: Sequence, i0: i32, i1: i32) -> vec2i {
#if QUERY_LENGTHS
    if i0 >= at.queries {
        return vec2i();
    }
    return vec2i(key_interval(at, i0).x, key_interval(at, min(i1, at.queries) - 1).y);
#else
    return vec2i(key_interval(at, i0).x, key_interval(at, i1 - 1).y);
#endif
}

// The rows that may see any of keys j0 .. j1; the others are never loaded.
fn row_range(at: Sequence, j0: i32, j1: i32) -> vec2i {
    // The row of which key 0 is the diagonal.
    let zero = at.queries - at.keys;
    let first = max(0, max(zero + j0 - problem.window_right, j0 - problem.top_left));
    let end = min(at.queries, zero + min(j1, at.keys) + problem.window_left);
    return select(vec2i(first, end), vec2i(), j0 >= at.keys);
}

// The keys that count for each of rows i0 .. i1. None do if a row is no query.
fn full_range(at: Sequence, i0: i32, i1: i32) -> vec2i {
#if QUERY_LENGTHS
    if i1 > at.queries {
        return vec2i(key_range(at, i0, i1).x);
    }
#endif
    return vec2i(key_interval(at, i1 - 1).x, key_interval(at, i0).y);
}

// Do all scores of rows i0 .. i1 with keys j0 .. j1 count? Then none of them needs to be asked about.
fn tile_is_full(at: Sequence, i0: i32, i1: i32, j0: i32, j1: i32) -> bool {
    let counting = full_range(at, i0, i1);
    return j0 >= counting.x && j1 <= counting.y;
}
