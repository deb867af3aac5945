//! From the user's text to a module that holds nothing but what mods may have.

use std::collections::HashMap;

use naga::front::wgsl::ParseError;
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{
    AddressSpace, ArraySize, Block, Expression, Function, GlobalVariable, Handle, MathFunction, Module, Scalar,
    ScalarKind, Span, Statement, StorageAccess, Type, TypeInner,
};

use super::error::{ModError, Refusal};
use super::reasons::{of_numbers, reason};
use super::size::check_size;

/// What every text may use. It is parsed behind the text, so that lines are those of the text.
const PRELUDE: &str = "
struct Position { b: u32, h: u32, i: u32, j: u32, queries: u32, keys: u32, shift: i32 }
";

/// The most buffers of a text.
pub(crate) const MOST_BUFFERS: usize = 8;
/// The most calls that one call of a mod may make. Compilers for GPUs put every call in line.
const MOST_CALLS: u64 = 4096;
/// The most numbers in a value. A thread has all of a variable in its registers, or in memory of its own.
const MOST_NUMBERS: u64 = 1024;

const SCORE_MOD: &str = "fn score_mod(score: f32, at: Position) -> f32";
const SCORE_MOD_SLOPE: &str = "fn score_mod_slope(score: f32, at: Position) -> f32";
const MASK_MOD: &str = "fn mask_mod(at: Position) -> bool";

/// What modules may use besides the core of WGSL: conversions to f16 and back, which need no feature.
pub(super) const CAPABILITIES: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

/// A text that has been checked.
#[derive(Debug)]
pub(super) struct Parsed {
    pub module: Module,
    pub info: ModuleInfo,
    pub score: Option<Handle<Function>>,
    /// The user's own derivative of `score`.
    pub slope: Option<Handle<Function>>,
    pub mask: Option<Handle<Function>>,
    pub position: Handle<Type>,
    /// In the order of the text.
    pub buffers: Vec<(String, Handle<GlobalVariable>)>,
}

pub(super) fn parse(text: &str) -> Result<Parsed, ModError> {
    let whole = format!("{text}{PRELUDE}");
    checked(text, &whole).map_err(|refusal| refusal.of(text))
}

/// `text` is the user's part of the whole.
fn checked(text: &str, whole: &str) -> Result<Parsed, Refusal> {
    check_size(text)?;
    let module = naga::front::wgsl::parse_str(whole).map_err(|error| {
        let inside = |(span, _): &(Span, &str)| span.to_range().is_some_and(|range| range.start < text.len());
        // Where the text ends too early, what follows it is not what the user wrote.
        let alone = naga::front::wgsl::parse_str(text).err().filter(|_| !error.labels().any(|label| inside(&label)));
        let alone = alone.filter(|alone| !alone.message().contains("`Position`"));
        unparsed(&alone.unwrap_or(error), text)
    })?;
    check_globals(&module)?;
    check_types(&module)?;
    for (_, function) in module.functions.iter() {
        check_function(&module, function)?;
    }
    let flags = ValidationFlags::all() - ValidationFlags::BINDINGS;
    let info = Validator::new(flags, CAPABILITIES).validate(&module).map_err(|error| {
        let spans: Vec<_> = error.spans().map(|(span, _)| *span).collect();
        let inside = |span: &&Span| span.to_range().is_some_and(|range| range.start < text.len());
        let span = spans.iter().rev().find(inside).copied().unwrap_or_default();
        Refusal::new(span, reason(error.as_inner(), &module, text))
    })?;
    check_calls(&module)?;

    let is_position = |(_, ty): &(Handle<Type>, &Type)| ty.name.as_deref() == Some("Position");
    let Some((position, _)) = module.types.iter().find(is_position) else {
        return Err(Refusal::new(Span::UNDEFINED, "Position is the library's; give what is yours another name"));
    };
    let is_f32 = |ty: Handle<Type>| module.types[ty].inner == TypeInner::Scalar(Scalar::F32);
    let is_bool = |ty: Handle<Type>| module.types[ty].inner == TypeInner::Scalar(Scalar::BOOL);
    let named = |name: &str, declaration: &str, of_score: bool| {
        let found = module.functions.iter().find(|(_, function)| function.name.as_deref() == Some(name));
        let Some((handle, function)) = found else {
            return Ok(None);
        };
        let types: Vec<_> = function.arguments.iter().map(|argument| argument.ty).collect();
        let result = function.result.as_ref().map(|result| result.ty);
        let right = match (&types[..], result) {
            (&[score, at], Some(result)) => of_score && is_f32(score) && at == position && is_f32(result),
            (&[at], Some(result)) => !of_score && at == position && is_bool(result),
            _ => false,
        };
        match right {
            true => Ok(Some(handle)),
            false => Err(Refusal::new(module.functions.get_span(handle), format!("{name} must be `{declaration}`"))),
        }
    };
    let score = named("score_mod", SCORE_MOD, true)?;
    let slope = named("score_mod_slope", SCORE_MOD_SLOPE, true)?;
    let mask = named("mask_mod", MASK_MOD, false)?;
    match (score, slope, mask) {
        (None, Some(slope), _) => {
            let what = format!("score_mod_slope is the derivative of score_mod, which is missing: `{SCORE_MOD}`");
            return Err(Refusal::new(module.functions.get_span(slope), what));
        }
        (None, _, None) => {
            let what = format!("there is neither `{SCORE_MOD}` nor `{MASK_MOD}`");
            return Err(Refusal::new(Span::UNDEFINED, what));
        }
        _ => {}
    }
    let name = |variable: &GlobalVariable| variable.name.clone().unwrap_or_default();
    let buffers: Vec<_> = module.global_variables.iter().map(|(handle, variable)| (name(variable), handle)).collect();
    Ok(Parsed { info, score, slope, mask, position, buffers, module })
}

