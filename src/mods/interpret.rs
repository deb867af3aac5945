//! Runs the functions of a text on the host, in f64, with slopes: what the reference computes scores with.

use naga::{
    Block, Expression, Function, Handle, Literal, Module, Scalar, ScalarKind, Statement, SwitchValue, Type, TypeInner,
};

use super::dual::MOST_ITERATIONS;
use super::number::Number;
use super::operate;
use super::value::{Place, Root, Value};

/// What a buffer holds, four bytes a number.
pub(super) type Contents<'b> = &'b [u8];

/// How a block ended.
enum Flow {
    On,
    Break,
    Continue,
    Return(Option<Value>),
}

/// A call of a function of a module.
pub(super) struct Run<'m, 'b> {
    module: &'m Module,
    /// By the number of the global variable; empty for those that are no buffers.
    buffers: &'b [Contents<'b>],
    /// Private variables, by the number of the global variable.
    privates: Vec<Option<Value>>,
    /// The variables of the calls that have begun.
    frames: Vec<Vec<Value>>,
    iterations: u32,
}

/// The expressions of a call that are known.
struct Frame<'m> {
    function: &'m Function,
    arguments: Vec<Value>,
    known: Vec<Option<Value>>,
    number: usize,
}

impl<'m, 'b> Run<'m, 'b> {
    pub fn new(module: &'m Module, buffers: &'b [Contents<'b>]) -> Self {
        let mut run = Run { module, buffers, privates: vec![], frames: vec![], iterations: 0 };
        let is_private = |space| space == naga::AddressSpace::Private;
        let all = module.global_variables.iter();
        run.privates = all.map(|(_, v)| is_private(v.space).then(|| run.zero(v.ty))).collect();
        run
    }

    /// What a function returns.
    pub fn call(&mut self, function: Handle<Function>, arguments: Vec<Value>) -> Option<Value> {
        let function = &self.module.functions[function];
        let known = vec![None; function.expressions.len()];
        let mut frame = Frame { function, arguments, known, number: self.frames.len() };
        self.frames.push(vec![]);
        for (_, variable) in function.local_variables.iter() {
            let value = match variable.init {
                Some(init) => self.value(&mut frame, init),
                None => self.zero(variable.ty),
            };
            self.frames[frame.number].push(value);
        }
        let flow = self.block(&mut frame, &function.body);
        self.frames.pop();
        match flow {
            Flow::Return(value) => value,
            _ => None,
        }
    }

    fn block(&mut self, frame: &mut Frame<'m>, block: &'m Block) -> Flow {
        for statement in block.iter() {
            match self.statement(frame, statement) {
                Flow::On => {}
                flow => return flow,
            }
        }
        Flow::On
    }

    fn statement(&mut self, frame: &mut Frame<'m>, statement: &'m Statement) -> Flow {
        match statement {
            Statement::Emit(range) => {
                for handle in range.clone() {
                    let value = self.compute(frame, handle);
                    frame.known[handle.index()] = Some(value);
                }
            }
            Statement::Block(inner) => return self.block(frame, inner),
            Statement::If { condition, accept, reject } => {
                let taken = if self.value(frame, *condition).truth() { accept } else { reject };
                return self.block(frame, taken);
            }
            Statement::Switch { selector, cases } => {
                let selector = self.value(frame, *selector);
                let is_it = |value: &SwitchValue| match (*value, &selector) {
                    (SwitchValue::I32(n), Value::Int(x)) => n == *x,
                    (SwitchValue::U32(n), Value::Uint(x)) => n == *x,
                    _ => false,
                };
                let found = cases.iter().position(|case| is_it(&case.value));
                let first = found.or(cases.iter().position(|case| case.value == SwitchValue::Default));
                for case in cases.iter().skip(first.unwrap_or(cases.len())) {
                    match self.block(frame, &case.body) {
                        Flow::On if case.fall_through => {}
                        Flow::On | Flow::Break => break,
                        flow => return flow,
                    }
                }
            }
            Statement::Loop { body, continuing, break_if } => loop {
                self.iterations += 1;
                if self.iterations > MOST_ITERATIONS {
                    break;
                }
                match self.block(frame, body) {
                    Flow::On | Flow::Continue => {}
                    Flow::Break => break,
                    flow => return flow,
                }
                if let Flow::Return(value) = self.block(frame, continuing) {
                    return Flow::Return(value);
                }
                if break_if.is_some_and(|condition| self.value(frame, condition).truth()) {
                    break;
                }
            },
            Statement::Break => return Flow::Break,
            Statement::Continue => return Flow::Continue,
            Statement::Return { value } => return Flow::Return(value.map(|value| self.value(frame, value))),
            Statement::Store { pointer, value } => {
                let value = self.value(frame, *value);
                if let Value::Pointer(Place { root, path }) = self.value(frame, *pointer) {
                    let variable = match root {
                        Root::Local(call, n) => Some(&mut self.frames[call][n]),
                        Root::Global(n) => self.privates[n].as_mut(),
                    };
                    if let Some(variable) = variable {
                        *variable.part_mut(&path) = value;
                    }
                }
            }
            Statement::Call { function, arguments, result } => {
                let arguments = arguments.iter().map(|argument| self.value(frame, *argument)).collect();
                let value = self.call(*function, arguments);
                if let Some(result) = result {
                    frame.known[result.index()] = value;
                }
            }
            // The text has been checked: it has no others.
            _ => {}
        }
        Flow::On
    }

    /// An expression as it was computed, or one that is the same everywhere.
    fn value(&mut self, frame: &mut Frame<'m>, handle: Handle<Expression>) -> Value {
        match &frame.known[handle.index()] {
            Some(value) => value.clone(),
            None => self.compute(frame, handle),
        }
    }

    fn compute(&mut self, frame: &mut Frame<'m>, handle: Handle<Expression>) -> Value {
        let function = frame.function;
        match &function.expressions[handle] {
            Expression::FunctionArgument(n) => frame.arguments[*n as usize].clone(),
            Expression::LocalVariable(local) => {
                Value::Pointer(Place { root: Root::Local(frame.number, local.index()), path: vec![] })
            }
            Expression::GlobalVariable(variable) => {
                Value::Pointer(Place { root: Root::Global(variable.index()), path: vec![] })
            }
            Expression::Access { base, index } => {
                let index = self.value(frame, *index).index();
                self.access(frame, *base, index)
            }
            Expression::AccessIndex { base, index } => self.access(frame, *base, *index as usize),
            Expression::Load { pointer } => match self.value(frame, *pointer) {
                Value::Pointer(place) => self.load(&place),
                value => value,
            },
            Expression::ArrayLength(array) => match self.value(frame, *array) {
                Value::Pointer(Place { root: Root::Global(n), .. }) => {
                    Value::Uint(self.buffers.get(n).map_or(0, |buffer| buffer.len() / 4) as u32)
                }
                _ => Value::Uint(0),
            },
            expression => self.operation(expression, &mut |run, operand| run.value(frame, operand)),
        }
    }

    /// What has the same meaning in functions and in constants.
    fn operation(
        &mut self,
        expression: &Expression,
        value: &mut dyn FnMut(&mut Self, Handle<Expression>) -> Value,
    ) -> Value {
        match expression {
            Expression::Literal(literal) => match *literal {
                Literal::F32(x) => Value::Float(Number::new(x.into())),
                Literal::I32(x) => Value::Int(x),
                Literal::U32(x) => Value::Uint(x),
                Literal::Bool(x) => Value::Bool(x),
                // The text has been checked: it has no others.
                _ => Value::Uint(0),
            },
            Expression::Constant(constant) => self.constant(self.module.constants[*constant].init),
            Expression::ZeroValue(ty) => self.zero(*ty),
            Expression::Compose { ty, components } => {
                let components: Vec<_> = components.iter().map(|component| value(self, *component)).collect();
                match self.module.types[*ty].inner {
                    // Vectors may be made of vectors.
                    TypeInner::Vector { .. } => {
                        Value::many(components.iter().flat_map(|part| part.components().to_vec()).collect())
                    }
                    _ => Value::many(components),
                }
            }
            Expression::Splat { size, value: of } => Value::many(vec![value(self, *of); *size as usize]),
            Expression::Swizzle { size, vector, pattern } => {
                let vector = value(self, *vector);
                Value::many(pattern[..*size as usize].iter().map(|part| vector.part(*part as usize)).collect())
            }
            Expression::Access { base, index } => {
                let index = value(self, *index).index();
                value(self, *base).part(index)
            }
            Expression::AccessIndex { base, index } => value(self, *base).part(*index as usize),
            Expression::Unary { op, expr } => operate::unary(*op, &value(self, *expr)),
            Expression::Binary { op, left, right } => {
                let (left, right) = (value(self, *left), value(self, *right));
                operate::binary(*op, &left, &right)
            }
            Expression::Select { condition, accept, reject } => {
                let [condition, accept, reject] = [condition, accept, reject].map(|operand| value(self, *operand));
                operate::select(&condition, &accept, &reject)
            }
            Expression::Relational { fun, argument } => operate::relational(*fun, &value(self, *argument)),
            Expression::Math { fun, arg, arg1, arg2, arg3 } => {
                let all = [Some(*arg), *arg1, *arg2, *arg3].into_iter().flatten();
                let all: Vec<_> = all.map(|operand| value(self, operand)).collect();
                operate::math(*fun, &all)
            }
            Expression::As { expr, kind, convert } => operate::converted(&value(self, *expr), *kind, convert.is_some()),
            // The text has been checked: it has no others.
            _ => Value::Uint(0),
        }
    }

    fn constant(&mut self, handle: Handle<Expression>) -> Value {
        let module = self.module;
        self.operation(&module.global_expressions[handle], &mut |run, operand| run.constant(operand))
    }

    /// A part of a value, or a pointer to a part of a variable.
    fn access(&mut self, frame: &mut Frame<'m>, base: Handle<Expression>, index: usize) -> Value {
        match self.value(frame, base) {
            Value::Pointer(mut place) => {
                place.path.push(index);
                Value::Pointer(place)
            }
            value => value.part(index),
        }
    }

    fn load(&self, place: &Place) -> Value {
        let part = |value: &Value| place.path.iter().fold(value.clone(), |value, &index| value.part(index));
        match place.root {
            Root::Local(call, n) => part(&self.frames[call][n]),
            Root::Global(n) => match &self.privates[n] {
                Some(value) => part(value),
                None => self.read(n, place.path.first().copied().unwrap_or(0)),
            },
        }
    }

    /// An element of a buffer, or the last one if the index is past the end.
    fn read(&self, buffer: usize, index: usize) -> Value {
        let contents = self.buffers.get(buffer).copied().unwrap_or_default();
        let at = index.min((contents.len() / 4).saturating_sub(1)) * 4;
        let mut bytes = [0; 4];
        if let Some(found) = contents.get(at..at + 4) {
            bytes.copy_from_slice(found);
        }
        let variable = self.module.global_variables.iter().nth(buffer).map(|(_, variable)| variable.ty);
        let element = variable.map(|ty| &self.module.types[ty].inner);
        let scalar = match element {
            Some(TypeInner::Array { base, .. }) => self.module.types[*base].inner.scalar(),
            _ => None,
        };
        match scalar.map(|scalar| scalar.kind) {
            Some(ScalarKind::Float) => Value::Float(Number::new(f32::from_le_bytes(bytes).into())),
            Some(ScalarKind::Sint) => Value::Int(i32::from_le_bytes(bytes)),
            _ => Value::Uint(u32::from_le_bytes(bytes)),
        }
    }

    fn zero(&self, ty: Handle<Type>) -> Value {
        let scalar = |scalar: Scalar| match scalar.kind {
            ScalarKind::Float => Value::Float(Number::new(0.0)),
            ScalarKind::Sint => Value::Int(0),
            ScalarKind::Bool => Value::Bool(false),
            _ => Value::Uint(0),
        };
        match &self.module.types[ty].inner {
            TypeInner::Vector { size, scalar: of } => Value::many(vec![scalar(*of); *size as usize]),
            TypeInner::Matrix { columns, rows, scalar: of } => {
                let column = Value::many(vec![scalar(*of); *rows as usize]);
                Value::many(vec![column; *columns as usize])
            }
            TypeInner::Array { base, size: naga::ArraySize::Constant(size), .. } => {
                Value::many(vec![self.zero(*base); size.get() as usize])
            }
            TypeInner::Struct { members, .. } => {
                Value::many(members.iter().map(|member| self.zero(member.ty)).collect())
            }
            TypeInner::Scalar(of) => scalar(*of),
            _ => Value::Uint(0),
        }
    }
}
