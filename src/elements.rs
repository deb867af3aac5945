//! Access to the elements of cooperative matrices, which SPIR-V has and WGSL has not.
//!
//! The lanes of a subgroup hold a cooperative matrix together, each the same number of its elements. A kernel is WGSL
//! that naga parses and validates like any other; it reaches a lane's elements through placeholder functions, whose
//! bodies are harmless:
//! - `coop_get_N(m)`, or `coop_get_…_N(m)`, is element N of what the lane holds of the matrix m,
//! - `coop_set…(m, e0, e1, …)` is m with the lane's first elements replaced by e0, e1, ….
//!
//! [`ElementModule::new`] has naga write the module as SPIR-V, where it then makes the functions do what they say.
//!
//! Which row and column the element n of lane i is in is the implementation's choice. [`probe`] asks it once, and
//! [`MatrixLayout`] is the answer that kernels are specialised by.

#[cfg(not(target_arch = "wasm32"))]
mod module;
// Browsers have no cooperative matrices, and naga would be most of what they load.
#[cfg(target_arch = "wasm32")]
#[path = "elements/module_web.rs"]
mod module;

use std::fmt::Write;

pub use module::ElementModule;

use crate::error::features;
use crate::{Context, Error, faults, passthrough};

/// The device features that kernels on cooperative matrices need, all of them the caller's decision.
pub const MATRIX_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16).union(wgpu::Features::SUBGROUP);

/// The same with what access to their elements needs.
pub const FEATURES: wgpu::Features = MATRIX_FEATURES.union(wgpu::Features::PASSTHROUGH_SHADERS);

/// Why kernels cannot use a device's cooperative matrices.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NoMatrices {
    /// The device was created without features that are needed.
    #[error("the device was created without {}; request it where the adapter has it", features(*.0))]
    Features(wgpu::Features),
    /// The adapter does not have features that are needed.
    #[error("the adapter has no {}; its driver may be too old, or the hardware has none", features(*.0))]
    AdapterFeatures(wgpu::Features),
    /// The adapter has no square matrices of a size that WGSL can name, f16 with f32 sums.
    #[error("the adapter lists no f16 matrices of 16x16 or 8x8 with f32 sums")]
    MatrixSize,
    /// A kernel cannot know how many lanes share a matrix.
    #[error("subgroups have {min} to {max} lanes; one size is needed, from a row of a matrix to its elements")]
    SubgroupSize {
        /// Fewest lanes.
        min: u32,
        /// Most lanes.
        max: u32,
    },
    /// The adapter is not the one that the device came from.
    #[error("the adapter is another than the device's; pass the adapter that the device was requested from")]
    Adapter,
}

/// Why a device gives no access to the elements of its matrices.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NoElementAccess {
    /// The device was created without features that are needed.
    #[error("the device was created without {}", features(*.0))]
    Features(wgpu::Features),
    /// Only Vulkan takes SPIR-V.
    #[error("the backend is {0}, not Vulkan")]
    Backend(wgpu::Backend),
    /// The probe's module was refused.
    #[error("the probe: {0}")]
    Module(#[from] ModuleError),
    /// The driver or wgpu refused the probe, or the device failed while it ran.
    #[error("the probe failed: {0}")]
    Probe(String),
    /// Left operands do not lie as accumulators do, right ones not as their transpose, or a lane holds more or fewer
    /// than eight elements.
    #[error("the roles of a matrix lie in the lanes in ways that no kernel is written for")]
    Roles,
    /// The elements lie in a way that no kernel is written for.
    #[error("role {role}: {error}")]
    Layout {
        /// `C`, `A` or `B`.
        role: &'static str,
        /// What is unexpected.
        error: LayoutError,
    },
}

/// The matrices that a module is made for: `size` by `size`, A and B of f16, C of f32, shared by `lanes` lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixFormat {
    /// Rows and columns, 8 or 16.
    pub size: u32,
    /// The lanes of a subgroup, a power of two.
    pub lanes: u32,
}

impl MatrixFormat {
    /// The largest matrices of this device that kernels can use. `properties` are those of the device's adapter,
    /// `Adapter::cooperative_matrix_properties`.
    pub fn of(
        device: &wgpu::Device,
        properties: &[wgpu::CooperativeMatrixProperties],
    ) -> Result<MatrixFormat, NoMatrices> {
        let missing = MATRIX_FEATURES - device.features();
        if !missing.is_empty() {
            return Err(NoMatrices::Features(missing));
        }
        let listed = |&size: &u32| {
            properties.iter().any(|p| {
                [p.m_size, p.n_size, p.k_size] == [size; 3]
                    && p.ab_type == wgpu::CooperativeScalarType::F16
                    && p.cr_type == wgpu::CooperativeScalarType::F32
            })
        };
        let size = [16, 8].into_iter().find(listed).ok_or(NoMatrices::MatrixSize)?;
        let info = device.adapter_info();
        let (min, max) = match info.backend {
            // wgpu reports what any GPU with Metal may have; all those with matrices have 32.
            wgpu::Backend::Metal => (32, 32),
            _ => (info.subgroup_min_size, info.subgroup_max_size),
        };
        if min != max || !max.is_power_of_two() || max < size || max > size * size {
            return Err(NoMatrices::SubgroupSize { min, max });
        }
        Ok(MatrixFormat { size, lanes: max })
    }

