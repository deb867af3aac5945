//! What the tests of kernels on cooperative matrices share.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use wgpu_flash_attention::elements::{Bit, MatrixFormat, MatrixLayout};
use wgpu_flash_attention::{Context, HeadlessOptions};

/// Past the test harness, which keeps what passing tests print to itself.
pub fn skipped(why: &str) {
    let mut terminal = std::io::stderr();
    writeln!(terminal, "SKIPPED: {why}").unwrap();
}

/// A context with cooperative matrices.
pub fn context() -> Option<&'static Context> {
    static CONTEXT: OnceLock<Option<Context>> = OnceLock::new();
    let open = || {
        let options = HeadlessOptions { cooperative_matrices: true, ..Default::default() };
        Context::headless_with(&options).inspect_err(|why| skipped(&format!("coop tests: {why}"))).ok()
    };
    CONTEXT.get_or_init(open).as_ref()
}

/// The matrices that are known to exist: of an H100 and of lavapipe.
pub fn known_matrices() -> [(MatrixFormat, MatrixLayout); 2] {
    use Bit::{Element, Lane};
    let h100 = MatrixLayout {
        row: vec![Lane(2), Lane(3), Lane(4), Element(2)],
        column: vec![Element(0), Lane(0), Lane(1), Element(1)],
    };
    let lavapipe =
        MatrixLayout { row: vec![Element(0), Element(1), Element(2)], column: vec![Lane(0), Lane(1), Lane(2)] };
    [(MatrixFormat { size: 16, lanes: 32 }, h100), (MatrixFormat { size: 8, lanes: 8 }, lavapipe)]
}

/// Sizes of the workgroup variables of a module.
pub fn workgroup_bytes(text: &str) -> u32 {
    let module = naga::front::wgsl::parse_str(text).unwrap();
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let variables = module.global_variables.iter().map(|(_, variable)| variable);
    variables.filter(|v| v.space == naga::AddressSpace::WorkGroup).map(|v| layouter[v.ty].size).sum()
}

/// The validator of SPIR-V, where it is there.
pub fn validator() -> Option<PathBuf> {
    let validator = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/mesa/spirv-val");
    if !validator.exists() {
        skipped("spirv-val: scripts/vulkan --coop fetches it");
        return None;
    }
    Some(validator)
}

/// What the validator of SPIR-V says of a module, if anything.
pub fn spirv_error(validator: &Path, name: &str, words: &[u32]) -> Option<String> {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&file, bytemuck::cast_slice::<u32, u8>(words)).unwrap();
    // Not Vulkan's rules on top, one of which naga breaks for every workgroup array (gfx-rs/wgpu#7696).
    let output = Command::new(validator).args(["--target-env", "spv1.6"]).arg(&file).output().unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}
