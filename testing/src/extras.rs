//! What a problem has besides q, k and v, on the host and on the device.

use wgpu_flash_attention::{Context, ElementType, ForwardBuffers, Problem, ScoreLayout, reference, wgpu};

use crate::memory::to_bits;

/// Of each input that a problem has besides q, k and v, the contents.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// Valid queries of each batch entry.
    pub seqlens_q: Option<Vec<i32>>,
    /// Valid keys of each batch entry.
    pub seqlens_k: Option<Vec<i32>>,
    /// The bias, where its layout says.
    pub bias: Option<Vec<f32>>,
    /// The boolean mask, likewise.
    pub mask: Option<Vec<bool>>,
    /// ALiBi's slopes.
    pub alibi_slopes: Option<Vec<f32>>,
    /// The sinks of the heads.
    pub sinks: Option<Vec<f32>>,
}

impl Extras {
    pub fn borrow(&self) -> reference::Extras<'_> {
        reference::Extras::default()
            .seqlens_q(self.seqlens_q.as_deref())
            .seqlens_k(self.seqlens_k.as_deref())
            .bias(self.bias.as_deref())
            .mask(self.mask.as_deref())
            .alibi_slopes(self.alibi_slopes.as_deref())
            .sinks(self.sinks.as_deref())
    }

    /// On the device, for a problem with them.
    pub fn upload(&self, context: &Context, problem: &Problem) -> Result<DeviceExtras, String> {
        let bias = self.bias.as_ref().zip(problem.bias).map(|(bias, of)| bytes_of(of.element_type, bias));
        let mask = self.mask.as_ref().map(|mask| in_words(mask.iter().map(|&x| u8::from(x)).collect()));
        Ok(DeviceExtras {
            seqlens_q: upload(context, "seqlens_q", &self.seqlens_q)?,
            seqlens_k: upload(context, "seqlens_k", &self.seqlens_k)?,
            bias: upload(context, "bias", &bias)?,
            mask: upload(context, "mask", &mask)?,
            alibi_slopes: upload(context, "alibi_slopes", &self.alibi_slopes)?,
            sinks: upload(context, "sinks", &self.sinks)?,
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
    bias: Option<wgpu::Buffer>,
    mask: Option<wgpu::Buffer>,
    alibi_slopes: Option<wgpu::Buffer>,
    sinks: Option<wgpu::Buffer>,
}

impl DeviceExtras {
    /// The buffers of a forward pass, with these.
    pub fn add_to<'a>(&'a self, buffers: ForwardBuffers<'a>) -> ForwardBuffers<'a> {
        buffers
            .seqlens_q(self.seqlens_q.as_ref())
            .seqlens_k(self.seqlens_k.as_ref())
            .bias(self.bias.as_ref())
            .mask(self.mask.as_ref())
            .alibi_slopes(self.alibi_slopes.as_ref())
            .sinks(self.sinks.as_ref())
    }
}
