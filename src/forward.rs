//! Recording a planned forward pass: check the buffers, bind them, dispatch.

use wgpu::BufferBinding;

use crate::bind::{Argument, BoundPass, ToBinding, ToOptionalBinding, check_buffers, mod_buffers};
use crate::error::Error;
use crate::kernel::{Access, Slot};
use crate::plan::Plan;
use crate::problem::Tensor;

/// The buffers of a forward pass, each a whole buffer or a part of one (see [`ToBinding`]):
///
/// ```
/// use wgpu_flash_attention::{Error, ForwardBuffers, Plan, wgpu};
///
/// fn forward(plan: &Plan, encoder: &mut wgpu::CommandEncoder, buffers: [&wgpu::Buffer; 5]) -> Result<(), Error> {
///     let [q, k, v, o, lse] = buffers;
///     let workspace = plan.create_workspace()?; // `None` if the plan needs none
///     plan.forward(encoder, &ForwardBuffers::new(q, k, v, o).lse(lse).workspace(workspace.as_ref()))
/// }
/// ```
///
/// Each needs `BufferUsages::STORAGE` and an offset that is a multiple of the device's
/// `min_storage_buffer_offset_alignment`; put finer offsets into the problem's [`Layout`](crate::Layout).
/// Any of them may share a buffer, if no element of o or lse lies where another tensor has one, and no element of o in a 4-byte
/// word with one of an input: they may be parts of one pool, or strided views of one tensor. (Where inputs and outputs share one,
/// other pipelines are built at the first use; and browsers want lengths in a buffer without outputs.) Sizes are those of the layouts,
/// rounded up to 4 bytes. A tensor without elements (`seqlen_k` of 0, say) may be any buffer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ForwardBuffers<'a> {
    /// q, with the problem's layout of [`Tensor::Query`](crate::Tensor::Query); the others likewise.
    pub query: BufferBinding<'a>,
    /// k.
    pub key: BufferBinding<'a>,
    /// v.
    pub value: BufferBinding<'a>,
    /// o. Every element of it is written; what lies between is left as it is.
    pub out: BufferBinding<'a>,
    /// lse, f32 `[batch, heads_q, seqlen_q]`; given exactly when the problem has `lse`.
    pub lse: Option<BufferBinding<'a>>,
    /// Query lengths, `i32 [batch]`; given exactly when the problem has `seqlens_q`.
    pub seqlens_q: Option<BufferBinding<'a>>,
    /// Key lengths, `i32 [batch]`; given exactly when the problem has `seqlens_k`.
    pub seqlens_k: Option<BufferBinding<'a>>,
    /// Seed and offset of dropout, two u64, little endian, as [`Dropout::rng_state`](crate::Dropout::rng_state) has them; given exactly when the
    /// problem has [`dropout`](crate::Problem::dropout). It is read as a uniform: it needs `BufferUsages::UNIFORM`, an offset that is a
    /// multiple of the device's `min_uniform_buffer_offset_alignment`, and a buffer without outputs.
    ///
    /// It is read when the pass runs. Passes of one submission that drop differently need a state each, because wgpu carries out every
    /// `queue.write_buffer` before the submission that follows it: with one state all of them would read what was written last. Give each layer
    /// a buffer of its own, or a slot of one buffer, at a multiple of the alignment. The backward pass needs the state of its forward
    /// pass.
    pub rng_state: Option<BufferBinding<'a>>,
    /// Packed block lists, [`Problem::blocks_bytes`](crate::Problem::blocks_bytes); given exactly when the problem has `blocks`.
    pub blocks: Option<BufferBinding<'a>>,
    /// The bias; given exactly when the problem has one.
    pub bias: Option<BufferBinding<'a>>,
    /// The boolean mask, one byte for each score; given exactly when the problem has one.
    pub mask: Option<BufferBinding<'a>>,
    /// ALiBi's slopes, f32 `[heads_q]` or `[batch, heads_q]`; given exactly when the problem has them.
    pub alibi_slopes: Option<BufferBinding<'a>>,
    /// The sinks, f32 `[heads_q]`; given exactly when the problem has them.
    pub sinks: Option<BufferBinding<'a>>,
    /// The buffers of the problem's mods, by name.
    pub(crate) mod_buffers: Vec<(&'a str, BufferBinding<'a>)>,
    /// At least [`Plan::workspace_bytes`], in a buffer of its own; not needed where that is 0.
    pub workspace: Option<BufferBinding<'a>>,
}

impl<'a> ForwardBuffers<'a> {
    /// q, k, v and o. The methods add what else the problem has.
    pub fn new(
        query: impl ToBinding<'a>,
        key: impl ToBinding<'a>,
        value: impl ToBinding<'a>,
        out: impl ToBinding<'a>,
    ) -> Self {
        ForwardBuffers {
            query: query.to_binding(),
            key: key.to_binding(),
            value: value.to_binding(),
            out: out.to_binding(),
            lse: None,
            seqlens_q: None,
            seqlens_k: None,
            rng_state: None,
            blocks: None,
            bias: None,
            mask: None,
            alibi_slopes: None,
            sinks: None,
            mod_buffers: vec![],
            workspace: None,
        }
    }

    /// Where lse is written, of a problem with it.
    pub fn lse(mut self, lse: impl ToOptionalBinding<'a>) -> Self {
        self.lse = lse.to_optional_binding();
        self
    }

