//! What to compute, as plain data: shape, layouts, masks, element type.

mod probe;
mod scores;
mod shape;

pub use probe::Probe;
pub use scores::{Alibi, Bias, ScoreLayout, alibi_slopes};
pub use shape::{Layout, Shape, Tensor};

use std::hash::{Hash, Hasher};

use scores::score_layout_overlaps;

use crate::blocks::lists::{BlockLists, Packing};
use crate::error::Error;
use crate::mods::Mods;
use crate::names::{ElementType, MAX_HEAD_DIM, MAX_SEQLEN};
use crate::overlap::Region;

/// With larger ones, f32 does not hold the products that would make scores of a size of 1.
const SCALES: std::ops::RangeInclusive<f32> = -1e30..=1e30;
/// Of larger ones, f32 does not hold score / softcap where scores are small; of smaller ones, where they are large.
const SOFTCAPS: std::ops::RangeInclusive<f32> = 1e-30..=1e30;

/// Which diagonal a causal mask follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Causal {
    /// Query `i` sees keys `j ≤ i + seqlen_k − seqlen_q`, with the batch entry's lengths where the problem has them: the last valid
    /// query sees every valid key, as in flash-attention. With more queries than keys the first queries see none.
    BottomRight,
    /// Query `i` sees keys `j ≤ i`, as PyTorch's `is_causal`.
    TopLeft,
}

/// What the backward pass is given and gives beyond the gradients that every backward pass has: that of o, which is given, and those of q, k
/// and v. These four have the shapes of o, q, k and v, and the problem's element type; sums are f32. [`Problem::layout`] says where
/// they lie. The gradient of the bias has the type and the layout of the bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Gradients {
    /// Whether a gradient of lse is given too, f32 `[batch, heads_q, seqlen_q]`, contiguous: for losses that use lse.
    pub lse: bool,
    /// Whether all gradients are added to what their buffers hold instead of written over it. It is all or nothing: those of q, k and v
    /// are added too where only that of a bias should be. A gradient in 16 bits is rounded after the addition, and by the
    /// coop kernel, where f16 or bf16 are operands of its matrices, before it too, as in PyTorch. Where many layers share a bias, give
    /// it in f32, so that the sum of its gradient stays in f32.
    pub accumulate: bool,
    /// Whether the gradient of the bias is computed: in the bias' type, where its layout puts its elements, summed over what it
    /// broadcasts to. Sums are f32; where the plan splits the problem between batch entries or heads that share elements of a bias in 16
    /// bits, they are rounded after each part. Of a problem without batch entries, queries or keys nothing is written.
    pub bias: bool,
    /// Whether the gradient of the sinks is computed, f32 `[heads_q]`.
    pub sinks: bool,
    /// Whether the gradient of ALiBi's slopes is computed, f32, with their shape.
    pub alibi_slopes: bool,
}

