//! The expressions of a function, computed anew: values, with indices that stay within bounds, and slopes beside them.

use std::collections::HashMap;
use std::rc::Rc;

use naga::{
    ArraySize, BinaryOperator, Expression, Function, Handle, Literal, LocalVariable, MathFunction, Scalar, ScalarKind,
    TypeInner, VectorSize,
};

use super::active::Activity;
use super::build::{Builder, Value};
use super::parse::Parsed;
use super::rules::{self, Operand};

/// Puts this before the names of the text, so that none is one of the kernels'.
pub(super) fn renamed(name: &Option<String>) -> String {
    format!("user_{}", name.as_deref().unwrap_or("value"))
}

/// A variable in the place of one of the text and, if that depends on the score, the variable of its slope.
type Local = (Handle<LocalVariable>, Option<Handle<LocalVariable>>);

/// The expressions of a function that is rewritten.
pub(super) struct Expressions<'a> {
    parsed: &'a Parsed,
    old: &'a Function,
    handle: Handle<Function>,
    pub activity: Rc<Activity>,
    /// The numbers of arguments' slopes, by those of the arguments.
    slopes_of_arguments: HashMap<u32, u32>,
    pub builder: Builder,
    /// New expressions by old ones, as far as they are computed: values, or pointers to them.
    pub values: HashMap<Handle<Expression>, Value>,
    pub slopes: HashMap<Handle<Expression>, Value>,
    locals: HashMap<Handle<LocalVariable>, Local>,
}

impl<'a> Expressions<'a> {
    pub fn new(
        parsed: &'a Parsed,
        handle: Handle<Function>,
        activity: Rc<Activity>,
        slopes_of_arguments: HashMap<u32, u32>,
        builder: Builder,
    ) -> Self {
        let mut all = Expressions {
            parsed,
            old: &parsed.module.functions[handle],
            handle,
            activity,
            slopes_of_arguments,
            builder,
            values: HashMap::new(),
            slopes: HashMap::new(),
            locals: HashMap::new(),
        };
        all.declare();
        all
    }

    fn declare(&mut self) {
        for (handle, variable) in self.old.local_variables.iter() {
            let name = renamed(&variable.name);
            let slope = self.activity.locals.contains(&handle);
            let slope = slope.then(|| self.builder.local(name.clone() + "_slope", variable.ty));
            let new = self.builder.local(name, variable.ty);
            if let Some(init) = variable.init {
                let init = self.constant(init);
                self.builder.function.local_variables[new].init = Some(init);
            }
            self.locals.insert(handle, (new, slope));
        }
    }

    /// A constant that nothing computes.
    fn constant(&mut self, old: Handle<Expression>) -> Value {
        let mut copy = self.old.expressions[old].clone();
        for operand in operands(&mut copy) {
            *operand = self.constant(*operand);
        }
        self.builder.add_constant(copy)
    }

    /// The type of an old expression.
    fn ty(&self, old: Handle<Expression>) -> &TypeInner {
        let parsed = self.parsed;
        parsed.info[self.handle][old].ty.inner_with(&parsed.module.types)
    }

    /// Of how many components an old expression is, if it is a vector.
    fn size(&self, old: Handle<Expression>) -> Option<VectorSize> {
        match *self.ty(old) {
            TypeInner::Vector { size, .. } => Some(size),
            _ => None,
        }
    }

    /// The new expression in the place of an old one.
    pub fn value(&mut self, old: Handle<Expression>) -> Value {
        if let Some(value) = self.values.get(&old) {
            return *value;
        }
        // Not computed by a statement: a constant, whose copy is computed where it is needed, or what is there from the beginning.
        match self.old.expressions[old].clone() {
            Expression::LocalVariable(local) => {
                let new = Expression::LocalVariable(self.locals[&local].0);
                self.builder.add(new)
            }
            mut copy => {
                for operand in operands(&mut copy) {
                    *operand = self.value(*operand);
                }
                self.builder.add(copy)
            }
        }
    }

