//! From the functions of a text to those that kernels call: each beside a version that gives its slope too, none of which reads past
//! an array or runs for ever.

use std::collections::HashMap;

use naga::{
    AddressSpace, Arena, BinaryOperator, Block, Expression, Function, FunctionArgument, FunctionResult, GlobalVariable,
    Handle, Literal, MemoryDecorations, Module, Scalar, Span, Statement, StructMember, SwitchCase, Type, TypeInner,
    UniqueArena, VectorSize,
};

use super::active::{Activities, Version};
use super::build::{Builder, Value};
use super::error::Refusal;
use super::expressions::{Expressions, renamed};
use super::parse::Parsed;

/// How many iterations all loops of one call of a mod may make together. Then they end.
pub(crate) const MOST_ITERATIONS: u32 = 1 << 16;

/// The functions that kernels call: the score and its slope, and whether it counts.
pub(crate) const SCORE: &str = "mods_score";
pub(crate) const KEEP: &str = "mods_keep";

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
    let mut module = Module {
        functions,
        global_variables: variables,
        types: renamed_types(&types, parsed.position),
        ..parsed.module.clone()
    };
    for (_, constant) in module.constants.iter_mut() {
        constant.name = constant.name.is_some().then(|| renamed(&constant.name));
    }
    for (_, handle) in &parsed.buffers {
        let variable = &mut module.global_variables[*handle];
        variable.name = Some(renamed(&variable.name));
    }
    Ok(module)
}

/// The types with names of structs that are no kernel's. `Position`, which kernels make, has a name that no struct of the user's can have.
/// Handles stay as they are: so does the order.
fn renamed_types(types: &UniqueArena<Type>, position: Handle<Type>) -> UniqueArena<Type> {
    let mut all = UniqueArena::new();
    for (handle, ty) in types.iter() {
        let of_user = ty.name.is_some().then(|| renamed(&ty.name));
        let name = if handle == position { Some("mods_Position".into()) } else { of_user };
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
        let expressions = Expressions::new(parsed, *handle, activity, slopes_of_arguments, builder);
        let mut body = Body { rewrite: self, expressions };
        let block = body.block(&old.body)?;
        let mut function = body.expressions.builder.finish();
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
        self.count_anew(&mut builder);
        (builder, arguments)
    }

    /// Begins to count the iterations of a call of a mod.
    fn count_anew(&self, builder: &mut Builder) {
        if let Some(iterations) = self.iterations {
            let pointer = builder.add(Expression::GlobalVariable(iterations));
            let zero = builder.literal(Literal::U32(0));
            builder.store(pointer, zero);
        }
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
            let value = call(&mut b, value, arguments.clone());
            self.count_anew(&mut b);
            [value, call(&mut b, slope, arguments)]
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
    expressions: Expressions<'a>,
}

impl Body<'_, '_> {
    fn block(&mut self, old: &Block) -> Result<Block, Refusal> {
        let before = self.expressions.builder.begin();
        for statement in old.iter() {
            self.statement(statement)?;
        }
        Ok(self.expressions.builder.end(before))
    }

    fn statement(&mut self, old: &Statement) -> Result<(), Refusal> {
        let new = match old {
            Statement::Emit(range) => {
                range.clone().for_each(|old| self.expressions.compute(old));
                return Ok(());
            }
            Statement::Block(inner) => Statement::Block(self.block(inner)?),
            Statement::If { condition, accept, reject } => {
                let condition = self.expressions.value(*condition);
                Statement::If { condition, accept: self.block(accept)?, reject: self.block(reject)? }
            }
            Statement::Switch { selector, cases } => {
                let selector = self.expressions.value(*selector);
                let mut all = vec![];
                for case in cases {
                    let body = self.block(&case.body)?;
                    all.push(SwitchCase { value: case.value, body, fall_through: case.fall_through });
                }
                Statement::Switch { selector, cases: all }
            }
            Statement::Loop { body, continuing, break_if } => self.bounded_loop(body, continuing, *break_if)?,
            Statement::Return { value: Some(old) } => {
                let mut value = self.expressions.value(*old);
                if self.expressions.activity.result {
                    let slope = self.expressions.slope_or_zero(*old);
                    let ty = self.expressions.builder.function.result.as_ref().map(|result| result.ty);
                    let components = vec![value, slope];
                    value = ty.map_or(value, |ty| self.expressions.builder.add(Expression::Compose { ty, components }));
                }
                Statement::Return { value: Some(value) }
            }
            Statement::Store { pointer, value } => {
                if let Some(place) = self.expressions.slope(*pointer) {
                    let slope = self.expressions.slope_or_zero(*value);
                    self.expressions.builder.store(place, slope);
                }
                Statement::Store { pointer: self.expressions.value(*pointer), value: self.expressions.value(*value) }
            }
            Statement::Call { function, arguments, result } => return self.call(*function, arguments, *result),
            // Break, Continue, and Return of nothing: the text has been checked.
            other => other.clone(),
        };
        self.expressions.builder.push(new);
        Ok(())
    }

    /// A loop that counts its iterations, and ends when they are too many.
    fn bounded_loop(
        &mut self,
        body: &Block,
        continuing: &Block,
        break_if: Option<Handle<Expression>>,
    ) -> Result<Statement, Refusal> {
        let outer = self.expressions.builder.begin();
        if let Some(iterations) = self.rewrite.iterations {
            let b = &mut self.expressions.builder;
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
        let body = self.expressions.builder.end(outer);
        let outer = self.expressions.builder.begin();
        for statement in continuing.iter() {
            self.statement(statement)?;
        }
        let break_if = break_if.map(|old| self.expressions.value(old));
        let continuing = self.expressions.builder.end(outer);
        Ok(Statement::Loop { body, continuing, break_if })
    }

    fn call(
        &mut self,
        function: Handle<Function>,
        arguments: &[Handle<Expression>],
        result: Option<Handle<Expression>>,
    ) -> Result<(), Refusal> {
        let active: Vec<_> = arguments.iter().map(|old| self.expressions.activity.expressions.contains(old)).collect();
        let none = vec![false; active.len()];
        let mut version = (function, active);
        let has_slope = version.1.contains(&true) && self.rewrite.activities.of(&version)?.result;
        if !has_slope {
            version.1 = none;
        }
        let mut given: Vec<_> = arguments.iter().map(|&old| self.expressions.value(old)).collect();
        if has_slope {
            let slopes: Vec<_> = arguments.iter().filter_map(|&old| self.expressions.slope(old)).collect();
            given.extend(slopes);
        }
        let function = self.rewrite.function(version)?;
        let Some(old) = result else {
            self.expressions.builder.push(Statement::Call { function, arguments: given, result: None });
            return Ok(());
        };
        let new = call(&mut self.expressions.builder, function, given);
        if has_slope {
            let (value, slope) = (self.expressions.builder.member(new, 0), self.expressions.builder.member(new, 1));
            self.expressions.values.insert(old, value);
            self.expressions.slopes.insert(old, slope);
        } else {
            self.expressions.values.insert(old, new);
        }
        Ok(())
    }
}
