//! Asks a device how its matrices lie in the lanes, by one small kernel.

use std::fmt::Write;

use super::access::NoElementAccess;
use super::format::MatrixFormat;
use super::layout::MatrixLayout;
use super::passthrough;
use super::spirv::ElementModule;
use crate::error::Error;
use crate::{faults, transfer};

/// How the matrices of a device lie in its lanes, by role.
///
/// Scores become left operands in place where `c == a`; right operands are left operands of the transposed matrix where
/// `b == a.transposed()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbedLayouts {
    /// Accumulators, f32.
    pub c: MatrixLayout,
    /// Left operands, f16.
    pub a: MatrixLayout,
    /// Right operands, f16.
    pub b: MatrixLayout,
}

/// Runs a small kernel that finds how matrices lie in the lanes of this device.
pub async fn probe(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    format: MatrixFormat,
) -> Result<ProbedLayouts, NoElementAccess> {
    let MatrixFormat { size, lanes } = format;
    let count = size * size;
    let module = ElementModule::new(&probe_text(format), format, &[0, 1, 2], false)?;
    // f16 holds every integer up to 2048.
    let indices_f32: Vec<f32> = (0..count).map(|n| n as f32).collect();
    let indices_f16: Vec<half::f16> = indices_f32.iter().map(|&x| half::f16::from_f32(x)).collect();
    // No index, so that an element that no lane writes is noticed.
    let nothing = vec![u32::MAX; 3 * count as usize];

    // Asked before any scope opens.
    passthrough::check(device)?;
    let submitted = faults::caught_async(device, "probe", || {
        let shader = passthrough::shader_module(device, "coop_probe", &module)
            .map_err(|error| Error::Device(error.to_string()))?;
        let buffers = [
            transfer::upload(device, bytemuck::cast_slice(&indices_f32))?,
            transfer::upload(device, bytemuck::cast_slice(&indices_f16))?,
            transfer::upload(device, bytemuck::cast_slice(&nothing))?,
        ];
        let label = Some("coop_probe");
        let entries = [0, 1, 2].map(|binding| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: false },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        });
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &shader,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let entries: Vec<_> = (0..)
            .zip(&buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label, layout: &layout, entries: &entries });
        let mut encoder = device.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(1, 1, 1);
        }
        queue.submit([encoder.finish()]);
        let [_, _, held] = buffers;
        Ok(held)
    });
    let failed = |error: Error| NoElementAccess::Probe(error.to_string());
    let held = submitted.await.map_err(failed)?;
    let bytes = transfer::download(device, queue, &held, 0, u64::from(3 * count) * 4).await.map_err(failed)?;
    let held: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
    let layout = |role, part: usize| {
        let indices = &held[part * count as usize..][..count as usize];
        MatrixLayout::from_indices(size, lanes, format.elements(), indices)
            .map_err(|error| NoElementAccess::Layout { role, error })
    };
    Ok(ProbedLayouts { c: layout("C", 0)?, a: layout("A", 1)?, b: layout("B", 2)? })
}

/// The probe's kernel for matrices of this format. Public for the test that validates it.
pub fn probe_text(format: MatrixFormat) -> String {
    let MatrixFormat { size, lanes } = format;
    let mut text =
        format!("enable f16;\nenable wgpu_cooperative_matrix;\nconst SIZE = {size}u;\nconst LANES = {lanes}u;\n");
    for (role, scalar) in [("c", "f32"), ("a", "f16"), ("b", "f16")] {
        let matrix = format!("Matrix{}", role.to_uppercase());
        let _ = writeln!(text, "alias {matrix} = coop_mat{size}x{size}<{scalar}, {}>;", role.to_uppercase());
        let mut writes = String::new();
        for n in 0..format.elements() {
            let _ = writeln!(text, "fn coop_get_{role}_{n}(m: {matrix}) -> {scalar} {{ return {scalar}(); }}");
            let _ = writeln!(writes, "    held[at + {n}u] = u32(coop_get_{role}_{n}(m));");
        }
        let _ = writeln!(text, "fn write_{role}(m: {matrix}, at: u32) {{\n{writes}}}");
    }
    text + include_str!("../../shaders/kernel/coop_probe.wgsl")
}
