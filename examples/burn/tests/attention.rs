//! Values and gradients, through Burn, against the f64 reference of wgpu-flash-attention.

use burn::tensor::{Device, Tensor, TensorData};
use flash_attention_burn::FlashAttention;
use wgpu_flash_attention::{Causal, ElementType, Problem, Shape, reference};

const SHAPE: Shape =
    Shape { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 33, seqlen_k: 45, head_dim: 24, head_dim_v: 16 };

fn values(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|n| (n as f32 * step + step).sin()).collect()
}

fn tensor(values: &[f32], shape: [usize; 4], device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

#[track_caller]
fn check(name: &str, found: Tensor<4>, expected: &[f64], bound: f64) {
    let found = found.into_data().convert::<f32>().try_to_vec::<f32>().unwrap();
    assert_eq!(found.len(), expected.len(), "{name}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(expected).map(|(&x, y)| x as f64 - y)) / norm(&mut expected.iter().copied());
    assert!(error <= bound, "{name}: relative error {error:.1e}");
}

#[test]
fn gradients_flow_through_attention_and_what_is_around_it() {
    let (device, attention) = FlashAttention::init().unwrap();
    let device = device.autodiff();
    let problem = Problem::new(SHAPE, ElementType::F32).causal(Causal::BottomRight);
    let (q, k, v) = (values(2 * 4 * 33 * 24, 0.37), values(2 * 2 * 45 * 24, 0.73), values(2 * 2 * 45 * 16, 0.91));
    let weights = values(2 * 4 * 33 * 16, 1.3);

    // Burn computes before and after; k is a view with other strides, v one whose rows are not contiguous.
    let x = tensor(&q, [2, 4, 33, 24], &device).require_grad();
    let y = tensor(&k, [2, 2, 45, 24], &device).swap_dims(1, 2).mul_scalar(1.0).detach().require_grad();
    let z = tensor(&v, [2, 2, 45, 16], &device).swap_dims(2, 3).mul_scalar(1.0).detach().require_grad();
    let (key, value) = (y.clone().swap_dims(1, 2), z.clone().swap_dims(2, 3));
    let out = attention.forward(x.clone().mul_scalar(2.0).div_scalar(2.0), key, value, Some(Causal::BottomRight));
    let loss = (out.clone() * tensor(&weights, [2, 4, 33, 16], &device)).sum();
    let gradients = loss.backward();

    let forward = reference::forward(&problem, &q, &k, &v, None);
    let backward = reference::backward(&problem, [&q, &k, &v, &weights], None, None);
    check("o", out.inner(), &forward.out, 2e-6);
    check("dq", x.grad(&gradients).unwrap(), &backward.query, 5e-6);
    check("dk", y.grad(&gradients).unwrap().swap_dims(1, 2), &backward.key, 5e-6);
    check("dv", z.grad(&gradients).unwrap().swap_dims(2, 3), &backward.value, 5e-6);
}
