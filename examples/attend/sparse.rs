//! Block lists of a file, in FlexAttention's form, and mods of a text, whose buffers are tensors of the file.

use std::path::Path;

use safetensors::Dtype;
use wgpu_flash_attention::{BlockIndices, BlockLists, BlockMask, Mods, Problem};

use flash_attention_testing::Extras;
use flash_attention_testing::terminal::harmless;

use crate::Result;
use crate::source::{Source, list_of};

/// Of partial blocks, and of full ones: how many a row of blocks lists, and which.
const NAMES: [[&str; 2]; 2] = [["kv_num_blocks", "kv_indices"], ["full_kv_num_blocks", "full_kv_indices"]];

/// Queries and keys of a block, where nobody says.
const BLOCK: [u32; 2] = [128, 128];

/// What a file has under two of these names.
struct Lists {
    counts: Vec<i32>,
    indices: Vec<i32>,
    /// Batch entries, heads, rows of blocks, columns.
    shape: [usize; 4],
}

impl Lists {
    fn read(source: &Source<'_>, [of_counts, of_indices]: [&str; 2]) -> Result<Option<Self>> {
        let numbers = |name: &str, dimensions: &str| -> Result<(Vec<i32>, Vec<usize>)> {
            let view = source.tensor(name).ok_or_else(|| {
                let other = if name == of_counts { of_indices } else { of_counts };
                format!("the file holds {other} and no {name}; block lists need both")
            })?;
            if view.dtype() != Dtype::I32 {
                return Err(format!("{name} is {}; it must be I32", view.dtype()));
            }
            let (found, needed) = (view.shape().len(), dimensions.split(", ").count());
            if found != needed {
                let shape = list_of(view.shape());
                return Err(format!("{name} has {found} dimensions, {shape}; it must have {needed}: [{dimensions}]"));
            }
            Ok((bytemuck::pod_collect_to_vec(view.data()), view.shape().to_vec()))
        };
        if source.tensor(of_counts).is_none() && source.tensor(of_indices).is_none() {
            return Ok(None);
        }
        let (counts, of_rows) = numbers(of_counts, "batch, query heads, rows of blocks")?;
        let (indices, shape) = numbers(of_indices, "batch, query heads, rows of blocks, columns")?;
        if shape[..3] != of_rows {
            let (rows, indices) = (list_of(&of_rows), list_of(&shape));
            return Err(format!(
                "{of_indices} has shape {indices} and {of_counts} has {rows}; all but the last size must be equal"
            ));
        }
        Ok(Some(Lists { counts, indices, shape: [shape[0], shape[1], shape[2], shape[3]] }))
    }

    fn borrow(&self) -> [&[i32]; 2] {
        [&self.counts, &self.indices]
    }

    /// Lists the blocks in a matrix of them, of so many blocks a row. Numbers have been checked.
    fn mark(&self, listed: &mut [bool], across: usize) {
        for (row, &count) in self.counts.iter().enumerate() {
            for &index in &self.indices[row * self.shape[3]..][..count as usize] {
                listed[row * across + index as usize] = true;
            }
        }
    }
}

