//! Recording a planned backward pass: gradients of q, k and v from those of o.

use wgpu::BufferBinding;

use crate::bind::{Argument, BoundPass, ToBinding, ToOptionalBinding, check_buffers, mod_buffers};
use crate::error::Error;
use crate::forward::ForwardBuffers;
use crate::kernel::{Access, Slot};
use crate::plan::Plan;
use crate::problem::Tensor;

/// The buffers of a backward pass: those of the forward pass, the gradient of o, and where those of q, k and v go.
///
/// ```
/// use wgpu_flash_attention::{BackwardBuffers, Error, ForwardBuffers, Plan, wgpu};
///
/// fn backward(
///     plan: &Plan,
///     encoder: &mut wgpu::CommandEncoder,
///     forward: &ForwardBuffers<'_>, // with lse
///     grad_out: &wgpu::Buffer,
///     [dq, dk, dv]: [&wgpu::Buffer; 3],
/// ) -> Result<(), Error> {
///     let workspace = plan.create_backward_workspace()?;
///     plan.backward(encoder, &BackwardBuffers::new(forward, grad_out, [dq, dk, dv]).workspace(workspace.as_ref()))
/// }
/// ```
///
/// What [`ForwardBuffers`] says of usages, offsets, sizes and shared buffers holds here too; the gradients of q, k and v are the
/// outputs, and o and lse are inputs. So the gradients may be views of one tensor `[batch, position, 3, head, dim]`, say.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackwardBuffers<'a> {
    /// q, with the problem's layout of [`Tensor::Query`](crate::Tensor::Query); the others likewise.
    pub query: BufferBinding<'a>,
    /// k.
    pub key: BufferBinding<'a>,
    /// v.
    pub value: BufferBinding<'a>,
    /// o as the forward pass left it.
    pub out: BufferBinding<'a>,
    /// lse as the forward pass left it, f32 `[batch, heads_q, seqlen_q]`; always needed.
    pub lse: Option<BufferBinding<'a>>,
    /// The gradient of o.
    pub grad_out: BufferBinding<'a>,
    /// The gradient of lse, f32 `[batch, heads_q, seqlen_q]`; given exactly when [`Gradients::lse`](crate::Gradients::lse) is set.
    pub grad_lse: Option<BufferBinding<'a>>,
    /// The gradient of q. Every element of it is written, what lies between is left as it is; the next two likewise.
    pub grad_query: BufferBinding<'a>,
    /// The gradient of k.
    pub grad_key: BufferBinding<'a>,
    /// The gradient of v.
    pub grad_value: BufferBinding<'a>,
    /// Query lengths, `i32 [batch]`; given exactly when the problem has `seqlens_q`.
    pub seqlens_q: Option<BufferBinding<'a>>,
    /// Key lengths, `i32 [batch]`; given exactly when the problem has `seqlens_k`.
    pub seqlens_k: Option<BufferBinding<'a>>,
    /// Seed and offset of dropout, which must be those of the forward pass; given exactly when the problem has `dropout`.
    pub rng_state: Option<BufferBinding<'a>>,
    /// Packed block lists; given exactly when the problem has `blocks`.
    pub blocks: Option<BufferBinding<'a>>,
    /// The bias; given exactly when the problem has one.
    pub bias: Option<BufferBinding<'a>>,
    /// The boolean mask, one byte for each score; given exactly when the problem has one.
    pub mask: Option<BufferBinding<'a>>,
    /// ALiBi's slopes, f32 `[heads_q]` or `[batch, heads_q]`; given exactly when the problem has them.
    pub alibi_slopes: Option<BufferBinding<'a>>,
    /// The sinks, f32 `[heads_q]`; given exactly when the problem has them.
    pub sinks: Option<BufferBinding<'a>>,
    /// The gradient of the bias, where the bias' layout puts its elements; given exactly when
    /// [`Gradients::bias`](crate::Gradients::bias) is set.
    pub grad_bias: Option<BufferBinding<'a>>,
    /// The gradient of the sinks, f32 `[heads_q]`; given exactly when [`Gradients::sinks`](crate::Gradients::sinks) is set.
    pub grad_sinks: Option<BufferBinding<'a>>,
    /// The gradient of ALiBi's slopes, f32, with their shape; given exactly when
    /// [`Gradients::alibi_slopes`](crate::Gradients::alibi_slopes) is set.
    pub grad_alibi_slopes: Option<BufferBinding<'a>>,
    /// The buffers of the problem's mods, by name.
    pub(crate) mod_buffers: Vec<(&'a str, BufferBinding<'a>)>,
    /// At least [`Plan::backward_workspace_bytes`], in a buffer of its own; not needed where that is 0.
    pub workspace: Option<BufferBinding<'a>>,
}

