//! From `[memory]` to what a pager may use, and whether a run can work within it. Pure but for what
//! the system has free.

use crate::TrainError;
use crate::bytes;
use crate::estimate::Estimate;
use crate::optimizer::AdamW;
use crate::recipe::{MemoryRecipe, Recipe};
use device::{DType, Device};
use dist::Axis;
use memory::disk::{self, DriveFigures, Effort, Options};
use memory::pager::{self, Filed, Setup, chunk_elements, free_for_chunks, key_of};
use memory::plan::{Budgets, LinkRate, Rates};
use memory::{Stripes, Tier};
use std::path::Path;
use std::time::Duration;
use tensor::ParamList;

/// Activations are predicted a little low for some models: until a step has been seen this much
/// more is kept free for them.
const MARGIN: f64 = 1.25;

/// Of the drive.
const PAGE_BYTES: usize = 4096;

/// Part of what the system has free that `memory.dram = "auto"` takes.
const AUTO_PART: f64 = 0.9;

/// What a run may use, before it is known whether it needs all of it.
pub(crate) fn budgets(recipe: &Recipe) -> Budgets {
    let available = device::available_bytes().map_or(i64::MAX as u64, |free| free as u64);
    let Some(memory) = &recipe.memory else {
        return Budgets { dram: Some(available), ..Budgets::default() };
    };
    let automatic = (available as f64 * AUTO_PART) as u64;
    let dram = memory.dram_bytes.unwrap_or(automatic.saturating_sub(memory.device_bytes.unwrap_or(0)));
    let nvme = memory.nvme_bytes.unwrap_or(i64::MAX as u64);
    Budgets { hbm: hbm(recipe, memory), dram: Some(dram), nvme: Some(nvme) }
}

/// Memory of the GPU, or of what plays one.
fn hbm(recipe: &Recipe, memory: &MemoryRecipe) -> Option<u64> {
    match recipe.train.device {
        Device::Cpu => memory.device_bytes,
        Device::Cuda => memory.hbm_bytes.or_else(|| Some((card_free_bytes()? as f64 * AUTO_PART) as u64)),
    }
}

/// What the GPU has free beside what this process holds for its ops.
pub(crate) fn card_free_bytes() -> Option<u64> {
    Some(device::cuda::gpu().ok()?.driver().free_bytes() as u64)
}

/// What the state may spread over; none when the recipe asks for no tiers, or memory holds it all.
/// `of_rank` parameters are those of each rank's model; ranks share the budgets, and those of `fsdp` the state.
pub(crate) fn setup(recipe: &Recipe, estimate: &Estimate, of_rank: usize) -> Option<Setup> {
    let memory = recipe.memory.as_ref()?;
    let auto = || device::available_bytes().map_or(u64::MAX, |free| (free as f64 * AUTO_PART) as u64);
    let (device, device_bytes) = (recipe.train.device, hbm(recipe, memory));
    let beside = memory.device_bytes.unwrap_or(0);
    let dram_bytes = memory.dram_bytes.unwrap_or_else(|| auto().saturating_sub(beside));
    let others = |bytes: u64| (bytes as f64 * MARGIN) as u64 + estimate.exponent_bytes;
    let other_bytes = others(estimate.activation_bytes);
    let ranks = recipe.mesh.shape.world_size();
    let held = (of_rank * ranks).div_ceil(recipe.mesh.shape.size(Axis::Fsdp));
    let state_bytes = (held * AdamW::bytes_per_param(recipe.train.dtype, recipe.train.adamw.moments)) as u64;
    let fits = |budget: u64, beside: u64| state_bytes + beside <= free_for_chunks(budget, 0);
    // What plays a device shows how it would go, however small the model.
    let fastest = match device {
        Device::Cpu => Some(dram_bytes).filter(|_| device_bytes.is_none()),
        Device::Cuda => device_bytes,
    };
    if fastest.is_some_and(|budget| fits(budget, other_bytes)) && memory.policy.is_free_to_keep_all() {
        return None;
    }
    let state_bytes = state_bytes + (held * rounded_bytes(recipe)) as u64;
    // From here on chunks come and go, and what layers keep for the way back is chunks, too.
    let chunk_elements = match ranks {
        1 => chunk_elements(held, device_bytes.unwrap_or(dram_bytes)),
        // The granules in which ranks add gradients up.
        _ => Stripes::new(of_rank, 1, 0).granule,
    };
    // A chunk of 8-bit moments is whole pages, too.
    let narrowest = recipe.train.adamw.moments.dtype().size_bytes().min(recipe.train.dtype.size_bytes());
    let page_bytes = match device {
        Device::Cpu => PAGE_BYTES,
        Device::Cuda => device::cuda::gpu().map_or(PAGE_BYTES, |gpu| gpu.driver().granularity()),
    };
    let chunk_elements = chunk_elements.max(page_bytes / narrowest);
    let filed = filed(recipe, estimate, chunk_elements);
    let other_bytes = match filed {
        Some(_) => others(estimate.activation_bytes - estimate.filed_bytes),
        None => other_bytes,
    };
    let filed_bytes = filed.as_ref().map_or(0, filed_bytes) * ranks as u64;
    let fits = |budget: u64, beside: u64| state_bytes + filed_bytes + beside <= free_for_chunks(budget, 0);
    // Behind a device, a host that holds everything needs no drive.
    // Arrays are a little larger than the parameters: each begins at a cache line, each ends a page.
    let padding = state_bytes / 32 + (64 << 10);
    let needs_drive = device_bytes.is_none() || !fits(dram_bytes, padding);
    let nvme_bytes = needs_drive.then(|| memory.nvme_bytes.unwrap_or(u64::MAX));
    Some(Setup {
        budgets: Budgets { hbm: device_bytes, dram: Some(dram_bytes), nvme: nvme_bytes },
        ranks: ranks as u64,
        device,
        dir: memory.dir.clone(),
        drive: None,
        policy: memory.policy,
        other_bytes,
        chunk_elements,
        filed,
    })
}

