//! A decode loop: one query a step for each of two sequences, on a cache of keys and values that grows. The problem is planned once and its
//! buffers are bound once; a step writes a row to the cache, counts the lengths up, and records. Each step is checked against f64.

use std::process::ExitCode;

use wgpu_flash_attention::wgpu::{self, BufferUsages};
use wgpu_flash_attention::{Context, ElementType, ForwardBuffers, Problem, Shape, reference};

const BATCH: usize = 2;
const HEADS_Q: usize = 8;
const HEADS_KV: usize = 2;
const DIM: usize = 64;
/// Positions that the cache has room for. Keys past a sequence's length are never read, so they may hold anything.
const CAPACITY: usize = 512;
const STEPS: usize = 24;

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let context = Context::headless()?;
    let shape = Shape {
        batch: BATCH as u32,
        heads_q: HEADS_Q as u32,
        heads_kv: HEADS_KV as u32,
        seqlen_q: 1,
        seqlen_k: CAPACITY as u32,
        head_dim: DIM as u32,
        head_dim_v: DIM as u32,
    };
    // [batch, position, head, dim]: what a step adds to the cache is one piece of memory for each sequence. A causal mask is not
    // needed: the one query comes last and sees every key that its sequence has.
    let problem = Problem::new(shape, ElementType::F32).bnhd().with_seqlens_k();
    let plan = context.plan(&problem)?;
    println!("adapter: {}\n{plan}\n", context.device().adapter_info().name);

    let buffer = |label, elements: usize| {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let size = 4 * elements as u64;
        context.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size,
            usage,
            mapped_at_creation: false,
        })
    };
    let (q, o) = (buffer("q", BATCH * HEADS_Q * DIM), buffer("o", BATCH * HEADS_Q * DIM));
    let elements = BATCH * CAPACITY * HEADS_KV * DIM;
    let mut cache = Cache {
        device: [buffer("keys", elements), buffer("values", elements)],
        host: [vec![0.0; elements], vec![0.0; elements]],
        numbers: fastrand::Rng::with_seed(1),
    };
    let seqlens_k = buffer("seqlens_k", BATCH);
    let workspace = plan.create_workspace()?;
    let [keys, values] = &cache.device;
    let buffers = ForwardBuffers::new(&q, keys, values, &o).seqlens_k(&seqlens_k).workspace(workspace.as_ref());
    let bound = plan.bind_forward(&buffers)?;

    // Two prompts of different lengths. A plan of its own would compute the attention of their queries.
    let mut lengths = [300, 41];
    for (b, length) in lengths.into_iter().enumerate() {
        for position in 0..length {
            cache.append(&context, b, position);
        }
    }

    let mut worst = 0.0f64;
    for step in 0..STEPS {
        for (b, length) in lengths.iter_mut().enumerate() {
            cache.append(&context, b, *length);
            *length += 1;
        }
        let counts = lengths.map(|length| length as i32);
        context.queue().write_buffer(&seqlens_k, 0, bytemuck::cast_slice(&counts));
        let query: Vec<f32> = (0..BATCH * HEADS_Q * DIM).map(|n| ((step * 1000 + n) as f32 * 0.37).sin()).collect();
        context.queue().write_buffer(&q, 0, bytemuck::cast_slice(&query));

        // All that a step records.
        let mut encoder = context.device().create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        bound.record(&mut pass);
        drop(pass);
        context.queue().submit([encoder.finish()]);

        // With one position, [batch, position, head, dim] and [batch, head, position, dim] are the same order.
        let found: Vec<f32> = bytemuck::pod_collect_to_vec(&context.download(&o, 0, o.size())?);
        let extras = reference::Extras::default().seqlens_k(&counts[..]);
        let exact = reference::forward(&problem, &query, &cache.host[0], &cache.host[1], extras).out;
        let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let difference = squares(&mut found.iter().zip(&exact).map(|(&x, y)| x as f64 - y));
        let error = (difference / squares(&mut exact.iter().copied())).sqrt();
        // NaN must not pass for 0.
        worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        if step % 8 == 0 || step + 1 == STEPS {
            println!("step {step:>2}: {lengths:?} keys, {} kernel, relative error {error:.1e}", plan.kernel());
        }
    }
    let right = worst <= 2e-6;
    println!(
        "{}: {STEPS} steps by one plan, worst relative error {worst:.1e}, at most 2.0e-6",
        if right { "PASS" } else { "FAIL" }
    );
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Keys and values, on the device and as the reference is given them.
struct Cache {
    /// `[batch, position, head, dim]`.
    device: [wgpu::Buffer; 2],
    /// `[batch, head, position, dim]`.
    host: [Vec<f32>; 2],
    numbers: fastrand::Rng,
}

impl Cache {
    /// Makes up the key and the value at a position of a sequence. In a model the projections of the new token are what is put
    /// here: an encoder's `copy_buffer_to_buffer` does it without the host.
    fn append(&mut self, context: &Context, b: usize, position: usize) {
        for (device, host) in self.device.iter().zip(&mut self.host) {
            let row: Vec<f32> = (0..HEADS_KV * DIM).map(|_| 2.0 * self.numbers.f32() - 1.0).collect();
            let place = (b * CAPACITY + position) * HEADS_KV * DIM;
            context.queue().write_buffer(device, 4 * place as u64, bytemuck::cast_slice(&row));
            for (h, head) in row.chunks(DIM).enumerate() {
                host[((b * HEADS_KV + h) * CAPACITY + position) * DIM..][..DIM].copy_from_slice(head);
            }
        }
    }
}