    /// The slope of an old expression that depends on the score; of a pointer, where the slope is.
    pub fn slope(&mut self, old: Handle<Expression>) -> Option<Value> {
        if !self.activity.expressions.contains(&old) {
            return None;
        }
        if let Some(slope) = self.slopes.get(&old) {
            return Some(*slope);
        }
        let new = match self.old.expressions[old] {
            Expression::LocalVariable(local) => Expression::LocalVariable(self.locals[&local].1?),
            Expression::FunctionArgument(n) => Expression::FunctionArgument(self.slopes_of_arguments[&n]),
            _ => return None,
        };
        Some(self.builder.add(new))
    }

    /// The slope, or 0.
    pub fn slope_or_zero(&mut self, old: Handle<Expression>) -> Value {
        let size = self.size(old);
        self.slope(old).unwrap_or_else(|| self.builder.number(0.0, size))
    }

    fn operand(&mut self, old: Handle<Expression>) -> Operand {
        Operand { value: self.value(old), slope: self.slope(old) }
    }

    /// Computes an old expression anew.
    pub fn compute(&mut self, old: Handle<Expression>) {
        let mut copy = self.old.expressions[old].clone();
        match &mut copy {
            Expression::AccessIndex { base, index } if self.is_open_array(*base) => {
                let (base, index) = (*base, *index);
                let index = self.builder.literal(Literal::U32(index));
                self.access(old, base, index);
                return;
            }
            Expression::Access { base, index } => {
                let (base, index) = (*base, *index);
                let is_signed = matches!(self.ty(index), TypeInner::Scalar(scalar) if *scalar == Scalar::I32);
                let mut index = self.value(index);
                if is_signed {
                    // What is below 0 becomes large.
                    index = self.builder.add(Expression::As { expr: index, kind: ScalarKind::Uint, convert: Some(4) });
                }
                self.access(old, base, index);
                return;
            }
            _ => {}
        }
        for operand in operands(&mut copy) {
            *operand = self.value(*operand);
        }
        let value = match copy {
            Expression::Binary { op, left, right } => self.quotient_or(old, op, left, right),
            Expression::Math { fun: MathFunction::Tanh, arg, .. } => {
                let size = self.size(old);
                rules::tanh_exact(&mut self.builder, arg, size)
            }
            copy => self.builder.add(copy),
        };
        self.values.insert(old, value);
        if self.activity.expressions.contains(&old)
            && let Some(slope) = self.slope_of(old, value)
        {
            self.slopes.insert(old, slope);
        }
    }

    fn is_open_array(&self, base: Handle<Expression>) -> bool {
        let TypeInner::Pointer { base, .. } = self.ty(base) else { return false };
        let array = &self.parsed.module.types[*base].inner;
        matches!(array, TypeInner::Array { size: ArraySize::Dynamic, .. })
    }

    /// The element at an index, or the last one if it is past the end.
    fn access(&mut self, old: Handle<Expression>, base: Handle<Expression>, index: Value) {
        let types = &self.parsed.module.types;
        let inner = match self.ty(base) {
            TypeInner::Pointer { base, .. } => &types[*base].inner,
            inner => inner,
        };
        let fixed = match *inner {
            TypeInner::Vector { size, .. } | TypeInner::ValuePointer { size: Some(size), .. } => Some(size as u32),
            TypeInner::Matrix { columns, .. } => Some(columns as u32),
            TypeInner::Array { size: ArraySize::Constant(size), .. } => Some(size.get()),
            _ => None,
        };
        let array = self.value(base);
        let last = match fixed {
            Some(length) => self.builder.literal(Literal::U32(length - 1)),
            None => {
                let length = self.builder.add(Expression::ArrayLength(array));
                let one = self.builder.literal(Literal::U32(1));
                self.builder.minus(length, one)
            }
        };
        let index = self.builder.math(MathFunction::Min, &[index, last]);
        let value = self.builder.add(Expression::Access { base: array, index });
        self.values.insert(old, value);
        if let Some(base) = self.slope(base) {
            let slope = self.builder.add(Expression::Access { base, index });
            self.slopes.insert(old, slope);
        }
    }

