//! Writes the body of a function: expressions, and the statements that say when they are computed.

use naga::{
    BinaryOperator, Block, Expression, Function, Handle, Literal, LocalVariable, MathFunction, Span, Statement, Type,
    UnaryOperator, VectorSize,
};

/// An expression of the function that is built.
pub(super) type Value = Handle<Expression>;

/// A function that is built, and the block that is written.
pub(super) struct Builder {
    pub function: Function,
    block: Block,
    /// How many expressions there were when those began that no statement computes yet.
    computed: Option<usize>,
}

impl Builder {
    pub fn new(name: String) -> Self {
        let function = Function { name: Some(name), ..Function::default() };
        Builder { function, block: Block::new(), computed: None }
    }

    /// Adds an expression, computed here.
    pub fn add(&mut self, expression: Expression) -> Value {
        let without_statement = expression.needs_pre_emit() || matches!(expression, Expression::CallResult(_));
        if without_statement {
            self.flush();
        } else if self.computed.is_none() {
            self.computed = Some(self.function.expressions.len());
        }
        self.function.expressions.append(expression, Span::UNDEFINED)
    }

    /// Adds a constant that an initialiser is, which nothing computes.
    pub fn add_constant(&mut self, expression: Expression) -> Value {
        self.flush();
        self.function.expressions.append(expression, Span::UNDEFINED)
    }

    fn flush(&mut self) {
        if let Some(start) = self.computed.take() {
            let range = self.function.expressions.range_from(start);
            self.block.push(Statement::Emit(range), Span::UNDEFINED);
        }
    }

    pub fn push(&mut self, statement: Statement) {
        self.flush();
        self.block.push(statement, Span::UNDEFINED);
    }

    /// Begins a block; what was written before goes on with [`Builder::end`].
    pub fn begin(&mut self) -> Block {
        self.flush();
        std::mem::take(&mut self.block)
    }

    /// The block that was begun.
    pub fn end(&mut self, before: Block) -> Block {
        self.flush();
        std::mem::replace(&mut self.block, before)
    }

    pub fn finish(mut self) -> Function {
        self.flush();
        self.function.body = self.block;
        self.function
    }

    /// A variable that is 0 at first.
    pub fn local(&mut self, name: String, ty: Handle<Type>) -> Handle<LocalVariable> {
        let init = Some(self.add_constant(Expression::ZeroValue(ty)));
        let variable = LocalVariable { name: Some(name), ty, init };
        self.function.local_variables.append(variable, Span::UNDEFINED)
    }

    pub fn literal(&mut self, literal: Literal) -> Value {
        self.add(Expression::Literal(literal))
    }

    /// A number, or a vector of it.
    pub fn splat(&mut self, literal: Literal, size: Option<VectorSize>) -> Value {
        let value = self.literal(literal);
        size.map_or(value, |size| self.add(Expression::Splat { size, value }))
    }

    pub fn number(&mut self, x: f32, size: Option<VectorSize>) -> Value {
        self.splat(Literal::F32(x), size)
    }

    pub fn binary(&mut self, op: BinaryOperator, left: Value, right: Value) -> Value {
        self.add(Expression::Binary { op, left, right })
    }

    pub fn plus(&mut self, left: Value, right: Value) -> Value {
        self.binary(BinaryOperator::Add, left, right)
    }

    pub fn minus(&mut self, left: Value, right: Value) -> Value {
        self.binary(BinaryOperator::Subtract, left, right)
    }

    pub fn times(&mut self, left: Value, right: Value) -> Value {
        self.binary(BinaryOperator::Multiply, left, right)
    }

    pub fn over(&mut self, left: Value, right: Value) -> Value {
        self.binary(BinaryOperator::Divide, left, right)
    }

    pub fn negative(&mut self, expr: Value) -> Value {
        self.add(Expression::Unary { op: UnaryOperator::Negate, expr })
    }

    pub fn select(&mut self, condition: Value, accept: Value, reject: Value) -> Value {
        self.add(Expression::Select { condition, accept, reject })
    }

    pub fn math(&mut self, fun: MathFunction, arguments: &[Value]) -> Value {
        let at = |n: usize| arguments.get(n).copied();
        self.add(Expression::Math { fun, arg: arguments[0], arg1: at(1), arg2: at(2), arg3: at(3) })
    }

    pub fn member(&mut self, base: Value, index: u32) -> Value {
        self.add(Expression::AccessIndex { base, index })
    }

    /// A vector each of whose components is the same.
    pub fn widen(&mut self, value: Value, size: Option<VectorSize>) -> Value {
        size.map_or(value, |size| self.add(Expression::Splat { size, value }))
    }

    pub fn load(&mut self, pointer: Value) -> Value {
        self.add(Expression::Load { pointer })
    }

    pub fn store(&mut self, pointer: Value, value: Value) {
        self.push(Statement::Store { pointer, value });
    }
}
