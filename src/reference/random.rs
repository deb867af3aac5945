//! Which probabilities dropout drops: FlashAttention-2's mask (`csrc/flash_attn/src/dropout.h`, `philox.cuh`), element by element.
//!
//! Philox4x32 with 7 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) gives 16 bytes a call. FlashAttention-2's
//! threads use one for each of 16 probabilities: rows `i` and `i + 8` with keys `j`, `j + 1` and those 8, 16 and 24 further, in a block of
//! 16 rows and 32 keys. What a call is for is its counter, so that the mask does not depend on tiles:
//!
//! ```text
//! lane    = (i mod 8) · 4 + (j mod 8) / 2
//! counter = (low, high half of offset + (b · heads_q + h) · 32 + lane,  i / 16,  j / 32)
//! byte    = ((j mod 32) / 8) · 4 + ((i mod 16) / 8) · 2 + j mod 2
//! ```

use crate::dropout::Dropout;
use crate::problem::Shape;

/// Philox4x32 with so many rounds.
fn philox(rounds: u32, [mut a, mut b, mut c, mut d]: [u32; 4], [mut k, mut l]: [u32; 2]) -> [u32; 4] {
    for _ in 0..rounds {
        let x = 0xd251_1f53 * u64::from(a);
        let y = 0xcd9e_8d57 * u64::from(c);
        [a, b, c, d] = [(y >> 32) as u32 ^ b ^ k, y as u32, (x >> 32) as u32 ^ d ^ l, x as u32];
        (k, l) = (k.wrapping_add(0x9e37_79b9), l.wrapping_add(0xbb67_ae85));
    }
    [a, b, c, d]
}

impl Dropout {
    /// Whether the probability of query `i` and key `j` in query head `h` (of `heads_q`) of batch entry `b` is kept.
    pub(crate) fn keeps(&self, heads_q: u32, [b, h, i, j]: [u32; 4]) -> bool {
        let lane = (i % 8) * 4 + (j % 8) / 2;
        let head = u64::from(b) * u64::from(heads_q) + u64::from(h);
        let place = self.offset.wrapping_add(head.wrapping_mul(32)).wrapping_add(lane.into());
        let counter = [place as u32, (place >> 32) as u32, i / 16, j / 32];
        let words = philox(7, counter, [self.seed as u32, (self.seed >> 32) as u32]);
        let byte = (j % 32) / 8 * 4 + (i % 16) / 8 * 2 + j % 2;
        (words[byte as usize / 4] >> (8 * (byte % 4)) & 255) < self.kept_of_256()
    }
}

/// Which probabilities a pass of this shape keeps, `[batch, heads_q, seqlen_q, seqlen_k]`, by seed, offset and probability of `dropout`. Those
/// that masks leave out count for nothing, whatever it says of them.
pub fn dropout_mask(shape: &Shape, dropout: &Dropout) -> Vec<bool> {
    let mut kept = vec![];
    for (b, h) in (0..shape.batch).flat_map(|b| (0..shape.heads_q).map(move |h| (b, h))) {
        for i in 0..shape.seqlen_q {
            kept.extend((0..shape.seqlen_k).map(|j| dropout.keeps(shape.heads_q, [b, h, i, j])));
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the generator's authors, with the ten rounds that they recommend (`kat_vectors` of Random123); and with seven.
    #[test]
    fn known_vectors() {
        let ones = u32::MAX;
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(10, [0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox(10, [ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(philox(10, pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
        assert_eq!(philox(7, [0; 4], [0; 2]), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
    }

    /// Each byte of each call is for one probability, over the carry of the offset too.
    #[test]
    fn each_byte_is_used_once() {
        let shape = Shape::square(1, 2, 32, 8);
        let dropout = Dropout { probability: 0.3, seed: 7 << 40, offset: (1 << 32) - 40 };
        let mask = dropout_mask(&shape, &dropout);
        let mut expected = vec![false; mask.len()];
        for (h, lane, rows) in (0..2).flat_map(|h| (0..32).flat_map(move |lane| [0, 1].map(|rows| (h, lane, rows)))) {
            let place = dropout.offset + u64::from(h * 32 + lane);
            let words = philox(7, [place as u32, (place >> 32) as u32, rows, 0], [0, 7 << 8]);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            for (n, byte) in bytes.into_iter().enumerate() {
                let i = rows * 16 + lane / 4 + n as u32 / 2 % 2 * 8;
                let j = lane % 4 * 2 + n as u32 % 2 + n as u32 / 4 * 8;
                expected[((h * 32 + i) * 32 + j) as usize] = u32::from(byte) < dropout.kept_of_256();
            }
        }
        assert!(mask == expected);
    }

    #[test]
    fn the_share_that_is_kept() {
        let shape = Shape::square(2, 3, 128, 8);
        for (probability, seed) in [(0.1, 1), (0.5, 2), (0.9, 3)] {
            let dropout = Dropout { probability, seed, offset: 0 };
            let mask = dropout_mask(&shape, &dropout);
            let kept = mask.iter().filter(|&&kept| kept).count() as f64 / mask.len() as f64;
            let expected = f64::from(dropout.kept_of_256()) / 256.0;
            assert!((kept - expected).abs() < 4.0 * (0.25 / mask.len() as f64).sqrt(), "{kept} of {expected}");
        }
    }
}
