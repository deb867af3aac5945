//! Values and gradients, through Burn, against the f64 reference of wgpu-flash-attention.

use std::sync::LazyLock;

use burn::tensor::module::attention_fallback;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Device, Tensor, TensorData};
use flash_attention_burn::{AttentionOptions, FlashAttention};
use wgpu_flash_attention::{Bias, Causal, ElementType, Problem, ScoreLayout, Shape, reference};

const SHAPE: Shape =
    Shape { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 33, seqlen_k: 45, head_dim: 24, head_dim_v: 16 };

/// Burn starts its device once.
fn start() -> (Device, FlashAttention) {
    static STARTED: LazyLock<(Device, FlashAttention)> = LazyLock::new(|| FlashAttention::init().unwrap());
    let (device, attention) = STARTED.clone();
    (device.autodiff(), attention)
}

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
    let (device, attention) = start();
    let problem = Problem::new(SHAPE, ElementType::F32).causal(Causal::BottomRight);
    let (q, k, v) = (values(2 * 4 * 33 * 24, 0.37), values(2 * 2 * 45 * 24, 0.73), values(2 * 2 * 45 * 16, 0.91));
    let weights = values(2 * 4 * 33 * 16, 1.3);

    // Burn computes before and after; k is a view with other strides, v one whose rows are not contiguous.
    let x = tensor(&q, [2, 4, 33, 24], &device).require_grad();
    let y = tensor(&k, [2, 2, 45, 24], &device).swap_dims(1, 2).mul_scalar(1.0).detach().require_grad();
    let z = tensor(&v, [2, 2, 45, 16], &device).swap_dims(2, 3).mul_scalar(1.0).detach().require_grad();
    let (key, value) = (y.clone().swap_dims(1, 2), z.clone().swap_dims(2, 3));
    let options = AttentionOptions { causal: Some(Causal::BottomRight), ..Default::default() };
    let out = attention.forward(x.clone().mul_scalar(2.0).div_scalar(2.0), key, value, options);
    let loss = (out.clone() * tensor(&weights, [2, 4, 33, 16], &device)).sum();
    let gradients = loss.backward();

    let forward = reference::forward(&problem, &q, &k, &v, None);
    let backward = reference::backward(&problem, [&q, &k, &v, &weights], None, None);
    check("o", out.inner(), &forward.out, 2e-6);
    check("dq", x.grad(&gradients).unwrap(), &backward.query, 5e-6);
    check("dk", y.grad(&gradients).unwrap().swap_dims(1, 2), &backward.key, 5e-6);
    check("dv", z.grad(&gradients).unwrap().swap_dims(2, 3), &backward.value, 5e-6);
}

/// Whether a query sees a key. Query 3 of batch entry 1 sees none.
fn seen() -> Vec<bool> {
    (0..2 * 33 * 45).map(|n| n % 3 != 1 && n / 45 != 33 + 3).collect()
}

/// A mask of Burn's, [2, 1, 33, 45], is true where a key is masked out.
fn mask(device: &Device) -> Tensor<4, Bool> {
    let out: Vec<bool> = seen().into_iter().map(|seen| !seen).collect();
    Tensor::from_data(TensorData::new(out, [2, 1, 33, 45]), device)
}

