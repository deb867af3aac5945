//! The command `train`, run as a user runs it: exit codes, messages, files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `cargo test` puts examples beside the folder of the tests.
fn train(args: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    let program = profile.join("examples").join(format!("train{}", std::env::consts::EXE_SUFFIX));
    let output = Command::new(&program).args(args).output();
    output.unwrap_or_else(|error| panic!("{}: {error}; `cargo test --examples` builds it", program.display()))
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("train-{name}"))
}

/// A file with this text.
fn file(name: &str, text: impl AsRef<[u8]>) -> String {
    let path = temporary(name);
    std::fs::write(&path, text).unwrap();
    path.into_os_string().into_string().unwrap()
}

/// A small model for a small text, and the lines that the command prints.
#[track_caller]
fn lines(args: &[&str]) -> Vec<String> {
    let small = ["--dim", "16", "--heads", "2", "--context", "16", "--batch", "4", "--lr", "1e-2"];
    let output = train(&[args, &small].concat());
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{args:?}\n{out}{error}");
    out.lines().map(str::to_string).collect()
}

fn losses(lines: &[String]) -> Vec<f64> {
    lines.iter().filter_map(|line| line.split_once("loss ")?.1.parse().ok()).collect()
}

/// What follows the word in front.
fn said<'a>(lines: &'a [String], subject: &str) -> &'a str {
    let line = lines.iter().find_map(|line| line.strip_prefix(subject));
    line.unwrap_or_else(|| panic!("no {subject} in {lines:?}")).trim_start()
}

#[test]
fn a_short_text_is_learnt_by_heart() {
    let text = file("bats", "do cats eat bats? ".repeat(20));
    let plot = temporary("bats.svg");
    for dtype in ["f32", "f16"] {
        // Several times as long as the context.
        let args = [&text, "--steps", "150", "--sample", "72", "--dtype", dtype, "--plot", plot.to_str().unwrap()];
        let lines = lines(&args);
        let losses = losses(&lines);
        assert!(losses.len() == 11 && losses[0] > 2.0 && losses[10] < 0.3, "{losses:?}");
        assert!("do cats eat bats? ".repeat(20).contains(said(&lines, "sample").trim_end()), "{lines:?}");
        assert!(said(&lines, "plan").starts_with(dtype), "{lines:?}");
        assert!(std::fs::read_to_string(&plot).unwrap().contains("<polyline"));
    }
}

#[test]
fn the_seed_decides_on_everything() {
    let run = |seed: &str| {
        let mut lines = lines(&["--steps", "5", "--sample", "30", "--seed", seed]);
        lines.retain(|line| !line.starts_with("time"));
        lines
    };
    assert_eq!(run("1"), run("1"));
    assert_ne!(run("1"), run("2"));
}

/// Each step draws other numbers, and all come from the seed.
#[test]
fn dropout() {
    let run = |args: &[&str]| {
        let lines = lines(&[args, &["--steps", "30", "--sample", "0"]].concat());
        assert_eq!(
            lines.iter().any(|line| line.contains("dropout: 0.2; 205 of 256")),
            args.contains(&"0.2"),
            "{lines:?}"
        );
        losses(&lines)
    };
    let (with, without) = (run(&["--dropout", "0.2"]), run(&[]));
    assert_eq!(with, run(&["--dropout", "0.2"]));
    assert_ne!(with, without);
    assert_ne!(with, run(&["--dropout", "0.2", "--seed", "2"]));
    assert_eq!(without, run(&["--dropout", "0"]));
    let (first, last) = (with[0], with[with.len() - 1]);
    assert!(last < 0.9 * first, "{with:?}");
}

#[test]
fn bad_input_is_refused_in_one_line() {
    let short = file("short", "Alice was beginning");
    let empty = file("empty", "");
    let bytes = file("bytes", [0xff, 0xfe, 0xfd]);
    let text = file("own-plot", "do cats eat bats? ".repeat(20));
    let cases: &[(&[&str], &[&str])] = &[
        (&["no/such/text"], &["cannot read no/such/text"]),
        (&[&bytes], &["cannot read", "train-bytes", "UTF-8"]),
        (&[&empty], &["train-empty has 0 characters", "--context 64", "65"]),
        (&[&short], &["train-short has 19 characters", "--context 64", "65"]),
        (&["--plot", "no/such/folder.svg"], &["cannot write no/such/folder.svg"]),
        (&[&text, "--plot", &text], &["is the input"]),
        (&["--dim", "36"], &["--dim is 36", "multiple of 8"]),
        (&["--dim", "1024", "--heads", "2"], &["head_dim is 512", "256"]),
        (&["--dim", "0"], &["--dim", "0", "2..=2048"]),
        (&["--heads", "0"], &["--heads", "0"]),
        (&["--layers", "0"], &["--layers", "0"]),
        (&["--context", "1"], &["--context", "1"]),
        (&["--batch", "-1"], &["-1"]),
        (&["--steps", "0"], &["--steps", "0"]),
        (&["--steps", "many"], &["--steps", "many"]),
        (&["--lr", "0"], &["--lr", "0", "above 0"]),
        (&["--lr", "nan"], &["--lr", "nan", "above 0"]),
        (&["--dropout", "1"], &["--dropout", "1", "below 1"]),
        (&["--dropout", "-0.1"], &["--dropout", "-0.1", "below 1"]),
        (&["--dropout", "nan"], &["--dropout", "nan"]),
        (&["--dtype", "f64"], &["--dtype", "f64", "f32, f16"]),
        (&["--kernel", "naive"], &["--kernel", "naive", "auto, tile, coop"]),
        (&["--adapter", "abacus"], &["\"abacus\""]),
        (&["one", "two"], &["two"]),
    ];
    for (args, words) in cases {
        let output = train(args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}\n{text}");
        assert_eq!(text.lines().count(), 1, "{args:?}\n{text}");
        for word in *words {
            assert!(text.contains(word), "{args:?}: {text:?} does not say {word:?}");
        }
    }
    assert!(std::fs::read_to_string(text).unwrap().starts_with("do cats"));
}