/// One attention problem, as plain data.
///
/// Build it with [`Problem::new`] and the methods that follow, in any order; the fields are public to be read and set alike.
///
/// A method is called `with_…` where a pass has a buffer for what it adds: `with_bias`, `with_lse`, `with_grad_bias`, and `with_dropout` for seed
/// and offset. `with_layout` and `with_mods` are called so as well: a layout says where a tensor lies, and mods may have buffers. Numbers
/// and switches have their own names, as `scale`, `causal` and `accumulate` do. docs/features.md in the repository has a recipe for each feature.
///
/// Problems are equal if they are the same in every part, numbers by their bits, so that a map from problems to plans works:
/// a scale of 0 is another than one of −0, and NaN (which no plan takes) is equal to itself.
///
/// ```
/// use wgpu_flash_attention::{Causal, ElementType, Problem, Shape};
///
/// // 8 query heads on 2 key-value heads, 256 positions, head dim 64, laid out as flash-attention does.
/// let shape = Shape { heads_kv: 2, ..Shape::square(1, 8, 256, 64) };
/// let problem = Problem::new(shape, ElementType::F16).bnhd().causal(Causal::BottomRight).with_gradients();
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Problem {
    /// Sizes.
    pub shape: Shape,
    /// Type of q, k, v and o in memory.
    pub element_type: ElementType,
    /// Factor of the scores, from −1e30 to 1e30; `None` is `1/√head_dim`. With 0 all keys that count weigh the same, and so they do
    /// with numbers below 1.2e-38, which devices may take for 0.
    pub scale: Option<f32>,
    /// Scores become `softcap · tanh(score / softcap)` before masking. From 1e-30 to 1e30.
    pub softcap: Option<f32>,
    /// A number that is added to each score.
    pub bias: Option<Bias>,
    /// ALiBi: a term that is added to scores, which falls with the distance of query and key.
    pub alibi: Option<Alibi>,
    /// A boolean mask, one byte for each score: a key counts for a query where it is not 0. PyTorch's `attn_mask` of type bool.
    pub mask: Option<ScoreLayout>,
    /// Whether each query head has a sink, f32 `[heads_q]`: one more score in the denominator of each row, of no key. lse
    /// includes it. A sink is neither scaled nor capped. A row that sees no key has o = 0, and the sink as its lse; a
    /// sink of −∞ or below −1e30 is none.
    pub sinks: bool,
    /// The causal mask, if any.
    pub causal: Option<Causal>,
    /// Query `i` sees keys from `i + seqlen_k − seqlen_q − window_left`; `None` is open.
    pub window_left: Option<u32>,
    /// Query `i` sees keys up to `i + seqlen_k − seqlen_q + window_right`, inclusive; `None` is open.
    pub window_right: Option<u32>,
    /// Whether a buffer of key lengths is given: `i32 [batch]`, each at most `seqlen_k`. What keys from a length
    /// on hold does not matter, not even NaN, and bottom-right masks and windows count from it instead of `seqlen_k`.
    /// Values outside `0 ..= seqlen_k` act as the nearest of the two.
    pub seqlens_k: bool,
    /// Whether a buffer of query lengths is given: `i32 [batch]`, each at most `seqlen_q`. Queries from a length on are padding:
    /// what they hold does not matter, not even NaN. Their o is 0, their lse −∞ (with sinks the sink), their dq 0, and they add
    /// nothing to any gradient. Bottom-right masks and windows count from the length instead of `seqlen_q`. Values outside
    /// `0 ..= seqlen_q` act as the nearest of the two.
    pub seqlens_q: bool,
    /// Which blocks of scores count, if not all: block-sparse attention. A buffer of the packed lists is given then.
    pub blocks: Option<BlockLists>,
    /// Whether the logarithm of the softmax's denominator is written: f32 `[batch, heads_q, seqlen_q]`, contiguous.
    pub lse: bool,
    /// How likely it is that dropout drops a probability, after the softmax; from 0 to below 1. lse is not affected. Seed and offset are
    /// given with each pass ([`ForwardBuffers::rng_state`](crate::ForwardBuffers::rng_state)); [`Dropout`](crate::Dropout) says what they mean. 0 is no
    /// dropout: the state may be given then, and nothing looks at it.
    pub dropout: Option<f32>,
    /// What the user makes of scores, and which of them count, in WGSL.
    #[cfg(feature = "mods")]
    pub mods: Option<Mods>,
    #[cfg(not(feature = "mods"))]
    pub(crate) mods: Option<Mods>,
    /// What is needed for [`Plan::backward`](crate::Plan::backward); `None` plans the forward pass alone.
    pub gradients: Option<Gradients>,
    /// Whether tensors without a layout of their own are `[batch, position, head, dim]`.
    bnhd: bool,
    /// The layouts that were set, by tensor. The others follow when they are asked for, so that the order of calls, and a shape
    /// that is changed later, cannot leave one behind.
    layouts: [Option<Layout>; Tensor::BACKWARD.len()],
    /// What only tests ask for.
    pub(crate) probe: Option<Probe>,
}

impl PartialEq for Problem {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for Problem {}

impl Hash for Problem {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

impl Problem {
    /// Unmasked attention over contiguous `[batch, head, position, dim]` tensors, without lse.
    pub const fn new(shape: Shape, element_type: ElementType) -> Self {
        Problem {
            shape,
            element_type,
            scale: None,
            softcap: None,
            bias: None,
            alibi: None,
            mask: None,
            sinks: false,
            mods: None,
            causal: None,
            window_left: None,
            window_right: None,
            seqlens_q: false,
            seqlens_k: false,
            blocks: None,
            lse: false,
            dropout: None,
            gradients: None,
            bnhd: false,
            layouts: [None; Tensor::BACKWARD.len()],
            probe: None,
        }
    }

