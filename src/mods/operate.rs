//! The operators and functions of WGSL on values of the host.

use naga::{BinaryOperator, MathFunction, RelationalFunction, ScalarKind, UnaryOperator};

use super::number::{self, Number};
use super::value::Value;
use super::whole;

/// Component by component; a number goes with each component of a vector.
fn each(x: &[&Value], f: &dyn Fn(&[&Value]) -> Value) -> Value {
    let size = x.iter().find_map(|x| match x {
        Value::Many(values) => Some(values.len()),
        _ => None,
    });
    let Some(size) = size else {
        return f(x);
    };
    let of = |n: usize| -> Value {
        let parts: Vec<_> = x
            .iter()
            .map(|x| match x {
                Value::Many(values) => &values[n],
                one => one,
            })
            .collect();
        each(&parts, f)
    };
    Value::many((0..size).map(of).collect())
}

fn numbers(x: &Value) -> Vec<Number> {
    x.components().iter().map(Value::float).collect()
}

pub(super) fn unary(op: UnaryOperator, x: &Value) -> Value {
    each(&[x], &|x| match (op, x[0]) {
        (UnaryOperator::Negate, Value::Float(x)) => Value::Float(-*x),
        (UnaryOperator::Negate, Value::Int(x)) => Value::Int(x.wrapping_neg()),
        (UnaryOperator::LogicalNot, Value::Bool(x)) => Value::Bool(!x),
        (UnaryOperator::BitwiseNot, Value::Int(x)) => Value::Int(!x),
        (UnaryOperator::BitwiseNot, Value::Uint(x)) => Value::Uint(!x),
        (_, other) => other.clone(),
    })
}

pub(super) fn binary(op: BinaryOperator, x: &Value, y: &Value) -> Value {
    if op == BinaryOperator::Multiply
        && let Some(product) = matrix_product(x, y)
    {
        return product;
    }
    each(&[x, y], &|x| match (x[0], x[1]) {
        (Value::Float(x), Value::Float(y)) => of_floats(op, *x, *y),
        (Value::Int(x), Value::Int(y)) => of_ints(op, *x, *y),
        (Value::Uint(x), Value::Uint(y)) => of_uints(op, *x, *y),
        // A shift.
        (Value::Int(x), Value::Uint(y)) => of_ints(op, *x, *y as i32),
        (Value::Bool(x), Value::Bool(y)) => of_bools(op, *x, *y),
        (other, _) => other.clone(),
    })
}

/// Of a matrix and a vector, a vector and a matrix, or two matrices; a matrix is its columns.
fn matrix_product(x: &Value, y: &Value) -> Option<Value> {
    let is_matrix = |x: &Value| matches!(x, Value::Many(values) if matches!(values[0], Value::Many(_)));
    let is_vector = |x: &Value| matches!(x, Value::Many(_)) && !is_matrix(x);
    if is_matrix(x) && is_vector(y) {
        let terms = x.components().iter().zip(y.components());
        let terms = terms.map(|(column, y)| binary(BinaryOperator::Multiply, column, y));
        return terms.reduce(|sum, term| binary(BinaryOperator::Add, &sum, &term));
    }
    if is_vector(x) && is_matrix(y) {
        let dots = y.components().iter().map(|column| Value::Float(number::dot(&numbers(x), &numbers(column))));
        return Some(Value::many(dots.collect()));
    }
    if is_matrix(x) && is_matrix(y) {
        let columns = y.components().iter().map(|column| matrix_product(x, column));
        return columns.collect::<Option<Vec<_>>>().map(Value::many);
    }
    None
}

fn compared(op: BinaryOperator, order: Option<std::cmp::Ordering>) -> Option<bool> {
    use BinaryOperator as B;
    use std::cmp::Ordering::{Equal, Greater, Less};
    Some(match op {
        B::Equal => order == Some(Equal),
        B::NotEqual => order != Some(Equal),
        B::Less => order == Some(Less),
        B::LessEqual => matches!(order, Some(Less | Equal)),
        B::Greater => order == Some(Greater),
        B::GreaterEqual => matches!(order, Some(Greater | Equal)),
        _ => return None,
    })
}

