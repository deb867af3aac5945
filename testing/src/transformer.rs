//! A causal transformer over characters: everything but its attention, plain and on the host, with gradients by hand.
//!
//! Rows of a matrix are the tokens of all sequences, one after the other.
//!
//!     x = token embedding + position embedding
//!     for each block:
//!         x += attention(norm(x) Wq, norm(x) Wk, norm(x) Wv) Wo
//!         x += gelu(norm(x) Wup) Wdown
//!     logits = norm(x) Whead
//!
//! A layer keeps its input in `forward`; `backward` takes the gradient of its output, adds to the gradients of its
//! parameters and returns the gradient of its input.

use fastrand::Rng;
use ndarray::linalg::general_mat_mul;
use ndarray::{Axis, NdFloat, Zip};
use wgpu_flash_attention::Error;

/// What the host computes in: f32 in the example, to be fast; f64 in the tests, for finite differences.
pub trait Real: NdFloat + Into<f64> {
    /// The nearest value.
    fn of(x: f64) -> Self;
}

impl Real for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
}
impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
}

pub type Matrix<R> = ndarray::Array2<R>;

/// Causal attention over q, k, v `[batch · positions, heads · head_dim]`.
pub trait Attention<R> {
    /// o of one block, in the same form.
    fn forward(
        &mut self,
        block: usize,
        query: &Matrix<R>,
        key: &Matrix<R>,
        value: &Matrix<R>,
    ) -> Result<Matrix<R>, Error>;
}

/// Attention that can be trained: `forward` keeps what `backward` needs.
pub trait Differentiable<R>: Attention<R> {
    /// The gradients of q, k and v at the block's last `forward`.
    fn backward(&mut self, block: usize, grad_out: &Matrix<R>) -> Result<[Matrix<R>; 3], Error>;
}

/// A text as numbers of its characters.
pub struct Text {
    /// Its characters, each once.
    pub alphabet: Vec<char>,
    pub tokens: Vec<usize>,
}

impl Text {
    pub fn new(text: &str) -> Self {
        let mut alphabet: Vec<char> = text.chars().collect();
        alphabet.sort();
        alphabet.dedup();
        let tokens = text.chars().filter_map(|c| alphabet.binary_search(&c).ok()).collect();
        Text { alphabet, tokens }
    }

    /// Pieces of the text from random places. The text is longer than a piece.
    pub fn batch(&self, rng: &mut Rng, pieces: usize, length: usize) -> Batch {
        let mut batch = Batch { tokens: vec![], positions: vec![], targets: vec![] };
        for _ in 0..pieces {
            let piece = &self.tokens[rng.usize(0..self.tokens.len() - length)..][..length + 1];
            batch.tokens.extend(&piece[..length]);
            batch.positions.extend(0..length);
            batch.targets.extend(&piece[1..]);
        }
        batch
    }
}

/// What a step of training learns from: of each row the token, its place in its sequence, and the token that follows.
pub struct Batch {
    pub tokens: Vec<usize>,
    pub positions: Vec<usize>,
    pub targets: Vec<usize>,
}

/// The sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Different tokens.
    pub vocabulary: usize,
    /// Positions that are told apart: the longest sequence.
    pub context: usize,
    /// Elements of a row.
    pub dim: usize,
    /// Blocks.
    pub layers: usize,
}

/// A matrix that is learnt, with its gradient and AdamW's averages of the gradient and of its square.
pub struct Parameter<R> {
    pub value: Matrix<R>,
    pub gradient: Matrix<R>,
    mean: Matrix<R>,
    square: Matrix<R>,
    /// Whether weight decay pulls it towards 0.
    decays: bool,
}

impl<R: Real> Parameter<R> {
    fn new(value: Matrix<R>, decays: bool) -> Self {
        let zeros = || Matrix::zeros(value.raw_dim());
        Parameter { gradient: zeros(), mean: zeros(), square: zeros(), decays, value }
    }

    /// Random values of this standard deviation.
    fn random(rng: &mut Rng, [rows, columns]: [usize; 2], deviation: f64) -> Self {
        let value = || R::of(12f64.sqrt() * deviation * (rng.f64() - 0.5));
        Self::new(Matrix::from_shape_simple_fn((rows, columns), value), true)
    }
}

/// y = x W
struct Linear<R> {
    weight: Parameter<R>,
    input: Matrix<R>,
}

impl<R: Real> Linear<R> {
    fn new(rng: &mut Rng, inputs: usize, outputs: usize, deviation: f64) -> Self {
        Linear { weight: Parameter::random(rng, [inputs, outputs], deviation), input: Matrix::zeros((0, 0)) }
    }

    fn forward(&mut self, x: Matrix<R>) -> Matrix<R> {
        self.input = x;
        self.input.dot(&self.weight.value)
    }

    fn backward(&mut self, grad: &Matrix<R>) -> Matrix<R> {
        general_mat_mul(R::one(), &self.input.t(), grad, R::one(), &mut self.weight.gradient);
        grad.dot(&self.weight.value.t())
    }
}

