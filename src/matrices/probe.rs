//! Asks a device how its matrices lie in the lanes and how it rounds what becomes an operand, by one small kernel.

use std::fmt::Write;

use super::access::NoElementAccess;
use super::bf16::Bf16Matrices;
use super::format::MatrixFormat;
use super::layout::MatrixLayout;
use super::passthrough;
use super::rounding::{self, Rounding};
use super::spirv::ElementModule;
use crate::error::Error;
use crate::{faults, transfer};

/// How the matrices of a device lie in its lanes, by role, and how numbers become operands.
///
/// Scores become left operands in place where `c == a`; right operands are left operands of the transposed matrix where
/// `b == a.transposed()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    /// Accumulators, f32.
    pub c: MatrixLayout,
    /// Left operands.
    pub a: MatrixLayout,
    /// Right operands.
    pub b: MatrixLayout,
    /// How f32 are rounded that become operands or are stored as such.
    pub rounding: Rounding,
}

/// What a device keeps of a matrix' operands: f16, or bf16.
struct Half {
    from_f32: fn(f32) -> u16,
    to_f32: fn(u16) -> f32,
    /// How many of the bits of an f32 it has not.
    cut: u32,
}

const F16: Half = Half {
    from_f32: |x| half::f16::from_f32(x).to_bits(),
    to_f32: |bits| half::f16::from_bits(bits).to_f32(),
    cut: 13,
};

const BF16: Half = Half {
    from_f32: |x| half::bf16::from_f32(x).to_bits(),
    to_f32: |bits| half::bf16::from_bits(bits).to_f32(),
    cut: 16,
};

/// Runs a small kernel that finds how matrices of f16 lie in the lanes of this device, and how it rounds to f16.
pub async fn probe(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    format: MatrixFormat,
) -> Result<Probed, NoElementAccess> {
    run(device, queue, format, &F16, module(format)?).await
}

/// Asks the device that has matrices of bf16 how their elements lie, and how it rounds to them.
pub(crate) async fn probe_bf16(
    bf16: &Bf16Matrices,
    queue: &wgpu::Queue,
    format: MatrixFormat,
) -> Result<Probed, NoElementAccess> {
    run(bf16.device(), queue, format, &BF16, module(format)?.into_bf16()?).await
}

fn module(format: MatrixFormat) -> Result<ElementModule, NoElementAccess> {
    Ok(ElementModule::new(&probe_text(format), format, &[0, 1, 2], false)?)
}

async fn run(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    format: MatrixFormat,
    half: &Half,
    module: ElementModule,
) -> Result<Probed, NoElementAccess> {
    let MatrixFormat { size, lanes } = format;
    let count = size * size;
    // f16 holds every integer up to 2048, bf16 up to 256.
    let indices: Vec<f32> = (0..count).map(|n| n as f32).collect();
    let identity = (0..count).map(|n| if n / size == n % size { 1.0 } else { 0.0 });
    let halves: Vec<u16> = indices.iter().copied().chain(identity).map(half.from_f32).collect();
    // Room for the numbers as they are converted.
    let halves = [halves, vec![0; count as usize]].concat();
    let numbers = [indices, rounding::numbers(count, half.cut)].concat();
    // No index, so that an element that no lane writes is noticed.
    let nothing = vec![u32::MAX; 5 * count as usize];

    // Asked before any scope opens.
    passthrough::check(device)?;
    let submitted = faults::caught_async(device, "probe", || {
        let shader = passthrough::shader_module(device, "coop_probe", &module)
            .map_err(|error| Error::Device(error.to_string()))?;
        let buffers = [
            transfer::upload(device, bytemuck::cast_slice(&numbers))?,
            transfer::upload(device, bytemuck::cast_slice(&halves))?,
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
        let [_, halves, held] = buffers;
        Ok([halves, held])
    });
    let failed = |error: Error| NoElementAccess::Probe(error.to_string());
    let [halves, held] = submitted.await.map_err(failed)?;
    let held = transfer::download(device, queue, &held, 0, u64::from(5 * count) * 4).await.map_err(failed)?;
    let held: Vec<u32> = bytemuck::pod_collect_to_vec(&held);
    let halves = transfer::download(device, queue, &halves, 0, u64::from(3 * count) * 2).await.map_err(failed)?;
    let halves: Vec<u16> = bytemuck::pod_collect_to_vec(&halves);
    let part = |n: usize| &held[n * count as usize..][..count as usize];
    let layout = |role, n: usize| {
        MatrixLayout::from_indices(size, lanes, format.elements(), part(n))
            .map_err(|error| NoElementAccess::Layout { role, error })
    };
    let [numbers, products] = [3, 4].map(|n| part(n).iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>());
    let stored = halves[2 * count as usize..].iter().map(|&bits| (half.to_f32)(bits)).collect::<Vec<_>>();
    let [as_operands, as_stored] = [products, stored].map(|found| Rounding::of(&numbers, &found, half.cut));
    Ok(Probed {
        c: layout("C", 0)?,
        a: layout("A", 1)?,
        b: layout("B", 2)?,
        rounding: if as_operands == as_stored { as_operands } else { Rounding::Other },
    })
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
            // By way of f32: of bf16 there are no other conversions.
            let _ = writeln!(writes, "    held[at + {n}u] = u32(f32(coop_get_{role}_{n}(m)));");
        }
        let _ = writeln!(text, "fn write_{role}(m: {matrix}, at: u32) {{\n{writes}}}");
    }
    let each = |term: &dyn Fn(u32) -> String| (0..format.elements()).map(term).collect::<Vec<_>>();
    let element = |n| format!("coop_get_c_{n}(m)");
    let _ = writeln!(
        text,
        "fn coop_set_a(z: MatrixA, {}) -> MatrixA {{ return z; }}\n\
         fn left_of(m: MatrixC) -> MatrixA {{ return coop_set_a(MatrixA(), {}); }}\n\
         fn write_bits(m: MatrixC, at: u32) {{\n{}}}\n\
         fn convert(m: MatrixC, at: u32) {{\n{}}}",
        each(&|n| format!("x{n}: f16")).join(", "),
        each(&|n| format!("f16({})", element(n))).join(", "),
        each(&|n| format!("    held[at + {n}u] = bitcast<u32>({});\n", element(n))).concat(),
        each(&|n| format!("    halves[at + {n}u] = f16({});\n", element(n))).concat(),
    );
    text + include_str!("../../shaders/kernel/coop_probe.wgsl")
}
