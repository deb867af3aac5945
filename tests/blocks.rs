//! Block-sparse attention: every kernel, form and type by block lists, forward and backward, whole and split; and the lists themselves, which
//! the host and the device make alike.

use flash_attention_testing::backward::{self, Ask, backward, fused, in_small_bindings};
use flash_attention_testing::coop::{check_passes, context, in_forms, is_software, known_matrices};
use flash_attention_testing::*;
use wgpu_flash_attention::Causal::{BottomRight, TopLeft};
use wgpu_flash_attention::facts::Facts;
use wgpu_flash_attention::tune::BackwardTile;
use wgpu_flash_attention::{
    Alibi, BlockBuffers, BlockIndices, BlockLists, BlockMask, BlockPattern, BlockSource, Context, ElementType, Error,
    ForwardBuffers, Kernel, PlanOptions, Problem, ScoreLayout, Shape, modules, reference, wgpu,
};

/// So many of each hundred blocks by chance, of all lists of a case.
fn by_chance(case: &Case, lists: BlockLists, of_hundred: u32, seed: u64) -> Vec<bool> {
    let blocks: usize = case.problem.clone().with_blocks(lists).block_counts().iter().map(|&n| n as usize).product();
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..blocks).map(|_| rng.u32(0..100) < of_hundred).collect()
}

/// A case by block lists of so many of each hundred blocks.
fn listed(name: &str, case: Case, lists: BlockLists, of_hundred: u32) -> (String, Case) {
    let blocks = by_chance(&case, lists, of_hundred, 7);
    (name.into(), case.blocks(lists, blocks))
}

/// A case that lists the blocks of a pattern.
fn patterned(name: &str, case: Case, lists: BlockLists, pattern: impl Fn(u32, u32) -> BlockPattern) -> (String, Case) {
    let [batch, heads, down, across] = case.problem.clone().with_blocks(lists).block_counts();
    let listed = pattern(down, across).listed().repeat((batch * heads) as usize);
    (name.into(), case.blocks(lists, listed))
}

/// Blocks of `[queries, keys]`, more of them than one, most ends cut short, several heads a group, every other mask.
fn cases([queries, keys]: [u32; 2]) -> Vec<(String, Case)> {
    let lists = BlockLists::new().size(queries, keys);
    let by_all = lists.per_batch().per_head();
    let both = || case(2, [4, 2], [150, 170], [16, 12]);
    let empty_row = |down, across| BlockPattern::of(down, across, |r, c| r != 1 && (r + c) % 2 == 0);
    vec![
        listed("a third, each head its own", both(), by_all, 33),
        listed("a third, causal, each head its own", both().causal(BottomRight), by_all, 33),
        listed("shared", both(), lists, 40),
        listed(
            "odd strides, softcap, scale below 0, each batch entry its own",
            case(2, [4, 2], [111, 149], [7, 5]).odd().scale(-0.4).softcap(3.0).causal(TopLeft),
            lists.per_batch(),
            50,
        ),
        listed("each head its own, shared by the batch", both().window(70, 20), lists.per_head(), 60),
        listed("none", both(), by_all, 0),
        listed("all, causal: full blocks on the diagonal", both().causal(BottomRight), lists, 100),
        listed(
            "lengths",
            case(3, [4, 2], [150, 170], [16, 12])
                .seqlens(&[170, 77, 0])
                .seqlens_q(&[61, 150, 33])
                .causal(BottomRight)
                .window(90, -1),
            by_all,
            60,
        ),
        patterned("a row of blocks without any", both(), lists, empty_row),
        patterned("a window in blocks", both().causal(BottomRight), lists, |r, c| BlockPattern::local(r, c, 1, 0)),
        patterned("BigBird", both(), by_all, |r, c| BlockPattern::big_bird(r, c, [1, 1, 1], 3)),
        listed("dropout, causal", both().dropout(0.3).causal(BottomRight), by_all, 50),
    ]
}

/// The cases in f32, and three of them in the other types: a type changes how elements are read and written.
fn cases_of(block: [u32; 2], element_type: ElementType) -> Vec<(String, Case)> {
    let all = cases(block);
    if element_type == ElementType::F32 { all } else { [1, 3, 11].map(|n| all[n].clone()).into() }
}

fn two_kernels() -> PlanOptions {
    let tile = BackwardTile { own: 16, step: 32, threads_y: 8, threads_x: 8, chunk: 12, block: 16, written_out: true };
    backward(Kernel::Tile).backward_tile(tile)
}

#[test]
fn forward() {
    let small = tiled(8, 16, (2, 4), 4, 8);
    let first = &cases([32, 32])[0].1.problem;
    let (narrow, less_narrow) = (with_bindings(20), with_bindings(110));
    assert_split(first, &narrow, small);
    assert_split(first, &less_narrow, naive());
    for element_type in TYPES {
        let mut ways = every_kernel(element_type, naive(), tile());
        ways.push(("small tile", full(), small));
        if element_type == ElementType::F32 {
            ways.extend([("small tile, split", &narrow, small), ("naive, split", &less_narrow, naive())]);
        }
        check_all(&cases::prepare(cases_of([32, 32], element_type), element_type), &ways);
    }
}

