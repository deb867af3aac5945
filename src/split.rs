//! Cuts a problem into parts that fit the device, and says what each binds. Pure: no device needed.

use std::ops::Range;

use crate::error::Error;
use crate::kernel::uniform::{ProblemUniform, TensorUniform};
use crate::kernel::{Part, Slot};
use crate::problem::{Bias, Layout, Problem, ScoreLayout, Tensor};
use crate::recipe::Recipe;

/// What a device allows, as far as splitting work is concerned.
#[derive(Clone, Copy)]
pub(crate) struct Bounds {
    binding: u64,
    buffer: u64,
    workgroups: u64,
    pub alignment: u64,
}

impl Bounds {
    pub(crate) fn of(limits: &wgpu::Limits) -> Self {
        Bounds {
            // Shaders count elements in u32.
            binding: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(u32::MAX as u64) / 4 * 4,
            buffer: limits.max_buffer_size,
            workgroups: limits.max_compute_workgroups_per_dimension as u64,
            alignment: limits.min_storage_buffer_offset_alignment.max(16) as u64,
        }
    }
}

/// The bytes of a tensor that a part touches, from an aligned start, and the tensor's numbers within them.
fn tensor_range(
    layout: &Layout,
    ranges: [Range<u32>; 3],
    dim: u64,
    element_bytes: u64,
    bounds: &Bounds,
) -> (u64, u64, TensorUniform) {
    let [batch, heads, rows] = &ranges;
    if ranges.iter().any(|range| range.is_empty()) || dim == 0 {
        return (0, 0, TensorUniform::default());
    }
    let at = |b: u32, h: u32, i: u32| {
        layout.offset + b as u64 * layout.batch + h as u64 * layout.head + i as u64 * layout.row
    };
    let first = at(batch.start, heads.start, rows.start);
    let end = at(batch.end - 1, heads.end - 1, rows.end - 1) + dim;
    let start = first * element_bytes / bounds.alignment * bounds.alignment;
    let size = (end * element_bytes - start).next_multiple_of(4);
    // A stride that is used is shorter than the binding; one that is not is left out, so that it cannot wrap.
    let stride = |stride: u64, range: &Range<u32>| if range.len() > 1 { stride as u32 } else { 0 };
    let uniform = TensorUniform {
        base: (first - start / element_bytes) as u32,
        batch: stride(layout.batch, batch),
        head: stride(layout.head, heads),
        row: stride(layout.row, rows),
    };
    (start, size, uniform.counted_from(ranges.map(|range| range.start)))
}

/// Bindings: what each holds, its first byte and its size.
pub(crate) type Ranges = Vec<(Slot, u64, u64)>;

/// The bytes up to the end of ranges that lie one after the other.
pub(crate) fn end_of(ranges: &[(Slot, u64, u64)]) -> u64 {
    ranges.last().map_or(0, |&(_, start, bytes)| start.saturating_add(bytes))
}

