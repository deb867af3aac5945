//! Problems that differ in the switches of a module, few enough to try all of them.
//!
//! All products of n switches are 2ⁿ problems. A fault that two switches make together shows in any problem that has both, so
//! that it is enough when each pair of switches is off and off, off and on, on and off, on and on somewhere: eight problems
//! for five switches, some dozen for twenty.

use wgpu_flash_attention::{Alibi, Bias, BlockLists, ElementType, Mods, Problem, ScoreLayout, Shape, Tensor};

/// Rows of switches, in which each pair of switches has each of its four values in some row.
///
/// A greedy covering array. Each row sets one switch after the other, to the value with which more pairs are new; ties are
/// decided by chance from a fixed seed. The first row has all switches off, the second all on.
pub fn pairwise(switches: usize) -> Vec<Vec<bool>> {
    let mut rows = vec![vec![false; switches], vec![true; switches]];
    let mut missing: Vec<Pair> = pairs(switches).filter(|pair| !rows.iter().any(|row| pair.is_in(row))).collect();
    let mut rng = fastrand::Rng::with_seed(1);
    while let Some(&first) = missing.first() {
        // The best of several rows that have the first missing pair, whichever else they have.
        let candidate = |_| {
            let mut row: Vec<Option<bool>> = vec![None; switches];
            first.switches.iter().zip(first.values).for_each(|(&switch, value)| row[switch] = Some(value));
            let mut order: Vec<usize> = (0..switches).collect();
            rng.shuffle(&mut order);
            for switch in order {
                if row[switch].is_none() {
                    let new = |value| {
                        let mut tried = row.clone();
                        tried[switch] = Some(value);
                        missing.iter().filter(|pair| pair.is_set_in(&tried)).count()
                    };
                    let (off, on) = (new(false), new(true));
                    row[switch] = Some(on > off || (on == off && rng.bool()));
                }
            }
            row.into_iter().flatten().collect::<Vec<bool>>()
        };
        let news = |row: &Vec<bool>| missing.iter().filter(|pair| pair.is_in(row)).count();
        let best = (0..20).map(candidate).max_by_key(news).unwrap_or_default();
        missing.retain(|pair| !pair.is_in(&best));
        rows.push(best);
    }
    rows
}

/// Two switches, and a value of each.
#[derive(Clone, Copy, Debug)]
struct Pair {
    switches: [usize; 2],
    values: [bool; 2],
}

impl Pair {
    fn is_in(&self, row: &[bool]) -> bool {
        self.switches.map(|switch| row[switch]) == self.values
    }

    fn is_set_in(&self, row: &[Option<bool>]) -> bool {
        self.switches.map(|switch| row[switch]) == self.values.map(Some)
    }
}

fn pairs(switches: usize) -> impl Iterator<Item = Pair> {
    let values = [[false, false], [false, true], [true, false], [true, true]];
    (0..switches)
        .flat_map(move |b| (0..b).map(move |a| [a, b]))
        .flat_map(move |switches| values.map(move |values| Pair { switches, values }))
}

/// What sets a switch of a problem's modules.
type Switch = fn(Problem) -> Problem;

/// The switches of both passes. A new one is a line here.
const BOTH: [Switch; 12] = [
    // Rows that do not lie in whole vectors.
    |problem| {
        let layout = problem.layout(Tensor::Query).at(1);
        problem.with_layout(Tensor::Query, layout)
    },
    |problem| problem.softcap(2.0),
    Problem::with_seqlens_k,
    Problem::with_seqlens_q,
    // A multiple of every tile of the tables and of the tests.
    |problem| problem.with_blocks(BlockLists::new().size(768, 768)),
    |problem| mods(problem, "fn score_mod(score: f32, at: Position) -> f32 { return score * tanh(f32(at.i)); }"),
    |problem| mods(problem, "fn mask_mod(at: Position) -> bool { return at.j % 3u != 1u; }"),
    |problem| {
        let s = problem.shape;
        let layout = ScoreLayout::contiguous([s.batch, s.heads_q, s.seqlen_q, s.seqlen_k]);
        problem.with_bias(Bias::new(ElementType::F32, layout))
    },
    |problem| {
        let s = problem.shape;
        problem.with_mask(ScoreLayout::contiguous([1, 1, s.seqlen_q, s.seqlen_k]))
    },
    |problem| problem.with_alibi(Alibi::PerHead),
    Problem::with_sinks,
    |problem| problem.with_dropout(0.25),
];

/// Adds functions of a user's to those that the problem has.
fn mods(problem: Problem, text: &str) -> Problem {
    let before = problem.mods.as_ref().map_or("", Mods::text);
    let all = Mods::parse(&(before.to_string() + text)).unwrap();
    problem.with_mods(all)
}

/// Those of a forward pass besides.
const FORWARD: [Switch; 1] = [Problem::with_lse];

/// Those of a backward pass besides, which has lse in any case.
const BACKWARD: [Switch; 2] = [Problem::with_grad_lse, Problem::accumulate];

/// Problems that have, pairwise, all switches of a forward pass. The first has none of them, the second has all.
pub fn switched(shape: Shape, element_type: ElementType) -> Vec<Problem> {
    all(Problem::new(shape, element_type), &[&BOTH[..], &FORWARD].concat())
}

/// Problems with gradients, likewise.
pub fn switched_with_gradients(shape: Shape, element_type: ElementType) -> Vec<Problem> {
    all(Problem::new(shape, element_type).with_gradients(), &[&BOTH[..], &BACKWARD].concat())
}

/// Those that the n-th of several shapes is tried with: with none and with all of the switches, and a third of the rest. Any three shapes 3n, 3n + 1 and
/// 3n + 2 have all thirds between them, and the next three in another order, so that no third goes with every third shape. Each pair of switches
/// meets some of the shapes, and each switch all of them, for half of the modules.
pub fn of_nth_shape(n: usize, switched: Vec<Problem>) -> Vec<Problem> {
    let taken = |row: usize| row < 2 || row % 3 == (n + n / 3) % 3;
    switched.into_iter().enumerate().filter(|(row, _)| taken(*row)).map(|(_, problem)| problem).collect()
}

fn all(problem: Problem, switches: &[Switch]) -> Vec<Problem> {
    let set = |row: Vec<bool>| {
        let on = switches.iter().zip(row).filter(|(_, on)| *on);
        on.fold(problem.clone(), |problem, (switch, _)| switch(problem))
    };
    pairwise(switches.len()).into_iter().map(set).collect()
}