/// Blocks that are not square, the size of a tile in one direction and several tiles in the other one.
#[test]
fn forward_in_wide_and_in_tall_blocks() {
    for block in [[32, 64], [96, 32], [64, 64], [128, 128]] {
        let ways = every_kernel(ElementType::F32, naive(), tile());
        check_all(&cases::prepare(cases_of(block, ElementType::F32), ElementType::F32), &ways);
    }
    // Smaller than any tile of the table.
    let tiny = tiled(8, 16, (2, 4), 4, 8);
    let ways = [("naive", full(), naive()), ("small tile", full(), tiny)];
    check_all(&cases::prepare(cases_of([8, 48], ElementType::F32), ElementType::F32), &ways);
}

#[test]
fn gradients() {
    let first = &cases([32, 32])[0].1.problem;
    let (narrow, less_narrow) = (with_bindings(20), with_bindings(420));
    let [two_split, naive_split] = [two_kernels(), backward(Kernel::Naive)].map(in_small_bindings);
    assert_split(first, &narrow, two_split);
    assert_split(first, &less_narrow, naive_split);
    for element_type in TYPES {
        let mut ways = every_kernel(element_type, backward(Kernel::Naive), backward(Kernel::Tile));
        ways.push(("small tiles", full(), two_kernels()));
        if element_type == ElementType::F32 {
            ways.extend([("small tiles, split", &narrow, two_split), ("naive, split", &less_narrow, naive_split)]);
        }
        let ask = Ask { grad_lse: true, accumulate: false };
        backward::check_all(&backward::prepare(cases_of([32, 32], element_type), element_type, ask), &ways);
    }
}

#[test]
fn gradients_in_wide_and_in_tall_blocks() {
    for block in [[32, 64], [96, 32], [128, 64]] {
        let ways = [
            ("two kernels", full(), backward(Kernel::Tile)),
            ("two kernels within WebGPU's limits", webgpu(), backward(Kernel::Tile)),
        ];
        let cases = backward::prepare(cases_of(block, ElementType::F32), ElementType::F32, Ask::default());
        backward::check_all(&cases, &ways);
    }
}

/// On matrices, where the driver has them: both forms in f16, registers in f32 and bf16.
#[test]
fn coop() {
    let Some(context) = context() else { return };
    let block = if is_software(&context) { [64, 32] } else { [128, 64] };
    for element_type in TYPES {
        // A processor takes long to compile these kernels.
        let mut cases = cases_of(block, element_type);
        if element_type == ElementType::F32 {
            cases = [0, 1, 3, 7].map(|n| cases[n].clone()).into();
        }
        check_passes(&context, cases, element_type);
    }
}

/// With all blocks listed as full ones, tiles are visited in the order of those without lists: the same bits.
#[test]
fn all_blocks_have_the_bits_of_none() {
    let plain = case(2, [4, 2], [150, 170], [16, 12]).causal(BottomRight);
    let lists = BlockLists::new().size(64, 64);
    let problem = plain.problem.clone().with_blocks(lists);
    let blocks: usize = problem.block_counts().iter().map(|&n| n as usize).product();
    let listed = vec![true; blocks];
    let mut by_lists = plain.clone();
    by_lists.problem = problem.clone();
    by_lists.extras.blocks = Some((listed.clone(), BlockMask::from_dense(&problem, &listed).unwrap()));
    for (context, options) in [(full(), naive()), (full(), tile()), (webgpu(), tile())] {
        let bits = |case: &Case| {
            let prepared = case.prepare();
            prepared.run(context, &context.plan_with(&prepared.problem, &options).unwrap(), 0).unwrap()
        };
        assert!(bits(&by_lists) == bits(&plain), "forward: {options:?}");
        let options = options.backward(options.kernel);
        let bits = |case: &Case| {
            let prepared = case.prepare_backward(Ask::default());
            prepared.run(context, &context.plan_with(&prepared.problem, &options).unwrap(), 0).unwrap()
        };
        let (found, expected) = (bits(&by_lists), bits(&plain));
        for (n, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
            let differ = found[n].iter().zip(&expected[n]).filter(|(a, b)| a != b).count();
            assert!(
                differ == 0,
                "{differ} elements of {name}: {}",
                context.plan_with(&problem.clone().with_gradients(), &options).unwrap()
            );
        }
    }
}

