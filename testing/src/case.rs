//! What a test computes: a problem, how its tensors lie in memory, and what they hold.

use std::collections::HashSet;

use fastrand::Rng;
use wgpu_flash_attention::{
    Alibi, Bias, BlockIndices, BlockLists, BlockMask, Causal, Dropout, ElementType, Layout, Mods, Probe, Problem,
    ScoreLayout, Shape, Tensor,
};

use crate::{Extras, Prepared, score_elements};

/// What q and k hold; v is random in either case.
#[derive(Clone, Copy, Debug)]
pub enum Inputs {
    Random,
    /// Integers up to this size, so that the scores are exact in f32 however large they are.
    Integers(i32),
    /// Random numbers times these, for q, k and v.
    Times([f32; 3]),
    /// Random columns, of which each row has the same: all scores are equal, and all values of a column.
    Alike,
    /// All scores are equal, values are random.
    EqualScores,
    /// Random columns times numbers that grow from row to row: each key's scores and values are larger than those before.
    Sorted,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub problem: Problem,
    pub extras: Extras,
    pub inputs: Inputs,
    /// q, k and v lie in one buffer.
    pub one_buffer: bool,
    /// Whether a bias is f32, whatever the type of q, k and v.
    pub bias_in_f32: bool,
}

/// `case(batch, [heads_q, heads_kv], [seqlen_q, seqlen_k], [head_dim, head_dim_v])`: contiguous, unmasked, with lse.
pub fn case(batch: u32, heads: [u32; 2], seqlens: [u32; 2], dims: [u32; 2]) -> Case {
    let shape = Shape {
        batch,
        heads_q: heads[0],
        heads_kv: heads[1],
        seqlen_q: seqlens[0],
        seqlen_k: seqlens[1],
        head_dim: dims[0],
        head_dim_v: dims[1],
    };
    let problem = Problem::new(shape, ElementType::F32).with_lse();
    Case { problem, extras: Extras::default(), inputs: Inputs::Random, one_buffer: false, bias_in_f32: false }
}

impl Case {
    pub fn element_type(mut self, element_type: ElementType) -> Self {
        self.problem.element_type = element_type;
        if let Some(bias) = &mut self.problem.bias
            && !self.bias_in_f32
        {
            bias.element_type = element_type;
        }
        self
    }

    /// Dropout, with a seed and an offset that need more than 32 bits, and an offset that needs a 33rd one from the first heads on.
    pub fn dropout(mut self, probability: f32) -> Self {
        self.problem = self.problem.with_dropout(probability);
        self.extras.dropout = Some(Dropout { probability, seed: 0x1234_5678_9abc_def1, offset: (7 << 32) - 45 });
        self
    }

    /// A random bias of these sizes, 1 or full, in the type of q, k and v. One element in eight masks.
    pub fn bias(self, sizes: [u32; 4]) -> Self {
        self.bias_at(ScoreLayout::contiguous(sizes))
    }

    /// A bias in f32.
    pub fn bias_f32(mut self, sizes: [u32; 4]) -> Self {
        self.bias_in_f32 = true;
        self.bias(sizes)
    }

    /// A bias that lies so.
    pub fn bias_at(mut self, layout: ScoreLayout) -> Self {
        let numbers = |rng: &mut Rng| match rng.u32(0..16) {
            0 => f32::NEG_INFINITY,
            1 => f32::MIN,
            // Exact in every type.
            _ => rng.i32(-32..32) as f32 / 8.0,
        };
        let mut rng = Rng::with_seed(0xb1a5);
        self.extras.bias =
            Some((0..score_elements(&self.problem, &layout).max(1)).map(|_| numbers(&mut rng)).collect());
        self.problem.bias = Some(Bias::new(ElementType::F32, layout));
        self
    }

