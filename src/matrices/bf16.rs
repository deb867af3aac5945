//! The proof that a device has cooperative matrices of bf16, of which wgpu knows nothing.

use super::access::{FEATURES, NoElementAccess};
use crate::error::features;

#[cfg(all(feature = "vulkan", any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
#[path = "bf16_vulkan.rs"]
mod vulkan;
#[cfg(not(all(feature = "vulkan", any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))))]
#[path = "bf16_nowhere.rs"]
mod vulkan;

/// The proof that a device has cooperative matrices (tensor cores) of bf16. [`Context::with_bf16_matrices`](crate::Context::with_bf16_matrices)
/// takes it, and plans of that context compute problems in bf16 on them.
///
/// These matrices come with the Vulkan extension `VK_KHR_shader_bfloat16`, of which wgpu knows nothing: `Adapter::request_device` does not switch it
/// on, and a device cannot be asked whether it is on. So there are two ways to a proof: [`request_device`](Self::request_device) makes the device,
/// and [`of_device`](Self::of_device) takes the word of an application that made it.
///
/// You need none for a device of [`Context::headless_with`](crate::Context::headless_with), whose option `cooperative_matrices` sees to it, nor where
/// you have no problems in bf16.
#[derive(Clone, Debug)]
pub struct Bf16Matrices {
    device: wgpu::Device,
    /// Rows and columns of the square matrices that there are.
    sizes: Vec<u32>,
}

/// Why a device has no cooperative matrices of bf16, or why kernels do not use them.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NoBf16Matrices {
    /// Nobody said that there are any.
    #[error(
        "the context was made without Context::with_bf16_matrices; make the device by Bf16Matrices::request_device"
    )]
    NotGiven,
    /// Only Vulkan has them.
    #[error("the backend is {0}; only Vulkan has matrices of bf16, where the crate is built with the feature vulkan")]
    Backend(wgpu::Backend),
    /// Device features that have to be asked for too.
    #[error("the device is to be created without {}; request it too", features(*.0))]
    Features(wgpu::Features),
    /// The driver has no such extension.
    #[error("the driver has no VK_KHR_shader_bfloat16; a newer one may have it")]
    Extension,
    /// The extension is there, but not for matrices.
    #[error("the driver has VK_KHR_shader_bfloat16 without shaderBFloat16Type or shaderBFloat16CooperativeMatrix")]
    MatrixFeature,
    /// There are no square matrices of bf16 that are added up in f32.
    #[error("the driver lists no matrices of bf16, 16x16 or 8x8, with f32 sums")]
    MatrixSize,
    /// Vulkan did not make a device with them.
    #[error("Vulkan made no device with VK_KHR_shader_bfloat16: {0}")]
    Refused(String),
    /// A device that was made without the extension.
    #[error("the device was created without VK_KHR_shader_bfloat16; make it by Bf16Matrices::request_device")]
    NotEnabled,
    /// The adapter given to [`Bf16Matrices::of_device`] is not the one that the device came from.
    #[error("the adapter is another than the device's; pass the adapter that the device was requested from")]
    Adapter,
    /// They are those of another device.
    #[error("these Bf16Matrices are another device's than the context; pass those that came with its device")]
    Device,
    /// The context uses no matrices of f16.
    #[error("the context uses no cooperative matrices yet; call Context::with_cooperative_matrices first")]
    NoMatrices,
    /// There are none of the size of the f16 matrices, which kernels use for both.
    #[error("matrices of f16 are {f16}x{f16}, and of bf16 there are none of this size")]
    OtherSize {
        /// Rows and columns.
        f16: u32,
    },
    /// Their elements cannot be accessed.
    #[error("{0}")]
    Access(#[from] NoElementAccess),
    /// Kernels are written for matrices of both types that lie alike.
    #[error("matrices of bf16 do not lie in the lanes as those of f16 do")]
    Layout,
}