/// Blocks that do not divide into tiles are an error that says so, and the naive kernel takes them.
#[test]
fn blocks_that_do_not_divide_are_refused() {
    let problem = |queries, keys, element_type| {
        let shape = Shape::square(1, 2, 200, 64);
        Problem::new(shape, element_type).with_blocks(BlockLists::new().size(queries, keys))
    };
    let refused = |problem: &Problem, options: PlanOptions| webgpu().plan_with(problem, &options).unwrap_err();
    let (block, tile) = ([48, 48], [32, 32]);
    let error = refused(&problem(48, 48, ElementType::F32), PlanOptions::default());
    assert_eq!(error, Error::BlockTile { kernel: Kernel::Tile, backward: false, block, tile });
    for words in ["48 queries by 48 keys", "tile kernel's tiles of 32 by 32", "128 by 128", "naive"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!(webgpu().plan_with(&problem(48, 48, ElementType::F32), &naive()).is_ok());
    let gradients = problem(48, 48, ElementType::F16).with_gradients();
    let error = refused(&gradients, naive().backward(Kernel::Tile));
    assert_eq!(error, Error::BlockTile { kernel: Kernel::Tile, backward: true, block, tile });
    assert!(error.to_string().contains("backward pass"), "{error}");
    // A tile that was asked for.
    let error = refused(&problem(32, 32, ElementType::F32), tiled(32, 64, (8, 8), 32, 32));
    assert_eq!(error, Error::BlockTile { kernel: Kernel::Tile, backward: false, block: [32, 32], tile: [32, 64] });
    // Kernels that take no block lists.
    let good = problem(64, 64, ElementType::F32);
    let error = refused(&good, PlanOptions::default().kernel(Kernel::Decode));
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Decode, .. }), "{error}");
    let error = refused(&good.clone().with_gradients(), fused([32, 64], 8, 8, 16, [32, 64]));
    assert!(matches!(error, Error::Unsupported { kernel: Kernel::Tile, .. }), "{error}");
    for found in [0, u32::MAX] {
        let error = refused(&problem(64, found, ElementType::F32), PlanOptions::default());
        assert_eq!(error, Error::BlockSize { argument: "blocks.keys", found });
    }
}

/// Every plan for blocks of 128 by 128, the default, on every device.
#[test]
fn blocks_of_128_fit_every_plan() {
    for element_type in TYPES {
        for (head_dim, head_dim_v) in [(1, 1), (16, 12), (64, 64), (80, 96), (128, 128), (200, 256)] {
            let shape = Shape { head_dim_v, ..Shape::square(1, 2, 300, head_dim) };
            let problem = Problem::new(shape, element_type).with_blocks(BlockLists::new()).with_gradients();
            for context in [full(), webgpu()] {
                let plan = context.plan(&problem).unwrap().to_string();
                assert!(plan.contains("blocks of 128 queries by 128 keys"), "{plan}");
            }
        }
    }
}

/// Plans for cooperative matrices that are known to exist take smaller tiles where those of their tables do not divide the blocks.
#[test]
fn blocks_fit_tiles_of_matrices() {
    let limits = wgpu::Limits {
        max_compute_workgroup_storage_size: 48 << 10,
        max_compute_invocations_per_workgroup: 1024,
        max_compute_workgroup_size_x: 1024,
        ..Default::default()
    };
    for (format, layout) in known_matrices() {
        let facts = Facts::with_limits(limits.clone()).matrices(format, Some(layout));
        for (element_type, head_dim) in TYPES.into_iter().flat_map(|ty| [16, 64, 128, 256].map(|dim| (ty, dim))) {
            // So long that without lists f16 has tiles of 256 rows.
            let problem = Problem::new(Shape::square(1, 16, 16384, head_dim), element_type).with_gradients();
            for [queries, keys] in [[128, 128], [64, 128], [128, 64], [64, 64]] {
                let problem = problem.clone().with_blocks(BlockLists::new().size(queries, keys));
                let coop = PlanOptions::default().kernel(Kernel::Coop).backward(Kernel::Coop);
                for (_, _, options) in in_forms(element_type, &[("coop", full(), coop)]) {
                    let planned =
                        modules(&problem, &facts, &options).unwrap_or_else(|error| panic!("{error}: {problem:?}"));
                    let of_lists = planned.iter().filter(|module| module.specialization.switches.contains(&"BLOCKS"));
                    // Forward, dk·dv and dq; in f32 and bf16 each once more for heads whose numbers are far apart.
                    assert_eq!(of_lists.count(), if element_type == ElementType::F16 { 3 } else { 6 });
                }
            }
        }
        let problem = Problem::new(Shape::square(1, 2, 300, 64), ElementType::F16);
        let odd = problem.with_blocks(BlockLists::new().size(40, 20));
        // Matrices of 16 rows do not, and no plan takes them then; those of 8 do not divide 20 keys.
        let error = modules(&odd, &facts, &PlanOptions::default().kernel(Kernel::Coop)).unwrap_err();
        assert!(matches!(error, Error::BlockTile { kernel: Kernel::Coop, backward: false, .. }), "{error}");
        let error = modules(&odd, &facts, &PlanOptions::default()).unwrap_err();
        assert!(matches!(error, Error::BlockTile { kernel: Kernel::Tile, .. }), "{error}");
    }
}

