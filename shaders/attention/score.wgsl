// What a score is: scale · q·k, then softcap · tanh(score / softcap), then the user's score_mod, then plus bias and ALiBi. Kernels ask with
// the score's place in the problem. A score whose bias masks it is MASKED.
// Needs: softmax.wgsl, sequence.wgsl, given.wgsl, mods.wgsl. Gives: scored, scored_keys, scored_rows, scored_alone, score_unit, score_factor,
// exponent_bound; with SOFTCAP over_cap, scored_of_tanh, tanh_exact, tanh_of_small, SMALL_FOR_TANH.
//
// Unless SHAPED, a score is a positive factor times what kernels hold: the product q·k, or on matrices that product plus ALiBi over the scale.
// Then score_unit() times what is held is a score, and score_factor() times it is an exponent of 2. With SHAPED kernels hold scores.

struct Scored {
    // The score, and d score / d (scale · q·k).
    score: f32,
    slope: f32,
}

fn scored(dot: f32, at: Sequence, i: i32, j: i32) -> Scored {
    var x = scored_but_bias(dot, at, i, j);
#if BIAS
    let term = bias_of(at, i, j);
    x.score = select(x.score + term, MASKED, term == MASKED);
#endif
    return x;
}

// `scored` less what the bias adds.
fn scored_but_bias(dot: f32, at: Sequence, i: i32, j: i32) -> Scored {
    var x = scored_alone(dot, at, i, j);
#if ALIBI
    x.score += alibi_of(alibi_slope(at), steps_behind(at, i, j));
#endif
    return x;
}

// `scored` less what bias and ALiBi add.
fn scored_alone(dot: f32, at: Sequence, i: i32, j: i32) -> Scored {
#if SOFTCAP
    return scored_of_tanh(tanh_exact(over_cap(dot)), at, i, j);
#else
    return scored_by_mod(Scored(problem.scale * dot, 1.0), at, i, j);
#endif
}

#if SOFTCAP
// What softcap takes tanh of.
fn over_cap(dot: f32) -> f32 {
    return problem.scale * dot * (1.0 / problem.softcap);
}

// scored_alone from t = tanh(over_cap(dot)).
fn scored_of_tanh(t: f32, at: Sequence, i: i32, j: i32) -> Scored {
    return scored_by_mod(Scored(problem.softcap * t, 1.0 - t * t), at, i, j);
}
#endif

// A score and its slope after the user's score_mod, if there is one.
fn scored_by_mod(given: Scored, at: Sequence, i: i32, j: i32) -> Scored {
    var x = given;
#if SCORE_MOD
    // The score and its slope.
    let of_user = mods_score(x.score, mod_position(at, i, j));
    x = Scored(of_user.x, x.slope * of_user.y);
#endif
    return x;
}

struct Scored4 {
    score: vec4f,
    slope: vec4f,
}

// `scored` of keys j .. j + 3 for row i. j is a multiple of four, so that a bias of 16 bits may be read in words.
fn scored_keys(dots: vec4f, at: Sequence, i: i32, j: i32) -> Scored4 {
    let a = scored_but_bias(dots.x, at, i, j);
    let b = scored_but_bias(dots.y, at, i, j + 1);
    let c = scored_but_bias(dots.z, at, i, j + 2);
    let d = scored_but_bias(dots.w, at, i, j + 3);
    var x = scored_four(a, b, c, d);
#if BIAS
    let terms = bias4_of(at, i, j);
    x.score = select(x.score + terms, vec4f(MASKED), terms == vec4f(MASKED));
#endif
    return x;
}

// `scored` of key j for rows i .. i + 3.
fn scored_rows(dots: vec4f, at: Sequence, i: i32, j: i32) -> Scored4 {
    let a = scored(dots.x, at, i, j);
    let b = scored(dots.y, at, i + 1, j);
    let c = scored(dots.z, at, i + 2, j);
    let d = scored(dots.w, at, i + 3, j);
    return scored_four(a, b, c, d);
}

fn scored_four(a: Scored, b: Scored, c: Scored, d: Scored) -> Scored4 {
    return Scored4(vec4f(a.score, b.score, c.score, d.score), vec4f(a.slope, b.slope, c.slope, d.slope));
}

fn score_unit() -> f32 {
#if SHAPED
    return 1.0;
#else
    return problem.scale;
#endif
}

fn score_factor() -> f32 {
    return score_unit() * LOG2_E;
}

// A bound on exponents of 2, score · log2(e), where no product q·k exceeds `largest`, less what is added to scores. It is at most 3e37.
fn exponent_bound(largest: f32) -> f32 {
#if ANY_SIZE
    return 3.0e37;
#else
#if SOFTCAP
    return problem.softcap * LOG2_E;
#else
    let factor = abs(problem.scale) * LOG2_E;
    return factor * min(largest, 3.0e37 / max(factor, 1.0));
#endif
#endif
}

#if SOFTCAP
// tanh to the last bits, whatever the driver's own does. 1 - 2 / (1 + e^2x) cancels near 0. There tanh_of_small is taken.
fn tanh_exact(x: f32) -> f32 {
    let large = 1.0 - 2.0 / (1.0 + exp2(min(x * (2.0 * LOG2_E), 126.0)));
    return select(large, tanh_of_small(x), abs(x) < SMALL_FOR_TANH);
}

// tanh of |x| < SMALL_FOR_TANH by x (1 - x^2 / 3 + ...), the first terms of a series, fitted to these x. It takes no exponential.
const SMALL_FOR_TANH = 0.5;

fn tanh_of_small(x: f32) -> f32 {
    let y = x * x;
    let series = fma(y, fma(y, fma(y, 0.01725693, -0.05305292), 0.13325987), -0.33333148);
    return fma(x * y, series, x);
}
#endif
