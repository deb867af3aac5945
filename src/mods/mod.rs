//! Scores and masks that a user writes in WGSL, and the derivative that the library writes for them.

mod active;
mod build;
mod dual;
mod error;
mod expressions;
mod interpret;
mod number;
mod operate;
mod parse;
mod reasons;
mod rules;
mod size;
#[cfg(test)]
mod tests;
mod value;
mod whole;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use naga::valid::{ValidationFlags, Validator};
use naga::{Module, ResourceBinding, Scalar, Span, TypeInner};

pub use error::ModError;
pub(crate) use parse::MOST_BUFFERS;

use error::Refusal;
use interpret::Run;
use number::Number;
use parse::Parsed;
use value::Value;

/// The number of the first buffer in the group of a kernel's bindings. The others follow.
pub(crate) const FIRST_BINDING: u32 = 40;

/// A `score_mod`, a `mask_mod`, or both, written in WGSL: what a score becomes, and whether it counts. Clones share all.
///
/// ```
/// use wgpu_flash_attention::{ElementType, Mods, Problem, Shape};
///
/// let mods = Mods::parse(
///     "
///     // Buffers have no @group and @binding: they are given by name when a pass is recorded.
///     var<storage, read> slopes: array<f32>;
///     var<storage, read> document: array<u32>;
///
///     // What a score becomes. It comes scaled, and capped if the problem has a softcap.
///     fn score_mod(score: f32, at: Position) -> f32 {
///         let distance = f32(i32(at.i) + at.shift - i32(at.j));
///         return 30.0 * tanh(score / 30.0) - slopes[at.h] * abs(distance);
///     }
///
///     // Whether it counts.
///     fn mask_mod(at: Position) -> bool {
///         return document[at.i] == document[at.j] && i32(at.j) <= i32(at.i) + at.shift;
///     }
///     ",
/// )?;
/// assert!(mods.buffers().eq(["slopes", "document"]));
/// assert!(mods.buffer_types().eq(["f32", "u32"]));
/// let problem = Problem::new(Shape::square(1, 8, 512, 64), ElementType::F16).with_mods(mods);
///
/// // Errors say where.
/// let error = Mods::parse("fn mask_mod(at: Position) -> bool {\n    return at.j <= at.row;\n}").unwrap_err();
/// assert_eq!((error.line, error.column), (2, 23));
/// # Ok::<(), wgpu_flash_attention::ModError>(())
/// ```
///
/// # What the text has
///
/// - `fn score_mod(score: f32, at: Position) -> f32`, `fn mask_mod(at: Position) -> bool`, or both.
/// - Functions that these call, constants, structs, variables of functions.
/// - Buffers, `var<storage, read> name: array<f32>;`, of f32, i32 or u32, at most eight. All that are declared are given
///   with [`ForwardBuffers::mod_buffer`](crate::ForwardBuffers::mod_buffer).
///
/// The library declares `Position`, where a score is:
///
/// ```wgsl
/// struct Position { b: u32, h: u32, i: u32, j: u32, queries: u32, keys: u32, shift: i32 }
/// ```
///
/// Batch entry `b`, query head `h`, query `i` and key `j` are numbers of the problem, whatever part of it a dispatch computes. `queries`
/// and `keys` are how many of the batch entry are valid, `shift` is `keys - queries`: query `i` is on the bottom-right
/// diagonal with key `i + shift`. Functions are asked about valid queries and keys only. Convert positions to i32 before you subtract: a
/// difference of u32 below 0 wraps around.
///
/// # What it gives
///
/// The score after `scale` and `softcap` goes through `score_mod`; then masks follow, `mask_mod` among them. `score_mod` must give finite
/// numbers at every position, masked or not, and none larger than the kernel takes ([`Kernel`](crate::Kernel)). To mask, use `mask_mod`: a mask may
/// leave a query no key.
///
/// The backward pass needs the derivative of `score_mod` in `score`. The library derives it (the repository's docs/mods.md has the rules,
/// and what they do where there is none); `fn score_mod_slope(score: f32, at: Position) -> f32` in the text takes its place. No gradient of buffers
/// is computed.
///
/// # What it may not do
///
/// Write memory, wait for other invocations or know of them, use textures, atomics, f16, f64. An index past the end
/// reads the last element. All loops of one call together make 65,536 iterations at most; then they end.
#[derive(Clone)]
pub struct Mods(Arc<Inner>);

struct Inner {
    text: String,
    /// What kernels include.
    printed: String,
    parsed: Parsed,
}

impl Mods {
    /// Checks the text and derives what is missing. It needs no device.
    pub fn parse(wgsl: &str) -> Result<Mods, ModError> {
        let parsed = parse::parse(wgsl)?;
        let printed = print(&parsed).map_err(|refusal| refusal.of(wgsl))?;
        Ok(Mods(Arc::new(Inner { text: wgsl.into(), printed, parsed })))
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.0.text
    }

