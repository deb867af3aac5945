//! What the tests of shaders stand on: that few problems have every pair of switches.

use flash_attention_testing::switches::{pairwise, switched, switched_with_gradients};
use wgpu_flash_attention::{ElementType, Problem, Shape, Tensor};

#[test]
fn every_pair_of_switches_has_each_of_its_values() {
    for switches in 0..=24 {
        let rows = pairwise(switches);
        assert!(rows.iter().all(|row| row.len() == switches));
        assert_eq!(rows[..2], [vec![false; switches], vec![true; switches]]);
        for a in 0..switches {
            for b in 0..a {
                for values in [[false, false], [false, true], [true, false], [true, true]] {
                    let has = |row: &Vec<bool>| [row[a], row[b]] == values;
                    assert!(rows.iter().any(has), "{switches} switches: {a} and {b} are {values:?} in no row");
                }
            }
        }
    }
}

/// The time that more switches take grows with their logarithm.
#[test]
fn rows_of_switches_are_few() {
    let rows = [5, 7, 12, 24].map(|switches| pairwise(switches).len());
    assert!(rows.iter().zip([8, 9, 12, 15]).all(|(&rows, most)| rows <= most), "{rows:?}");
}

/// Each switch does something, and the first two problems have none and all.
#[test]
fn switches_are_those_of_problems() {
    let shape = Shape::square(2, 2, 8, 16);
    let both = |p: &Problem| {
        let modded = |name: &str| p.mods.as_ref().is_some_and(|mods| mods.text().contains(name));
        let mods = [p.blocks.is_some(), modded("score_mod"), modded("mask_mod")];
        let given = [p.bias.is_some(), p.mask.is_some(), p.alibi.is_some(), p.sinks, p.dropout.is_some()];
        [
            vec![p.layout(Tensor::Query).offset == 1, p.softcap.is_some(), p.seqlens_k, p.seqlens_q],
            mods.into(),
            given.into(),
        ]
        .concat()
    };
    let forward = |p: &Problem| [both(p), vec![p.lse]].concat();
    let backward = |p: &Problem| {
        let gradients = p.gradients.unwrap();
        [both(p), vec![gradients.lse, gradients.accumulate]].concat()
    };
    for element_type in [ElementType::F32, ElementType::F16] {
        let found: Vec<_> = switched(shape, element_type).iter().map(forward).collect();
        assert_eq!(found, pairwise(13));
        let found: Vec<_> = switched_with_gradients(shape, element_type).iter().map(backward).collect();
        assert_eq!(found, pairwise(14));
    }
}