/// What the links of this machine carry, measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Links {
    /// For predictions and plans.
    pub rates: Rates,
    /// Where there is a drive.
    pub drive: Option<DriveFigures>,
}

/// How long a drive is measured before a run.
const PATIENCE: Duration = Duration::from_secs(1);

impl Links {
    /// Of the tiers in `setup`: at most about a second, and nothing is left behind. Where it cannot be
    /// measured (the run itself will say why) nominal figures stand in.
    pub(crate) fn measure(setup: &Setup, state_bytes: u64) -> Links {
        let nominal = crate::rerun::NOMINAL_RATES;
        // The folder itself is made by the run.
        let there = setup.dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("."));
        let most = Effort::default().scratch_bytes;
        let effort = Effort { time: PATIENCE, scratch_bytes: (state_bytes / 8).clamp(1 << 20, most) };
        let measured = |_| disk::measure(there, effort, &Options::default()).ok();
        let drive = setup.budgets.nvme.and_then(measured);
        let host = match (setup.device, setup.budgets.hbm) {
            (Device::Cuda, _) => {
                let (up_per_s, down_per_s) = device::cuda::copied_per_s(setup.budgets.nvme.is_none());
                LinkRate { up_per_s, down_per_s }
            }
            (Device::Cpu, Some(_)) => {
                let per_s = pager::copied_per_s();
                LinkRate { up_per_s: per_s, down_per_s: per_s }
            }
            (Device::Cpu, None) => nominal.host,
        };
        let nvme = drive.as_ref().map_or(nominal.nvme, DriveFigures::rate);
        // The memory it took is no part of the run's budget.
        device::release_cached();
        device::reset_peak();
        Links { rates: Rates { host, nvme }, drive }
    }
}

/// Bytes of a parameter's rounded gradient, which has an array of its own over tiers.
fn rounded_bytes(recipe: &Recipe) -> usize {
    if recipe.train.adamw.gradients == DType::Bf16 { 2 } else { 0 }
}

/// Room for the inputs of layers that run again and for all that the others keep, of one rank; each begins
/// a chunk. A microbatch is walked back before the next begins. Replicas keep what one rank keeps, of their
/// rows; ranks with pieces of layers keep theirs in memory.
fn filed(recipe: &Recipe, estimate: &Estimate, chunk_elements: usize) -> Option<Filed> {
    let (dtype, shape) = (recipe.train.dtype, &recipe.mesh.shape);
    let replicas = shape.size(Axis::Dp) * shape.size(Axis::Fsdp);
    let own = |bytes: u64| (bytes as usize / dtype.size_bytes()).div_ceil(replicas);
    let whole = |bytes: u64| own(bytes).next_multiple_of(chunk_elements);
    let elements = estimate.rerun_layers * whole(estimate.input_bytes)
        + estimate.filed_layers * whole(estimate.kept_bytes);
    (shape.world_size() == replicas && elements > 0).then_some(Filed { elements, dtype })
}

fn filed_bytes(filed: &Filed) -> u64 {
    (filed.elements * filed.dtype.size_bytes()) as u64
}

/// The same for one of so many processes: it takes its part and knows of no other.
pub(crate) fn apart(setup: Setup, processes: u64) -> Setup {
    let budgets = part(setup.budgets, processes);
    let other_bytes = setup.other_bytes / processes;
    Setup { budgets, other_bytes, ranks: setup.ranks / processes, ..setup }
}

/// What each of several has.
pub(crate) fn part(budgets: Budgets, parts: u64) -> Budgets {
    let part = |bytes: Option<u64>| bytes.map(|bytes| bytes / parts);
    Budgets { hbm: part(budgets.hbm), dram: part(budgets.dram), nvme: part(budgets.nvme) }
}

