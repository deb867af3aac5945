//! What is wrong with texts, their names, and when they are equal.

use super::{Mods, parse};

/// Where the error is, and a word of it.
#[test]
fn errors_say_where_and_why() {
    let mask = "fn mask_mod(at: Position) -> bool { return true; }\n";
    let score = |body: &str| format!("fn score_mod(score: f32, at: Position) -> f32 {{\n{body}\n}}");
    let kept = |body: &str| format!("fn mask_mod(at: Position) -> bool {{\n{body}\nreturn true;\n}}");
    for (text, [line, column], word) in [
        (String::new(), [1, 1], "neither"),
        ("fn other() -> f32 { return 1.0; }".into(), [1, 1], "neither"),
        ("fn mask_mod(at: Position) -> f32 { return 1.0; }".into(), [1, 1], "mask_mod must be"),
        ("\n  fn score_mod(score: f32) -> f32 { return 1.0; }".into(), [2, 3], "score_mod must be"),
        ("fn score_mod(at: Position, score: f32) -> f32 { return 1.0; }".into(), [1, 1], "score_mod must be"),
        ("fn mask_mod(at: Position) { }".into(), [1, 1], "mask_mod must be"),
        (mask.to_string() + "fn score_mod_slope(score: f32, at: Position) -> f32 { return 1.0; }", [2, 1], "missing"),
        (score("return scor;"), [2, 8], "scor"),
        (score("return score + 1u;"), [2, 8], "`+` stands between the f32 `score` and the u32 `1u`"),
        (score("return score * at.h;"), [2, 8], "convert one"),
        (score("return score * f32(at.h * 0.5);"), [2, 27], "convert the whole number"),
        (
            score("return vec2f(score, 1.0);"),
            [2, 8],
            "`vec2f(score, 1.0)` is returned, and the function must return f32",
        ),
        (score("let x = score;"), [1, 1], "without `return`"),
        (score("return -1.0 / 0.0;"), [2, 8], "infinite"),
        (score("return overflowed;"), [2, 8], "no definition"),
        (score("if score { return 1.0; } return score;"), [1, 14], "the condition `score` is no bool"),
        (
            "fn f(x: f32) -> f32 { return x; }\n".to_string() + &score("return f(at.h);"),
            [3, 10],
            "argument 1 of the call, `at.h`, must be f32",
        ),
        (score("return score[1];"), [1, 1], "an index"),
        (score("let x = array<f32, 2>(1.0, 2.0); return x[score];"), [2, 41], "index `score`"),
        (score("return score << 1u;"), [2, 8], "no such operator"),
        (score("return at.row;"), [2, 11], "row"),
        (score("return 1.0"), [3, 1], "expected"),
        (score("return score;") + "\nfn f(", [4, 6], "expected"),
        ("struct Position { i: u32 }\n".to_string() + mask, [1, 8], "redefinition"),
        ("é".to_string() + mask, [1, 1], ""),
        (mask.to_string() + "var<private> x: f32;", [2, 1], "variables of mods"),
        (mask.to_string() + "var<workgroup> x: f32;", [2, 1], "variables of mods"),
        (mask.to_string() + "var<uniform> x: vec4f;", [2, 1], "variables of mods"),
        (mask.to_string() + "var<storage, read_write> x: array<f32>;", [2, 1], "do not write"),
        (mask.to_string() + "@group(0) @binding(1) var<storage, read> x: array<f32>;", [2, 23], "by name"),
        (mask.to_string() + "var<storage, read> x: array<vec2f>;", [2, 1], "array<f32>"),
        (mask.to_string() + "var<storage, read> x: array<f32, 4>;", [2, 1], "array<f32>"),
        (mask.to_string() + "var<storage, read> x: u32;", [2, 1], "array<f32>"),
        (mask.to_string() + "override x: f32 = 1.0;", [2, 1], "override"),
        (mask.to_string() + "@compute @workgroup_size(1) fn main() { let x = 1.0 + 2.0; }", [2, 49], "entry point"),
        (mask.to_string() + "enable f16;", [2, 1], ""),
        (kept("var x = 1lf;"), [2, 1], "f64"),
        (kept("workgroupBarrier();"), [2, 1], "wait"),
        (kept("storageBarrier();"), [2, 1], "wait"),
        (kept("discard;"), [2, 1], "discard"),
        (kept("let x = dpdx(1.0);"), [2, 9], "pixels"),
        (kept("let x = modf(1.5 + f32(at.i));"), [2, 9], "modf"),
        (kept("let x = frexp(1.5 + f32(at.i));"), [2, 9], "frexp"),
        (kept("let x = pack2x16float(vec2f(f32(at.i)));"), [2, 9], "packing"),
        (kept("let x = refract(vec3f(f32(at.i)), vec3f(1.0), 0.5);"), [2, 9], "refract"),
        ("fn f(n: u32) -> u32 { return f(n); }\n".to_string() + mask, [1, 4], "recursive"),
        (score("return bitcast<f32>(bitcast<u32>(score));"), [2, 21], "score_mod_slope"),
        (score("return reflect(vec2f(score), vec2f(1.0)).x;"), [2, 8], "reflect"),
        (score("return faceForward(vec2f(score), vec2f(1.0), vec2f(1.0)).x;"), [2, 8], "faceForward"),
        (score("let a = array<f32, 2>(score, 1.0); return a[0];"), [2, 9], "array"),
        (score("var a: array<f32, 2>; a[1] = score; return a[at.i];"), [2, 1], "array"),
        (score("return (mat2x2f(score, 1.0, 1.0, 1.0) * vec2f(1.0)).x;"), [2, 9], "matrix"),
        (
            "fn f(p: ptr<function, f32>) { *p = 1.0; }\n".to_string() + &score("var x = score; f(&x); return x;"),
            [3, 16],
            "pointer",
        ),
        (
            "fn f(p: ptr<function, f32>, x: f32) { *p = x; }\n".to_string()
                + &score("var x = 1.0; f(&x, score); return x;"),
            [1, 39],
            "pointer",
        ),
    ] {
        let error = match Mods::parse(&text) {
            Ok(mods) => panic!("no error: {text}\n{}", mods.printed()),
            Err(error) => error,
        };
        assert_eq!([error.line, error.column], [line, column], "{error}: {text}");
        assert!(error.what.contains(word), "{error} does not say {word:?}: {text}");
    }
    // What would overflow a stack, take for ever, or end in a module that naga does not write.
    let many = |n: usize, of: &str| of.repeat(n);
    let helpers: String = (0..300).map(|n| format!("fn f{n}(x: f32) -> f32 {{ return x; }}\n")).collect();
    let nested: String = (1..16).map(|n| format!("const a{n} = array(a{m}, a{m});\n", m = n - 1)).collect();
    for (text, word) in [
        (score(&format!("return score{};", many(4000, " + 1.5"))), "by `let`"),
        (score(&format!("return {}score;", many(4000, "- "))), "by `let`"),
        (score(&format!("return {}score{};", many(200, "("), many(200, ")"))), "by `let`"),
        (
            score(&format!(
                "if score > 1.0 {{ return 1.0; }}{} return score;",
                many(200, " else if score > 2.0 { return 2.0; }")
            )),
            "`else`",
        ),
        (score(&format!("return score{};", many(4000, " + max(0.,1.)"))), "by `let`"),
        (score(&format!("return vec2f(score){}.x;", many(4000, ".xy"))), "by `let`"),
        (score(&format!("return !{}(score > 1.0);", many(4000, "!"))), "by `let`"),
        (score(&format!("// a\rreturn score{};", many(4000, " + 1.5"))), "by `let`"),
        (
            score("const a0 = array(1.0, 2.0); const a1 = array(a0, a0); let x = a1[0][0]; return score + x;"),
            "of others",
        ),
        (
            "struct S { a: f32, b: f32 }\nconst a = S(1.0, 2.0); const b = array(a, a);\n".to_string() + mask,
            "of others",
        ),
        (
            score(&format!(
                "if score > 1.0 {{ return 1.0; }}{} return score;",
                many(60, " else if score > 2.0 { if at.i > 1u { return 2.0; } }")
            )),
            "`else`",
        ),
        (helpers + &score("return score;"), "functions"),
        (mask.to_string() + &many(1 << 16, " "), "bytes"),
        (
            "const a0 = array<f32, 2>(1.0, 2.0);\n".to_string() + &nested + &score("var x = a15; return score;"),
            "numbers",
        ),
        (kept("var a: array<u32, 2000>; a[at.i] = 1u;"), "numbers"),
        (
            "fn v(p: ptr<function, f32>) { *p += 0.5; }\n".to_string()
                + &score("var x = array<f32, 3>(); v(&x[1]); return x[1] + score;"),
            "whole variables",
        ),
        (
            "struct S { a: f32, b: f32 }\nfn v(p: ptr<function, f32>) { *p += 0.5; }\n".to_string()
                + &score("var x: S; v(&x.b); return x.b + score;"),
            "whole variables",
        ),
    ] {
        let error = std::thread::spawn(move || Mods::parse(&text).unwrap_err()).join().unwrap();
        assert!(error.what.contains(word), "{error} does not say {word:?}");
    }
    // What is just below.
    for text in [
        score(&format!("return score{};", many(99, " + 1.5"))),
        score(&format!(
            "if score > 1.0 {{ return 1.0; }}{} return score;",
            many(49, " else if score > 2.0 { return 2.0; }")
        )),
        "const t = array<f32, 500>(".to_string()
            + &many(500, "-1.5, ")
            + ");\n"
            + &score("return score + t[at.j]; // + /* + */"),
        score(&format!("return f32(at.j == 1u{});", many(30, " || at.j >= 2u"))),
        score(&format!("var x = 0.0; {} return score + x;", many(60, "if at.i > 1u { x = 1.0; } else { x = 2.0; }"))),
        score(&format!("return score{};", many(40, " + 1.5e-5 * 0x1p-3"))),
        "const t = array(1.5, 2.5); const u = t[1] * 2.0;\n".to_string() + &score("return score * u + t[at.i];"),
        "struct Position_ { x: f32 }\n".to_string() + &score("var p: Position_; p.x = 2.0; return score * p.x;"),
    ] {
        std::thread::spawn(move || Mods::parse(&text).map(drop)).join().unwrap().unwrap();
    }
    // The line with a mark below the place, without what a terminal would obey.
    let error = Mods::parse("fn mask_mod(at: Position) -> bool {\n\treturn /* é\u{1b}[31m */ at.k;\n}").unwrap_err();
    let lines: Vec<_> = error.to_string().lines().map(str::to_string).collect();
    assert_eq!(lines[1..], ["     return /* é [31m */ at.k;", "                            ^"], "{error}");
    let buffers: String = (0..9).map(|n| format!("var<storage, read> x{n}: array<f32>;\n")).collect();
    let error = Mods::parse(&(buffers + mask)).unwrap_err();
    assert_eq!((error.line, error.what.contains("at most 8")), (9, true), "{error}");
    // Functions that call the one before twice.
    let mut text = "fn f0(x: f32) -> f32 { return x; }\n".to_string();
    (1..30).for_each(|n| text += &format!("fn f{n}(x: f32) -> f32 {{ return f{m}(x) + f{m}(x); }}\n", m = n - 1));
    let error = Mods::parse(&(text + &score("return f29(score);"))).unwrap_err();
    assert!(error.what.contains("calls") || error.what.contains("4096"), "{error}");
}

