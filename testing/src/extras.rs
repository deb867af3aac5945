//! What a problem has besides q, k and v, on the host and on the device.

use wgpu_flash_attention::{BlockMask, Context, ForwardBuffers, reference, wgpu};

/// Of each input that a problem has besides q, k and v, the contents.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// Valid queries of each batch entry.
    pub seqlens_q: Option<Vec<i32>>,
    /// Valid keys of each batch entry.
    pub seqlens_k: Option<Vec<i32>>,
    /// Which blocks are listed, and their lists.
    pub blocks: Option<(Vec<bool>, BlockMask)>,
}

impl Extras {
    pub fn borrow(&self) -> reference::Extras<'_> {
        reference::Extras::default()
            .seqlens_q(self.seqlens_q.as_deref())
            .seqlens_k(self.seqlens_k.as_deref())
            .blocks(self.blocks.as_ref().map(|(listed, _)| &listed[..]))
    }

    pub fn upload(&self, context: &Context) -> Result<DeviceExtras, String> {
        Ok(DeviceExtras {
            seqlens_q: upload(context, "seqlens_q", &self.seqlens_q)?,
            seqlens_k: upload(context, "seqlens_k", &self.seqlens_k)?,
            blocks: upload(context, "blocks", &self.blocks.as_ref().map(|(_, mask)| mask.bytes().to_vec()))?,
        })
    }
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
}

impl DeviceExtras {
    /// The buffers of a forward pass, with these.
    pub fn add_to<'a>(&'a self, buffers: ForwardBuffers<'a>) -> ForwardBuffers<'a> {
        buffers.seqlens_q(self.seqlens_q.as_ref()).seqlens_k(self.seqlens_k.as_ref()).blocks(self.blocks.as_ref())
    }
}
