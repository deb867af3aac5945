//! Bad input: the error that each brings, that its text names what is wrong, and that nothing was written.

use flash_attention_testing::backward::fused;
use flash_attention_testing::*;
use wgpu_flash_attention::tune::{BackwardTile, Tile};
use wgpu_flash_attention::wgpu::{self, BufferBinding, BufferSize, BufferUsages, ErrorFilter};
use wgpu_flash_attention::{
    Alibi, BackwardBuffers, Bias, Context, ElementType, Error, ForwardBuffers, HeadlessOptions, Kernel, Layout,
    MergeProblem, PlanOptions, Problem, ScoreLayout, Shape, Tensor,
};

const POISON: u32 = 0x7fc5_a5a5;

/// Runs `f`; the device must have nothing to complain about.
fn without_device_error<T>(context: &Context, f: impl FnOnce() -> T) -> T {
    let scopes = [ErrorFilter::Validation, ErrorFilter::OutOfMemory, ErrorFilter::Internal];
    let scopes = scopes.map(|filter| context.device().push_error_scope(filter));
    let result = f();
    for scope in scopes.into_iter().rev() {
        if let Some(error) = pollster::block_on(scope.pop()) {
            panic!("{error}");
        }
    }
    result
}

/// B 2, Hq 4, Hkv 2, Nq 6, Nk 10, D 8, Dv 4 with key lengths and lse.
fn problem() -> Problem {
    case(2, [4, 2], [6, 10], [8, 4]).seqlens(&[10, 7]).problem
}

fn of_f16(mut problem: Problem) -> Problem {
    problem.element_type = ElementType::F16;
    problem
}

fn of_bf16(mut problem: Problem) -> Problem {
    problem.element_type = ElementType::BF16;
    problem
}