    /// The bias with infinity in all places of its buffer that its layout leaves out.
    pub fn bias_gaps(mut self) -> Self {
        let (s, layout) = (&self.problem.shape, self.problem.bias.unwrap().layout);
        let mut used = HashSet::new();
        for (b, h) in (0..s.batch).flat_map(|b| (0..s.heads_q).map(move |h| (b, h))) {
            for i in 0..s.seqlen_q {
                used.extend((0..s.seqlen_k).map(|j| layout.place([b, h, i, j])));
            }
        }
        let bias = self.extras.bias.as_mut().unwrap();
        bias.resize(bias.len() + 64, 0.0);
        (0..).zip(bias).filter(|(n, _)| !used.contains(n)).for_each(|(_, x)| *x = f32::INFINITY);
        self
    }

    /// A random mask of these sizes, 1 or full, that leaves three scores in four.
    pub fn mask(self, sizes: [u32; 4]) -> Self {
        self.mask_at(ScoreLayout::contiguous(sizes))
    }

    /// A mask that lies so.
    pub fn mask_at(mut self, layout: ScoreLayout) -> Self {
        let mut rng = Rng::with_seed(0x3a5c);
        self.extras.mask =
            Some((0..score_elements(&self.problem, &layout).max(1)).map(|_| rng.u32(0..4) > 0).collect());
        self.problem.mask = Some(layout);
        self
    }

    /// A mask of all batch entries and heads, by query and key.
    pub fn mask_where(mut self, keeps: impl Fn(usize, usize) -> bool) -> Self {
        let s = &self.problem.shape;
        let (queries, keys) = (s.seqlen_q as usize, s.seqlen_k as usize);
        let layout = ScoreLayout::contiguous([1, 1, s.seqlen_q, s.seqlen_k]);
        self.extras.mask = Some((0..queries * keys).map(|n| keeps(n / keys, n % keys)).collect());
        self.problem.mask = Some(layout);
        self
    }

    /// ALiBi with slopes of both signs.
    pub fn alibi(mut self, alibi: Alibi) -> Self {
        let s = &self.problem.shape;
        let slopes = if alibi == Alibi::PerHead { s.heads_q } else { s.batch * s.heads_q };
        self.extras.alibi_slopes = Some((0..slopes).map(|n| [0.5, -0.03125, 0.125, 0.0625][n as usize % 4]).collect());
        self.problem.alibi = Some(alibi);
        self
    }

    /// A sink a head; the third head has none.
    pub fn sinks(mut self) -> Self {
        let of_head = |n: u32| if n == 2 { f32::NEG_INFINITY } else { 1.5 * n as f32 - 0.75 };
        self.extras.sinks = Some((0..self.problem.shape.heads_q).map(of_head).collect());
        self.problem.sinks = true;
        self
    }

    /// What a user wrote, and what its buffers hold, four bytes a number.
    pub fn mods<T: bytemuck::Pod>(mut self, text: &str, buffers: &[(&str, &[T])]) -> Self {
        let mods = Mods::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        self.problem = self.problem.with_mods(mods);
        let owned = |(name, numbers): &(&str, &[T])| (name.to_string(), bytemuck::cast_slice(numbers).to_vec());
        self.extras.mod_buffers = buffers.iter().map(owned).collect();
        self
    }

    pub fn probe(mut self, probe: Probe) -> Self {
        self.problem = self.problem.with_probe(probe);
        self
    }

    pub fn no_lse(mut self) -> Self {
        self.problem.lse = false;
        self
    }

    pub fn causal(mut self, causal: Causal) -> Self {
        self.problem.causal = Some(causal);
        self
    }

    /// A negative side is open.
    pub fn window(mut self, left: i32, right: i32) -> Self {
        self.problem = self.problem.window(u32::try_from(left).ok(), u32::try_from(right).ok());
        self
    }

    pub fn seqlens(mut self, lengths: &[i32]) -> Self {
        assert_eq!(lengths.len(), self.problem.shape.batch as usize);
        self.problem.seqlens_k = true;
        self.extras.seqlens_k = Some(lengths.to_vec());
        self
    }

    /// Lengths of queries.
    pub fn seqlens_q(mut self, lengths: &[i32]) -> Self {
        assert_eq!(lengths.len(), self.problem.shape.batch as usize);
        self.problem.seqlens_q = true;
        self.extras.seqlens_q = Some(lengths.to_vec());
        self
    }

