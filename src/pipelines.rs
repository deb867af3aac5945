//! Pipelines: from modules to what a device runs, each built once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::Error;
use crate::faults;
use crate::kernel::{Access, Module, Pass, Slot};
use crate::matrices::{ElementModule, MatrixFormat, NoElementAccess, passthrough};

/// The pipelines of a device that were built so far. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Pipelines {
    device: wgpu::Device,
    /// Whether kernels have wgpu's bounds checks.
    checked: bool,
    pub cache: Option<wgpu::PipelineCache>,
    /// Of the matrices whose elements modules may access.
    pub format: Option<MatrixFormat>,
    built: Arc<Mutex<HashMap<Module, Arc<Pipeline>>>>,
}

impl Pipelines {
    pub(crate) fn new(device: &wgpu::Device) -> Self {
        Pipelines { device: device.clone(), checked: false, cache: None, format: None, built: Arc::default() }
    }

    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// Begins anew, with bounds checks.
    pub(crate) fn check(&mut self) {
        self.checked = true;
        self.built = Arc::default();
    }

    /// Forgets all of them.
    pub(crate) fn clear(&self) {
        self.built.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn pipeline(&self, module: &Module) -> Result<Arc<Pipeline>, Error> {
        let lock = || self.built.lock().unwrap_or_else(PoisonError::into_inner);
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
        let module = match self.format {
            Some(format) if key.element_access => {
                ElementModule::new(&text, format, &key.binding_numbers(), self.checked)
                    .and_then(|module| if key.is_bf16() { module.into_bf16() } else { Ok(module) })
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
            let storage = wgpu::BufferBindingType::Storage { read_only: access == Access::Read };
            entry(slot as u32, if slot.is_uniform() { wgpu::BufferBindingType::Uniform } else { storage })
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
        // SAFETY: the text is the library's own. Its loops end, its indices stay inside bindings that bind.rs has
        // checked against the layouts, and the tests run every kernel with these checks on as well.
        unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
    }
}

#[derive(Debug)]
pub(crate) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

/// A module, to be compiled when it is asked for.
#[derive(Debug)]
pub(crate) struct LazyPipeline {
    pipelines: Pipelines,
    module: Module,
    built: OnceLock<Arc<Pipeline>>,
}

impl LazyPipeline {
    pub(crate) fn new(pipelines: &Pipelines, pass: &Pass) -> Self {
        LazyPipeline { pipelines: pipelines.clone(), module: pass.module(), built: OnceLock::new() }
    }

    /// Compiles it now, unless it is compiled already.
    pub(crate) fn build(&self) -> Result<(), Error> {
        self.get().map(|_| ())
    }

    fn get(&self) -> Result<Arc<Pipeline>, Error> {
        if let Some(built) = self.built.get() {
            return Ok(built.clone());
        }
        let built = self.pipelines.pipeline(&self.module)?;
        Ok(self.built.get_or_init(|| built).clone())
    }

    /// The same, in which these inputs are declared as if they were written, since their buffers are.
    pub(crate) fn sharing(&self, inputs: &[Slot]) -> Result<Arc<Pipeline>, Error> {
        if inputs.is_empty() {
            return self.get();
        }
        self.pipelines.pipeline(&self.module.sharing(inputs))
    }

    pub(crate) fn written(&self) -> impl Iterator<Item = Slot> + Clone {
        self.module.bindings.iter().filter(|(_, access)| *access == Access::ReadWrite).map(|&(slot, _)| slot)
    }

    pub(crate) fn read(&self) -> impl Iterator<Item = Slot> {
        self.module.bindings.iter().filter(|(_, access)| *access == Access::Read).map(|&(slot, _)| slot)
    }
}
