//! The devices of the tests, and every kernel on them.

use wgpu_flash_attention::wgpu;
use wgpu_flash_attention::{Context, ElementType, PlanOptions, Problem};

use crate::skipped::skipped;

thread_local! {
    static FULL: &'static Context = Box::leak(Box::new(Context::headless().unwrap()));
    static WEBGPU: &'static Context = Box::leak(Box::new(with_limits(|_| {})));
}

/// The system's adapter with all its limits. A device for each test: software Vulkan compiles the pipelines of a device one by
/// one, those of several tests at once.
pub fn full() -> &'static Context {
    FULL.with(|context| *context)
}

/// The same adapter with no more than every WebGPU device has.
pub fn webgpu() -> &'static Context {
    WEBGPU.with(|context| *context)
}

/// WebGPU's default limits, changed by `lower`.
pub fn with_limits(lower: impl FnOnce(&mut wgpu::Limits)) -> Context {
    let mut required_limits = wgpu::Limits::default();
    lower(&mut required_limits);
    device_of(&adapter(), wgpu::DeviceDescriptor { required_limits, ..Default::default() })
}

/// WebGPU's default limits with bindings of so many KiB, so small that work is split.
pub fn with_bindings(kib: u64) -> Context {
    with_limits(|limits| limits.max_storage_buffer_binding_size = kib << 10)
}

/// Checks that a plan of the problem, forward or backward, has several parts there.
pub fn assert_split(problem: &Problem, context: &Context, options: PlanOptions) {
    let plan = context.plan_with(&problem.clone().with_gradients(), &options).unwrap().to_string();
    let counts = plan.lines().filter_map(|line| line.split_once("parts that the problem was split into: "));
    assert!(counts.clone().any(|(_, count)| count.trim() != "1"), "{plan}");
}

/// WebGPU's default limits, and these features; nothing where the adapter does not have them.
pub fn with_features(required_features: wgpu::Features) -> Option<Context> {
    let adapter = adapter();
    if !adapter.features().contains(required_features) {
        let names: Vec<_> = required_features.iter_names().map(|(name, _)| name).collect();
        skipped(&format!("devices with {}, which this adapter does not have", names.join(" and ")));
        return None;
    }
    Some(device_of(&adapter, wgpu::DeviceDescriptor { required_features, ..Default::default() }))
}

/// The system's adapter.
pub fn adapter() -> wgpu::Adapter {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY);
    pollster::block_on(wgpu::Instance::new(descriptor).request_adapter(&Default::default())).unwrap()
}

fn device_of(adapter: &wgpu::Adapter, descriptor: wgpu::DeviceDescriptor<'_>) -> Context {
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    Context::new(&device, &queue)
}

/// Every kernel as a plan chooses it, with options that ask for the naive kernel and for the tile kernel. 16-bit types differ
/// only in how elements are read, so each goes through one of the table's two tiles: each switch and pair of head dims is a
/// module to compile.
pub fn every_kernel(
    element_type: ElementType,
    naive: PlanOptions,
    tile: PlanOptions,
) -> Vec<(&'static str, &'static Context, PlanOptions)> {
    let mut ways = vec![("naive", full(), naive)];
    if element_type != ElementType::BF16 {
        ways.push(("tile", full(), tile));
    }
    if element_type != ElementType::F16 {
        ways.push(("tile within WebGPU's limits", webgpu(), tile));
    }
    ways
}
