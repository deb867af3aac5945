//! What a file holds, and what is wrong with it.

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use wgpu_flash_attention::{Mods, Shape};

use flash_attention_testing::buffers::Number;
use flash_attention_testing::terminal::{first_few, quoted, quoted_list};

use crate::{Order, Result};

/// What the file may hold.
const NAMES: [&str; 22] = [
    "q",
    "k",
    "v",
    "seqlens_k",
    "seqlens_q",
    "attn_mask",
    "alibi_slopes",
    "sinks",
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "o",
    "lse",
    "do",
    "dlse",
    "dq",
    "dk",
    "dv",
    "dbias",
    "dsinks",
    "dalibi_slopes",
];

/// An error if what is to be ignored is not there, or is needed.
pub fn refuse_ignored(file: &SafeTensors<'_>, ignored: &[String]) -> Result<()> {
    if let Some(absent) = ignored.iter().find(|name| !file.names().contains(&name.as_str())) {
        return Err(format!("--ignore names {}, which the file does not hold", quoted(absent)));
    }
    match ignored.iter().find(|name| ["q", "k", "v"].contains(&name.as_str())) {
        Some(needed) => Err(format!("--ignore names {needed}, which is needed")),
        None => Ok(()),
    }
}

/// A warning if the file holds what means nothing here. An attention mask that nobody looks at, or lengths under a name with a typing
/// error, give results that look right.
pub fn warn_of_unknown(file: &SafeTensors<'_>, ignored: &[String], mods: Option<&Mods>) -> Option<String> {
    let mut names = file.names();
    names.sort();
    let is_buffer = |name: &str| mods.is_some_and(|mods| mods.buffers().any(|buffer| buffer == name));
    let is_known = |name: &str| NAMES.contains(&name) || is_buffer(name) || ignored.iter().any(|other| other == name);
    names.retain(|name| !is_known(name));
    let (tensors, them) = match names.len() {
        0 => return None,
        1 => ("a tensor that means", "it"),
        _ => ("tensors that mean", "them"),
    };
    Some(format!(
        "the file holds {tensors} nothing to attend, and the result leaves {them} out: {}; it knows {}; --ignore NAME says that this is meant",
        quoted_list(names),
        NAMES.join(", ")
    ))
}

/// The file, less what is to be ignored.
pub struct Source<'a> {
    pub file: &'a SafeTensors<'a>,
    pub ignored: &'a [String],
    pub order: Order,
}