/// The buffer must be given exactly when the problem has lists, and be as large as they are.
#[test]
fn buffers_are_checked() {
    let context = full();
    let problem = Problem::new(Shape::square(1, 1, 64, 16), ElementType::F32);
    let sparse = problem.clone().with_blocks(BlockLists::new().size(32, 32));
    let tensor = context.upload(&[0; 4 * 64 * 16]).unwrap();
    let out = context.upload(&[0; 4 * 64 * 16]).unwrap();
    let blocks = context.upload(&vec![0; sparse.blocks_bytes() as usize]).unwrap();
    let short = context.upload(&[0; 4]).unwrap();
    let error = |problem: &Problem, blocks: Option<&wgpu::Buffer>| {
        let plan = context.plan(problem).unwrap();
        let buffers = wgpu_flash_attention::ForwardBuffers::new(&tensor, &tensor, &tensor, &out).blocks(blocks);
        let mut encoder = context.device().create_command_encoder(&Default::default());
        plan.forward(&mut encoder, &buffers).err()
    };
    assert_eq!(error(&sparse, Some(&blocks)), None);
    let bytes = sparse.blocks_bytes();
    assert_eq!(error(&sparse, None), Some(Error::BufferMissing { argument: "blocks", bytes }));
    assert_eq!(
        error(&sparse, Some(&short)),
        Some(Error::BufferTooSmall { argument: "blocks", needed: bytes, found: 4 })
    );
    assert_eq!(error(&problem, Some(&blocks)), Some(Error::BufferUnexpected { argument: "blocks" }));
}

/// What a buffer that nobody packed holds makes no kernel read past an end or go on forever; numbers past the last block act as the last.
#[test]
fn any_numbers_in_the_buffer_are_safe() {
    let (_, mut case) = cases([32, 32]).swap_remove(1);
    let Some((listed, _)) = case.extras.blocks.take() else { unreachable!() };
    let mut rng = fastrand::Rng::with_seed(3);
    let words: Vec<u32> = (0..case.problem.blocks_bytes() / 4).map(|_| rng.u32(..) >> rng.u32(0..32)).collect();
    case.extras.blocks = Some((listed, BlockMask::from_words(words)));
    for (context, options) in [(full(), tile()), (webgpu(), tile()), (full(), naive())] {
        // With wgpu's checks nothing could be read past an end; without them a driver may notice.
        for context in [context, &context.clone().checked()] {
            let forward = case.prepare();
            forward.run(context, &context.plan_with(&forward.problem, &options).unwrap(), 0).unwrap();
            let backward = case.prepare_backward(Ask::default());
            let options = options.backward(options.kernel);
            let gradients = backward.run(context, &context.plan_with(&backward.problem, &options).unwrap(), 0);
            assert!(gradients.unwrap().iter().all(|gradient| !gradient.is_empty()));
        }
    }
}

/// The packed lists that the device makes.
fn on_device(
    context: &Context,
    problem: &Problem,
    source: BlockSource,
    of: impl Fn(BlockBuffers<'_>, &dyn Fn(BlockBuffers<'_>)),
) -> Vec<u8> {
    let plan = context.plan_blocks(problem, source).unwrap();
    // What the buffer held before makes no difference.
    let blocks = context.upload(&vec![0xa5; problem.blocks_bytes() as usize]).unwrap();
    of(BlockBuffers::new(&blocks), &|buffers| {
        let mut encoder = context.device().create_command_encoder(&Default::default());
        plan.record(&mut encoder, &buffers).unwrap();
        context.queue().submit([encoder.finish()]);
    });
    context.download(&blocks, 0, problem.blocks_bytes()).unwrap()
}

/// FlexAttention's lists of blocks, of partial ones and of full ones.
struct HostLists {
    counts: [Vec<i32>; 2],
    indices: [Vec<i32>; 2],
}

impl HostLists {
    /// From rows of the kinds of blocks: 0, 1 for a partial block, 2 for a full one.
    fn of(kinds: &[u8], across: u32) -> Self {
        let mut lists = HostLists { counts: [vec![], vec![]], indices: [vec![], vec![]] };
        for row in kinds.chunks(across as usize) {
            for n in 0..2 {
                let mut own: Vec<_> = (0..across as i32).filter(|&c| row[c as usize] as usize == n + 1).collect();
                lists.counts[n].push(own.len() as i32);
                own.resize(across as usize, -1);
                lists.indices[n].extend(own);
            }
        }
        lists
    }

    fn borrow(&self) -> BlockIndices<'_> {
        let [partial, full] = [0, 1].map(|n| [&self.counts[n][..], &self.indices[n]]);
        BlockIndices { kv_num_blocks: partial[0], kv_indices: partial[1], full: Some(full) }
    }
}

fn upload(context: &Context, numbers: &[i32]) -> wgpu::Buffer {
    // A tensor without elements still is a buffer.
    context.upload(bytemuck::cast_slice(if numbers.is_empty() { &[0] } else { numbers })).unwrap()
}

