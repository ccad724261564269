//! What `mesh.cp` asks of a recipe.

use super::RecipeError;
use dist::{Axis, MeshShape};

/// Refuses rows of `context` tokens that are too short to be cut among the context ranks.
pub(super) fn check(shape: &MeshShape, context: usize) -> Result<(), RecipeError> {
    let ranks = shape.size(Axis::Cp);
    // A rank takes an early and a late run of each row.
    let runs = 2 * ranks;
    if ranks == 1 || runs <= context {
        return Ok(());
    }
    Err(RecipeError::Impossible {
        what: format!("mesh.cp = {ranks} cuts rows of train.context = {context} tokens into {runs} runs"),
        remedy: "lower mesh.cp, or train longer rows".to_string(),
    })
}
