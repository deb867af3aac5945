//! What the host asks of a device that fails: each call that returns a `Result` returns an error, and none panics.

use flash_attention_testing::*;
use pollster::block_on;
use wgpu_flash_attention::wgpu::{self, BufferUsages};
use wgpu_flash_attention::{
    BackwardBuffers, Context, ElementType, Error, ForwardBuffers, HeadlessOptions, HostTensor, MergeBuffers,
    MergeProblem, PlanOptions, Problem, SdpaOptions, Shape,
};

/// A context whose device's owner is told of no error: whatever is caught here is caught by the library.
fn context() -> Context {
    with_limits(|limits| limits.max_buffer_size = 1 << 20)
}

fn problem() -> Problem {
    Problem::new(Shape::square(1, 2, 16, 8), ElementType::F32)
}

fn is_device_error<T>(result: Result<T, Error>) {
    match result {
        Err(Error::Device(_)) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("Ok"),
    }
}

/// With a handler for wgpu's errors and without one, which is when wgpu panics.
#[test]
fn a_lost_device() {
    for handled in [false, true] {
        let context = context();
        if handled {
            context.device().on_uncaptured_error(std::sync::Arc::new(|error| panic!("not caught: {error}")));
        }
        let plan = context.plan_with(&problem().with_gradients(), &naive()).unwrap();
        let merge = context.plan_merge(&MergeProblem::new(2, 10, 8, ElementType::F32)).unwrap();
        let buffer = || context.upload(&vec![0; 4096]).unwrap();
        let all: Vec<_> = (0..10).map(|_| buffer()).collect();
        let mut encoder = context.device().create_command_encoder(&Default::default());
        context.device().destroy();

        is_device_error(context.plan(&problem()));
        is_device_error(block_on(context.plan_async(&problem(), &PlanOptions::default())));
        // Nothing to compile: the pipelines are there already.
        is_device_error(context.plan_with(&problem(), &naive()));
        is_device_error(context.plan_merge(&MergeProblem::new(2, 10, 8, ElementType::F32)));
        is_device_error(plan.create_workspace());
        is_device_error(plan.create_backward_workspace());
        is_device_error(context.upload(&[0; 16]));
        is_device_error(context.download(&all[0], 0, 16));
        is_device_error(block_on(context.download_async(&all[0], 0, 16)));
        let data = [0f32; 16 * 8 * 2];
        let tensor = HostTensor { data: &data[..], shape: [1, 2, 16, 8] };
        let options = SdpaOptions::default();
        is_device_error(context.scaled_dot_product_attention(tensor, tensor, tensor, &options));
        is_device_error(block_on(context.scaled_dot_product_attention_async(tensor, tensor, tensor, &options)));
        // What is recorded on a lost device comes to nothing; wgpu says so to whoever asked for its callback.
        let forward = ForwardBuffers::new(&all[0], &all[1], &all[2], &all[3]).lse(&all[4]).workspace(&all[5]);
        let _ = plan.forward(&mut encoder, &forward);
        let backward = BackwardBuffers::new(&forward, &all[6], [&all[7], &all[8], &all[9]]).workspace(&all[5]);
        let _ = plan.backward(&mut encoder, &backward);
        let _ = merge.merge(&mut encoder, &MergeBuffers::new([&all[0], &all[1]], [&all[2], &all[3]]));
    }
}

/// The pipelines of the backward pass are built when it is first asked for, or ahead by those who say so.
#[test]
fn backward_pipelines_are_built_when_they_are_asked_for() {
    let backward = |context: &Context| format!("{context:?}").contains("backward_");
    let problem = problem().with_gradients();
    for way in 0..3 {
        let context = context();
        if way == 2 {
            block_on(context.plan_async(&problem, &PlanOptions::default())).unwrap();
            assert!(backward(&context));
            continue;
        }
        let plan = context.plan(&problem).unwrap();
        assert!(!backward(&context), "the forward pass built them");
        if way == 0 {
            plan.prepare_backward().unwrap();
        } else {
            let all: Vec<_> = (0..9).map(|_| context.upload(&[0; 4096]).unwrap()).collect();
            let forward = ForwardBuffers::new(&all[0], &all[1], &all[2], &all[3]).lse(&all[4]);
            let workspace = plan.create_backward_workspace().unwrap();
            let buffers = BackwardBuffers::new(&forward, &all[5], [&all[6], &all[7], &all[8]]);
            plan.bind_backward(&buffers.workspace(workspace.as_ref())).unwrap();
        }
        assert!(backward(&context));
    }
    // Nothing to build without gradients.
    context().plan(&self::problem()).unwrap().prepare_backward().unwrap();
}