/// Lists on the device give the bytes of those on the host, in whatever order a row has its blocks.
#[test]
fn lists_of_the_device_are_those_of_the_host() {
    let context = webgpu();
    let mut rng = fastrand::Rng::with_seed(11);
    let shape = |batch, heads, seqlen_q, seqlen_k| Shape { seqlen_k, ..Shape::square(batch, heads, seqlen_q, 8) };
    for (shape, lists) in [
        (shape(2, 3, 150, 170), BlockLists::new().size(32, 32).per_batch().per_head()),
        (shape(2, 3, 150, 170), BlockLists::new().size(32, 16).per_head()),
        (shape(2, 3, 700, 90), BlockLists::new().size(1, 3).per_batch()),
        (shape(2, 3, 40, 1100), BlockLists::new().size(16, 2)),
        (shape(2, 3, 150, 170), BlockLists::new().size(16, 16).per_head().columns(4)),
        (shape(1, 1, 9, 9), BlockLists::new()),
        (shape(1, 1, 9, 0), BlockLists::new()),
        (shape(0, 1, 9, 9), BlockLists::new().per_batch()),
    ] {
        let problem = Problem::new(shape, ElementType::F32).with_blocks(lists);
        let [batch, heads, down, across] = problem.block_counts();
        let columns = lists.columns.unwrap_or(across);
        let (mut counts, mut indices) = ([vec![], vec![]], [vec![], vec![]]);
        for _ in 0..batch * heads * down {
            let mut blocks: Vec<i32> = (0..across as i32).collect();
            rng.shuffle(&mut blocks);
            let partial = rng.u32(0..=columns.min(across)) as usize;
            let full = rng.u32(0..=columns.min(across - partial as u32)) as usize;
            for (n, listed) in [&blocks[..partial], &blocks[partial..][..full]].into_iter().enumerate() {
                counts[n].push(listed.len() as i32);
                indices[n].extend(listed);
                // Nobody reads what lies past the count.
                indices[n].extend((listed.len()..columns as usize).map(|_| rng.i32(..)));
            }
        }
        for full in [true, false] {
            let host = BlockIndices {
                kv_num_blocks: &counts[0],
                kv_indices: &indices[0],
                full: full.then_some([&counts[1], &indices[1]]),
            };
            let expected = BlockMask::from_lists(&problem, &host).unwrap();
            let [partial, of_full] = [0, 1].map(|n| [upload(context, &counts[n]), upload(context, &indices[n])]);
            let found = on_device(context, &problem, BlockSource::Lists { full }, |buffers, record| {
                let buffers = buffers.lists(partial.each_ref());
                record(if full { buffers.full(of_full.each_ref()) } else { buffers });
            });
            assert!(batch == 0 || found == expected.bytes(), "{problem:?}");
        }
    }
}

/// Numbers that are none of a block are clamped, a block that is listed twice counts once, and one that is listed in both ways is partial.
#[test]
fn wrong_numbers_of_the_device_are_clamped() {
    let context = webgpu();
    let problem =
        Problem::new(Shape::square(1, 1, 90, 8), ElementType::F32).with_blocks(BlockLists::new().size(32, 32));
    let given = [[99, 2, -5], [-7, 2, 2]];
    let indices = [[i32::MAX, 5, -1, 1, 1, 0, 9, 9, 9], [2, 9, 9, 1, 2, 9, -1, i32::MIN, 9]];
    let [partial, full] = [0, 1].map(|n| [upload(context, &given[n]), upload(context, &indices[n])]);
    let found = on_device(context, &problem, BlockSource::Lists { full: true }, |buffers, record| {
        record(buffers.lists(partial.each_ref()).full(full.each_ref()));
    });
    // Row 0: 2 and 0 partial. Row 1: 1 partial, 2 full. Row 2: 0 full.
    let clamped = BlockIndices {
        kv_num_blocks: &[2, 1, 0],
        kv_indices: &[0, 2, 0, 1, 0, 0, 0, 0, 0],
        full: Some([&[0, 1, 1], &[0, 0, 0, 2, 0, 0, 0, 0, 0]]),
    };
    let expected = BlockMask::from_lists(&problem, &clamped).unwrap();
    // But for the kinds, which keep both bits of a block that is listed in both ways.
    assert_eq!(found[12..], expected.bytes()[12..]);
}

/// The lists that the device makes of the masks of a case whose problem has block lists.
fn of_masks(context: &Context, case: &Case) -> Vec<u8> {
    let lengths = [&case.extras.seqlens_q, &case.extras.seqlens_k]
        .map(|lengths| lengths.as_ref().map(|lengths| upload(context, lengths)));
    let mask = case.extras.mask.as_ref().map(|mask| {
        let mut bytes: Vec<_> = mask.iter().map(|&counts| u8::from(counts)).collect();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        context.upload(&bytes).unwrap()
    });
    let mods: Vec<_> =
        case.extras.mod_buffers.iter().map(|(name, bytes)| (name, context.upload(bytes).unwrap())).collect();
    on_device(context, &case.problem, BlockSource::Masks, |buffers, record| {
        let buffers = mods.iter().fold(buffers, |buffers, (name, buffer)| buffers.mod_buffer(name, buffer));
        let [queries, keys] = lengths.each_ref().map(Option::as_ref);
        record(buffers.seqlens_q(queries).seqlens_k(keys).mask(mask.as_ref()));
    })
}

/// Four documents, so that most blocks are of two of them and some of one.
fn documents(case: Case) -> Case {
    const SAME: &str = "var<storage, read> document: array<u32>;
        fn mask_mod(at: Position) -> bool { return document[at.i] == document[at.j]; }";
    let documents: Vec<u32> = (0..170).map(|n| n / 45).collect();
    case.mods(SAME, &[("document", &documents)])
}