/// Each call of a function of the user's has all iterations.
#[test]
fn iterations_are_counted_by_call() {
    let body = "var x = 1.0; for (var n = 0u; n < 9u; n++) { x += 0.5; } return x";
    let mods = parse(&format!(
        "fn score_mod(score: f32, at: Position) -> f32 {{ {body} + score; }}
        fn score_mod_slope(score: f32, at: Position) -> f32 {{ {body}; }}
        fn mask_mod(at: Position) -> bool {{ {body} > 1.0; }}"
    ));
    assert_eq!(mods.printed().matches("mods_iterations = 0u").count(), 3, "{}", mods.printed());
}

/// No name of the text is one of ours.
#[test]
fn names_do_not_clash() {
    let text = "
        const LOG2_E = 1.5;
        struct Scored { keep: f32 }
        var<storage, read> problem: array<f32>;
        fn keep(at: f32) -> Scored { let score_mod_dual = at; var mods_score = score_mod_dual; mods_score *= 2.0; return Scored(mods_score); }
        fn sequence(user_score_mod: f32) -> f32 { return user_score_mod * LOG2_E; }
        fn score_mod_dual(x1: f32) -> f32 { var x = x1; return x; }
        fn mods_keep() -> bool { return true; }
        fn score_mod(score: f32, at: Position) -> f32 {
            return score_mod_dual(sequence(score)) + keep(problem[at.i]).keep;
        }
        fn mask_mod(at: Position) -> bool { return mods_keep(); }
    ";
    let mods = parse(text);
    let of_ours = ["mods_score", "mods_keep", "mods_Position"];
    for line in mods.printed().lines() {
        for word in ["fn ", "struct ", "const ", "read> "] {
            if let Some((before, name)) = line.split_once(word) {
                let top = before.is_empty() || before.starts_with('@');
                let name = name.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
                assert!(!top || name.starts_with("user_") || of_ours.contains(&name), "{line}");
            }
        }
    }
    for line in ["fn mods_score(", "fn mods_keep(", "struct mods_Position {"] {
        assert_eq!(mods.printed().lines().filter(|l| l.starts_with(line)).count(), 1, "{line}: {}", mods.printed());
    }
}

#[test]
fn equal_texts_are_equal() {
    use std::collections::HashSet;
    let text = "fn mask_mod(at: Position) -> bool { return at.i == at.j; }";
    let other = "fn mask_mod(at: Position) -> bool { return at.i != at.j; }";
    let all: HashSet<_> = [parse(text), parse(text), parse(other)].into();
    assert_eq!(all.len(), 2);
    assert!(format!("{:?}", parse(text)).contains("mask_mod"));
}