    /// Query lengths, of a problem with them.
    pub fn seqlens_q(mut self, seqlens_q: impl ToOptionalBinding<'a>) -> Self {
        self.seqlens_q = seqlens_q.to_optional_binding();
        self
    }

    /// Key lengths, of a problem with them.
    pub fn seqlens_k(mut self, seqlens_k: impl ToOptionalBinding<'a>) -> Self {
        self.seqlens_k = seqlens_k.to_optional_binding();
        self
    }

    /// Seed and offset of dropout, of a problem with it. Passes of one submission that drop differently need
    /// [a state each](ForwardBuffers::rng_state).
    pub fn rng_state(mut self, rng_state: impl ToOptionalBinding<'a>) -> Self {
        self.rng_state = rng_state.to_optional_binding();
        self
    }

    /// Packed block lists, of a problem with them.
    pub fn blocks(mut self, blocks: impl ToOptionalBinding<'a>) -> Self {
        self.blocks = blocks.to_optional_binding();
        self
    }

    /// The bias, of a problem with one.
    pub fn bias(mut self, bias: impl ToOptionalBinding<'a>) -> Self {
        self.bias = bias.to_optional_binding();
        self
    }

    /// The boolean mask, of a problem with one.
    pub fn mask(mut self, mask: impl ToOptionalBinding<'a>) -> Self {
        self.mask = mask.to_optional_binding();
        self
    }

    /// ALiBi's slopes, of a problem with them.
    pub fn alibi_slopes(mut self, alibi_slopes: impl ToOptionalBinding<'a>) -> Self {
        self.alibi_slopes = alibi_slopes.to_optional_binding();
        self
    }

    /// The sinks, of a problem with them.
    pub fn sinks(mut self, sinks: impl ToOptionalBinding<'a>) -> Self {
        self.sinks = sinks.to_optional_binding();
        self
    }

    /// A buffer of the problem's [`Mods`](crate::Mods), by its name in their text; every buffer that they declare is given once.
    /// It may be of any size from one element on: an index past its end reads its last element. Only mods read it, and it has no
    /// gradient.
    #[cfg(feature = "mods")]
    pub fn mod_buffer(mut self, name: &'a str, buffer: impl ToBinding<'a>) -> Self {
        self.mod_buffers.push((name, buffer.to_binding()));
        self
    }

    /// The workspace, as [`Plan::create_workspace`] makes it.
    pub fn workspace(mut self, workspace: impl ToOptionalBinding<'a>) -> Self {
        self.workspace = workspace.to_optional_binding();
        self
    }
}

impl Plan {
    /// Records the forward pass into the caller's encoder. Submits nothing and allocates no buffer.
    ///
    /// On an error nothing has been recorded.
    pub fn forward(&self, encoder: &mut wgpu::CommandEncoder, buffers: &ForwardBuffers<'_>) -> Result<(), Error> {
        self.bind_forward(buffers)?.encode(encoder, "wgpu-flash-attention forward");
        Ok(())
    }

    /// Checks and binds the buffers, to record into a compute pass of the caller's.
    pub fn bind_forward(&self, buffers: &ForwardBuffers<'_>) -> Result<BoundPass, Error> {
        let slots = self.check(buffers)?;
        BoundPass::new(&self.device, || self.forward.bind(&self.device, &slots))
    }

    /// Checks every buffer; returns those that can be bound.
    fn check<'b, 'a>(&self, buffers: &'b ForwardBuffers<'a>) -> Result<Vec<(Slot, &'b BufferBinding<'a>)>, Error> {
        let problem = &self.problem;
        let lse = if problem.lse { 4 * problem.shape.rows() } else { 0 };
        let mut all = vec![
            Argument::tensor(Slot::Query, Access::Read, &buffers.query, problem, Tensor::Query),
            Argument::tensor(Slot::Key, Access::Read, &buffers.key, problem, Tensor::Key),
            Argument::tensor(Slot::Value, Access::Read, &buffers.value, problem, Tensor::Value),
            Argument::tensor(Slot::Out, Access::ReadWrite, &buffers.out, problem, Tensor::Out),
            Argument::bytes(Slot::Lse, Access::ReadWrite, buffers.lse.as_ref(), lse, problem.lse),
            Argument::lengths(Slot::SeqlensQ, buffers.seqlens_q.as_ref(), problem, problem.seqlens_q),
            Argument::lengths(Slot::SeqlensK, buffers.seqlens_k.as_ref(), problem, problem.seqlens_k),
            Argument::rng_state(buffers.rng_state.as_ref(), problem),
            Argument::blocks(buffers.blocks.as_ref(), problem),
            Argument::scores(Slot::Bias, Access::Read, buffers.bias.as_ref(), problem, problem.bias_scores()),
            Argument::scores(Slot::Mask, Access::Read, buffers.mask.as_ref(), problem, problem.mask_scores()),
            Argument::of_heads(Slot::AlibiSlopes, Access::Read, buffers.alibi_slopes.as_ref(), problem.slope_count()),
            Argument::of_heads(Slot::Sinks, Access::Read, buffers.sinks.as_ref(), problem.sink_count()),
            // A workspace that this plan does without may be given all the same.
            Argument::bytes(
                Slot::Workspace,
                Access::ReadWrite,
                buffers.workspace.as_ref(),
                self.workspace_bytes(),
                true,
            ),
        ];
        all.extend(mod_buffers(problem.mods.as_ref(), &buffers.mod_buffers, &self.device.limits())?);
        check_buffers(&all, self.offset_alignments)
    }
}