/// Problems and options that no plan is made for, and what the error says.
#[test]
fn plans() {
    let good = problem;
    let shape = |change: fn(&mut Shape)| {
        let mut problem = good();
        change(&mut problem.shape);
        problem
    };
    let with_tile = |found: Tile| tile().tile(found);
    let fine = Tile { rows: 8, keys: 16, threads_y: 2, threads_x: 4, chunk: 8, value_keys: 4, written_out: false };
    let bad = BackwardTile { own: 9, step: 8, threads_y: 3, threads_x: 2, chunk: 8, block: 8, written_out: false };
    let backward = tile().backward(Kernel::Tile).backward_tile(bad);
    let head_dim = |argument, found| Error::HeadDim { argument, found };
    let seqlen = |argument, found| Error::Seqlen { argument, found };
    let far = Layout { offset: 0, batch: u64::MAX / 2, head: u64::MAX / 2, row: 8 };
    let overlap = Error::OutputOverlap { argument: "out" };
    let refused = [
        (shape(|s| s.head_dim = 0), tile(), head_dim("head_dim", 0), "head_dim is 0"),
        (shape(|s| s.head_dim = 257), tile(), head_dim("head_dim", 257), "head_dim is 257"),
        (shape(|s| s.head_dim_v = 0), naive(), head_dim("head_dim_v", 0), "head_dim_v is 0"),
        (shape(|s| s.head_dim_v = 300), naive(), head_dim("head_dim_v", 300), "head_dim_v is 300"),
        (shape(|s| s.heads_kv = 3), tile(), Error::Heads { heads_q: 4, heads_kv: 3 }, "heads_kv is 3"),
        (shape(|s| s.heads_kv = 0), tile(), Error::Heads { heads_q: 4, heads_kv: 0 }, "heads_kv is 0"),
        (shape(|s| s.heads_q = 0), tile(), Error::Heads { heads_q: 0, heads_kv: 2 }, "heads_q is 0"),
        (shape(|s| s.seqlen_q = (1 << 29) + 1), tile(), seqlen("seqlen_q", (1 << 29) + 1), "seqlen_q is 536870913"),
        (shape(|s| s.seqlen_k = u32::MAX), tile(), seqlen("seqlen_k", u32::MAX), "seqlen_k is 4294967295"),
        (good().scale(f32::INFINITY), tile(), Error::Scale(f32::INFINITY), "scale is inf"),
        (good().scale(1.1e30), tile(), Error::Scale(1.1e30), "scale is 1.1e30; it must be from -1e30 to 1e30"),
        (good().scale(-1.1e30), naive(), Error::Scale(-1.1e30), "scale is -1.1e30; it must be from -1e30 to 1e30"),
        (good().softcap(3e38), tile(), Error::Softcap(3e38), "softcap is 3e38; it must be from 1e-30 to 1e30"),
        (good().softcap(9e-31), tile(), Error::Softcap(9e-31), "softcap is 9e-31; it must be from 1e-30 to 1e30"),
        (good().softcap(0.0), tile(), Error::Softcap(0.0), "softcap is 0"),
        (good().softcap(-2.0), tile(), Error::Softcap(-2.0), "softcap is -2"),
        (good().softcap(f32::INFINITY), tile(), Error::Softcap(f32::INFINITY), "softcap is inf"),
        (good().with_layout(Tensor::Query, far), tile(), Error::LayoutOverflow { argument: "query" }, "query"),
        (good().with_layout(Tensor::Key, far), tile(), Error::LayoutOverflow { argument: "key" }, "key"),
        (good().with_layout(Tensor::Value, far), tile(), Error::LayoutOverflow { argument: "value" }, "value"),
        (good().with_layout(Tensor::Out, far), tile(), Error::LayoutOverflow { argument: "out" }, "out"),
        (
            good().with_layout(Tensor::Out, Layout { row: 3, ..good().layout(Tensor::Out) }),
            tile(),
            overlap.clone(),
            "out",
        ),
        (
            good().with_layout(Tensor::Out, Layout { head: 0, ..good().layout(Tensor::Out) }),
            naive(),
            overlap.clone(),
            "out",
        ),
        (good().with_layout(Tensor::Out, Layout { batch: 95, ..good().layout(Tensor::Out) }), naive(), overlap, "out"),
        (
            good(),
            with_tile(Tile { threads_y: 3, ..fine }),
            Error::Tile("threads_y must be even, and 4 · threads_y divide rows"),
            "tile",
        ),
        (good(), with_tile(Tile { chunk: 6, ..fine }), Error::Tile("chunk must be a multiple of 4"), "tile"),
        (good().with_gradients(), backward, Error::Tile("threads_y must be even and divide own"), "tile"),
        (
            good().with_gradients(),
            fused([32, 32], 8, 16, 16, [48, 32]),
            Error::Tile("block_keys must be a multiple of own, and block_rows of step, up to 2^24"),
            "tile",
        ),
        (
            case(1, [1, 1], [(1 << 21) + 1, 10], [8, 4]).problem.with_gradients(),
            fused([32, 32], 8, 16, 16, [32, 32]),
            Error::Tile("block_keys and block_rows must be so large that there are at most 65,536 of each"),
            "tile",
        ),
        (
            of_f16(good()).with_gradients(),
            fused([32, 32], 8, 16, 16, [32, 32]),
            Error::Unsupported {
                kernel: Kernel::Tile,
                element_type: ElementType::F16,
                why: "all gradients at once are computed in f32 only",
            },
            "f32 only",
        ),
        (
            good(),
            tile().splits(3),
            Error::OptionUnused {
                option: "splits",
                needs: Kernel::Decode,
                backward: false,
                taken: Some((Kernel::Tile, "asked for")),
            },
            "ask for the decode kernel by PlanOptions::kernel",
        ),
        (
            of_f16(good()),
            tile().scaled_bf16(true),
            Error::OptionElementType { option: "scaled_bf16", needs: ElementType::BF16, found: ElementType::F16 },
            "PlanOptions::scaled_bf16 is for problems in bf16, and this one is in f16",
        ),
        (
            of_bf16(good()),
            tile().scaled_bf16(true),
            Error::OptionUnused {
                option: "scaled_bf16",
                needs: Kernel::Coop,
                backward: false,
                taken: Some((Kernel::Tile, "asked for")),
            },
            "ask for the coop kernel by PlanOptions::kernel",
        ),
    ];
    for (problem, options, expected, named) in refused {
        let error = without_device_error(full(), || full().plan_with(&problem, &options)).unwrap_err();
        assert_eq!(error, expected);
        assert!(error.to_string().contains(named), "{error}");
    }
    // This context was made without cooperative matrices.
    let coop = PlanOptions::default().kernel(Kernel::Coop);
    let error = full().plan_with(&of_f16(good()), &coop).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Coop, .. }), "{error}");
    assert!(error.to_string().contains("with_cooperative_matrices"), "{error}");
    // NaN is not equal to itself.
    let error = full().plan(&good().scale(f32::NAN)).unwrap_err();
    assert!(matches!(error, Error::Scale(x) if x.is_nan()), "{error}");
    let error = full().plan(&good().softcap(f32::NAN)).unwrap_err();
    assert!(matches!(error, Error::Softcap(x) if x.is_nan()), "{error}");
}

