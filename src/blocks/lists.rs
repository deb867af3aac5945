//! Lists of blocks as plain data, and how they lie in their buffer.

/// What the lists of blocks of a problem are, for block-sparse attention: [`Problem::with_blocks`](crate::Problem::with_blocks).
///
/// Scores are cut into blocks of `queries` by `keys`, from the first query and the first key on; the last blocks may be cut short. A score counts
/// if its block is listed and every other mask of the problem lets it. A query without a listed block sees no key: o = 0, lse = −∞.
///
/// The lists are those of PyTorch's FlexAttention (`BlockMask`), packed into one buffer that a pass binds. It is made once, and used by
/// every pass of problems with the same lists, sequence lengths, batch and heads:
///
/// - on the host by [`BlockMask`](crate::BlockMask), from a matrix of blocks or from lists, to be uploaded;
/// - on the device by [`Context::plan_blocks`](crate::Context::plan_blocks), from lists there, or from the problem's other masks.
///
/// [`Problem::blocks_bytes`](crate::Problem::blocks_bytes) is its size. Block sizes must be multiples of the tile of the kernel that a plan
/// takes; 128 by 128, the default, is one of all tiles that plans choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct BlockLists {
    /// Queries of a block.
    pub queries: u32,
    /// Keys of a block.
    pub keys: u32,
    /// Whether each batch entry has lists of its own. If not, all share them.
    pub per_batch: bool,
    /// Whether each query head has lists of its own. If not, all share them.
    pub per_head: bool,
    /// How many blocks a row of blocks may list at most, partial ones and as many full ones: the columns of `kv_indices` and of
    /// `full_kv_indices`. `None`: as many as there are. With fewer the buffer is smaller.
    pub columns: Option<u32>,
    /// Whether the problem's boolean mask and `mask_mod` keep all scores of the blocks that are listed as full, so that kernels need not ask about
    /// them. That is what FlexAttention means by a full block, and true of lists that are made of the problem's masks
    /// (`BlockSource::Masks`). Where it is said and not true, it is left open which scores of a full block count. The causal mask, the
    /// window and the lengths are asked in full blocks, too.
    pub full_unmasked: bool,
}

impl Default for BlockLists {
    fn default() -> Self {
        BlockLists::new()
    }
}

/// Each method sets the fields of its name.
impl BlockLists {
    /// Blocks of 128 by 128, shared by all batch entries and heads.
    pub const fn new() -> Self {
        BlockLists { queries: 128, keys: 128, per_batch: false, per_head: false, columns: None, full_unmasked: false }
    }

    /// Queries and keys of a block.
    pub const fn size(mut self, queries: u32, keys: u32) -> Self {
        (self.queries, self.keys) = (queries, keys);
        self
    }

    /// Each batch entry has lists of its own.
    pub const fn per_batch(mut self) -> Self {
        self.per_batch = true;
        self
    }

    /// Each query head has lists of its own.
    pub const fn per_head(mut self) -> Self {
        self.per_head = true;
        self
    }

    /// The columns of `kv_indices` and of `full_kv_indices`.
    pub const fn columns(mut self, columns: u32) -> Self {
        self.columns = Some(columns);
        self
    }

    /// Mask and `mask_mod` keep all scores of full blocks, and kernels do not ask about them. It is for the caller to know: where it is not true, it
    /// is left open which scores of a full block count. For a problem with neither of them it changes nothing.
    pub const fn full_unmasked(mut self) -> Self {
        self.full_unmasked = true;
        self
    }

    /// How the lists of a problem lie in their buffer. Block sizes of 0 count as 1, so that this is defined for problems that are wrong.
    pub(crate) fn packing(&self, [batch, heads, queries, keys]: [u32; 4]) -> Packing {
        let (down, across) = (queries.div_ceil(self.queries.max(1)), keys.div_ceil(self.keys.max(1)));
        let columns = self.columns.unwrap_or(across);
        let of_row = columns.saturating_mul(2).min(across) as u64;
        Packing {
            batch: if self.per_batch { batch } else { batch.min(1) },
            heads: if self.per_head { heads } else { heads.min(1) },
            down,
            across,
            columns,
            entries: (down as u64 * of_row).max(1),
        }
    }
}

/// How lists lie in their buffer, in 4-byte words. Of each batch entry and head, one after the other:
///
/// - `kinds`: of each block two bits, 1 for a partial and 2 for a full one; 16 blocks a word, each row of blocks from a new word on. 3 is one that
///   lists on the device had as both, which counts as partial; the host refuses such lists.
/// - by rows: where the blocks of each row begin among the entries, `down + 1` numbers; how many of them are full, `down` numbers; and the entries,
///   numbers of blocks of keys, of each row the full ones, ascending, then the partial ones, ascending.
/// - by keys: the same with rows and columns exchanged.
///
/// Entries that no row has are 0. `shaders/attention/blocks.wgsl` does the same sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    /// Batch entries and heads that have lists of their own.
    pub batch: u32,
    pub heads: u32,
    /// Blocks down the queries, and across the keys.
    pub down: u32,
    pub across: u32,
    /// Columns of the arrays of indices that lists are given by.
    pub columns: u32,
    /// Room for entries, of each direction.
    pub entries: u64,
}

impl Packing {
    /// From the list of a batch entry, and of a head, to the next one.
    pub(crate) fn strides(&self, lists: &BlockLists) -> [u32; 2] {
        let head = lists.per_head as u32;
        [if lists.per_batch { self.heads.max(1) } else { 0 }, head]
    }

    pub(crate) fn list_count(&self) -> u64 {
        self.batch as u64 * self.heads as u64
    }

    /// Rows of blocks of all lists.
    pub(crate) fn row_count(&self) -> u64 {
        self.list_count().saturating_mul(self.down.into())
    }

    /// Words of a row of kinds.
    pub(crate) fn row_words(&self) -> u64 {
        self.across.div_ceil(16).into()
    }

    /// Where the rows' numbers begin in a list, where those of the keys do, and where the list ends.
    pub(crate) fn places(&self) -> [u64; 3] {
        let by_rows = (self.down as u64).saturating_mul(self.row_words());
        let lines = |n: u32| 2 * n as u64 + 1;
        let by_keys = by_rows.saturating_add(lines(self.down)).saturating_add(self.entries);
        [by_rows, by_keys, by_keys.saturating_add(lines(self.across)).saturating_add(self.entries)]
    }

    /// Bytes of all lists, at least a word.
    pub(crate) fn bytes(&self) -> u64 {
        self.places()[2].saturating_mul(self.list_count()).saturating_mul(4).max(4)
    }
}
