//! From the functions of a text to those that kernels call: each beside a version that gives its slope too, none of which reads past
//! an array or runs for ever.

use std::collections::HashMap;
use std::rc::Rc;

use naga::{
    AddressSpace, Arena, ArraySize, BinaryOperator, Block, Expression, Function, FunctionArgument, FunctionResult,
    GlobalVariable, Handle, Literal, LocalVariable, MathFunction, MemoryDecorations, Module, Scalar, ScalarKind, Span,
    Statement, StructMember, SwitchCase, Type, TypeInner, UniqueArena, VectorSize,
};

use super::active::{Activities, Activity, Version};
use super::build::{Builder, Value};
use super::error::Refusal;
use super::parse::Parsed;
use super::rules::{self, Operand};

/// How many iterations all loops of one call of a mod may make together. Then they end.
pub(crate) const MOST_ITERATIONS: u32 = 1 << 16;

/// The functions that kernels call: the score and its slope, and whether it counts.
pub(crate) const SCORE: &str = "mods_score";
pub(crate) const KEEP: &str = "mods_keep";

/// Puts this before the names of the text, so that none is one of the kernels'.
fn renamed(name: &Option<String>) -> String {
    format!("user_{}", name.as_deref().unwrap_or("value"))
}

/// The module that kernels include.
pub(super) fn module(parsed: &Parsed) -> Result<Module, Refusal> {
    let mut rewrite = Rewrite {
        parsed,
        activities: Activities::new(parsed),
        types: parsed.module.types.clone(),
        variables: parsed.module.global_variables.clone(),
        functions: Arena::new(),
        done: HashMap::new(),
        iterations: None,
    };
    if parsed.module.functions.iter().any(|(_, function)| has_loop(&function.body)) {
        let ty = rewrite.scalar(Scalar::U32);
        let variable = GlobalVariable {
            name: Some("mods_iterations".into()),
            space: AddressSpace::Private,
            binding: None,
            ty,
            init: None,
            memory_decorations: MemoryDecorations::empty(),
        };
        rewrite.iterations = Some(rewrite.variables.append(variable, Span::UNDEFINED));
    }
    if let Some(score) = parsed.score {
        rewrite.score(score)?;
    }
    if let Some(mask) = parsed.mask {
        rewrite.keep(mask)?;
    }
    let Rewrite { types, variables, functions, .. } = rewrite;
    let mut module =
        Module { functions, global_variables: variables, types: renamed_types(&types), ..parsed.module.clone() };
    for (_, constant) in module.constants.iter_mut() {
        constant.name = constant.name.is_some().then(|| renamed(&constant.name));
    }
    for (_, handle) in &parsed.buffers {
        let variable = &mut module.global_variables[*handle];
        variable.name = Some(renamed(&variable.name));
    }
    Ok(module)
}

/// The types with names of structs that are no kernel's. Handles stay as they are: so does the order.
fn renamed_types(types: &UniqueArena<Type>) -> UniqueArena<Type> {
    let mut all = UniqueArena::new();
    for (_, ty) in types.iter() {
        let name = ty.name.is_some().then(|| renamed(&ty.name));
        all.insert(Type { name, inner: ty.inner.clone() }, Span::UNDEFINED);
    }
    all
}

fn has_loop(block: &Block) -> bool {
    block.iter().any(|statement| match statement {
        Statement::Loop { .. } => true,
        Statement::Block(inner) => has_loop(inner),
        Statement::If { accept, reject, .. } => has_loop(accept) || has_loop(reject),
        Statement::Switch { cases, .. } => cases.iter().any(|case| has_loop(&case.body)),
        _ => false,
    })
}

struct Rewrite<'a> {
    parsed: &'a Parsed,
    activities: Activities<'a>,
    types: UniqueArena<Type>,
    variables: Arena<GlobalVariable>,
    functions: Arena<Function>,
    done: HashMap<Version, Handle<Function>>,
    /// What counts the iterations of a call, if there is a loop.
    iterations: Option<Handle<GlobalVariable>>,
}