#[test]
fn mask_bias_softcap_scale_and_diagonal_reach_both_passes() {
    let (device, attention) = start();
    let (q, k, v) = (values(2 * 4 * 33 * 24, 0.37), values(2 * 2 * 45 * 24, 0.73), values(2 * 2 * 45 * 16, 0.91));
    let (bias, weights) = (values(4 * 45, 1.7), values(2 * 4 * 33 * 16, 1.3));
    let problem = Problem::new(SHAPE, ElementType::F32)
        .causal(Causal::TopLeft)
        .scale(0.3)
        .softcap(2.0)
        .with_mask(ScoreLayout::contiguous([2, 1, 33, 45]))
        .with_bias(Bias::new(ElementType::F32, ScoreLayout::contiguous([1, 4, 1, 45])))
        .with_grad_bias();
    let seen = seen();
    let extras = reference::Extras::default().mask(&seen[..]).bias(&bias[..]);
    let forward = reference::forward(&problem, &q, &k, &v, extras);
    let backward = reference::backward(&problem, [&q, &k, &v, &weights], None, extras);
    let of_bias = backward.bias.unwrap().values;

    // As it is, as a view that repeats elements, and as a part of a larger tensor.
    let all = tensor(&[&[9.0; 180][..], &bias].concat(), [2, 4, 1, 45], &device).require_grad();
    let alone = tensor(&bias, [1, 4, 1, 45], &device).require_grad();
    for (which, given) in [
        ("as it is", alone.clone()),
        ("expanded", alone.clone().expand([2, 4, 33, 45])),
        ("a part", all.clone().slice([1..2, 0..4, 0..1, 0..45])),
    ] {
        let x = tensor(&q, [2, 4, 33, 24], &device).require_grad();
        let y = tensor(&k, [2, 2, 45, 24], &device).require_grad();
        let z = tensor(&v, [2, 2, 45, 16], &device).require_grad();
        let options = AttentionOptions {
            mask: Some(mask(&device)),
            bias: Some(given),
            causal: Some(Causal::TopLeft),
            scale: Some(0.3),
            softcap: Some(2.0),
        };
        let out = attention.forward(x.clone(), y.clone(), z.clone(), options);
        let gradients = (out.clone() * tensor(&weights, [2, 4, 33, 16], &device)).sum().backward();
        check(&format!("o, {which}"), out.inner(), &forward.out, 2e-6);
        check(&format!("dq, {which}"), x.grad(&gradients).unwrap(), &backward.query, 5e-6);
        check(&format!("dk, {which}"), y.grad(&gradients).unwrap(), &backward.key, 5e-6);
        check(&format!("dv, {which}"), z.grad(&gradients).unwrap(), &backward.value, 5e-6);
        match which {
            "a part" => {
                let found = all.grad(&gradients).unwrap().slice([1..2, 0..4, 0..1, 0..45]);
                check("dbias of a part", found, &of_bias, 5e-6);
            }
            _ => check(&format!("dbias, {which}"), alone.grad(&gradients).unwrap(), &of_bias, 5e-6),
        }
    }
    // The mask alone.
    let [x, y, z] = [(&q, [2, 4, 33, 24]), (&k, [2, 2, 45, 24]), (&v, [2, 2, 45, 16])]
        .map(|(values, shape)| tensor(values, shape, &device).require_grad());
    let options = AttentionOptions { mask: Some(mask(&device)), ..Default::default() };
    let out = attention.forward(x.clone(), y, z, options);
    let gradients = (out.clone() * tensor(&weights, [2, 4, 33, 16], &device)).sum().backward();
    let problem = Problem::new(SHAPE, ElementType::F32).with_mask(ScoreLayout::contiguous([2, 1, 33, 45]));
    let extras = reference::Extras::default().mask(&seen[..]);
    check("o, mask", out.inner(), &reference::forward(&problem, &q, &k, &v, extras).out, 2e-6);
    let backward = reference::backward(&problem, [&q, &k, &v, &weights], None, extras);
    check("dq, mask", x.grad(&gradients).unwrap(), &backward.query, 5e-6);
}

/// What Burn's own attention computes with the same tensors and options.
#[test]
fn options_mean_what_they_mean_in_burn() {
    let (device, attention) = start();
    let weights = tensor(&values(2 * 4 * 33 * 16, 1.3), [2, 4, 33, 16], &device);
    let given = || {
        let q = tensor(&values(2 * 4 * 33 * 24, 0.37), [2, 4, 33, 24], &device).require_grad();
        let k = tensor(&values(2 * 4 * 45 * 24, 0.73), [2, 4, 45, 24], &device).require_grad();
        let v = tensor(&values(2 * 4 * 45 * 16, 0.91), [2, 4, 45, 16], &device).require_grad();
        // Each query sees the first key: without any, Burn has no gradient to compare with.
        let masked: Vec<bool> = (0..33 * 45).map(|n| n % 45 > 0 && n % 4 == 1).collect();
        let mask = Tensor::<4, Bool>::from_data(TensorData::new(masked, [1, 1, 33, 45]), &device);
        let bias = tensor(&values(2 * 4 * 33 * 45, 1.7), [2, 4, 33, 45], &device).require_grad();
        (q, k, v, mask, bias)
    };
    let gradients = |out: Tensor<4>, all: [Tensor<4>; 4]| {
        let gradients = (out.clone() * weights.clone()).sum().backward();
        let floats = |tensor: Tensor<4>| tensor.into_data().convert::<f32>().try_to_vec::<f32>().unwrap();
        let mut found = vec![floats(out.inner())];
        found.extend(all.map(|tensor| floats(tensor.grad(&gradients).unwrap())));
        found
    };
    let (q, k, v, mask, bias) = given();
    let options = AttentionModuleOptions { scale: Some(0.3), softcap: Some(2.0), is_causal: true };
    let out = attention_fallback(
        q.clone(),
        k.clone(),
        v.clone(),
        Some(mask.expand([2, 4, 33, 45])),
        Some(bias.clone()),
        options,
    );
    let expected = gradients(out, [q, k, v, bias]);
    let (q, k, v, mask, bias) = given();
    let options = AttentionOptions {
        mask: Some(mask),
        bias: Some(bias.clone()),
        causal: Some(Causal::BottomRight),
        scale: Some(0.3),
        softcap: Some(2.0),
    };
    let found = gradients(attention.forward(q.clone(), k.clone(), v.clone(), options), [q, k, v, bias]);
    for ((name, found), expected) in ["o", "dq", "dk", "dv", "dbias"].into_iter().zip(found).zip(expected) {
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let apart = norm(&mut found.iter().zip(&expected).map(|(&x, &y)| f64::from(x) - f64::from(y)));
        let size = norm(&mut expected.iter().map(|&x| f64::from(x)));
        assert!(size > 0.1 && apart < 1e-5 * size, "{name}: {apart:e} of {size}");
    }
}
