//! The command `attend`, run as a user runs it: exit codes, messages, files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use wgpu_flash_attention::{
    Alibi, Bias, BlockLists, Causal, Dropout, ElementType, Mods, Problem, ScoreLayout, Shape, alibi_slopes, reference,
};

const FIXTURE: &[u8] = include_bytes!("data/minilm_layer5.safetensors");

/// `cargo test` puts examples beside the folder of the tests.
fn attend(args: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    let program = profile.join("examples").join(format!("attend{}", std::env::consts::EXE_SUFFIX));
    let output = Command::new(&program).args(args).output();
    output.unwrap_or_else(|error| panic!("{}: {error}; `cargo test --examples` builds it", program.display()))
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
fn expect(args: &[&str], code: i32) -> String {
    let output = attend(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}\n{}{}", stdout(&output), stderr(&output));
    stdout(&output)
}

/// Exit code 2 and one line on stderr that holds each of `words`.
#[track_caller]
fn expect_refusal(args: &[&str], words: &[&str]) -> String {
    refusal(&attend(args), args, words)
}

#[track_caller]
fn refusal(output: &Output, args: &[&str], words: &[&str]) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{args:?}\n{}{text}", stdout(output));
    // On a busy machine lines on progress may stand before it.
    let lines: Vec<_> = text.lines().filter(|line| !line.ends_with(" …")).collect();
    assert_eq!(lines.len(), 1, "{args:?}\n{text}");
    let text = lines[0].to_string();
    for word in words {
        assert!(text.contains(word), "{args:?}: {text:?} does not say {word:?}");
    }
    text
}

/// Exit code 0, and one line on stderr, a warning that holds each of `words`.
#[track_caller]
fn expect_warning(args: &[&str], words: &[&str]) -> String {
    let output = attend(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{args:?}\n{}{text}", stdout(&output));
    // On a busy machine lines on progress may stand beside it.
    let lines: Vec<_> = text.lines().filter(|line| !line.ends_with(" …")).collect();
    assert!(lines.len() == 1 && lines[0].starts_with("attend: warning: "), "{args:?}\n{text}");
    for word in words {
        assert!(lines[0].contains(word), "{args:?}: {text:?} does not say {word:?}");
    }
    lines[0].to_string()
}

/// Tensors of a file in the making.
#[derive(Clone)]
struct File(Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>);

impl File {
    /// Two query heads to a key-value head, values narrower than keys, more keys than queries.
    const SHAPE: Shape =
        Shape { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 3, seqlen_k: 5, head_dim: 8, head_dim_v: 6 };

    fn new() -> Self {
        File::of(&File::SHAPE)
    }

    /// q, k and v.
    fn of(shape: &Shape) -> Self {
        let [q, k, v, _, _] = inputs(shape);
        let [of_q, of_k, of_v, _] = sizes(shape);
        File(vec![]).with("q", &of_q, &q).with("k", &of_k, &k).with("v", &of_v, &v)
    }

    fn put(mut self, name: &'static str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Self {
        self = self.without(name);
        self.0.push((name, dtype, shape.to_vec(), bytes.to_vec()));
        self
    }

    fn with(self, name: &'static str, shape: &[usize], values: &[f32]) -> Self {
        self.put(name, Dtype::F32, shape, bytemuck::cast_slice(values))
    }

    fn with_lengths(self, lengths: &[i64]) -> Self {
        self.put("seqlens_k", Dtype::I64, &[lengths.len()], bytemuck::cast_slice(lengths))
    }

    fn without(mut self, name: &str) -> Self {
        self.0.retain(|(other, ..)| *other != name);
        self
    }

    fn save(&self, name: &str) -> String {
        let view = |dtype: &Dtype, shape: &[usize], bytes| TensorView::new(*dtype, shape.to_vec(), bytes).unwrap();
        let views = self.0.iter().map(|(name, dtype, shape, bytes)| (*name, view(dtype, shape, bytes)));
        let path = temporary(name);
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        path.into_os_string().into_string().unwrap()
    }
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("attend-{name}.safetensors"))
}

/// Values between -1 and 1 without a short period.
fn values(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|n| (n as f32 * step + 0.3 * step).sin()).collect()
}

/// The sizes of q, k, v and o.
fn sizes(s: &Shape) -> [[usize; 4]; 4] {
    let sizes = |heads: u32, rows: u32, dim: u32| [s.batch, heads, rows, dim].map(|n| n as usize);
    [
        sizes(s.heads_q, s.seqlen_q, s.head_dim),
        sizes(s.heads_kv, s.seqlen_k, s.head_dim),
        sizes(s.heads_kv, s.seqlen_k, s.head_dim_v),
        sizes(s.heads_q, s.seqlen_q, s.head_dim_v),
    ]
}

/// q, k, v, do and dlse.
fn inputs(shape: &Shape) -> [Vec<f32>; 5] {
    let [q, k, v, o] = sizes(shape);
    let count = |sizes: &[usize]| sizes.iter().product();
    [(&q[..], 0.7), (&k, 1.1), (&v, 1.9), (&o, 2.3), (&o[..3], 2.9)].map(|(sizes, step)| values(count(sizes), step))
}

fn shape_and_type(bytes: &[u8], name: &str) -> (Vec<usize>, Dtype) {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let view = file.tensor(name).unwrap();
    (view.shape().to_vec(), view.dtype())
}

#[test]
fn the_fixture_passes() {
    let text = expect(&[], 0);
    for word in ["adapter", "plan", "kernel: tile", "time", "PASS: o and lse"] {
        assert!(text.contains(word), "{text}");
    }
}

/// The reference has no bounds checks to switch on.
fn checked(kernel: &str) -> &'static [&'static str] {
    if kernel == "reference" { &[] } else { &["--checked"] }
}

#[test]
fn every_kernel_and_type_passes_on_the_fixture() {
    for kernel in ["naive", "tile", "reference"] {
        for dtype in ["f32", "f16", "bf16"] {
            let text = expect(&[&["--kernel", kernel, "--dtype", dtype], checked(kernel)].concat(), 0);
            assert!(text.contains(kernel) && text.contains(&format!("in {dtype};")), "{text}");
        }
    }
}

#[test]
fn gradients_pass_on_the_fixture() {
    let text = expect(&["--backward"], 0);
    for word in ["backward kernel: tile", "time     backward", "PASS: o, lse, dq, dk and dv"] {
        assert!(text.contains(word), "{text}");
    }
    for kernel in ["naive", "tile", "reference"] {
        for dtype in ["f32", "f16", "bf16"] {
            let args = [&["--backward", "--kernel", kernel, "--dtype", dtype], checked(kernel)].concat();
            let text = expect(&args, 0);
            assert!(text.contains(kernel) && text.contains("PASS: o, lse, dq, dk and dv"), "{text}");
        }
    }
    expect_refusal(&["--backward", "--kernel", "decode"], &["decode kernel", "no backward pass"]);
}

/// Do, dlse, and the gradients of a problem over the file's q, k and v.
fn with_gradients(file: File, problem: &Problem, lengths: Option<&[i32]>) -> File {
    let [q, k, v] = [values(192, 0.7), values(160, 1.1), values(120, 1.9)];
    let (grad_out, grad_lse) = (values(144, 2.3), values(24, 2.9));
    let result = reference::backward(problem, [&q, &k, &v, &grad_out], Some(&grad_lse), lengths);
    let f32s = |values: &[f64]| -> Vec<f32> { values.iter().map(|&x| x as f32).collect() };
    file.with("do", &[2, 4, 3, 6], &grad_out)
        .with("dlse", &[2, 4, 3], &grad_lse)
        .with("dq", &[2, 4, 3, 8], &f32s(&result.query))
        .with("dk", &[2, 2, 5, 8], &f32s(&result.key))
        .with("dv", &[2, 2, 5, 6], &f32s(&result.value))
}

