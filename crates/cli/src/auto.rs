//! `mesh = "auto"`: speeds of this machine, all plans for its ranks, the cheapest that training accepts.

use crate::{plan, show};
use ::train::{Recipe, Settings, measure_here};
use anyhow::{Result, bail};
use device::Device;
use dist::cost::{Batch, Cluster, Price, every};
use dist::{Axis, Communicator, Mesh};
use model::{Config, Model};
use serde_json::json;
use std::time::Instant;

/// Most ranks on one machine.
const MOST_RANKS: usize = 256;
/// Runner-ups that are shown.
const SHOWN: usize = 4;

/// Plans for the ranks of this machine that training can follow, cheapest first: of each mesh, scheme
/// and way to share the state the best.
pub struct Ranking {
    pub plans: Vec<Followed>,
    ranks: usize,
    cluster: Cluster,
    measured_s: f64,
}

/// A plan and the recipe that follows it.
pub struct Followed {
    pub price: Price,
    pub sets: Vec<String>,
}

impl Ranking {
    /// For `ranks` ranks on this machine, as threads.
    pub fn new(settings: &Settings, recipe: &Recipe, ranks: usize) -> Result<Ranking> {
        if !(1..=MOST_RANKS).contains(&ranks) {
            bail!("--ranks {ranks}: ranks on one machine are 1 to {MOST_RANKS}");
        }
        let config = plan::config(recipe)?;
        plan::refuse(&config, recipe)?;
        let started = Instant::now();
        let cluster = measure_here(&config, recipe, ranks)?;
        let measured_s = started.elapsed().as_secs_f64();
        // The speeds are those of cores: on a machine with a GPU ranks that follow them compute there, too.
        let on_cores =
            (recipe.train.device == Device::Cuda && ranks > 1).then(|| "train.device=cpu".to_string());
        let mut settings = settings.clone();
        on_cores.iter().try_for_each(|set| settings.set(set))?;
        let mut plans = plans(&settings, recipe, &config, &cluster, ranks)?;
        plans.iter_mut().for_each(|plan| plan.sets.extend(on_cores.clone()));
        Ok(Ranking { plans, ranks, cluster, measured_s })
    }

    pub fn best(&self) -> &Followed {
        &self.plans[0]
    }

    /// A few lines: the speeds, the choice, who came after it and why.
    pub fn summary(&self) -> String {
        let Cluster { flops_per_s, intra, pace, .. } = &self.cluster;
        let link = match self.ranks {
            1 => String::new(),
            _ => format!(
                ", {:.1} us a call and {:.1} GB/s between ranks",
                intra.call_s * 1e6,
                intra.bytes_per_s / 1e9
            ),
        };
        let speeds = format!(
            "{:.0} GFLOP/s in products, {:.0} in attention{link}: each of {}, all busy, measured in {:.1} s",
            flops_per_s / 1e9,
            pace.attention_flops_per_s / 1e9,
            ranks(self.ranks),
            self.measured_s
        );
        let best = &self.best().price;
        let rows = self.plans.iter().take(1 + SHOWN).map(|followed| {
            let price = &followed.price;
            let rows = price.plan.microbatch_rows * price.plan.mesh.replicas();
            let recompute = if price.plan.recompute { ", recompute" } else { "" };
            vec![
                name(price),
                format!("{} x {rows} rows{recompute}", price.microbatches),
                show::short(price.step()),
                why(price, best),
            ]
        });
        let header = ["mesh, best first", "microbatches", "step, predicted", "why not"];
        let table = show::table(&header, rows.collect(), &[2]);
        format!("{}{table}\n", show::facts(&[("mesh = auto", speeds)]))
    }

    /// One JSON line a plan, for programs.
    pub fn lines(&self) -> String {
        let line = |followed: &Followed| {
            let price = &followed.price;
            let parts: serde_json::Map<_, _> =
                price.seconds.parts().into_iter().map(|(name, s)| (name.to_string(), json!(s))).collect();
            let line = json!({
                "mesh": name(price), "ranks": self.ranks, "sets": followed.sets, "step_s": price.step(),
                "parts_s": parts, "device_bytes": price.memory.device(),
            });
            format!("{line}\n")
        };
        self.plans.iter().map(line).collect()
    }
}

/// A mesh with what is spread over it.
fn name(price: &Price) -> String {
    let plan = &price.plan;
    let mut name = plan.mesh.to_string();
    if plan.mesh.grid().size() > 1 {
        name += &format!(", {}", plan.parts.named(plan.scheme));
    }
    if plan.mesh.size(Axis::Fsdp) > 1 {
        name += &format!(", {}", plan.zero);
    }
    if plan.mesh.size(Axis::Pp) > 1 {
        name += &format!(", {}", plan.schedule);
    }
    name
}

/// The part that costs a plan most against the best.
fn why(price: &Price, best: &Price) -> String {
    let more = 100.0 * (price.step() / best.step() - 1.0);
    match price.seconds.most_over(&best.seconds) {
        _ if price == best => "the choice".into(),
        (name, seconds) if seconds > 0.0 => {
            format!("{more:+.0} %: {name} {:+.0} %", 100.0 * seconds / best.step())
        }
        _ => format!("{more:+.0} %"),
    }
}

pub fn ranks(count: usize) -> String {
    if count == 1 { "one rank".into() } else { format!("{count} ranks") }
}

fn plans(
    settings: &Settings,
    recipe: &Recipe,
    config: &Config,
    cluster: &Cluster,
    ranks: usize,
) -> Result<Vec<Followed>> {
    let batch = Batch { rows: recipe.train.batch * recipe.train.accumulate, context: recipe.train.context };
    let mut plans: Vec<Followed> = Vec::new();
    let mut first_refusal = None;
    for price in every(&config.shape(), batch, cluster, ranks) {
        let kind = |p: &Price| (p.plan.mesh, p.plan.scheme, p.plan.parts, p.plan.zero);
        if plans.iter().any(|found| kind(&found.price) == kind(&price)) {
            continue;
        }
        match accepted(settings, config, &price) {
            Ok(()) => plans.push(Followed { sets: settings.keys_of(&price), price }),
            Err(error) => {
                first_refusal.get_or_insert(error);
            }
        }
    }
    if plans.is_empty() {
        let (rows, shape) = (batch.rows, config.shape());
        let why = match first_refusal {
            Some(error) => format!("the cheapest is refused: {error:#}"),
            None => format!(
                "none cuts {} layers, {} heads and {rows} rows a step into whole pieces within the memory there is",
                shape.layers, shape.heads
            ),
        };
        bail!(
            "mesh = \"auto\" finds no plan for {ranks} ranks: {why}; choose another number of ranks or of rows"
        );
    }
    Ok(plans)
}

/// Whether training follows a plan: the rules of recipes hold, and the model can be laid out on its mesh.
fn accepted(settings: &Settings, config: &Config, price: &Price) -> Result<()> {
    let (_, recipe) = settings.following(price)?;
    let shape = recipe.mesh.shape;
    let mesh = Mesh::new(shape, Communicator::null(0, shape.world_size()))?;
    Model::build_on(config, recipe.train.context, &recipe.mesh.flow(&mesh)?)?;
    Ok(())
}
