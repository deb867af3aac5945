//! In the place of `mods/` without the feature `mods`: nobody can make any.

/// There are none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Mods {}

pub(crate) const MOST_BUFFERS: usize = 8;

impl Mods {
    pub(crate) fn buffers(&self) -> std::iter::Empty<&str> {
        match *self {}
    }

    pub(crate) fn has_score_mod(&self) -> bool {
        match *self {}
    }

    pub(crate) fn has_mask_mod(&self) -> bool {
        match *self {}
    }

    pub(crate) fn printed(&self) -> &str {
        match *self {}
    }

    pub(crate) fn score(&self, _score: f64, _at: [u32; 6], _buffers: &[(String, Vec<u8>)]) -> [f64; 2] {
        match *self {}
    }

    pub(crate) fn keep(&self, _at: [u32; 6], _buffers: &[(String, Vec<u8>)]) -> bool {
        match *self {}
    }
}
