//! What goes together with tiers.

use super::RecipeError;
use super::values::{Get, impossible, need};
use dist::{Axis, MeshShape};

/// What runs of several ranks over tiers cannot do.
pub(super) fn of_ranks(get: &Get<'_>, shape: &MeshShape) -> Result<(), RecipeError> {
    let fsdp = shape.size(Axis::Fsdp);
    if fsdp > 1 {
        return impossible(
            format!("memory.dram is given for mesh.fsdp = {fsdp}"),
            "ranks that share the state have no tiers of their own; set mesh.fsdp = 1 (and mesh.dp instead), or drop memory.dram",
        );
    }
    let every = need(get.int("sample.every"), "sample.every")?;
    if shape.world_size() > 1 && every > 0 {
        return impossible(
            format!("sample.every = {every} with memory.dram for mesh `{shape}`"),
            "a sample needs the whole model on one rank, beyond the budget; set sample.every = 0 and talk to the model that the run leaves (trilith chat)",
        );
    }
    Ok(())
}