/// Devices that a kernel does not fit on; what it needs is asked of the error.
#[test]
fn devices() {
    let refused = |lower: fn(&mut wgpu::Limits), options: PlanOptions| {
        let context = with_limits(lower);
        without_device_error(&context, || context.plan_with(&problem(), &options)).unwrap_err()
    };
    let check = |error: Error, kernel: Kernel, name: &str, has: u64| {
        let text = error.to_string();
        let Error::DeviceLimit { kernel: found_kernel, limit, needed, found } = error else { panic!("{text}") };
        assert_eq!((found_kernel, limit, found), (kernel, name, has), "{text}");
        assert!(needed > found && text.contains(name) && text.contains(&needed.to_string()), "{text}");
    };
    let large = tiled(64, 64, (8, 8), 64, 32);
    check(refused(|_| {}, large), Kernel::Tile, "max_compute_workgroup_storage_size", 16 << 10);
    let error = refused(|limits| limits.max_compute_workgroup_storage_size = 1 << 10, tile());
    check(error, Kernel::Tile, "max_compute_workgroup_storage_size", 1 << 10);
    let error = refused(|limits| limits.max_compute_invocations_per_workgroup = 128, naive());
    check(error, Kernel::Naive, "max_compute_invocations_per_workgroup", 128);
    let error = refused(|limits| limits.max_compute_workgroup_size_x = 32, tile());
    check(error, Kernel::Tile, "max_compute_workgroup_size_x", 32);
    let error = refused(|limits| limits.max_storage_buffers_per_shader_stage = 4, tile());
    check(error, Kernel::Tile, "max_storage_buffers_per_shader_stage", 4);
}

/// Each limit of 0, or too small by one, in turn, is an error that names a limit: for every kernel, forward and backward.
#[test]
fn limits_that_are_too_small() {
    type Lower = fn(&mut wgpu::Limits);
    let lower: [(&str, Lower); 13] = [
        ("max_bind_groups", |l| l.max_bind_groups = 0),
        ("max_bindings_per_bind_group", |l| l.max_bindings_per_bind_group = 4),
        ("max_uniform_buffers_per_shader_stage", |l| l.max_uniform_buffers_per_shader_stage = 0),
        ("max_storage_buffers_per_shader_stage", |l| l.max_storage_buffers_per_shader_stage = 0),
        ("max_uniform_buffer_binding_size", |l| l.max_uniform_buffer_binding_size = 192),
        ("max_compute_workgroup_storage_size", |l| l.max_compute_workgroup_storage_size = 0),
        ("max_compute_invocations_per_workgroup", |l| l.max_compute_invocations_per_workgroup = 0),
        ("max_compute_workgroup_size_x", |l| l.max_compute_workgroup_size_x = 0),
        ("max_compute_workgroup_size_y", |l| l.max_compute_workgroup_size_y = 0),
        ("max_compute_workgroup_size_z", |l| l.max_compute_workgroup_size_z = 0),
        ("max_compute_workgroups_per_dimension", |l| l.max_compute_workgroups_per_dimension = 0),
        ("max_buffer_size", |l| l.max_buffer_size = 128),
        ("max_storage_buffer_binding_size", |l| l.max_storage_buffer_binding_size = 0),
    ];
    for (name, lower) in lower {
        let context = with_limits(lower);
        for kernel in [Kernel::Naive, Kernel::Tile, Kernel::Decode] {
            let forward = PlanOptions::default().kernel(kernel);
            let backward = PlanOptions::default().kernel(Kernel::Naive).backward(kernel);
            for (problem, options) in [(problem(), forward), (problem().with_gradients(), backward)] {
                let refused = context.plan_with(&problem, &options);
                let text = match refused {
                    Err(Error::Unsupported { .. }) => continue,
                    Err(error @ (Error::DeviceLimit { .. } | Error::BindingTooLarge { .. })) => error.to_string(),
                    // The naive kernel has no workgroup memory.
                    Ok(_) if name == "max_compute_workgroup_storage_size" && kernel == Kernel::Naive => continue,
                    other => panic!("{name}, {kernel}: {other:?}"),
                };
                assert!(text.contains(name), "{name}: {text}");
            }
        }
        let error = context.plan_merge(&MergeProblem::new(2, 10, 8, ElementType::F32));
        assert!(error.is_err() || matches!(name, "max_compute_workgroup_storage_size"), "{name}");
    }
}

/// Limits that would split a problem into billions of parts are refused within a moment.
#[test]
fn too_many_parts() {
    let context = with_limits(|limits| limits.max_compute_workgroups_per_dimension = 1);
    let problem = Problem::new(Shape::square(1 << 20, 1 << 10, 16, 1), ElementType::F32)
        .with_layout(Tensor::Query, Layout { offset: 0, batch: 0, head: 0, row: 0 });
    let start = std::time::Instant::now();
    let error = context.plan_with(&problem, &tile()).unwrap_err();
    assert!(matches!(error, Error::TooManyParts { most: 65_536 }), "{error}");
    assert!(error.to_string().contains("request larger limits"), "{error}");
    assert!(start.elapsed().as_secs() < 5);
}

/// The buffers of [`problem`], outputs poisoned, and one that cannot be bound.
struct Buffers {
    query: wgpu::Buffer,
    key: wgpu::Buffer,
    value: wgpu::Buffer,
    out: wgpu::Buffer,
    lse: wgpu::Buffer,
    seqlens_k: wgpu::Buffer,
    workspace: wgpu::Buffer,
    no_storage: wgpu::Buffer,
}