    /// All of it, numbers by their bits.
    fn parts(&self) -> impl Eq + Hash + use<> {
        let Problem {
            shape,
            element_type,
            scale,
            softcap,
            bias,
            alibi,
            mask,
            sinks,
            mods,
            causal,
            window_left,
            window_right,
            seqlens_q,
            seqlens_k,
            blocks,
            lse,
            dropout,
            gradients,
            bnhd,
            layouts,
            probe,
        } = self.clone();
        let numbers = [scale, softcap, dropout].map(|x| x.map(f32::to_bits));
        let scores = (bias, alibi, mask, sinks, mods);
        let masks = (causal, window_left, window_right, blocks);
        (shape, element_type, numbers, scores, masks, (seqlens_q, seqlens_k), lse, gradients, (bnhd, layouts, probe))
    }

    /// Contiguous `[batch, position, head, dim]` tensors instead, flash-attention's order, but for those that
    /// [`Problem::with_layout`] places.
    pub const fn bnhd(mut self) -> Self {
        self.bnhd = true;
        self
    }

    /// Says where a tensor lies. Without it q, k, v and o are contiguous, and a gradient lies as what it is the gradient of
    /// does. Where that would put two elements of a gradient in one place (of a key that all heads share, say), it needs a
    /// layout of its own; no two elements of o and of the gradients of q, k and v may share a place.
    pub const fn with_layout(mut self, tensor: Tensor, layout: Layout) -> Self {
        self.layouts[tensor as usize] = Some(layout);
        self
    }

    /// Where a tensor lies, or would lie if the problem had it.
    pub const fn layout(&self, tensor: Tensor) -> Layout {
        if let Some(layout) = self.layouts[tensor as usize] {
            return layout;
        }
        if let Some(layout) = self.layouts[tensor.of() as usize] {
            return layout;
        }
        let [_, heads, rows, dim] = self.shape.dims(tensor);
        if self.bnhd { Layout::bnhd(heads, rows, dim) } else { Layout::bhnd(heads, rows, dim) }
    }

    /// Sets the factor of the scores.
    pub const fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Caps the scores softly.
    pub const fn softcap(mut self, softcap: f32) -> Self {
        self.softcap = Some(softcap);
        self
    }

    /// Adds a bias to the scores. docs/features.md in the repository has an example with its gradient.
    pub const fn with_bias(mut self, bias: Bias) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Adds ALiBi's terms to the scores. docs/features.md in the repository has a decode step with ALiBi and sinks.
    pub const fn with_alibi(mut self, alibi: Alibi) -> Self {
        self.alibi = Some(alibi);
        self
    }

    /// Masks scores by a boolean mask that lies so, one byte for each score. docs/features.md in the repository has an example.
    ///
    /// A mask alone makes kernels skip nothing. [`Context::plan_blocks`](crate::Context::plan_blocks) makes block lists of it, with which they skip blocks that are false throughout.
    pub const fn with_mask(mut self, mask: ScoreLayout) -> Self {
        self.mask = Some(mask);
        self
    }

    /// Gives each query head a [sink](Problem::sinks). docs/features.md in the repository has a decode step with ALiBi and sinks.
    pub const fn with_sinks(mut self) -> Self {
        self.sinks = true;
        self
    }

    /// Masks keys that come after the query.
    pub const fn causal(mut self, causal: Causal) -> Self {
        self.causal = Some(causal);
        self
    }

    /// Masks keys outside a window around the bottom-right diagonal, `i + seqlen_k − seqlen_q` (with lengths, those), also where the causal
    /// mask is top-left: with different lengths the two may leave a query no key. `None` leaves a side open.
    pub const fn window(mut self, left: Option<u32>, right: Option<u32>) -> Self {
        self.window_left = left;
        self.window_right = right;
        self
    }

    /// Expects a buffer of key lengths, `i32 [batch]`.
    ///
    /// Alone it is for queries that are all real, which end where the keys end: a step of decoding on a padded cache, say. For a batch
    /// of padded sequences, whose q ends at a length as well, a bottom-right mask or a window needs
    /// [`with_seqlens_q`](Problem::with_seqlens_q) too: without it the diagonal ends at the last row of padding, and real queries
    /// see fewer keys, or none.
    pub const fn with_seqlens_k(mut self) -> Self {
        self.seqlens_k = true;
        self
    }