/// The case with lists that a device makes of its masks; the reference knows nothing of the lists.
fn listed_by_masks(context: &Context, mut case: Case, lists: BlockLists) -> Case {
    case.problem = case.problem.with_blocks(lists);
    let words: Vec<u32> = bytemuck::pod_collect_to_vec(&of_masks(context, &case));
    let all = case.problem.block_counts().iter().map(|&n| n as usize).product();
    // Some blocks are not listed.
    let everything = BlockMask::from_dense(&case.problem, &vec![true; all]).unwrap();
    assert_ne!(words, bytemuck::pod_collect_to_vec::<u8, u32>(everything.bytes()), "{:?}", case.problem);
    case.extras.blocks = Some((vec![true; all], BlockMask::from_words(words)));
    case
}

/// Where kernels do not ask masks about full blocks, a matrix of blocks lists partial ones: the masks count inside.
#[test]
fn dense_blocks_leave_masks_their_say() {
    let shape = case(1, [1, 1], [4, 4], [8, 8]).problem;
    let words = |problem: &Problem| {
        let mask = BlockMask::from_dense(problem, &[true; 4]).unwrap();
        bytemuck::pod_collect_to_vec::<u8, u32>(mask.bytes())
    };
    let lists = BlockLists::new().size(2, 2);
    let plain = shape.clone().with_blocks(lists.full_unmasked());
    let masked = shape.with_mask(ScoreLayout::contiguous([1, 1, 4, 4]));
    let asked = masked.clone().with_blocks(lists);
    let unasked = masked.with_blocks(lists.full_unmasked());
    // Two bits for each of two blocks: 2 is full, 1 is partial.
    assert_eq!([&plain, &asked, &unasked].map(|problem| words(problem)[0]), [0b1010, 0b1010, 0b0101]);
}

#[test]
fn lists_of_too_many_blocks() {
    let shape = Shape { seqlen_q: 1 << 14, seqlen_k: 1 << 14, ..Shape::square(1, 1, 1, 1) };
    let problem = Problem::new(shape, ElementType::F32).with_blocks(BlockLists::new().size(1, 1));
    let error = BlockMask::from_dense(&problem, &[]).unwrap_err();
    assert_eq!(error, Error::TooManyBlocks { found: 1 << 28, most: 1 << 27 });
}

/// On matrices, full blocks that are not asked about, by lists of masks.
#[test]
fn full_blocks_unmasked_coop() {
    let Some(context) = context() else { return };
    let lists = if is_software(&context) { BlockLists::new().size(64, 32) } else { BlockLists::new() };
    let shape = case(2, [4, 2], [270, 290], [16, 12]);
    let mut of_documents = documents(shape).causal(BottomRight);
    let numbers: Vec<u32> = (0..290).map(|n| n / 140).collect();
    of_documents.extras.mod_buffers = vec![("document".into(), bytemuck::cast_slice(&numbers).to_vec())];
    let listed = listed_by_masks(&context, of_documents, lists.full_unmasked());
    for element_type in [ElementType::F16, ElementType::BF16] {
        check_passes(&context, vec![("documents".into(), listed.clone())], element_type);
    }
}

/// Passes by lists that the device made of the masks give what the masks alone give.
#[test]
fn lists_of_masks_serve_every_pass() {
    let both = || case(2, [4, 2], [150, 170], [16, 12]);
    let lists = BlockLists::new().size(32, 32);
    // Whether query and key are of one document, as `documents` has them.
    let of_a_document = |i: usize, j: usize| i / 45 == j / 45;
    for (name, case, lists) in [
        ("a window", both().causal(BottomRight).window(40, -1), lists),
        ("lengths", both().seqlens(&[170, 33]).seqlens_q(&[20, 150]).causal(BottomRight), lists.per_batch()),
        ("documents", documents(both()), lists),
        ("documents, full blocks", documents(both()), lists.full_unmasked()),
        ("documents by a mask", both().mask_where(of_a_document), lists),
        ("documents by a mask, full blocks", both().mask_where(of_a_document), lists.full_unmasked()),
        ("lengths, shared lists", both().seqlens(&[170, 33]).seqlens_q(&[20, 150]), lists),
    ] {
        let named = [(name.to_string(), listed_by_masks(webgpu(), case, lists))];
        let ways = every_kernel(ElementType::F32, naive(), tile());
        check_all(&cases::prepare(named.clone(), ElementType::F32), &ways);
        let mut ways = every_kernel(ElementType::F32, backward(Kernel::Naive), backward(Kernel::Tile));
        // WebGPU's eight storage buffers are too few for the gradients of keys and values with lists and a buffer of mods.
        ways.retain(|(way, ..)| !name.starts_with("documents") || !way.contains("WebGPU"));
        ways.push(("two kernels", full(), two_kernels()));
        backward::check_all(&backward::prepare(named, ElementType::F32, Ask::default()), &ways);
    }
}