impl Buffers {
    fn new(context: &Context) -> Self {
        let numbers = |n: usize| context.upload(bytemuck::cast_slice(&vec![0.5f32; n])).unwrap();
        let poisoned = |n: usize| context.upload(bytemuck::cast_slice(&vec![POISON; n])).unwrap();
        let usage = BufferUsages::COPY_DST | BufferUsages::UNIFORM;
        let no_storage = wgpu::BufferDescriptor { label: None, size: 4096, usage, mapped_at_creation: false };
        Buffers {
            query: numbers(2 * 4 * 6 * 8),
            key: numbers(2 * 2 * 10 * 8),
            value: numbers(2 * 2 * 10 * 4),
            out: poisoned(1024),
            lse: poisoned(2 * 4 * 6),
            seqlens_k: context.upload(bytemuck::cast_slice(&[10i32, 7])).unwrap(),
            workspace: poisoned(2 * 4 * 6 * 10),
            no_storage: context.device().create_buffer(&no_storage),
        }
    }

    fn bound(&self) -> ForwardBuffers<'_> {
        ForwardBuffers::new(&self.query, &self.key, &self.value, &self.out)
            .lse(&self.lse)
            .seqlens_k(&self.seqlens_k)
            .workspace(&self.workspace)
    }

    fn poisoned(&self, context: &Context) -> bool {
        [&self.out, &self.lse, &self.workspace].into_iter().all(|buffer| {
            let bytes = context.download(buffer, 0, buffer.size()).unwrap();
            bytemuck::pod_collect_to_vec::<u8, u32>(&bytes).iter().all(|&word| word == POISON)
        })
    }
}

/// What of the buffers is changed for the worse.
type Change = for<'a> fn(&'a Buffers, &mut ForwardBuffers<'a>);

/// Tries the pass with one thing wrong.
fn refuse(context: &Context, problem: &Problem, change: Change) -> Error {
    let plan = context.plan_with(problem, &naive()).unwrap();
    let buffers = Buffers::new(context);
    let mut bound = buffers.bound();
    if !problem.lse {
        bound.lse = None;
    }
    if !problem.seqlens_k {
        bound.seqlens_k = None;
    }
    let good = bound.clone();
    change(&buffers, &mut bound);
    let error = without_device_error(context, || {
        let mut encoder = context.device().create_command_encoder(&Default::default());
        let error = plan.forward(&mut encoder, &bound).unwrap_err();
        context.queue().submit([encoder.finish()]);
        error
    });
    assert!(buffers.poisoned(context), "{error}: something was written all the same");
    // With that put right the same call works, and writes.
    without_device_error(context, || {
        let mut encoder = context.device().create_command_encoder(&Default::default());
        plan.forward(&mut encoder, &bound).unwrap_err();
        plan.forward(&mut encoder, &good).unwrap();
        context.queue().submit([encoder.finish()]);
    });
    assert!(!buffers.poisoned(context));
    error
}

/// `bytes` bytes of a buffer.
fn first(buffer: &wgpu::Buffer, bytes: u64) -> BufferBinding<'_> {
    BufferBinding { buffer, offset: 0, size: BufferSize::new(bytes) }
}

fn at(buffer: &wgpu::Buffer, offset: u64) -> BufferBinding<'_> {
    BufferBinding { buffer, offset, size: None }
}