    /// Expects a buffer of query lengths, `i32 [batch]`: of a batch of padded sequences, as [`with_seqlens_k`](Problem::with_seqlens_k)
    /// for keys.
    pub const fn with_seqlens_q(mut self) -> Self {
        self.seqlens_q = true;
        self
    }

    /// Drops probabilities after the softmax, each with this probability, which is from 0 to below 1, and divides the others by 1 less it:
    /// [`dropout`](Problem::dropout). Seed and offset are in a buffer, and passes of one submission that drop differently need
    /// [a buffer each](crate::ForwardBuffers::rng_state). docs/features.md in the repository has a training step.
    pub const fn with_dropout(mut self, probability: f32) -> Self {
        self.dropout = Some(probability);
        self
    }

    /// The probability of dropout, if any can be dropped.
    pub(crate) fn dropout_in_use(&self) -> Option<f32> {
        self.dropout.filter(|&probability| probability > 0.0)
    }

    /// Expects a buffer of block lists, packed: by [`BlockMask`](crate::BlockMask) on the host or
    /// [`Context::plan_blocks`](crate::Context::plan_blocks) on the device.
    pub const fn with_blocks(mut self, blocks: BlockLists) -> Self {
        self.blocks = Some(blocks);
        self
    }

    /// How many blocks there are, `[B|1, Hq|1, R, C]`: batch entries and heads that have lists of their own, blocks down the queries and across the
    /// keys. All 0 without block lists.
    pub fn block_counts(&self) -> [u32; 4] {
        self.packing().map_or([0; 4], |packing| [packing.batch, packing.heads, packing.down, packing.across])
    }

    /// Bytes of the packed block lists; 0 without.
    pub fn blocks_bytes(&self) -> u64 {
        self.packing().map_or(0, |packing| packing.bytes())
    }

    /// How the block lists lie in their buffer.
    pub(crate) fn packing(&self) -> Option<Packing> {
        let s = &self.shape;
        Some(self.blocks?.packing([s.batch, s.heads_q, s.seqlen_q, s.seqlen_k]))
    }

    /// Whether queries or keys have lengths.
    pub(crate) const fn has_lengths(&self) -> bool {
        self.seqlens_q || self.seqlens_k
    }

    /// Writes lse, f32 `[batch, heads_q, seqlen_q]`.
    pub const fn with_lse(mut self) -> Self {
        self.lse = true;
        self
    }

    /// Plans the backward pass too; lse is written, from which it recomputes the probabilities.
    ///
    /// Probabilities are `exp(score − lse)` in the backward pass, with lse as the forward pass rounded it. So gradients are off by
    /// `|lse| · 2⁻²⁴` relative to themselves (6e-5 at an lse of 1,000), on cooperative matrices by twice that. Where `|lse|` is
    /// above 4 million they are finite and mean nothing.
    pub const fn with_gradients(mut self) -> Self {
        self.lse = true;
        if self.gradients.is_none() {
            self.gradients =
                Some(Gradients { lse: false, accumulate: false, bias: false, sinks: false, alibi_slopes: false });
        }
        self
    }

    /// Plans the backward pass for a loss that uses lse: expects the gradient of it, f32 `[batch, heads_q, seqlen_q]`. Implies
    /// [`with_gradients`](Problem::with_gradients), in any order.
    pub const fn with_grad_lse(mut self) -> Self {
        self = self.with_gradients();
        if let Some(gradients) = &mut self.gradients {
            gradients.lse = true;
        }
        self
    }

    /// Plans a backward pass that gives the gradient of the bias too, in the bias' type and layout. Implies
    /// [`with_gradients`](Problem::with_gradients), in any order.
    pub const fn with_grad_bias(mut self) -> Self {
        self = self.with_gradients();
        if let Some(gradients) = &mut self.gradients {
            gradients.bias = true;
        }
        self
    }

    /// Plans a backward pass that gives the gradient of the sinks too. Implies [`with_gradients`](Problem::with_gradients), in any order.
    pub const fn with_grad_sinks(mut self) -> Self {
        self = self.with_gradients();
        if let Some(gradients) = &mut self.gradients {
            gradients.sinks = true;
        }
        self
    }

