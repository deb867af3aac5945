//! Lists of blocks that are made on the host.

use crate::blocks::lists::Packing;
use crate::error::Error;
use crate::problem::Problem;

/// The lists of blocks of a problem, packed as a pass binds them: made on the host, to be uploaded once
/// ([`Context::upload`](crate::Context::upload)) and used by every pass.
///
/// ```
/// use wgpu_flash_attention::{BlockLists, BlockMask, BlockPattern, ElementType, Error, Problem, Shape};
///
/// # fn main() -> Result<(), Error> {
/// // 4,096 positions in 32 blocks of 128; each sees its own block, two before it, and the first one.
/// let problem = Problem::new(Shape::square(1, 8, 4096, 64), ElementType::F16).with_blocks(BlockLists::new());
/// let pattern = BlockPattern::local(32, 32, 2, 0).or(&BlockPattern::global(32, 32, 1));
/// let mask = BlockMask::from_dense(&problem, pattern.listed())?;
/// assert_eq!(mask.bytes().len() as u64, problem.blocks_bytes());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMask {
    words: Vec<u32>,
}

/// FlexAttention's lists on the host. R is the number of blocks down the queries, C that of columns
/// ([`BlockLists::columns`](crate::BlockLists::columns)). Each row lists its blocks of keys by their numbers, in any order; what lies past a row's
/// count means nothing.
#[derive(Clone, Copy, Debug)]
pub struct BlockIndices<'a> {
    /// How many partial blocks each row has, `[B|1, Hq|1, R]`.
    pub kv_num_blocks: &'a [i32],
    /// Which ones, `[B|1, Hq|1, R, C]`.
    pub kv_indices: &'a [i32],
    /// How many full blocks each row has, and which ones: of the shapes of the two above. `None`: there are none.
    pub full: Option<[&'a [i32]; 2]>,
}

/// The most blocks of lists that are made on the host, which takes memory for each of them, listed or not. Packed lists of so many take over 1 GiB.
const MOST_BLOCKS: u64 = 1 << 27;

/// What a list says of a block.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    None = 0,
    Partial = 1,
    Full = 2,
}

impl BlockMask {
    /// From a matrix of blocks, `[B|1, Hq|1, R, C]` ([`Problem::block_counts`]): true is listed. The problem's other masks count inside a listed
    /// block. It is listed as a full one. But with [`BlockLists::full_unmasked`](crate::BlockLists::full_unmasked) kernels do not ask a mask or a
    /// `mask_mod` about full blocks. For a problem that has one of these it is then listed as a partial one.
    ///
    /// An error if the problem has no block lists, or `listed` has another length, or a row lists more blocks than the lists have columns for.
    pub fn from_dense(problem: &Problem, listed: &[bool]) -> Result<Self, Error> {
        let packing = packing_of(problem)?;
        check_length("listed", listed.len(), packing.row_count().saturating_mul(packing.across.into()))?;
        let unasked = problem.blocks.is_some_and(|blocks| blocks.full_unmasked);
        let kind = match unasked && (problem.mask.is_some() || problem.has_mask_mod()) {
            true => Kind::Partial,
            false => Kind::Full,
        };
        let kinds: Vec<_> = listed.iter().map(|&listed| if listed { kind } else { Kind::None }).collect();
        for (row, kinds) in kinds.chunks(packing.across.max(1) as usize).enumerate() {
            let found = kinds.iter().filter(|&&kind| kind != Kind::None).count();
            if found > packing.columns as usize {
                let most = packing.columns;
                return Err(Error::BlockCount { argument: "listed", row, found: found as i64, most });
            }
        }
        Ok(BlockMask::of(&packing, &kinds))
    }