impl<'a> BackwardBuffers<'a> {
    /// Takes all buffers of the forward pass, but for its workspace; then the gradient of o, and where the
    /// gradients of q, k and v are written.
    pub fn new<B: ToBinding<'a>>(
        forward: &ForwardBuffers<'a>,
        grad_out: impl ToBinding<'a>,
        [grad_query, grad_key, grad_value]: [B; 3],
    ) -> Self {
        let ForwardBuffers {
            query,
            key,
            value,
            out,
            lse,
            seqlens_q,
            seqlens_k,
            blocks,
            bias,
            mask,
            alibi_slopes,
            sinks,
            rng_state,
            mod_buffers,
            workspace: _,
        } = forward.clone();
        BackwardBuffers {
            query,
            key,
            value,
            out,
            lse,
            grad_out: grad_out.to_binding(),
            grad_lse: None,
            grad_query: grad_query.to_binding(),
            grad_key: grad_key.to_binding(),
            grad_value: grad_value.to_binding(),
            seqlens_q,
            seqlens_k,
            rng_state,
            blocks,
            bias,
            mask,
            alibi_slopes,
            sinks,
            mod_buffers,
            grad_bias: None,
            grad_sinks: None,
            grad_alibi_slopes: None,
            workspace: None,
        }
    }

    /// The gradient of lse, of a problem with it.
    pub fn grad_lse(mut self, grad_lse: impl ToOptionalBinding<'a>) -> Self {
        self.grad_lse = grad_lse.to_optional_binding();
        self
    }

    /// Where the gradient of the bias is written.
    pub fn grad_bias(mut self, grad_bias: impl ToOptionalBinding<'a>) -> Self {
        self.grad_bias = grad_bias.to_optional_binding();
        self
    }

    /// Where the gradient of the sinks is written.
    pub fn grad_sinks(mut self, grad_sinks: impl ToOptionalBinding<'a>) -> Self {
        self.grad_sinks = grad_sinks.to_optional_binding();
        self
    }

    /// Where the gradient of ALiBi's slopes is written.
    pub fn grad_alibi_slopes(mut self, grad_alibi_slopes: impl ToOptionalBinding<'a>) -> Self {
        self.grad_alibi_slopes = grad_alibi_slopes.to_optional_binding();
        self
    }

    /// The workspace, as [`Plan::create_backward_workspace`] makes it.
    pub fn workspace(mut self, workspace: impl ToOptionalBinding<'a>) -> Self {
        self.workspace = workspace.to_optional_binding();
        self
    }
}

impl Plan {
    /// Records the backward pass into the caller's encoder. That may be the encoder of the forward pass, right after it. Submits nothing and allocates no buffer.
    ///
    /// Probabilities are recomputed from q, k and lse, tile by tile, so o and lse must be those of a forward pass over the same
    /// q, k and v. No gradient is summed by atomics: the same input gives the same bits.
    ///
    /// Gradients are off by `|lse| · 2⁻²⁴` relative to themselves, which is what lse was rounded by, on cooperative matrices by twice
    /// that. Where `|lse|` is above 4 million they are finite and mean nothing.
    ///
    /// On an error nothing has been recorded. It is [`Error::NoGradients`] for a plan of a problem without
    /// [`gradients`](crate::Problem::gradients).
    pub fn backward(&self, encoder: &mut wgpu::CommandEncoder, buffers: &BackwardBuffers<'_>) -> Result<(), Error> {
        self.bind_backward(buffers)?.encode(encoder, "wgpu-flash-attention backward");
        Ok(())
    }

