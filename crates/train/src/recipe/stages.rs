//! What `mesh.pp` asks of a recipe.

use super::RecipeError;
use super::values::{Get, TrainRecipe, impossible};
use dist::pipeline::{Pipeline, Schedule};
use dist::{Axis, MeshShape};

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
