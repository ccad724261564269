//! What `mesh.pp` asks of a recipe.

use super::RecipeError;
use super::values::{Get, TrainRecipe, impossible};
use crate::shards::Sharding;
use dist::cost::Zero;
use dist::pipeline::{Pipeline, Schedule};
use dist::{Axis, MeshShape};

/// Refuses axes that do not go beside stages.
pub(super) fn check(shape: &MeshShape, sharding: Sharding) -> Result<(), RecipeError> {
    let size = |axis| shape.size(axis);
    if size(Axis::Pp) == 1 {
        return Ok(());
    }
    if size(Axis::Fsdp) > 1 && sharding.zero > Zero::One {
        return impossible(
            format!("mesh.zero above 1 is given with mesh.pp = {}", size(Axis::Pp)),
            "stages have several microbatches under way and keep whole weights and gradients; set mesh.zero = 1",
        );
    }
    Ok(())
}

/// In which order the stages of the mesh work, for the microbatches of a step.
pub(super) fn schedule(
    get: &Get<'_>,
    shape: &MeshShape,
    train: &TrainRecipe,
) -> Result<Schedule, RecipeError> {
    let (name, slices) = (get.text("mesh.schedule").unwrap_or_default(), get.int("mesh.virtual"));
    let schedule = match name.as_str() {
        "gpipe" => Schedule::GPipe,
        "interleaved" => Schedule::Interleaved { chunks: slices.unwrap_or(2) as usize },
        "zero-bubble" => Schedule::ZeroBubble,
        _ => Schedule::OneFOneB,
    };
    if let Some(slices) = slices.filter(|slices| *slices as usize != schedule.chunks()) {
        return impossible(
            format!("mesh.virtual = {slices} is given but mesh.schedule = \"{name}\""),
            "several slices of the model on a stage belong to mesh.schedule = \"interleaved\"",
        );
    }
    match Pipeline::new(shape.size(Axis::Pp), train.accumulate, schedule) {
        Ok(_) => Ok(schedule),
        Err(error) => impossible(error.to_string(), "the microbatches of a step are train.accumulate"),
    }
}
