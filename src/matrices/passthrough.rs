//! The one place that hands SPIR-V to the driver past wgpu's checks.
#![allow(unsafe_code)]

use super::access::{FEATURES, NoElementAccess};
use super::spirv::ElementModule;

/// Whether [`shader_module`] can work on this device. Which features the device has is its owner's decision.
pub(crate) fn check(device: &wgpu::Device) -> Result<(), NoElementAccess> {
    let missing = FEATURES - device.features();
    if !missing.is_empty() {
        return Err(NoElementAccess::Features(missing));
    }
    match device.adapter_info().backend {
        wgpu::Backend::Vulkan => Ok(()),
        other => Err(NoElementAccess::Backend(other)),
    }
}

/// A shader module with element access. Its pipeline needs an explicit layout: one group with exactly the bindings that
/// the module was made for.
pub(crate) fn shader_module(
    device: &wgpu::Device,
    label: &str,
    module: &ElementModule,
) -> Result<wgpu::ShaderModule, NoElementAccess> {
    check(device)?;
    let entry_points = module
        .entry_points()
        .iter()
        .map(|(name, [x, y, z])| wgpu::PassthroughShaderEntryPoint { name: name.into(), workgroup_size: (*x, *y, *z) });
    let descriptor = wgpu::ShaderModuleDescriptorPassthrough {
        label: Some(label),
        entry_points: entry_points.collect(),
        spirv: Some(module.spirv().into()),
        ..Default::default()
    };
    // SAFETY: wgpu looks at nothing in the module, so all that it would have checked must hold already.
    // - It is valid SPIR-V that the driver takes: naga validated the WGSL, allowing it no more than the features that
    //   were checked above switch on, and wrote the SPIR-V, which declares no capability that these features do not bring (a
    //   test lists them; StorageInputOutput16, which naga adds by default, is switched off); ElementModule, which nothing else can make, only replaced
    //   what placeholder functions of checked signatures return, by element accesses inside the matrix. Its matrices are
    //   of a format that the adapter listed; those of bf16, and what they declare besides, are planned only in a context that was given
    //   Bf16Matrices of this very device, which the probe's caller has too. Its workgroups are whole subgroups; the plan has compared threads and workgroup
    //   memory with the device's limits.
    // - Its bindings are where wgpu-hal puts them: ElementModule numbers them as it does, and the layout is written from
    //   the same list. A pipeline whose layout has other entries would be refused by nobody: the library builds
    //   each such pipeline beside the module, and hands the module to no one.
    // - It reads and writes nothing out of bounds and ends: the WGSL is the library's own, the same argument as for the
    //   modules that pipelines.rs creates without run-time checks.
    Ok(unsafe { device.create_shader_module_passthrough(descriptor) })
}

/// The opt-in to features that wgpu calls experimental, for a caller who asked for them by
/// [`HeadlessOptions::cooperative_matrices`](crate::HeadlessOptions::cooperative_matrices).
pub(crate) fn experimental_features() -> wgpu::ExperimentalFeatures {
    // SAFETY: the caller chose to run code of wgpu that may still have undefined behaviour; the documentation of the
    // option says so.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}