#[test]
fn buffers() {
    let missing = |argument, bytes| Error::BufferMissing { argument, bytes };
    let short = |argument, needed, found| Error::BufferTooSmall { argument, needed, found };
    let aliased = |output, other| Error::BufferAliased { output, other };
    let usage = |argument| {
        let (found, needed) = (BufferUsages::COPY_DST | BufferUsages::UNIFORM, BufferUsages::STORAGE);
        Error::BufferUsage { argument, found, needed }
    };
    // 2 · 4 · 6 rows: 8 and 4 elements each in q and o, 10 scores each. 2 · 2 · 10 keys.
    let refused: Vec<(Change, Error)> = vec![
        (|_, b| b.lse = None, missing("lse", 192)),
        (|_, b| b.seqlens_k = None, missing("seqlens_k", 8)),
        (|_, b| b.workspace = None, missing("workspace", 1920)),
        (|w, b| b.query = first(&w.query, 1532), short("query", 1536, 1532)),
        (|w, b| b.key = first(&w.key, 1276), short("key", 1280, 1276)),
        (|w, b| b.value = first(&w.value, 636), short("value", 640, 636)),
        (|w, b| b.out = first(&w.out, 764), short("out", 768, 764)),
        (|w, b| b.out = at(&w.out, 3584), short("out", 768, 512)),
        (|w, b| b.out = at(&w.out, 1 << 20), short("out", 768, 0)),
        (|w, b| b.lse = Some(first(&w.lse, 188)), short("lse", 192, 188)),
        (|w, b| b.seqlens_k = Some(first(&w.seqlens_k, 4)), short("seqlens_k", 8, 4)),
        (|w, b| b.workspace = Some(first(&w.workspace, 4)), short("workspace", 1920, 4)),
        (|w, b| b.query = at(&w.no_storage, 0), usage("query")),
        (|w, b| b.key = at(&w.no_storage, 0), usage("key")),
        (|w, b| b.value = at(&w.no_storage, 0), usage("value")),
        (|w, b| b.out = at(&w.no_storage, 0), usage("out")),
        (|w, b| b.lse = Some(at(&w.no_storage, 0)), usage("lse")),
        (|w, b| b.seqlens_k = Some(at(&w.no_storage, 0)), usage("seqlens_k")),
        (|w, b| b.workspace = Some(at(&w.no_storage, 0)), usage("workspace")),
        // An input and an output that overlap.
        (|w, b| b.query = at(&w.out, 512), aliased("out", "query")),
        (|w, b| b.key = at(&w.out, 0), aliased("out", "key")),
        (|w, b| b.value = at(&w.out, 256), aliased("out", "value")),
        (|w, b| b.seqlens_k = Some(at(&w.lse, 0)), aliased("lse", "seqlens_k")),
        (|w, b| b.workspace = Some(at(&w.query, 0)), short("workspace", 1920, 1536)),
        (|w, b| b.query = at(&w.workspace, 0), aliased("workspace", "query")),
        // Two outputs that overlap.
        (|w, b| b.lse = Some(at(&w.out, 512)), aliased("lse", "out")),
        (|w, b| b.workspace = Some(at(&w.out, 0)), aliased("workspace", "out")),
    ];
    for (change, expected) in refused {
        let error = refuse(full(), &problem(), change);
        assert_eq!(error, expected);
        let (Error::BufferMissing { argument, .. }
        | Error::BufferTooSmall { argument, .. }
        | Error::BufferUsage { argument, .. }
        | Error::BufferAliased { output: argument, .. }) = expected
        else {
            panic!("{expected}")
        };
        assert!(error.to_string().contains(argument), "{error}");
    }
}

#[test]
fn unexpected_buffers() {
    let mut plain = problem();
    (plain.lse, plain.seqlens_k) = (false, false);
    let changes: [(Change, &str); 2] =
        [(|w, b| b.lse = Some(at(&w.lse, 0)), "lse"), (|w, b| b.seqlens_k = Some(at(&w.seqlens_k, 0)), "seqlens_k")];
    for (change, argument) in changes {
        let error = refuse(full(), &plain, change);
        assert_eq!(error, Error::BufferUnexpected { argument });
        assert!(error.to_string().starts_with(argument), "{error}");
    }
}