/// An error of naga's.
fn unparsed(error: &ParseError, text: &str) -> Refusal {
    // Of several places the first that the user wrote.
    let inside = |(span, _): &(Span, &str)| span.to_range().is_some_and(|range| range.start < text.len());
    let (span, label) = error.labels().find(inside).or(error.labels().next()).unwrap_or_default();
    let message = error.message();
    if let Some(message) = of_numbers(message) {
        return Refusal::new(span, message);
    }
    // naga has no place for it.
    if message.starts_with("Invalid access into expression") {
        return Refusal::new(span, "an index, or a member, is asked of what has none: a number, say");
    }
    match label.is_empty() || message.contains(label) {
        true => Refusal::new(span, message),
        false => Refusal::new(span, format!("{message} ({label})")),
    }
}

/// Refuses values of very many numbers.
fn check_types(module: &Module) -> Result<(), Refusal> {
    let mut numbers = HashMap::new();
    // A type comes after those that it is made of.
    for (handle, ty) in module.types.iter() {
        let of = |part: &Handle<Type>| numbers.get(part).copied().unwrap_or(1u64);
        let count = match &ty.inner {
            TypeInner::Vector { size, .. } => *size as u64,
            TypeInner::Matrix { columns, rows, .. } => *columns as u64 * *rows as u64,
            TypeInner::Array { base, size: ArraySize::Constant(n), .. } => of(base).saturating_mul(n.get().into()),
            TypeInner::Struct { members, .. } => {
                members.iter().fold(0, |sum, member| of(&member.ty).saturating_add(sum))
            }
            _ => 1,
        };
        if count > MOST_NUMBERS {
            let what =
                format!("a value of mods has at most {MOST_NUMBERS} numbers, and this type has {count}; read a buffer");
            return Err(Refusal::new(first_use(module, handle), what));
        }
        numbers.insert(handle, count);
    }
    Ok(())
}