/// One encoder makes the lists and runs two layers with them. Nothing comes to the host in between.
#[test]
fn lists_are_made_and_used_in_one_encoder() {
    let context = webgpu();
    let problem =
        Problem::new(Shape::square(1, 2, 150, 16), ElementType::F32).causal(BottomRight).window(Some(40), None);
    let listed = problem.clone().with_blocks(BlockLists::new().size(32, 32));
    let tensors = [1, 2, 3].map(|seed| flash_attention_testing::buffers::random::<f32>(2 * 150 * 16, seed));
    let [q, k, v] = tensors.each_ref().map(|x| context.upload(bytemuck::cast_slice(x)).unwrap());
    let outs = [0, 1].map(|_| context.upload(&[0xff; 2 * 150 * 16 * 4]).unwrap());
    let of_lists = context.plan_blocks(&listed, BlockSource::Masks).unwrap();
    let blocks = of_lists.create_buffer().unwrap();
    let mut encoder = context.device().create_command_encoder(&Default::default());
    of_lists.record(&mut encoder, &BlockBuffers::new(&blocks)).unwrap();
    for (options, out) in [naive(), tile()].into_iter().zip(&outs) {
        let plan = context.plan_with(&listed, &options).unwrap();
        let workspace = plan.create_workspace().unwrap();
        let buffers = ForwardBuffers::new(&q, &k, &v, out).blocks(&blocks).workspace(workspace.as_ref());
        plan.forward(&mut encoder, &buffers).unwrap();
    }
    context.queue().submit([encoder.finish()]);
    let [q, k, v] = &tensors;
    let expected = reference::forward(&problem, q, k, v, None).out;
    for out in &outs {
        let found: Vec<f32> = bytemuck::pod_collect_to_vec(&context.download(out, 0, 2 * 150 * 16 * 4).unwrap());
        assert!(found.iter().zip(&expected).all(|(&x, y)| (f64::from(x) - y).abs() < 1e-5));
    }
}

/// Block lists together with what else is given of scores.
#[test]
fn with_bias_mask_slopes_and_sinks() {
    let lists = BlockLists::new().size(32, 32).per_batch().per_head();
    let both = || case(2, [4, 2], [110, 150], [16, 12]);
    let cases = vec![
        listed("boolean mask", both().mask([2, 4, 110, 150]).causal(BottomRight), lists, 60),
        listed("bias", both().bias([1, 4, 110, 150]), lists, 60),
        listed("slopes and sinks", both().alibi(Alibi::PerHead).sinks().causal(BottomRight), lists, 60),
    ];
    let ways = every_kernel(ElementType::F32, naive(), tile());
    check_all(&cases::prepare(cases.clone(), ElementType::F32), &ways);
    // WebGPU's eight storage buffers are too few for the gradients of keys and values with both.
    let ways = [("naive", full(), backward(Kernel::Naive)), ("tile", full(), backward(Kernel::Tile))];
    backward::check_all(&backward::prepare(cases.clone(), ElementType::F32, Ask::default()), &ways);
    let problem = cases[1].1.problem.clone().with_gradients();
    let error = webgpu().plan_with(&problem, &backward(Kernel::Tile)).unwrap_err();
    assert!(matches!(error, Error::StorageBuffers { .. }), "{error}");
    assert!(error.to_string().contains("bias") && error.to_string().contains("blocks"), "{error}");
}

/// The kernel finds the blocks that a look at every score finds.
#[test]
fn blocks_of_masks_are_found() {
    let context = webgpu();
    let both = || case(2, [4, 2], [150, 170], [16, 12]);
    let lists = BlockLists::new().size(32, 16);
    // Head h sees the first 40 h keys.
    const BY_HEAD: &str = "fn mask_mod(at: Position) -> bool { return at.j < 40u * at.h; }";
    let cases = [
        (both(), lists),
        (both().causal(BottomRight), lists.per_head()),
        (both().causal(TopLeft).window(40, -1), lists),
        (both().window(20, 30), lists.size(50, 7)),
        (both().seqlens(&[170, 33]).seqlens_q(&[20, 150]).causal(BottomRight), lists.per_batch()),
        // Shared lists have what either batch entry needs.
        (both().seqlens(&[170, 33]).seqlens_q(&[20, 150]).causal(BottomRight), lists),
        (both().seqlens(&[0, 0]), lists.per_batch().per_head()),
        (both().mask([2, 4, 150, 170]), lists.size(2, 3).per_batch().per_head()),
        (both().mask([1, 4, 1, 170]).causal(BottomRight), lists.size(2, 3)),
        (both().mask([1, 4, 150, 170]), lists.size(2, 3).per_head()),
        (both().mask([2, 1, 150, 170]), lists.size(2, 3).per_batch()),
        (both().mods(BY_HEAD, &[] as &[(&str, &[u32])]), lists.per_head()),
        (both().mods(BY_HEAD, &[] as &[(&str, &[u32])]), lists.per_batch()),
        // Sizes whose products, and ends, u32 does not hold.
        (both(), lists.size(65_536, 65_536)),
        (both().window(20, 30), lists.size(16, 1 << 29)),
        (both().window(20, 30), lists.size(1 << 29, 16)),
        (both().causal(BottomRight), lists.size(1 << 29, 1 << 29).per_head()),
        (
            both().mask_at(ScoreLayout { offset: 5, ..ScoreLayout::contiguous([2, 1, 150, 1]) }),
            lists.size(3, 2).per_batch(),
        ),
    ];
    for (mut case, lists) in cases {
        case.problem = case.problem.with_blocks(lists);
        let (problem, extras) = (&case.problem, case.extras.borrow());
        let s = problem.shape;
        let [batch, heads, down, across] = problem.block_counts();
        let counts = |[b, h, i, j]: [u32; 4]| {
            let (queries, keys) = extras.lengths(problem, b);
            let (first, end) = problem.key_interval_of(i, queries, keys);
            let given = || match (problem.mask, extras.mask) {
                (Some(layout), Some(mask)) => mask[layout.place([b, h, i, j]) as usize],
                _ => true,
            };
            let by_head = problem.mods.is_none() || j < 40 * h;
            i < s.seqlen_q && (first..end).contains(&j) && given() && by_head
        };
        let mut kinds = vec![];
        for list in 0..batch * heads {
            let batches = if lists.per_batch { list / heads..list / heads + 1 } else { 0..s.batch };
            let of_list = if lists.per_head { list % heads..list % heads + 1 } else { 0..s.heads_q };
            for (r, c) in (0..down).flat_map(|r| (0..across).map(move |c| (r, c))) {
                let mut all = vec![];
                for (b, h) in batches.clone().flat_map(|b| of_list.clone().map(move |h| (b, h))) {
                    for i in r * lists.queries..((r + 1) * lists.queries).min(s.seqlen_q + 1) {
                        // One past the end stands for all that a block lacks.
                        let end = ((c + 1) * lists.keys).min(s.seqlen_k + 1);
                        all.extend((c * lists.keys..end).map(|j| counts([b, h, i, j])));
                    }
                }
                kinds.push(all.contains(&true) as u8 + all.iter().all(|&counts| counts) as u8);
            }
        }
        let expected = BlockMask::from_lists(problem, &HostLists::of(&kinds, across).borrow()).unwrap();
        assert!(of_masks(context, &case) == expected.bytes(), "{problem:?}");
    }
    let bounded = both().problem.with_blocks(lists.columns(2));
    assert_eq!(context.plan_blocks(&bounded, BlockSource::Masks).unwrap_err(), Error::BlockColumns(2));
    let long =
        Problem::new(Shape::square(1, 1, 1 << 20, 8), ElementType::F32).with_blocks(BlockLists::new().size(32, 32));
    for source in [BlockSource::Masks, BlockSource::Lists { full: true }] {
        let error = context.plan_blocks(&long, source).unwrap_err();
        assert!(matches!(error, Error::BindingTooLarge { argument: "blocks", .. }), "{error}");
    }
    let without = context.plan_blocks(&both().problem, BlockSource::Masks).unwrap_err();
    assert_eq!(without, Error::BlocksMissing);
}

