//! The kernel of the backward pass.

use super::candidate::{ANYWHERE, Candidate, Recipe, SHORT_SEQUENCES, block, check_blocks, first, with_room};
use super::coop::{self, Coop};
use crate::error::Error;
use crate::facts::Facts;
use crate::kernel::{
    Cut, Part, Pass, Slot, backward_delta, backward_fused, backward_naive, backward_scores, backward_tile,
    check_limits, forward_coop_scaled,
};
use crate::loops;
use crate::names::{ElementType, Kernel};
use crate::options::PlanOptions;
use crate::problem::Problem;
use crate::tune::{self, BackwardTile, FusedTile};

/// In the order in which a plan prefers them, after a forward pass by the kernel `forward`.
fn candidates(
    problem: &Problem,
    facts: &Facts,
    options: &PlanOptions,
    forward: Kernel,
    coop: &Result<Coop, Error>,
) -> Vec<Candidate> {
    let scaled = coop::is_scaled(problem, facts, options);
    let not_coop = coop::refusal(problem, facts, options, coop, not_measured(problem, scaled));
    let short = options.kernel.is_none() && forward == Kernel::Naive;
    let candidate = |kernel, takes, reason| Candidate { kernel, takes, reason };
    vec![
        candidate(Kernel::Naive, short, SHORT_SEQUENCES),
        candidate(Kernel::Coop, not_coop.is_none(), coop::reason(problem, facts, options)),
        candidate(Kernel::Tile, true, not_coop.unwrap_or(ANYWHERE)),
    ]
}

/// Why the coop kernel is not for rows of this problem, if it is not.
fn not_measured(problem: &Problem, scaled: bool) -> Option<&'static str> {
    let wide = problem.shape.head_dim.max(problem.shape.head_dim_v) > 128;
    if wide && scaled {
        return Some(
            "the coop kernel's backward pass in f32 and scaled bf16 has no figures above a head dim of 128: ask for it",
        );
    }
    (scaled && coop::in_single_bf16(problem))
        .then_some("the coop kernel's backward pass in bf16 takes rows that begin and end at multiples of 4 elements")
}

/// How the backward pass of a problem is computed, whose forward pass `forward` computes.
pub(super) fn recipe(
    problem: &Problem,
    facts: &Facts,
    options: &PlanOptions,
    forward: Kernel,
) -> Result<Recipe, Error> {
    let coop = coop::backward(problem, facts, options);
    let (kernel, reason) = first(options.backward, || candidates(problem, facts, options, forward, &coop));
    let (mut coop_form, mut has_ranges, mut vector) = (None, false, 4);
    let after_delta = |passes| {
        let mut all = vec![backward_delta::pass(problem, false)];
        all.extend::<Vec<Pass>>(passes);
        all
    };
    let mut passes = match kernel {
        Kernel::Coop => {
            let coop = coop?;
            (has_ranges, vector) = (coop.scaled, coop.vector());
            coop_form = Some((coop.form, coop.why));
            after_delta(coop.passes)
        }
        Kernel::Decode => {
            let why = "it has no backward pass";
            return Err(Error::Unsupported { kernel, element_type: problem.element_type, why });
        }
        Kernel::Naive => {
            loops::check(facts.loop_iterations, kernel, loops::of_naive(problem, true))?;
            after_delta(backward_naive::passes(problem))
        }
        Kernel::Tile => match fused_tile(problem, options, &facts.limits)? {
            Some(tile) => {
                loops::check(facts.loop_iterations, kernel, loops::of_fused(problem, tile))?;
                backward_fused::passes(problem, tile)
            }
            None => after_delta(two_kernels(problem, facts, options)?),
        },
    };
    // The kernel for gradients of what is added to scores has the two products of dq, and its tile.
    let [_, tile] = tiles_of(problem, &facts.limits);
    tile.validate()?;
    let of_heads = loops::of_head_gradients(problem, backward_scores::HEAD_THREADS);
    let mut on_matrices = None;
    if let (Some((_, why)), true) = (&mut coop_form, problem.gradients.is_some_and(|gradients| gradients.bias)) {
        match coop::bias_gradient(problem, facts, options) {
            Ok(pass) => {
                *why += "; the gradient of the bias on matrices, too";
                on_matrices = Some(pass);
            }
            Err(because) => *why += &format!("; the gradient of the bias in tiles of f32: {because}"),
        }
    }
    let of_scores = loops::of_score_gradients(problem, tile, on_matrices.is_none());
    loops::check(facts.loop_iterations, Kernel::Tile, of_scores.max(of_heads))?;
    passes.extend(backward_scores::passes(problem, tile, on_matrices));
    let problem = problem.clone();
    let workspaces = move |part: &Part| {
        let mut all = vec![(Slot::Workspace, backward_delta::workspace_bytes(&problem, part, has_ranges))];
        if has_ranges {
            all.push((Slot::WorkspaceSizes, forward_coop_scaled::sizes_bytes(&problem, part)));
        }
        if kernel == Kernel::Naive {
            all.push((Slot::WorkspaceScores, backward_naive::workspace_bytes(&problem, part)));
        }
        if problem.gradients.is_some_and(|gradients| gradients.alibi_slopes) {
            all.push((Slot::WorkspaceRowSums, backward_scores::row_sums_bytes(part)));
        }
        all
    };
    Ok(Recipe {
        kernel,
        reason,
        coop_form,
        vector,
        passes,
        workspaces: Box::new(workspaces),
        cut: Cut::Groups,
        splits: None,
        tile: None,
        rows_and_keys: None,
    })
}

