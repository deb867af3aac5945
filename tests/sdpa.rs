//! The convenience on host slices, blocking and not.

use flash_attention_testing::{full, with_limits};
use half::{bf16, f16};
use wgpu_flash_attention::{
    AttnMask, Bias, Causal, Dropout, Element, ElementType, Error, HostTensor, Problem, ScoreLayout, SdpaOptions, Shape,
    reference,
};

fn random<T>(len: usize, seed: u64, round: impl Fn(f32) -> T) -> Vec<T> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| round(3.0 * rng.f32() - 1.0)).collect()
}

/// Compares both forms with the oracle: shapes are those of q and v; k has the head dim of q.
fn check<T: Element + Into<f64> + PartialEq + std::fmt::Debug>(
    q_shape: [usize; 4],
    v_shape: [usize; 4],
    options: SdpaOptions,
    round: impl Fn(f32) -> T,
    bound: f64,
) {
    let k_shape = [v_shape[0], v_shape[1], v_shape[2], q_shape[3]];
    let [q, k, v] =
        [(q_shape, 1), (k_shape, 2), (v_shape, 3)].map(|(shape, seed)| random(shape.iter().product(), seed, &round));
    let shape = Shape {
        batch: q_shape[0] as u32,
        heads_q: q_shape[1] as u32,
        heads_kv: v_shape[1] as u32,
        seqlen_q: q_shape[2] as u32,
        seqlen_k: v_shape[2] as u32,
        head_dim: q_shape[3] as u32,
        head_dim_v: v_shape[3] as u32,
    };
    let mut problem = Problem::new(shape, T::TYPE);
    problem.scale = options.scale;
    problem.causal = options.is_causal.then_some(Causal::TopLeft);
    let layout = |shape: [usize; 4]| ScoreLayout::contiguous(shape.map(|n| n as u32));
    let mut extras = reference::Extras::default();
    let floats: Vec<f32>;
    match options.attn_mask {
        Some(AttnMask::Bool(mask)) => {
            problem.mask = Some(layout(mask.shape));
            extras = extras.mask(mask.data);
        }
        Some(AttnMask::F32(mask)) => {
            problem.bias = Some(Bias::new(ElementType::F32, layout(mask.shape)));
            extras = extras.bias(mask.data);
        }
        Some(AttnMask::F16(mask)) => {
            problem.bias = Some(Bias::new(ElementType::F16, layout(mask.shape)));
            floats = mask.data.iter().map(|x| x.to_f32()).collect();
            extras = extras.bias(&floats[..]);
        }
        _ => {}
    }
    let extras = extras.dropout(options.dropout);
    let expected = reference::forward(&problem, &q, &k, &v, extras).out;

    let tensors = || {
        let query = HostTensor { data: &q[..], shape: q_shape };
        (query, HostTensor { data: &k[..], shape: k_shape }, HostTensor { data: &v[..], shape: v_shape })
    };
    let (query, key, value) = tensors();
    let out = full().scaled_dot_product_attention(query, key, value, &options).unwrap();
    let (query, key, value) = tensors();
    let waited = pollster::block_on(full().scaled_dot_product_attention_async(query, key, value, &options)).unwrap();
    assert_eq!(out, waited);
    assert_eq!(out.len(), expected.len());
    for (n, (&x, y)) in out.iter().zip(&expected).enumerate() {
        let x: f64 = x.into();
        assert!((x - y).abs() <= bound, "out[{n}] is {x}, {y} expected");
    }
}

fn plain() -> SdpaOptions<'static> {
    SdpaOptions::default()
}

#[test]
fn every_element_type() {
    let (q, v) = ([2, 3, 17, 20], [2, 3, 29, 12]);
    // Values are below 2: half a unit in the last place is 2^-11 and 2^-8.
    check(q, v, plain(), |x| x, 2e-6);
    check(q, v, plain(), f16::from_f32, 1.01 / 2048.0);
    check(q, v, plain(), bf16::from_f32, 1.01 / 256.0);
}

