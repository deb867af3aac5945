//! How a problem is computed, forward and backward.

use super::candidate::Recipe;
use super::{backward, forward};
use crate::error::Error;
use crate::facts::Facts;
use crate::kernel::check_limits;
use crate::options::PlanOptions;
use crate::problem::Problem;

/// How a problem is computed, forward and, if it has gradients, backward.
pub(crate) struct Recipes {
    pub forward: Recipe,
    pub backward: Option<Recipe>,
}

/// How a problem is computed on a device that allows this.
pub(crate) fn recipes(problem: &Problem, facts: &Facts, options: &PlanOptions) -> Result<Recipes, Error> {
    problem.validate()?;
    let forward = forward::recipe(problem, facts, options)?;
    let backward = match problem.gradients {
        Some(_) => Some(backward::recipe(problem, facts, options, forward.kernel)?),
        None => None,
    };
    for recipe in backward.iter().chain([&forward]) {
        check_limits(recipe.kernel, &recipe.passes, &facts.limits)?;
    }
    Ok(Recipes { forward, backward })
}