    /// From FlexAttention's lists. docs/features.md in the repository has an example.
    ///
    /// An error that names the argument if a length is wrong, a count is not from 0 to C, an index is not from 0 to the number of blocks less one,
    /// or a row lists a block twice.
    pub fn from_lists(problem: &Problem, lists: &BlockIndices<'_>) -> Result<Self, Error> {
        let packing = packing_of(problem)?;
        let (rows, columns) = (packing.row_count(), packing.columns as usize);
        let partial = ["kv_num_blocks", "kv_indices"];
        let full = ["full_kv_num_blocks", "full_kv_indices"];
        let partial = (Kind::Partial, partial, Some([lists.kv_num_blocks, lists.kv_indices]));
        let given = [partial, (Kind::Full, full, lists.full)];
        let given = given.into_iter().filter_map(|(kind, names, arrays)| Some((kind, names, arrays?)));
        for (_, names, [counts, indices]) in given.clone() {
            check_length(names[0], counts.len(), rows)?;
            check_length(names[1], indices.len(), rows.saturating_mul(columns as u64))?;
        }
        let mut kinds = vec![Kind::None; rows as usize * packing.across as usize];
        for (kind, names, [counts, indices]) in given {
            for (row, &count) in counts.iter().enumerate() {
                let Some(listed) = usize::try_from(count).ok().filter(|&count| count <= columns) else {
                    let most = packing.columns;
                    return Err(Error::BlockCount { argument: names[0], row, found: count.into(), most });
                };
                for &index in &indices[row * columns..][..listed] {
                    let wrong = |duplicate| {
                        let (argument, blocks) = (names[1], packing.across);
                        Error::BlockIndex { argument, row, found: index, blocks, duplicate }
                    };
                    let column = u32::try_from(index).ok().filter(|&column| column < packing.across);
                    let place = row * packing.across as usize + column.ok_or(wrong(false))? as usize;
                    if kinds[place] != Kind::None {
                        return Err(wrong(true));
                    }
                    kinds[place] = kind;
                }
            }
        }
        Ok(BlockMask::of(&packing, &kinds))
    }

    /// Packs the kinds of all blocks. `shaders/kernel/block_lists.wgsl` does the same.
    pub(crate) fn of(packing: &Packing, kinds: &[Kind]) -> Self {
        let (down, across) = (packing.down as usize, packing.across as usize);
        let [by_rows, by_keys, list_words] = packing.places().map(|place| place as usize);
        let mut words = vec![0; packing.bytes() as usize / 4];
        for list in 0..packing.list_count() as usize {
            let kinds = &kinds[list * down * across..][..down * across];
            let words = &mut words[list * list_words..][..list_words];
            for (n, &kind) in kinds.iter().enumerate() {
                let (row, column) = (n / across, n % across);
                words[row * packing.row_words() as usize + column / 16] |= (kind as u32) << (2 * (column % 16));
            }
            for (place, lines, of_line, row_step, column_step) in
                [(by_rows, down, across, across, 1), (by_keys, across, down, 1, across)]
            {
                let entries = place + 2 * lines + 1;
                let mut next = 0;
                for line in 0..lines {
                    words[place + line] = next as u32;
                    for wanted in [Kind::Full, Kind::Partial] {
                        for n in (0..of_line).filter(|n| kinds[line * row_step + n * column_step] == wanted) {
                            words[entries + next] = n as u32;
                            next += 1;
                        }
                        if wanted == Kind::Full {
                            words[place + lines + 1 + line] = next as u32 - words[place + line];
                        }
                    }
                }
                words[place + lines] = next as u32;
            }
        }
        BlockMask { words }
    }

    /// What some other words would be.
    #[doc(hidden)]
    pub fn from_words(words: Vec<u32>) -> Self {
        BlockMask { words }
    }

    /// The bytes to upload, [`Problem::blocks_bytes`] of them.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }
}

fn packing_of(problem: &Problem) -> Result<Packing, Error> {
    problem.validate()?;
    let packing = problem.packing().ok_or(Error::BlocksMissing)?;
    let found = packing.row_count().saturating_mul(packing.across.into());
    match found > MOST_BLOCKS {
        true => Err(Error::TooManyBlocks { found, most: MOST_BLOCKS }),
        false => Ok(packing),
    }
}