impl Rewrite<'_> {
    fn scalar(&mut self, scalar: Scalar) -> Handle<Type> {
        self.types.insert(Type { name: None, inner: TypeInner::Scalar(scalar) }, Span::UNDEFINED)
    }

    /// What a version with slopes returns: a value of this type, and its slope.
    fn pair(&mut self, ty: Handle<Type>) -> Handle<Type> {
        let (offset, span) = match self.types[ty].inner {
            TypeInner::Vector { size: VectorSize::Bi, .. } => (8, 16),
            TypeInner::Vector { .. } => (16, 32),
            _ => (4, 8),
        };
        let member = |name: &str, offset| StructMember { name: Some(name.into()), ty, binding: None, offset };
        let members = vec![member("value", 0), member("slope", offset)];
        let name = Some("Dual".into());
        self.types.insert(Type { name, inner: TypeInner::Struct { members, span } }, Span::UNDEFINED)
    }

    /// A function, of which these arguments have slopes, behind all arguments. If its result has one, it returns both.
    fn function(&mut self, version: Version) -> Result<Handle<Function>, Refusal> {
        if let Some(done) = self.done.get(&version) {
            return Ok(*done);
        }
        let activity = self.activities.of(&version)?;
        let (handle, active) = &version;
        let parsed = self.parsed;
        let old = &parsed.module.functions[*handle];
        let suffix = if activity.result { "_dual" } else { "" };
        let mut builder = Builder::new(renamed(&old.name) + suffix);
        let argument = |name: &str, ty| FunctionArgument { name: Some(name.into()), ty, binding: None };
        let mut arguments: Vec<_> = old.arguments.iter().map(|old| argument(&renamed(&old.name), old.ty)).collect();
        let mut slopes_of_arguments = HashMap::new();
        for (n, old) in old.arguments.iter().enumerate().filter(|(n, _)| active[*n]) {
            slopes_of_arguments.insert(n as u32, arguments.len() as u32);
            arguments.push(argument(&(renamed(&old.name) + "_slope"), old.ty));
        }
        builder.function.arguments = arguments;
        builder.function.result = old.result.as_ref().map(|result| {
            let ty = if activity.result { self.pair(result.ty) } else { result.ty };
            FunctionResult { ty, binding: None }
        });
        let mut body = Body {
            rewrite: self,
            old,
            handle: *handle,
            activity,
            slopes_of_arguments,
            builder,
            values: HashMap::new(),
            slopes: HashMap::new(),
            locals: HashMap::new(),
        };
        body.declare();
        let block = body.block(&old.body)?;
        let mut function = body.builder.finish();
        function.body = block;
        let new = self.functions.append(function, Span::UNDEFINED);
        self.done.insert(version, new);
        Ok(new)
    }

    /// Begins a function that kernels call.
    fn entry(&mut self, name: &str, with_score: bool, result: Handle<Type>) -> (Builder, Vec<Value>) {
        let float = self.scalar(Scalar::F32);
        let mut builder = Builder::new(name.into());
        let types = if with_score { vec![float, self.parsed.position] } else { vec![self.parsed.position] };
        let argument = |ty| FunctionArgument { name: None, ty, binding: None };
        builder.function.arguments = types.iter().map(|&ty| argument(ty)).collect();
        builder.function.result = Some(FunctionResult { ty: result, binding: None });
        let arguments = (0..types.len() as u32).map(|n| builder.add(Expression::FunctionArgument(n))).collect();
        if let Some(iterations) = self.iterations {
            let pointer = builder.add(Expression::GlobalVariable(iterations));
            let zero = builder.literal(Literal::U32(0));
            builder.store(pointer, zero);
        }
        (builder, arguments)
    }

    /// `fn mods_score(score: f32, at: Position) -> vec2<f32>`: the score and its slope.
    fn score(&mut self, score: Handle<Function>) -> Result<(), Refusal> {
        let inner = TypeInner::Vector { size: VectorSize::Bi, scalar: Scalar::F32 };
        let result = self.types.insert(Type { name: None, inner }, Span::UNDEFINED);
        let (mut b, arguments) = self.entry(SCORE, true, result);
        let dual: Version = (score, vec![true, false]);
        let components = if let Some(slope) = self.parsed.slope {
            let passive = |function| (function, vec![false, false]);
            let (value, slope) = (self.function(passive(score))?, self.function(passive(slope))?);
            [call(&mut b, value, arguments.clone()), call(&mut b, slope, arguments)]
        } else if self.activities.of(&dual)?.result {
            let function = self.function(dual)?;
            let one = b.number(1.0, None);
            let pair = call(&mut b, function, vec![arguments[0], arguments[1], one]);
            [b.member(pair, 0), b.member(pair, 1)]
        } else {
            let function = self.function((score, vec![false, false]))?;
            [call(&mut b, function, arguments), b.number(0.0, None)]
        };
        let value = b.add(Expression::Compose { ty: result, components: components.into() });
        b.push(Statement::Return { value: Some(value) });
        self.functions.append(b.finish(), Span::UNDEFINED);
        Ok(())
    }

    /// `fn mods_keep(at: Position) -> bool`.
    fn keep(&mut self, mask: Handle<Function>) -> Result<(), Refusal> {
        let result = self.scalar(Scalar::BOOL);
        let (mut b, arguments) = self.entry(KEEP, false, result);
        let function = self.function((mask, vec![false]))?;
        let value = Some(call(&mut b, function, arguments));
        b.push(Statement::Return { value });
        self.functions.append(b.finish(), Span::UNDEFINED);
        Ok(())
    }
}