#[test]
fn offsets() {
    // WebGPU's alignment of 256, whatever the adapter's own.
    let changes: [(Change, &str); 4] = [
        (|w, b| b.query = at(&w.query, 4), "query"),
        (|w, b| b.out = at(&w.out, 128), "out"),
        (|w, b| b.lse = Some(at(&w.lse, 4)), "lse"),
        (|w, b| b.workspace = Some(at(&w.workspace, 8)), "workspace"),
    ];
    for (change, name) in changes {
        let error = refuse(webgpu(), &problem(), change);
        let Error::BufferOffset { argument, alignment: 256, .. } = error else { panic!("{error}") };
        assert_eq!(argument, name);
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// What may share a buffer: everything that does not overlap, and inputs that do.
#[test]
fn sharing_that_is_allowed() {
    let (context, problem) = (webgpu(), problem());
    for options in [naive(), tile()] {
        let plan = context.plan_with(&problem, &options).unwrap();
        let w = Buffers::new(context);
        without_device_error(context, || {
            let mut bound = w.bound();
            bound.key = w.query.as_entire_buffer_binding();
            bound.value = w.query.as_entire_buffer_binding();
            bound.lse = Some(at(&w.out, 1024));
            bound.workspace = Some(at(&w.out, 2048));
            let mut encoder = context.device().create_command_encoder(&Default::default());
            plan.forward(&mut encoder, &bound).unwrap();
            context.queue().submit([encoder.finish()]);
        });
        let bytes = context.download(&w.out, 0, 4096).unwrap();
        let words: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        assert!(words[..192].iter().all(|x| (x - 0.5).abs() < 1e-6), "o is the mean of equal values");
        assert!(words[192..256].iter().all(|x| x.to_bits() == POISON));
        assert!(words[256..304].iter().all(|x| x.is_finite()));
        assert!(words[304..512].iter().all(|x| x.to_bits() == POISON));
    }
}

/// The buffers of the backward pass of [`problem`], with a gradient of lse; outputs poisoned, and one that cannot be bound.
struct GradientBuffers {
    /// q, k, v, o, lse, do, dlse.
    inputs: Vec<wgpu::Buffer>,
    seqlens_k: wgpu::Buffer,
    /// dq, dk, dv, workspace.
    outputs: Vec<wgpu::Buffer>,
    no_storage: wgpu::Buffer,
}

impl GradientBuffers {
    fn new(context: &Context, workspace_bytes: u64) -> Self {
        let numbers = |n: usize| context.upload(bytemuck::cast_slice(&vec![0.5f32; n])).unwrap();
        let poisoned = |n: usize| context.upload(bytemuck::cast_slice(&vec![POISON; n])).unwrap();
        let (rows, keys) = (2 * 4 * 6, 2 * 2 * 10);
        let usage = BufferUsages::COPY_DST | BufferUsages::UNIFORM;
        let no_storage = wgpu::BufferDescriptor { label: None, size: 4096, usage, mapped_at_creation: false };
        GradientBuffers {
            inputs: [rows * 8, keys * 8, keys * 4, rows * 4, rows, rows * 4, rows].map(numbers).into(),
            seqlens_k: context.upload(bytemuck::cast_slice(&[10i32, 7])).unwrap(),
            outputs: [1024, keys * 8, keys * 4, workspace_bytes as usize / 4].map(poisoned).into(),
            no_storage: context.device().create_buffer(&no_storage),
        }
    }

    fn bound(&self) -> BackwardBuffers<'_> {
        let [query, key, value, out, lse, grad_out, grad_lse] = [0, 1, 2, 3, 4, 5, 6].map(|n| &self.inputs[n]);
        let [grad_query, grad_key, grad_value, workspace] = [0, 1, 2, 3].map(|n| &self.outputs[n]);
        let forward = ForwardBuffers::new(query, key, value, out).lse(lse).seqlens_k(&self.seqlens_k);
        BackwardBuffers::new(&forward, grad_out, [grad_query, grad_key, grad_value])
            .grad_lse(grad_lse)
            .workspace(workspace)
    }

    fn poisoned(&self, context: &Context) -> bool {
        self.outputs.iter().all(|buffer| {
            let bytes = context.download(buffer, 0, buffer.size()).unwrap();
            bytemuck::pod_collect_to_vec::<u8, u32>(&bytes).iter().all(|&word| word == POISON)
        })
    }
}

fn problem_with_gradients() -> Problem {
    problem().with_grad_lse()
}

#[test]
fn backward_buffers() {
    type Change = for<'a> fn(&'a GradientBuffers, &mut BackwardBuffers<'a>);
    let missing = |argument, bytes| Error::BufferMissing { argument, bytes };
    let short = |argument, needed, found| Error::BufferTooSmall { argument, needed, found };
    let aliased = |output, other| Error::BufferAliased { output, other };
    let usage = |argument| {
        let (found, needed) = (BufferUsages::COPY_DST | BufferUsages::UNIFORM, BufferUsages::STORAGE);
        Error::BufferUsage { argument, found, needed }
    };
    let refused: Vec<(Change, Error)> = vec![
        (|_, b| b.lse = None, missing("lse", 192)),
        (|_, b| b.grad_lse = None, missing("grad_lse", 192)),
        (|_, b| b.seqlens_k = None, missing("seqlens_k", 8)),
        (|_, b| b.workspace = None, missing("workspace", 400)),
        (|w, b| b.query = first(&w.inputs[0], 1532), short("query", 1536, 1532)),
        (|w, b| b.key = first(&w.inputs[1], 1276), short("key", 1280, 1276)),
        (|w, b| b.value = first(&w.inputs[2], 636), short("value", 640, 636)),
        (|w, b| b.out = first(&w.inputs[3], 764), short("out", 768, 764)),
        (|w, b| b.lse = Some(first(&w.inputs[4], 188)), short("lse", 192, 188)),
        (|w, b| b.grad_out = first(&w.inputs[5], 764), short("grad_out", 768, 764)),
        (|w, b| b.grad_lse = Some(first(&w.inputs[6], 188)), short("grad_lse", 192, 188)),
        (|w, b| b.grad_query = first(&w.outputs[0], 1532), short("grad_query", 1536, 1532)),
        (|w, b| b.grad_key = first(&w.outputs[1], 1276), short("grad_key", 1280, 1276)),
        (|w, b| b.grad_value = first(&w.outputs[2], 636), short("grad_value", 640, 636)),
        (|w, b| b.workspace = Some(first(&w.outputs[3], 396)), short("workspace", 400, 396)),
        (|w, b| b.out = at(&w.no_storage, 0), usage("out")),
        (|w, b| b.lse = Some(at(&w.no_storage, 0)), usage("lse")),
        (|w, b| b.grad_out = at(&w.no_storage, 0), usage("grad_out")),
        (|w, b| b.grad_lse = Some(at(&w.no_storage, 0)), usage("grad_lse")),
        (|w, b| b.grad_query = at(&w.no_storage, 0), usage("grad_query")),
        (|w, b| b.grad_key = at(&w.no_storage, 0), usage("grad_key")),
        (|w, b| b.grad_value = at(&w.no_storage, 0), usage("grad_value")),
        // An input and an output, two outputs that overlap, the workspace and anything.
        (|w, b| b.grad_query = at(&w.inputs[0], 0), aliased("grad_query", "query")),
        (|w, b| b.grad_value = at(&w.outputs[0], 1280), aliased("grad_value", "grad_query")),
        (|w, b| b.workspace = Some(at(&w.outputs[0], 1280)), aliased("workspace", "grad_query")),
    ];
    let context = full();
    let tile = PlanOptions::default().kernel(Kernel::Tile);
    let plan = context.plan_with(&problem_with_gradients(), &tile).unwrap();
    // Of each row two numbers, and of each batch entry two lengths.
    assert_eq!(plan.backward_workspace_bytes(), 2 * 4 * 6 * 8 + 2 * 8);
    let seqlen_k = problem().shape.seqlen_k;
    // The gradient of a bias takes nothing more, and none of it grows with the scores.
    for sizes in [[2, 4, 6, seqlen_k], [1, 4, 6, seqlen_k], [1, 1, 6, 1], [1, 1, 1, 1]] {
        let bias = Bias::new(ElementType::F32, ScoreLayout::contiguous(sizes));
        let problem = problem_with_gradients().with_bias(bias).with_grad_bias();
        let with_bias = context.plan_with(&problem, &tile).unwrap();
        assert_eq!(with_bias.backward_workspace_bytes(), plan.backward_workspace_bytes(), "{sizes:?}");
    }
    for (change, expected) in refused {
        let buffers = GradientBuffers::new(context, plan.backward_workspace_bytes());
        let good = buffers.bound();
        let mut bad = good.clone();
        change(&buffers, &mut bad);
        let run = |bound: &BackwardBuffers<'_>| {
            without_device_error(context, || {
                let mut encoder = context.device().create_command_encoder(&Default::default());
                let result = plan.backward(&mut encoder, bound);
                context.queue().submit([encoder.finish()]);
                result
            })
        };
        assert_eq!(run(&bad), Err(expected));
        assert!(buffers.poisoned(context), "something was written all the same");
        run(&good).unwrap();
        assert!(!buffers.poisoned(context));
    }
}