/// What a part binds, and what it is told.
pub(crate) fn bind_part(problem: &Problem, part: &Part, bounds: &Bounds, backward: bool) -> (Ranges, ProblemUniform) {
    let shape = &problem.shape;
    let group = shape.group();
    let heads_kv = part.heads.start / group..(part.heads.end - 1) / group + 1;
    let keys = 0..shape.seqlen_k;
    let bytes = problem.element_type.bytes();
    let mut uniform = ProblemUniform::of(problem);
    let mut ranges = vec![];
    let mut add = |slot, layout: &Layout, of_keys: bool, dim: u32, bytes| {
        let of = match of_keys {
            true => [part.batch.clone(), heads_kv.clone(), keys.clone()],
            false => [part.batch.clone(), part.heads.clone(), part.rows.clone()],
        };
        let (start, size, tensor) = tensor_range(layout, of, dim.into(), bytes, bounds);
        ranges.push((slot, start, size));
        tensor
    };
    uniform.query = add(Slot::Query, &problem.layout(Tensor::Query), false, shape.head_dim, bytes);
    uniform.key = add(Slot::Key, &problem.layout(Tensor::Key), true, shape.head_dim, bytes);
    uniform.value = add(Slot::Value, &problem.layout(Tensor::Value), true, shape.head_dim_v, bytes);
    uniform.out = add(Slot::Out, &problem.layout(Tensor::Out), false, shape.head_dim_v, bytes);
    let of_lse = Layout::bhnd(shape.heads_q, shape.seqlen_q, 1);
    if problem.lse {
        uniform.lse = add(Slot::Lse, &of_lse, false, 1, 4);
    }
    if let Some(gradients) = problem.gradients.filter(|_| backward) {
        uniform.grad_out = add(Slot::GradOut, &problem.layout(Tensor::GradOut), false, shape.head_dim_v, bytes);
        uniform.grad_query = add(Slot::GradQuery, &problem.layout(Tensor::GradQuery), false, shape.head_dim, bytes);
        uniform.grad_key = add(Slot::GradKey, &problem.layout(Tensor::GradKey), true, shape.head_dim, bytes);
        uniform.grad_value = add(Slot::GradValue, &problem.layout(Tensor::GradValue), true, shape.head_dim_v, bytes);
        if gradients.lse {
            add(Slot::GradLse, &of_lse, false, 1, 4);
        }
    }
    let mut add_scores = |slots: &[Slot], layout: &ScoreLayout, bytes| {
        let (rows, span) = layout.rows(shape.seqlen_k);
        let of = [part.batch.clone(), part.heads.clone(), part.rows.clone()];
        let (start, size, tensor) = tensor_range(&rows, of, span, bytes, bounds);
        ranges.extend(slots.iter().map(|&slot| (slot, start, size)));
        (tensor, layout.column as u32)
    };
    if let Some(Bias { element_type, layout }) = &problem.bias {
        let slots = [Slot::Bias, Slot::GradBias];
        (uniform.bias, uniform.bias_column) = add_scores(&slots, layout, element_type.bytes());
    }
    if let Some(layout) = &problem.mask {
        (uniform.mask, uniform.mask_column) = add_scores(&[Slot::Mask], layout, 1);
    }
    for (slots, numbers) in [
        ([Slot::AlibiSlopes, Slot::GradAlibiSlopes], problem.slope_count()),
        ([Slot::Sinks, Slot::GradSinks], problem.sink_count()),
    ] {
        ranges.extend(slots.map(|slot| (slot, 0, 4 * numbers.unwrap_or(0))));
    }
    for (slot, has) in [(Slot::SeqlensQ, problem.seqlens_q), (Slot::SeqlensK, problem.seqlens_k)] {
        if has {
            ranges.push((slot, 0, shape.batch as u64 * 4));
        }
    }
    if problem.dropout_in_use().is_some() {
        ranges.push((Slot::RngState, 0, 16));
    }
    if problem.blocks.is_some() {
        ranges.push((Slot::Blocks, 0, problem.blocks_bytes()));
    }
    let heads = part.heads.len() as u32;
    let rows = part.rows.len() as u32;
    let of_part = TensorUniform { base: 0, batch: heads.wrapping_mul(rows), head: rows, row: 1 };
    uniform.rows = of_part.counted_from([part.batch.start, part.heads.start, part.rows.start]);
    // Behind what the backward pass has of each row, the lengths of each batch entry, and behind these the ranges of each head.
    let lengths = part.length_count(problem) as u32;
    let rows_end = if backward { part.rows_of_heads() as u32 } else { 0 };
    uniform.lengths_at = rows_end.wrapping_sub(part.batch.start);
    let ranges_at = rows_end.wrapping_add(lengths);
    uniform.ranges_at = ranges_at.wrapping_sub(part.batch.start.wrapping_mul(heads)).wrapping_sub(part.heads.start);
    uniform.row_begin = part.rows.start;
    uniform.row_end = part.rows.end;
    uniform.batch_begin = part.batch.start;
    uniform.head_begin = part.heads.start;
    uniform.heads = heads;
    uniform.batches = part.batch.len() as u32;
    (ranges, uniform)
}

/// The most parts that a problem is split into: each has bind groups, dispatches and pieces of the uniforms of its own, so that
/// more would take seconds and gigabytes of the host.
const MOST_PARTS: usize = 1 << 16;

