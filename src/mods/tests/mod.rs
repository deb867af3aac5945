//! Values and slopes on the host against differences, and what kernels are given against both.

use super::*;

mod texts;

const AT: [u32; 6] = [1, 2, 5, 3, 9, 12];

fn parse(text: &str) -> Mods {
    Mods::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// `score_mod` with this body.
fn of_body(body: &str) -> Mods {
    parse(&format!("fn score_mod(score: f32, at: Position) -> f32 {{\n{body}\n}}"))
}

/// A function that kernels call, of the text that they include, run on the host: in f64, too.
fn printed(mods: &Mods, function: &str, arguments: Vec<Value>, buffers: &[(String, Vec<u8>)]) -> Value {
    let module = naga::front::wgsl::parse_str(mods.printed()).unwrap();
    let (function, _) = module.functions.iter().find(|(_, f)| f.name.as_deref() == Some(function)).unwrap();
    let name = |variable: &naga::GlobalVariable| variable.name.clone().unwrap_or_default();
    let contents: Vec<&[u8]> = module
        .global_variables
        .iter()
        .map(|(_, variable)| {
            let found =
                buffers.iter().find(|(given, _)| name(variable).trim_end_matches('_') == format!("user_{given}"));
            found.map_or(&[][..], |(_, contents)| contents)
        })
        .collect();
    Run::new(&module, &contents).call(function, arguments).unwrap()
}

fn printed_score(mods: &Mods, score: f64, buffers: &[(String, Vec<u8>)]) -> [f64; 2] {
    let result = printed(mods, "mods_score", vec![Value::Float(Number::new(score)), position(AT)], buffers);
    [0, 1].map(|n| result.components()[n].float().value)
}

fn close(x: f64, y: f64, most: f64) -> bool {
    (x - y).abs() <= most * (1.0 + y.abs())
}

/// The slope of the score on the host is the one of differences, and kernels are given the same.
fn check(mods: &Mods, scores: &[f64], text: &str) {
    for &score in scores {
        let [value, slope] = mods.score(score, AT, &[]);
        let step = 1e-6;
        let [above, below] = [score + step, score - step].map(|score| mods.score(score, AT, &[])[0]);
        let difference = (above - below) / (2.0 * step);
        assert!(close(slope, difference, 1e-7), "{text} at {score}: {slope}, by differences {difference}");
        let [again, its_slope] = printed_score(mods, score, &[]);
        let both = close(again, value, 1e-6) && close(its_slope, slope, 1e-6);
        assert!(both, "{text} at {score}: kernels have {again}, {its_slope}, not {value}, {slope}\n{}", mods.printed());
    }
}

/// Each rule, on numbers and on vectors, with an operand that depends on the score in each place.
#[test]
fn slopes_are_those_of_differences() {
    let everywhere: &[f64] = &[-2.3, -0.7, 0.1, 0.6, 1.9];
    let inside: &[f64] = &[-0.8, -0.1, 0.3, 0.7];
    let positive: &[f64] = &[0.2, 0.9, 1.4, 3.0];
    let cases: &[(&[f64], &[&str])] = &[
        (
            everywhere,
            &[
                "x + 2.0 * x - 3.0",
                "-x",
                "x * x * x",
                "1.5 - x / 3.0",
                "2.0 / (x + 5.0)",
                "(x * x) / (x + 5.0)",
                "(x * 3.0) % 2.0",
                "7.0 % (x + 5.0)",
                "abs(x)",
                "sign(x) * x",
                "min(x, 0.3)",
                "max(0.2 * x, x * x)",
                "min(2.0, exp(x))",
                "clamp(x, -0.5, 0.5)",
                "clamp(0.3, x, 5.0)",
                "clamp(0.3, -5.0, x)",
                "saturate(x)",
                "sin(x)",
                "cos(2.0 * x)",
                "tan(0.3 * x)",
                "sinh(x)",
                "cosh(x)",
                "tanh(x)",
                "tanh(0.1 * x)",
                "atan(x)",
                "asinh(x)",
                "atan2(x, 1.5)",
                "atan2(1.5, x)",
                "atan2(x, x + 4.0)",
                "radians(x) + degrees(x)",
                "exp(x)",
                "exp2(x)",
                "fract(x)",
                "floor(x) + ceil(x) + round(x) + trunc(x) + step(0.2, x)",
                "fma(x, 2.0, x * x)",
                "fma(3.0, x, 1.0)",
                "mix(x, 2.0, 0.3)",
                "mix(1.0, x, 0.3)",
                "mix(1.0, 3.0, x)",
                "mix(x, x * x, x)",
                "smoothstep(-1.0, 2.0, x)",
                "smoothstep(x - 1.0, 2.0, 0.5)",
                "smoothstep(-1.0, x + 4.0, 0.5)",
                "ldexp(x, 3)",
                "select(x, x * x, x > 0.3)",
                "select(1.0, x, at.j < at.i)",
                "pow(2.0, x)",
                "f32(i32(x)) + f32(u32(x)) + f32(bool(x))",
            ],
        ),
        (inside, &["asin(x)", "acos(x)", "atanh(x)"]),
        (positive, &["log(x)", "log2(x)", "sqrt(x)", "inverseSqrt(x)", "pow(x, 2.5)", "pow(x, x)", "acosh(x + 1.0)"]),
        (
            everywhere,
            &[
                "dot(vec2f(x, 2.0), vec2f(3.0, x))",
                "dot(vec3f(1.0, x, x * x), vec3f(1.0, 2.0, 3.0))",
                "length(vec3f(x, 1.0, 2.0))",
                "length(x)",
                "distance(vec2f(x, 1.0), vec2f(0.3, x))",
                "distance(x, 5.0)",
                "normalize(vec3f(x, 1.0, 2.0)).y",
                "cross(vec3f(x, 1.0, 2.0), vec3f(0.5, x, 1.0)).z",
                "dot(sin(vec4f(x)), vec4f(1.0, 2.0, 3.0, 4.0))",
                "dot(min(vec2f(x, -x), vec2f(0.15, 0.2)), vec2f(1.0, 2.0))",
                "dot(clamp(vec2f(x), vec2f(-0.5), vec2f(0.25)), vec2f(1.0, 2.0))",
                "dot(select(vec2f(x, 1.0), vec2f(2.0 * x), vec2<bool>(x > 0.0, true)), vec2f(1.0, 2.0))",
                "dot(mix(vec2f(x), vec2f(1.0, 2.0), 0.3), vec2f(1.0))",
                "dot(mix(vec2f(1.0), vec2f(1.0, 2.0), x), vec2f(1.0))",
                "dot(mix(vec2f(1.0, x), vec2f(1.0, 2.0), vec2f(x)), vec2f(1.0, 3.0))",
                "dot(smoothstep(vec2f(-1.0), vec2f(2.0), vec2f(x, 0.5)), vec2f(1.0))",
                "dot(tanh(vec2f(x, 0.1 * x)), vec2f(1.0, 2.0))",
                "dot(saturate(vec2f(x, x * x)), vec2f(1.0, 2.0))",
                "vec4f(x, 2.0 * x, 3.0, 4.0).yxwz.x + vec4f(1.0, x, x, x)[at.b]",
                "(2.0 * vec2f(x, 1.0) * x).x + (vec2f(1.0, 2.0) / (x + 5.0)).y",
                "(mat2x2f(1.0, 2.0, 3.0, 4.0) * vec2f(x, x * x)).y",
                "(vec2f(x, x * x) * mat2x2f(1.0, 2.0, 3.0, 4.0)).x",
                "dot(vec3f(x) % vec3f(0.9, 5.0, 6.0), vec3f(1.0))",
            ],
        ),
    ];
    for (scores, expressions) in cases {
        for expression in *expressions {
            check(&of_body(&format!("let x = score; return {expression};")), scores, expression);
        }
    }
}

/// Functions on whole numbers, bits and truth values have WGSL's values, on the host and in the text that kernels include. Query 5 and key 3.
#[test]
fn values_without_a_slope() {
    let negative = "(2 - i32(at.i))"; // -3
    for (expression, expected) in [
        ("f32(countOneBits(at.i))", 2.0),
        ("f32(countLeadingZeros(at.i))", 29.0),
        ("f32(countTrailingZeros(at.i + 3u))", 3.0),
        ("f32(countTrailingZeros(at.i - 5u))", 32.0),
        ("f32(reverseBits(at.i) >> 28u)", 10.0),
        ("f32(firstLeadingBit(at.i))", 2.0),
        ("f32(firstLeadingBit(NEGATIVE))", 1.0),
        ("f32(i32(firstLeadingBit(at.i - 5u)))", -1.0),
        ("f32(firstTrailingBit(at.i + 3u))", 3.0),
        ("f32(extractBits(at.i * 16u, 4u, 2u))", 1.0),
        ("f32(extractBits(i32(at.i) * 16, 4u, 3u))", -3.0),
        ("f32(extractBits(at.i, 40u, 3u))", 0.0),
        ("f32(insertBits(at.i, at.j, 4u, 2u))", 53.0),
        ("f32(abs(NEGATIVE) + sign(NEGATIVE) * 10)", -7.0),
        ("f32(clamp(NEGATIVE, -2, 4) + min(NEGATIVE, 1) + max(NEGATIVE, 1))", -4.0),
        ("f32(clamp(at.i, 1u, 4u) + min(at.i, 3u) + max(at.i, 9u))", 16.0),
        ("f32(at.i ^ 3u) + f32(at.i & 4u) + f32(at.i | 2u) + f32(~at.i >> 30u)", 20.0),
        ("f32(NEGATIVE >> 1u) + f32(NEGATIVE / 2) + f32(NEGATIVE % 2)", -4.0),
        ("f32(dot(vec2u(at.i, at.j), vec2u(2u, 3u)))", 19.0),
        ("unpack2x16float(0x3c00u + at.i - 5u).x", 1.0),
        ("unpack2x16unorm(0xffffu + at.i - 5u).x", 1.0),
        ("unpack2x16snorm(0x80010000u + at.i - 5u).y", -1.0),
        ("unpack4x8unorm(0xff00u + at.i - 5u).y", 1.0),
        ("unpack4x8snorm(0x81u + at.i - 5u).x", -1.0),
        ("f32(any(vec2<bool>(at.i == 5u, at.j == 5u))) + 2.0 * f32(all(vec2<bool>(at.i == 5u, at.j == 5u)))", 1.0),
        ("f32(all(vec2<bool>(at.i == 5u, at.j == 3u))) + 2.0 * f32(any(vec2<bool>(at.i == 4u, at.j == 5u)))", 1.0),
        ("transpose(mat2x3f(1.0, 2.0, 3.0, 4.0, f32(at.i), 6.0))[1].y", 5.0),
        ("reflect(vec2f(1.0, f32(at.i)), vec2f(0.0, 1.0)).y", -5.0),
        ("faceForward(vec2f(1.0, 2.0), vec2f(f32(at.i), 0.0), vec2f(1.0, 0.0)).y", -2.0),
    ] {
        let expression = expression.replace("NEGATIVE", negative);
        let mods = of_body(&format!("return score + {expression};"));
        for score in [0.0, 0.5] {
            let expected = [score + expected, 1.0];
            assert_eq!(mods.score(score, AT, &[]), expected, "{expression}");
            assert_eq!(printed_score(&mods, score, &[]), expected, "{expression}: what kernels have");
        }
    }
    // Its differences are 0 or large. What is computed with the rounded value learns as if nothing were rounded.
    let mods = of_body("return 3.0 * quantizeToF16(score);");
    for (score, expected) in [(1.0 / 3.0, 3.0 * 0.333251953125), (-0.5, -1.5)] {
        assert_eq!(mods.score(score, AT, &[]), [expected, 3.0]);
        assert_eq!(printed_score(&mods, score, &[]), [expected, 3.0]);
    }
}

/// Variables, branches, loops and calls.
#[test]
fn slopes_follow_statements() {
    let scores = &[-2.3, -0.7, 0.1, 0.6, 1.9];
    for body in [
        "var x = score; x = x * x; x += 1.0; return x;",
        "var x: f32; if score > 0.5 { x = score * 3.0; } else if score > 0.0 { x = 2.0; } return x + score;",
        "var x = 1.0; for (var n = 0u; n < at.i; n++) { x = x * (0.3 + 0.1 * score); } return x;",
        "var x = score; loop { x = x * 0.5 + 0.1; if x < 0.2 { break; } continuing { x -= 0.01; } } return x;",
        "var x = score; var n = 0; while n < 4 { n++; if n == 2 { continue; } x = sin(x) + score; } return x;",
        "var x = score; loop { x = 0.5 * x; continuing { x += 0.25; break if x < 0.6; } } return x;",
        "switch at.j { case 3u: { return score * score; } case 1u, 2u: { return 1.0; } default: { return score; } }",
        "switch i32(at.b) { case 0: { return 1.0; } default: { if score > 0.0 { break; } return 2.0; } } return 3.0 * score;",
        "var v = vec3f(1.0, 2.0, 3.0); v.y = score; v[at.b + 1u] = score * score; v *= 2.0; return v.x + v.y * v.z;",
        "var v: vec2f; v = vec2f(score); let p = &v; (*p).x = (*p).y * 3.0; return v.x * v.y;",
        // A variable whose slope is 0 again.
        "var x = score * score; if score > 0.3 { x = 4.0; } return x * score;",
        // What was computed in an iteration reaches the next one.
        "var x = 0.0; var y = 0.0; for (var n = 0; n < 3; n++) { x = y; y = y + score; } return x * x;",
        "return score; ",
        "return 3.0;",
        "let a = array<f32, 3>(1.0, 2.0, 3.0); var sum = 0.0; for (var n = 0; n < 3; n++) { sum += a[n] * score; } return sum;",
        "const factor = 2.5; let ab = vec2f(factor, 1.0); return dot(ab, vec2f(score, score * score));",
    ] {
        check(&of_body(body), scores, body);
    }
    let text = "
        const factor = vec2f(0.5, 2.0);
        struct Pair { first: f32, second: u32 }
        fn square(x: f32) -> f32 { return x * x; }
        fn twist(v: vec3f, n: u32, scale: f32) -> vec3f { return v.zxy * scale + vec3f(f32(n)); }
        fn bend(v: vec2f) -> vec2f { return v * v; }
        fn round_trip(v: vec4f) -> vec4f { return v.wzyx; }
        fn passive(p: ptr<function, f32>, x: f32) { *p = *p + x; }
        fn whole(x: f32) -> i32 { return i32(x); }
        fn pair(n: u32) -> Pair { return Pair(f32(n), n + 1u); }
        fn score_mod(score: f32, at: Position) -> f32 {
            var extra = 1.0;
            passive(&extra, 2.0);
            let v = twist(vec3f(score, square(score), 1.0), at.i, 0.5) + twist(vec3f(1.0), at.j, score);
            let w = bend(vec2f(score, 3.0)) * factor;
            let z = round_trip(vec4f(score, 1.0, 2.0, square(2.0)));
            let both = pair(at.b);
            return square(v.x + v.y) * v.z + extra * score + w.x * w.y + z.w + f32(whole(score)) + both.first * score;
        }
    ";
    check(&parse(text), scores, text);
}

/// At corners: what PyTorch does.
#[test]
fn slopes_at_corners() {
    for (expression, score, slope) in [
        ("abs(score)", 0.0, 0.0),
        ("min(score, 2.0)", 2.0, 0.5),
        ("max(2.0, score)", 2.0, 0.5),
        ("min(score, score)", 2.0, 1.0),
        ("clamp(score, 1.0, 2.0)", 2.0, 1.0),
        ("clamp(score, 1.0, 2.0)", 1.0, 1.0),
        ("clamp(score, 1.0, 2.0)", 2.5, 0.0),
        ("saturate(score)", 0.0, 1.0),
        ("length(vec2f(score, 0.0))", 0.0, 0.0),
        ("distance(score, 1.0)", 1.0, 0.0),
        ("normalize(vec2f(score, 0.0)).x", 0.0, 0.0),
        ("floor(score)", 1.0, 0.0),
        ("sign(score)", 0.0, 0.0),
        ("pow(2.0, score - 1.0) * 0.0", 1.0, 0.0),
        ("pow(score - score, 2.0 + score)", 1.0, 0.0),
    ] {
        let mods = of_body(&format!("return {expression};"));
        let [_, on_host] = mods.score(score, AT, &[]);
        let [_, of_kernels] = printed_score(&mods, score, &[]);
        let is_nan = expression.starts_with("normalize");
        assert!(on_host == slope || is_nan && on_host.abs() < 1e-9, "{expression}: {on_host}, not {slope}");
        assert!(of_kernels == slope, "{expression}: kernels have {of_kernels}, not {slope}");
    }
}

#[test]
fn a_slope_by_hand_takes_the_place_of_the_derived_one() {
    let text = "fn score_mod(score: f32, at: Position) -> f32 { return f32(bitcast<u32>(score) & 0xffu) + score; }
        fn score_mod_slope(score: f32, at: Position) -> f32 { return 7.0 * score; }";
    let mods = parse(text);
    assert_eq!(mods.score(2.0, AT, &[])[1], 14.0);
    assert_eq!(printed_score(&mods, 2.0, &[])[1], 14.0);
}

#[test]
fn buffers_are_read_within_their_bounds() {
    let text = "
        var<storage, read> floats: array<f32>;
        var<storage, read> ints: array<i32>;
        var<storage, read> words: array<u32>;
        fn score_mod(score: f32, at: Position) -> f32 {
            return score * floats[at.i] + floats[i32(at.h) - 4] + floats[7] + f32(ints[at.j - 100u]) + f32(arrayLength(&ints));
        }
        fn mask_mod(at: Position) -> bool {
            var table = array<u32, 3>(1, 2, 3);
            return words[at.b] == 6u && table[at.keys] == 3u && vec2u(4u, 5u)[at.j] == 5u;
        }
    ";
    let mods = parse(text);
    assert!(mods.buffers().eq(["floats", "ints", "words"]) && mods.has_score_mod() && mods.has_mask_mod());
    let floats: Vec<u8> = [1.5f32, 2.5, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let ints: Vec<u8> = [-7i32, -3].iter().flat_map(|x| x.to_le_bytes()).collect();
    let words: Vec<u8> = [5u32, 6].iter().flat_map(|x| x.to_le_bytes()).collect();
    let buffers = [("words", words), ("floats", floats), ("ints", ints)].map(|(name, bytes)| (name.to_string(), bytes));
    // 2 · 4 + 4 + 4 - 3 + 2: each index is past the end.
    assert_eq!(mods.score(2.0, AT, &buffers), [15.0, 4.0]);
    assert_eq!(printed_score(&mods, 2.0, &buffers), [15.0, 4.0]);
    assert!(mods.keep(AT, &buffers));
    assert!(matches!(printed(&mods, "mods_keep", vec![position(AT)], &buffers), Value::Bool(true)));
    for n in 0..3 {
        let name = ["user_floats", "user_ints", "user_words"][n];
        let ty = ["f32", "i32", "u32"][n];
        let declared =
            format!("@group(0) @binding({}) var<storage, read> {name}: array<{ty}>;", FIRST_BINDING + n as u32);
        assert!(mods.printed().contains(&declared), "{}", mods.printed());
    }
    // The kernels' text itself has a bound at each index.
    assert_eq!(mods.printed().matches("arrayLength").count(), 6, "{}", mods.printed());
}

#[test]
fn whole_numbers_divide_as_wgsl_says() {
    let text = "fn mask_mod(at: Position) -> bool {
        let zero = at.b - 1u; let minus = i32(zero) - 1; let least = i32(0x80000000u + zero);
        let v = vec2i(7, least) / vec2i(i32(zero), minus);
        return at.i / zero == 5u && at.i % zero == 0u && least / minus == least && least % minus == 0
            && v.x == 7 && v.y == least && -7 / (minus * 2) == 3 && -7 % (minus * 2) == -1;
    }";
    let mods = parse(text);
    assert!(mods.keep(AT, &[]));
    assert!(matches!(printed(&mods, "mods_keep", vec![position(AT)], &[]), Value::Bool(true)), "{}", mods.printed());
}

#[test]
fn loops_end() {
    let text = "
        fn again(n: u32) -> u32 { var x = n; loop { x += 1u; if x == 0u { break; } } return x; }
        fn mask_mod(at: Position) -> bool {
            var n = 0u;
            while true { n += 1u; if again(n) == 7u { n = 0u; } }
            return n > 0u;
        }
    ";
    let mods = parse(text);
    assert!(mods.keep(AT, &[]));
    assert!(matches!(printed(&mods, "mods_keep", vec![position(AT)], &[]), Value::Bool(true)));
    assert_eq!(mods.printed().matches("65536u").count(), 2);
}
