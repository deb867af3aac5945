//! Block-sparse attention: which blocks of scores are computed, as lists that kernels walk over.

pub mod lists;
pub mod pattern;
