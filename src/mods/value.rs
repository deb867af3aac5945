//! What expressions of WGSL are on the host.

use std::rc::Rc;

use super::number::Number;

/// What an expression is.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Float(Number),
    Int(i32),
    Uint(u32),
    Bool(bool),
    /// The components of a vector, a matrix, an array or a struct.
    Many(Rc<Vec<Value>>),
    Pointer(Place),
}

/// What a pointer points to: a variable, and which part of it.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub root: Root,
    pub path: Vec<usize>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Root {
    /// A variable of a call: which call, and which variable.
    Local(usize, usize),
    Global(usize),
}

impl Value {
    pub fn many(values: Vec<Value>) -> Self {
        Value::Many(Rc::new(values))
    }

    pub fn components(&self) -> &[Value] {
        match self {
            Value::Many(values) => values,
            _ => std::slice::from_ref(self),
        }
    }

    pub fn float(&self) -> Number {
        match *self {
            Value::Float(x) => x,
            _ => Number::new(0.0),
        }
    }

    pub fn truth(&self) -> bool {
        matches!(self, Value::Bool(true))
    }

    /// As an index: numbers below 0 are large, as in the text for kernels.
    pub fn index(&self) -> usize {
        match *self {
            Value::Int(n) => n as u32 as usize,
            Value::Uint(n) => n as usize,
            _ => 0,
        }
    }

    pub fn part(&self, index: usize) -> Value {
        let all = self.components();
        all[index.min(all.len() - 1)].clone()
    }

    pub fn part_mut(&mut self, path: &[usize]) -> &mut Value {
        match (path, self) {
            ([first, rest @ ..], Value::Many(values)) => {
                let values = Rc::make_mut(values);
                let last = values.len() - 1;
                values[(*first).min(last)].part_mut(rest)
            }
            (_, value) => value,
        }
    }
}