impl<'a> Source<'a> {
    pub fn tensor(&self, name: &str) -> Option<TensorView<'a>> {
        if self.ignored.iter().any(|ignored| ignored == name) {
            return None;
        }
        self.file.tensor(name).ok()
    }

    /// All of a tensor of floats, whatever their type in the file.
    pub fn floats(&self, name: &str) -> Result<Floats> {
        let view = self.tensor(name).ok_or_else(|| {
            let mut names = self.file.names();
            names.sort();
            format!("the file has no tensor {name}; it has: {}", quoted_list(names))
        })?;
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F64 => bytemuck::pod_collect_to_vec(data),
            Dtype::F32 => decode::<f32>(data),
            Dtype::F16 => decode::<half::f16>(data),
            Dtype::BF16 => decode::<half::bf16>(data),
            other => return Err(format!("{name} is {other}; it must be F32, F16 or BF16")),
        };
        Ok(Floats { values, shape: view.shape().to_vec(), dtype: view.dtype() })
    }

    /// A tensor to compute with.
    pub fn input(&self, name: &str) -> Result<Floats> {
        let tensor = self.floats(name)?;
        if tensor.dtype == Dtype::F64 {
            return Err(format!("{name} is F64; it must be F32, F16 or BF16"));
        }
        Ok(tensor)
    }

    /// q, k or v, and its sizes: batch, heads, positions, dim, the order that its values have too.
    pub fn input_and_sizes(&self, name: &str) -> Result<(Floats, [u32; 4])> {
        let mut tensor = self.input(name)?;
        let shape = &tensor.shape;
        let sizes: [usize; 4] = shape[..].try_into().map_err(|_| {
            let (names, rank) = (self.order.names("positions").join(", "), shape.len());
            format!("{name} has {rank} dimensions, {}; it must have four: [{names}]", list_of(shape))
        })?;
        let small =
            |n: usize| u32::try_from(n).map_err(|_| format!("{name} has shape {shape:?}; a size is above 2^32"));
        let [b, h, n, d] = self.order.of(sizes).map(small);
        let small = [b?, h?, n?, d?];
        tensor.values = self.order.reorder(tensor.values, sizes);
        Ok((tensor, small))
    }

    /// Values that are to have these sizes, given as batch, heads, positions, dim, or without the last.
    pub fn ordered(&self, mut tensor: Floats, name: &str, sizes: &[u32]) -> Result<Floats> {
        let sizes: Vec<usize> = sizes.iter().map(|&n| n as usize).collect();
        let in_file = match sizes[..] {
            [b, h, n, d] => self.order.of([b, h, n, d]).to_vec(),
            _ => sizes,
        };
        if tensor.shape != in_file {
            return Err(format!("{name} has shape {}; q, k and v need {in_file:?}", list_of(&tensor.shape)));
        }
        if let [b, x, y, d] = in_file[..] {
            tensor.values = self.order.reorder(tensor.values, [b, x, y, d]);
        }
        Ok(tensor)
    }

    /// Extras by batch entry, if the file has any of this name. `most` is the number of `what` in all.
    pub fn lengths(&self, name: &str, batch: u32, most: u32, what: &str) -> Result<Option<Vec<i32>>> {
        let Some(view) = self.tensor(name) else {
            return Ok(None);
        };
        let values: Vec<i64> = match view.dtype() {
            Dtype::I32 => bytemuck::pod_collect_to_vec::<u8, i32>(view.data()).into_iter().map(i64::from).collect(),
            Dtype::I64 => bytemuck::pod_collect_to_vec(view.data()),
            other => return Err(format!("{name} is {other}; it must be I32 or I64")),
        };
        if view.shape() != [batch as usize] {
            return Err(format!("{name} has shape {}; q and k need [{batch}]", list_of(view.shape())));
        }
        if let Some(n) = values.iter().position(|length| !(0..=most as i64).contains(length)) {
            let length = values[n];
            return Err(format!("{name}[{n}] is {length}; it must be from 0 to {most}, the number of {what}"));
        }
        Ok(Some(values.into_iter().map(|length| length as i32).collect()))
    }

    /// attn_mask, if the file has one.
    pub fn attn_mask(&self, shape: &Shape) -> Result<Option<AttnMask>> {
        let Some(view) = self.tensor("attn_mask") else {
            return Ok(None);
        };
        let full = [shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_k];
        let found = view.shape();
        if found.len() != 4 || found.iter().zip(full).any(|(&n, full)| n != 1 && n != full as usize) {
            let [b, h, q, k] = full;
            return Err(format!(
                "attn_mask has shape {}; q and k need [{b}, {h}, {q}, {k}] (batch, query heads, queries, keys), or 1 in place \
                 of any of these sizes",
                list_of(found)
            ));
        }
        let mut sizes = full;
        sizes.iter_mut().zip(found).for_each(|(size, &n)| *size = n as u32);
        let values = match view.dtype() {
            Dtype::BOOL => match view.data().iter().find(|&&byte| byte > 1) {
                None => MaskValues::Bool(view.data().iter().map(|&byte| byte == 1).collect()),
                Some(byte) => return Err(format!("attn_mask is BOOL and holds a byte of {byte}; each must be 0 or 1")),
            },
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                let Floats { values, dtype, .. } = self.floats("attn_mask")?;
                MaskValues::Float(values, dtype)
            }
            other => return Err(format!("attn_mask is {other}; it must be BOOL, F32, F16 or BF16")),
        };
        Ok(Some(AttnMask { sizes, values }))
    }

    /// Numbers in F32, if the file has any of this name, which are to have one of these shapes.
    pub fn f32s(&self, name: &str, shapes: &[&[u32]]) -> Result<Option<Floats>> {
        let Some(view) = self.tensor(name) else {
            return Ok(None);
        };
        if view.dtype() != Dtype::F32 {
            return Err(format!("{name} is {}; it must be F32", view.dtype()));
        }
        let shape: Vec<u32> = view.shape().iter().map(|&n| u32::try_from(n).unwrap_or(u32::MAX)).collect();
        if !shapes.contains(&&shape[..]) {
            let needed: Vec<_> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
            return Err(format!("{name} has shape {}; q needs {}", list_of(view.shape()), needed.join(" or ")));
        }
        self.floats(name).map(Some)
    }

    /// The expected gradient of an input that has the shape `of`, if the file has it; an error if it has no such input.
    pub fn expected_shared(&self, name: &str, of: Option<&[usize]>, input: &str) -> Result<Option<Vec<f64>>> {
        match (self.tensor(name), of) {
            (None, _) => Ok(None),
            (Some(_), None) => Err(format!("{name} is the gradient of {input}, which the file does not hold")),
            (Some(view), Some(of)) if view.shape() != of => {
                Err(format!("the expected {name} has shape {}; {input} needs {of:?}", list_of(view.shape())))
            }
            (Some(_), Some(_)) => self.floats(name).map(|tensor| Some(tensor.values)),
        }
    }

    /// An expected result, if the file has it.
    pub fn expected(&self, name: &str, sizes: &[u32]) -> Result<Option<Vec<f64>>> {
        if self.tensor(name).is_none() {
            return Ok(None);
        }
        let tensor = self.ordered(self.floats(name)?, &format!("the expected {name}"), sizes)?;
        Ok(Some(tensor.values))
    }
}

/// The shape of a tensor of a file, which may have any number of dimensions.
pub fn list_of(shape: &[usize]) -> String {
    format!("[{}]", first_few(shape))
}

/// attn_mask of the file; sizes are batch, query heads, queries, keys.
pub struct AttnMask {
    pub sizes: [u32; 4],
    pub values: MaskValues,
}

pub enum MaskValues {
    /// Whether a score takes part.
    Bool(Vec<bool>),
    /// What is added to a score.
    Float(Vec<f64>, Dtype),
}

pub struct Floats {
    pub values: Vec<f64>,
    pub shape: Vec<usize>,
    pub dtype: Dtype,
}

fn decode<T: Number>(data: &[u8]) -> Vec<f64> {
    bytemuck::pod_collect_to_vec::<u8, T>(data).into_iter().map(T::into).collect()
}
