//! The patterns of the literature, as matrices of blocks.

/// Which blocks of a matrix are listed, for [`BlockMask::from_dense`](crate::BlockMask::from_dense): `down` rows of blocks of queries, `across`
/// blocks of keys each.
///
/// Where a pattern follows the diagonal, it is the one that ends in the last row and the last column, as that of
/// [`Causal::BottomRight`](crate::Causal::BottomRight): block `r + across − down` of row `r`. Patterns know nothing of masks within a block; a
/// causal window, say, is a pattern and the problem's own mask together.
///
/// ```
/// use wgpu_flash_attention::BlockPattern;
///
/// // 16 rows of 16 blocks: the diagonal, one block before and one after it, and the first block for all.
/// let pattern = BlockPattern::local(16, 16, 1, 1).or(&BlockPattern::global(16, 16, 1));
/// assert!(pattern.is_listed(9, 10) && pattern.is_listed(9, 0) && !pattern.is_listed(9, 11));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPattern {
    down: u32,
    across: u32,
    listed: Vec<bool>,
}

impl BlockPattern {
    /// The blocks of which `listed` says so, by row and column.
    pub fn of(down: u32, across: u32, mut listed: impl FnMut(u32, u32) -> bool) -> Self {
        let all = (0..down).flat_map(|r| (0..across).map(move |c| (r, c)));
        BlockPattern { down, across, listed: all.map(|(r, c)| listed(r, c)).collect() }
    }

    /// A window around the diagonal, of so many blocks before and after it (Sparse Transformer, Child et al. 2019; Longformer, Beltagy et al. 2020).
    pub fn local(down: u32, across: u32, before: u32, after: u32) -> Self {
        BlockPattern::of(down, across, |r, c| {
            let past = c as i64 - diagonal(down, across, r);
            past >= -(before as i64) && past <= after as i64
        })
    }

    /// The first `blocks` blocks of keys for all queries, and all keys for the first `blocks` blocks of queries: global tokens (Longformer, Beltagy
    /// et al. 2020; ETC, Ainslie et al. 2020).
    pub fn global(down: u32, across: u32, blocks: u32) -> Self {
        BlockPattern::of(down, across, |r, c| r < blocks || c < blocks)
    }

    /// Every `stride`-th block from the diagonal on, to both sides (Sparse Transformer, Child et al. 2019). A stride of 0 lists the diagonal
    /// alone.
    pub fn strided(down: u32, across: u32, stride: u32) -> Self {
        BlockPattern::of(down, across, |r, c| {
            let past = c as i64 - diagonal(down, across, r);
            past == 0 || stride > 0 && past % stride as i64 == 0
        })
    }

    /// A flat butterfly: the diagonal, and the blocks whose number differs from the diagonal's in one bit below `reach`, a power of two
    /// (Pixelated Butterfly, Dao, Chen et al. 2022; the pattern of FlashAttention's block-sparse form, Dao et al. 2022, section 3.3).
    pub fn butterfly(down: u32, across: u32, reach: u32) -> Self {
        BlockPattern::of(down, across, |r, c| {
            let apart = diagonal(down, across, r) ^ c as i64;
            apart == 0 || apart > 0 && apart.count_ones() == 1 && apart < reach as i64
        })
    }

    /// `in_row` blocks of each row by chance, all if a row has fewer. The same seed gives the same blocks.
    pub fn random(down: u32, across: u32, in_row: u32, seed: u64) -> Self {
        let mut chance = Chance(seed);
        let mut left = 0;
        BlockPattern::of(down, across, |_, c| {
            // Of the blocks that the row has left, as many as it still needs (Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S).
            left = if c == 0 { in_row.min(across) } else { left };
            let taken = chance.below(across - c) < left;
            left -= taken as u32;
            taken
        })
    }

    /// BigBird (Zaheer et al. 2020): a window of `each_side` blocks on each side of the diagonal, `global` blocks for all, and `random` blocks of
    /// each row by chance, some of which may be of the others.
    pub fn big_bird(down: u32, across: u32, [each_side, global, random]: [u32; 3], seed: u64) -> Self {
        BlockPattern::local(down, across, each_side, each_side)
            .or(&BlockPattern::global(down, across, global))
            .or(&BlockPattern::random(down, across, random, seed))
    }

