//! Real queries, keys and values, with expected values computed elsewhere: see the metadata of the file.

mod common;

use common::*;
use safetensors::SafeTensors;
use wgpu_flash_attention::{ElementType, Problem, Shape};

/// The file's problem, and its q, k, v, expected o and lse.
fn load() -> (Problem, Vec<i32>, [Vec<f32>; 5]) {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/minilm_layer5.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name| bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data());
    let lengths: Vec<i32> = bytemuck::pod_collect_to_vec(file.tensor("seqlens_k").unwrap().data());
    let &[batch, heads, seqlen, head_dim] = file.tensor("q").unwrap().shape() else { panic!("q has 4 dimensions") };
    let shape = Shape::square(batch as u32, heads as u32, seqlen as u32, head_dim as u32);
    let problem = Problem::new(shape, ElementType::F32).with_seqlens_k().with_lse();
    (problem, lengths, ["q", "k", "v", "o", "lse"].map(floats))
}

fn prepare(element_type: ElementType) -> Prepared {
    let (mut problem, lengths, [q, k, v, _, _]) = load();
    problem.element_type = element_type;
    Prepared::new(&problem, [q, k, v], Some(lengths), false)
}

#[test]
fn the_oracle_agrees_with_the_file() {
    let (_, lengths, [_, _, _, o, lse]) = load();
    assert!(lengths.len() == 3 && lengths[0] != lengths[1] && lengths[1] != lengths[2], "{lengths:?}");
    let ours = prepare(ElementType::F32).expected;
    for (name, ours, file) in [("o", &ours.out, &o), ("lse", &ours.lse, &lse)] {
        assert_eq!(ours.len(), file.len(), "{name}");
        // The file's values are rounded to f32.
        for (n, (x, y)) in ours.iter().zip(file).enumerate() {
            assert!((x - *y as f64).abs() <= 1e-7 * x.abs().max(1.0), "{name}[{n}] is {x}, {y} in the file");
        }
    }
}

#[test]
fn f32_gives_what_the_file_expects() {
    let (_, _, [_, _, _, o, lse]) = load();
    let mut prepared = prepare(ElementType::F32);
    prepared.expected.out = o.into_iter().map(f64::from).collect();
    prepared.expected.lse = lse.into_iter().map(f64::from).collect();
    let ways =
        [("naive", full(), naive()), ("tile", full(), tile()), ("tile within WebGPU's limits", webgpu(), tile())];
    check_all(&[("minilm".into(), prepared)], &ways);
}

#[test]
fn f16_and_bf16_agree_with_the_oracle() {
    let types = [ElementType::F16, ElementType::BF16];
    let cases = types.map(|element_type| (format!("minilm, {element_type}"), prepare(element_type)));
    check_all(&cases, &[("naive", full(), naive()), ("tile", full(), tile())]);
}
