//! Dropout as a caller says it: a probability, and what the random numbers of a pass come from.

use crate::problem::Shape;

/// Dropout of a pass: how likely it is that a probability is dropped, and which ones are.
///
/// The mask is FlashAttention-2's, bit for bit: seed and offset are its `rng_state`, and with them the two drop alike. It depends on seed,
/// offset, batch entry, query head, query and key alone, so that all kernels drop alike, forward and backward.
/// [`reference::dropout_mask`](crate::reference::dropout_mask) gives it.
///
/// A plan knows the probability ([`Problem::with_dropout`](crate::Problem::with_dropout)). Seed and offset change at every step of training,
/// so they are in a buffer, which each pass is given ([`ForwardBuffers::rng_state`](crate::ForwardBuffers::rng_state)). Only these two go to the
/// device there: [`probability`](Dropout::probability) must be that of the plan's problem, and nothing compares the two. What takes a `Dropout`
/// on the host has the probability from it: [`reference::dropout_mask`](crate::reference::dropout_mask),
/// [`reference::Extras::dropout`](crate::reference::Extras::dropout) and [`SdpaOptions::dropout`](crate::SdpaOptions::dropout).
///
/// Several passes of one submission need a buffer each, or a slot of one buffer each ([why](crate::ForwardBuffers::rng_state)). docs/features.md in
/// the repository has a training step over two layers.
///
/// ```
/// use wgpu_flash_attention::{Dropout, Shape};
///
/// let shape = Shape::square(2, 8, 512, 64);
/// let dropout = Dropout { probability: 0.1, seed: 42, offset: 0 };
/// let bytes: [u8; 16] = dropout.rng_state(); // what the buffer holds
/// assert_eq!(bytes[..8], 42u64.to_le_bytes());
/// let dropout = dropout.next(&shape); // for the next layer, or step
/// assert_eq!(dropout.offset, 2 * 8 * 32);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// How likely it is that a probability is dropped, from 0 to below 1. It must be that of
    /// [`Problem::with_dropout`](crate::Problem::with_dropout), which nothing checks.
    ///
    /// As in FlashAttention-2 a byte decides: kept are those below `⌊255 (1 − probability)⌋ + 1`, of 256, and what is kept is divided by
    /// `1 − probability`. So the share that is kept is a little off: 0.8984 of 0.9, say, 0.8008 of 0.8, and exactly half of 0.5.
    pub probability: f32,
    /// The seed of the random numbers: the key of Philox.
    pub seed: u64,
    /// Where in the stream of random numbers the pass begins. Passes of equal seed draw other numbers if their offsets are at least
    /// `32 · batch · heads_q` apart, as [`Dropout::next`] sets them.
    pub offset: u64,
}

impl Dropout {
    /// Seed and offset as the buffer of [`ForwardBuffers::rng_state`](crate::ForwardBuffers::rng_state) holds them: two u64, little endian.
    pub const fn rng_state(&self) -> [u8; 16] {
        let (seed, offset) = (self.seed.to_le_bytes(), self.offset.to_le_bytes());
        let mut bytes = [0; 16];
        let mut n = 0;
        while n < 8 {
            (bytes[n], bytes[8 + n]) = (seed[n], offset[n]);
            n += 1;
        }
        bytes
    }

    /// The same with the offset behind the numbers that a pass of this shape draws, as FlashAttention-2 moves it.
    #[must_use]
    pub const fn next(self, shape: &Shape) -> Self {
        let drawn = (shape.batch as u64 * shape.heads_q as u64).wrapping_mul(32);
        Dropout { offset: self.offset.wrapping_add(drawn), ..self }
    }

    /// Of 256 values of a byte, how many keep a probability.
    pub fn kept_of_256(&self) -> u32 {
        kept_of_256(self.probability)
    }

    /// What probabilities that are kept are multiplied by, `1 / (1 − probability)`.
    pub fn scale(&self) -> f32 {
        scale(self.probability)
    }
}

/// FlashAttention-2's threshold: it keeps bytes up to ⌊255 (1 − p)⌋, 1 − p being an f32 and the product an f64.
pub(crate) fn kept_of_256(probability: f32) -> u32 {
    (f64::from(1.0 - probability) * 255.0).floor() as u32 + 1
}

/// The highest word of random bits whose highest byte is kept.
pub(crate) fn last_word_kept(probability: f32) -> u32 {
    // Of 256 the sum wraps around to the highest word of all.
    (kept_of_256(probability) << 24).wrapping_sub(1)
}

pub(crate) fn scale(probability: f32) -> f32 {
    1.0 / (1.0 - probability)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As FlashAttention-2 has them.
    #[test]
    fn thresholds() {
        let all = [(0.01, 253), (0.05, 243), (0.1, 230), (0.15, 217), (0.2, 205), (0.3, 179), (0.5, 128), (0.9, 26)];
        for (probability, kept) in all {
            assert_eq!(kept_of_256(probability), kept, "{probability}");
        }
        let largest = 1.0f32.next_down();
        assert_eq!([kept_of_256(largest), kept_of_256(1e-9)], [1, 256]);
        assert_eq!([0.1, largest, 1e-9].map(last_word_kept), [0xe5ff_ffff, 0x00ff_ffff, 0xffff_ffff]);
        assert!(scale(largest).is_finite());
    }

    #[test]
    fn state_and_steps() {
        let dropout = Dropout { probability: 0.5, seed: 0x0102_0304_0506_0708, offset: u64::MAX - 1 };
        assert_eq!(dropout.rng_state(), [8, 7, 6, 5, 4, 3, 2, 1, 254, 255, 255, 255, 255, 255, 255, 255]);
        let next = dropout.next(&Shape::square(3, 5, 9, 9));
        assert_eq!(next, Dropout { offset: 3 * 5 * 32 - 2, ..dropout });
    }
}
