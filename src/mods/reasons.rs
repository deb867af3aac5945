//! naga's reasons why a text is not valid, in the words of the text.

use std::error::Error;

use naga::valid::{CallError, ExpressionError, FunctionError, ValidationError};
use naga::{BinaryOperator, Expression, Function, Handle, Module, ScalarKind, TypeInner};

use super::error::is_hidden;

/// Of a module that was made of this text and what the library put behind it.
pub(super) fn reason(error: &ValidationError, module: &Module, text: &str) -> String {
    let of_function = match error {
        ValidationError::Function { handle, source, .. } => Some((&module.functions[*handle], source)),
        _ => None,
    };
    let written = |function: &Function, handle: Handle<Expression>| {
        let range = function.expressions.get_span(handle).to_range()?;
        text.get(range).map(in_one_line).filter(|text| !text.is_empty()).map(|text| format!("`{text}`"))
    };
    let said = match of_function {
        Some((
            function,
            FunctionError::Expression {
                source: ExpressionError::InvalidBinaryOperandTypes { op, lhs_type, rhs_type, lhs_expr, rhs_expr },
                ..
            },
        )) => {
            let side = |ty, handle| match written(function, handle) {
                Some(text) => format!("{} {text}", type_name(ty)),
                None => type_name(ty),
            };
            let (op, left, right) = (operator(*op), side(lhs_type, *lhs_expr), side(rhs_type, *rhs_expr));
            Some(format!(
                "`{op}` stands between the {left} and the {right}, which have no such operator; convert one, by f32(…), i32(…), u32(…) or bool(…)"
            ))
        }
        Some((function, FunctionError::InvalidIfType(condition))) => {
            Some(format!("the condition {} is no bool", written(function, *condition).unwrap_or_default()))
        }
        Some((
            function,
            FunctionError::InvalidCall { error: CallError::ArgumentType { index, required, seen_expression }, .. },
        )) => Some(format!(
            "argument {} of the call, {}, must be {}",
            index + 1,
            written(function, *seen_expression).unwrap_or("which is of another type".into()),
            type_name(&module.types[*required].inner)
        )),
        Some((function, FunctionError::InvalidReturnType { expression, expected_ty })) => {
            let expected = expected_ty.map_or("nothing".into(), |ty| type_name(&module.types[ty].inner));
            let found = expression.map(|handle| written(function, handle).unwrap_or("something else".into()));
            Some(match found {
                Some(found) => format!("{found} is returned, and the function must return {expected}"),
                None => format!("the function may end without `return`, and must return {expected}"),
            })
        }
        _ => None,
    };
    said.unwrap_or_else(|| {
        // What naga says of the expression, or of the function. The mark in the text shows where that is.
        let (function, error): (_, &dyn Error) = match of_function {
            Some((function, FunctionError::Expression { source, .. })) => (Some(function), source),
            Some((_, error)) => (None, error),
            None => (None, error),
        };
        let causes = std::iter::successors(Some(error), |&error| error.source());
        let what = causes.map(|error| error.to_string()).collect::<Vec<_>>().join(": ");
        if let Some(what) = of_numbers(&what) {
            return what.into();
        }
        let what = with_texts(&what, |n| {
            let function = function?;
            let (handle, _) = function.expressions.iter().nth(n)?;
            written(function, handle)
        });
        ["Float, width: 4|f32", "Uint, width: 4|u32", "Sint, width: 4|i32", "Bool, width: 1|bool"]
            .iter()
            .filter_map(|pair| pair.split_once('|'))
            .fold(what, |what, (kind, name)| what.replace(&format!("Scalar(Scalar {{ kind: {kind} }})"), name))
    })
}

/// In the place of naga's reasons why numbers cannot be.
pub(super) fn of_numbers(what: &str) -> Option<&'static str> {
    if what.contains("Abstract types") {
        return Some("a number with a point stands beside a whole number here; convert the whole number, by f32(…)");
    }
    // The blanks tell these words from names of the user's, which naga quotes.
    (what.contains(" overflowed") || what.contains(" accurately"))
        .then_some("the value of this constant is infinite, is no number, or does not fit its type")
}

/// A text that the user wrote, without what would break a line, and not too long.
fn in_one_line(text: &str) -> String {
    const MOST: usize = 60;
    let words: Vec<_> =
        text.split(|c: char| c.is_whitespace() || is_hidden(c)).filter(|word| !word.is_empty()).collect();
    let line = words.join(" ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => line[..end].to_string() + " …",
        None => line,
    }
}

/// naga numbers the expressions of a function from 0 and writes `[n]`. In its place comes what the user wrote, or `this` where that is not known.
fn with_texts(what: &str, written: impl Fn(usize) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = what;
    while let Some(begin) = rest.find('[') {
        let Some(length) = rest[begin..].find(']') else { break };
        let number = rest[begin + 1..begin + length].parse().ok();
        out += &rest[..begin];
        match number.and_then(&written) {
            Some(text) => out += &text,
            None if number.is_some() => out += "this",
            None => out += &rest[begin..=begin + length],
        }
        rest = &rest[begin + length + 1..];
    }
    out + rest
}

fn type_name(ty: &TypeInner) -> String {
    let scalar = |kind: ScalarKind| match kind {
        ScalarKind::Float | ScalarKind::AbstractFloat => "f32",
        ScalarKind::Sint | ScalarKind::AbstractInt => "i32",
        ScalarKind::Uint => "u32",
        ScalarKind::Bool => "bool",
    };
    match ty {
        TypeInner::Scalar(of) => scalar(of.kind).into(),
        TypeInner::Vector { size, scalar: of } => format!("vec{}<{}>", *size as u32, scalar(of.kind)),
        TypeInner::Array { .. } => "array".into(),
        TypeInner::Struct { .. } => "struct".into(),
        _ => "value".into(),
    }
}

fn operator(op: BinaryOperator) -> &'static str {
    match op {
        BinaryOperator::Add => "+",
        BinaryOperator::Subtract => "-",
        BinaryOperator::Multiply => "*",
        BinaryOperator::Divide => "/",
        BinaryOperator::Modulo => "%",
        BinaryOperator::Equal => "==",
        BinaryOperator::NotEqual => "!=",
        BinaryOperator::Less => "<",
        BinaryOperator::LessEqual => "<=",
        BinaryOperator::Greater => ">",
        BinaryOperator::GreaterEqual => ">=",
        BinaryOperator::And => "&",
        BinaryOperator::ExclusiveOr => "^",
        BinaryOperator::InclusiveOr => "|",
        BinaryOperator::LogicalAnd => "&&",
        BinaryOperator::LogicalOr => "||",
        BinaryOperator::ShiftLeft => "<<",
        BinaryOperator::ShiftRight => ">>",
    }
}