#[test]
fn backward_of_other_plans() {
    let context = full();
    // A gradient of lse that the problem does not have, and a plan without gradients.
    let plain = problem().with_gradients();
    for (problem, expected) in
        [(plain, Error::BufferUnexpected { argument: "grad_lse" }), (problem(), Error::NoGradients)]
    {
        let plan = context.plan(&problem).unwrap();
        let buffers = GradientBuffers::new(context, 2 * 4 * 6 * 8);
        let mut encoder = context.device().create_command_encoder(&Default::default());
        let error = plan.backward(&mut encoder, &buffers.bound()).unwrap_err();
        assert_eq!(error, expected);
        context.queue().submit([encoder.finish()]);
        assert!(buffers.poisoned(context), "{error}");
    }
}

#[test]
fn problems_with_bad_gradients() {
    let good = problem_with_gradients;
    let with = |tensor, change: fn(&mut Layout)| {
        let mut layout = good().layout(tensor);
        change(&mut layout);
        good().with_layout(tensor, layout)
    };
    let mut without_lse = good();
    without_lse.lse = false;
    let far = |argument| Error::LayoutOverflow { argument };
    let overlap = |argument| Error::OutputOverlap { argument };
    for (problem, expected, named) in [
        (without_lse, Error::GradientsWithoutLse, "lse"),
        (with(Tensor::GradOut, |l| l.batch = u64::MAX), far("grad_out"), "grad_out"),
        (with(Tensor::GradKey, |l| l.batch = u64::MAX), far("grad_key"), "grad_key"),
        (with(Tensor::GradQuery, |l| l.row = 7), overlap("grad_query"), "grad_query"),
        (with(Tensor::GradKey, |l| l.head = 0), overlap("grad_key"), "grad_key"),
        (with(Tensor::GradValue, |l| l.row = 0), overlap("grad_value"), "grad_value"),
    ] {
        let error = without_device_error(full(), || full().plan(&problem)).unwrap_err();
        assert_eq!(error, expected);
        assert!(error.to_string().contains(named), "{error}");
    }
    let options = PlanOptions::default().backward(Kernel::Decode);
    let error = full().plan_with(&good(), &options).unwrap_err();
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Decode, .. }), "{error}");
}

#[test]
fn adapters() {
    let options = HeadlessOptions::default().adapter("no such adapter");
    let error = Context::headless_with(&options).unwrap_err();
    assert!(matches!(&error, Error::Adapter(why) if why.contains("no such adapter")), "{error}");
    // Its own name finds it.
    let name = full().device().adapter_info().name;
    Context::headless_with(&HeadlessOptions::default().adapter(name.to_uppercase())).unwrap();
}

#[test]
fn a_device_that_is_gone() {
    let context = with_limits(|_| {});
    context.device().on_uncaptured_error(std::sync::Arc::new(|_| {}));
    let buffer = context.upload(&[0; 16]).unwrap();
    context.device().destroy();
    let error = context.download(&buffer, 0, 16).unwrap_err();
    assert!(matches!(&error, Error::Device(_)), "{error}");
}

