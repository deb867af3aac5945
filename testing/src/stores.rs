//! What a module may not do to memory that its threads share.

use naga::valid::{FunctionInfo, ModuleInfo};
use naga::{AddressSpace, Block, Expression, Function, Handle, Module, Statement, TypeInner};

/// Does a module store to one component of a vector in workgroup memory or in a buffer? WGSL lets that touch the others, which
/// other threads may be writing, and on Metal it does.
pub fn stores_components(module: &Module, info: &ModuleInfo) -> bool {
    let entry = in_function(module, &module.entry_points[0].function, info.get_entry_point(0));
    entry || module.functions.iter().any(|(handle, function)| in_function(module, function, &info[handle]))
}

fn in_function(module: &Module, function: &Function, info: &FunctionInfo) -> bool {
    in_block(&function.body, &|pointer| match info[pointer].ty.inner_with(&module.types) {
        TypeInner::ValuePointer { size: None, space, .. } => {
            matches!(space, AddressSpace::WorkGroup | AddressSpace::Storage { .. })
        }
        _ => false,
    })
}

fn in_block(block: &Block, is_component: &impl Fn(Handle<Expression>) -> bool) -> bool {
    block.iter().any(|statement| match statement {
        Statement::Store { pointer, .. } => is_component(*pointer),
        Statement::Block(block) => in_block(block, is_component),
        Statement::If { accept, reject, .. } => in_block(accept, is_component) || in_block(reject, is_component),
        Statement::Loop { body, continuing, .. } => in_block(body, is_component) || in_block(continuing, is_component),
        Statement::Switch { cases, .. } => cases.iter().any(|case| in_block(&case.body, is_component)),
        _ => false,
    })
}