#[test]
fn an_odd_number_of_halves() {
    check([1, 1, 3, 5], [1, 1, 4, 3], plain(), f16::from_f32, 1.01 / 2048.0);
}

#[test]
fn causal_is_aligned_to_the_top_left() {
    let causal = plain().is_causal(true);
    check([1, 2, 9, 8], [1, 2, 23, 8], causal, |x| x, 2e-6);
    check([1, 2, 23, 8], [1, 2, 9, 8], causal, |x| x, 2e-6);
}

#[test]
fn scale_is_used() {
    check([1, 2, 9, 8], [1, 2, 23, 8], plain().scale(-0.7), |x| x, 2e-6);
}

#[test]
fn grouped_heads() {
    let gqa = plain().enable_gqa(true);
    check([2, 6, 9, 8], [2, 2, 23, 8], gqa, |x| x, 2e-6);
    check([2, 2, 9, 8], [2, 2, 23, 8], gqa, |x| x, 2e-6);
}

#[test]
fn masks() {
    let (q, v) = ([2, 3, 17, 20], [2, 3, 29, 12]);
    for shape in [[2, 3, 17, 29], [1, 1, 17, 29], [2, 1, 1, 29], [1, 3, 17, 1]] {
        let elements = shape.iter().product();
        let mut rng = fastrand::Rng::with_seed(5);
        let bools: Vec<bool> = (0..elements).map(|_| rng.u32(0..3) > 0).collect();
        let mask = AttnMask::Bool(HostTensor { data: &bools, shape });
        check(q, v, plain().attn_mask(mask), |x| x, 2e-6);
        // -inf masks.
        let number = |_| if rng.u32(0..8) == 0 { f32::NEG_INFINITY } else { rng.f32() };
        let floats: Vec<f32> = (0..elements).map(number).collect();
        let mask = AttnMask::F32(HostTensor { data: &floats, shape });
        check(q, v, plain().attn_mask(mask), |x| x, 2e-6);
        check(q, v, plain().attn_mask(mask), bf16::from_f32, 1.01 / 256.0);
        let halves: Vec<f16> = floats.iter().map(|&x| f16::from_f32(x)).collect();
        check(
            q,
            v,
            plain().attn_mask(AttnMask::F16(HostTensor { data: &halves, shape })),
            f16::from_f32,
            1.01 / 2048.0,
        );
    }
}

#[test]
fn dropout() {
    let dropout = Dropout { probability: 0.3, seed: 5, offset: 1 << 40 };
    let (q, v) = ([2, 3, 17, 20], [2, 3, 29, 12]);
    check(q, v, plain().dropout(dropout).is_causal(true), |x| x, 4e-6);
    check(q, v, plain().dropout(Dropout { probability: 0.0, ..dropout }), |x| x, 2e-6);
    let data = [0f32; 2 * 3 * 4 * 8];
    let tensor = HostTensor { data: &data[..], shape: [2, 3, 4, 8] };
    let options = plain().dropout(Dropout { probability: 1.0, ..dropout });
    let error = full().scaled_dot_product_attention(tensor, tensor, tensor, &options).unwrap_err();
    assert_eq!(error, Error::Dropout(1.0));
}

#[test]
fn masks_that_do_not_go_with_the_tensors() {
    let data = [0f32; 2 * 3 * 4 * 8];
    let tensor = HostTensor { data: &data[..], shape: [2, 3, 4, 8] };
    let error =
        |options: SdpaOptions| full().scaled_dot_product_attention(tensor, tensor, tensor, &options).unwrap_err();
    let floats = [0f32; 96];
    let mask = |shape: [usize; 4]| AttnMask::F32(HostTensor { data: &floats[..shape.iter().product()], shape });
    assert_eq!(error(plain().attn_mask(mask([1, 1, 4, 4])).is_causal(true)), Error::CausalWithMask);
    let wrong = error(plain().attn_mask(mask([1, 2, 4, 4])));
    assert!(matches!(wrong, Error::HostShape { argument: "attn_mask", .. }), "{wrong}");
    let short = AttnMask::F32(HostTensor { data: &floats[..3], shape: [1, 1, 4, 4] });
    assert!(matches!(error(plain().attn_mask(short)), Error::SliceLength { argument: "attn_mask", needed: 16, .. }));
    let halves = [f16::ZERO; 16];
    let of_type = AttnMask::F16(HostTensor { data: &halves, shape: [1, 1, 4, 4] });
    let error = error(plain().attn_mask(of_type));
    assert_eq!(error, Error::BiasType { found: ElementType::F16, problem: ElementType::F32 });
}