    /// Plans a backward pass that gives the gradient of ALiBi's slopes too. Implies [`with_gradients`](Problem::with_gradients), in any
    /// order.
    pub const fn with_grad_alibi_slopes(mut self) -> Self {
        self = self.with_gradients();
        if let Some(gradients) = &mut self.gradients {
            gradients.alibi_slopes = true;
        }
        self
    }

    /// Plans a backward pass that adds all gradients to what their buffers hold, [all or none](Gradients::accumulate). Implies
    /// [`with_gradients`](Problem::with_gradients), in any order. docs/features.md in the repository has an example.
    pub const fn accumulate(mut self) -> Self {
        self = self.with_gradients();
        if let Some(gradients) = &mut self.gradients {
            gradients.accumulate = true;
        }
        self
    }

    /// Changes and masks scores by functions that the user wrote.
    #[cfg(feature = "mods")]
    pub fn with_mods(mut self, mods: Mods) -> Self {
        self.mods = Some(mods);
        self
    }

    /// Whether the user changes scores.
    pub(crate) fn has_score_mod(&self) -> bool {
        self.mods.as_ref().is_some_and(Mods::has_score_mod)
    }

    /// Whether the user masks scores.
    pub(crate) fn has_mask_mod(&self) -> bool {
        self.mods.as_ref().is_some_and(Mods::has_mask_mod)
    }

    /// Computes a variant that only tests need.
    #[doc(hidden)]
    pub const fn with_probe(mut self, probe: Probe) -> Self {
        self.probe = Some(probe);
        self
    }

    /// The variant that is computed, if it is one that only tests need.
    #[doc(hidden)]
    pub const fn probe(&self) -> Option<Probe> {
        self.probe
    }

    /// The factor in use.
    pub fn effective_scale(&self) -> f32 {
        self.scale.unwrap_or_else(|| (1.0 / (self.shape.head_dim as f64).sqrt()) as f32)
    }

    /// Floating-point operations of the forward pass as they are usually counted:
    /// `2 · batch · heads_q · seqlen_q · seqlen_k · (head_dim + head_dim_v)`, halved when causal.
    pub fn forward_flops(&self) -> f64 {
        let s = &self.shape;
        let rows = s.batch as f64 * s.heads_q as f64 * s.seqlen_q as f64;
        let full = 2.0 * rows * s.seqlen_k as f64 * (s.head_dim as f64 + s.head_dim_v as f64);
        if self.causal.is_some() { full / 2.0 } else { full }
    }

    /// Floating-point operations of the backward pass as they are usually counted: 2.5 times those of the forward pass, five
    /// products for two.
    pub fn backward_flops(&self) -> f64 {
        2.5 * self.forward_flops()
    }

    /// Bytes of the elements of q, k, v, o and, if it is written, lse; `u64::MAX` if they are more.
    pub(crate) fn forward_bytes(&self) -> u64 {
        let elements = |t: &Tensor| self.shape.dims(*t).iter().fold(1u64, |n, &d| n.saturating_mul(d.into()));
        let all = Tensor::FORWARD.iter().fold(0u64, |sum, t| sum.saturating_add(elements(t)));
        let lse = if self.lse { self.shape.rows().saturating_mul(4) } else { 0 };
        all.saturating_mul(self.element_type.bytes()).saturating_add(lse)
    }