fn call(b: &mut Builder, function: Handle<Function>, arguments: Vec<Value>) -> Value {
    let result = b.add(Expression::CallResult(function));
    b.push(Statement::Call { function, arguments, result: Some(result) });
    result
}

/// A function that is rewritten.
struct Body<'r, 'a> {
    rewrite: &'r mut Rewrite<'a>,
    old: &'a Function,
    handle: Handle<Function>,
    activity: Rc<Activity>,
    slopes_of_arguments: HashMap<u32, u32>,
    builder: Builder,
    /// New expressions by old ones, as far as they are computed: values, or pointers to them.
    values: HashMap<Handle<Expression>, Value>,
    slopes: HashMap<Handle<Expression>, Value>,
    /// Variables, and those of their slopes.
    locals: HashMap<Handle<LocalVariable>, (Handle<LocalVariable>, Option<Handle<LocalVariable>>)>,
}

impl Body<'_, '_> {
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
        let parsed = self.rewrite.parsed;
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
    fn value(&mut self, old: Handle<Expression>) -> Value {
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
    fn slope(&mut self, old: Handle<Expression>) -> Option<Value> {
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
    fn slope_or_zero(&mut self, old: Handle<Expression>) -> Value {
        let size = self.size(old);
        self.slope(old).unwrap_or_else(|| self.builder.number(0.0, size))
    }

    fn operand(&mut self, old: Handle<Expression>) -> Operand {
        Operand { value: self.value(old), slope: self.slope(old) }
    }

    /// Computes an old expression anew.
    fn compute(&mut self, old: Handle<Expression>) {
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
        if self.activity.expressions.contains(&old) {
            if let Some(slope) = self.slope_of(old, value) {
                self.slopes.insert(old, slope);
            }
        }
    }

    fn is_open_array(&self, base: Handle<Expression>) -> bool {
        let TypeInner::Pointer { base, .. } = self.ty(base) else { return false };
        let array = &self.rewrite.parsed.module.types[*base].inner;
        matches!(array, TypeInner::Array { size: ArraySize::Dynamic, .. })
    }

    /// The element at an index, or the last one if it is past the end.
    fn access(&mut self, old: Handle<Expression>, base: Handle<Expression>, index: Value) {
        let types = &self.rewrite.parsed.module.types;
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

    fn block(&mut self, old: &Block) -> Result<Block, Refusal> {
        let before = self.builder.begin();
        for statement in old.iter() {
            self.statement(statement)?;
        }
        Ok(self.builder.end(before))
    }

    fn statement(&mut self, old: &Statement) -> Result<(), Refusal> {
        let new = match old {
            Statement::Emit(range) => {
                range.clone().for_each(|old| self.compute(old));
                return Ok(());
            }
            Statement::Block(inner) => Statement::Block(self.block(inner)?),
            Statement::If { condition, accept, reject } => {
                let condition = self.value(*condition);
                Statement::If { condition, accept: self.block(accept)?, reject: self.block(reject)? }
            }
            Statement::Switch { selector, cases } => {
                let selector = self.value(*selector);
                let mut all = vec![];
                for case in cases {
                    let body = self.block(&case.body)?;
                    all.push(SwitchCase { value: case.value, body, fall_through: case.fall_through });
                }
                Statement::Switch { selector, cases: all }
            }
            Statement::Loop { body, continuing, break_if } => self.bounded_loop(body, continuing, *break_if)?,
            Statement::Return { value: Some(old) } => {
                let mut value = self.value(*old);
                if self.activity.result {
                    let slope = self.slope_or_zero(*old);
                    let ty = self.builder.function.result.as_ref().map(|result| result.ty);
                    let components = vec![value, slope];
                    value = ty.map_or(value, |ty| self.builder.add(Expression::Compose { ty, components }));
                }
                Statement::Return { value: Some(value) }
            }
            Statement::Store { pointer, value } => {
                if let Some(place) = self.slope(*pointer) {
                    let slope = self.slope_or_zero(*value);
                    self.builder.store(place, slope);
                }
                Statement::Store { pointer: self.value(*pointer), value: self.value(*value) }
            }
            Statement::Call { function, arguments, result } => return self.call(*function, arguments, *result),
            // Break, Continue, and Return of nothing: the text has been checked.
            other => other.clone(),
        };
        self.builder.push(new);
        Ok(())
    }

    /// A loop that counts its iterations, and ends when they are too many.
    fn bounded_loop(
        &mut self,
        body: &Block,
        continuing: &Block,
        break_if: Option<Handle<Expression>>,
    ) -> Result<Statement, Refusal> {
        let outer = self.builder.begin();
        if let Some(iterations) = self.rewrite.iterations {
            let b = &mut self.builder;
            let pointer = b.add(Expression::GlobalVariable(iterations));
            let before = b.load(pointer);
            let one = b.literal(Literal::U32(1));
            let count = b.plus(before, one);
            b.store(pointer, count);
            let most = b.literal(Literal::U32(MOST_ITERATIONS));
            let condition = b.binary(BinaryOperator::Greater, count, most);
            let accept = Block::from_vec(vec![Statement::Break]);
            b.push(Statement::If { condition, accept, reject: Block::new() });
        }
        for statement in body.iter() {
            self.statement(statement)?;
        }
        let body = self.builder.end(outer);
        let outer = self.builder.begin();
        for statement in continuing.iter() {
            self.statement(statement)?;
        }
        let break_if = break_if.map(|old| self.value(old));
        let continuing = self.builder.end(outer);
        Ok(Statement::Loop { body, continuing, break_if })
    }

    fn call(
        &mut self,
        function: Handle<Function>,
        arguments: &[Handle<Expression>],
        result: Option<Handle<Expression>>,
    ) -> Result<(), Refusal> {
        let active: Vec<_> = arguments.iter().map(|old| self.activity.expressions.contains(old)).collect();
        let none = vec![false; active.len()];
        let mut version = (function, active);
        let has_slope = version.1.contains(&true) && self.rewrite.activities.of(&version)?.result;
        if !has_slope {
            version.1 = none;
        }
        let mut given: Vec<_> = arguments.iter().map(|&old| self.value(old)).collect();
        if has_slope {
            let slopes: Vec<_> = arguments.iter().filter_map(|&old| self.slope(old)).collect();
            given.extend(slopes);
        }
        let function = self.rewrite.function(version)?;
        let Some(old) = result else {
            self.builder.push(Statement::Call { function, arguments: given, result: None });
            return Ok(());
        };
        let new = call(&mut self.builder, function, given);
        if has_slope {
            let (value, slope) = (self.builder.member(new, 0), self.builder.member(new, 1));
            self.values.insert(old, value);
            self.slopes.insert(old, slope);
        } else {
            self.values.insert(old, new);
        }
        Ok(())
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