/// Refuse budgets no plan can work within. `params` are those of one rank.
pub(crate) fn check(
    recipe: &Recipe,
    params: &ParamList,
    estimate: &Estimate,
    setup: &Setup,
) -> Result<(), TrainError> {
    let available = device::available_bytes().map_or(u64::MAX, |free| free as u64);
    let (device_bytes, dram_bytes) = (setup.budgets.hbm.unwrap_or(0), setup.budgets.dram.unwrap_or(0));
    let device_bytes = match setup.device {
        Device::Cpu => device_bytes,
        // It has a memory of its own.
        Device::Cuda => {
            let free = card_free_bytes().unwrap_or(0);
            if device_bytes > free {
                return Err(TrainError::Budget {
                    what: format!(
                        "memory.hbm = {}, {} are free on the GPU",
                        bytes(device_bytes),
                        bytes(free)
                    ),
                    remedy: "lower memory.hbm, or set it to \"auto\"".into(),
                });
            }
            0
        }
    };
    if dram_bytes.saturating_add(device_bytes) > available {
        let device = match setup.budgets.hbm.filter(|_| setup.device == Device::Cpu) {
            Some(device) => format!(" beside memory.simulate_device = {}", bytes(device)),
            None => String::new(),
        };
        return Err(TrainError::Budget {
            what: format!("memory.dram = {}{device}, {} are available", bytes(dram_bytes), bytes(available)),
            remedy: "lower memory.dram, or set it to \"auto\"".into(),
        });
    }
    let chunk_bytes = chunk_bytes(recipe, estimate, setup);
    if let Some(nvme_bytes) = setup.budgets.nvme.filter(|nvme| *nvme < chunk_bytes) {
        return Err(TrainError::Budget {
            what: format!("memory.nvme = {}, the state takes {}", bytes(nvme_bytes), bytes(chunk_bytes)),
            remedy: "raise memory.nvme to that".into(),
        });
    }
    for (tier, least) in least_budgets(recipe, params, setup) {
        let (key, budget) = (key_of(tier, setup.device), setup.budgets.of(tier).unwrap_or(0));
        if least <= budget {
            continue;
        }
        let others = match setup.budgets.tiers()[0] == tier {
            true => format!("activations take about {}, and ", bytes(setup.other_bytes)),
            false => String::new(),
        };
        return Err(TrainError::Budget {
            what: format!(
                "{key} = {} is too little: {others}the widest op needs its weights and gradients at once",
                bytes(budget)
            ),
            remedy: format!(
                "raise {key} to {}, or lower train.batch or train.context, or set train.recompute = \"always\"",
                bytes(least)
            ),
        });
    }
    Ok(())
}

/// What the chunks of all ranks take on the drive.
fn chunk_bytes(recipe: &Recipe, estimate: &Estimate, setup: &Setup) -> u64 {
    let filed = setup.filed.as_ref().map_or(0, filed_bytes) * setup.ranks;
    let per_param = AdamW::bytes_per_param(recipe.train.dtype, recipe.train.adamw.moments) as u64;
    let rounded = estimate.state_bytes / per_param * rounded_bytes(recipe) as u64;
    // Every rank's shard is whole chunks.
    let shards = if recipe.mesh.shape.size(Axis::Fsdp) > 1 { setup.ranks } else { 0 };
    let padding = shards * setup.chunk_elements as u64 * (per_param + rounded_bytes(recipe) as u64);
    estimate.state_bytes + padding + rounded + filed
}

/// By tier of memory: bytes below which some moment cannot run. Where ops compute: activations beside
/// the widest parameter with its gradient; where updates run: one chunk of everything. What comes up
/// to a device passes through the host, beside a chunk that makes room.
fn least_budgets(recipe: &Recipe, params: &ParamList, setup: &Setup) -> Vec<(Tier, u64)> {
    let chunk = setup.chunk_elements;
    let widest = params.specs().iter().map(|spec| spec.len()).max().unwrap_or(0);
    // What other ranks have of it comes beside the chunks.
    let widest = widest.div_ceil(recipe.mesh.shape.size(Axis::Fsdp));
    // Where a parameter begins and ends within chunks.
    let whole = ((widest + 2 * chunk) * (recipe.train.dtype.size_bytes() + 4)) as u64;
    let update = (chunk * AdamW::bytes_per_param(recipe.train.dtype, recipe.train.adamw.moments)) as u64;
    // What `free_for_chunks` takes off.
    let budget = |bytes: u64, others: u64| {
        let bytes = bytes * setup.ranks + others;
        bytes + bytes / 32
    };
    let (host, others) = (whole.max(update), setup.other_bytes);
    match setup.budgets.hbm {
        None => vec![(Tier::Dram, budget(host, others))],
        Some(_) => vec![(Tier::Hbm, budget(whole, others)), (Tier::Dram, budget(host + update, 0))],
    }
}