/// A bound pass outlives its plan: a model can keep it.
#[test]
fn a_bound_pass_keeps_what_it_needs() {
    let context = full();
    let out = context.upload(&[0xff; 1024]).unwrap();
    let bound = {
        let inputs = [0; 3].map(|_| context.upload(bytemuck::cast_slice(&[1f32; 256])).unwrap());
        let plan = context.plan_with(&problem(), &tile()).unwrap();
        plan.bind_forward(&ForwardBuffers::new(&inputs[0], &inputs[1], &inputs[2], &out)).unwrap()
    };
    let mut encoder = context.device().create_command_encoder(&Default::default());
    bound.record(&mut encoder.begin_compute_pass(&Default::default()));
    context.queue().submit([encoder.finish()]);
    let found: Vec<f32> = bytemuck::pod_collect_to_vec(&context.download(&out, 0, 1024).unwrap());
    assert!(found.iter().all(|x| (x - 1.0).abs() < 1e-6));
}

/// Plans can be made on a thread of their own, ahead of their use.
#[test]
fn plans_are_made_on_any_thread() {
    fn is_send<T: Send + Sync>(_: &T) {}
    let context = context();
    let other = context.clone();
    let plan = std::thread::spawn(move || other.plan(&problem()).unwrap()).join().unwrap();
    is_send(&plan);
    is_send(&context);
    plan.create_workspace().unwrap();
}

/// Errors that name features and adapters do so in words.
#[test]
fn messages_in_words() {
    let without = Context::headless_with(&HeadlessOptions::default().cooperative_matrices(true));
    if let Err(error) = without {
        let text = error.to_string();
        assert!(matches!(error, Error::Matrices { .. }), "{text}");
        assert!(!text.contains("FeaturesWGPU") && !text.contains("no usable adapter"), "{text}");
        assert!(text.contains("cooperative matrices (Features::EXPERIMENTAL_COOPERATIVE_MATRIX)"), "{text}");
        assert!(text.contains("all others run without"), "{text}");
    }
}

#[test]
fn downloads_that_cannot_be() {
    let context = context();
    let buffer = context.upload(&[7; 64]).unwrap();
    let private = context.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 64,
        usage: BufferUsages::STORAGE | BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let both = |buffer, offset, bytes| {
        let error = context.download(buffer, offset, bytes).unwrap_err();
        assert_eq!(block_on(context.download_async(buffer, offset, bytes)), Err(error.clone()));
        error
    };
    let found = BufferUsages::STORAGE | BufferUsages::COPY_DST;
    let error = both(&private, 0, 64);
    assert_eq!(error, Error::BufferUsage { argument: "download", found, needed: BufferUsages::COPY_SRC });
    let text = error.to_string();
    assert!(text.contains("it needs BufferUsages::COPY_SRC") && text.contains("BufferUsages::COPY_DST"), "{text}");
    for (offset, bytes) in [(2, 4), (0, 65), (64, 1), (60, 5), (1 << 40, 4), (u64::MAX - 3, 4), (0, u64::MAX), (4, 61)]
    {
        let error = both(&buffer, offset, bytes);
        assert_eq!(error, Error::DownloadRange { offset, bytes, size: 64 });
        assert!(error.to_string().contains("multiple of 4"), "{error}");
    }
    assert_eq!(context.download(&buffer, 4, 3).unwrap(), [7; 3]);
    assert_eq!(context.download(&buffer, 64, 0).unwrap(), [0u8; 0]);
    assert_eq!(block_on(context.download_async(&buffer, 0, 64)).unwrap(), [7; 64]);
}