/// The tiles for the gradients of keys and values and for that of queries, with room for dropout.
fn tiles_of(problem: &Problem, limits: &wgpu::Limits) -> [BackwardTile; 2] {
    let (head_dim, head_dim_v) = (problem.shape.head_dim, problem.shape.head_dim_v);
    let larger = |[a, b]: [u32; 2]| a.max(b);
    let used = |tiles: &[BackwardTile; 2]| larger(tiles.map(|tile| tile.workgroup_bytes(head_dim, head_dim_v)));
    let dropout = |&[dkdv, dq]: &[BackwardTile; 2]| larger(backward_tile::dropout_bytes_of(problem, dkdv, dq));
    let table = |limits: &_| tune::backward_tiles_in_blocks(head_dim, head_dim_v, limits, block(problem));
    with_room(limits, table, used, dropout)
}

/// The tile kernels, of which each computes the scores.
fn two_kernels(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Vec<Pass>, Error> {
    let [dkdv, dq] = match options.backward_tile {
        Some(tile) => [tile; 2],
        None => tiles_of(problem, &facts.limits),
    };
    dkdv.validate()?;
    dq.validate()?;
    for tile in [[dkdv.step, dkdv.own], [dq.own, dq.step]] {
        check_blocks(Kernel::Tile, problem, tile, true)?;
    }
    loops::check(facts.loop_iterations, Kernel::Tile, loops::of_backward_tiles(problem, [dkdv, dq]))?;
    Ok(backward_tile::passes(problem, dkdv, dq))
}

/// The tile of the kernel that computes all gradients at once, if that is the one: in f32 it adds them up in place.
fn fused_tile(problem: &Problem, options: &PlanOptions, limits: &wgpu::Limits) -> Result<Option<FusedTile>, Error> {
    let is_f32 = problem.element_type == ElementType::F32;
    // Without queries there is no gradient of them to bind.
    let has_queries = problem.shape.seqlen_q > 0;
    if let Some(tile) = options.fused_tile {
        tile.validate()?;
        if problem.blocks.is_some() {
            return Err(Error::Unsupported {
                kernel: Kernel::Tile,
                element_type: problem.element_type,
                why: "all gradients at once are not computed by block lists",
            });
        }
        if !is_f32 {
            return Err(Error::Unsupported {
                kernel: Kernel::Tile,
                element_type: problem.element_type,
                why: "all gradients at once are computed in f32 only",
            });
        }
        if tile.rounds(problem.shape.seqlen_q, problem.shape.seqlen_k) > tune::MOST_ROUNDS {
            return Err(Error::Tile(
                "block_keys and block_rows must be so large that there are at most 65,536 of each",
            ));
        }
        return Ok(has_queries.then_some(tile));
    }
    // A window that moves along leaves most blocks of a round empty, and so may block lists.
    let leaves_blocks_empty = problem.window_left.is_some() || problem.blocks.is_some();
    if options.backward_tile.is_some() || !is_f32 || !has_queries || leaves_blocks_empty {
        return Ok(None);
    }
    let fits = |tile: &FusedTile| check_limits(Kernel::Tile, &backward_fused::passes(problem, *tile), limits).is_ok();
    Ok(tune::fused_tile(&problem.shape, problem.rows_grow(), limits).filter(fits))
}