/// y = x / rms(x) · gain, row by row
struct Norm<R> {
    gain: Parameter<R>,
    input: Matrix<R>,
}

impl<R: Real> Norm<R> {
    fn new(dim: usize) -> Self {
        Norm { gain: Parameter::new(Matrix::ones((1, dim)), false), input: Matrix::zeros((0, 0)) }
    }

    /// 1 / rms of each row, as a column.
    fn scales(x: &Matrix<R>) -> Matrix<R> {
        let scale = |squares: R| (squares / R::of(x.ncols() as f64) + R::of(1e-6)).sqrt().recip();
        (x * x).sum_axis(Axis(1)).mapv(scale).insert_axis(Axis(1))
    }

    fn forward(&mut self, x: &Matrix<R>) -> Matrix<R> {
        self.input = x.clone();
        x * &Self::scales(x) * &self.gain.value
    }

    fn backward(&mut self, grad: &Matrix<R>) -> Matrix<R> {
        let x = &self.input;
        let scale = Self::scales(x);
        let normed = x * &scale;
        self.gain.gradient += &(grad * &normed).sum_axis(Axis(0));
        // With g = grad · gain and n = x · scale:  dx = scale · (g − n · mean(g · n))
        let g = grad * &self.gain.value;
        let mean = (&g * &normed).sum_axis(Axis(1)).insert_axis(Axis(1)) / R::of(x.ncols() as f64);
        (g - normed * mean) * scale
    }
}

/// GELU in the usual form with tanh, element by element.
struct Gelu<R> {
    input: Matrix<R>,
}

impl<R: Real> Gelu<R> {
    /// tanh of the inner polynomial `√(2/π) (x + c x³)`, and its derivative in x.
    fn tanh(x: R) -> (R, R) {
        let (slope, cube) = (R::of((2.0 / std::f64::consts::PI).sqrt()), R::of(0.044715));
        let tanh = (slope * (x + cube * x * x * x)).tanh();
        (tanh, (R::one() - tanh * tanh) * slope * (R::one() + R::of(3.0) * cube * x * x))
    }

    fn forward(&mut self, x: Matrix<R>) -> Matrix<R> {
        self.input = x;
        self.input.mapv(|x| R::of(0.5) * x * (R::one() + Self::tanh(x).0))
    }

    fn backward(&mut self, mut grad: Matrix<R>) -> Matrix<R> {
        grad.zip_mut_with(&self.input, |grad, &x| {
            let (tanh, slope) = Self::tanh(x);
            *grad *= R::of(0.5) * (R::one() + tanh + x * slope);
        });
        grad
    }
}

struct Block<R> {
    norm: Norm<R>,
    query: Linear<R>,
    key: Linear<R>,
    value: Linear<R>,
    out: Linear<R>,
    mlp_norm: Norm<R>,
    up: Linear<R>,
    gelu: Gelu<R>,
    down: Linear<R>,
}

impl<R: Real> Block<R> {
    fn new(rng: &mut Rng, dim: usize, layers: usize) -> Self {
        // As GPT-2: what is added to x is made smaller, so that x does not grow with the number of blocks.
        let added = DEVIATION / (2.0 * layers as f64).sqrt();
        let mut linear = |inputs, outputs, deviation| Linear::new(rng, inputs, outputs, deviation);
        Block {
            norm: Norm::new(dim),
            query: linear(dim, dim, DEVIATION),
            key: linear(dim, dim, DEVIATION),
            value: linear(dim, dim, DEVIATION),
            out: linear(dim, dim, added),
            mlp_norm: Norm::new(dim),
            up: linear(dim, 4 * dim, DEVIATION),
            gelu: Gelu { input: Matrix::zeros((0, 0)) },
            down: linear(4 * dim, dim, added),
        }
    }

    fn forward(&mut self, x: Matrix<R>, block: usize, attention: &mut dyn Attention<R>) -> Result<Matrix<R>, Error> {
        let normed = self.norm.forward(&x);
        let query = self.query.forward(normed.clone());
        let key = self.key.forward(normed.clone());
        let value = self.value.forward(normed);
        let x = x + self.out.forward(attention.forward(block, &query, &key, &value)?);
        let hidden = self.up.forward(self.mlp_norm.forward(&x));
        let hidden = self.gelu.forward(hidden);
        Ok(x + self.down.forward(hidden))
    }

    fn backward(
        &mut self,
        grad: Matrix<R>,
        block: usize,
        attention: &mut dyn Differentiable<R>,
    ) -> Result<Matrix<R>, Error> {
        let hidden = self.gelu.backward(self.down.backward(&grad));
        let grad = self.mlp_norm.backward(&self.up.backward(&hidden)) + grad;
        let [query, key, value] = attention.backward(block, &self.out.backward(&grad))?;
        let normed = self.query.backward(&query) + self.key.backward(&key) + self.value.backward(&value);
        Ok(self.norm.backward(&normed) + grad)
    }
}

/// The standard deviation of the first weights.
const DEVIATION: f64 = 0.02;