    /// Checks and binds the buffers, to record into a compute pass of the caller's.
    pub fn bind_backward(&self, buffers: &BackwardBuffers<'_>) -> Result<BoundPass, Error> {
        let problem = &self.problem;
        let (Some(schedule), Some(gradients)) = (&self.backward, &problem.gradients) else {
            return Err(Error::NoGradients);
        };
        let rows = 4 * problem.shape.rows();
        let grad_lse = if gradients.lse { rows } else { 0 };
        let input = |slot, binding, tensor| Argument::tensor(slot, Access::Read, binding, problem, tensor);
        let output = |slot, binding, tensor| Argument::tensor(slot, Access::ReadWrite, binding, problem, tensor);
        let mut all = vec![
            input(Slot::Query, &buffers.query, Tensor::Query),
            input(Slot::Key, &buffers.key, Tensor::Key),
            input(Slot::Value, &buffers.value, Tensor::Value),
            input(Slot::Out, &buffers.out, Tensor::Out),
            input(Slot::GradOut, &buffers.grad_out, Tensor::GradOut),
            Argument::bytes(Slot::Lse, Access::Read, buffers.lse.as_ref(), rows, true),
            Argument::bytes(Slot::GradLse, Access::Read, buffers.grad_lse.as_ref(), grad_lse, gradients.lse),
            Argument::lengths(Slot::SeqlensQ, buffers.seqlens_q.as_ref(), problem, problem.seqlens_q),
            Argument::lengths(Slot::SeqlensK, buffers.seqlens_k.as_ref(), problem, problem.seqlens_k),
            Argument::rng_state(buffers.rng_state.as_ref(), problem),
            Argument::blocks(buffers.blocks.as_ref(), problem),
            output(Slot::GradQuery, &buffers.grad_query, Tensor::GradQuery),
            output(Slot::GradKey, &buffers.grad_key, Tensor::GradKey),
            output(Slot::GradValue, &buffers.grad_value, Tensor::GradValue),
            Argument::scores(Slot::Bias, Access::Read, buffers.bias.as_ref(), problem, problem.bias_scores()),
            Argument::scores(Slot::Mask, Access::Read, buffers.mask.as_ref(), problem, problem.mask_scores()),
            Argument::of_heads(Slot::AlibiSlopes, Access::Read, buffers.alibi_slopes.as_ref(), problem.slope_count()),
            Argument::of_heads(Slot::Sinks, Access::Read, buffers.sinks.as_ref(), problem.sink_count()),
            Argument::scores(
                Slot::GradBias,
                Access::ReadWrite,
                buffers.grad_bias.as_ref(),
                problem,
                problem.bias_scores().filter(|_| gradients.bias),
            ),
            Argument::of_heads(
                Slot::GradSinks,
                Access::ReadWrite,
                buffers.grad_sinks.as_ref(),
                problem.sink_count().filter(|_| gradients.sinks),
            ),
            Argument::of_heads(
                Slot::GradAlibiSlopes,
                Access::ReadWrite,
                buffers.grad_alibi_slopes.as_ref(),
                problem.slope_count().filter(|_| gradients.alibi_slopes),
            ),
            // A workspace that this plan does without may be given all the same.
            Argument::bytes(
                Slot::Workspace,
                Access::ReadWrite,
                buffers.workspace.as_ref(),
                schedule.workspace_bytes,
                true,
            ),
        ];
        all.extend(mod_buffers(problem.mods.as_ref(), &buffers.mod_buffers, &self.device.limits())?);
        let slots = check_buffers(&all, self.offset_alignments)?;
        BoundPass::new(&self.device, || schedule.bind(&self.device, &slots))
    }
}
