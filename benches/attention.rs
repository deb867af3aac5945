//! Forward and backward passes, naive beside tile, at sizes that software Vulkan gets through in minutes. Device time where the
//! adapter has timestamp queries. And the host's part: planning and recording. `examples/compare` makes the figures to report.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flash_attention_testing::Extras;
use flash_attention_testing::buffers::{
    GradientBuffers, Inputs, Outputs, Tensors, Upstream, adapter_name, bind, random,
};
use flash_attention_testing::timing::{clock, pass_times};
use wgpu_flash_attention::{Context, ElementType, Kernel, PlanOptions, Problem, Shape};

/// Device time: the forward pass, the backward pass over its output, and one after the other.
fn passes(criterion: &mut Criterion) {
    let context = Context::headless().expect("an adapter");
    eprintln!("{}: {}", adapter_name(&context), clock(&context));
    for seqlen in [256, 1024] {
        let problem = Problem::new(Shape::square(1, 2, seqlen, 64), ElementType::F32).with_gradients();
        let elements = 2 * seqlen as usize * 64;
        let tensors = Tensors::<f32> {
            query: random(elements, 1),
            key: random(elements, 2),
            value: random(elements, 3),
            extras: Extras::default(),
        };
        let upstream = Upstream::<f32> { out: random(elements, 4), lse: None };
        let inputs = Inputs::upload(&context, &problem, &tensors).expect("small inputs");
        let (forward, backward) = (problem.forward_flops(), problem.backward_flops());
        for (op, flops) in [("forward", forward), ("backward", backward), ("forward+backward", forward + backward)] {
            let mut group = criterion.benchmark_group(format!("{op} f32 1,2,{seqlen},64"));
            // Criterion's unit of work is an integer: floating-point operations here.
            group.throughput(Throughput::Elements(flops as u64));
            group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
            for kernel in [Kernel::Naive, Kernel::Tile] {
                let options = PlanOptions::default().kernel(kernel).backward(kernel);
                let plan = context.plan_with(&problem, &options).expect("a small problem");
                let outputs = Outputs::poisoned(&context, &plan).expect("small outputs");
                let gradients = GradientBuffers::poisoned(&context, &plan, &upstream).expect("small gradients");
                let mut bound = vec![
                    bind(&plan, &inputs, &outputs).expect("buffers of the plan's sizes"),
                    gradients.bind(&plan, &inputs, &outputs).expect("buffers of the plan's sizes"),
                ];
                match op {
                    "forward" => bound.truncate(1),
                    // The o and lse that it needs are there before.
                    "backward" => {
                        let forward = bound.remove(0);
                        pass_times(&context, &[forward], 1, 1).expect("a working device");
                    }
                    _ => {}
                }
                group.bench_function(kernel.to_string(), |bencher| {
                    bencher.iter_custom(|runs| {
                        let times = pass_times(&context, &bound, runs as u32, 1).expect("a working device");
                        Duration::from_secs_f64(times[0])
                    });
                });
            }
        }
    }
}

/// Host time: planning a problem whose pipelines exist, and recording it.
fn host(criterion: &mut Criterion) {
    let context = Context::headless().expect("an adapter");
    let problem = Problem::new(Shape::square(1, 2, 256, 64), ElementType::F32).with_lse();
    let plan = context.plan(&problem).expect("a small problem");
    let values = vec![0.0; 2 * 256 * 64];
    let tensors =
        Tensors::<f32> { query: values.clone(), key: values.clone(), value: values, extras: Extras::default() };
    let inputs = Inputs::upload(&context, &problem, &tensors).expect("small inputs");
    let outputs = Outputs::poisoned(&context, &plan).expect("small outputs");
    let mut group = criterion.benchmark_group("host");
    group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(2));
    group.bench_function("plan", |bencher| bencher.iter(|| context.plan(&problem)));
    group.bench_function("bind", |bencher| bencher.iter(|| bind(&plan, &inputs, &outputs)));
    let bound = bind(&plan, &inputs, &outputs).expect("buffers of the plan's sizes");
    group.bench_function("record", |bencher| {
        let mut encoder = context.device().create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        bencher.iter(|| bound.record(&mut pass));
    });
}

criterion_group!(benches, passes, host);
criterion_main!(benches);