/// Nothing is refused that should not be.
#[test]
fn the_problem_itself_is_fine() {
    for options in [naive(), tile()] {
        let case = case(2, [4, 2], [6, 10], [8, 4]).seqlens(&[10, 7]);
        case.element_type(ElementType::F32).prepare().check(full(), &options).unwrap();
    }
}

/// The buffers of what scores are given: each may be missing, unexpected, too short or where an output is.
#[test]
fn buffers_of_what_scores_are_given() {
    let context = full();
    // A bias [1, 4, 6, 10], a mask [2, 1, 1, 10].
    let problem = case(2, [4, 2], [6, 10], [8, 4])
        .bias([1, 4, 6, 10])
        .mask([2, 1, 1, 10])
        .alibi(Alibi::PerBatchAndHead)
        .sinks()
        .problem
        .with_grad_bias()
        .with_grad_sinks()
        .with_grad_alibi_slopes();
    let buffer = |bytes: usize| context.upload(&vec![0; bytes]).unwrap();
    let [q, k, v, o] = [1536, 1280, 640, 768].map(buffer);
    let (lse, bias, mask, slopes, sinks) = (buffer(192), buffer(960), buffer(20), buffer(32), buffer(16));
    let plan = context.plan_with(&problem, &tile().backward(Kernel::Tile)).unwrap();
    let workspace = plan.create_backward_workspace().unwrap();
    let good =
        ForwardBuffers::new(&q, &k, &v, &o).lse(&lse).bias(&bias).mask(&mask).alibi_slopes(&slopes).sinks(&sinks);
    let forward = |buffers: ForwardBuffers<'_>| {
        plan.forward(&mut context.device().create_command_encoder(&Default::default()), &buffers)
    };
    assert_eq!(forward(good.clone()), Ok(()));
    let missing = |argument, bytes| Err(Error::BufferMissing { argument, bytes });
    assert_eq!(forward(good.clone().bias(None::<&wgpu::Buffer>)), missing("bias", 960));
    assert_eq!(forward(good.clone().mask(None::<&wgpu::Buffer>)), missing("mask", 20));
    assert_eq!(forward(good.clone().alibi_slopes(None::<&wgpu::Buffer>)), missing("alibi_slopes", 32));
    assert_eq!(forward(good.clone().sinks(None::<&wgpu::Buffer>)), missing("sinks", 16));
    let short = |argument, needed, found| Err(Error::BufferTooSmall { argument, needed, found });
    assert_eq!(forward(good.clone().bias(first(&bias, 956))), short("bias", 960, 956));
    assert_eq!(forward(good.clone().mask(first(&mask, 16))), short("mask", 20, 16));
    let aliased = |output, other| Err(Error::BufferAliased { output, other });
    assert_eq!(forward(good.clone().bias(&o)), short("bias", 960, 768));
    assert_eq!(forward(good.clone().mask(&o)), aliased("out", "mask"));
    let plain = context.plan(&case(2, [4, 2], [6, 10], [8, 4]).problem).unwrap();
    for (buffers, argument) in [
        (ForwardBuffers::new(&q, &k, &v, &o).lse(&lse).bias(&bias), "bias"),
        (ForwardBuffers::new(&q, &k, &v, &o).lse(&lse).mask(&mask), "mask"),
        (ForwardBuffers::new(&q, &k, &v, &o).lse(&lse).alibi_slopes(&slopes), "alibi_slopes"),
        (ForwardBuffers::new(&q, &k, &v, &o).lse(&lse).sinks(&sinks), "sinks"),
    ] {
        let mut encoder = context.device().create_command_encoder(&Default::default());
        assert_eq!(plain.forward(&mut encoder, &buffers), Err(Error::BufferUnexpected { argument }));
    }

    let [dq, dk, dv, grad_out] = [1536, 1280, 640, 768].map(buffer);
    let (dbias, dsinks, dslopes) = (buffer(960), buffer(16), buffer(32));
    let backward = |change: &dyn for<'a> Fn(BackwardBuffers<'a>) -> BackwardBuffers<'a>| {
        let buffers = BackwardBuffers::new(&good, &grad_out, [&dq, &dk, &dv]).workspace(workspace.as_ref());
        let buffers = buffers.grad_bias(&dbias).grad_sinks(&dsinks).grad_alibi_slopes(&dslopes);
        plan.backward(&mut context.device().create_command_encoder(&Default::default()), &change(buffers))
    };
    assert_eq!(backward(&|b| b), Ok(()));
    assert_eq!(backward(&|b| b.grad_bias(None::<&wgpu::Buffer>)), missing("grad_bias", 960));
    assert_eq!(backward(&|b| b.grad_sinks(None::<&wgpu::Buffer>)), missing("grad_sinks", 16));
    assert_eq!(backward(&|b| b.grad_alibi_slopes(None::<&wgpu::Buffer>)), missing("grad_alibi_slopes", 32));
}
