//! Sizes, tensors, and where their elements lie.

/// The sizes of q `[batch, heads_q, seqlen_q, head_dim]`, k `[batch, heads_kv, seqlen_k, head_dim]`,
/// v `[batch, heads_kv, seqlen_k, head_dim_v]` and o `[batch, heads_q, seqlen_q, head_dim_v]`.
///
/// This is plain data that stays as it is: a new kind of input becomes a part of [`Problem`](crate::Problem), not
/// of its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Sequences computed at once; may be 0.
    pub batch: u32,
    /// Query heads.
    pub heads_q: u32,
    /// Key and value heads; divides `heads_q`. Query head `h` reads key-value head `h / (heads_q / heads_kv)`.
    pub heads_kv: u32,
    /// Queries a sequence; may be 0.
    pub seqlen_q: u32,
    /// Keys a sequence; may be 0, then the output is 0.
    pub seqlen_k: u32,
    /// Elements of a query and of a key, 1 to 256.
    pub head_dim: u32,
    /// Elements of a value and of an output row, 1 to 256.
    pub head_dim_v: u32,
}

impl Shape {
    /// Self-attention: as many keys as queries, one head dimension, no shared heads.
    pub const fn square(batch: u32, heads: u32, seqlen: u32, head_dim: u32) -> Self {
        Shape {
            batch,
            heads_q: heads,
            heads_kv: heads,
            seqlen_q: seqlen,
            seqlen_k: seqlen,
            head_dim,
            head_dim_v: head_dim,
        }
    }

    /// Query heads that share one key-value head; 0 without key-value heads.
    pub const fn group(&self) -> u32 {
        match self.heads_kv {
            0 => 0,
            heads_kv => self.heads_q / heads_kv,
        }
    }

    /// Rows of the output, `batch · heads_q · seqlen_q`; `u64::MAX` if they are more.
    pub const fn rows(&self) -> u64 {
        (self.batch as u64 * self.heads_q as u64).saturating_mul(self.seqlen_q as u64)
    }

    pub(super) const fn dims(&self, tensor: Tensor) -> [u32; 4] {
        let (heads, rows, dim) = match tensor {
            Tensor::Query | Tensor::GradQuery => (self.heads_q, self.seqlen_q, self.head_dim),
            Tensor::Key | Tensor::GradKey => (self.heads_kv, self.seqlen_k, self.head_dim),
            Tensor::Value | Tensor::GradValue => (self.heads_kv, self.seqlen_k, self.head_dim_v),
            Tensor::Out | Tensor::GradOut => (self.heads_q, self.seqlen_q, self.head_dim_v),
        };
        [self.batch, heads, rows, dim]
    }
}

/// The tensors that have a [`Layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tensor {
    /// q.
    Query,
    /// k.
    Key,
    /// v.
    Value,
    /// o.
    Out,
    /// The gradient of o, which is given.
    GradOut,
    /// The gradient of q.
    GradQuery,
    /// The gradient of k, summed over the query heads that share a key-value head.
    GradKey,
    /// The gradient of v, summed likewise.
    GradValue,
}

impl Tensor {
    /// Those of a forward pass.
    pub(crate) const FORWARD: [Tensor; 4] = [Tensor::Query, Tensor::Key, Tensor::Value, Tensor::Out];
    /// Those of a backward pass.
    pub(crate) const BACKWARD: [Tensor; 8] = [
        Tensor::Query,
        Tensor::Key,
        Tensor::Value,
        Tensor::Out,
        Tensor::GradOut,
        Tensor::GradQuery,
        Tensor::GradKey,
        Tensor::GradValue,
    ];

    /// The tensor that this is the gradient of; itself if it is none.
    pub(super) const fn of(self) -> Tensor {
        match self {
            Tensor::Query | Tensor::GradQuery => Tensor::Query,
            Tensor::Key | Tensor::GradKey => Tensor::Key,
            Tensor::Value | Tensor::GradValue => Tensor::Value,
            Tensor::Out | Tensor::GradOut => Tensor::Out,
        }
    }

    pub(crate) const fn is_gradient(self) -> bool {
        matches!(self, Tensor::GradOut | Tensor::GradQuery | Tensor::GradKey | Tensor::GradValue)
    }

    /// Its name in errors.
    pub const fn name(self) -> &'static str {
        match self {
            Tensor::Query => "query",
            Tensor::Key => "key",
            Tensor::Value => "value",
            Tensor::Out => "out",
            Tensor::GradOut => "grad_out",
            Tensor::GradQuery => "grad_query",
            Tensor::GradKey => "grad_key",
            Tensor::GradValue => "grad_value",
        }
    }
}

/// Where a tensor's elements lie in its buffer, in elements: element `(b, h, i, d)` is at
/// `offset + b·batch + h·head + i·row + d`.
///
/// Inputs may have any strides, also 0 (one head for all, say). Layouts whose offset and strides are
/// multiples of four elements are read four elements at a time.
///
/// This is plain data that stays as it is: an element has these four indices and no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// First element of the tensor.
    pub offset: u64,
    /// From one batch entry to the next.
    pub batch: u64,
    /// From one head to the next.
    pub head: u64,
    /// From one position to the next.
    pub row: u64,
}

impl Layout {
    /// Contiguous `[batch, head, position, dim]`, PyTorch's order for attention.
    pub const fn bhnd(heads: u32, rows: u32, dim: u32) -> Self {
        let (heads, rows, dim) = (heads as u64, rows as u64, dim as u64);
        let head = rows.saturating_mul(dim);
        Layout { offset: 0, batch: heads.saturating_mul(head), head, row: dim }
    }

    /// Contiguous `[batch, position, head, dim]`, flash-attention's order.
    pub const fn bnhd(heads: u32, rows: u32, dim: u32) -> Self {
        let (heads, rows, dim) = (heads as u64, rows as u64, dim as u64);
        let row = heads.saturating_mul(dim);
        Layout { offset: 0, batch: rows.saturating_mul(row), head: dim, row }
    }

    /// The same layout, `elements` further into the buffer.
    pub const fn at(mut self, elements: u64) -> Self {
        self.offset = self.offset.saturating_add(elements);
        self
    }

    /// One past the last element of the box of batch entries, heads and rows; `None` past 2^64.
    pub(super) fn end(&self, dims: [u32; 4]) -> Option<u64> {
        let reach = |n: u32, stride: u64| (n as u64).saturating_sub(1).checked_mul(stride);
        self.offset
            .checked_add(reach(dims[0], self.batch)?)?
            .checked_add(reach(dims[1], self.head)?)?
            .checked_add(reach(dims[2], self.row)?)?
            .checked_add(dims[3] as u64)
    }

    pub(super) fn overlaps_itself(&self, dims: [u32; 4]) -> bool {
        if dims.contains(&0) {
            return false;
        }
        let mut axes = [(self.batch, dims[0]), (self.head, dims[1]), (self.row, dims[2])];
        axes.sort();
        let mut span = dims[3] as u64;
        for (stride, n) in axes.into_iter().filter(|&(_, n)| n > 1) {
            if stride < span {
                return true;
            }
            span = span.saturating_add(stride.saturating_mul(n as u64 - 1));
        }
        false
    }

    pub(super) fn is_aligned(&self, dims: [u32; 4], elements: u64) -> bool {
        let strides = [(self.offset, 2), (self.batch, dims[0]), (self.head, dims[1]), (self.row, dims[2])];
        strides.iter().all(|&(stride, n)| n < 2 || stride.is_multiple_of(elements))
    }
}
