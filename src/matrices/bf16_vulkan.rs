//! The one place that speaks to Vulkan past wgpu. It asks a physical device whether it has matrices of bf16, and makes a device that has them.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};

use ash::vk;
use wgpu::hal::api::Vulkan;
use wgpu::hal::vulkan;

use super::NoBf16Matrices;

const EXTENSION: &CStr = c"VK_KHR_shader_bfloat16";
/// VK_COMPONENT_TYPE_BFLOAT16_KHR, which ash 0.38 is too old for.
const BFLOAT16: vk::ComponentTypeKHR = vk::ComponentTypeKHR::from_raw(1_000_141_000);

/// VkPhysicalDeviceShaderBfloat16FeaturesKHR, which ash 0.38 is too old for.
#[repr(C)]
struct Features {
    s_type: vk::StructureType,
    p_next: *mut c_void,
    ty: vk::Bool32,
    dot_product: vk::Bool32,
    cooperative_matrix: vk::Bool32,
}

impl Features {
    const fn new(ty: bool, cooperative_matrix: bool) -> Self {
        Features {
            s_type: vk::StructureType::from_raw(1_000_141_000),
            p_next: std::ptr::null_mut(),
            ty: ty as vk::Bool32,
            dot_product: vk::FALSE,
            cooperative_matrix: cooperative_matrix as vk::Bool32,
        }
    }
}

/// The sizes of the square matrices with operands of bf16 and sums of f32 that the physical device has, 16 or 8.
fn sizes(adapter: &vulkan::Adapter) -> Result<Vec<u32>, NoBf16Matrices> {
    let (shared, properties) = (adapter.shared_instance(), adapter.physical_device_capabilities());
    // Asking for features takes Vulkan 1.1, of the instance and of the device.
    let version = shared.instance_api_version().min(properties.properties().api_version);
    let has = |extension| properties.supports_extension(extension);
    if version < vk::API_VERSION_1_1 || !has(EXTENSION) || !has(ash::khr::cooperative_matrix::NAME) {
        return Err(NoBf16Matrices::Extension);
    }
    let (instance, physical) = (shared.raw_instance(), adapter.raw_physical_device());
    let mut found = Features::new(false, false);
    let mut all = vk::PhysicalDeviceFeatures2 { p_next: (&raw mut found).cast(), ..Default::default() };
    // SAFETY:
    // - vkGetPhysicalDeviceFeatures2 is there: instance and device are at least of Vulkan 1.1.
    // - The driver writes to `found`: it is laid out as the extension says, its s_type names it, and it outlives the call.
    unsafe { instance.get_physical_device_features2(physical, &mut all) };
    if found.ty == vk::FALSE || found.cooperative_matrix == vk::FALSE {
        return Err(NoBf16Matrices::MatrixFeature);
    }
    let matrices = ash::khr::cooperative_matrix::Instance::new(shared.entry(), instance);
    // SAFETY: the physical device is of this instance, and has VK_KHR_cooperative_matrix, of which this function is.
    let listed = unsafe { matrices.get_physical_device_cooperative_matrix_properties(physical) };
    let listed = listed.map_err(|error| NoBf16Matrices::Refused(error.to_string()))?;
    let is_listed = |size: &u32| {
        listed.iter().any(|p| {
            [p.m_size, p.n_size, p.k_size] == [*size; 3]
                && [p.a_type, p.b_type] == [BFLOAT16; 2]
                && [p.c_type, p.result_type] == [vk::ComponentTypeKHR::FLOAT32; 2]
                && p.scope == vk::ScopeKHR::SUBGROUP
        })
    };
    let sizes: Vec<u32> = [16, 8].into_iter().filter(is_listed).collect();
    if sizes.is_empty() { Err(NoBf16Matrices::MatrixSize) } else { Ok(sizes) }
}

/// The sizes of the matrices of a device that was opened with the extension, as far as wgpu was told.
pub(super) fn sizes_of(adapter: &wgpu::Adapter, device: &wgpu::Device) -> Result<Vec<u32>, NoBf16Matrices> {
    let backend = adapter.get_info().backend;
    // SAFETY: nothing is destroyed or changed through the raw handles.
    let (adapter, device) = unsafe { (adapter.as_hal::<Vulkan>(), device.as_hal::<Vulkan>()) };
    let (Some(adapter), Some(device)) = (adapter, device) else {
        return Err(NoBf16Matrices::Backend(backend));
    };
    if adapter.raw_physical_device() != device.raw_physical_device() {
        return Err(NoBf16Matrices::Adapter);
    }
    let enabled = |name| device.enabled_device_extensions().contains(&name);
    if !enabled(EXTENSION) || !enabled(ash::khr::cooperative_matrix::NAME) {
        return Err(NoBf16Matrices::NotEnabled);
    }
    sizes(&adapter)
}

/// Makes a device with the extension. The caller has checked the descriptor as wgpu does: the adapter has its features and limits, and
/// experimental ones are allowed.
pub(super) fn request_device(
    adapter: &wgpu::Adapter,
    descriptor: &wgpu::DeviceDescriptor<'_>,
) -> Result<(wgpu::Device, wgpu::Queue, Vec<u32>), NoBf16Matrices> {
    // SAFETY: nothing is destroyed or changed through the raw handle.
    let Some(hal) = (unsafe { adapter.as_hal::<Vulkan>() }) else {
        return Err(NoBf16Matrices::Backend(adapter.get_info().backend));
    };
    let sizes = sizes(&hal)?;
    let mut wanted = Features::new(true, true);
    let callback: Box<vulkan::CreateDeviceCallback<'_>> = Box::new(|args| {
        if !args.extensions.contains(&EXTENSION) {
            args.extensions.push(EXTENSION);
        }
        wanted.p_next = args.create_info.p_next.cast_mut();
        args.create_info.p_next = (&raw const wanted).cast();
    });
    let refused = |error: &dyn std::fmt::Display| NoBf16Matrices::Refused(error.to_string());
    // SAFETY:
    // - The features and limits are the adapter's: the caller has checked them.
    // - The callback removes nothing. It adds an extension and two of its features, which `sizes` found the physical device to have.
    // - The structure with the features is laid out as the extension says, is linked in front of the chain that was there, and outlives the call. The
    //   chain has no other of its type, since wgpu-hal 30 does not know the extension: look again with each new version of wgpu.
    // - What the extension needs is on too: VK_KHR_cooperative_matrix, which wgpu-hal adds for EXPERIMENTAL_COOPERATIVE_MATRIX.
    let (features, limits) = (descriptor.required_features, &descriptor.required_limits);
    let open = unsafe { hal.open_with_callback(features, limits, &descriptor.memory_hints, Some(callback)) };
    let open = open.map_err(|error| refused(&error))?;
    // SAFETY: the device was opened from this adapter, with the features and limits of this descriptor, and nothing else uses it.
    let made = unsafe { adapter.create_device_from_hal::<Vulkan>(open, descriptor) };
    let (device, queue) = made.map_err(|error| refused(&error))?;
    Ok((device, queue, sizes))
}