fn of_floats(op: BinaryOperator, x: Number, y: Number) -> Value {
    use BinaryOperator as B;
    if let Some(truth) = compared(op, x.value.partial_cmp(&y.value)) {
        return Value::Bool(truth);
    }
    Value::Float(match op {
        B::Add => x + y,
        B::Subtract => x - y,
        B::Multiply => x * y,
        B::Divide => x / y,
        B::Modulo => x % y,
        _ => x,
    })
}

fn of_ints(op: BinaryOperator, x: i32, y: i32) -> Value {
    use BinaryOperator as B;
    if let Some(truth) = compared(op, Some(x.cmp(&y))) {
        return Value::Bool(truth);
    }
    Value::Int(match op {
        B::Add => x.wrapping_add(y),
        B::Subtract => x.wrapping_sub(y),
        B::Multiply => x.wrapping_mul(y),
        B::Divide => {
            if y == 0 {
                x
            } else {
                x.wrapping_div(y)
            }
        }
        B::Modulo => {
            if y == 0 {
                0
            } else {
                x.wrapping_rem(y)
            }
        }
        B::And => x & y,
        B::ExclusiveOr => x ^ y,
        B::InclusiveOr => x | y,
        B::ShiftLeft => x.wrapping_shl(y as u32),
        B::ShiftRight => x.wrapping_shr(y as u32),
        _ => x,
    })
}

fn of_uints(op: BinaryOperator, x: u32, y: u32) -> Value {
    use BinaryOperator as B;
    if let Some(truth) = compared(op, Some(x.cmp(&y))) {
        return Value::Bool(truth);
    }
    Value::Uint(match op {
        B::Add => x.wrapping_add(y),
        B::Subtract => x.wrapping_sub(y),
        B::Multiply => x.wrapping_mul(y),
        B::Divide => x.checked_div(y).unwrap_or(x),
        B::Modulo => x.checked_rem(y).unwrap_or(0),
        B::And => x & y,
        B::ExclusiveOr => x ^ y,
        B::InclusiveOr => x | y,
        B::ShiftLeft => x.wrapping_shl(y),
        B::ShiftRight => x.wrapping_shr(y),
        _ => x,
    })
}

fn of_bools(op: BinaryOperator, x: bool, y: bool) -> Value {
    use BinaryOperator as B;
    Value::Bool(match op {
        B::Equal => x == y,
        B::NotEqual | B::ExclusiveOr => x != y,
        B::And | B::LogicalAnd => x && y,
        B::InclusiveOr | B::LogicalOr => x || y,
        _ => x,
    })
}

pub(super) fn select(condition: &Value, accept: &Value, reject: &Value) -> Value {
    match condition {
        Value::Bool(truth) => {
            if *truth {
                accept.clone()
            } else {
                reject.clone()
            }
        }
        _ => each(&[condition, accept, reject], &|x| match x[0] {
            Value::Bool(true) => x[1].clone(),
            _ => x[2].clone(),
        }),
    }
}

pub(super) fn relational(fun: RelationalFunction, x: &Value) -> Value {
    let truth = |x: &Value| matches!(x, Value::Bool(true));
    match fun {
        RelationalFunction::All => Value::Bool(x.components().iter().all(truth)),
        RelationalFunction::Any => Value::Bool(x.components().iter().any(truth)),
        RelationalFunction::IsNan => each(&[x], &|x| Value::Bool(x[0].float().value.is_nan())),
        RelationalFunction::IsInf => each(&[x], &|x| Value::Bool(x[0].float().value.is_infinite())),
    }
}

