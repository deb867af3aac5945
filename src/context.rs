//! A device as the kernels see it: its limits, and the pipelines built so far.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::elements::{self, ElementModule, MatrixFormat, NoElementAccess, NoMatrices};
use crate::kernel::forward_coop::{self, Matrices};
use crate::kernel::{Access, Module, Pass, Slot};
use crate::passthrough;
use crate::{Error, Plan, PlanOptions, Problem, faults, loops};

/// A device, its queue, and the pipelines built for it. Plans made from one context share pipelines; clones share
/// everything.
#[derive(Clone, Debug)]
pub struct Context {
    device: wgpu::Device,
    queue: wgpu::Queue,
    limits: wgpu::Limits,
    /// How many iterations of loops the driver grants a shader, if it ends them.
    pub(crate) loop_iterations: Option<u64>,
    /// Lanes of the smallest subgroup there is, on devices that may use subgroup operations.
    pub(crate) lanes: Option<u32>,
    checked: bool,
    cache: Option<wgpu::PipelineCache>,
    pub(crate) matrices: Option<Matrices>,
    pipelines: Arc<Mutex<HashMap<Module, Arc<Pipeline>>>>,
}

#[derive(Debug)]
pub(crate) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

/// A module, to be compiled when it is asked for.
#[derive(Debug)]
pub(crate) struct LazyPipeline {
    context: Context,
    module: Module,
    built: OnceLock<Arc<Pipeline>>,
}

impl LazyPipeline {
    pub(crate) fn new(context: &Context, pass: &Pass) -> Self {
        LazyPipeline { context: context.clone(), module: pass.module(), built: OnceLock::new() }
    }

    /// Compiles it now, unless it is compiled already.
    pub(crate) fn build(&self) -> Result<(), Error> {
        self.get().map(|_| ())
    }

    fn get(&self) -> Result<Arc<Pipeline>, Error> {
        if let Some(built) = self.built.get() {
            return Ok(built.clone());
        }
        let built = self.context.pipeline(&self.module)?;
        Ok(self.built.get_or_init(|| built).clone())
    }

    /// The same, in which these inputs are declared as if they were written, since their buffers are.
    pub(crate) fn sharing(&self, inputs: &[Slot]) -> Result<Arc<Pipeline>, Error> {
        if inputs.is_empty() {
            return self.get();
        }
        self.context.pipeline(&self.module.sharing(inputs))
    }

    pub(crate) fn written(&self) -> impl Iterator<Item = Slot> + Clone {
        self.module.bindings.iter().filter(|(_, access)| *access == Access::ReadWrite).map(|&(slot, _)| slot)
    }

    pub(crate) fn read(&self) -> impl Iterator<Item = Slot> {
        self.module.bindings.iter().filter(|(_, access)| *access == Access::Read).map(|&(slot, _)| slot)
    }
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
            loop_iterations: loops::granted(&info),
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

    /// Checks the problem and decides how to compute it. Builds the pipelines of the forward pass that no earlier plan of this
    /// context built, and a small buffer of parameters. Those of the backward pass are built when they are asked for
    /// ([`Plan::prepare_backward`]).
    ///
    /// Drivers compile a pipeline in some milliseconds to some seconds; sizes and strides are not compiled in, so that one serves
    /// every length of a sequence. To have them ready before they are needed, make the plan early, on a thread of its own if
    /// you like: contexts and plans are `Send` and `Sync`, clones of a context share pipelines, and a plan is kept and used
    /// again. A [pipeline cache](Context::with_pipeline_cache) keeps them from one start of the program to the next.
    pub fn plan(&self, problem: &Problem) -> Result<Plan, Error> {
        self.plan_with(problem, &PlanOptions::default())
    }

    /// As [`Context::plan`], with some of its choices made by the caller.
    pub fn plan_with(&self, problem: &Problem, options: &PlanOptions) -> Result<Plan, Error> {
        faults::caught(&self.device, "plan", || Plan::new(self, problem, options))
    }

    /// As [`Context::plan_with`] and [`Plan::prepare_backward`], for the web, where only an asynchronous function can wait for the
    /// browser's verdict on the pipelines. Off the web it blocks as long as [`Context::plan`] does.
    pub async fn plan_async(&self, problem: &Problem, options: &PlanOptions) -> Result<Plan, Error> {
        let build = || {
            let plan = Plan::new(self, problem, options)?;
            plan.prepare_backward()?;
            Ok(plan)
        };
        let result = faults::caught_async(&self.device, "plan", build).await;
        if result.is_err() {
            // A browser tells only now that a pipeline failed, but not which.
            self.pipelines.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        result
    }

    fn pipeline(&self, module: &Module) -> Result<Arc<Pipeline>, Error> {
        let lock = || self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = lock().get(module) {
            return Ok(pipeline.clone());
        }
        // Built outside the lock: two threads may build one pipeline twice, but neither waits for the other.
        // In a scope of its own, so that one that failed is not found here by the next plan.
        let built = Arc::new(faults::caught(&self.device, "pipeline", || self.build(module))?);
        Ok(lock().entry(module.clone()).or_insert(built).clone())
    }

    fn build(&self, key: &Module) -> Result<Pipeline, Error> {
        let specialization = &key.specialization;
        let label = Some(specialization.file);
        // A test specialises and validates every module, so that this does not fail on a user's machine.
        let text = key.text().map_err(|error| Error::Device(error.to_string()))?;
        let module = match &self.matrices {
            Some(matrices) if key.element_access => {
                ElementModule::new(&text, matrices.format, &key.binding_numbers(), self.checked)
                    .map_err(NoElementAccess::from)
                    .and_then(|module| passthrough::shader_module(&self.device, specialization.file, &module))
                    .map_err(|error| Error::Device(error.to_string()))?
            }
            _ => self.module(wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(text.into()) }),
        };
        let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
        entries.extend(key.bindings.iter().map(|&(slot, access)| {
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
