//! Tensors of one call in one buffer: as parts of a pool, and among each other. Where a buffer lies changes no bit of a result.

use flash_attention_testing::backward::{backward, fused};
use flash_attention_testing::*;
use wgpu_flash_attention::wgpu::{self, BufferBinding, BufferSize};
use wgpu_flash_attention::{
    BackwardBuffers, Causal, Context, CoopForm, ElementType, Error, ForwardBuffers, Kernel, Layout, MergeBuffers,
    MergeProblem, Plan, PlanOptions, Problem, Shape, Tensor,
};

/// What a tensor without elements of its own holds.
const POISON: u8 = 0xa5;

/// Buffers by name, either each of its own or all in one, with gaps.
struct Memory {
    buffers: Vec<wgpu::Buffer>,
    /// Buffer, offset and size.
    parts: Vec<(usize, u64, u64)>,
}

impl Memory {
    /// With these contents: in one buffer, in this order, if `pooled`.
    fn new(context: &Context, contents: &[Vec<u8>], pooled: bool) -> Self {
        let sizes = contents.iter().map(|bytes| (bytes.len() as u64).next_multiple_of(4));
        if !pooled {
            let buffers = contents.iter().map(|bytes| context.upload(bytes).unwrap()).collect();
            return Memory { buffers, parts: sizes.enumerate().map(|(n, size)| (n, 0, size)).collect() };
        }
        let mut pool = vec![];
        let mut parts = vec![];
        for (bytes, size) in contents.iter().zip(sizes) {
            parts.push((0, pool.len() as u64, size));
            pool.extend(bytes);
            pool.resize((pool.len() + 4).next_multiple_of(256), POISON);
        }
        Memory { buffers: vec![context.upload(&pool).unwrap()], parts }
    }

    fn part(&self, n: usize) -> BufferBinding<'_> {
        let (buffer, offset, size) = self.parts[n];
        BufferBinding { buffer: &self.buffers[buffer], offset, size: BufferSize::new(size) }
    }

    fn read(&self, context: &Context, n: usize) -> Vec<u8> {
        let (buffer, offset, size) = self.parts[n];
        context.download(&self.buffers[buffer], offset, size).unwrap()
    }
}

fn numbers(element_type: ElementType, count: u64, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let bytes = element_type.bytes() as usize;
    let bits = (0..count).map(|_| to_bits(element_type, 2.0 * rng.f32() - 1.0));
    bits.flat_map(|bits| bits.to_le_bytes().into_iter().take(bytes)).collect()
}

fn run(context: &Context, record: impl FnOnce(&mut wgpu::CommandEncoder) -> Result<(), Error>) {
    let mut encoder = context.device().create_command_encoder(&Default::default());
    record(&mut encoder).unwrap();
    context.queue().submit([encoder.finish()]);
}

fn problem(element_type: ElementType, dim: u32) -> Problem {
    let shape = Shape { heads_kv: 2, seqlen_k: 70, head_dim_v: dim - 4, ..Shape::square(2, 4, 40, dim) };
    Problem::new(shape, element_type).with_lse().with_seqlens_k().causal(Causal::BottomRight)
}

/// q, k, v, o, lse, lengths, workspace.
fn forward(context: &Context, plan: &Plan, pooled: bool) -> [Vec<u8>; 2] {
    let problem = plan.problem();
    let (s, ty) = (problem.shape, problem.element_type);
    let keys = (s.batch * s.heads_kv * s.seqlen_k) as u64;
    let outputs = [s.rows() * s.head_dim_v as u64 * ty.bytes(), s.rows() * 4];
    let [out, lse] = outputs.map(|bytes| vec![POISON; bytes as usize]);
    let contents = [
        numbers(ty, s.rows() * s.head_dim as u64, 1),
        numbers(ty, keys * s.head_dim as u64, 2),
        numbers(ty, keys * s.head_dim_v as u64, 3),
        out,
        lse,
        bytemuck::cast_slice(&[70i32, 50]).to_vec(),
        vec![POISON; plan.workspace_bytes().max(4) as usize],
    ];
    let memory = Memory::new(context, &contents, pooled);
    let [q, k, v, o, lse, lengths, workspace] = [0, 1, 2, 3, 4, 5, 6].map(|n| memory.part(n));
    let buffers = ForwardBuffers::new(q, k, v, o).lse(lse).seqlens_k(lengths).workspace(workspace);
    run(context, |encoder| plan.forward(encoder, &buffers));
    [3, 4].map(|n| memory.read(context, n))
}

