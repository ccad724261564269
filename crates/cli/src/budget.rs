//! `trilith budget`: other budgets for a run that goes on.

use crate::plan_memory::parse_bytes;
use crate::show;
use ::train::{BudgetFile, Settings};
use anyhow::{Context, Result, anyhow, bail};
use device::Device;
use memory::Tier;
use memory::pager::key_of;
use memory::plan::Budgets;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trilith budget runs/large                 what goes before the recipe now\n  trilith budget runs/large --dram 4GiB     give memory back while it trains\n  trilith budget runs/large --recipe        back to the budgets of its recipe\n\nThe run takes it up before its next step and says so, or says why not and goes on as before. No bit\nof the result changes. A run that is resumed keeps to it."
)]
pub struct Args {
    /// The folder of a run with tiers ([memory] in its recipe)
    run: PathBuf,
    /// Memory, as 4GiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    dram: Option<u64>,
    /// Memory that plays the device
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    device: Option<u64>,
    /// Space on the drive
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    nvme: Option<u64>,
    /// Give all budgets back to the recipe
    #[arg(long, conflicts_with_all = ["dram", "device", "nvme"])]
    recipe: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let Args { run, dram, device, nvme, recipe } = args;
    let dir = run.display();
    let resolved = run.join("recipe.toml");
    if !resolved.exists() {
        bail!("{dir} holds no run (it has no recipe.toml); name the run.dir of a run that has begun");
    }
    let began = Settings::read(&resolved)?.recipe().with_context(|| format!("{}", resolved.display()))?;
    let tiers = began
        .memory
        .ok_or_else(|| anyhow!("the run in {dir} has no tiers; set memory.dram when a run begins"))?;
    if device.is_some() && tiers.device_bytes.is_none() && began.train.device == Device::Cpu {
        bail!("the run in {dir} has no device; set memory.simulate_device when a run begins");
    }
    let stands = if recipe { BudgetFile::default() } else { BudgetFile::read(&run)? };
    let wanted = BudgetFile {
        device_bytes: device.or(stands.device_bytes),
        dram_bytes: dram.or(stands.dram_bytes),
        nvme_bytes: nvme.or(stands.nvme_bytes),
    };
    let budgets = Budgets { hbm: wanted.device_bytes, dram: wanted.dram_bytes, nvme: wanted.nvme_bytes };
    let budgets = named(&budgets, began.train.device);
    if !recipe && dram.or(device).or(nvme).is_none() {
        println!("{dir}: {budgets}");
        return Ok(ExitCode::SUCCESS);
    }
    wanted.write(&run)?;
    println!("{dir}: {budgets}, from the run's next step on");
    Ok(ExitCode::SUCCESS)
}

/// The budgets there are, by their keys.
pub fn named(budgets: &Budgets, device: Device) -> String {
    let all = [Tier::Hbm, Tier::Dram, Tier::Nvme];
    let given = all.into_iter().filter_map(|tier| Some((key_of(tier, device), budgets.of(tier)?)));
    let given: Vec<String> = given
        .map(|(key, bytes)| match bytes {
            u64::MAX => format!("{key} without limit"),
            _ => format!("{key} = {}", show::bytes(bytes)),
        })
        .collect();
    if given.is_empty() { "the budgets of the recipe".into() } else { given.join(", ") }
}