#[test]
fn options_lengths_and_dlse_reach_the_backward_kernels() {
    let options = ["--causal", "top-left", "--window", "2,-1", "--scale", "-0.9", "--softcap", "1.5"];
    let problem = Problem::new(File::SHAPE, ElementType::F32)
        .causal(Causal::TopLeft)
        .window(Some(2), None)
        .scale(-0.9)
        .softcap(1.5)
        .with_seqlens_k();
    let file = with_gradients(File::new().with_lengths(&[4, 2]), &problem, Some(&[4, 2]));
    let right = file.save("backward-options");
    let without_dlse = file.clone().without("dlse").save("backward-no-dlse");
    let other_lengths = file.with_lengths(&[4, 3]).save("backward-lengths");
    for kernel in ["naive", "tile", "reference"] {
        for dtype in ["f32", "f16"] {
            let run = |path: &str, options: &[&str], code| {
                expect(&[&[path, "--backward", "--kernel", kernel, "--dtype", dtype], options].concat(), code)
            };
            assert!(run(&right, &options, 0).contains("PASS: dq, dk and dv"));
            for n in (0..options.len()).step_by(2) {
                let fewer = [&options[..n], &options[n + 2..]].concat();
                assert!(run(&right, &fewer, 1).contains("FAIL"), "{kernel} without {}", options[n]);
            }
            // dv does not depend on the gradient of lse.
            assert!(run(&without_dlse, &options, 1).contains("FAIL: dq and dk:"));
            run(&other_lengths, &options, 1);
        }
    }
}

#[test]
fn a_wrong_gradient_fails_and_is_named() {
    let problem = Problem::new(File::SHAPE, ElementType::F32);
    let right = with_gradients(File::new(), &problem, None);
    let text = expect(&[&right.save("right-gradients"), "--backward"], 0);
    assert!(text.contains("PASS: dq, dk and dv:") && text.contains("gradients from do and dlse"), "{text}");
    // Nothing is read of it without the option.
    assert!(expect(&[&right.save("right-gradients")], 0).contains("nothing was compared"));

    let shapes: [(&str, &[usize]); 3] = [("dq", &[2, 4, 3, 8]), ("dk", &[2, 2, 5, 8]), ("dv", &[2, 2, 5, 6])];
    for (name, shape) in shapes {
        let bytes = &right.0.iter().find(|(other, ..)| *other == name).unwrap().3;
        for wrong in [0.05, f32::NAN] {
            let mut values: Vec<f32> = bytemuck::pod_collect_to_vec(bytes);
            *values.last_mut().unwrap() += wrong;
            let path = right.clone().with(name, shape, &values).save(&format!("wrong-{name}"));
            for dtype in ["f32", "f16"] {
                let text = expect(&[&path, "--backward", "--dtype", dtype], 1);
                assert!(text.contains(&format!("FAIL: {name}:")), "{text}");
            }
        }
    }
}

/// Rows that see one key each have no gradient of queries: nothing to be relative to but what cancels.
#[test]
fn gradients_that_cancel_pass() {
    let problem = Problem::new(File::SHAPE, ElementType::F32).window(Some(0), Some(0));
    let file = with_gradients(File::new(), &problem, None).without("dlse");
    let path = file.with("dq", &[2, 4, 3, 8], &[0.0; 192]).with("dk", &[2, 2, 5, 8], &[0.0; 160]).save("cancel");
    for dtype in ["f32", "f16"] {
        expect(&[&path, "--backward", "--window", "0,0", "--dtype", dtype], 0);
    }
}

/// What a file has besides q, k and v, each for `File::SHAPE`, and the problem with it.
struct Feature {
    name: &'static str,
    problem: Problem,
    /// For the reference.
    extras: Extras,
    /// The tensor's type, shape and bytes.
    tensor: (Dtype, Vec<usize>, Vec<u8>),
    gradient: Option<&'static str>,
}

#[derive(Clone, Default)]
struct Extras {
    bias: Option<Vec<f32>>,
    mask: Option<Vec<bool>>,
    alibi_slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    dropout: Option<Dropout>,
    blocks: Option<Vec<bool>>,
    mod_buffers: Vec<(String, Vec<u8>)>,
}

impl Extras {
    fn borrow(&self) -> reference::Extras<'_> {
        reference::Extras::default()
            .bias(self.bias.as_deref())
            .mask(self.mask.as_deref())
            .alibi_slopes(self.alibi_slopes.as_deref())
            .sinks(self.sinks.as_deref())
            .dropout(self.dropout)
            .blocks(self.blocks.as_deref())
            .mod_buffers(&self.mod_buffers)
    }
}

fn features() -> Vec<Feature> {
    let problem = Problem::new(File::SHAPE, ElementType::F32).with_gradients();
    let bytes = |values: &[f32]| bytemuck::cast_slice(values).to_vec();
    let mut all = vec![];
    for sizes in [[2, 4, 3, 5], [1, 4, 1, 5], [2, 1, 3, 1]] {
        let shape = sizes.map(|n| n as usize);
        let mut bias = values(shape.iter().product(), 1.7);
        (bias[1], bias[2]) = (f32::NEG_INFINITY, f32::MIN);
        let layout = ScoreLayout::contiguous(sizes);
        let mut problem = problem.clone().with_bias(Bias::new(ElementType::F32, layout));
        problem.gradients.as_mut().unwrap().bias = true;
        let tensor = (Dtype::F32, shape.to_vec(), bytes(&bias));
        let extras = Extras { bias: Some(bias), ..Default::default() };
        all.push(Feature { name: "attn_mask", problem: problem.clone(), extras, tensor, gradient: Some("dbias") });
        let mask: Vec<bool> = (0..shape.iter().product()).map(|n| n % 3 != 1).collect();
        let tensor = (Dtype::BOOL, shape.to_vec(), mask.iter().map(|&x| x.into()).collect());
        let extras = Extras { mask: Some(mask), ..Default::default() };
        let problem = Problem::new(File::SHAPE, ElementType::F32).with_gradients().with_mask(layout);
        all.push(Feature { name: "attn_mask", problem, extras, tensor, gradient: None });
    }
    for (alibi, shape) in [(Alibi::PerHead, &[4][..]), (Alibi::PerBatchAndHead, &[2, 4])] {
        let slopes = values(shape.iter().product(), 0.9);
        let mut problem = problem.clone().with_alibi(alibi);
        problem.gradients.as_mut().unwrap().alibi_slopes = true;
        let tensor = (Dtype::F32, shape.to_vec(), bytes(&slopes));
        let extras = Extras { alibi_slopes: Some(slopes), ..Default::default() };
        all.push(Feature { name: "alibi_slopes", problem, extras, tensor, gradient: Some("dalibi_slopes") });
    }
    let sinks = [2.5, f32::NEG_INFINITY, -1.25, 0.5];
    let mut problem = problem.with_sinks();
    problem.gradients.as_mut().unwrap().sinks = true;
    let extras = Extras { sinks: Some(sinks.to_vec()), ..Default::default() };
    let tensor = (Dtype::F32, vec![4], bytes(&sinks));
    all.push(Feature { name: "sinks", problem, extras, tensor, gradient: Some("dsinks") });
    all
}

/// A file with the results of a problem, and do and dlse.
fn with_results(file: File, problem: &Problem, extras: &Extras) -> File {
    let [q, k, v, grad_out, grad_lse] = inputs(&problem.shape);
    let [of_q, of_k, of_v, of_o] = sizes(&problem.shape);
    let forward = reference::forward(problem, &q, &k, &v, extras.borrow());
    let result = reference::backward(problem, [&q, &k, &v, &grad_out], Some(&grad_lse), extras.borrow());
    let f32s = |values: &[f64]| -> Vec<f32> { values.iter().map(|&x| x as f32).collect() };
    file.with("do", &of_o, &grad_out)
        .with("dlse", &of_o[..3], &grad_lse)
        .with("o", &of_o, &f32s(&forward.out))
        .with("lse", &of_o[..3], &f32s(&forward.lse))
        .with("dq", &of_q, &f32s(&result.query))
        .with("dk", &of_k, &f32s(&result.key))
        .with("dv", &of_v, &f32s(&result.value))
}

