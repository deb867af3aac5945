//! Which expressions of a function depend on the score. All others are copied as they are.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use naga::{
    BinaryOperator, Block, Expression, Function, Handle, LocalVariable, MathFunction, Scalar, ScalarKind, Span,
    Statement, TypeInner, UnaryOperator,
};

use super::error::Refusal;
use super::parse::Parsed;

/// How to go on where the library has no rule.
const WAY_OUT: &str = "write the derivative yourself: `fn score_mod_slope(score: f32, at: Position) -> f32`";

/// What depends on the score in a function.
#[derive(Default)]
pub(super) struct Activity {
    /// Of pointers, whether what they point to does.
    pub expressions: HashSet<Handle<Expression>>,
    pub locals: HashSet<Handle<LocalVariable>>,
    /// What the function returns.
    pub result: bool,
}

/// A function, and which of its arguments depend on the score.
pub(super) type Version = (Handle<Function>, Vec<bool>);

/// The activities of functions that were asked for.
pub(super) struct Activities<'a> {
    parsed: &'a Parsed,
    known: HashMap<Version, Rc<Activity>>,
}

impl<'a> Activities<'a> {
    pub fn new(parsed: &'a Parsed) -> Self {
        Activities { parsed, known: HashMap::new() }
    }

    pub fn of(&mut self, version: &Version) -> Result<Rc<Activity>, Refusal> {
        if let Some(activity) = self.known.get(version) {
            return Ok(activity.clone());
        }
        let (handle, arguments) = version;
        let function = &self.parsed.module.functions[*handle];
        let mut activity = Activity::default();
        // Until nothing is added: a loop may bring the score to what stands before.
        loop {
            let before = (activity.expressions.len(), activity.locals.len(), activity.result);
            for (expression, kind) in function.expressions.iter() {
                if is_active(kind, arguments, &activity) {
                    activity.expressions.insert(expression);
                }
            }
            self.follow(function, &function.body, &mut activity)?;
            if before == (activity.expressions.len(), activity.locals.len(), activity.result) {
                break;
            }
        }
        self.check(*handle, &activity)?;
        let activity = Rc::new(activity);
        self.known.insert(version.clone(), activity.clone());
        Ok(activity)
    }