/// The problem with the block lists of the file, if it has any.
pub fn read_blocks(
    source: &Source<'_>,
    block: Option<[u32; 2]>,
    mut problem: Problem,
    extras: &mut Extras,
) -> Result<Problem> {
    let [partial, full] = NAMES.map(|names| Lists::read(source, names));
    let (partial, full) = (partial?, full?);
    let [[of_counts, _], [of_full, _]] = NAMES;
    let Some(partial) = partial else {
        return match (full, block) {
            (Some(_), _) => {
                Err(format!("the file holds {of_full} and no {of_counts}, which block lists need; it may be all 0"))
            }
            (None, Some(_)) => Err(format!("--block is for block lists, and the file holds no {of_counts}")),
            (None, None) => Ok(problem),
        };
    };
    let [queries, keys] = block.unwrap_or(BLOCK);
    let s = problem.shape;
    let [batch, heads, down, columns] = partial.shape;
    let needed = [s.batch, s.heads_q, s.seqlen_q.div_ceil(queries)].map(|n| n as usize);
    if ![1, needed[0]].contains(&batch) || ![1, needed[1]].contains(&heads) || down != needed[2] {
        return Err(format!(
            "{of_counts} has shape {}; q and blocks of {queries} queries need {needed:?} (batch, query heads, rows of blocks), or 1 in \
             place of the first two; --block sets the sizes of blocks",
            list_of(&partial.shape[..3])
        ));
    }
    if let Some(full) = full.as_ref().filter(|full| full.shape != partial.shape) {
        let [indices, of_full] = NAMES.map(|[_, indices]| indices);
        let shapes = [&full.shape, &partial.shape].map(|shape| list_of(shape));
        return Err(format!("{of_full} has shape {} and {indices} has {}; they must be equal", shapes[0], shapes[1]));
    }
    let columns = u32::try_from(columns).map_err(|_| format!("{of_counts} has too many columns"))?;
    let mut lists = BlockLists::new().size(queries, keys).columns(columns);
    (lists.per_batch, lists.per_head) = (batch > 1, heads > 1);
    problem = problem.with_blocks(lists);
    let [kv_num_blocks, kv_indices] = partial.borrow();
    let indices = BlockIndices { kv_num_blocks, kv_indices, full: full.as_ref().map(Lists::borrow) };
    let mask = BlockMask::from_lists(&problem, &indices).map_err(|error| error.to_string())?;
    let counts = problem.block_counts().map(|n| n as usize);
    let mut listed = vec![false; counts.iter().product()];
    for lists in [Some(&partial), full.as_ref()].into_iter().flatten() {
        lists.mark(&mut listed, counts[3]);
    }
    extras.blocks = Some((listed, mask));
    Ok(problem)
}

/// What there is to say about the block lists of a problem.
pub fn describe_blocks(problem: &Problem, extras: &Extras) -> Option<String> {
    let (lists, (listed, _)) = (problem.blocks?, extras.blocks.as_ref()?);
    let count = listed.iter().filter(|&&listed| listed).count();
    let whose = match (lists.per_batch, lists.per_head) {
        (false, false) => "one list for all",
        (true, false) => "a list for each batch entry",
        (false, true) => "a list for each head",
        (true, true) => "a list for each batch entry and head",
    };
    let (queries, keys) = (lists.queries, lists.keys);
    Some(format!("of {queries} queries by {keys} keys: {count} of {} are listed, {whose}", listed.len()))
}

/// The mods of a text.
pub fn parse_mods(path: &Path) -> Result<Mods> {
    let name = harmless(&path.display().to_string(), false);
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {name}: {error}"))?;
    Mods::parse(&text).map_err(|error| format!("{name}: {error}"))
}

/// What the file holds for the buffers of mods, by name.
pub fn read_mod_buffers(source: &Source<'_>, mods: &Mods, allow_non_finite: bool) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |(name, element): (&str, &str)| {
        let view = source
            .tensor(name)
            .ok_or_else(|| format!("the file has no tensor {name}, which the text of --mods declares as a buffer"))?;
        let needed = match element {
            "i32" => Dtype::I32,
            "u32" => Dtype::U32,
            _ => Dtype::F32,
        };
        if view.dtype() != needed {
            let found = view.dtype();
            return Err(format!(
                "{name} is {found}; the text of --mods declares array<{element}>, which needs {needed}"
            ));
        }
        if view.data().is_empty() {
            return Err(format!("{name} has no elements; a buffer of --mods needs one at least"));
        }
        let numbers = || bytemuck::pod_collect_to_vec::<u8, f32>(view.data()).into_iter().enumerate();
        let mut bad = numbers().filter(|(_, x)| needed == Dtype::F32 && !x.is_finite());
        if let Some((n, x)) = bad.next().filter(|_| !allow_non_finite) {
            return Err(format!(
                "{name} holds {x:?}, element {n}; --allow-non-finite goes on, with results of which nothing is promised"
            ));
        }
        Ok((name.to_string(), view.data().to_vec()))
    };
    mods.buffers().zip(mods.buffer_types()).map(read).collect()
}

/// What there is to say about the mods of a problem.
pub fn describe_mods(mods: &Mods) -> String {
    let functions: Vec<_> = [("score_mod", mods.has_score_mod()), ("mask_mod", mods.has_mask_mod())]
        .into_iter()
        .filter_map(|(name, is_there)| is_there.then_some(name))
        .collect();
    let buffers: Vec<_> = mods.buffers().collect();
    let of_buffers = if buffers.is_empty() { String::new() } else { format!("; buffers {}", buffers.join(", ")) };
    harmless(&format!("{}{of_buffers}", functions.join(" and ")), false)
}