/// Each reaches the kernels of both passes, and so does its gradient.
#[test]
fn biases_masks_slopes_and_sinks_reach_the_kernels() {
    for (n, feature) in features().into_iter().enumerate() {
        let Feature { name, problem, extras, tensor: (dtype, shape, bytes), gradient } = feature;
        let file = with_results(File::new(), &problem, &extras);
        // Without it the results are others.
        let text = expect(&[&file.save("feature-without"), "--backward", "--kernel", "reference"], 1);
        assert!(text.contains("FAIL: o, lse, dq, dk and dv:"), "{name} {shape:?}: {text}");

        let mut file = file.put(name, dtype, &shape, &bytes);
        let mut pass = "PASS: o, lse, dq, dk and dv:".to_string();
        if let Some(gradient) = gradient {
            let [q, k, v, grad_out] = [values(192, 0.7), values(160, 1.1), values(120, 1.9), values(144, 2.3)];
            let grad_lse = values(24, 2.9);
            let all = [&q[..], &k, &v, &grad_out];
            let result = reference::backward(&problem, all, Some(&grad_lse), extras.borrow());
            let summed = [result.bias, result.sinks, result.alibi_slopes].into_iter().flatten().next().unwrap();
            let summed: Vec<f32> = summed.values.iter().map(|&x| x as f32).collect();
            assert!(summed.iter().any(|&x| x.abs() > 0.1), "{gradient} is hardly there: {summed:?}");
            file = file.with(gradient, &shape, &summed);
            pass = format!("PASS: o, lse, dq, dk, dv and {gradient}:");
            let mut wrong = summed.clone();
            wrong[0] += 0.1;
            let wrong = file.clone().with(gradient, &shape, &wrong).save("feature-wrong");
            for dtype in ["f32", "f16"] {
                let text = expect(&[&wrong, "--backward", "--dtype", dtype], 1);
                assert!(text.contains(&format!("FAIL: {gradient}:")), "{text}");
            }
        }
        let path = file.save("feature");
        for (kernel, dtype) in [("naive", "f32"), ("tile", "f32"), ("tile", "f16"), ("reference", "bf16")] {
            let output = temporary("feature-out");
            let args = [&path, "--kernel", kernel, "--dtype", dtype, "--backward", "-o", output.to_str().unwrap()];
            let text = expect(&args, 0);
            assert!(text.contains(&pass), "{name} {shape:?}, {kernel}, {dtype}: {text}");
            let written = std::fs::read(output).unwrap();
            let names = SafeTensors::deserialize(&written).unwrap().len();
            assert_eq!(names, 5 + usize::from(gradient.is_some()), "{name}");
            if let Some(gradient) = gradient {
                assert_eq!(shape_and_type(&written, gradient), (shape.clone(), Dtype::F32));
            }
        }
        if n % 3 == 0 {
            expect(&[&path, "--kernel", "decode"], 0);
        }
    }
}

#[test]
fn a_bias_in_the_type_of_q_has_its_gradient_in_that_type() {
    let halves = |values: Vec<f32>| -> Vec<u8> {
        bytemuck::cast_slice(&values.into_iter().map(half::f16::from_f32).collect::<Vec<_>>()).to_vec()
    };
    let file = File::new()
        .put("q", Dtype::F16, &[2, 4, 3, 8], &halves(values(192, 0.7)))
        .put("k", Dtype::F16, &[2, 2, 5, 8], &halves(values(160, 1.1)))
        .put("v", Dtype::F16, &[2, 2, 5, 6], &halves(values(120, 1.9)))
        .put("do", Dtype::F16, &[2, 4, 3, 6], &halves(values(144, 2.3)))
        .put("attn_mask", Dtype::F16, &[1, 4, 3, 5], &halves(values(60, 1.3)));
    let path = file.save("half-bias");
    for (options, written) in
        [(&[][..], Dtype::F16), (&["--dtype", "f32"], Dtype::F32), (&["--dtype", "bf16"], Dtype::BF16)]
    {
        for kernel in ["tile", "reference"] {
            let output = temporary("half-bias-out");
            let out = output.to_str().unwrap();
            let text = expect(&[&[&path, "--backward", "--kernel", kernel, "-o", out], options].concat(), 0);
            assert!(text.contains("batch 1, heads 4, queries 3, keys 5"), "{text}");
            let bytes = std::fs::read(&output).unwrap();
            assert_eq!(shape_and_type(&bytes, "dbias"), (vec![1, 4, 3, 5], written));
            // What is written serves as what is expected.
            let file_out = SafeTensors::deserialize(&bytes).unwrap();
            let again = file.clone().put("dbias", written, &[1, 4, 3, 5], file_out.tensor("dbias").unwrap().data());
            let text = expect(&[&[&again.save("half-bias-again"), "--backward"], options].concat(), 0);
            assert!(text.contains("PASS: dbias:"), "{text}");
        }
    }
    // An f32 bias goes with every type and stays f32.
    let file = file.with("attn_mask", &[1, 4, 3, 5], &values(60, 1.3));
    let output = temporary("half-bias-out");
    expect(&[&file.save("half-and-f32"), "--backward", "-o", output.to_str().unwrap()], 0);
    assert_eq!(shape_and_type(&std::fs::read(output).unwrap(), "dbias"), (vec![1, 4, 3, 5], Dtype::F32));
}

#[test]
fn slopes_of_the_paper_are_an_option() {
    let problem = Problem::new(File::SHAPE, ElementType::F32).with_alibi(Alibi::PerHead);
    let slopes = alibi_slopes(4);
    let extras = Extras { alibi_slopes: Some(slopes.clone()), ..Default::default() };
    let file = with_results(File::new(), &problem, &extras);
    let path = file.save("alibi");
    for kernel in ["naive", "tile", "reference"] {
        let output = temporary("alibi-out");
        let args = [&path, "--alibi", "--backward", "--kernel", kernel, "-o", output.to_str().unwrap()];
        assert!(expect(&args, 0).contains("PASS: o, lse, dq, dk and dv:"));
        // They are no input of the file's, so they have no gradient.
        assert_eq!(SafeTensors::deserialize(&std::fs::read(output).unwrap()).unwrap().len(), 5);
    }
    expect(&[&path], 1);
    let both = file.with("alibi_slopes", &[4], &slopes).save("alibi-twice");
    expect(&[&both], 0);
    expect_refusal(&[&both, "--alibi"], &["alibi_slopes", "--alibi", "--ignore alibi_slopes"]);
    expect(&[&both, "--alibi", "--ignore", "alibi_slopes"], 0);
}

#[test]
fn dropout_reaches_the_kernels_of_both_passes() {
    let dropout = Dropout { probability: 0.3, seed: 1 << 40, offset: 77 };
    let problem = Problem::new(File::SHAPE, ElementType::F32).with_dropout(0.3);
    let extras = Extras { dropout: Some(dropout), ..Default::default() };
    let path = with_results(File::new(), &problem, &extras).save("dropout");
    let options = ["--backward", "--dropout", "0.3", "--seed", "1099511627776", "--offset", "77"];
    for (kernel, dtype) in [("naive", "f32"), ("tile", "f32"), ("tile", "f16"), ("reference", "bf16")] {
        let text = expect(&[&[&path, "--kernel", kernel, "--dtype", dtype], &options[..]].concat(), 0);
        assert!(text.contains("PASS: o, lse, dq, dk and dv:"), "{text}");
    }
    // lse is not affected.
    for other in [&options[..1], &options[..3], &options[..5]] {
        let text = expect(&[&[path.as_str(), "--kernel", "tile"], other].concat(), 1);
        assert!(text.contains("FAIL: o, dq, dk and dv:"), "{text}");
    }
    expect_refusal(&[&path, "--dropout", "1"], &["dropout", "1"]);
    expect_refusal(&[&path, "--dropout", "-0.5"], &["dropout", "-0.5"]);
    expect_refusal(&[&path, "--seed", "3"], &["--dropout"]);
    expect_refusal(&[&path, "--offset", "3"], &["--dropout"]);
    expect_refusal(&[&path, "--dropout", "0.3", "--kernel", "decode"], &["decode", "dropout"]);
}