    /// An operation. The divisor of whole numbers is 1 where a division would not be defined, which gives what WGSL says.
    fn quotient_or(&mut self, old: Handle<Expression>, op: BinaryOperator, left: Value, mut right: Value) -> Value {
        use BinaryOperator as B;
        let scalar = match self.ty(old) {
            TypeInner::Scalar(scalar) | TypeInner::Vector { scalar, .. } => *scalar,
            _ => Scalar::BOOL,
        };
        let is_whole = [ScalarKind::Sint, ScalarKind::Uint].contains(&scalar.kind);
        if is_whole && [B::Divide, B::Modulo].contains(&op) {
            let size = self.size(old);
            let b = &mut self.builder;
            let is_signed = scalar.kind == ScalarKind::Sint;
            let mut number = |n: i32| b.splat(if is_signed { Literal::I32(n) } else { Literal::U32(n as u32) }, size);
            let [zero, one] = [0, 1].map(&mut number);
            let mut undefined = None;
            if is_signed {
                let [least, minus_one] = [i32::MIN, -1].map(&mut number);
                let of_left = b.binary(B::Equal, left, least);
                let of_right = b.binary(B::Equal, right, minus_one);
                undefined = Some(b.binary(B::And, of_left, of_right));
            }
            let is_zero = b.binary(B::Equal, right, zero);
            let condition = undefined.map_or(is_zero, |undefined| b.binary(B::InclusiveOr, is_zero, undefined));
            right = b.select(condition, one, right);
        }
        self.builder.binary(op, left, right)
    }

    /// The slope of an old expression that depends on the score, of which `value` is the new one.
    fn slope_of(&mut self, old: Handle<Expression>, value: Value) -> Option<Value> {
        let expression = self.old.expressions[old].clone();
        let new = match expression {
            Expression::Compose { ty, components } => {
                let components = components.iter().map(|&component| self.slope_or_zero(component)).collect();
                Expression::Compose { ty, components }
            }
            Expression::AccessIndex { base, index } => Expression::AccessIndex { base: self.slope(base)?, index },
            Expression::Splat { size, value } => Expression::Splat { size, value: self.slope(value)? },
            Expression::Swizzle { size, vector, pattern } => {
                Expression::Swizzle { size, vector: self.slope(vector)?, pattern }
            }
            Expression::Load { pointer } => Expression::Load { pointer: self.slope(pointer)? },
            Expression::Unary { op, expr } => Expression::Unary { op, expr: self.slope(expr)? },
            Expression::As { expr, .. } => return self.slope(expr),
            Expression::Select { condition, accept, reject } => {
                let (accept, reject) = (self.slope_or_zero(accept), self.slope_or_zero(reject));
                Expression::Select { condition: self.value(condition), accept, reject }
            }
            Expression::Binary { op, left, right } => {
                let operands = [self.operand(left), self.operand(right)];
                return rules::binary(&mut self.builder, op, operands, value);
            }
            Expression::Math { fun, arg, arg1, arg2, arg3 } => {
                let arguments: Vec<_> =
                    [Some(arg), arg1, arg2, arg3].into_iter().flatten().map(|old| self.operand(old)).collect();
                let size = self.size(arg);
                return rules::math(&mut self.builder, fun, &arguments, size, value);
            }
            _ => return None,
        };
        Some(self.builder.add(new))
    }
}

/// The expressions that one is computed from.
fn operands(expression: &mut Expression) -> Vec<&mut Handle<Expression>> {
    match expression {
        Expression::Compose { components, .. } => components.iter_mut().collect(),
        Expression::Access { base, index } => vec![base, index],
        Expression::AccessIndex { base, .. } => vec![base],
        Expression::Splat { value, .. } => vec![value],
        Expression::Swizzle { vector, .. } => vec![vector],
        Expression::Load { pointer } => vec![pointer],
        Expression::Unary { expr, .. } => vec![expr],
        Expression::Binary { left, right, .. } => vec![left, right],
        Expression::Select { condition, accept, reject } => vec![condition, accept, reject],
        Expression::Relational { argument, .. } => vec![argument],
        Expression::Math { arg, arg1, arg2, arg3, .. } => {
            [Some(arg), arg1.as_mut(), arg2.as_mut(), arg3.as_mut()].into_iter().flatten().collect()
        }
        Expression::As { expr, .. } => vec![expr],
        Expression::ArrayLength(array) => vec![array],
        _ => vec![],
    }
}
