//! Real queries, keys and values, with expected values computed elsewhere: see the metadata of the file.

use flash_attention_testing::backward::PreparedBackward;
use flash_attention_testing::*;
use safetensors::SafeTensors;
use wgpu_flash_attention::{ElementType, Kernel, Problem, Shape, wgpu};

/// The file's problem, and what `names` are.
fn load_named<const N: usize>(names: [&str; N]) -> (Problem, Vec<i32>, [Vec<f32>; N]) {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/minilm_layer5.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name| bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data());
    let lengths: Vec<i32> = bytemuck::pod_collect_to_vec(file.tensor("seqlens_k").unwrap().data());
    let &[batch, heads, seqlen, head_dim] = file.tensor("q").unwrap().shape() else { panic!("q has 4 dimensions") };
    let shape = Shape::square(batch as u32, heads as u32, seqlen as u32, head_dim as u32);
    let problem = Problem::new(shape, ElementType::F32).with_seqlens_k().with_lse();
    (problem, lengths, names.map(floats))
}

/// q, k, v, expected o and lse.
fn load() -> (Problem, Vec<i32>, [Vec<f32>; 5]) {
    load_named(["q", "k", "v", "o", "lse"])
}

fn prepare(element_type: ElementType) -> Prepared {
    let (mut problem, lengths, [q, k, v, _, _]) = load();
    problem.element_type = element_type;
    Prepared::new(&problem, [q, k, v], Extras { seqlens_k: Some(lengths), ..Default::default() }, false)
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

/// f16 is read from words of 32 bits, on devices with SHADER_F16 as well. Software Vulkan has it.
#[test]
fn f16_with_and_without_shader_f16() {
    let Some(with) = with_features(wgpu::Features::SHADER_F16) else { return };
    assert!(!webgpu().device().features().contains(wgpu::Features::SHADER_F16));
    let cases = [("minilm".to_string(), prepare(ElementType::F16))];
    check_all(&cases, &[("with", &with, tile()), ("with, naive", &with, naive()), ("without", webgpu(), tile())]);
}

fn prepare_backward(element_type: ElementType) -> PreparedBackward {
    let (mut problem, lengths, [q, k, v, grad_out]) = load_named(["q", "k", "v", "do"]);
    problem.element_type = element_type;
    let problem = problem.with_gradients();
    let forward = Prepared::new(&problem, [q, k, v], Extras { seqlens_k: Some(lengths), ..Default::default() }, false);
    PreparedBackward::new(&problem, forward, grad_out, None, None)
}

fn gradients() -> [Vec<f64>; 3] {
    let (_, _, gradients) = load_named(["dq", "dk", "dv"]);
    gradients.map(|values| values.into_iter().map(f64::from).collect())
}

#[test]
fn the_oracle_agrees_with_the_gradients_of_the_file() {
    for (ours, file) in prepare_backward(ElementType::F32).expected.iter().zip(gradients()) {
        assert_eq!(ours.len(), file.len());
        for (n, (x, y)) in ours.iter().zip(file).enumerate() {
            // The file's gradients are of its o and lse in f64, but rounded to f32 themselves.
            assert!((x - y).abs() <= 1e-6 * x.abs().max(1.0), "{n} is {x}, {y} in the file");
        }
    }
}

#[test]
fn the_gradients_are_those_of_the_file() {
    let mut in_f32 = prepare_backward(ElementType::F32);
    in_f32.expected = gradients();
    let in_f16 = prepare_backward(ElementType::F16);
    let ways = [
        ("naive", full(), backward::backward(Kernel::Naive)),
        ("tile", full(), backward::backward(Kernel::Tile)),
        ("tile within WebGPU's limits", webgpu(), backward::backward(Kernel::Tile)),
    ];
    backward::check_all(&[("minilm, f32".into(), in_f32), ("minilm, f16".into(), in_f16)], &ways);
}