#[test]
fn bad_biases_masks_slopes_and_sinks_are_refused_in_one_line() {
    let nothing = |dtype: Dtype, n: usize| (dtype, vec![0u8; n]);
    let with = |name, shape: &[usize], (dtype, bytes): (Dtype, Vec<u8>)| File::new().put(name, dtype, shape, &bytes);
    let mask = |shape: &[usize]| {
        let n = shape.iter().product();
        with("attn_mask", shape, (Dtype::BOOL, vec![1; n]))
    };
    let bias = |n: usize, value: f32| {
        let mut bias = values(15, 1.0);
        bias[n] = value;
        File::new().with("attn_mask", &[1, 1, 3, 5], &bias)
    };
    let needs = "[2, 4, 3, 5] (batch, query heads, queries, keys), or 1";
    let cases: &[(&str, File, &[&str])] = &[
        ("mask-rank", mask(&[3, 5]), &["attn_mask has shape [3, 5]", needs]),
        ("mask-keys", mask(&[1, 1, 3, 4]), &["attn_mask has shape [1, 1, 3, 4]", needs]),
        ("mask-heads", mask(&[2, 2, 3, 5]), &["attn_mask has shape [2, 2, 3, 5]", needs]),
        ("mask-order", mask(&[2, 3, 4, 5]), &["attn_mask has shape [2, 3, 4, 5]", needs]),
        ("mask-bytes", with("attn_mask", &[1, 1, 3, 5], (Dtype::BOOL, vec![7; 15])), &["holds a byte of 7", "0 or 1"]),
        (
            "mask-integers",
            with("attn_mask", &[1, 1, 3, 5], nothing(Dtype::I32, 60)),
            &["attn_mask is I32", "BOOL, F32, F16 or BF16"],
        ),
        ("mask-doubles", with("attn_mask", &[1, 1, 3, 5], nothing(Dtype::F64, 120)), &["attn_mask is F64"]),
        (
            "mask-half",
            with("attn_mask", &[1, 1, 3, 5], nothing(Dtype::F16, 30)),
            &["q is F32 and attn_mask is F16", "BOOL or F32", "--dtype"],
        ),
        ("bias-nan", bias(7, f32::NAN), &["attn_mask holds", "1 of 15", "NaN at [0, 0, 1, 2]", "--allow-non-finite"]),
        ("bias-inf", bias(14, f32::INFINITY), &["attn_mask holds", "inf at [0, 0, 2, 4]"]),
        (
            "slopes-shape",
            File::new().with("alibi_slopes", &[2], &[1.0; 2]),
            &["alibi_slopes has shape [2]", "[4] or [2, 4]"],
        ),
        ("slopes-rank", File::new().with("alibi_slopes", &[1, 4], &[1.0; 4]), &["alibi_slopes has shape [1, 4]"]),
        ("slopes-type", with("alibi_slopes", &[4], nothing(Dtype::F16, 8)), &["alibi_slopes is F16", "F32"]),
        (
            "slopes-nan",
            File::new().with("alibi_slopes", &[4], &[1.0, f32::NAN, 0.0, 0.0]),
            &["alibi_slopes holds NaN, element 1"],
        ),
        ("sinks-shape", File::new().with("sinks", &[2, 4], &[1.0; 8]), &["sinks has shape [2, 4]", "[4]"]),
        ("sinks-type", with("sinks", &[4], nothing(Dtype::BF16, 8)), &["sinks is BF16", "F32"]),
        (
            "sinks-inf",
            File::new().with("sinks", &[4], &[0.0, 0.0, f32::INFINITY, 0.0]),
            &["sinks holds inf, element 2"],
        ),
    ];
    for (name, file, words) in cases {
        let path = file.save(&format!("bad-{name}"));
        expect_refusal(&[&path], words);
        // What is ignored is not looked at.
        let tensor =
            ["attn_mask", "alibi_slopes", "sinks"].into_iter().find(|tensor| file.0.iter().any(|(n, ..)| n == tensor));
        expect(&[&path, "--ignore", tensor.unwrap(), "--kernel", "reference"], 0);
    }

    // Expected gradients of what is not there, or of another shape.
    let gradients = || File::new().with("do", &[2, 4, 3, 6], &values(144, 2.3));
    let cases: &[(&str, File, &[&str])] = &[
        (
            "dbias-of-nothing",
            gradients().with("dbias", &[1, 1, 3, 5], &[0.0; 15]),
            &["dbias", "attn_mask that is added"],
        ),
        (
            "dbias-of-mask",
            gradients().put("attn_mask", Dtype::BOOL, &[1, 1, 3, 5], &[1; 15]).with("dbias", &[1, 1, 3, 5], &[0.0; 15]),
            &["dbias", "attn_mask that is added"],
        ),
        ("dsinks-of-nothing", gradients().with("dsinks", &[4], &[0.0; 4]), &["dsinks is the gradient of sinks"]),
        (
            "dalibi_slopes-of-nothing",
            gradients().with("dalibi_slopes", &[4], &[0.0; 4]),
            &["dalibi_slopes is the gradient of alibi_slopes"],
        ),
        (
            "dbias-shape",
            gradients().with("attn_mask", &[1, 1, 3, 5], &[0.0; 15]).with("dbias", &[1, 4, 3, 5], &[0.0; 60]),
            &["expected dbias has shape [1, 4, 3, 5]", "[1, 1, 3, 5]"],
        ),
    ];
    for (name, file, words) in cases {
        let path = file.save(&format!("bad-{name}"));
        expect_refusal(&[&path, "--backward"], words);
        expect(&[&path, "--kernel", "reference"], 0);
    }
}

/// Three rows of blocks of queries and four of keys, of 32 by 32, the last ones cut short.
const OF_BLOCKS: Shape =
    Shape { batch: 2, heads_q: 4, heads_kv: 2, seqlen_q: 70, seqlen_k: 100, head_dim: 8, head_dim_v: 6 };

/// A file with its expected results fails by the plan's choice without what `options` and the tensors say, and passes with it.
#[track_caller]
fn expect_both_passes(name: &str, file: &File, without: &[&str], options: &[&str], says: &str) {
    let bare = without.iter().fold(file.clone(), |file, name| file.without(name));
    let text = expect(&[&bare.save(name), "--backward"], 1);
    assert!(text.contains("FAIL: o, lse, dq, dk and dv:"), "{text}");
    let path = file.save(name);
    for (kernel, dtype) in [("naive", "f32"), ("tile", "f32"), ("tile", "f16"), ("auto", "bf16"), ("reference", "f32")]
    {
        let text = expect(&[&[&path, "--backward", "--kernel", kernel, "--dtype", dtype], options].concat(), 0);
        assert!(text.contains(says) && text.contains("PASS: o, lse, dq, dk and dv:"), "{kernel} {dtype}: {text}");
    }
}

/// FlexAttention's lists, of each batch entry its own: rows of blocks of keys in any order, and past them what nobody reads.
#[test]
fn block_lists_reach_the_kernels_of_both_passes() {
    let counts = [2, 0, 1, 1, 3, 0];
    let indices = [[3, 0, 9], [9, 9, 9], [2, -1, 9], [1, 9, 9], [2, 0, 3], [9, 9, 9]].concat();
    let of_full = [1, 0, 1, 0, 1, 0];
    let full = [[1, 9, 9], [9, 9, 9], [0, 9, 9], [9, 9, 9], [1, 9, 9], [9, 9, 9]].concat();
    let rows = [[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]];
    let lists = BlockLists::new().size(32, 32).per_batch();
    let problem = Problem::new(OF_BLOCKS, ElementType::F32).causal(Causal::BottomRight).with_blocks(lists);
    let extras = Extras { blocks: Some(rows.concat().iter().map(|&n| n == 1).collect()), ..Default::default() };
    let put = |file: File, name, shape: &[usize], numbers: &[i32]| {
        file.put(name, Dtype::I32, shape, bytemuck::cast_slice(numbers))
    };
    let mut file = with_results(File::of(&OF_BLOCKS), &problem.with_gradients(), &extras);
    file = put(file, "kv_num_blocks", &[2, 1, 3], &counts);
    file = put(file, "kv_indices", &[2, 1, 3, 3], &indices);
    file = put(file, "full_kv_num_blocks", &[2, 1, 3], &of_full);
    file = put(file, "full_kv_indices", &[2, 1, 3, 3], &full);
    let names = ["kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"];
    let options = ["--block", "32,32", "--causal", "bottom-right"];
    let says = "of 32 queries by 32 keys: 10 of 24 are listed, a list for each batch entry";
    expect_both_passes("blocks", &file, &names, &options, says);

    // Full blocks count as others do: without them the results are others.
    let partial = names[2..].iter().fold(file.clone(), |file, name| file.without(name)).save("blocks-partial");
    let text = expect(&[&[&partial[..]], &options[..]].concat(), 1);
    assert!(text.contains("7 of 24 are listed") && text.contains("FAIL: o and lse"), "{text}");

    let refused = |file: &File, options: &[&str], words: &[&str]| {
        expect_refusal(&[&[&file.save("blocks-bad")[..]], options].concat(), words);
    };
    let replaced = |name, shape: &[usize], numbers: &[i32]| put(file.clone(), name, shape, numbers);
    let block = &options[..2];
    refused(&file, &[], &["kv_num_blocks has shape [2, 1, 3]", "blocks of 128 queries need [2, 4, 1]", "--block"]);
    refused(&file, &["--block", "32"], &["--block", "two numbers"]);
    refused(&file, &["--block", "0,32"], &["--block", "\"0\" is not a whole number from 1"]);
    refused(&file.clone().without("kv_indices"), block, &["holds kv_num_blocks and no kv_indices"]);
    refused(&file.clone().without("full_kv_num_blocks"), block, &["holds full_kv_indices and no full_kv_num_blocks"]);
    let full_alone = file.clone().without("kv_indices").without("kv_num_blocks");
    refused(&full_alone, block, &["holds full_kv_num_blocks and no kv_num_blocks"]);
    let none = full_alone.without("full_kv_indices").without("full_kv_num_blocks");
    refused(&none, block, &["--block is for block lists", "no kv_num_blocks"]);
    let longs = file.clone().put("kv_indices", Dtype::I64, &[2, 1, 3, 3], &[0; 144]);
    refused(&longs, block, &["kv_indices is I64; it must be I32"]);
    refused(&replaced("kv_indices", &[18], &indices), block, &["kv_indices has 1 dimensions, [18]", "4: [batch"]);
    refused(&replaced("kv_indices", &[2, 3, 1, 3], &indices), block, &["kv_indices has shape [2, 3, 1, 3]"]);
    refused(
        &replaced("full_kv_indices", &[2, 1, 3, 2], &full[..12]),
        block,
        &["full_kv_indices has shape [2, 1, 3, 2]"],
    );
    let refused_numbers = |name, shape: &[usize], numbers: &[i32], words: &[&str]| {
        refused(&replaced(name, shape, numbers), block, words);
    };
    refused_numbers("kv_num_blocks", &[2, 1, 3], &[2, 4, 1, 1, 3, 0], &["kv_num_blocks", "row 1", "4"]);
    refused_numbers("full_kv_num_blocks", &[2, 1, 3], &[1, 0, 1, 1, 1, 0], &["full_kv_indices", "row 3", "9"]);
    let mut twice = full.clone();
    twice[0] = 3;
    refused_numbers("full_kv_indices", &[2, 1, 3, 3], &twice, &["full_kv_indices", "row 0", "3"]);
    // Blocks that no tile divides are for the naive kernel.
    let odd = File::of(&OF_BLOCKS);
    let odd = put(put(odd, "kv_num_blocks", &[1, 1, 2], &[1, 1]), "kv_indices", &[1, 1, 2, 1], &[0, 1]);
    refused(&odd, &["--block", "37,51"], &["37 queries by 51 keys", "tile"]);
    expect(&[&odd.save("blocks-odd"), "--block", "37,51", "--kernel", "naive"], 0);
}