/// Everything of a forward pass in one buffer, with every kernel that needs no matrices.
#[test]
fn a_forward_pass_in_one_buffer() {
    let decode = PlanOptions::default().kernel(Kernel::Decode).splits(3);
    for (element_type, dim) in [(ElementType::F32, 16), (ElementType::F16, 24), (ElementType::BF16, 9)] {
        for options in [naive(), tile(), decode] {
            let plan = webgpu().plan_with(&problem(element_type, dim), &options).unwrap();
            let [apart, pooled] = [false, true].map(|pooled| forward(webgpu(), &plan, pooled));
            assert!(apart == pooled, "{element_type}, {}", plan.kernel());
        }
    }
}

/// q, k, v, o, lse, lengths, do, dlse, dq, dk, dv, workspace.
fn gradients(context: &Context, plan: &Plan, pooled: bool) -> [Vec<u8>; 3] {
    let problem = plan.problem();
    let (s, ty) = (problem.shape, problem.element_type);
    let keys = (s.batch * s.heads_kv * s.seqlen_k) as u64;
    let [out, lse] = forward(context, plan, false);
    let elements = [s.rows() * s.head_dim as u64, keys * s.head_dim as u64, keys * s.head_dim_v as u64];
    let [dq, dk, dv] = elements.map(|n| vec![POISON; (n * ty.bytes()) as usize]);
    let contents = [
        numbers(ty, elements[0], 1),
        numbers(ty, elements[1], 2),
        numbers(ty, elements[2], 3),
        out,
        lse,
        bytemuck::cast_slice(&[70i32, 50]).to_vec(),
        numbers(ty, s.rows() * s.head_dim_v as u64, 4),
        numbers(ElementType::F32, s.rows(), 5),
        dq,
        dk,
        dv,
        vec![POISON; plan.backward_workspace_bytes().max(4) as usize],
    ];
    let memory = Memory::new(context, &contents, pooled);
    let part = |n| memory.part(n);
    let forward = ForwardBuffers::new(part(0), part(1), part(2), part(3)).lse(part(4)).seqlens_k(part(5));
    let buffers =
        BackwardBuffers::new(&forward, part(6), [part(8), part(9), part(10)]).grad_lse(part(7)).workspace(part(11));
    run(context, |encoder| plan.backward(encoder, &buffers));
    [8, 9, 10].map(|n| memory.read(context, n))
}

#[test]
fn a_backward_pass_in_one_buffer() {
    let ways = [backward(Kernel::Naive), backward(Kernel::Tile), fused([32, 32], 8, 16, 16, [32, 32])];
    for (element_type, dim) in [(ElementType::F32, 16), (ElementType::F16, 24), (ElementType::BF16, 9)] {
        for options in ways.iter().filter(|o| o.fused_tile.is_none() || element_type == ElementType::F32) {
            let plan = full().plan_with(&problem(element_type, dim).with_grad_lse(), options).unwrap();
            let [apart, pooled] = [false, true].map(|pooled| gradients(full(), &plan, pooled));
            assert!(apart == pooled, "{element_type}, {:?}", plan.backward_kernel());
        }
    }
}

/// The same with the kernels on cooperative matrices, of both forms, where there are any.
#[test]
fn matrices_in_one_buffer() {
    let Some(context) = coop::context() else { return };
    for (element_type, form) in [(ElementType::F16, CoopForm::WorkgroupMemory), (ElementType::F32, CoopForm::Registers)]
    {
        let options = PlanOptions::default().kernel(Kernel::Coop).backward(Kernel::Coop).coop_form(form);
        let plan = context.plan_with(&problem(element_type, 16).with_grad_lse(), &options).unwrap();
        let [apart, pooled] = [false, true].map(|pooled| forward(&context, &plan, pooled));
        assert!(apart == pooled, "{element_type}, {form}");
        let [apart, pooled] = [false, true].map(|pooled| gradients(&context, &plan, pooled));
        assert!(apart == pooled, "backward, {element_type}, {form}");
    }
}