fn check_globals(module: &Module) -> Result<(), Refusal> {
    if let Some(entry) = module.entry_points.first() {
        let span = entry.function.expressions.iter().next().map(|(handle, _)| handle);
        let span = span.map_or(Span::UNDEFINED, |handle| entry.function.expressions.get_span(handle));
        return Err(Refusal::new(
            span,
            format!("{} is an entry point; mods are functions that kernels call", entry.name),
        ));
    }
    if let Some((handle, _)) = module.overrides.iter().next() {
        let what = "override values are not given to mods; write a const, or read a buffer";
        return Err(Refusal::new(module.overrides.get_span(handle), what));
    }
    for (handle, ty) in module.types.iter() {
        let scalar = match ty.inner {
            TypeInner::Scalar(scalar) | TypeInner::Vector { scalar, .. } | TypeInner::Matrix { scalar, .. } => scalar,
            TypeInner::Atomic(scalar) => scalar,
            _ => continue,
        };
        let abstracts = [ScalarKind::AbstractInt, ScalarKind::AbstractFloat];
        if scalar.kind != ScalarKind::Bool && scalar.width != 4 && !abstracts.contains(&scalar.kind) {
            let what = "numbers of mods are f32, i32 and u32; f16, f64 and 64-bit integers need features of devices";
            return Err(Refusal::new(first_use(module, handle), what));
        }
    }
    for (n, (handle, variable)) in module.global_variables.iter().enumerate() {
        let refuse = |what: &str| Err(Refusal::new(module.global_variables.get_span(handle), what));
        let AddressSpace::Storage { access } = variable.space else {
            return refuse(
                "variables of mods are buffers, `var<storage, read> name: array<f32>;`, and locals of functions",
            );
        };
        if access != StorageAccess::LOAD {
            return refuse("mods read buffers and do not write them: `var<storage, read>`");
        }
        if variable.binding.is_some() {
            return refuse(
                "buffers of mods have no @group and @binding; they are given by name when a pass is recorded",
            );
        }
        let element = match module.types[variable.ty].inner {
            TypeInner::Array { base, size: ArraySize::Dynamic, .. } => Some(&module.types[base].inner),
            _ => None,
        };
        let scalars = [Scalar::F32, Scalar::I32, Scalar::U32].map(TypeInner::Scalar);
        if !element.is_some_and(|element| scalars.contains(element)) {
            return refuse("a buffer of mods is an array<f32>, array<i32> or array<u32> without a length");
        }
        if n >= MOST_BUFFERS {
            return refuse(&format!("mods have at most {MOST_BUFFERS} buffers"));
        }
    }
    Ok(())
}

/// Where something has a type. Types that WGSL declares have no place of their own.
fn first_use(module: &Module, ty: Handle<Type>) -> Span {
    let constants = module.constants.iter().filter(|(_, constant)| constant.ty == ty);
    let constants = constants.map(|(handle, _)| module.constants.get_span(handle));
    let of_function = |(handle, function): (Handle<Function>, &Function)| {
        let in_its_head = function.arguments.iter().any(|argument| argument.ty == ty)
            || function.result.as_ref().is_some_and(|result| result.ty == ty);
        let local = function.local_variables.iter().find(|(_, local)| local.ty == ty);
        let local = local.map(|(handle, _)| function.local_variables.get_span(handle));
        local.or_else(|| in_its_head.then(|| module.functions.get_span(handle)))
    };
    let functions = module.functions.iter().filter_map(of_function);
    constants.chain(functions).next().unwrap_or(module.types.get_span(ty))
}

/// Refuses what reaches beyond an invocation or writes memory.
fn check_function(module: &Module, function: &Function) -> Result<(), Refusal> {
    use Expression as E;
    for (handle, expression) in function.expressions.iter() {
        let what = match expression {
            E::Literal(_)
            | E::Constant(_)
            | E::ZeroValue(_)
            | E::Compose { .. }
            | E::Access { .. }
            | E::AccessIndex { .. }
            | E::Splat { .. }
            | E::Swizzle { .. }
            | E::FunctionArgument(_)
            | E::GlobalVariable(_)
            | E::LocalVariable(_)
            | E::Load { .. }
            | E::Unary { .. }
            | E::Binary { .. }
            | E::Select { .. }
            | E::Relational { .. }
            | E::As { .. }
            | E::CallResult(_)
            | E::ArrayLength(_) => continue,
            E::Math { fun: MathFunction::Modf, .. } => "modf is not for mods; trunc and fract are",
            E::Math { fun: MathFunction::Frexp, .. } => "frexp is not for mods; log2 and exp2 are",
            E::Math { fun, .. } if is_for_mods(*fun) => continue,
            E::Math { .. } => "mods have no packing of bits, no refract, and of matrices products and transposes alone",
            E::Override(_) => "override values are not given to mods; write a const, or read a buffer",
            E::ImageSample { .. } | E::ImageLoad { .. } | E::ImageQuery { .. } => "mods read buffers, not textures",
            E::Derivative { .. } => "derivatives between pixels mean nothing in a compute shader",
            E::AtomicResult { .. } => "mods may not use atomics: a score is computed any number of times",
            E::SubgroupBallotResult | E::SubgroupOperationResult { .. } | E::WorkGroupUniformLoadResult { .. } => {
                "mods know nothing of other invocations: which of them computes a score is the kernel's to choose"
            }
            _ => "this is not for mods, which compute one score from a score, a position and buffers",
        };
        return Err(Refusal::new(function.expressions.get_span(handle), what));
    }
    check_block(module, function, &function.body)
}