fn check_length(argument: &'static str, found: usize, needed: u64) -> Result<(), Error> {
    if found as u64 == needed { Ok(()) } else { Err(Error::BlockArray { argument, needed, found }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::lists::BlockLists;
    use crate::{ElementType, Shape};

    /// Three rows of four blocks, the last ones cut short.
    fn problem() -> Problem {
        let shape = Shape { seqlen_k: 60, ..Shape::square(2, 2, 40, 8) };
        Problem::new(shape, ElementType::F32).with_blocks(BlockLists::new().size(16, 16))
    }

    #[test]
    fn lists_by_hand() {
        // Row 0: full 1, partial 3. Row 1: nothing. Row 2: full 0 and 2, partial 1 and 3.
        let lists = BlockIndices {
            kv_num_blocks: &[1, 0, 2],
            kv_indices: &[3, 9, 9, 9, -1, 9, 9, 9, 3, 1, 9, 9],
            full: Some([&[1, 0, 2], &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]]),
        };
        let mask = BlockMask::from_lists(&problem(), &lists).unwrap();
        let kinds = [0b01_00_10_00, 0, 0b01_10_01_10];
        let by_rows = [0, 2, 2, 6, /* full */ 1, 0, 2, /* entries */ 1, 3, 0, 2, 1, 3, 0, 0, 0, 0, 0, 0];
        let by_keys =
            [0, 1, 3, 4, 6, /* full */ 1, 1, 1, 0, /* entries */ 2, 0, 2, 2, 0, 2, 0, 0, 0, 0, 0, 0];
        assert_eq!(mask.words, [&kinds[..], &by_rows, &by_keys].concat());
        assert_eq!(mask.bytes().len() as u64, problem().blocks_bytes());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = BlockIndices { kv_num_blocks: &[1, 0, 2], kv_indices: &[1; 12], full: None };
        let wrong = |lists: BlockIndices| BlockMask::from_lists(&problem(), &lists).unwrap_err();
        let twice = Error::BlockIndex { argument: "kv_indices", row: 2, found: 1, blocks: 4, duplicate: true };
        assert_eq!(wrong(good), twice);
        let both = BlockIndices { kv_num_blocks: &[1; 3], full: Some([&[0, 1, 0], &[1; 12]]), ..good };
        let full_twice =
            Error::BlockIndex { argument: "full_kv_indices", row: 1, found: 1, blocks: 4, duplicate: true };
        assert_eq!(wrong(both), full_twice);
        for found in [-1, 5] {
            let counts = [0, found, 0];
            let error = Error::BlockCount { argument: "kv_num_blocks", row: 1, found: found.into(), most: 4 };
            assert_eq!(wrong(BlockIndices { kv_num_blocks: &counts, ..good }), error);
        }
        for found in [-1, 4] {
            let indices = [found; 12];
            let lists = BlockIndices { kv_num_blocks: &[0, 0, 1], kv_indices: &indices, ..good };
            let error = Error::BlockIndex { argument: "kv_indices", row: 2, found, blocks: 4, duplicate: false };
            assert_eq!(wrong(lists), error);
        }
        let short = BlockIndices { kv_indices: &[1; 11], ..good };
        assert_eq!(wrong(short), Error::BlockArray { argument: "kv_indices", needed: 12, found: 11 });
        let error = BlockMask::from_dense(&problem(), &[true; 13]).unwrap_err();
        assert_eq!(error, Error::BlockArray { argument: "listed", needed: 12, found: 13 });
        let mut few = problem();
        few.blocks = few.blocks.map(|blocks| blocks.columns(3));
        let error = BlockMask::from_dense(&few, &[true; 12]).unwrap_err();
        assert_eq!(error, Error::BlockCount { argument: "listed", row: 0, found: 4, most: 3 });
        let without = Problem::new(problem().shape, ElementType::F32);
        assert_eq!(BlockMask::from_dense(&without, &[]), Err(Error::BlocksMissing));
        for text in [twice, full_twice, error].map(|error| error.to_string()) {
            assert!(text.contains("row"), "{text}");
        }
    }
}