/// Cuts the problem until each part fits into the device's bindings and dispatches. `ranges` are those that a part binds, and
/// `workspace` is the size of its workspace; `uniforms` bytes tell kernels of a part, of all parts in one buffer.
pub(crate) fn split(
    problem: &Problem,
    recipe: &Recipe,
    ranges: &dyn Fn(&Part) -> Ranges,
    workspace: &dyn Fn(&Part) -> u64,
    uniforms: u64,
    bounds: &Bounds,
) -> Result<Vec<Part>, Error> {
    let shape = &problem.shape;
    let kernel = recipe.kernel;
    let fits = |part: &Part| {
        for (slot, _, size) in ranges(part) {
            if size > bounds.binding {
                return Err(Error::BindingTooLarge { argument: slot.name(), bytes: size, limit: bounds.binding });
            }
        }
        let total = workspace(part);
        if total > bounds.buffer {
            return Err(Error::BindingTooLarge { argument: "workspace", bytes: total, limit: bounds.buffer });
        }
        let most = recipe.passes.iter().flat_map(|pass| (pass.workgroups)(part)).max().unwrap_or(0);
        if most > bounds.workgroups {
            let limit = "max_compute_workgroups_per_dimension";
            return Err(Error::DeviceLimit { kernel, limit, needed: most, found: bounds.workgroups });
        }
        Ok(())
    };
    let mut done = vec![];
    let mut open = vec![Part { batch: 0..shape.batch, heads: 0..shape.heads_q, rows: 0..shape.seqlen_q }];
    while let Some(part) = open.pop() {
        match fits(&part) {
            Ok(()) => {
                done.push(part);
                if done.len() > MOST_PARTS {
                    return Err(Error::TooManyParts { most: MOST_PARTS });
                }
                let bytes = uniforms * done.len() as u64;
                if bytes > bounds.buffer {
                    return Err(Error::BindingTooLarge { argument: "uniforms", bytes, limit: bounds.buffer });
                }
            }
            Err(error) => {
                let (a, b) = part.halves(shape.group(), recipe.cut).ok_or(error)?;
                open.extend([b, a]);
            }
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::facts::Facts;
    use crate::kernel::naive;
    use crate::kernel::uniform::{BATCHES_ABREAST, BlocksUniform, HEADS_ABREAST, TILES_LAST};
    use crate::names::{ElementType, Kernel};
    use crate::options::PlanOptions;
    use crate::problem::Shape;
    use crate::recipe::recipes;

    /// Names and places of fields.
    macro_rules! fields {
        ($of:ty: $($field:ident),*) => {
            vec![$((stringify!($field).to_string(), offset_of!($of, $field) as u32)),*]
        };
    }

    /// The members of a struct of a module, and its size.
    fn members(module: &naga::Module, name: &str) -> (Vec<(String, u32)>, usize) {
        let found = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(name));
        let Some((_, naga::Type { inner: naga::TypeInner::Struct { members, span }, .. })) = found else {
            panic!("no struct {name}")
        };
        (members.iter().map(|m| (m.name.clone().unwrap_or_default(), m.offset)).collect(), *span as usize)
    }

    /// The struct that shaders read and the one that is written are the same: each field's name and place.
    #[test]
    fn shaders_read_what_is_written() {
        let problem = Problem::new(Shape::square(1, 1, 1, 4), ElementType::F32);
        let text = naive::passes(&problem)[0].specialization.source().unwrap().text;
        let module = naga::front::wgsl::parse_str(&text).unwrap();
        let tensor = fields!(TensorUniform: base, batch, head, row);
        assert_eq!(members(&module, "Tensor"), (tensor, size_of::<TensorUniform>()));
        let blocks = fields!(BlocksUniform: queries, keys, batch, head, down, across, entries, columns);
        assert_eq!(members(&module, "Blocks"), (blocks, size_of::<BlocksUniform>()));
        let all = fields!(
            ProblemUniform: query, key, value, out, lse, grad_out, grad_query, grad_key, grad_value, rows, blocks, bias, mask, seqlen_q, seqlen_k, row_begin,
            row_end, batch_begin, head_begin, heads, batches, group, window_left, window_right, top_left, scale, softcap, splits,
            split_rows, order, block_keys, block_rows, round, lengths_at, ranges_at,
            bias_column, mask_column, slopes_batch, heads_q, dropout_last, dropout_scale
        );
        assert_eq!(members(&module, "Problem"), (all, size_of::<ProblemUniform>()));
        // The bits of `order`.
        let bits = [("TILES_LAST", TILES_LAST), ("HEADS_ABREAST", HEADS_ABREAST), ("BATCHES_ABREAST", BATCHES_ABREAST)];
        for (name, expected) in bits {
            let (_, constant) = module.constants.iter().find(|(_, c)| c.name.as_deref() == Some(name)).unwrap();
            let found = &module.global_expressions[constant.init];
            assert_eq!(*found, naga::Expression::Literal(naga::Literal::U32(expected)), "{name}");
        }
        let given = |sizes| {
            let layout = ScoreLayout::contiguous(sizes);
            let shape = Shape { heads_q: 3, heads_kv: 3, ..Shape::square(2, 3, 5, 4) };
            ProblemUniform::of(&Problem::new(shape, ElementType::F32).with_mask(layout)).order
        };
        let orders = [[2, 3, 5, 5], [1, 3, 5, 5], [2, 1, 5, 5], [1, 1, 5, 5], [2, 1, 1, 5]].map(given);
        assert_eq!(orders, [0, BATCHES_ABREAST, HEADS_ABREAST, HEADS_ABREAST | BATCHES_ABREAST, 0]);
        let causal = Problem::new(Shape::square(2, 3, 5, 4), ElementType::F32).causal(crate::Causal::BottomRight);
        assert_eq!(ProblemUniform::of(&causal).order, TILES_LAST);
    }

    /// The parts of a problem on a device that allows so many bytes in a binding and so many workgroups.
    fn parts(problem: &Problem, binding: u64, workgroups: u32) -> Result<Vec<Part>, Error> {
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: binding,
            max_compute_workgroups_per_dimension: workgroups,
            min_storage_buffer_offset_alignment: 32,
            ..Default::default()
        };
        let bounds = Bounds::of(&limits);
        let options = PlanOptions::default().kernel(Kernel::Tile);
        let recipe = recipes(problem, &Facts::with_limits(limits), &options)?.forward;
        split(problem, &recipe, &|part| bind_part(problem, part, &bounds, false).0, &|_| 0, 256, &bounds)
    }

    /// Without a device: every row of every head is in one part, and each part fits.
    #[test]
    fn parts_are_the_whole_problem_once() {
        let shape = Shape { heads_kv: 2, ..Shape::square(3, 4, 100, 8) };
        let problem = Problem::new(shape, ElementType::F32);
        let whole = parts(&problem, 1 << 27, 65_535).unwrap();
        assert_eq!(whole, [Part { batch: 0..3, heads: 0..4, rows: 0..100 }]);
        // Keys of a head are 3,200 bytes. Workgroups are 4 for the rows of a head, and one for each head and batch entry.
        for (binding, workgroups, least) in [(9600, 65_535, 6), (3200, 65_535, 12), (1 << 27, 3, 2), (3300, 2, 24)] {
            let parts = parts(&problem, binding, workgroups).unwrap();
            assert!(parts.len() >= least, "{binding} {workgroups}: {} parts", parts.len());
            let mut seen = vec![0; (3 * 4 * 100) as usize];
            for Part { batch, heads, rows } in &parts {
                for (b, h) in batch.clone().flat_map(|b| heads.clone().map(move |h| (b, h))) {
                    rows.clone().for_each(|i| seen[((b * 4 + h) * 100 + i) as usize] += 1);
                }
                assert!(batch.len().max(heads.len()).max(rows.len().div_ceil(32)) <= workgroups as usize, "{parts:?}");
            }
            assert!(seen.iter().all(|&times| times == 1), "{binding} {workgroups}: {parts:?}");
        }
        // Keys of a head cannot be split.
        let error = parts(&problem, 3196, 65_535).unwrap_err();
        assert_eq!(error, Error::BindingTooLarge { argument: "key", bytes: 3200, limit: 3196 });
    }
}