/// Whether it is a pointer to a part of a variable, for which naga writes no SPIR-V where it is passed on.
fn points_to_a_part(module: &Module, function: &Function, expression: Handle<Expression>) -> bool {
    let mut root = expression;
    while let Expression::Access { base, .. } | Expression::AccessIndex { base, .. } = function.expressions[root] {
        root = base;
    }
    root != expression
        && match function.expressions[root] {
            Expression::LocalVariable(_) | Expression::GlobalVariable(_) => true,
            Expression::FunctionArgument(n) => {
                let ty = function.arguments[n as usize].ty;
                matches!(module.types[ty].inner, TypeInner::Pointer { .. } | TypeInner::ValuePointer { .. })
            }
            _ => false,
        }
}

/// Whether interpret.rs has a function too.
fn is_for_mods(fun: MathFunction) -> bool {
    use MathFunction as M;
    !matches!(
        fun,
        M::Refract
            | M::Outer
            | M::Inverse
            | M::Determinant
            | M::Dot4I8Packed
            | M::Dot4U8Packed
            | M::Pack4x8snorm
            | M::Pack4x8unorm
            | M::Pack2x16snorm
            | M::Pack2x16unorm
            | M::Pack2x16float
            | M::Pack4xI8
            | M::Pack4xU8
            | M::Pack4xI8Clamp
            | M::Pack4xU8Clamp
    )
}

fn check_block(module: &Module, function: &Function, block: &Block) -> Result<(), Refusal> {
    use Statement as S;
    let check = |inner| check_block(module, function, inner);
    for (statement, span) in block.span_iter() {
        let what = match statement {
            S::Emit(_) | S::Break | S::Continue | S::Return { .. } | S::Store { .. } => continue,
            S::Call { arguments, .. } => {
                match arguments.iter().any(|&argument| points_to_a_part(module, function, argument)) {
                    true => {
                        "functions take pointers to whole variables; copy the part to a variable of its own, and back"
                    }
                    false => continue,
                }
            }
            S::Block(inner) => {
                check(inner)?;
                continue;
            }
            S::If { accept, reject, .. } => {
                check(accept)?;
                check(reject)?;
                continue;
            }
            S::Switch { cases, .. } => {
                cases.iter().try_for_each(|case| check(&case.body))?;
                continue;
            }
            S::Loop { body, continuing, .. } => {
                check(body)?;
                check(continuing)?;
                continue;
            }
            S::Kill => "discard is for fragment shaders; return a value, and mask with mask_mod",
            S::ControlBarrier(_) | S::MemoryBarrier(_) | S::WorkGroupUniformLoad { .. } => {
                "mods may not wait for other invocations: they are called where these do something else"
            }
            S::Atomic { .. } | S::ImageAtomic { .. } => {
                "mods may not use atomics: a score is computed any number of times"
            }
            S::ImageStore { .. } | S::CooperativeStore { .. } => "mods write nothing but their own variables",
            _ => "mods know nothing of other invocations: which of them computes a score is the kernel's to choose",
        };
        return Err(Refusal::new(*span, what));
    }
    Ok(())
}

/// Refuses functions that call functions that call functions so often that no compiler is done with them.
fn check_calls(module: &Module) -> Result<(), Refusal> {
    fn calls(block: &Block, of: &HashMap<Handle<Function>, u64>) -> u64 {
        let of_statement = |statement: &Statement| match statement {
            Statement::Call { function, .. } => of.get(function).map_or(1, |n| n.saturating_add(1)),
            Statement::Block(inner) => calls(inner, of),
            Statement::If { accept, reject, .. } => calls(accept, of).saturating_add(calls(reject, of)),
            Statement::Switch { cases, .. } => {
                cases.iter().fold(0, |sum, case| calls(&case.body, of).saturating_add(sum))
            }
            Statement::Loop { body, continuing, .. } => calls(body, of).saturating_add(calls(continuing, of)),
            _ => 0,
        };
        block.iter().fold(0, |sum, statement| of_statement(statement).saturating_add(sum))
    }
    let mut of = HashMap::new();
    // A function comes after those that it calls.
    for (handle, function) in module.functions.iter() {
        let count = calls(&function.body, &of);
        if count > MOST_CALLS {
            let what = format!("one call makes more than {MOST_CALLS} others, each of which is put in line");
            return Err(Refusal::new(module.functions.get_span(handle), what));
        }
        of.insert(handle, count);
    }
    Ok(())
}
