//! The kernel of the forward pass.

use super::candidate::{
    ANYWHERE, Candidate, Recipe, SHORT_SEQUENCES, Workspaces, block, check_blocks, first, with_room,
};
use super::coop::{self, Coop};
use crate::error::Error;
use crate::facts::Facts;
use crate::kernel::{Cut, Part, Slot, check_limits, decode, dropout_bytes, forward_coop_scaled, forward_tile, naive};
use crate::loops;
use crate::names::{ElementType, Kernel};
use crate::options::PlanOptions;
use crate::problem::Problem;
use crate::tune::{self, Tile};

/// In the order in which a plan prefers them.
fn candidates(problem: &Problem, facts: &Facts, options: &PlanOptions, coop: &Result<Coop, Error>) -> Vec<Candidate> {
    let not_coop = coop::refusal(problem, facts, options, coop, too_wide(problem));
    let many_queries = if not_coop.is_none() { Kernel::Coop } else { Kernel::Tile };
    let is_scaled = coop::is_scaled(problem, facts, options);
    let tile = tile_of(problem, facts, options);
    let loops_end = tile.validate().is_ok() && tile_loops(problem, facts, tile).is_err();
    let has_dropout = problem.dropout_in_use().is_some();
    let candidate = |kernel, takes, reason| Candidate { kernel, takes, reason };
    vec![
        candidate(Kernel::Naive, options.backward.is_none() && naive::suits(problem), SHORT_SEQUENCES),
        candidate(
            Kernel::Decode,
            !has_dropout && decode::pays(problem, many_queries, is_scaled) && decode_fits(problem, facts, options),
            "few queries: tiles of few rows, and splits of the keys where there is room",
        ),
        candidate(Kernel::Coop, not_coop.is_none(), coop::reason(problem, facts, options)),
        candidate(
            Kernel::Decode,
            !has_dropout && problem.gradients.is_none() && loops_end && decode_fits(problem, facts, options),
            "the driver ends long loops: splits of the keys make them shorter",
        ),
        candidate(Kernel::Tile, true, not_coop.unwrap_or(ANYWHERE)),
    ]
}

/// Whether the device's limits are large enough for the decode kernel. With a tile or splits that were asked for the plan takes it, and with it
/// the error that says what is wrong.
fn decode_fits(problem: &Problem, facts: &Facts, options: &PlanOptions) -> bool {
    let fits = |recipe: Recipe| check_limits(Kernel::Decode, &recipe.passes, &facts.limits).is_ok();
    problem.blocks.is_none() && (options.decode_tile.is_some() || options.splits.is_some())
        || of_decode(problem, facts, options).is_ok_and(fits)
}

/// Why the coop kernel is not for rows of this problem, if it is not.
fn too_wide(problem: &Problem) -> Option<&'static str> {
    let wide = problem.shape.head_dim.max(problem.shape.head_dim_v) > 128;
    (wide && problem.element_type == ElementType::F32)
        .then_some("registers do not hold the rows of the coop kernel in f32 at this head dim")
}

