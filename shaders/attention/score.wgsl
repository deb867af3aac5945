// What a score is: scale · q·k, then softcap · tanh(score / softcap), then the user's score_mod, then plus bias and ALiBi. Kernels ask with
// the score's place in the problem. A score whose bias masks it is MASKED.
// Needs: softmax.wgsl, sequence.wgsl, given.wgsl, mods.wgsl. Gives: scored, scored4, score_unit, score_factor, exponent_bound.
//
// Unless SHAPED, a score is a positive factor times the product q·k, and kernels may hold products instead of scores. Then score_unit()
// times a product is a score, and score_factor() times a product is an exponent of 2. With SHAPED kernels hold scores.

struct Scored {
    // The score, and d score / d (scale · q·k).
    score: f32,
    slope: f32,
}

fn scored(dot: f32, at: Sequence, i: i32, j: i32) -> Scored {
    var x = Scored(problem.scale * dot, 1.0);
#if SOFTCAP
    let t = tanh_exact(x.score / problem.softcap);
    x = Scored(problem.softcap * t, 1.0 - t * t);
#endif
#if SCORE_MOD
    // The score and its slope.
    let of_user = mods_score(x.score, mod_position(at, i, j));
    x = Scored(of_user.x, x.slope * of_user.y);
#endif
#if ALIBI
    x.score -= alibi_slope_of(at) * f32(abs(i + at.keys - at.queries - j));
#endif
#if BIAS
    let term = bias_of(at, i, j);
    x.score = select(x.score + term, MASKED, term == MASKED);
#endif
    return x;
}

struct Scored4 {
    score: vec4f,
    slope: vec4f,
}

fn scored4(dots: vec4f, at: Sequence, i: vec4i, j: vec4i) -> Scored4 {
    let a = scored(dots.x, at, i.x, j.x);
    let b = scored(dots.y, at, i.y, j.y);
    let c = scored(dots.z, at, i.z, j.z);
    let d = scored(dots.w, at, i.w, j.w);
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
