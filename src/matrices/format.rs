//! Which cooperative matrices a device has.

use crate::error::NoMatrices;

/// The device features that kernels on cooperative matrices need, all of them the caller's decision.
pub const MATRIX_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16).union(wgpu::Features::SUBGROUP);

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