#[test]
fn more_than_a_buffer_holds() {
    let context = context();
    let error = context.upload(&vec![0; (1 << 20) + 1]).unwrap_err();
    assert_eq!(error, Error::BindingTooLarge { argument: "upload", bytes: (1 << 20) + 4, limit: 1 << 20 });
    assert_eq!(context.upload(&vec![0; 1 << 20]).unwrap().size(), 1 << 20);
    assert_eq!(context.upload(&[]).unwrap().size(), 4);
}

/// A device that may use a hundredth of its memory has words for it when a workspace is larger. It is made where a limit of the
/// budget lets it be made, and a driver says what its memory is.
#[test]
fn out_of_memory() {
    let refused = (1..100).find_map(|percent| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.memory_budget_thresholds.for_resource_creation = Some(percent);
        let adapter = block_on(wgpu::Instance::new(descriptor).request_adapter(&Default::default())).ok()?;
        let limits = wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() };
        let (device, queue) = block_on(adapter.request_device(&limits)).ok()?;
        let context = Context::new(&device, &queue);
        // 4 GiB of scores, in as few parts as the device takes.
        let large = Problem::new(Shape::square(1, 64, 4096, 1), ElementType::F32);
        Some(context.plan_with(&large, &naive()).and_then(|plan| plan.create_workspace()))
    });
    match refused {
        Some(Err(error @ Error::OutOfMemory { .. })) => {
            assert!(error.to_string().contains("no memory left for the"), "{error}");
        }
        Some(Err(other)) => panic!("{other}"),
        Some(Ok(_)) | None => {
            flash_attention_testing::skipped::skipped("out of memory: the driver has no memory budget, or a large one")
        }
    }
}

/// A download is of what was submitted before it was asked for, whenever it is awaited.
#[test]
fn an_asynchronous_download_is_submitted_at_once() {
    let context = full();
    let buffer = context.upload(&[1; 16]).unwrap();
    let before = context.download_async(&buffer, 0, 16);
    context.queue().write_buffer(&buffer, 0, &[2; 16]);
    assert_eq!(context.download(&buffer, 0, 16).unwrap(), [2; 16]);
    assert_eq!(block_on(before).unwrap(), [1; 16]);
}

/// What wgpu finds wrong with buffers that the library cannot ask about.
#[test]
fn buffers_of_another_device() {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = block_on(instance.request_adapter(&Default::default())).unwrap();
    let [ours, other] = [0, 1].map(|_| {
        let (device, queue) = block_on(adapter.request_device(&Default::default())).unwrap();
        Context::new(&device, &queue)
    });
    let plan = ours.plan_with(&problem(), &tile()).unwrap();
    let all: Vec<_> = (0..4).map(|_| ours.upload(&vec![0; 4096]).unwrap()).collect();
    let stranger = other.upload(&vec![0; 4096]).unwrap();
    for n in 0..4 {
        let at = |m: usize| if m == n { &stranger } else { &all[m] };
        let buffers = ForwardBuffers::new(at(0), at(1), at(2), at(3));
        let mut encoder = ours.device().create_command_encoder(&Default::default());
        is_device_error(plan.forward(&mut encoder, &buffers));
        // The encoder is as it was.
        ours.queue().submit([encoder.finish()]);
    }
}

/// Two contexts that the library opens can tell each other's buffers apart, since they are of one instance.
#[test]
fn buffers_of_another_headless_context() {
    let (ours, other) = (Context::headless().unwrap(), Context::headless().unwrap());
    let plan = ours.plan_with(&problem(), &tile()).unwrap();
    let all: Vec<_> = (0..4).map(|_| other.upload(&vec![0; 4096]).unwrap()).collect();
    let mut encoder = ours.device().create_command_encoder(&Default::default());
    is_device_error(plan.forward(&mut encoder, &ForwardBuffers::new(&all[0], &all[1], &all[2], &all[3])));
}