    /// The names of the buffers, in the order of the text.
    pub fn buffers(&self) -> impl Iterator<Item = &str> {
        self.0.parsed.buffers.iter().map(|(name, _)| name.as_str())
    }

    /// The types of their elements, `f32`, `i32` or `u32`, in the same order.
    pub fn buffer_types(&self) -> impl Iterator<Item = &'static str> {
        let Parsed { module, buffers, .. } = &self.0.parsed;
        buffers.iter().map(|&(_, handle)| match module.types[module.global_variables[handle].ty].inner {
            TypeInner::Array { base, .. } => match module.types[base].inner {
                TypeInner::Scalar(Scalar::I32) => "i32",
                TypeInner::Scalar(Scalar::U32) => "u32",
                _ => "f32",
            },
            _ => "f32",
        })
    }

    /// Whether there is a `score_mod`.
    pub fn has_score_mod(&self) -> bool {
        self.0.parsed.score.is_some()
    }

    /// Whether there is a `mask_mod`.
    pub fn has_mask_mod(&self) -> bool {
        self.0.parsed.mask.is_some()
    }

    /// WGSL with `mods_score` and `mods_keep`, as far as the text has them, for the modules of kernels.
    pub(crate) fn printed(&self) -> &str {
        &self.0.printed
    }

    /// On the host: the score that one becomes, and its slope.
    pub(crate) fn score(&self, score: f64, at: [u32; 6], buffers: &[(String, Vec<u8>)]) -> [f64; 2] {
        let Parsed { module, score: score_mod, slope, .. } = &self.0.parsed;
        let contents = self.contents(buffers);
        let call = |function, score| {
            let arguments = vec![Value::Float(score), position(at)];
            Run::new(module, &contents).call(function, arguments).map_or(Number::new(0.0), |value| value.float())
        };
        let score = Number { value: score, slope: 1.0 };
        let Some(function) = *score_mod else {
            return [score.value, score.slope];
        };
        let mut result = call(function, score);
        if let Some(slope) = *slope {
            result.slope = call(slope, score).value;
        }
        [result.value, result.slope]
    }

    /// On the host: whether a score counts.
    pub(crate) fn keep(&self, at: [u32; 6], buffers: &[(String, Vec<u8>)]) -> bool {
        let Some(function) = self.0.parsed.mask else {
            return true;
        };
        let contents = self.contents(buffers);
        let result = Run::new(&self.0.parsed.module, &contents).call(function, vec![position(at)]);
        matches!(result, Some(Value::Bool(true)))
    }

    /// What buffers hold, by the numbers of the module's variables.
    fn contents<'b>(&self, buffers: &'b [(String, Vec<u8>)]) -> Vec<&'b [u8]> {
        let of = |name: &str| {
            let found = buffers.iter().find(|(given, _)| *given == name);
            &found.unwrap_or_else(|| panic!("the contents of the mods' buffer {name} are missing")).1[..]
        };
        self.buffers().map(of).collect()
    }
}

/// `[b, h, i, j, queries, keys]` as a `Position`.
fn position(at: [u32; 6]) -> Value {
    let [.., queries, keys] = at;
    let shift = Value::Int(keys.wrapping_sub(queries) as i32);
    Value::many(at.map(Value::Uint).into_iter().chain([shift]).collect())
}

/// The text that kernels include.
fn print(parsed: &Parsed) -> Result<String, Refusal> {
    let mut module = dual::module(parsed)?;
    for (n, (_, handle)) in parsed.buffers.iter().enumerate() {
        let binding = ResourceBinding { group: 0, binding: FIRST_BINDING + n as u32 };
        module.global_variables[*handle].binding = Some(binding);
    }
    let failed = |why: String| {
        let what = format!("the library failed to write these functions anew, which is a fault of its own: {why}");
        Refusal::new(Span::UNDEFINED, what)
    };
    let validate = |module: &Module| {
        let mut validator = Validator::new(ValidationFlags::all(), parse::CAPABILITIES);
        validator.validate(module).map_err(|error| failed(format!("{:?}", error.into_inner())))
    };
    let info = validate(&module)?;
    let flags = naga::back::wgsl::WriterFlags::empty();
    let text = naga::back::wgsl::write_string(&module, &info, flags).map_err(|error| failed(error.to_string()))?;
    // As the library's own shaders spell it.
    let text = text.replace(" \nvar<storage> ", " var<storage, read> ");
    let again = naga::front::wgsl::parse_str(&text).map_err(|error| failed(error.emit_to_string(&text)))?;
    validate(&again)?;
    Ok(text)
}

impl fmt::Debug for Mods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mods").field(&self.text()).finish()
    }
}

impl PartialEq for Mods {
    fn eq(&self, other: &Self) -> bool {
        self.text() == other.text()
    }
}

impl Eq for Mods {}

impl Hash for Mods {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text().hash(state);
    }
}