impl Bf16Matrices {
    /// As [`wgpu::Adapter::request_device`], with `VK_KHR_shader_bfloat16` where the adapter has it and matrices of bf16.
    ///
    /// The third value is the proof, or why there is none. Where there is none, the device is what `wgpu::Adapter::request_device` makes of the
    /// descriptor.
    ///
    /// The descriptor has to ask for [`COOPERATIVE_MATRIX_FEATURES`](crate::COOPERATIVE_MATRIX_FEATURES) and `PASSTHROUGH_SHADERS`: without them the
    /// third value is [`NoBf16Matrices::Features`].
    ///
    /// # Errors
    ///
    /// Those of `wgpu::Adapter::request_device`: the adapter cannot make the device that the descriptor asks for.
    ///
    /// ```no_run
    /// # async fn example(adapter: wgpu::Adapter, descriptor: wgpu::DeviceDescriptor<'_>) -> Result<(), Box<dyn std::error::Error>> {
    /// use wgpu_flash_attention::{Bf16Matrices, Context, wgpu};
    ///
    /// let (device, queue, bf16) = Bf16Matrices::request_device(&adapter, &descriptor).await?;
    /// let mut context = Context::new(&device, &queue).with_cooperative_matrices(&adapter).await?;
    /// if let Ok(bf16) = bf16 {
    ///     context = context.with_bf16_matrices(&bf16).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn request_device(
        adapter: &wgpu::Adapter,
        descriptor: &wgpu::DeviceDescriptor<'_>,
    ) -> Result<(wgpu::Device, wgpu::Queue, Result<Bf16Matrices, NoBf16Matrices>), wgpu::RequestDeviceError> {
        let without = match with_extension(adapter, descriptor) {
            Ok((device, queue, sizes)) => {
                let bf16 = Bf16Matrices { device: device.clone(), sizes };
                return Ok((device, queue, Ok(bf16)));
            }
            Err(why) => why,
        };
        let (device, queue) = adapter.request_device(descriptor).await?;
        Ok((device, queue, Err(without)))
    }

    /// The proof for a device that the application made itself with the extension, by `wgpu::hal::vulkan::Adapter::open_with_callback` or in Vulkan.
    /// `adapter` is the one that the device came from.
    ///
    /// The application's word is checked as far as wgpu allows it: the extension has to be among those that wgpu was told that the device was opened
    /// with, and the physical device has to have the extension's features and the matrices.
    ///
    /// # Errors
    ///
    /// [`NoBf16Matrices`] says which of these is missing, [`NoBf16Matrices::Adapter`] that the adapter is another.
    ///
    /// # Safety
    ///
    /// The device was created with `shaderBFloat16Type` and `shaderBFloat16CooperativeMatrix` of `VkPhysicalDeviceShaderBfloat16FeaturesKHR` set to
    /// true, which a device cannot be asked. Without them the driver is given shaders that it does not have to understand, and what it then does is
    /// undefined.
    #[allow(unsafe_code)]
    pub unsafe fn of_device(adapter: &wgpu::Adapter, device: &wgpu::Device) -> Result<Bf16Matrices, NoBf16Matrices> {
        let sizes = vulkan::sizes_of(adapter, device)?;
        Ok(Bf16Matrices { device: device.clone(), sizes })
    }

    /// As if the device had them, for a test.
    #[cfg(test)]
    pub(crate) fn of_sizes(device: &wgpu::Device, sizes: Vec<u32>) -> Bf16Matrices {
        Bf16Matrices { device: device.clone(), sizes }
    }

    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.device
    }

    pub(crate) fn has_size(&self, size: u32) -> bool {
        self.sizes.contains(&size)
    }
}

/// A device with the extension, and the sizes of its matrices. A descriptor that wgpu would refuse is an error here, so that `request_device` passes
/// it on to wgpu, which says what is wrong with it.
fn with_extension(
    adapter: &wgpu::Adapter,
    descriptor: &wgpu::DeviceDescriptor<'_>,
) -> Result<(wgpu::Device, wgpu::Queue, Vec<u32>), NoBf16Matrices> {
    let missing = FEATURES - descriptor.required_features;
    if !missing.is_empty() {
        return Err(NoBf16Matrices::Features(missing));
    }
    let is_good = adapter.features().contains(descriptor.required_features)
        && descriptor.required_limits.check_limits(&adapter.limits())
        && descriptor.experimental_features.is_enabled();
    if !is_good {
        return Err(NoBf16Matrices::Refused("wgpu does not take the descriptor".into()));
    }
    vulkan::request_device(adapter, descriptor)
}
