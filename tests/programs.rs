//! The smaller example programs, run as a user runs them.

use std::process::{Command, Output};

/// `cargo test` puts examples beside the folder of the tests.
fn run(name: &str, args: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    let program = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    let output = Command::new(&program).args(args).output();
    output.unwrap_or_else(|error| panic!("{}: {error}; `cargo test --examples` builds it", program.display()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_decode_loop_is_planned_once_and_right() {
    let output = run("decode", &[]);
    let out = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{out}{}", text(&output.stderr));
    assert!(out.contains("kernel: decode") && out.contains("PASS: 24 steps by one plan"), "{out}");
}

#[test]
fn a_device_of_ones_own_will_do() {
    let output = run("own_device", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("the last row begins with"));
}

#[test]
fn programs_say_their_version() {
    for name in ["attend", "compare", "stress", "train"] {
        let output = run(name, &["--version"]);
        assert_eq!(text(&output.stdout).trim(), format!("{name} {}", env!("CARGO_PKG_VERSION")));
    }
}