    /// Block lists, of which a third of the listed blocks are given as partial ones. `listed` is `[B|1, Hq|1, R, C]`.
    pub fn blocks(mut self, lists: BlockLists, listed: Vec<bool>) -> Self {
        self.problem = self.problem.with_blocks(lists);
        let across = self.problem.block_counts()[3] as usize;
        let (mut counts, mut indices) = ([vec![], vec![]], [vec![], vec![]]);
        for (r, row) in listed.chunks(across.max(1)).enumerate() {
            let listed: Vec<_> = row.iter().enumerate().filter(|(_, listed)| **listed).map(|(c, _)| c).collect();
            for n in 0..2 {
                let mut own: Vec<_> =
                    listed.iter().filter(|&c| ((c + r) % 3 == 0) == (n == 0)).map(|&c| c as i32).collect();
                counts[n].push(own.len() as i32);
                own.resize(across, -1);
                indices[n].extend(own);
            }
        }
        let [[kv_num_blocks, full_counts], [kv_indices, full_indices]] =
            [&counts, &indices].map(|both| [&both[0][..], &both[1]]);
        let indices = BlockIndices { kv_num_blocks, kv_indices, full: Some([full_counts, full_indices]) };
        let mask = BlockMask::from_lists(&self.problem, &indices).unwrap();
        self.extras.blocks = Some((listed, mask));
        self
    }

    pub fn scale(mut self, scale: f32) -> Self {
        self.problem.scale = Some(scale);
        self
    }

    pub fn softcap(mut self, softcap: f32) -> Self {
        self.problem.softcap = Some(softcap);
        self
    }

    pub fn integers(mut self, largest: i32) -> Self {
        self.inputs = Inputs::Integers(largest);
        self
    }

    pub fn alike(mut self) -> Self {
        self.inputs = Inputs::Alike;
        self
    }

    pub fn equal_scores(mut self) -> Self {
        self.inputs = Inputs::EqualScores;
        self
    }

    pub fn sorted(mut self) -> Self {
        self.inputs = Inputs::Sorted;
        self
    }

    /// Random q, k and v times these.
    pub fn times(mut self, factors: [f32; 3]) -> Self {
        self.inputs = Inputs::Times(factors);
        self
    }

    /// Each tensor's layout from its batch, heads, rows and dim, and its number (q, k, v, o).
    pub fn layouts(mut self, layout: impl Fn([u32; 4], u64) -> Layout) -> Self {
        let [q, k, v, o] = tensor_dims(&self.problem.shape);
        self.problem = self
            .problem
            .with_layout(Tensor::Query, layout(q, 0))
            .with_layout(Tensor::Key, layout(k, 1))
            .with_layout(Tensor::Value, layout(v, 2))
            .with_layout(Tensor::Out, layout(o, 3));
        self
    }

    pub fn bnhd(mut self) -> Self {
        self.problem = self.problem.bnhd();
        self
    }

    /// `[position, batch, head, dim]`.
    pub fn nbhd(self) -> Self {
        self.layouts(|[batch, heads, _, dim], _| {
            let (batch, heads, dim) = (batch as u64, heads as u64, dim as u64);
            Layout { offset: 0, batch: heads * dim, head: dim, row: batch * heads * dim }
        })
    }

    /// Nothing is a multiple of 2; rows of 16-bit types share words with their neighbours and with gaps.
    pub fn odd(self) -> Self {
        self.layouts(|[_, heads, rows, dim], n| {
            let row = (dim as u64 + n) | 1;
            let head = (rows as u64 * row + 2) | 1;
            Layout { offset: 2 * n + 1, batch: (heads as u64 * head) | 1, head, row }
        })
    }

    /// Gaps of four elements, so that groups of four stay together where the head dims allow.
    pub fn gaps(self) -> Self {
        self.layouts(|[_, heads, rows, dim], n| {
            let row = dim as u64 + 4;
            let head = rows as u64 * row + 4 * n;
            Layout { offset: 4 * n, batch: heads as u64 * head + 8, head, row }
        })
    }

