//! The command `compare`, run as a user runs it: what it says on stderr, files, options.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `cargo test` puts examples beside the folder of the tests.
fn compare(args: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    let program = profile.join("examples").join(format!("compare{}", std::env::consts::EXE_SUFFIX));
    let output = Command::new(&program).args(args).output();
    output.unwrap_or_else(|error| panic!("{}: {error}; `cargo test --examples` builds it", program.display()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("compare-{name}"))
}

#[test]
fn it_says_what_it_allocates_and_writes_what_it_measured() {
    let (csv, plot) = (temporary("figures.csv"), temporary("figures.svg"));
    let files = ["--csv", csv.to_str().unwrap(), "--plot", plot.to_str().unwrap()];
    let output = compare(&[&["--shapes", "1,2/1,64,16;1,2/1,128,16", "--op", "fwd,bwd"], &files[..]].concat());
    let (out, notes) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{out}{notes}");
    // 2 heads of queries and twice 1 of keys and values, 64 rows of 16 f32: 16 KiB. o is 8 KiB, lse half a KiB.
    for line in [
        "compare: 1,2/1,64,16 f32: q, k and v take 16.0 KiB on the device",
        "o and lse 8.5 KiB, gradients 24.0 KiB",
        "the most in buffers at one time",
    ] {
        assert!(notes.contains(line), "{notes:?} does not say {line:?}");
    }
    // Naive and tile, two operations, two shapes.
    assert_eq!(std::fs::read_to_string(csv).unwrap().lines().count(), 1 + 8);
    assert!(std::fs::read_to_string(plot).unwrap().contains("<polyline"));
}

/// Each is checked, and timed beside the same kernel without it.
#[test]
fn features_are_timed_beside_the_kernel_without_them() {
    let csv = temporary("features.csv");
    let of_library = ["bias", "bias-f32", "mask", "alibi", "sinks", "softcap", "dropout", "blocks", "window-blocks"];
    let features = [&of_library[..], &["documents", "identity-mod", "alibi-mod"]].concat();
    let list = features.join(",");
    let options = ["--feature", &list, "--kernels", "tile", "--dtype", "f16", "--op", "fwd,bwd"];
    let output = compare(&[&options[..], &["--shapes", "1,2/1,600,16", "--csv", csv.to_str().unwrap()]].concat());
    let out = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{out}{}", text(&output.stderr));
    let csv = std::fs::read_to_string(csv).unwrap();
    for op in ["forward", "backward"] {
        let time = |line: &str| column(&csv, line, "median_ms").parse::<f64>().unwrap();
        let lines: Vec<_> = csv.lines().skip(1).filter(|line| column(&csv, line, "op") == op).collect();
        let found: Vec<_> = lines.iter().map(|line| column(&csv, line, "feature")).collect();
        assert_eq!(found, [&[""], &features[..]].concat());
        assert_eq!(column(&csv, lines[0], "over_without"), "");
        for line in &lines[1..] {
            let ratio: f64 = column(&csv, line, "over_without").parse().unwrap();
            // Times have six decimals.
            assert!((ratio - time(line) / time(lines[0])).abs() < 0.01 * ratio, "{csv}");
            let share: f64 = column(&csv, line, "share").parse().unwrap();
            let over_share = column(&csv, line, "over_share");
            // 600 queries: with 512 keys in a window, in documents of 512 and of 88 tokens.
            let scores = |triangles: &[u32]| triangles.iter().map(|n| n * (n + 1) / 2).sum::<u32>() as f64 / 360_000.0;
            match column(&csv, line, "feature").as_str() {
                "window-blocks" => assert!((share - scores(&[512]) - 88.0 * 512.0 / 360_000.0).abs() < 1e-5, "{csv}"),
                "documents" => assert!((share - scores(&[512, 88])).abs() < 1e-5, "{csv}"),
                // The diagonal is four blocks of 128 and one of 88.
                "blocks" => assert!(share > (4.0 * 128.0 * 128.0 + 88.0 * 88.0) / 360_000.0 && share < 0.7, "{csv}"),
                _ => {
                    assert!(share == 1.0 && over_share.is_empty(), "{csv}");
                    continue;
                }
            }
            assert!((over_share.parse::<f64>().unwrap() - ratio / share).abs() < 1e-3 * ratio / share, "{csv}");
        }
    }
}

/// The column of a line of figures.
fn column(csv: &str, line: &str, name: &str) -> String {
    let n = csv.lines().next().unwrap().split(',').position(|title| title == name).unwrap();
    line.split(',').nth(n).unwrap().to_string()
}

#[test]
fn a_window_counts_the_scores_that_it_leaves() {
    let csv = temporary("window.csv");
    let options = ["--window", "100", "--kernels", "tile", "--shapes", "1,1,300,16", "--csv", csv.to_str().unwrap()];
    let output = compare(&options);
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    let csv = std::fs::read_to_string(csv).unwrap();
    let share: f64 = column(&csv, csv.lines().nth(1).unwrap(), "share").parse().unwrap();
    assert!((share - (5050.0 + 200.0 * 100.0) / 90_000.0).abs() < 1e-5, "{csv}");
    let notes = text(&compare(&["--window", "100", "--causal"]).stderr);
    assert!(notes.contains("--window") && notes.contains("--causal"), "{notes}");
}

#[test]
fn options_that_nothing_would_look_at_are_refused() {
    let tile = ["--tile", "64,64,8,16,32,32,0"];
    let cases: &[(&[&str], &str)] = &[
        (&[&tile[..], &["--kernels", "naive"]].concat(), "--tile is for the tile kernel"),
        (&[&tile[..], &["--op", "bwd"]].concat(), "--tile is for the tile kernel's forward pass"),
        (&["--backward-tile", "64,64,8,16,32,32,0"], "--backward-tile"),
        (&["--fused-tile", "64,64,8,16,32,32,0,0,0"], "--fused-tile"),
        (&["--coop-tile", "1,1,1,1"], "--coop-tile"),
        (&["--coop-backward-tiles", "1,1,1,1,1/1,1,1,1,1"], "--coop-backward-tiles"),
        (&["--coop-form", "registers"], "--coop-form"),
        (&["--splits", "3"], "--splits"),
        (&["--decode-tile", "4,64,8,2,0"], "--decode-tile"),
    ];
    for (args, words) in cases {
        let output = compare(args);
        let text = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}\n{text}");
        assert!(text.lines().count() == 1 && text.contains(words) && text.contains("not timed"), "{args:?}\n{text}");
    }
}

#[test]
fn what_cannot_be_written_is_said_before_anything_is_measured() {
    for option in ["--csv", "--plot"] {
        let output = compare(&[option, "no/such/folder/file"]);
        let notes = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{notes}");
        assert!(notes.contains("cannot write no/such/folder/file") && output.stdout.is_empty(), "{notes}");
    }
    let notes = text(&compare(&["--csv", "same", "--plot", "same"]).stderr);
    assert!(notes.contains("--csv and --plot name one file"), "{notes}");
}
