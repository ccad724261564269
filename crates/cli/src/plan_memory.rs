//! The memory half of `trilith plan`: where the bytes of one rank's training step would lie on a
//! machine, what moves between its tiers, what limits the step; or why it cannot run.

use crate::show;
use ::train::recipe::keys;
use ::train::{Recipe, Rerun, Speeds, outlook};
use anyhow::{Result, anyhow};
use memory::Class;
use memory::plan::{
    Budgets, LinkRate, Rates, Transformer, class_table, limit, link_table, picture, plan, replay,
};
use std::fmt::Write;

/// One rank's machine. What is not given is taken from this one, or is usual.
#[derive(clap::Args)]
#[command(next_help_heading = "The machine of one rank")]
pub struct Machine {
    /// Memory of the GPU, as 80GB; absent: layers run on the processor
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    hbm: Option<u64>,
    /// Memory of the host [default: memory.dram of the recipe, or what is available here]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    dram: Option<u64>,
    /// Space on the drive [default: memory.nvme of the recipe in bytes; else there is none]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    nvme: Option<u64>,
    /// Between GPU and host, each way and second
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "50GB")]
    link: u64,
    /// What the drive reads a second
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "6GB")]
    nvme_read: u64,
    /// What the drive writes a second
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "3GB")]
    nvme_write: u64,
    /// Peak of what runs the layers, in TFLOP/s [default: measured here]
    #[arg(long)]
    tflops: Option<f64>,
    /// What the GPU's memory reads and writes a second
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "3TB")]
    hbm_rate: u64,
    /// What the host's memory reads and writes a second
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "100GB")]
    dram_rate: u64,
}

/// Print what a recipe needs, and where that lies on a machine. Errors: what does not fit, with what
/// would make it fit.
pub fn print(recipe: &Recipe, given: &Machine) -> Result<()> {
    let machine = &given.with_budgets_of(recipe);
    let (config, speeds) = (crate::plan::config(recipe)?, machine.speeds(recipe)?);
    let budgets = machine.budgets()?;
    let mut recipe = recipe.clone();
    if recipe.train.recompute_auto {
        let rerun = Rerun::choose(&config, &recipe, &speeds, (&budgets, &machine.rates()))?;
        println!("recompute: {rerun}");
        recipe.train.recompute = rerun.recompute();
    }
    let recipe = &recipe;
    let model = outlook(&config, recipe, &speeds)?;
    print!("{}", needs(&model, recipe, machine, &budgets));
    print!("{}", placed(&model, &budgets, &machine.rates())?);
    Ok(())
}

fn placed(model: &Transformer, budgets: &Budgets, rates: &Rates) -> Result<String> {
    let trace = model.trace();
    let plan = plan(&trace, budgets, rates)?;
    let replayed = replay(&trace, budgets, rates, &plan)?;
    let mut text = format!("\n{}", class_table(&trace, &plan));
    write!(text, "\n{}", picture(&trace, budgets, &plan, &replayed))?;
    write!(text, "\n{}{}\n", link_table(&plan), limit(&plan, rates))?;
    Ok(text)
}

fn needs(model: &Transformer, recipe: &Recipe, machine: &Machine, budgets: &Budgets) -> String {
    let params = model.params();
    let parts: Vec<String> = Class::STATE
        .into_iter()
        .filter(|class| model.state.of(*class) > 0)
        .map(|class| format!("{} {class}", model.state.of(class)))
        .collect();
    let state = params * model.state.per_param();
    let kept = u64::from(model.layers) * (model.kept_bytes + model.input_bytes);
    let tokens = recipe.train.batch * recipe.train.context * model.accumulate as usize;
    let microbatches = match (model.accumulate as usize, recipe.train.accumulate) {
        (planned, all) if planned < all => {
            format!(", in {planned} microbatches that stand for the recipe's {all}")
        }
        _ => String::new(),
    };
    let tiers: Vec<String> = budgets
        .tiers()
        .into_iter()
        .map(|tier| format!("{tier} {}", show::bytes(budgets.of(tier).unwrap_or(0))))
        .collect();
    let whose = if machine.is_given() { "as given" } else { "this one, no drive" };
    show::facts(&[
        ("parameters", show::count(params as f64)),
        (
            "state",
            format!(
                "{} = {} B a parameter ({})",
                gigabytes(state),
                model.state.per_param(),
                parts.join(" + ")
            ),
        ),
        ("activations", format!("{} for {} rows at a time", gigabytes(kept), recipe.train.batch)),
        ("together", gigabytes(state + kept)),
        ("tokens a step", format!("{tokens}{microbatches}")),
        ("machine", format!("{whose}: {}", tiers.join(", "))),
    ])
}

/// Decimal, as drives and papers count.
fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

impl Machine {
    /// Whether memory was asked about at all.
    pub fn is_given(&self) -> bool {
        self.hbm.or(self.dram).or(self.nvme).is_some()
    }

    /// With the budgets of `[memory]` where no flag says otherwise.
    fn with_budgets_of(&self, recipe: &Recipe) -> Machine {
        let (dram, nvme) =
            recipe.memory.as_ref().map_or((None, None), |memory| (memory.dram_bytes, memory.nvme_bytes));
        Machine { dram: self.dram.or(dram), nvme: self.nvme.or(nvme), ..*self }
    }

    fn budgets(&self) -> Result<Budgets> {
        let here = || device::available_bytes().map(|bytes| bytes as u64);
        let dram = self.dram.or_else(here).ok_or_else(|| anyhow!("how much memory is there? Give --dram"))?;
        Ok(Budgets { hbm: self.hbm, dram: Some(dram), nvme: self.nvme })
    }

    fn rates(&self) -> Rates {
        let both = |per_s: u64| LinkRate { up_per_s: per_s as f64, down_per_s: per_s as f64 };
        let nvme = LinkRate { up_per_s: self.nvme_read as f64, down_per_s: self.nvme_write as f64 };
        Rates { host: both(self.link), nvme }
    }

    fn speeds(&self, recipe: &Recipe) -> Result<Speeds> {
        let flops_per_s = match (self.tflops, self.hbm) {
            (Some(tflops), _) if tflops.is_finite() && tflops > 0.0 => tflops * 1e12,
            (Some(tflops), _) => return Err(anyhow!("--tflops {tflops} is no speed; give a number above 0")),
            (None, Some(_)) => return Err(anyhow!("how fast is that GPU? Give --tflops beside --hbm")),
            (None, None) => {
                let pool = device::Threads::new(device::cores())?;
                let gflops = pool.run(|| kernels::peak::gflops(recipe.train.device, recipe.train.dtype));
                gflops * 1e9
            }
        };
        let host = self.dram_rate as f64;
        Ok(match self.hbm {
            Some(_) => Speeds { flops_per_s, fastest_per_s: self.hbm_rate as f64, host_per_s: Some(host) },
            None => Speeds { flops_per_s, fastest_per_s: host, host_per_s: None },
        })
    }
}

/// A number of bytes, or what is wrong with it.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    keys::parse_bytes(text)
        .ok_or_else(|| format!("`{text}` is no number of bytes; write it as 80GB or 512MiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_a_unit() {
        assert_eq!(parse_bytes("80GB"), Ok(80_000_000_000));
        assert_eq!(parse_bytes("1.5MiB"), Ok(3 << 19));
        for bad in ["", "12", "GB", "-1GB", "1..2GB", "1e3MB", "0B", "80 gigs", "9999999TB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