    /// Odd strides of dimensions of one, which nothing uses: groups of four stay together.
    pub fn unused_odd(self) -> Self {
        self.layouts(|[batch, heads, rows, dim], n| {
            let odd = |stride: u64, length: u32| if length == 1 { stride | 1 } else { stride };
            let row = dim as u64 + 4;
            let head = rows as u64 * row;
            let batch = odd(heads as u64 * head, batch);
            Layout { offset: 4 * n, batch, head: odd(head, heads), row: odd(row, rows) }
        })
    }

    /// `[batch, position, q heads | k heads | v heads, dim]` in one buffer, o contiguous.
    pub fn packed(mut self) -> Self {
        let s = self.problem.shape;
        let (q, k, v) = (s.heads_q * s.head_dim, s.heads_kv * s.head_dim, s.heads_kv * s.head_dim_v);
        let row = (q + k + v) as u64;
        let view = |offset: u32, dim: u32, rows: u32| Layout {
            offset: offset as u64,
            batch: rows as u64 * row,
            head: dim as u64,
            row,
        };
        assert_eq!(s.seqlen_q, s.seqlen_k);
        self.problem = self
            .problem
            .with_layout(Tensor::Query, view(0, s.head_dim, s.seqlen_q))
            .with_layout(Tensor::Key, view(q, s.head_dim, s.seqlen_k))
            .with_layout(Tensor::Value, view(q + k, s.head_dim_v, s.seqlen_k));
        self.one_buffer = true;
        self
    }

    /// All batch entries and heads share one k and one v.
    pub fn shared_kv(mut self) -> Self {
        for tensor in [Tensor::Key, Tensor::Value] {
            let layout = Layout { batch: 0, head: 0, ..self.problem.layout(tensor) };
            self.problem = self.problem.with_layout(tensor, layout);
        }
        self
    }

    pub fn prepare(&self) -> Prepared {
        let mut rng = Rng::with_seed(0x5eed);
        let dims = tensor_dims(&self.problem.shape);
        let mut tensor = |n: usize, integers: Option<i32>, low: f32, high: f32| -> Vec<f32> {
            let len = dims[n].iter().map(|&d| d as usize).product();
            let one = |rng: &mut Rng| match integers {
                Some(most) => rng.i32(-most..=most) as f32,
                None => low + (high - low) * rng.f32(),
            };
            (0..len).map(|_| one(&mut rng)).collect()
        };
        let (integers, [q, k, v]) = match self.inputs {
            Inputs::Random | Inputs::Alike | Inputs::EqualScores | Inputs::Sorted => (None, [1.0; 3]),
            Inputs::Integers(most) => (Some(most), [1.0; 3]),
            Inputs::Times(factors) => (None, factors),
        };
        let mut inputs = [
            tensor(0, integers, -1.5 * q, 2.0 * q),
            tensor(1, integers, -2.0 * k, 1.5 * k),
            tensor(2, None, -v, 2.0 * v),
        ];
        if !matches!(self.inputs, Inputs::Random | Inputs::Integers(_) | Inputs::Times(_)) {
            let tensors = if matches!(self.inputs, Inputs::EqualScores) { 2 } else { 3 };
            for (tensor, dims) in inputs.iter_mut().zip(dims).take(tensors) {
                let (rows, dim) = (dims[2] as usize, dims[3] as usize);
                let columns: Vec<f32> = tensor.iter().copied().take(dim).collect();
                let grown = |row: usize| (row % rows + 1) as f32 / rows as f32;
                for (n, row) in tensor.chunks_mut(dim).enumerate() {
                    let factor = if matches!(self.inputs, Inputs::Sorted) { grown(n) } else { 1.0 };
                    row.iter_mut().zip(&columns).for_each(|(x, column)| *x = factor * column);
                }
            }
        }
        Prepared::new(&self.problem, inputs, self.extras.clone(), self.one_buffer)
    }
}

/// `[batch, heads, rows, dim]` of q, k, v and o.
pub(crate) fn tensor_dims(s: &Shape) -> [[u32; 4]; 4] {
    [
        [s.batch, s.heads_q, s.seqlen_q, s.head_dim],
        [s.batch, s.heads_kv, s.seqlen_k, s.head_dim],
        [s.batch, s.heads_kv, s.seqlen_k, s.head_dim_v],
        [s.batch, s.heads_q, s.seqlen_q, s.head_dim_v],
    ]
}
