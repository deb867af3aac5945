//! What a problem has besides q, k and v, on the host and on the device.

#[cfg(not(target_arch = "wasm32"))]
use wgpu_flash_attention::{BlockBuffers, BlockSource, Error, Mods};
use wgpu_flash_attention::{
    BlockMask, Context, Dropout, ElementType, ForwardBuffers, Problem, ScoreLayout, reference, wgpu,
};

use crate::memory::to_bits;

/// Of each input that a problem has besides q, k and v, the contents.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// Valid queries of each batch entry.
    pub seqlens_q: Option<Vec<i32>>,
    /// Valid keys of each batch entry.
    pub seqlens_k: Option<Vec<i32>>,
    /// Which blocks are listed, and their lists.
    pub blocks: Option<(Vec<bool>, BlockMask)>,
    /// The bias, where its layout says.
    pub bias: Option<Vec<f32>>,
    /// The boolean mask, likewise.
    pub mask: Option<Vec<bool>>,
    /// ALiBi's slopes.
    pub alibi_slopes: Option<Vec<f32>>,
    /// The sinks of the heads.
    pub sinks: Option<Vec<f32>>,
    pub dropout: Option<Dropout>,
    /// What the buffers of the problem's mods hold, by name.
    pub mod_buffers: Vec<(String, Vec<u8>)>,
}

impl Extras {
    pub fn borrow(&self) -> reference::Extras<'_> {
        reference::Extras::default()
            .seqlens_q(self.seqlens_q.as_deref())
            .seqlens_k(self.seqlens_k.as_deref())
            .blocks(self.blocks.as_ref().map(|(listed, _)| &listed[..]))
            .bias(self.bias.as_deref())
            .mask(self.mask.as_deref())
            .alibi_slopes(self.alibi_slopes.as_deref())
            .sinks(self.sinks.as_deref())
            .dropout(self.dropout)
            .mod_buffers(&self.mod_buffers)
    }

    /// On the device, for a problem with them.
    pub fn upload(&self, context: &Context, problem: &Problem) -> Result<DeviceExtras, String> {
        let bias = self.bias.as_ref().zip(problem.bias).map(|(bias, of)| bytes_of(of.element_type, bias));
        let mask = self.mask.as_ref().map(|mask| in_words(mask.iter().map(|&x| u8::from(x)).collect()));
        let mod_buffers = self.mod_buffers.iter().map(|(name, contents)| {
            let buffer = context.upload(contents).map_err(|error| format!("{name}: {error}"))?;
            Ok((name.clone(), buffer))
        });
        Ok(DeviceExtras {
            mod_buffers: mod_buffers.collect::<Result<_, String>>()?,
            seqlens_q: upload(context, "seqlens_q", &self.seqlens_q)?,
            seqlens_k: upload(context, "seqlens_k", &self.seqlens_k)?,
            blocks: upload(context, "blocks", &self.blocks.as_ref().map(|(_, mask)| mask.bytes().to_vec()))?,
            bias: upload(context, "bias", &bias)?,
            mask: upload(context, "mask", &mask)?,
            alibi_slopes: upload(context, "alibi_slopes", &self.alibi_slopes)?,
            sinks: upload(context, "sinks", &self.sinks)?,
            rng_state: upload(context, "rng_state", &self.dropout.map(|dropout| dropout.rng_state().to_vec()))?,
        })
    }
}

/// One more than the place of the last element of what lies so, 0 if it has none.
pub fn score_elements(problem: &Problem, layout: &ScoreLayout) -> u64 {
    let s = &problem.shape;
    let sizes = [s.batch, s.heads_q, s.seqlen_q, s.seqlen_k];
    if sizes.contains(&0) { 0 } else { layout.place(sizes.map(|n| n - 1)) + 1 }
}

/// In memory, in whole words.
pub fn bytes_of(element_type: ElementType, numbers: &[f32]) -> Vec<u8> {
    let bits = numbers.iter().map(|&x| to_bits(element_type, x));
    in_words(match element_type {
        ElementType::F32 => bits.flat_map(u32::to_le_bytes).collect(),
        _ => bits.flat_map(|bits| (bits as u16).to_le_bytes()).collect(),
    })
}

fn in_words(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(4).max(4), 0xff);
    bytes
}

fn upload<T: bytemuck::Pod>(
    context: &Context,
    name: &str,
    data: &Option<Vec<T>>,
) -> Result<Option<wgpu::Buffer>, String> {
    let upload = |data: &Vec<T>| context.upload(bytemuck::cast_slice(data)).map_err(|error| format!("{name}: {error}"));
    data.as_ref().map(upload).transpose()
}

/// [`Extras`] on the device.
pub struct DeviceExtras {
    seqlens_q: Option<wgpu::Buffer>,
    seqlens_k: Option<wgpu::Buffer>,
    blocks: Option<wgpu::Buffer>,
    bias: Option<wgpu::Buffer>,
    mask: Option<wgpu::Buffer>,
    alibi_slopes: Option<wgpu::Buffer>,
    sinks: Option<wgpu::Buffer>,
    rng_state: Option<wgpu::Buffer>,
    mod_buffers: Vec<(String, wgpu::Buffer)>,
}

impl DeviceExtras {
    /// The buffers of a forward pass, with these.
    pub fn add_to<'a>(&'a self, buffers: ForwardBuffers<'a>) -> ForwardBuffers<'a> {
        let with_mods = |buffers: ForwardBuffers<'a>, (name, buffer): &'a (String, _)| buffers.mod_buffer(name, buffer);
        self.mod_buffers
            .iter()
            .fold(buffers, with_mods)
            .blocks(self.blocks.as_ref())
            .seqlens_q(self.seqlens_q.as_ref())
            .seqlens_k(self.seqlens_k.as_ref())
            .bias(self.bias.as_ref())
            .mask(self.mask.as_ref())
            .alibi_slopes(self.alibi_slopes.as_ref())
            .sinks(self.sinks.as_ref())
            .rng_state(self.rng_state.as_ref())
    }
    /// The block lists that the device makes of the problem's other masks.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn blocks_of_masks(&self, context: &Context, problem: &Problem) -> Result<BlockMask, Error> {
        let plan = context.plan_blocks(problem, BlockSource::Masks)?;
        let blocks = plan.create_buffer()?;
        let mut buffers = BlockBuffers::new(&blocks).mask(self.mask.as_ref());
        buffers = buffers.seqlens_q(self.seqlens_q.as_ref()).seqlens_k(self.seqlens_k.as_ref());
        if problem.mods.as_ref().is_some_and(Mods::has_mask_mod) {
            buffers = self.mod_buffers.iter().fold(buffers, |buffers, (name, buffer)| buffers.mod_buffer(name, buffer));
        }
        let mut encoder = context.device().create_command_encoder(&Default::default());
        plan.record(&mut encoder, &buffers)?;
        context.queue().submit([encoder.finish()]);
        let bytes = context.download(&blocks, 0, problem.blocks_bytes())?;
        Ok(BlockMask::from_words(bytemuck::pod_collect_to_vec(&bytes)))
    }
}