fn tile_of(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Tile {
    let (shape, block) = (&problem.shape, block(problem));
    let table = |limits: &_| tune::tile_in_blocks(shape.head_dim, shape.head_dim_v, limits, block);
    let used = |tile: &Tile| tile.workgroup_bytes(shape.head_dim_v);
    let dropout = |tile: &Tile| dropout_bytes(problem, tile.rows, tile.keys, tile.threads());
    options.tile.unwrap_or_else(|| with_room(&facts.limits, table, used, dropout))
}

/// An error if the driver ends the tile kernel's loops.
fn tile_loops(problem: &Problem, facts: &Facts, tile: Tile) -> Result<(), Error> {
    loops::check(facts.loop_iterations, Kernel::Tile, loops::of_tile(problem, tile))
}

/// How the forward pass of a problem is computed.
pub(super) fn recipe(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Recipe, Error> {
    let coop = coop::forward(problem, facts, options);
    let (kernel, reason) = first(options.kernel, || candidates(problem, facts, options, &coop));
    let recipe = match kernel {
        Kernel::Coop => of_coop(problem, coop?),
        Kernel::Decode => of_decode(problem, facts, options)?,
        Kernel::Naive => of_naive(problem, facts)?,
        Kernel::Tile => of_tile(problem, facts, options)?,
    };
    Ok(Recipe { reason, ..recipe })
}

/// Without a workspace, to be cut between rows that are multiples of `rows`.
fn plain(kernel: Kernel, rows: u32) -> Recipe {
    Recipe {
        kernel,
        reason: "",
        coop_form: None,
        vector: 4,
        passes: vec![],
        workspaces: Box::new(|_| vec![]),
        cut: Cut::HeadsAndRows(rows),
        splits: None,
        tile: None,
        rows_and_keys: None,
    }
}

fn of_coop(problem: &Problem, coop: Coop) -> Recipe {
    let rows = coop.rows_and_keys.map_or(problem.shape.seqlen_q, |(rows, _)| rows);
    let workspaces: Workspaces = match coop.scaled {
        false => Box::new(|_| vec![]),
        true => {
            let problem = problem.clone();
            Box::new(move |part: &Part| {
                vec![
                    (Slot::Workspace, forward_coop_scaled::workspace_bytes(&problem, part)),
                    (Slot::WorkspaceSizes, forward_coop_scaled::sizes_bytes(&problem, part)),
                ]
            })
        }
    };
    Recipe {
        vector: coop.vector(),
        coop_form: Some((coop.form, coop.why)),
        passes: coop.passes,
        workspaces,
        rows_and_keys: coop.rows_and_keys,
        ..plain(Kernel::Coop, rows)
    }
}

fn of_decode(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Recipe, Error> {
    if problem.dropout_in_use().is_some() {
        let (kernel, element_type) = (Kernel::Decode, problem.element_type);
        return Err(Error::Unsupported { kernel, element_type, why: "it has no dropout; the other kernels do" });
    }
    if problem.blocks.is_some() {
        let why = "its tiles have rows of several heads, of which each has block lists of its own";
        return Err(Error::Unsupported { kernel: Kernel::Decode, element_type: problem.element_type, why });
    }
    let shape = &problem.shape;
    let limits = &facts.limits;
    let rows = shape.group() as u64 * shape.seqlen_q as u64;
    let tile = options.decode_tile.unwrap_or_else(|| {
        let bytes = problem.element_type.bytes();
        tune::decode_tile(rows, shape.head_dim, shape.head_dim_v, bytes, facts.lanes, limits)
    });
    tile.validate(shape.head_dim_v)?;
    if tile.lanes > facts.lanes.unwrap_or(0) {
        return Err(Error::Tile(
            "lanes must be at most those of the device's smallest subgroup, and 0 without Features::SUBGROUP",
        ));
    }
    let workgroups = shape.batch as u64 * shape.heads_kv as u64 * rows.div_ceil(tile.rows as u64);
    let tiles = problem.keys_in_sight().div_ceil(tile.keys()) as u64;
    let fewest = facts.loop_iterations.map_or(1, |granted| loops::splits(granted, problem, tile));
    let most = limits.max_compute_workgroups_per_dimension.max(1);
    let splits = match options.splits {
        Some(found) if !(1..=most).contains(&found) => return Err(Error::Splits { found, most }),
        Some(asked) => asked,
        None => tune::decode_splits(workgroups, tiles, tile.rows).max(fewest).clamp(1, most),
    };
    loops::check(facts.loop_iterations, Kernel::Decode, loops::of_decode(problem, tile, splits))?;
    let passes = decode::passes(problem, tile, splits);
    let problem = problem.clone();
    let workspaces = move |part: &Part| {
        let (out, stats) = decode::workspace_bytes(&problem, part, splits);
        vec![(Slot::Workspace, out), (Slot::WorkspaceStats, stats)]
    };
    Ok(Recipe {
        passes,
        workspaces: Box::new(workspaces),
        splits: Some(splits),
        rows_and_keys: Some((tile.rows, tile.keys())),
        ..plain(Kernel::Decode, 1)
    })
}

/// It keeps all scores of a head at once, as people write it.
fn of_naive(problem: &Problem, facts: &Facts) -> Result<Recipe, Error> {
    loops::check(facts.loop_iterations, Kernel::Naive, loops::of_naive(problem, false))?;
    let passes = naive::passes(problem);
    let rows = problem.shape.seqlen_q;
    let problem = problem.clone();
    let workspaces = move |part: &Part| vec![(Slot::Workspace, naive::workspace_bytes(&problem, part))];
    Ok(Recipe { passes, workspaces: Box::new(workspaces), ..plain(Kernel::Naive, rows) })
}

fn of_tile(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Recipe, Error> {
    let tile = tile_of(problem, facts, options);
    tile.validate()?;
    check_blocks(Kernel::Tile, problem, [tile.rows, tile.keys], false)?;
    tile_loops(problem, facts, tile)?;
    Ok(Recipe {
        passes: vec![forward_tile::pass(problem, tile)],
        tile: Some(tile),
        rows_and_keys: Some((tile.rows, tile.keys)),
        ..plain(Kernel::Tile, tile.rows)
    })
}