#[test]
fn mods_reach_the_kernels_of_both_passes() {
    const TEXT: &str = "
        var<storage, read> slopes: array<f32>;
        var<storage, read> document: array<i32>;
        fn score_mod(score: f32, at: Position) -> f32 {
            return 3.0 * tanh(score / 3.0) - slopes[at.h] * f32(abs(i32(at.i) + at.shift - i32(at.j)));
        }
        fn mask_mod(at: Position) -> bool {
            return document[at.i] == document[at.j];
        }
    ";
    let slopes = [0.1f32, 0.02, -0.01, 0.05];
    let document: Vec<i32> = (0..100).map(|n| n / 23).collect();
    let bytes = |numbers: &[i32]| -> Vec<u8> { bytemuck::cast_slice(numbers).to_vec() };
    let problem = Problem::new(OF_BLOCKS, ElementType::F32).with_mods(Mods::parse(TEXT).unwrap()).with_gradients();
    let mod_buffers = [("slopes", bytemuck::cast_slice(&slopes).to_vec()), ("document", bytes(&document))];
    let mod_buffers = mod_buffers.map(|(name, bytes)| (name.to_string(), bytes)).into();
    let extras = Extras { mod_buffers, ..Default::default() };
    let file = with_results(File::of(&OF_BLOCKS), &problem, &extras);
    let file = file.with("slopes", &[4], &slopes).put("document", Dtype::I32, &[100], &bytes(&document));
    let text = |name: &str, text: &str| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("attend-{name}.wgsl"));
        std::fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let path = text("mods", TEXT);
    let options = ["--mods", &path];
    let says = "score_mod and mask_mod; buffers slopes, document";
    expect_both_passes("mods", &file, &["slopes", "document"], &options, says);
    expect(&[&file.save("mods"), "--kernel", "decode", "--mods", &path], 0);

    let refused = |file: &File, path: &str, words: &[&str]| {
        expect_refusal(&[&file.save("mods-bad"), "--mods", path], words);
    };
    refused(&file, "no/such.wgsl", &["cannot read no/such.wgsl"]);
    let wrong = text("mods-wrong", "fn mask_mod(at: Position) -> bool {\n    return at.j <= at.row;\n}");
    refused(
        &file.clone().without("slopes").without("document"),
        &wrong,
        &["attend-mods-wrong.wgsl: line 2, column 23"],
    );
    refused(&file.clone().without("document"), &path, &["no tensor document", "--mods"]);
    let longs = file.clone().put("document", Dtype::I64, &[100], &[0; 800]);
    refused(&longs, &path, &["document is I64", "array<i32>", "I32"]);
    refused(&file.clone().put("document", Dtype::I32, &[0], &[]), &path, &["document has no elements"]);
    refused(&file.clone().with("slopes", &[4], &[0.1, f32::NAN, 0.0, 0.0]), &path, &["slopes holds NaN, element 1"]);
}

#[test]
fn gradients_are_written_in_the_computing_type() {
    let file = File::new().with("do", &[2, 4, 3, 6], &values(144, 2.3)).save("backward-written");
    for (dtype, written) in [("f32", Dtype::F32), ("f16", Dtype::F16), ("bf16", Dtype::BF16)] {
        for kernel in ["auto", "reference"] {
            let path = temporary(&format!("backward-written-{dtype}"));
            let args = [&file, "--backward", "--kernel", kernel, "--dtype", dtype, "-o", path.to_str().unwrap()];
            let text = expect(&args, 0);
            assert!(text.contains("no expected o, lse, dq, dk or dv, so nothing was compared"), "{text}");
            let bytes = std::fs::read(&path).unwrap();
            let shapes = [("o", [2, 4, 3, 6]), ("dq", [2, 4, 3, 8]), ("dk", [2, 2, 5, 8]), ("dv", [2, 2, 5, 6])];
            for (name, shape) in shapes {
                assert_eq!(shape_and_type(&bytes, name), (shape.to_vec(), written), "{name}");
            }
        }
    }
}

