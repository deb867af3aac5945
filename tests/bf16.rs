//! How a device comes to matrices of bf16, and what is said where it has none. The kernels on them are tested beside those on f16, in `coop.rs` and
//! `backward_coop.rs`. Some tests need a device with matrices of f16 (`scripts/vulkan --coop cargo test` has one), and say so where there is none.

use flash_attention_testing::devices::adapter;
use flash_attention_testing::skipped::{NEWER_DRIVER, skipped};
use flash_attention_testing::{case, coop, naive};
use wgpu_flash_attention::matrices::FEATURES;
use wgpu_flash_attention::{Bf16Matrices, Context, ElementType, HeadlessOptions, NoBf16Matrices, Problem, Shape, wgpu};

type Requested = (wgpu::Device, wgpu::Queue, Result<Bf16Matrices, NoBf16Matrices>);

fn request(adapter: &wgpu::Adapter, descriptor: &wgpu::DeviceDescriptor<'_>) -> Requested {
    pollster::block_on(Bf16Matrices::request_device(adapter, descriptor)).unwrap()
}

/// The device is as good as any other where it was not asked for what matrices need. The reason says what to ask for.
#[test]
fn a_device_without_the_features() {
    let (device, queue, bf16) = request(&adapter(), &wgpu::DeviceDescriptor::default());
    let why = bf16.unwrap_err();
    assert_eq!(why, NoBf16Matrices::Features(FEATURES));
    for (name, _) in FEATURES.iter_names() {
        assert!(why.to_string().contains(name), "{why} does not name {name}");
    }
    assert!(why.to_string().contains("request it too"), "{why}");
    let case = case(1, [2, 1], [5, 7], [8, 4]).element_type(ElementType::BF16);
    case.prepare().check(&Context::new(&device, &queue), &naive()).unwrap();
}

/// What wgpu would refuse it refuses in its own words.
#[test]
fn a_descriptor_that_wgpu_refuses() {
    let required_limits = wgpu::Limits { max_bind_groups: u32::MAX, ..Default::default() };
    // Experimental features without the opt-in, and limits that no adapter has.
    for descriptor in [
        wgpu::DeviceDescriptor { required_features: FEATURES, ..Default::default() },
        wgpu::DeviceDescriptor { required_limits, ..Default::default() },
    ] {
        let adapter = adapter();
        let refused = pollster::block_on(adapter.request_device(&descriptor)).unwrap_err();
        let found = pollster::block_on(Bf16Matrices::request_device(&adapter, &descriptor)).unwrap_err();
        assert_eq!(found.to_string(), refused.to_string());
    }
}

/// The word of an application is not taken for a device that was opened without the extension.
#[test]
fn a_device_opened_without_the_extension() {
    let adapter = adapter();
    let (device, _) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap();
    // SAFETY: nothing is done with the device unless it is said to have the extension, which fails the test.
    #[allow(unsafe_code)]
    let why = unsafe { Bf16Matrices::of_device(&adapter, &device) }.unwrap_err();
    match adapter.get_info().backend {
        wgpu::Backend::Vulkan => assert_eq!(why, NoBf16Matrices::NotEnabled),
        other => assert_eq!(why, NoBf16Matrices::Backend(other)),
    }
}

/// With all features it depends on the driver. Where it has no matrices of bf16 the reason says what is missing, the device is made without them, and
/// plans scale bf16 and say why.
#[test]
fn a_device_with_the_features() {
    let adapter = adapter();
    if !adapter.features().contains(FEATURES) {
        return skipped(&format!("devices with matrices of f16, and of bf16 or not. {NEWER_DRIVER}"));
    }
    let descriptor = wgpu::DeviceDescriptor {
        required_features: FEATURES,
        required_limits: adapter.limits(),
        // SAFETY: cooperative matrices are what is tested here.
        #[allow(unsafe_code)]
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    };
    let (device, queue, bf16) = request(&adapter, &descriptor);
    let context = pollster::block_on(Context::new(&device, &queue).with_cooperative_matrices(&adapter)).unwrap();
    let problem = Problem::new(Shape::square(1, 2, 64, 64), ElementType::BF16);
    let plan = |context: &Context| context.plan(&problem).unwrap().to_string();
    let not_given = NoBf16Matrices::NotGiven.to_string();
    assert!(plan(&context).contains(&not_given), "{}", plan(&context));
    match bf16 {
        Ok(bf16) => {
            let context = pollster::block_on(context.with_bf16_matrices(&bf16)).unwrap();
            assert!(plan(&context).contains("matrices of bf16"), "{}", plan(&context));
        }
        Err(why) => {
            use NoBf16Matrices::{Extension, MatrixFeature, MatrixSize};
            assert!(matches!(why, Extension | MatrixFeature | MatrixSize), "{why}");
            // A context that the library opens keeps the reason for its plans.
            let context = Context::headless_with(&HeadlessOptions::default().cooperative_matrices(true)).unwrap();
            assert!(!coop::has_bf16(&context));
            let said = format!("bf16 is scaled to f16: {why}");
            assert!(plan(&context).contains(&said), "{}", plan(&context));
        }
    }
}