/// A boolean mask that no binding holds is an error of the plan; lists that are not made from it do not mind.
#[test]
fn masks_that_no_binding_holds_are_refused() {
    let layout = ScoreLayout::contiguous([1, 1, 16_384, 16_384]);
    let shape = Shape::square(1, 1, 16_384, 8);
    let problem = Problem::new(shape, ElementType::F32).with_mask(layout).with_blocks(BlockLists::new());
    let limit = webgpu().device().limits().max_storage_buffer_binding_size;
    let error = webgpu().plan_blocks(&problem, BlockSource::Masks).unwrap_err();
    assert_eq!(error, Error::BindingTooLarge { argument: "mask", bytes: 1 << 28, limit });
    assert!(webgpu().plan_blocks(&problem, BlockSource::Lists { full: true }).is_ok());
}

/// What a `score_mod` alone reads is not bound, since it does not say which scores count.
#[test]
fn buffers_of_a_score_mod_alone_are_not_asked_for() {
    const WEIGHTS: &str = "var<storage, read> weight: array<f32>;
        fn score_mod(score: f32, at: Position) -> f32 { return score + weight[at.j]; }";
    let weights = [0.5f32; 170];
    let mut case = case(2, [4, 2], [150, 170], [16, 12]).causal(BottomRight);
    case.problem = case.problem.with_blocks(BlockLists::new().size(32, 32));
    let plain = of_masks(webgpu(), &case);
    let mut with_mod = case.mods(WEIGHTS, &[("weight", &weights)]);
    with_mod.extras.mod_buffers.clear();
    assert!(of_masks(webgpu(), &with_mod) == plain);
}

/// Lists of fewer columns than there are blocks, as FlexAttention's compact ones.
#[test]
fn compact_lists() {
    let lists = BlockLists::new().size(32, 32).columns(2);
    let mut case = case(1, [2, 1], [150, 170], [16, 12]).causal(BottomRight);
    case.problem = case.problem.with_blocks(lists);
    let [.., down, across] = case.problem.block_counts();
    let pattern = BlockPattern::local(down, across, 1, 0);
    let mask = BlockMask::from_dense(&case.problem, pattern.listed()).unwrap();
    let whole = case.problem.clone().with_blocks(lists.columns(across)).blocks_bytes();
    assert!(mask.bytes().len() < whole as usize);
    case.extras.blocks = Some((pattern.listed().to_vec(), mask));
    let named = [("compact".to_string(), case)];
    check_all(&cases::prepare(named.clone(), ElementType::F32), &every_kernel(ElementType::F32, naive(), tile()));
    let ways = every_kernel(ElementType::F32, backward(Kernel::Naive), backward(Kernel::Tile));
    backward::check_all(&backward::prepare(named, ElementType::F32, Ask::default()), &ways);
}