/// A value of another type, or the same bits.
pub(super) fn converted(x: &Value, kind: ScalarKind, by_value: bool) -> Value {
    each(&[x], &|x| {
        let x = x[0];
        if !by_value {
            let bits = match *x {
                Value::Float(x) => (x.value as f32).to_bits(),
                Value::Int(x) => x as u32,
                Value::Uint(x) => x,
                _ => return x.clone(),
            };
            return match (kind, x) {
                (ScalarKind::Float, Value::Float(_)) => x.clone(),
                (ScalarKind::Float, _) => Value::Float(Number::new(f32::from_bits(bits).into())),
                (ScalarKind::Sint, _) => Value::Int(bits as i32),
                _ => Value::Uint(bits),
            };
        }
        match (kind, x) {
            (ScalarKind::Float, Value::Float(_)) => x.clone(),
            (ScalarKind::Float, Value::Int(x)) => Value::Float(Number::new((*x as f32).into())),
            (ScalarKind::Float, Value::Uint(x)) => Value::Float(Number::new((*x as f32).into())),
            (ScalarKind::Float, Value::Bool(x)) => Value::Float(Number::new((*x as u8).into())),
            (ScalarKind::Sint, Value::Float(x)) => Value::Int(x.value as i32),
            (ScalarKind::Sint, Value::Uint(x)) => Value::Int(*x as i32),
            (ScalarKind::Sint, Value::Bool(x)) => Value::Int(*x as i32),
            (ScalarKind::Uint, Value::Float(x)) => Value::Uint(x.value as u32),
            (ScalarKind::Uint, Value::Int(x)) => Value::Uint(*x as u32),
            (ScalarKind::Uint, Value::Bool(x)) => Value::Uint(*x as u32),
            (ScalarKind::Bool, Value::Float(x)) => Value::Bool(x.value != 0.0),
            (ScalarKind::Bool, Value::Int(x)) => Value::Bool(*x != 0),
            (ScalarKind::Bool, Value::Uint(x)) => Value::Bool(*x != 0),
            _ => x.clone(),
        }
    })
}

pub(super) fn math(fun: MathFunction, x: &[Value]) -> Value {
    use MathFunction as M;
    let all = |n: usize| numbers(&x[n]);
    match fun {
        M::Dot if matches!(x[0].components()[0], Value::Float(_)) => Value::Float(number::dot(&all(0), &all(1))),
        M::Dot => {
            let terms = x[0].components().iter().zip(x[1].components());
            let terms = terms.map(|(x, y)| binary(BinaryOperator::Multiply, x, y));
            terms.reduce(|sum, term| binary(BinaryOperator::Add, &sum, &term)).unwrap_or(Value::Uint(0))
        }
        M::Length => Value::Float(number::length(&all(0))),
        M::Distance => Value::Float(number::length(&numbers(&binary(BinaryOperator::Subtract, &x[0], &x[1])))),
        M::Normalize => {
            let length = number::length(&all(0));
            let of = |x: Number| if length.value == 0.0 { Number::new(0.0) } else { x / length };
            Value::many(all(0).into_iter().map(|x| Value::Float(of(x))).collect())
        }
        M::Cross => {
            let (x, y) = (all(0), all(1));
            let of = |a: usize, b: usize| Value::Float(x[a] * y[b] - x[b] * y[a]);
            Value::many(vec![of(1, 2), of(2, 0), of(0, 1)])
        }
        M::Reflect => {
            let (e, n) = (all(0), all(1));
            let twice = Number::new(2.0) * number::dot(&n, &e);
            Value::many(e.iter().zip(&n).map(|(&e, &n)| Value::Float(e - twice * n)).collect())
        }
        M::FaceForward => {
            let sign = if number::dot(&all(1), &all(2)).value < 0.0 { 1.0 } else { -1.0 };
            binary(BinaryOperator::Multiply, &x[0], &Value::Float(Number::new(sign)))
        }
        M::Transpose => {
            let columns = x[0].components();
            let rows = columns[0].components().len();
            let row = |n: usize| Value::many(columns.iter().map(|column| column.components()[n].clone()).collect());
            Value::many((0..rows).map(row).collect())
        }
        M::Ldexp => each(&[&x[0], &x[1]], &|x| match (x[0], x[1]) {
            (Value::Float(x), Value::Int(n)) => Value::Float(*x * Number::new(2f64.powi(*n))),
            (other, _) => other.clone(),
        }),
        _ => {
            let operands: Vec<_> = x.iter().collect();
            each(&operands, &|x| {
                if matches!(x[0], Value::Float(_)) {
                    let floats: Vec<_> = x.iter().map(|x| x.float()).collect();
                    return number::math(fun, &floats).map_or(Value::Uint(0), Value::Float);
                }
                whole::math(fun, x)
            })
        }
    }
}