#[test]
fn bad_gradients_are_refused_in_one_line() {
    let right = || File::new().with("do", &[2, 4, 3, 6], &values(144, 2.3)).with("dlse", &[2, 4, 3], &values(24, 2.9));
    let cases: &[(&str, File, &[&str])] = &[
        ("missing-do", right().without("do"), &["no tensor do", r#""k", "q", "v""#]),
        ("shape-of-do", right().with("do", &[2, 4, 3, 8], &values(192, 1.0)), &["do has shape", "[2, 4, 3, 6]"]),
        ("rank-of-do", right().with("do", &[144], &values(144, 1.0)), &["do has shape [144]"]),
        ("integer-do", right().put("do", Dtype::I32, &[2, 4, 3, 6], &[0; 576]), &["do is I32", "F32, F16 or BF16"]),
        ("double-do", right().put("do", Dtype::F64, &[2, 4, 3, 6], &[0; 1152]), &["do is F64"]),
        ("half-do", right().put("do", Dtype::F16, &[2, 4, 3, 6], &[0; 288]), &["do is F16", "--dtype"]),
        ("shape-of-dlse", right().with("dlse", &[2, 4, 5], &values(40, 1.0)), &["dlse has shape", "[2, 4, 3]"]),
        ("integer-dlse", right().put("dlse", Dtype::I32, &[2, 4, 3], &[0; 96]), &["dlse is I32"]),
        ("double-dlse", right().put("dlse", Dtype::F64, &[2, 4, 3], &[0; 192]), &["dlse is F64"]),
        ("expected-dq", right().with("dq", &[2, 4, 3, 6], &values(144, 1.0)), &["expected dq has shape"]),
        ("expected-dk", right().with("dk", &[2, 4, 5, 8], &values(320, 1.0)), &["expected dk has shape"]),
        ("expected-dv", right().with("dv", &[2, 2, 5, 8], &values(160, 1.0)), &["expected dv has shape"]),
    ];
    for (name, file, words) in cases {
        let path = file.save(&format!("bad-{name}"));
        expect_refusal(&[&path, "--backward"], words);
        expect(&[&path, "--kernel", "reference"], 0);
    }
}

#[test]
fn o_and_lse_are_written_in_the_computing_type() {
    let (o, _) = shape_and_type(FIXTURE, "o");
    for (dtype, written) in [("f32", Dtype::F32), ("f16", Dtype::F16), ("bf16", Dtype::BF16)] {
        let path = temporary(&format!("written-{dtype}"));
        expect(&["--dtype", dtype, "-o", path.to_str().unwrap()], 0);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(shape_and_type(&bytes, "o"), (o.clone(), written));
        assert_eq!(shape_and_type(&bytes, "lse"), (o[..3].to_vec(), Dtype::F32));
    }
}

#[test]
fn without_dtype_the_type_is_that_of_the_file() {
    let half: Vec<half::f16> = values(192, 0.7).into_iter().map(half::f16::from_f32).collect();
    let half: &[u8] = bytemuck::cast_slice(&half);
    let file = File(vec![]).put("q", Dtype::F16, &[1, 2, 4, 24], half).put("k", Dtype::F16, &[1, 2, 4, 24], half).put(
        "v",
        Dtype::F16,
        &[1, 2, 4, 24],
        half,
    );
    let path = temporary("own-type-out");
    let text = expect(&[&file.save("own-type"), "-o", path.to_str().unwrap()], 0);
    assert!(text.contains("nothing was compared"), "{text}");
    assert_eq!(shape_and_type(&std::fs::read(path).unwrap(), "o"), (vec![1, 2, 4, 24], Dtype::F16));
}

#[test]
fn options_and_lengths_reach_the_kernels() {
    let options = ["--causal", "top-left", "--window", "2,-1", "--scale", "-0.9", "--softcap", "1.5"];
    let problem = Problem::new(File::SHAPE, ElementType::F32)
        .causal(Causal::TopLeft)
        .window(Some(2), None)
        .scale(-0.9)
        .softcap(1.5)
        .with_seqlens_k();
    let [q, k, v] = [values(192, 0.7), values(160, 1.1), values(120, 1.9)];
    let result = reference::forward(&problem, &q, &k, &v, Some(&[4, 0][..]));
    let f32s = |values: &[f64]| -> Vec<f32> { values.iter().map(|&x| x as f32).collect() };
    assert!(result.lse.contains(&f64::NEG_INFINITY), "a row without a key is part of this test");
    let file = File::new().with_lengths(&[4, 0]).with("o", &[2, 4, 3, 6], &f32s(&result.out)).with(
        "lse",
        &[2, 4, 3],
        &f32s(&result.lse),
    );
    let path = file.save("options");
    for kernel in ["naive", "tile", "reference"] {
        let with = |options: &[&str]| -> Vec<String> {
            [path.as_str(), "--kernel", kernel].iter().chain(options).map(|s| s.to_string()).collect()
        };
        let run = |args: Vec<String>, code| expect(&args.iter().map(String::as_str).collect::<Vec<_>>(), code);
        run(with(&options), 0);
        run(with(&[&options[..], &["--dtype", "f16"]].concat()), 0);
        // Each of them matters, in 16 bits too.
        for n in (0..options.len()).step_by(2) {
            let fewer = [&options[..n], &options[n + 2..]].concat();
            assert!(run(with(&fewer), 1).contains("FAIL"), "{kernel} without {}", options[n]);
            run(with(&[&fewer[..], &["--dtype", "f16"]].concat()), 1);
        }
    }
    let path = file.with_lengths(&[4, 1]).save("options-lengths");
    expect(&[&[path.as_str()], &options[..]].concat(), 1);
}

#[test]
fn a_wrong_expectation_fails_and_is_named() {
    let result = reference::forward(
        &Problem::new(File::SHAPE, ElementType::F32),
        &values(192, 0.7),
        &values(160, 1.1),
        &values(120, 1.9),
        None,
    );
    let mut out: Vec<f32> = result.out.iter().map(|&x| x as f32).collect();
    let mut lse: Vec<f32> = result.lse.iter().map(|&x| x as f32).collect();
    let right = File::new().with("o", &[2, 4, 3, 6], &out).with("lse", &[2, 4, 3], &lse);
    assert!(expect(&[&right.save("right")], 0).contains("PASS: o and lse:"));

    let last = out.len() - 1;
    out[last] += 0.01;
    let path = right.clone().with("o", &[2, 4, 3, 6], &out).save("wrong-o");
    let text = expect(&[&path], 1);
    assert!(text.contains("FAIL: o:") && text.contains("breaks the bound: relative error"), "{text}");
    // 0.01 is too much in 16 bits as well, and NaN always is.
    assert!(expect(&[&path, "--dtype", "f16"], 1).contains("FAIL: o:"));
    out[last] = f32::NAN;
    assert!(expect(&[&right.clone().with("o", &[2, 4, 3, 6], &out).save("nan-o")], 1).contains("FAIL: o:"));

    lse[7] += 1e-4;
    let path = right.with("lse", &[2, 4, 3], &lse).save("wrong-lse");
    assert!(expect(&[&path], 1).contains("FAIL: lse:"));
}

#[test]
fn bad_files_are_refused_in_one_line() {
    let integers = |name: &'static str| File::new().put(name, Dtype::I32, &[2, 2, 5, 8], &[0; 640]);
    let cases: &[(&str, File, &[&str])] = &[
        ("missing-q", File::new().without("q"), &["no tensor q", r#""k", "v""#]),
        ("missing-k", File::new().without("k"), &["no tensor k"]),
        ("missing-v", File::new().without("v"), &["no tensor v"]),
        ("rank", File::new().with("q", &[8, 3, 8], &values(192, 0.7)), &["q has 3 dimensions", "[8, 3, 8]"]),
        ("rank-of-v", File::new().with("v", &[120], &values(120, 1.0)), &["v has 1 dimension"]),
        ("batch", File::new().with("q", &[1, 8, 3, 8], &values(192, 0.7)), &["k has shape", "batch"]),
        ("head-dim", File::new().with("k", &[2, 2, 8, 5], &values(160, 1.0)), &["k has shape", "head dim"]),
        ("keys", File::new().with("v", &[2, 2, 6, 5], &values(120, 1.0)), &["v has shape"]),
        ("heads", File::new().with("q", &[2, 3, 4, 8], &values(192, 0.7)), &["2 heads", "3", "divide"]),
        ("integers-q", integers("q"), &["q is I32", "F32, F16 or BF16"]),
        ("integers-k", integers("k"), &["k is I32"]),
        ("doubles", File::new().put("q", Dtype::F64, &[2, 4, 3, 8], &[0; 1536]), &["q is F64"]),
        ("mixed", File::new().put("k", Dtype::F16, &[2, 2, 5, 8], &[0; 320]), &["k is F16", "--dtype"]),
        ("negative-length", File::new().with_lengths(&[3, -1]), &["seqlens_k[1] is -1", "0 to 5"]),
        ("large-length", File::new().with_lengths(&[6, 5]), &["seqlens_k[0] is 6"]),
        ("huge-length", File::new().with_lengths(&[5, (1 << 32) + 1]), &["seqlens_k[1] is 4294967297"]),
        ("lengths-shape", File::new().with_lengths(&[3]), &["seqlens_k has shape [1]"]),
        ("lengths-type", File::new().with("seqlens_k", &[2], &[1.0, 2.0]), &["seqlens_k is F32"]),
        ("expected-o", File::new().with("o", &[2, 4, 3, 8], &values(192, 1.0)), &["expected o has shape"]),
        ("expected-lse", File::new().with("lse", &[2, 12], &values(24, 1.0)), &["expected lse has shape"]),
        ("wide", wide(), &["head_dim is 257"]),
    ];
    for (name, file, words) in cases {
        expect_refusal(&[&file.save(&format!("bad-{name}"))], words);
    }
}

/// A head dim above 256.
fn wide() -> File {
    let zeros = [0.0; 257];
    File(vec![]).with("q", &[1, 1, 1, 257], &zeros).with("k", &[1, 1, 1, 257], &zeros).with(
        "v",
        &[1, 1, 1, 257],
        &zeros,
    )
}

#[test]
fn unreadable_files_are_refused_in_one_line() {
    expect_refusal(&["no/such/file"], &["cannot read no/such/file"]);
    let path = temporary("cut");
    std::fs::write(&path, &FIXTURE[..FIXTURE.len() / 2]).unwrap();
    expect_refusal(&[path.to_str().unwrap()], &["attend-cut", "no safetensors file"]);
    std::fs::write(&path, "not a tensor in sight").unwrap();
    expect_refusal(&[path.to_str().unwrap()], &["attend-cut", "no safetensors file"]);
}

#[test]
fn options_out_of_range_are_refused_in_one_line() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--causal", "up"], &["--causal", "up", "bottom-right, top-left"]),
        (&["--window", "3"], &["--window", "comma"]),
        (&["--window", "-2,1"], &["--window", "-2", "-1"]),
        (&["--window", "1,x"], &["--window", "x"]),
        (&["--window", "0,536870913"], &["--window", "536870912"]),
        (&["--scale", "much"], &["--scale", "much"]),
        (&["--scale", "nan"], &["scale is NaN"]),
        (&["--scale", "inf"], &["scale is inf"]),
        (&["--softcap", "0"], &["softcap is 0"]),
        (&["--softcap", "-3"], &["softcap is -3"]),
        (&["--kernel", "magic"], &["--kernel", "magic", "reference"]),
        (&["--dtype", "f64"], &["--dtype", "f64"]),
        (&["--no-such-option"], &["--no-such-option"]),
        (&["one", "two"], &["two"]),
    ];
    for (args, words) in cases {
        expect_refusal(args, words);
    }
}

#[test]
fn tensors_that_mean_nothing_are_named_in_a_warning() {
    let file = || File::new().with("attn_bias", &[3, 5], &values(15, 1.0)).put("seqlen_k", Dtype::I32, &[2], &[1; 8]);
    let path = file().save("unknown");
    let host = ["--kernel", "reference"];
    let warned = |options: &[&str], words: &[&str]| expect_warning(&[&[&path[..]], &host[..], options].concat(), words);
    warned(&[], &["tensors that mean nothing to attend", "leaves them out: \"attn_bias\", \"seqlen_k\"", "--ignore"]);
    warned(&["--ignore", "attn_bias"], &["a tensor that means nothing", "it out: \"seqlen_k\";"]);
    let output = attend(&[&[&path[..], "--ignore", "attn_bias", "--ignore", "seqlen_k"], &host[..]].concat());
    assert!(output.status.success() && !stderr(&output).contains("warning"), "{}", stderr(&output));
    assert!(stdout(&output).contains("nothing was compared"), "{}", stdout(&output));
    expect_refusal(&[&path, "--ignore", "mask"], &["--ignore names \"mask\"", "does not hold"]);
    expect_refusal(&[&path, "--ignore", "q"], &["--ignore names q", "needed"]);
    // What is ignored is not read, be it wrong, and neither are names that only --backward reads.
    let path = File::new().with_lengths(&[6, 9]).with("do", &[1], &[0.0]).save("ignored-lengths");
    expect(&[&path, "--ignore", "seqlens_k", "--kernel", "reference"], 0);
}

#[test]
fn lengths_of_queries_are_checked_and_not_left_out() {
    let with = |lengths: &[i64]| {
        let bytes = bytemuck::cast_slice(lengths);
        File::new().put("seqlens_q", Dtype::I64, &[lengths.len()], bytes).save("seqlens-q")
    };
    expect_refusal(&[&with(&[3, 4])], &["seqlens_q[1] is 4", "0 to 3, the number of queries"]);
    expect_refusal(&[&with(&[3])], &["seqlens_q has shape [1]"]);
    // Both lengths, on a bottom-right diagonal that ends where both end.
    let problem = Problem::new(File::SHAPE, ElementType::F32).causal(Causal::BottomRight);
    let problem = problem.with_seqlens_q().with_seqlens_k();
    let lengths = reference::Extras::default().seqlens_q(&[3, 2][..]).seqlens_k(&[5, 2][..]);
    let result = reference::forward(&problem, &values(192, 0.7), &values(160, 1.1), &values(120, 1.9), lengths);
    let f32s = |values: &[f64]| -> Vec<f32> { values.iter().map(|&x| x as f32).collect() };
    let path = File::new()
        .with_lengths(&[5, 2])
        .put("seqlens_q", Dtype::I64, &[2], bytemuck::cast_slice(&[3i64, 2]))
        .with("o", &[2, 4, 3, 6], &f32s(&result.out))
        .with("lse", &[2, 4, 3], &f32s(&result.lse))
        .save("seqlens-both");
    for kernel in ["naive", "tile", "decode", "reference"] {
        let text = expect(&[&path, "--causal", "bottom-right", "--kernel", kernel], 0);
        assert!(text.contains("query lengths 3, 2, key lengths 5, 2") && text.contains("PASS"), "{text}");
    }
}

#[test]
fn names_from_a_file_are_quoted_and_cut() {
    let with = |name: String, tag: &str| {
        File::new().with(Box::leak(name.into_boxed_str()), &[1], &[0.0]).save(&format!("name-{tag}"))
    };
    let host = ["--kernel", "reference"];
    let warned = |path: String, words: &[&str]| expect_warning(&[&[&path[..]], &host[..]].concat(), words);
    let text = warned(with("\u{1b}[31mred\r\n\u{202e}\u{7}".into(), "escapes"), &["\\u{1b}[31mred\\r\\n"]);
    assert!(!text.contains(['\u{1b}', '\u{202e}', '\u{7}']), "{text:?}");
    let text = warned(with("ü".repeat(100_000), "long"), &["… (100000 characters)"]);
    assert!(text.len() < 1000, "{} bytes", text.len());
    // Where the names are listed as what the file has, too.
    let path = (0..100).fold(File::new().without("q"), |file, n| {
        let name = format!("{n}\u{1b}{}", "x".repeat(1000));
        file.with(Box::leak(name.into_boxed_str()), &[1], &[0.0])
    });
    let text = expect_refusal(&[&path.save("name-many")], &["and 94 more"]);
    assert!(text.len() < 2000 && !text.contains('\u{1b}'), "{text:?}");
    // Of a broken file the library that reads it quotes the name.
    let header = format!(r#"{{"{}":{{"dtype":"F32","shape":[2],"data_offsets":[4,0]}}}}"#, "y".repeat(100_000));
    let path = temporary("name-broken");
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat()).unwrap();
    let text = expect_refusal(&[path.to_str().unwrap()], &["no safetensors file"]);
    assert!(text.len() < 1000, "{} bytes", text.len());
    // A path is what the caller typed, or what a file browser did.
    let text = expect_refusal(&["no\u{1b}[2Jsuch\nfile"], &["cannot read no\\u{1b}[2Jsuch\\nfile"]);
    assert!(!text.contains('\u{1b}'), "{text:?}");
}

#[test]
fn inputs_that_are_not_finite_are_refused_by_place() {
    let changed = |name: &'static str, shape: &[usize], step, n: usize, value| {
        let mut changed = values(shape.iter().product(), step);
        changed[n] = value;
        File::new().with("do", &[2, 4, 3, 6], &values(144, 2.3)).with(name, shape, &changed)
    };
    let shapes: [(&str, &[usize]); 4] =
        [("q", &[2, 4, 3, 8]), ("k", &[2, 2, 5, 8]), ("v", &[2, 2, 5, 6]), ("do", &[2, 4, 3, 6])];
    for (name, shape) in shapes {
        for (value, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            let path = changed(name, shape, 0.7, 50, value).save("not-finite");
            let dim = shape[3];
            let at = [50 / dim / shape[2] / shape[1], 50 / dim / shape[2] % shape[1], 50 / dim % shape[2], 50 % dim];
            let count = format!("1 of {}", shape.iter().product::<usize>());
            let words = [&format!("{name} holds values that are NaN or infinite"), &count, word, &format!("at {at:?}")];
            expect_refusal(&[&path, "--backward"], &words);
            if name == "do" {
                expect(&[&path, "--kernel", "reference"], 0);
            }
        }
        // Finite in the file, infinite in f16.
        let path = changed(name, shape, 0.7, 3, 65520.0).save("too-large");
        expect_refusal(&[&path, "--backward", "--dtype", "f16"], &["too large for f16", "65520.0 at [0, 0, 0, 3]"]);
        expect(&[&path, "--backward", "--dtype", "bf16", "--kernel", "reference"], 0);
    }
    let path = File::new()
        .with("do", &[2, 4, 3, 6], &values(144, 1.0))
        .with("dlse", &[2, 4, 3], &[f32::NAN; 24])
        .save("not-finite-dlse");
    expect_refusal(&[&path, "--backward"], &["dlse holds", "24 of 24", "at [0, 0, 0]"]);

    // Keys past the lengths may hold anything: they do not count.
    let mut keys = values(160, 1.1);
    keys[4 * 8..5 * 8].fill(f32::NAN);
    let file = File::new().with("k", &[2, 2, 5, 8], &keys);
    expect_refusal(&[&file.save("nan-past-the-end")], &["k holds", "8 of 160", "at [0, 0, 4, 0]"]);
    keys[9 * 8..10 * 8].fill(f32::NAN);
    let file = File::new().with("k", &[2, 2, 5, 8], &keys).with_lengths(&[4, 5]);
    expect(&[&file.save("nan-past-length"), "--kernel", "naive"], 0);
    // The option goes on.
    let path = changed("q", &[2, 4, 3, 8], 0.7, 50, f32::NAN).save("not-finite");
    expect(&[&path, "--allow-non-finite", "--kernel", "reference"], 0);
}

#[test]
fn the_input_is_not_written_over() {
    let path = File::new().save("own-output");
    let before = std::fs::read(&path).unwrap();
    let folder = Path::new(&path).parent().unwrap();
    let roundabout = folder.join("..").join(folder.file_name().unwrap()).join(Path::new(&path).file_name().unwrap());
    expect_refusal(&[&path, "-o", &path], &["is the input"]);
    expect_refusal(&[&path, "-o", roundabout.to_str().unwrap()], &["is the input"]);
    #[cfg(unix)]
    {
        let link = temporary("own-output-link");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&path, &link).unwrap();
        expect_refusal(&[&path, "-o", link.to_str().unwrap()], &["is the input"]);
        expect_refusal(&[link.to_str().unwrap(), "-o", &path], &["is the input"]);
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

/// A name alone in a folder of its own, so that one sees what else is left there.
fn lonely(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("attend-{name}"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir(&folder).unwrap();
    folder.join("out.safetensors")
}

#[test]
fn what_cannot_be_written_is_said_before_anything_is_computed() {
    let input = File::new().save("early");
    let folder = lonely("early-folder").parent().unwrap().to_str().unwrap().to_string();
    for (output, word) in [("no/such/folder/out", "No such file"), (folder.as_str(), "a folder")] {
        let args = [input.as_str(), "-o", output];
        let result = attend(&args);
        refusal(&result, &args, &["cannot write", word]);
        assert!(!stdout(&result).contains("adapter"), "{}", stdout(&result));
    }
}

#[test]
fn an_output_is_replaced_whole_and_links_to_it_stay() {
    let input = File::new().save("replaced");
    let output = lonely("replaced-whole");
    std::fs::write(&output, "old").unwrap();
    #[cfg(not(unix))]
    let name = output.clone();
    #[cfg(unix)]
    let name = {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&output, std::fs::Permissions::from_mode(0o640)).unwrap();
        let name = output.with_file_name("link");
        std::os::unix::fs::symlink("out.safetensors", &name).unwrap();
        name
    };
    expect(&[&input, "-o", name.to_str().unwrap(), "--kernel", "reference"], 0);
    let bytes = std::fs::read(&output).unwrap();
    assert_eq!(shape_and_type(&bytes, "o"), (vec![2, 4, 3, 6], Dtype::F32));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert!(std::fs::symlink_metadata(&name).unwrap().is_symlink());
        assert_eq!(std::fs::metadata(&output).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(std::fs::read_dir(output.parent().unwrap()).unwrap().count(), 2, "a temporary file is left");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_leaves_the_old_output_as_it_was() {
    let input = File::new().save("full");
    let output = lonely("full-disk");
    std::fs::write(&output, "old").unwrap();
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().parent().unwrap().join("examples/attend");
    // Files of at most 512 bytes stand for a disk that is full after as many.
    let limited = r#"trap "" XFSZ; ulimit -f 1; exec "$0" "$@""#;
    let args = [input.as_str(), "--kernel", "reference", "-o", output.to_str().unwrap()];
    let result = Command::new("sh").args(["-c", limited]).arg(program).args(args).output().unwrap();
    refusal(&result, &args, &["cannot write", "out.safetensors"]);
    assert_eq!(std::fs::read(&output).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(output.parent().unwrap()).unwrap().count(), 1, "a temporary file is left");

    // A device is written to and not replaced.
    expect_refusal(&[&input, "--kernel", "reference", "-o", "/dev/full"], &["cannot write /dev/full", "No space left"]);
    expect(&[&input, "--kernel", "reference", "-o", "/dev/null"], 0);
    use std::os::unix::fs::FileTypeExt;
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
}

/// Tensors of `[batch, heads, positions, dim]` in the order `[batch, positions, heads, dim]`.
fn swapped(values: &[f32], [b, h, n, d]: [usize; 4]) -> Vec<f32> {
    let mut all = vec![];
    for b in 0..b {
        for position in 0..n {
            for head in 0..h {
                all.extend_from_slice(&values[((b * h + head) * n + position) * d..][..d]);
            }
        }
    }
    all
}

#[test]
fn files_of_batch_positions_heads_dim_are_read_on_request() {
    let problem = Problem::new(File::SHAPE, ElementType::F32).causal(Causal::BottomRight).with_seqlens_k();
    let lengths = [4, 5];
    let [q, k, v] = [values(192, 0.7), values(160, 1.1), values(120, 1.9)];
    let result = reference::forward(&problem, &q, &k, &v, Some(&lengths[..]));
    let f32s = |values: &[f64]| -> Vec<f32> { values.iter().map(|&x| x as f32).collect() };
    let file = with_gradients(File::new().with_lengths(&[4, 5]), &problem, Some(&lengths));
    let mut other = file.with("o", &[2, 4, 3, 6], &f32s(&result.out)).with("lse", &[2, 4, 3], &f32s(&result.lse));
    for (_, dtype, shape, bytes) in &mut other.0 {
        if let ([b, h, n, d], Dtype::F32) = (&shape[..], *dtype) {
            let (values, sizes) = (bytemuck::pod_collect_to_vec::<u8, f32>(bytes), [*b, *h, *n, *d]);
            *bytes = bytemuck::cast_slice(&swapped(&values, sizes)).to_vec();
            *shape = vec![*b, *n, *h, *d];
        }
    }
    let path = other.save("bnhd");
    for kernel in ["tile", "reference"] {
        let out = temporary(&format!("bnhd-out-{kernel}"));
        let out = out.to_str().unwrap();
        let options = ["--layout", "bnhd", "--backward", "--causal", "bottom-right", "--kernel", kernel, "-o", out];
        let text = expect(&[&[path.as_str()], &options[..]].concat(), 0);
        assert!(text.contains("PASS: o, lse, dq, dk and dv"), "{text}");
        for line in ["batch 2, queries 3, heads 4, head dim 8", "batch 2, keys 5, heads 2, head dim 6"] {
            assert!(text.contains(line), "{text}");
        }
        // Outputs have the order of the inputs, so that they serve as what is expected.
        let bytes = std::fs::read(out).unwrap();
        assert_eq!(shape_and_type(&bytes, "o").0, [2, 3, 4, 6]);
        assert_eq!(shape_and_type(&bytes, "lse").0, [2, 4, 3]);
        assert_eq!(shape_and_type(&bytes, "dk").0, [2, 5, 2, 8]);
        let written = SafeTensors::deserialize(&bytes).unwrap();
        let mut again = other.clone();
        for name in ["o", "dq", "dk", "dv"] {
            let (shape, _) = shape_and_type(&bytes, name);
            again = again.put(name, Dtype::F32, &shape, written.tensor(name).unwrap().data());
        }
        let again = again.save("bnhd-again");
        expect(&[&again, "--layout", "bnhd", "--backward", "--causal", "bottom-right", "--kernel", kernel], 0);
    }
    // Without the option the sizes do not fit, and the message says what may help.
    expect_refusal(&[&path], &["divide q's", "--layout bnhd"]);
}

#[test]
fn options_that_nothing_would_look_at_are_refused() {
    for kernel in ["auto", "tile", "naive", "reference"] {
        expect_refusal(&["--kernel", kernel, "--coop-form", "registers"], &["--coop-form", "--kernel coop"]);
    }
    expect_refusal(&["--kernel", "reference", "--checked"], &["--checked", "reference"]);
    expect_refusal(&["--kernel", "reference", "--adapter", "x"], &["--adapter", "reference"]);
}

#[test]
fn an_adapter_that_is_not_there_is_named() {
    let output = attend(&["--adapter", "abacus"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("\"abacus\""), "{}", stderr(&output));
}