    /// Adds what statements make depend on the score.
    fn follow(&mut self, function: &Function, block: &Block, activity: &mut Activity) -> Result<(), Refusal> {
        for (statement, span) in block.span_iter() {
            match statement {
                Statement::Block(inner) => self.follow(function, inner, activity)?,
                Statement::If { accept, reject, .. } => {
                    self.follow(function, accept, activity)?;
                    self.follow(function, reject, activity)?;
                }
                Statement::Switch { cases, .. } => {
                    for case in cases {
                        self.follow(function, &case.body, activity)?;
                    }
                }
                Statement::Loop { body, continuing, .. } => {
                    self.follow(function, body, activity)?;
                    self.follow(function, continuing, activity)?;
                }
                Statement::Return { value: Some(value) } => {
                    activity.result |= activity.expressions.contains(value);
                }
                Statement::Store { pointer, value } if activity.expressions.contains(value) => {
                    match root(function, *pointer) {
                        Expression::LocalVariable(local) => {
                            activity.locals.insert(*local);
                        }
                        _ => return Err(refuse(*span, "what depends on the score is stored through a pointer")),
                    }
                }
                Statement::Call { function: callee, arguments, result } => {
                    let mask = self.mask(function, arguments, activity, *span)?;
                    if mask.contains(&true) && self.of(&(*callee, mask))?.result {
                        activity.expressions.extend(*result);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Which arguments of a call depend on the score.
    fn mask(
        &self,
        function: &Function,
        arguments: &[Handle<Expression>],
        activity: &Activity,
        span: Span,
    ) -> Result<Vec<bool>, Refusal> {
        let mask: Vec<_> = arguments.iter().map(|argument| activity.expressions.contains(argument)).collect();
        let is_pointer = |argument: &Handle<Expression>| {
            matches!(root(function, *argument), Expression::LocalVariable(_))
                && !matches!(function.expressions[*argument], Expression::Load { .. })
        };
        let pointers = arguments.iter().zip(&mask).any(|(argument, active)| *active && is_pointer(argument));
        match pointers {
            true => Err(refuse(span, "a call is given a pointer to a variable that depends on the score")),
            false => Ok(mask),
        }
    }

    /// Refuses what depends on the score and has no rule.
    fn check(&self, handle: Handle<Function>, activity: &Activity) -> Result<(), Refusal> {
        let module = &self.parsed.module;
        let (function, info) = (&module.functions[handle], &self.parsed.info[handle]);
        for (expression, kind) in function.expressions.iter() {
            let span = match kind {
                Expression::LocalVariable(local) => function.local_variables.get_span(*local),
                _ => function.expressions.get_span(expression),
            };
            let bits = match kind {
                Expression::As { expr, convert: None, kind } => {
                    *kind != ScalarKind::Float && activity.expressions.contains(expr)
                }
                _ => false,
            };
            if bits {
                return Err(refuse(span, "the bits of a number that depends on the score have no derivative"));
            }
            if !activity.expressions.contains(&expression) {
                continue;
            }
            let is_float = match info[expression].ty.inner_with(&module.types) {
                TypeInner::Scalar(scalar) | TypeInner::Vector { scalar, .. } => *scalar == Scalar::F32,
                TypeInner::ValuePointer { scalar, .. } => *scalar == Scalar::F32,
                TypeInner::Pointer { base, .. } => match module.types[*base].inner {
                    TypeInner::Scalar(scalar) | TypeInner::Vector { scalar, .. } => scalar == Scalar::F32,
                    _ => false,
                },
                _ => false,
            };
            if !is_float {
                return Err(refuse(
                    span,
                    "an array, a struct or a matrix depends on the score; only f32 and vectors of it may",
                ));
            }
            if let Expression::Math { fun, .. } = kind
                && !has_rule(*fun)
            {
                return Err(refuse(span, &format!("{} of what depends on the score has no rule", name(*fun))));
            }
        }
        Ok(())
    }
}

fn refuse(span: Span, what: &str) -> Refusal {
    Refusal::new(span, format!("{what}; {WAY_OUT}"))
}

/// As WGSL spells it.
fn name(fun: MathFunction) -> String {
    let name = format!("{fun:?}");
    name[..1].to_lowercase() + &name[1..]
}

/// The variable that a pointer points into, or what else it comes from.
fn root(function: &Function, pointer: Handle<Expression>) -> &Expression {
    match &function.expressions[pointer] {
        Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => root(function, *base),
        expression => expression,
    }
}

/// Whether an expression depends on the score, as far as is known of its operands.
fn is_active(expression: &Expression, arguments: &[bool], activity: &Activity) -> bool {
    let active = |operand: &Handle<Expression>| activity.expressions.contains(operand);
    match expression {
        Expression::FunctionArgument(n) => arguments.get(*n as usize) == Some(&true),
        Expression::LocalVariable(local) => activity.locals.contains(local),
        Expression::Compose { components, .. } => components.iter().any(active),
        Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => active(base),
        Expression::Splat { value, .. } => active(value),
        Expression::Swizzle { vector, .. } => active(vector),
        Expression::Load { pointer } => active(pointer),
        Expression::Unary { op: UnaryOperator::Negate, expr } => active(expr),
        Expression::Binary { op, left, right } => {
            use BinaryOperator as B;
            let arithmetic = [B::Add, B::Subtract, B::Multiply, B::Divide, B::Modulo].contains(op);
            arithmetic && (active(left) || active(right))
        }
        Expression::Select { accept, reject, .. } => active(accept) || active(reject),
        Expression::Math { fun, arg, arg1, arg2, arg3 } => {
            !is_step(*fun) && (active(arg) || [arg1, arg2, arg3].into_iter().flatten().any(active))
        }
        Expression::As { expr, kind, .. } => *kind == ScalarKind::Float && active(expr),
        // That of a call is found with the call.
        _ => false,
    }
}

/// Functions whose derivative is 0 wherever they have one.
fn is_step(fun: MathFunction) -> bool {
    use MathFunction as M;
    matches!(fun, M::Sign | M::Step | M::Floor | M::Ceil | M::Round | M::Trunc)
}

/// Functions that rules.rs can derive.
fn has_rule(fun: MathFunction) -> bool {
    use MathFunction as M;
    matches!(
        fun,
        M::Abs
            | M::Min
            | M::Max
            | M::Clamp
            | M::Saturate
            | M::Cos
            | M::Cosh
            | M::Sin
            | M::Sinh
            | M::Tan
            | M::Tanh
            | M::Acos
            | M::Asin
            | M::Atan
            | M::Atan2
            | M::Asinh
            | M::Acosh
            | M::Atanh
            | M::Radians
            | M::Degrees
            | M::Fract
            | M::Ldexp
            | M::Exp
            | M::Exp2
            | M::Log
            | M::Log2
            | M::Pow
            | M::Dot
            | M::Cross
            | M::Distance
            | M::Length
            | M::Normalize
            | M::Fma
            | M::Mix
            | M::SmoothStep
            | M::Sqrt
            | M::InverseSqrt
            | M::QuantizeToF16
    )
}
