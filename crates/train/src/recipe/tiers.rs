//! What goes together with tiers, and where ops compute.

use super::RecipeError;
use super::values::{Get, impossible, need};
use device::Device;
use dist::{Axis, MeshShape};

/// What runs of several ranks over tiers cannot do.
pub(super) fn of_ranks(get: &Get<'_>, shape: &MeshShape) -> Result<(), RecipeError> {
    let (fsdp, zero) = (shape.size(Axis::Fsdp), need(get.int("mesh.zero"), "mesh.zero")?);
    if fsdp > 1 && zero < 3 {
        return impossible(
            format!("mesh.zero = {zero} with memory.dram for mesh.fsdp = {fsdp}"),
            "in tiers a rank keeps its own shard of everything; set mesh.zero = 3, or drop memory.dram",
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

/// The device of `train.device` on this machine. What plays a GPU computes on the CPU, and so do several ranks
/// whose state is in tiers.
pub(super) fn device(get: &Get<'_>) -> Result<Device, RecipeError> {
    let axes = ["mesh.pp", "mesh.dp", "mesh.fsdp", "mesh.cp", "mesh.ep", "mesh.x", "mesh.y", "mesh.z"];
    let ranks: u64 = axes.into_iter().filter_map(|axis| get.int(axis)).product();
    let plays = get.text("memory.simulate_device").is_some();
    let in_tiers = ranks > 1 && get.text("memory.dram").is_some();
    match get.text("train.device").as_deref() {
        Some("cuda") if in_tiers => impossible(
            format!("train.device = \"cuda\" with memory.dram for a mesh of {ranks} ranks"),
            "behind a GPU one rank alone has tiers; drop [memory] and share the state (mesh.fsdp, mesh.zero = 3), set train.device = \"cpu\", or drop [mesh]",
        ),
        Some("cuda") if get.text("mesh.axes").is_some_and(|axes| axes == "auto") => impossible(
            "train.device = \"cuda\" with mesh = \"auto\"".into(),
            "the speeds it measures are those of cores; give the mesh, or set train.device = \"cpu\"",
        ),
        Some("cuda") if plays => impossible(
            "memory.simulate_device is given for a real GPU".into(),
            "say with memory.hbm how much of its memory the run may take",
        ),
        Some("cuda") => match device::cuda::find() {
            Ok(()) => Ok(Device::Cuda),
            Err(none) => impossible(format!("train.device = \"cuda\", but {}", none.what), &none.remedy),
        },
        Some("auto") if !in_tiers && !plays && device::cuda::find().is_ok() => Ok(Device::Cuda),
        _ => Ok(Device::Cpu),
    }
}
