//! What tests say that cannot run on this system.

use std::io::Write;
use std::sync::Mutex;

/// Says that tests were not run, and why, past the test harness, which keeps what passing tests print to itself. What several
/// tests of a program say is printed once.
pub fn skipped(what_and_why: &str) {
    static SAID: Mutex<Vec<String>> = Mutex::new(vec![]);
    let mut said = SAID.lock().unwrap();
    if !said.iter().any(|other| other == what_and_why) {
        let mut terminal = std::io::stderr();
        writeln!(terminal, "SKIPPED: not tested here, which is no failure: {what_and_why}").unwrap();
        said.push(what_and_why.into());
    }
}

/// What one can do about it.
pub const NEWER_DRIVER: &str =
    "`scripts/vulkan --coop cargo test --release` runs these tests on a newer software driver";

/// Why no module goes through the validator of SPIR-V.
pub const NO_VALIDATOR: &str = "SPIR-V modules by spirv-val, the validator of the Khronos Group, which is not there; \
                                `scripts/vulkan --coop true` fetches it";