    /// The blocks that either lists.
    ///
    /// # Panics
    /// If they have not as many rows and columns.
    pub fn or(self, other: &BlockPattern) -> Self {
        self.with(other, |a, b| a || b)
    }

    /// The blocks that both list.
    ///
    /// # Panics
    /// If they have not as many rows and columns.
    pub fn and(self, other: &BlockPattern) -> Self {
        self.with(other, |a, b| a && b)
    }

    fn with(mut self, other: &BlockPattern, of: impl Fn(bool, bool) -> bool) -> Self {
        assert_eq!((self.down, self.across), (other.down, other.across), "patterns of different sizes");
        self.listed.iter_mut().zip(&other.listed).for_each(|(a, &b)| *a = of(*a, b));
        self
    }

    /// Whether the block of this row and this column is listed; false past the ends.
    pub fn is_listed(&self, row: u32, column: u32) -> bool {
        row < self.down && column < self.across && self.listed[row as usize * self.across as usize + column as usize]
    }

    /// All of them, row by row.
    pub fn listed(&self) -> &[bool] {
        &self.listed
    }

    /// Listed blocks over all blocks; 0 without blocks.
    pub fn density(&self) -> f64 {
        self.listed.iter().filter(|&&listed| listed).count() as f64 / self.listed.len().max(1) as f64
    }
}

/// The block on the diagonal of a row. It may be past either end.
fn diagonal(down: u32, across: u32, row: u32) -> i64 {
    row as i64 + across as i64 - down as i64
}

/// SplitMix64 (Steele et al. 2014).
struct Chance(u64);

impl Chance {
    /// A number below `n`, which is at least 1.
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((x ^ x >> 31) as u128 * n as u128) >> 64) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(pattern: &BlockPattern) -> Vec<String> {
        let row = |r| (0..pattern.across).map(|c| if pattern.is_listed(r, c) { 'x' } else { '.' }).collect();
        (0..pattern.down).map(row).collect()
    }

    #[test]
    fn patterns_by_hand() {
        assert_eq!(drawn(&BlockPattern::local(4, 4, 1, 0)), ["x...", "xx..", ".xx.", "..xx"]);
        assert_eq!(drawn(&BlockPattern::local(2, 4, 1, 1)), [".xxx", "..xx"]);
        assert_eq!(drawn(&BlockPattern::global(3, 4, 1)), ["xxxx", "x...", "x..."]);
        assert_eq!(drawn(&BlockPattern::strided(3, 5, 2)), ["x.x.x", ".x.x.", "x.x.x"]);
        assert_eq!(drawn(&BlockPattern::strided(2, 2, 0)), ["x.", ".x"]);
        assert_eq!(drawn(&BlockPattern::butterfly(4, 4, 2)), ["xx..", "xx..", "..xx", "..xx"]);
        assert_eq!(drawn(&BlockPattern::butterfly(4, 4, 4)), ["xxx.", "xx.x", "x.xx", ".xxx"]);
    }

    #[test]
    fn chance_is_the_same_for_the_same_seed() {
        let random = |seed| BlockPattern::random(50, 40, 7, seed);
        assert_eq!(random(3), random(3));
        assert_ne!(random(3), random(4));
        for (r, row) in random(3).listed().chunks(40).enumerate() {
            assert_eq!(row.iter().filter(|&&listed| listed).count(), 7, "row {r}");
        }
        // Each column is drawn about 50 · 7 / 40 times.
        let of_column = |c| (0..50).filter(|&r| random(3).is_listed(r, c)).count();
        assert!((0..40).all(|c| (1..25).contains(&of_column(c))));
        assert_eq!(BlockPattern::random(3, 2, 9, 1).density(), 1.0);
        let bird = BlockPattern::big_bird(20, 20, [1, 2, 3], 5);
        assert!((0..20).all(|n| bird.is_listed(n, n) && bird.is_listed(1, n) && bird.is_listed(n, 1)));
        let parts = BlockPattern::local(20, 20, 1, 1).or(&BlockPattern::global(20, 20, 2));
        assert!(bird.density() > parts.density());
        assert_eq!(bird.clone().and(&parts), parts);
    }
}