    /// How many elements each lane holds. Where an implementation keeps elements more than once it is more, never
    /// less, so that these can always be accessed; the probe then finds no layout.
    pub fn elements(self) -> u32 {
        self.size * self.size / self.lanes
    }
}

/// Why a module was refused. The library's own modules are not: a test makes each of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// naga refused the text, or could not write it as SPIR-V.
    #[error("{0}")]
    Naga(String),
    /// A matrix that the format does not have.
    #[error("{found} is not a matrix of f16 (A, B) or f32 (C) with {size} rows and columns")]
    Matrix {
        /// The type, as WGSL writes it.
        found: String,
        /// The format's size.
        size: u32,
    },
    /// A function whose name starts with `coop_` and that means nothing.
    #[error("unknown placeholder {function}: it must start with coop_get_ or coop_set")]
    UnknownPlaceholder {
        /// Its name.
        function: String,
    },
    /// A placeholder with the wrong parameters, result or name.
    #[error("placeholder {function}: {expected}")]
    Signature {
        /// Its name.
        function: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A placeholder for an element that a lane may not hold.
    #[error("placeholder {function} is for element {element}; a lane holds {elements}")]
    Element {
        /// Its name.
        function: String,
        /// The highest element that it accesses.
        element: u32,
        /// How many there are.
        elements: u32,
    },
    /// A workgroup in which lanes of a subgroup are missing: only whole subgroups can share matrices.
    #[error("entry point {entry_point} has workgroups of {width} in x; a multiple of {lanes} is needed")]
    Workgroup {
        /// Its name.
        entry_point: String,
        /// The workgroup's size in x.
        width: u32,
        /// The lanes of a subgroup.
        lanes: u32,
    },
    /// A placeholder that the SPIR-V does not name, so that its harmless body would run.
    #[error("placeholder {function} is not in the SPIR-V that naga wrote")]
    Lost {
        /// Its name.
        function: String,
    },
}

/// A bit of the number of a lane, or of the number of an element that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bit {
    /// A bit of the lane.
    Lane(u32),
    /// A bit of the element.
    Element(u32),
}

/// Where a square matrix lies in the lanes of a subgroup: the bits of lane and element are the bits of row and column,
/// in another order.
///
/// So the positions of a lane and of an element add: element e of lane i is at `position(i, 0) + position(0, e)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MatrixLayout {
    /// What each bit of the row is, the lowest first.
    pub row: Vec<Bit>,
    /// What each bit of the column is, the lowest first.
    pub column: Vec<Bit>,
}

/// How elements lie that are not in a [`MatrixLayout`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The numbers do not make a matrix.
    #[error("{found} indices in {lanes} lanes of {elements} elements are no matrix with {size} rows and columns")]
    Shape {
        /// Rows and columns.
        size: u32,
        /// Lanes.
        lanes: u32,
        /// Elements of each lane.
        elements: u32,
        /// How many indices were given.
        found: usize,
    },
    /// A bit that is not one bit of row or column.
    #[error("{bit:?} alone is at index {index:#x}, which has not one bit")]
    NotOneBit {
        /// The bit.
        bit: Bit,
        /// What the element holds whose only bit it is.
        index: u32,
    },
    /// Two bits that are the same bit of row or column: some elements are held twice.
    #[error("{first:?} and {second:?} are the same bit of row and column")]
    SameBit {
        /// The lower.
        first: Bit,
        /// The higher.
        second: Bit,
    },
    /// An element that is not where its bits say.
    #[error("element {element} of lane {lane} is at index {found:#x}; by its bits it would be at {expected:#x}")]
    NotLinear {
        /// The lane.
        lane: u32,
        /// Its element.
        element: u32,
        /// The index that it holds.
        found: u32,
        /// The sum of what its bits hold.
        expected: u32,
    },
}