#[test]
fn empty_sizes() {
    check([0, 2, 9, 8], [0, 2, 5, 8], plain(), |x| x, 0.0);
    check([2, 2, 0, 8], [2, 2, 5, 8], plain(), |x| x, 0.0);
    check([2, 2, 9, 8], [2, 2, 0, 8], plain(), |x| x, 0.0);
}

#[test]
fn shapes_that_do_not_go_together() {
    let data = vec![0f32; 1 << 10];
    let tensor = |shape: [usize; 4]| HostTensor { data: &data[..shape.iter().product()], shape };
    let error = |q, k, v, options: &SdpaOptions| {
        full().scaled_dot_product_attention(tensor(q), tensor(k), tensor(v), options).unwrap_err()
    };
    let named = |error: Error, name: &str| match error {
        Error::HostShape { argument, .. } => assert_eq!(argument, name),
        other => panic!("{other}"),
    };
    let q = [2, 4, 3, 8];
    named(error(q, [1, 4, 5, 8], [1, 4, 5, 8], &plain()), "key");
    named(error(q, [2, 4, 5, 6], [2, 4, 5, 6], &plain()), "key");
    named(error(q, [2, 4, 5, 8], [2, 4, 6, 8], &plain()), "value");
    named(error(q, [2, 4, 5, 8], [2, 2, 5, 8], &plain()), "value");
    named(error(q, [2, 2, 5, 8], [2, 2, 5, 8], &plain()), "key");
    let gqa = plain().enable_gqa(true);
    let odd = error(q, [2, 3, 5, 8], [2, 3, 5, 8], &gqa);
    assert_eq!(odd, Error::Heads { heads_q: 4, heads_kv: 3 });
    named(error([0, 4, 1 << 32, 8], [0, 4, 5, 8], [0, 4, 5, 8], &plain()), "query");
    named(error(q, [2, 4, 5, 8], [2, 1 << 32, 0, 8], &plain()), "value");
}

#[test]
fn more_than_a_buffer_holds() {
    let context = with_limits(|limits| limits.max_buffer_size = 4096);
    let data = vec![0f32; 2048];
    let tensor = |heads: usize, dim: usize| HostTensor { data: &data[..heads * 8 * dim], shape: [1, heads, 8, dim] };
    let error = |q, k, v| context.scaled_dot_product_attention(q, k, v, &plain()).unwrap_err();
    let too_large = |argument| Error::BindingTooLarge { argument, bytes: 8192, limit: 4096 };
    assert_eq!(error(tensor(8, 32), tensor(8, 32), tensor(8, 4)), too_large("query"));
    assert_eq!(error(tensor(8, 4), tensor(8, 4), tensor(8, 32)), too_large("value"));
}

#[test]
fn a_slice_of_the_wrong_length() {
    let good = [0f32; 2 * 3 * 4];
    let tensor = |data| HostTensor { data, shape: [1, 2, 3, 4] };
    for (wrong, name) in ["query", "key", "value"].into_iter().enumerate() {
        let [q, k, v] = [0, 1, 2].map(|n| tensor(if n == wrong { &good[1..] } else { &good[..] }));
        let error = full().scaled_dot_product_attention(q, k, v, &plain()).unwrap_err();
        let Error::SliceLength { argument, needed: 24, found: 23, .. } = error else { panic!("{error}") };
        assert_eq!(argument, name);
        let error = pollster::block_on(full().scaled_dot_product_attention_async(q, k, v, &plain())).unwrap_err();
        assert!(matches!(error, Error::SliceLength { .. }), "{error}");
    }
}
