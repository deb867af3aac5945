//! Names that users, errors and kernels share: element types, kernels and their forms, and the largest sizes. The ground floor: it
//! uses nothing of the crate.

/// The largest sequence length: positions and window bounds are computed in `i32`.
pub const MAX_SEQLEN: u32 = 1 << 29;
/// The largest head dimension of queries and keys, and of values.
pub const MAX_HEAD_DIM: u32 = 256;

/// The type of the elements in memory. Arithmetic is f32 (or better) in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ElementType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16. Needs no device feature.
    F16,
    /// bfloat16, the upper half of a binary32. Needs no device feature.
    BF16,
}

impl ElementType {
    /// Bytes an element takes.
    pub const fn bytes(self) -> u64 {
        match self {
            ElementType::F32 => 4,
            ElementType::F16 | ElementType::BF16 => 2,
        }
    }
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ElementType::F32 => "f32",
            ElementType::F16 => "f16",
            ElementType::BF16 => "bf16",
        })
    }
}

/// Which algorithm computes a problem.
///
/// All are right for scores within ±1e7 and values within ±1e35 over the number of keys, [`Kernel::Coop`] in f32, and in bf16 scaled to f16,
/// for scores within ±5e13, the other kernels for scores within ±5e37 and values within ±1e37 over the number of keys. Nothing looks for larger
/// ones. `docs/kernels/numbers.md` has more on this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Scores to memory, softmax, product: what people write first. The yardstick, and what plans for both passes take where sequences
    /// have at most 16 queries and 16 keys.
    Naive,
    /// Tiles on cooperative matrices (tensor cores), for contexts that
    /// [`Context::with_cooperative_matrices`](crate::Context::with_cooperative_matrices) made. The matrices are of f16, or of
    /// bf16 in contexts [`with_bf16_matrices`](crate::Context::with_bf16_matrices). On devices without matrices of bf16, bf16 is scaled to f16. f32 is split
    /// into two f16 parts, which keep 22 of its bits.
    Coop,
    /// The keys are split over workgroups, and the splits' results merged: for few queries. It takes neither dropout nor block lists. Plans take it by
    /// themselves for at most 16 queries, and at most 64 rows that share a key-value head (queries times query heads of the group).
    /// `docs/kernels/decode.md` has the other conditions.
    Decode,
    /// Tiles and an online softmax within WebGPU's default limits, larger tiles where the device allows them.
    Tile,
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kernel::Coop => "coop",
            Kernel::Decode => "decode",
            Kernel::Naive => "naive",
            Kernel::Tile => "tile",
        })
    }
}

/// Where the coop kernel keeps scores and probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CoopForm {
    /// In the registers where the matrices lie: faster, for devices that give access to the elements of matrices.
    Registers,
    /// They cross workgroup memory, which needs no such access.
    WorkgroupMemory,
}

impl std::fmt::Display for CoopForm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            CoopForm::Registers => "in registers",
            CoopForm::WorkgroupMemory => "through workgroup memory",
        })
    }
}