/// q, k and v, and their gradients, as views of one `[batch, position, 3, head, dim]` each: what a packed linear layer gives and
/// needs. Head dims that leave two tensors in one word too.
#[test]
fn interleaved_gradients() {
    for (element_type, dim) in [(ElementType::F32, 16), (ElementType::F32, 5), (ElementType::F16, 7)] {
        let shape = Shape::square(2, 3, 20, dim);
        let row = 3 * 3 * dim as u64;
        let third = |n: u64| Layout { offset: n * 3 * dim as u64, batch: 20 * row, head: dim as u64, row };
        let contiguous = Problem::new(shape, element_type).bnhd().with_gradients().causal(Causal::TopLeft);
        let packed = contiguous
            .clone()
            .with_layout(Tensor::Query, third(0))
            .with_layout(Tensor::Key, third(1))
            .with_layout(Tensor::Value, third(2));
        let elements = shape.rows() * dim as u64;
        let inputs = [1, 2, 3].map(|seed| numbers(element_type, elements, seed));
        let grad_out = numbers(element_type, elements, 4);
        let tensor_bytes = inputs[0].len();
        let row_bytes = tensor_bytes / (2 * 20);
        let interleaved: Vec<u8> = (0..2 * 20)
            .flat_map(|n| inputs.iter().flat_map(move |tensor| tensor[n * row_bytes..][..row_bytes].to_vec()))
            .collect();
        for options in [backward(Kernel::Naive), backward(Kernel::Tile)] {
            // Forward without a workspace.
            let options = options.kernel(Kernel::Tile);
            let context = webgpu();
            let buffer = |bytes: usize| context.upload(&vec![POISON; bytes]).unwrap();
            // Both with inputs as they are made, and outputs as they are compared.
            let both = [(&contiguous, false), (&packed, true)].map(|(problem, packed)| {
                let plan = context.plan_with(problem, &options).unwrap();
                let [q, k, v] = match packed {
                    true => [0; 3].map(|_| context.upload(&interleaved).unwrap()),
                    false => inputs.each_ref().map(|bytes| context.upload(bytes).unwrap()),
                };
                let (o, lse) = (buffer(tensor_bytes), buffer(shape.rows() as usize * 4));
                let do_ = context.upload(&grad_out).unwrap();
                // All three views in one.
                let results = [0; 3].map(|_| buffer(3 * tensor_bytes));
                let outputs = if packed { [&results[0]; 3] } else { results.each_ref() };
                let workspace = plan.create_backward_workspace().unwrap();
                let buffers =
                    if packed { ForwardBuffers::new(&q, &q, &q, &o) } else { ForwardBuffers::new(&q, &k, &v, &o) };
                let buffers = buffers.lse(&lse);
                run(context, |encoder| plan.forward(encoder, &buffers));
                let buffers = BackwardBuffers::new(&buffers, &do_, outputs).workspace(workspace.as_ref());
                run(context, |encoder| plan.backward(encoder, &buffers));
                results.map(|buffer| context.download(&buffer, 0, 3 * tensor_bytes as u64).unwrap())
            });
            let [apart, packed] = both;
            for n in 0..3 {
                for place in 0..2 * 20 {
                    let expected = &apart[n][place * row_bytes..][..row_bytes];
                    let found = &packed[0][(3 * place + n) * row_bytes..][..row_bytes];
                    assert!(found == expected, "{element_type} {dim}: gradient {n} at {place}");
                }
            }
        }
    }
}

#[test]
fn a_merge_in_one_buffer() {
    let context = webgpu();
    let plan = context.plan_merge(&MergeProblem::new(2, 10, 8, ElementType::F32)).unwrap();
    let numbers = |count, seed| numbers(ElementType::F32, count, seed);
    let contents = [numbers(160, 1), numbers(20, 2), vec![POISON; 320], vec![POISON; 40]];
    let [apart, pooled] = [false, true].map(|pooled| {
        let memory = Memory::new(context, &contents, pooled);
        let [part_out, part_lse, out, lse] = [0, 1, 2, 3].map(|n| memory.part(n));
        run(context, |encoder| plan.merge(encoder, &MergeBuffers::new([part_out, part_lse], [out, lse])));
        [2, 3].map(|n| memory.read(context, n))
    });
    assert!(apart == pooled);
}