    /// Checks everything that does not depend on a device or a buffer.
    pub fn validate(&self) -> Result<(), Error> {
        let s = &self.shape;
        for (argument, found) in [("head_dim", s.head_dim), ("head_dim_v", s.head_dim_v)] {
            if !(1..=MAX_HEAD_DIM).contains(&found) {
                return Err(Error::HeadDim { argument, found });
            }
        }
        if s.heads_q == 0 || s.heads_kv == 0 || !s.heads_q.is_multiple_of(s.heads_kv) {
            return Err(Error::Heads { heads_q: s.heads_q, heads_kv: s.heads_kv });
        }
        for (argument, found) in [("seqlen_q", s.seqlen_q), ("seqlen_k", s.seqlen_k)] {
            if found > MAX_SEQLEN {
                return Err(Error::Seqlen { argument, found });
            }
        }
        if let Some(scale) = self.scale.filter(|x| !SCALES.contains(x)) {
            return Err(Error::Scale(scale));
        }
        if let Some(softcap) = self.softcap.filter(|x| !SOFTCAPS.contains(x)) {
            return Err(Error::Softcap(softcap));
        }
        if let Some(probability) = self.dropout.filter(|x| !(0.0..1.0).contains(x)) {
            return Err(Error::Dropout(probability));
        }
        if let Some(blocks) = &self.blocks {
            for (argument, found) in [("blocks.queries", blocks.queries), ("blocks.keys", blocks.keys)] {
                if !(1..=MAX_SEQLEN).contains(&found) {
                    return Err(Error::BlockSize { argument, found });
                }
            }
        }
        if self.gradients.is_some() && !self.lse {
            return Err(Error::GradientsWithoutLse);
        }
        let gradients = self.gradients.unwrap_or_default();
        for (argument, asked, of) in [
            ("bias", gradients.bias, self.bias.is_some()),
            ("sinks", gradients.sinks, self.sinks),
            ("alibi_slopes", gradients.alibi_slopes, self.alibi.is_some()),
        ] {
            if asked && !of {
                return Err(Error::GradientOfNothing { argument });
            }
        }
        if let Some(found) = self.bias.map(|bias| bias.element_type)
            && ![ElementType::F32, self.element_type].contains(&found)
        {
            return Err(Error::BiasType { found, problem: self.element_type });
        }
        for (argument, layout) in [("bias", self.bias.map(|bias| bias.layout)), ("mask", self.mask)] {
            let Some(layout) = layout else { continue };
            let needed = [s.batch, s.heads_q, s.seqlen_q, s.seqlen_k];
            if let Some(found) = layout.sizes
                && (0..4).any(|n| found[n] != 1 && found[n] != needed[n])
            {
                return Err(Error::ScoreSizes { argument, found, needed });
            }
            if self.score_bytes(&layout, 8).is_none() {
                return Err(Error::LayoutOverflow { argument });
            }
            if argument == "bias" && gradients.bias && score_layout_overlaps(&layout, s) {
                return Err(Error::OutputOverlap { argument: "grad_bias" });
            }
        }
        for tensor in Tensor::BACKWARD {
            if tensor.is_gradient() && self.gradients.is_none() {
                continue;
            }
            let layout = self.layout(tensor);
            let end = layout.end(s.dims(tensor));
            if end.and_then(|n| n.checked_mul(8)).is_none() {
                return Err(Error::LayoutOverflow { argument: tensor.name() });
            }
            let is_output = !matches!(tensor, Tensor::Query | Tensor::Key | Tensor::Value | Tensor::GradOut);
            if is_output && layout.overlaps_itself(s.dims(tensor)) {
                return Err(Error::OutputOverlap { argument: tensor.name() });
            }
        }
        Ok(())
    }

    /// Whether the forward pass has nothing to write.
    pub(crate) fn is_empty(&self) -> bool {
        self.shape.rows() == 0
    }

    /// Whether the backward pass has nothing to write.
    pub(crate) fn has_no_gradients(&self) -> bool {
        let s = &self.shape;
        let is_empty = s.batch == 0 || (s.seqlen_q == 0 && s.seqlen_k == 0);
        is_empty && !self.has_head_gradients()
    }

    /// Whether the backward pass writes gradients of what each head has, which are there whatever the other sizes are.
    pub(crate) fn has_head_gradients(&self) -> bool {
        self.gradients.is_some_and(|gradients| gradients.sinks || gradients.alibi_slopes)
    }

    /// Bytes from the start of the binding to the end of the tensor, where its layout puts it; 0 for a tensor without elements. A buffer of so
    /// many bytes holds it. lse takes 4 bytes for each of [`Shape::rows`].
    pub fn tensor_bytes(&self, tensor: Tensor) -> u64 {
        let dims = self.shape.dims(tensor);
        if dims.contains(&0) {
            return 0;
        }
        // validate() has shown that this does not overflow.
        self.layout(tensor).end(dims).unwrap_or(u64::MAX / 8) * self.element_type.bytes()
    }

    /// Where the bias lies, and the bytes of its elements.
    pub(crate) fn bias_scores(&self) -> Option<(ScoreLayout, u64)> {
        self.bias.map(|bias| (bias.layout, bias.element_type.bytes()))
    }

