//! A device as the kernels see it: what it allows, and the pipelines built so far.

use crate::error::NoMatrices;
use crate::facts::{Facts, Matrices};
use crate::matrices::probe::probe_bf16;
use crate::matrices::{Bf16Matrices, MatrixFormat, NoBf16Matrices, probe};
use crate::pipelines::Pipelines;

/// A device, its queue, and the pipelines built for it. Plans made from one context share pipelines; clones share
/// everything.
#[derive(Clone, Debug)]
pub struct Context {
    device: wgpu::Device,
    queue: wgpu::Queue,
    facts: Facts,
    pipelines: Pipelines,
}

impl Context {
    /// Uses the caller's device as it is: any features, any limits. Decoding uses `Features::SUBGROUP` where the device
    /// was made with it.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        Context {
            device: device.clone(),
            queue: queue.clone(),
            facts: Facts::of(device),
            pipelines: Pipelines::new(device),
        }
    }

    /// The same device, with wgpu's bounds checks in every kernel: slower, for debugging and tests.
    pub fn checked(mut self) -> Self {
        self.pipelines.check();
        self
    }

    /// Builds pipelines through the caller's cache, so that the driver need not compile them again on a later start.
    pub fn with_pipeline_cache(mut self, cache: wgpu::PipelineCache) -> Self {
        self.pipelines.cache = Some(cache);
        self
    }

    /// Allows kernels on cooperative matrices (tensor cores), for devices whose owner opted in to
    /// [`COOPERATIVE_MATRIX_FEATURES`](crate::COOPERATIVE_MATRIX_FEATURES). `adapter` is the one that the device came
    /// from; it knows the sizes of the matrices.
    ///
    /// They are faster with access to the elements of matrices, which they have on Vulkan if the device was also
    /// created with `Features::PASSTHROUGH_SHADERS`. To learn which lane holds which element this runs one small
    /// kernel, and waits for it. A plan says which form it takes, and why ([`CoopForm`](crate::CoopForm)).
    pub async fn with_cooperative_matrices(mut self, adapter: &wgpu::Adapter) -> Result<Self, NoMatrices> {
        let of = |info: wgpu::AdapterInfo| (info.name, info.vendor, info.device, info.backend, info.driver_info);
        if of(adapter.get_info()) != of(self.device.adapter_info()) {
            return Err(NoMatrices::Adapter);
        }
        let format = MatrixFormat::of(&self.device, &adapter.cooperative_matrix_properties())?;
        let probed = probe(&self.device, &self.queue, format).await;
        self.pipelines.format = Some(format);
        self.facts.matrices = Some(Matrices::new(format, probed));
        Ok(self)
    }

    /// Allows kernels on matrices of bf16 too, in a context [`with_cooperative_matrices`](Self::with_cooperative_matrices): then problems in bf16
    /// run the kernels of f16. Without them bf16 is scaled to f16, which takes 1.4 to 4 times as long on an H200.
    ///
    /// To learn how these matrices lie and how the device rounds this runs one more small kernel, and waits for it. Where the device has them and
    /// kernels cannot use them, plans go on scaling and say why: that is no error. Call it last: `with_cooperative_matrices` begins anew, without
    /// matrices of bf16.
    ///
    /// # Errors
    ///
    /// [`NoBf16Matrices::Device`] if `bf16` is of another device, [`NoBf16Matrices::NoMatrices`] if the context has no cooperative matrices of f16.
    pub async fn with_bf16_matrices(mut self, bf16: &Bf16Matrices) -> Result<Self, NoBf16Matrices> {
        if *bf16.device() != self.device {
            return Err(NoBf16Matrices::Device);
        }
        let Some(matrices) = self.facts.matrices.take() else {
            return Err(NoBf16Matrices::NoMatrices);
        };
        self.facts.matrices = Some(match matrices.format {
            format if bf16.has_size(format.size) => matrices.with_bf16(probe_bf16(bf16, &self.queue, format).await),
            format => Matrices { bf16: Err(NoBf16Matrices::OtherSize { f16: format.size }), ..matrices },
        });
        Ok(self)
    }

    /// Why there are no matrices of bf16, for plans to say.
    pub(crate) fn without_bf16_matrices(mut self, why: NoBf16Matrices) -> Self {
        if let Some(matrices) = &mut self.facts.matrices {
            matrices.bf16 = Err(why);
        }
        self
    }

    /// The device.
    pub fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// The device's queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    pub(crate) fn limits(&self) -> &wgpu::Limits {
        &self.facts.limits
    }

    /// What the device allows.
    #[doc(hidden)]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    pub(crate) fn pipelines(&self) -> &Pipelines {
        &self.pipelines
    }
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use super::*;

    /// Whoever's they are, it is found before anything is asked of the device. So no device needs to have any.
    #[test]
    fn bf16_matrices_of_another_device() {
        let Ok(context) = Context::headless() else {
            eprintln!("SKIPPED: no adapter");
            return;
        };
        let other = Context::headless().unwrap();
        let with = |of: &Context| {
            let bf16 = Bf16Matrices::of_sizes(of.device(), vec![16]);
            pollster::block_on(context.clone().with_bf16_matrices(&bf16)).unwrap_err()
        };
        assert_eq!(with(&other), NoBf16Matrices::Device);
        assert!(with(&other).to_string().contains("pass those that came with its device"));
        // Of its own device, but without matrices of f16.
        assert_eq!(with(&context), NoBf16Matrices::NoMatrices);
        assert!(with(&context).to_string().contains("Context::with_cooperative_matrices"));
    }
}