impl MatrixLayout {
    /// Finds the layout from what the elements of a matrix of indices are: `indices[lane * elements + element]` is
    /// `row * size + column`.
    pub fn from_indices(size: u32, lanes: u32, elements: u32, indices: &[u32]) -> Result<MatrixLayout, LayoutError> {
        let all_powers = [size, lanes, elements].iter().all(|n| n.is_power_of_two());
        if !all_powers || lanes * elements != size * size || indices.len() != (size * size) as usize {
            return Err(LayoutError::Shape { size, lanes, elements, found: indices.len() });
        }
        // The place of an element in `indices` is a number too: its low bits are those of the element, its high bits
        // those of the lane.
        let bit = |n: u32| match n.checked_sub(elements.ilog2()) {
            Some(lane_bit) => Bit::Lane(lane_bit),
            None => Bit::Element(n),
        };
        let bits = 2 * size.ilog2();
        // The bit of the place that is bit n of the index.
        let mut sources = vec![None; bits as usize];
        for n in 0..bits {
            let index = indices[1 << n];
            if !index.is_power_of_two() || index >= size * size {
                return Err(LayoutError::NotOneBit { bit: bit(n), index });
            }
            if let Some(first) = sources[index.ilog2() as usize].replace(n) {
                return Err(LayoutError::SameBit { first: bit(first), second: bit(n) });
            }
        }
        for (place, &found) in (0..).zip(indices) {
            let set = (0..bits).filter(|n| place >> n & 1 == 1);
            let expected = set.map(|n| indices[1 << n]).sum();
            if found != expected {
                let (lane, element) = (place / elements, place % elements);
                return Err(LayoutError::NotLinear { lane, element, found, expected });
            }
        }
        let mut column: Vec<Bit> = sources.into_iter().flatten().map(bit).collect();
        let row = column.split_off(size.ilog2() as usize);
        Ok(MatrixLayout { row, column })
    }

    /// A layout in which each lane's elements lie in one row, in runs of four where it has as many, beside those of its
    /// neighbours. For formats with at least as many lanes as rows.
    pub fn rows(format: MatrixFormat) -> MatrixLayout {
        let (bits, elements) = (format.size.ilog2(), format.elements().ilog2());
        let shared = bits - elements;
        let run = elements.min(2);
        let mut column: Vec<Bit> = (0..run).map(Bit::Element).collect();
        column.extend((0..shared).map(Bit::Lane));
        column.extend((run..elements).map(Bit::Element));
        MatrixLayout { row: (shared..shared + bits).map(Bit::Lane).collect(), column }
    }

    /// Row and column of an element of a lane.
    pub fn position(&self, lane: u32, element: u32) -> (u32, u32) {
        let gather = |bits: &[Bit]| {
            (0..).zip(bits).fold(0, |sum, (place, &bit)| {
                sum | match bit {
                    Bit::Lane(n) => (lane >> n & 1) << place,
                    Bit::Element(n) => (element >> n & 1) << place,
                }
            })
        };
        (gather(&self.row), gather(&self.column))
    }

    /// The bits of an element that choose its row, the one for the lowest row bit first. A lane holds elements of
    /// two to the power of their number rows.
    pub fn row_element_bits(&self) -> Vec<u32> {
        self.row.iter().filter_map(|bit| if let Bit::Element(n) = bit { Some(*n) } else { None }).collect()
    }

    /// What to add to a lane, bit by bit without carry, to reach the lanes that hold the rest of its rows, one step
    /// after the other: the `subgroupShuffleXor` steps of a sum or maximum over each row.
    pub fn row_shuffles(&self) -> Vec<u32> {
        self.column.iter().filter_map(|bit| if let Bit::Lane(n) = bit { Some(1 << n) } else { None }).collect()
    }

    /// The layout of the transposed matrix in the same lanes.
    pub fn transposed(&self) -> MatrixLayout {
        MatrixLayout { row: self.column.clone(), column: self.row.clone() }
    }
}

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
pub async fn probe(context: &Context, format: MatrixFormat) -> Result<ProbedLayouts, NoElementAccess> {
    let MatrixFormat { size, lanes } = format;
    let count = size * size;
    let module = ElementModule::new(&probe_text(format), format, &[0, 1, 2], false)?;
    // f16 holds every integer up to 2048.
    let indices_f32: Vec<f32> = (0..count).map(|n| n as f32).collect();
    let indices_f16: Vec<half::f16> = indices_f32.iter().map(|&x| half::f16::from_f32(x)).collect();
    // No index, so that an element that no lane writes is noticed.
    let nothing = vec![u32::MAX; 3 * count as usize];

    let device = context.device();
    // Asked before any scope opens.
    passthrough::check(device)?;
    let submitted = faults::caught_async(device, "probe", || {
        let shader = passthrough::shader_module(device, "coop_probe", &module)
            .map_err(|error| Error::Device(error.to_string()))?;
        let buffers = [
            context.upload(bytemuck::cast_slice(&indices_f32))?,
            context.upload(bytemuck::cast_slice(&indices_f16))?,
            context.upload(bytemuck::cast_slice(&nothing))?,
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
        context.queue().submit([encoder.finish()]);
        let [_, _, held] = buffers;
        Ok(held)
    });
    let failed = |error: Error| NoElementAccess::Probe(error.to_string());
    let held = submitted.await.map_err(failed)?;
    let bytes = context.download_async(&held, 0, u64::from(3 * count) * 4).await.map_err(failed)?;
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
    text + include_str!("../shaders/coop_probe.wgsl")
}
