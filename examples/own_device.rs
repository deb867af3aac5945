//! Attention on a device, a queue, buffers and an encoder that the application owns.

use wgpu::util::DeviceExt;
use wgpu_flash_attention::{Causal, Context, ElementType, ForwardBuffers, Problem, Shape, wgpu};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The application's own device. No feature is needed; larger limits allow larger tiles.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (device, queue) = pollster::block_on(
        adapter.request_device(&wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() }),
    )?;

    // 8 query heads on 2 key-value heads, 256 positions, head dim 64, each query sees the keys up to its own position.
    let shape = Shape { heads_kv: 2, ..Shape::square(1, 8, 256, 64) };
    let problem = Problem::new(shape, ElementType::F32).causal(Causal::BottomRight);
    let context = Context::new(&device, &queue); // keep it: it holds the compiled pipelines
    let plan = context.plan(&problem)?; // keep it too: it can be recorded any number of times
    println!("{plan}");

    // The application's own buffers. Any place and strides will do: see `Layout`.
    let input = |heads: usize, seed: f32| {
        let values: Vec<f32> = (0..heads * 256 * 64).map(|n| (n as f32 * seed).sin()).collect();
        device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
            label: None,
            contents: bytemuck::cast_slice(&values),
            usage: wgpu::BufferUsages::STORAGE,
        })
    };
    let (q, k, v) = (input(8, 0.37), input(2, 0.73), input(2, 0.91));
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let size = 8 * 256 * 64 * 4;
    let out = device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
    let workspace = plan.create_workspace()?;

    // Recorded into the application's encoder; the application submits when it likes.
    let mut encoder = device.create_command_encoder(&Default::default());
    let buffers = ForwardBuffers::new(&q, &k, &v, &out).workspace(workspace.as_ref());
    plan.forward(&mut encoder, &buffers)?;
    queue.submit([encoder.finish()]);

    // A look at the result, by a convenience of the library that waits for the device.
    let bytes = context.download(&out, 0, size)?;
    let out: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    println!("the last row begins with {:?}", &out[out.len() - 64..][..4]);
    Ok(())
}