pub struct Transformer<R> {
    tokens: Parameter<R>,
    positions: Parameter<R>,
    blocks: Vec<Block<R>>,
    norm: Norm<R>,
    head: Linear<R>,
}

impl<R: Real> Transformer<R> {
    pub fn new(sizes: Sizes, seed: u64) -> Self {
        let Sizes { vocabulary, context, dim, layers } = sizes;
        let rng = &mut Rng::with_seed(seed);
        Transformer {
            tokens: Parameter::random(rng, [vocabulary, dim], DEVIATION),
            positions: Parameter::random(rng, [context, dim], DEVIATION),
            blocks: (0..layers).map(|_| Block::new(rng, dim, layers)).collect(),
            norm: Norm::new(dim),
            head: Linear::new(rng, dim, vocabulary, DEVIATION),
        }
    }

    /// The logits of what follows each token, `[tokens, vocabulary]`.
    pub fn logits(
        &mut self,
        tokens: &[usize],
        positions: &[usize],
        attention: &mut dyn Attention<R>,
    ) -> Result<Matrix<R>, Error> {
        let mut x = self.tokens.value.select(Axis(0), tokens) + self.positions.value.select(Axis(0), positions);
        for (n, block) in self.blocks.iter_mut().enumerate() {
            x = block.forward(x, n, attention)?;
        }
        Ok(self.head.forward(self.norm.forward(&x)))
    }

    /// The loss, with its gradients added to those of the parameters.
    pub fn learn(&mut self, batch: &Batch, attention: &mut dyn Differentiable<R>) -> Result<f64, Error> {
        let Batch { tokens, positions, targets } = batch;
        let (loss, grad) = cross_entropy(self.logits(tokens, positions, attention)?, targets);
        let mut grad = self.norm.backward(&self.head.backward(&grad));
        for (n, block) in self.blocks.iter_mut().enumerate().rev() {
            grad = block.backward(grad, n, attention)?;
        }
        for (n, row) in grad.outer_iter().enumerate() {
            let mut token = self.tokens.gradient.row_mut(tokens[n]);
            token += &row;
            let mut position = self.positions.gradient.row_mut(positions[n]);
            position += &row;
        }
        Ok(loss)
    }

    pub fn parameters(&mut self) -> Vec<&mut Parameter<R>> {
        let mut all = vec![&mut self.tokens, &mut self.positions, &mut self.norm.gain, &mut self.head.weight];
        for block in &mut self.blocks {
            all.extend([&mut block.norm.gain, &mut block.mlp_norm.gain]);
            let linear = [&mut block.query, &mut block.key, &mut block.value, &mut block.out];
            all.extend(linear.into_iter().chain([&mut block.up, &mut block.down]).map(|linear| &mut linear.weight));
        }
        all
    }
}

/// The mean over the rows of −log softmax(logits)[target], and its gradient.
pub fn cross_entropy<R: Real>(mut logits: Matrix<R>, targets: &[usize]) -> (f64, Matrix<R>) {
    let rows = R::of(targets.len() as f64);
    let mut loss = 0.0;
    for (mut row, &target) in logits.outer_iter_mut().zip(targets) {
        let max = row.fold(R::neg_infinity(), |max, &x| max.max(x));
        let right = row[target] - max;
        row.mapv_inplace(|x| (x - max).exp());
        let sum = row.sum();
        loss += (sum.ln() - right).into();
        row.mapv_inplace(|x| x / sum / rows);
        row[target] -= rows.recip();
    }
    (loss / targets.len() as f64, logits)
}

/// AdamW (Loshchilov and Hutter, 2017).
pub struct AdamW {
    weight_decay: f64,
    steps: i32,
}

impl AdamW {
    const BETA1: f64 = 0.9;
    const BETA2: f64 = 0.99;

    pub fn new(weight_decay: f64) -> Self {
        AdamW { weight_decay, steps: 0 }
    }

    /// Moves every parameter against its gradient, and sets that to 0 for the next step.
    pub fn step<R: Real>(&mut self, parameters: Vec<&mut Parameter<R>>, rate: R) {
        self.steps += 1;
        let [keep1, keep2] = [Self::BETA1, Self::BETA2].map(|beta| R::of(1.0 - beta));
        // The averages begin at 0; this makes up for it.
        let [mean_of, square_of] = [Self::BETA1, Self::BETA2].map(|beta| R::of(1.0 / (1.0 - beta.powi(self.steps))));
        for Parameter { value, gradient, mean, square, decays } in parameters {
            let decay = if *decays { rate * R::of(self.weight_decay) } else { R::zero() };
            Zip::from(value).and(gradient).and(mean).and(square).for_each(|value, gradient, mean, square| {
                *mean += keep1 * (*gradient - *mean);
                *square += keep2 * (*gradient * *gradient - *square);
                *value -= decay * *value + rate * *mean * mean_of / ((*square * square_of).sqrt() + R::of(1e-8));
                *gradient = R::zero();
            });
        }
    }
}
