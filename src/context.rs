//! A device as the kernels see it: its limits, and the pipelines built so far.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::elements::{self, ElementModule, MatrixFormat, NoElementAccess, NoMatrices};
use crate::kernel::forward_coop::{self, Matrices};
use crate::kernel::{Access, Pass};
use crate::passthrough;
use crate::specialize::Specialization;
use crate::{Error, Plan, PlanOptions, Problem, faults};

/// A device, its queue, and the pipelines built for it. Plans made from one context share pipelines; clones share
/// everything.
#[derive(Clone, Debug)]
pub struct Context {
    device: wgpu::Device,
    queue: wgpu::Queue,
    limits: wgpu::Limits,
    /// Lanes of the smallest subgroup there is, on devices that may use subgroup operations.
    pub(crate) lanes: Option<u32>,
    checked: bool,
    cache: Option<wgpu::PipelineCache>,
    pub(crate) matrices: Option<Matrices>,
    pipelines: Arc<Mutex<HashMap<Specialization, Arc<Pipeline>>>>,
}

#[derive(Debug)]
pub(crate) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

impl Context {
    /// Uses the caller's device as it is: any features, any limits. Decoding uses `Features::SUBGROUP` where the device
    /// was made with it.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        let info = device.adapter_info();
        // A browser would want `enable subgroups`, which naga does not know.
        let subgroups =
            device.features().contains(wgpu::Features::SUBGROUP) && info.backend != wgpu::Backend::BrowserWebGpu;
        Context {
            limits: device.limits(),
            lanes: subgroups.then_some(info.subgroup_min_size),
            device: device.clone(),
            queue: queue.clone(),
            checked: false,
            cache: None,
            matrices: None,
            pipelines: Arc::default(),
        }
    }

    /// The same device, with wgpu's bounds checks in every kernel: slower, for debugging and tests.
    pub fn checked(mut self) -> Self {
        self.checked = true;
        self.pipelines = Arc::default();
        self
    }

    /// Builds pipelines through the caller's cache, so that the driver need not compile them again on a later start.
    pub fn with_pipeline_cache(mut self, cache: wgpu::PipelineCache) -> Self {
        self.cache = Some(cache);
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
        let elements = elements::probe(&self, format).await.and_then(|found| {
            let in_place = found.a == found.c && found.b == found.c.transposed();
            match in_place && format.elements() == forward_coop::ELEMENTS {
                true => Ok(found.c),
                false => Err(NoElementAccess::Roles),
            }
        });
        self.matrices = Some(Matrices { format, elements });
        Ok(self)
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
        &self.limits
    }

    /// Checks the problem and decides how to compute it. Builds the pipelines that it needs and that no earlier plan
    /// of this context built, and a small buffer of parameters.
    pub fn plan(&self, problem: &Problem) -> Result<Plan, Error> {
        self.plan_with(problem, &PlanOptions::default())
    }

    /// As [`Context::plan`], with some of its choices made by the caller.
    pub fn plan_with(&self, problem: &Problem, options: &PlanOptions) -> Result<Plan, Error> {
        faults::caught(&self.device, "plan", || Plan::new(self, problem, options))
    }

    /// As [`Context::plan_with`], for the web, where only an asynchronous function can wait for the browser's verdict on the
    /// pipelines. Off the web it blocks as long as [`Context::plan`] does.
    pub async fn plan_async(&self, problem: &Problem, options: &PlanOptions) -> Result<Plan, Error> {
        faults::caught_async(&self.device, "plan", || Plan::new(self, problem, options)).await
    }

    pub(crate) fn pipeline(&self, pass: &Pass) -> Result<Arc<Pipeline>, Error> {
        let lock = || self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = lock().get(&pass.specialization) {
            return Ok(pipeline.clone());
        }
        // Built outside the lock: two threads may build one pipeline twice, but neither waits for the other.
        let built = Arc::new(self.build(pass)?);
        Ok(lock().entry(pass.specialization.clone()).or_insert(built).clone())
    }

    fn build(&self, pass: &Pass) -> Result<Pipeline, Error> {
        let specialization = &pass.specialization;
        let label = Some(specialization.file);
        // A test specialises and validates every module, so that this does not fail on a user's machine.
        let source = specialization.source().map_err(|error| Error::Device(error.to_string()))?;
        let module = match &self.matrices {
            Some(matrices) if pass.element_access => {
                ElementModule::new(&source.text, matrices.format, &pass.binding_numbers(), self.checked)
                    .map_err(NoElementAccess::from)
                    .and_then(|module| passthrough::shader_module(&self.device, specialization.file, &module))
                    .map_err(|error| Error::Device(error.to_string()))?
            }
            _ => self
                .module(wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(source.text.into()) }),
        };
        let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
        entries.extend(pass.bindings.iter().map(|&(slot, access)| {
            entry(slot as u32, wgpu::BufferBindingType::Storage { read_only: access == Access::Read })
        }));
        let layout =
            self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(specialization.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                // Every kernel writes workgroup memory before it reads it.
                zero_initialize_workgroup_memory: self.checked,
            },
            cache: self.cache.as_ref(),
        });
        Ok(Pipeline { pipeline, layout })
    }

    #[allow(unsafe_code)]
    fn module(&self, descriptor: wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule {
        if self.checked {
            return self.device.create_shader_module(descriptor);
        }
        // SAFETY: the text is the library's own. Its loops end, its indices stay inside bindings that forward.rs has
        // checked against the layouts, and the tests run every kernel with these checks on as well.
        unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
    }
}