    /// Where the mask lies, and the bytes of its elements.
    pub(crate) fn mask_scores(&self) -> Option<(ScoreLayout, u64)> {
        self.mask.map(|layout| (layout, 1))
    }

    /// How many slopes ALiBi has.
    pub(crate) fn slope_count(&self) -> Option<u64> {
        self.alibi.map(|alibi| alibi.slopes(&self.shape))
    }

    /// How many sinks there are.
    pub(crate) fn sink_count(&self) -> Option<u64> {
        self.sinks.then_some(self.shape.heads_q as u64)
    }

    /// Bytes from the start of the binding to the end of what lies so, 0 if it has no elements; `None` past 2^64.
    pub(crate) fn score_bytes(&self, layout: &ScoreLayout, element_bytes: u64) -> Option<u64> {
        let s = &self.shape;
        let (rows, span) = layout.rows(s.seqlen_k);
        if [s.batch, s.seqlen_q, s.seqlen_k].contains(&0) {
            return Some(0);
        }
        rows.end([s.batch, s.heads_q, s.seqlen_q, 0])?.checked_add(span)?.checked_mul(element_bytes)
    }

    /// The bytes in its buffer of what lies so.
    pub(crate) fn score_region(&self, layout: &ScoreLayout, element_bytes: u64) -> Region {
        let s = &self.shape;
        let (rows, span) = layout.rows(s.seqlen_k);
        let dims = layout.sizes_in(s);
        // Rows whole, whatever lies between their elements.
        let span = u32::try_from(span).unwrap_or(u32::MAX);
        Region::of(rows.offset, [rows.batch, rows.head, rows.row], [dims[0], dims[1], dims[2], span], element_bytes)
    }

    /// The bytes of a tensor in its buffer.
    pub(crate) fn region(&self, tensor: Tensor) -> Region {
        let Layout { offset, batch, head, row } = self.layout(tensor);
        Region::of(offset, [batch, head, row], self.shape.dims(tensor), self.element_type.bytes())
    }

    /// Whether all of these tensors can be read and written in groups of so many elements.
    pub(crate) fn is_aligned(&self, tensors: &[Tensor], elements: u32) -> bool {
        let s = &self.shape;
        let aligned = |&t: &Tensor| self.layout(t).is_aligned(s.dims(t), elements.into());
        s.head_dim.is_multiple_of(elements) && s.head_dim_v.is_multiple_of(elements) && tensors.iter().all(aligned)
    }

    /// Keys that some query may see when all are valid.
    pub(crate) fn keys_in_sight(&self) -> u32 {
        let s = &self.shape;
        let first = self.key_interval(0, s.seqlen_k).0;
        self.key_interval(s.seqlen_q.saturating_sub(1), s.seqlen_k).1.saturating_sub(first)
    }

    /// Whether a mask lets rows see more keys the later they are, as a causal one does.
    pub(crate) fn rows_grow(&self) -> bool {
        (self.causal.is_some() || self.window_right.is_some()) && self.window_left.is_none()
    }

    /// The keys that query `i` may see when `keys` of them, and all queries, are valid: first, and one past the last.
    /// The same arithmetic as `key_interval` in `shaders/attention/keep.wgsl`.
    pub fn key_interval(&self, i: u32, keys: u32) -> (u32, u32) {
        self.key_interval_of(i, self.shape.seqlen_q, keys)
    }

    /// The keys that query `i` may see when `queries` queries and `keys` keys are valid; none if `i` is not valid itself.
    pub fn key_interval_of(&self, i: u32, queries: u32, keys: u32) -> (u32, u32) {
        if i >= queries {
            return (0, 0);
        }
        let diagonal = i as i64 + keys as i64 - queries as i64;
        let first = self.window_left.map_or(0, |left| diagonal - left as i64);
        let mut last = keys as i64;
        if let Some(right) = self.window_right {
            last = last.min(diagonal + right as i64 + 1);
        }
        match self.causal {
            Some(Causal::BottomRight) => last = last.min(diagonal + 1),
            Some(Causal::TopLeft) => last = last.min(i as i64 + 1),
            None => {}
        }
        let first = first.clamp(0, keys as i64);
        (first as u32, last.clamp(first, keys as i64) as u32)
    }
}
