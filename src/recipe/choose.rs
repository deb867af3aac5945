//! How a problem is computed, forward and backward.

use super::candidate::Recipe;
use super::{backward, forward};
use crate::error::Error;
use crate::facts::Facts;
use crate::kernel::{Pass, check_limits};
use crate::names::{ElementType, Kernel};
use crate::options::PlanOptions;
use crate::problem::Problem;

/// How a problem is computed, forward and, if it has gradients, backward.
pub(crate) struct Recipes {
    pub forward: Recipe,
    pub backward: Option<Recipe>,
}

/// How a problem is computed on a device that allows this.
pub(crate) fn recipes(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Recipes, Error> {
    problem.validate()?;
    let specialized = |recipe: Recipe| {
        let passes = recipe.passes.into_iter();
        let specialized =
            |pass: Pass| pass.with_mods(problem.mods.as_ref()).with_blocks(problem.blocks).with_int64(facts.int64);
        Recipe { passes: passes.map(specialized).collect(), ..recipe }
    };
    let forward = specialized(forward::recipe(problem, facts, options)?);
    let backward = match problem.gradients {
        Some(_) => Some(specialized(backward::recipe(problem, facts, options, forward.kernel)?)),
        None => None,
    };
    check_options(options, problem.element_type, &forward, backward.as_ref())?;
    for recipe in backward.iter().chain([&forward]) {
        check_limits(recipe.kernel, &recipe.passes, &facts.limits)?;
    }
    Ok(Recipes { forward, backward })
}

/// An error if an option is for a kernel that is not taken, or for another element type.
fn check_options(
    options: &PlanOptions,
    element_type: ElementType,
    forward: &Recipe,
    backward: Option<&Recipe>,
) -> Result<(), Error> {
    if options.scaled_bf16 && element_type != ElementType::BF16 {
        let (needs, found) = (ElementType::BF16, element_type);
        return Err(Error::OptionElementType { option: "scaled_bf16", needs, found });
    }
    let taken = |recipe: &Recipe| (recipe.kernel, recipe.reason);
    let forward = taken(forward);
    let backward = backward.map(taken);
    let unused = |option, needs, backward, taken| Err(Error::OptionUnused { option, needs, backward, taken });
    let of_a_kernel = [
        ("splits", options.splits.is_some(), Kernel::Decode, false),
        ("decode_tile", options.decode_tile.is_some(), Kernel::Decode, false),
        ("tile", options.tile.is_some(), Kernel::Tile, false),
        ("coop_tile", options.coop_tile.is_some(), Kernel::Coop, false),
        ("backward_tile", options.backward_tile.is_some(), Kernel::Tile, true),
        ("fused_tile", options.fused_tile.is_some(), Kernel::Tile, true),
        ("coop_backward_tiles", options.coop_backward_tiles.is_some(), Kernel::Coop, true),
    ];
    for (option, given, needs, of_backward) in of_a_kernel {
        let taken = if of_backward { backward } else { Some(forward) };
        if given && taken.is_none_or(|(kernel, _)| kernel != needs) {
            return unused(option, needs, of_backward, taken);
        }
    }
    let takes_coop = [Some(forward), backward].iter().flatten().any(|(kernel, _)| *kernel == Kernel::Coop);
    for (option, given) in [("coop_form", options.coop_form.is_some()), ("scaled_bf16", options.scaled_bf16)] {
        if given && !takes_coop {
            return unused(option, Kernel::Coop, false, Some(forward));
        }
    }
    if options.fused_tile.is_some() && options.backward_tile.is_some() {
        return Err(Error::OptionsExclude { option: "fused_tile", other: "backward_tile" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrices::{MatrixFormat, MatrixLayout, Rounding};
    use crate::names::CoopForm;
    use crate::problem::{Causal, Shape};
    use crate::tune::{self, BackwardTile, CoopBackwardTile, CoopTile, DecodeTile, FusedTile, Tile};

    const FORMAT: MatrixFormat = MatrixFormat { size: 16, lanes: 32 };

    /// What a GPU allows, in this respect.
    fn large() -> Facts {
        Facts::with_limits(wgpu::Limits {
            max_compute_workgroup_storage_size: 48 << 10,
            max_compute_invocations_per_workgroup: 1024,
            max_compute_workgroup_size_x: 1024,
            ..Default::default()
        })
    }

    /// One with cooperative matrices, whose elements may be accessed.
    fn matrices() -> Facts {
        large().matrices(FORMAT, Some(MatrixLayout::rows(FORMAT)))
    }

    /// One with cooperative matrices of which nobody knows where the elements are.
    fn no_access() -> Facts {
        large().matrices(FORMAT, None)
    }

    fn problem(element_type: ElementType, head_dim: u32) -> Problem {
        Problem::new(Shape::square(2, 8, 512, head_dim), element_type)
    }

    /// Kernels and reasons, forward and backward.
    fn chosen(problem: &Problem, facts: &Facts, options: PlanOptions) -> Vec<(Kernel, &'static str)> {
        let Recipes { forward, backward } = recipes(problem, facts, &options).unwrap();
        [Some(forward), backward].into_iter().flatten().map(|recipe| (recipe.kernel, recipe.reason)).collect()
    }

    /// The choice by what a device allows, with a word of the reason, without a device.
    #[test]
    fn kernels_by_problem_and_facts() {
        use ElementType::{BF16, F16, F32};
        let webgpu = Facts::with_limits(wgpu::Limits::default());
        let short = Problem::new(Shape::square(50, 2, 8, 64), F32);
        let few = |element_type| {
            let shape = Shape { seqlen_q: 1, seqlen_k: 4096, ..Shape::square(1, 8, 1, 128) };
            Problem::new(shape, element_type)
        };
        let some = |element_type, batch, seqlen_q| {
            let shape = Shape { heads_kv: 8, seqlen_k: 4096, ..Shape::square(batch, 32, seqlen_q, 128) };
            Problem::new(shape, element_type)
        };
        let lone = |seqlen_q| Problem::new(Shape { seqlen_k: 4096, ..Shape::square(1, 1, seqlen_q, 128) }, F32);
        let mut ends_loops = webgpu.clone();
        ends_loops.loop_iterations = Some(65_535);
        let long = Problem::new(Shape::square(1, 1, 100_000, 64), F32);
        let odd = Problem::new(Shape { head_dim: 66, ..Shape::square(2, 8, 512, 64) }, BF16);
        let with_bf16 = matrices().bf16_matrices(Rounding::Truncated);
        for (what, problem, facts, expected) in [
            ("any device", problem(F32, 64), &webgpu, vec![(Kernel::Tile, "every device")]),
            ("a GPU without matrices", problem(F16, 64), &large(), vec![(Kernel::Tile, "every device")]),
            ("short, forward alone", short.clone(), &webgpu, vec![(Kernel::Decode, "few queries")]),
            ("short", short.with_gradients(), &matrices(), vec![(Kernel::Naive, "short"), (Kernel::Naive, "short")]),
            ("few queries", few(F32), &webgpu, vec![(Kernel::Decode, "few queries")]),
            (
                "few queries with gradients in f32",
                few(F32).with_gradients(),
                &webgpu,
                vec![(Kernel::Tile, "every device"), (Kernel::Tile, "every device")],
            ),
            ("8 queries", some(F16, 16, 8), &matrices(), vec![(Kernel::Decode, "few queries")]),
            ("9 queries", some(F16, 16, 9), &matrices(), vec![(Kernel::Coop, "f16")]),
            ("16 queries of few heads", some(F16, 2, 16), &matrices(), vec![(Kernel::Decode, "few queries")]),
            ("17 queries", some(F16, 1, 17), &matrices(), vec![(Kernel::Coop, "f16")]),
            ("16 queries of 3 batch entries", some(F16, 3, 16), &matrices(), vec![(Kernel::Coop, "f16")]),
            ("16 queries without matrices", some(F16, 16, 16), &large(), vec![(Kernel::Decode, "few queries")]),
            ("17 queries of one head", lone(17), &matrices(), vec![(Kernel::Coop, "two parts")]),
            ("16 queries in f32", some(F32, 16, 16), &matrices(), vec![(Kernel::Decode, "few queries")]),
            ("loops that end", long.clone(), &ends_loops, vec![(Kernel::Decode, "long loops")]),
            ("f16", problem(F16, 128), &matrices(), vec![(Kernel::Coop, "f16")]),
            ("bf16", problem(BF16, 128), &matrices(), vec![(Kernel::Coop, "scaled to f16")]),
            ("matrices of bf16", problem(BF16, 128), &with_bf16, vec![(Kernel::Coop, "matrices for bf16")]),
            ("f32", problem(F32, 128), &matrices(), vec![(Kernel::Coop, "two parts")]),
            ("wide f32", problem(F32, 136), &matrices(), vec![(Kernel::Tile, "registers")]),
            ("f32 without access", problem(F32, 64), &no_access(), vec![(Kernel::Tile, "f16 only")]),
            (
                "f16 without access",
                problem(F16, 64).causal(Causal::BottomRight).with_gradients(),
                &no_access(),
                vec![(Kernel::Coop, "f16"), (Kernel::Coop, "f16")],
            ),
            (
                "wide bf16",
                problem(BF16, 200).with_gradients(),
                &matrices(),
                vec![(Kernel::Coop, "scaled"), (Kernel::Tile, "no figures")],
            ),
            (
                "wide, on matrices of bf16",
                problem(BF16, 200).with_gradients(),
                &with_bf16,
                vec![(Kernel::Coop, "for bf16"), (Kernel::Coop, "for bf16")],
            ),
            (
                "odd, on matrices of bf16",
                odd.clone().with_gradients(),
                &with_bf16,
                vec![(Kernel::Coop, "for bf16"), (Kernel::Coop, "for bf16")],
            ),
            (
                "odd bf16",
                odd.with_gradients(),
                &matrices(),
                vec![(Kernel::Coop, "scaled"), (Kernel::Tile, "multiples of 4")],
            ),
            (
                "small limits",
                problem(F16, 256),
                &Facts::with_limits(wgpu::Limits::default()).matrices(FORMAT, None),
                vec![(Kernel::Tile, "limits are too small")],
            ),
        ] {
            let found = chosen(&problem, facts, PlanOptions::default());
            let same = found.len() == expected.len()
                && found.iter().zip(&expected).all(|((k, why), (kernel, word))| k == kernel && why.contains(word));
            assert!(same, "{what}: {found:?}, not {expected:?}");
        }
        // From how many keys on it pays, by queries that share a key-value head with three others each.
        for (seqlen_q, from) in [(1, 96), (2, 160), (4, 192), (16, 192)] {
            let taken = |seqlen_k| {
                let shape = Shape { heads_kv: 2, seqlen_k, ..Shape::square(1, 8, seqlen_q, 128) };
                chosen(&Problem::new(shape, F16), &matrices(), PlanOptions::default())[0].0
            };
            assert_eq!([from - 1, from].map(taken), [Kernel::Coop, Kernel::Decode], "{seqlen_q} queries");
        }
        // Asked for.
        let scaled = chosen(&problem(BF16, 64).with_gradients(), &with_bf16, PlanOptions::default().scaled_bf16(true));
        assert!(scaled.iter().all(|(kernel, why)| *kernel == Kernel::Coop && why.contains("scaled")), "{scaled:?}");
        let of_f16 = recipes(&problem(F16, 64), &with_bf16, &PlanOptions::default().scaled_bf16(true)).err();
        assert!(matches!(of_f16, Some(Error::OptionElementType { found: F16, .. })), "{of_f16:?}");
        let options = PlanOptions::default().kernel(Kernel::Naive).backward(Kernel::Tile);
        let found = chosen(&problem(F16, 64).with_gradients(), &matrices(), options);
        assert_eq!(found, [(Kernel::Naive, "asked for"), (Kernel::Tile, "asked for")]);
        // The driver ends the loops of the kernel that is asked for.
        let error = recipes(&long, &ends_loops, &PlanOptions::default().kernel(Kernel::Tile)).err();
        assert!(matches!(error, Some(Error::DriverLoops { kernel: Kernel::Tile, .. })), "{error:?}");
    }

    /// Each option where the plan takes another kernel is an error that names the option, that kernel and the remedy; where the plan
    /// takes its kernel it is none.
    #[test]
    fn options_for_kernels_that_are_not_taken_are_errors() {
        let limits = large().limits;
        let tile: Tile = tune::tile(64, 64, &limits);
        let decode_tile: DecodeTile = tune::decode_tile(8, 64, 64, 2, None, &limits);
        let coop_tile: CoopTile = tune::coop_tile(CoopForm::Registers, 16, 64, 64);
        let [backward_tile, _]: [BackwardTile; 2] = tune::backward_tiles(64, 64, &limits);
        let fused_tile: FusedTile = tune::fused_tile(&Shape::square(4, 16, 4096, 64), false, &limits).unwrap();
        let coop_tiles: [CoopBackwardTile; 2] = tune::coop_backward_tiles(CoopForm::Registers, 16, 64, 64);
        let options = PlanOptions::default;
        let naive = options().kernel(Kernel::Naive).backward(Kernel::Naive);
        let (forward, f32) = (problem(ElementType::F16, 64), problem(ElementType::F32, 64));
        let both = forward.clone().with_gradients();
        type Set = fn(PlanOptions, [Kernel; 2]) -> PlanOptions;
        let asked: Set = |options, [kernel, backward]| options.kernel(kernel).backward(backward);
        for (option, given, needs, of_backward) in [
            ("splits", options().splits(3), Kernel::Decode, false),
            ("decode_tile", options().decode_tile(decode_tile), Kernel::Decode, false),
            ("tile", options().tile(tile), Kernel::Tile, false),
            ("coop_tile", options().coop_tile(coop_tile), Kernel::Coop, false),
            ("coop_form", options().coop_form(CoopForm::Registers), Kernel::Coop, false),
            ("scaled_bf16", options().scaled_bf16(true), Kernel::Coop, false),
            ("backward_tile", options().backward_tile(backward_tile), Kernel::Tile, true),
            ("fused_tile", options().fused_tile(fused_tile), Kernel::Tile, true),
            ("coop_backward_tiles", options().coop_backward_tiles(coop_tiles), Kernel::Coop, true),
        ] {
            let problem = match option {
                "fused_tile" => f32.clone().with_gradients(),
                "scaled_bf16" => problem(ElementType::BF16, 64).with_gradients(),
                _ => both.clone(),
            };
            let error = recipes(&problem, &matrices(), &asked(given, [Kernel::Naive; 2])).err().unwrap();
            let taken = Some((Kernel::Naive, "asked for"));
            assert_eq!(error, Error::OptionUnused { option, needs, backward: of_backward, taken });
            let method = if of_backward { "PlanOptions::backward" } else { "PlanOptions::kernel" };
            let text = error.to_string();
            for words in [format!("PlanOptions::{option}"), format!("{needs} kernel"), "naive".into(), method.into()] {
                assert!(text.contains(&words), "{text:?} does not say {words:?}");
            }
            let kernels = if of_backward { [Kernel::Naive, needs] } else { [needs, Kernel::Naive] };
            let taken = recipes(&problem, &matrices(), &asked(given, kernels)).err();
            assert_eq!(taken, None, "{option}");
            if of_backward {
                let error = recipes(&forward, &matrices(), &given).err().unwrap();
                assert_eq!(error, Error::OptionUnused { option, needs, backward: true, taken: None });
                assert!(error.to_string().contains("Problem::with_gradients"), "{error}");
            }
        }
        // A kernel that the plan chooses by itself, and why, are in the words.
        let error = recipes(&f32, &large(), &options().splits(3)).err().unwrap().to_string();
        assert!(error.contains("takes the tile kernel (it runs on every device"), "{error}");
        // The form of either pass.
        let coop = options().kernel(Kernel::Naive).backward(Kernel::Coop).coop_form(CoopForm::WorkgroupMemory);
        assert!(recipes(&both, &matrices(), &coop).is_ok());
        let exclude = naive.backward(Kernel::Tile).backward_tile(backward_tile).fused_tile(fused_tile);
        let error = recipes(&f32.with_gradients(), &matrices(), &exclude).err();
        assert!(matches!(error, Some(Error::OptionsExclude { .. })), "{error:?}");
    }

    /// A kernel that a plan prefers is not taken where limits are too small for it; a tile that was asked for and is wrong is the error.
    #[test]
    fn what_does_not_fit_is_not_preferred() {
        let few = Problem::new(Shape { seqlen_q: 1, heads_kv: 1, ..Shape::square(2, 4, 9, 64) }, ElementType::F32);
        let small = Facts::with_limits(wgpu::Limits::downlevel_defaults());
        assert_eq!(chosen(&few, &small, PlanOptions::default())[0].0, Kernel::Tile);
        assert_eq!(chosen(&few, &large(), PlanOptions::default())[0].0, Kernel::Decode);

        let wrong = CoopTile::new(4, 1, 33, 1);
        let error =
            recipes(&problem(ElementType::F16, 64), &matrices(), &PlanOptions::default().coop_tile(wrong)).err();
        assert!(matches!(error, Some(Error::Tile(_))), "{error:?}");
    }

    /// The kernel of the backward pass may be asked for of any problem.
    #[test]
    fn a_kernel_of_the_backward_pass_is_asked_for_in_advance() {
        let options = PlanOptions::default().backward(Kernel::Tile);
        assert_eq!(chosen(&problem(ElementType::F16, 64), &matrices(), options).len(), 1);
    }
}
