//! In the place of `bf16_vulkan.rs` where the crate has no Vulkan.

use super::NoBf16Matrices;

/// Fails: only Vulkan has matrices of bf16.
pub(super) fn sizes_of(adapter: &wgpu::Adapter, _device: &wgpu::Device) -> Result<Vec<u32>, NoBf16Matrices> {
    Err(NoBf16Matrices::Backend(adapter.get_info().backend))
}

/// Fails: only Vulkan has matrices of bf16.
pub(super) fn request_device(
    adapter: &wgpu::Adapter,
    _descriptor: &wgpu::DeviceDescriptor<'_>,
) -> Result<(wgpu::Device, wgpu::Queue, Vec<u32>), NoBf16Matrices> {
    Err(NoBf16Matrices::Backend(adapter.get_info().backend))
}
