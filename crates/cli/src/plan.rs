//! `trilith plan`: a run on devices nobody here has, from shapes alone. Everything it prints is
//! predicted.

mod report;

use crate::auto::Ranking;
use crate::plan_memory::{self, Machine};
use anyhow::{Context, Result, bail};
use dist::MeshShape;
use dist::cost::{Batch, Cluster, ModelShape, NoFit, Space, fewer, search};
use model::Config;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use train::recipe::{ModelRecipe, Recipe};
use train::{Settings, bytes};

#[derive(clap::Args)]
#[command(
    after_help = "For many devices (--devices, --mesh, or cluster.devices of the recipe): how the run is spread over\nthem. For one, or with --hbm, --dram or --nvme: where the bytes of one rank lie, tier by tier. Nothing is trained; all seconds are predicted.\n\nExamples:\n  trilith plan recipes/shakespeare.toml\n  trilith plan recipes/gpt3-175b.toml --hbm 80GB --dram 2TB --nvme 4TB --tflops 400\n  trilith plan recipes/gpt3-175b.toml --devices 10000\n  trilith plan recipes/gpt3-175b.toml --devices 1024 --mesh pp=8,fsdp=16,x=8\n  trilith plan recipes/mixtral-8x7b.toml --mesh pp=4,fsdp=2,ep=8\n  trilith plan recipes/shakespeare.toml --devices 8 --set cluster.memory=24\n  trilith plan recipes/shakespeare.toml --here --ranks 2\n\nReads the recipe only: no corpus, no weights, no GPU. What devices and links can do stands in\n[cluster] of the recipe; the defaults are nominal figures of nodes with eight H100. The rows of a\nstep are train.batch x train.accumulate; the planner cuts them into microbatches itself.\n\nReading the answer: in 1D a rank exchanges data with every other rank, in 2D with its row and its\ncolumn. 'Received' counts elements a rank receives for one layer, forward and backward. A part of a\nstep that runs beside another counts only as far as it shows. Formulas: docs/cost-model.md"
)]
pub struct Args {
    /// Recipe: a TOML file
    recipe: PathBuf,
    /// Devices to spread the run over; absent: those of --mesh, or cluster.devices of the recipe
    #[arg(long)]
    devices: Option<usize>,
    /// Devices of a node; absent: cluster.node_devices of the recipe
    #[arg(long)]
    node_devices: Option<usize>,
    /// Plan on this mesh only, as in pp=8,fsdp=16,x=8; axes are pp dp fsdp cp ep x y z
    #[arg(long)]
    mesh: Option<MeshShape>,
    /// Also run one layer of the model dry on a rank of each tensor mesh, and count what it exchanges
    #[arg(long)]
    count: bool,
    /// Plan for ranks that are threads of this machine, by speeds measured now: what mesh = "auto" would
    /// choose
    #[arg(long, conflicts_with_all = ["devices", "mesh", "node_devices", "count"])]
    here: bool,
    /// Ranks of --here; absent: cluster.devices of the recipe
    #[arg(long, value_name = "N", requires = "here")]
    ranks: Option<usize>,
    /// With --here: one JSON line a plan, with the --set options that make a run follow it
    #[arg(long, requires = "here")]
    json: bool,
    /// Leave host memory alone
    #[arg(long)]
    no_offload: bool,
    /// Override a key of the recipe, as in --set train.context=8192; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    machine: Machine,
}

/// As `cluster.devices` allows.
const MOST_DEVICES: usize = 1 << 20;

/// What is planned.
struct Question {
    config: Config,
    model: ModelShape,
    batch: Batch,
    cluster: Cluster,
    /// Rows of the recipe's own microbatch, for the comparison of schemes.
    rows: usize,
    space: Space,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let mut settings = Settings::read(&args.recipe)?;
    for argument in &args.set {
        settings.set(argument)?;
    }
    let recipe = settings.recipe()?;
    if args.here {
        let ranking = Ranking::new(&settings, &recipe, args.ranks.unwrap_or(recipe.cluster.devices))?;
        print!("{}", if args.json { ranking.lines() } else { ranking.summary() });
        if !args.json {
            println!("follow the choice: trilith train RECIPE --set {}", ranking.best().sets.join(" --set "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let spread = args.devices.is_some() || args.mesh.is_some();
    if !spread && (args.machine.is_given() || recipe.cluster.devices == 1) {
        plan_memory::print(&recipe, &args.machine)?;
        return Ok(ExitCode::SUCCESS);
    }
    let question = question(&args, &recipe)?;
    print!("{}", report::headline(&question));
    print!("{}", report::schemes(&question));
    if args.count {
        print!("{}", report::counted(&question)?);
    }
    let Question { model, batch, cluster, space, .. } = &question;
    let found = search(model, *batch, cluster, *space);
    // A number with large prime factors has few meshes: a few devices less may be better.
    let limit = found.as_ref().map_or(f64::INFINITY, |decision| decision.best.step());
    let less = match space.mesh {
        None => fewer(model, *batch, cluster, *space, limit),
        Some(_) => None,
    };
    match found {
        Ok(decision) => {
            print!("{}", report::decision(&question, &decision, less.as_ref()));
            print!("{}", report::follow(&settings, &decision.best));
            Ok(ExitCode::SUCCESS)
        }
        Err(refused) => bail!("{}", no_fit(&question, &refused, less.map(|price| price.plan.mesh))),
    }
}

fn question(args: &Args, recipe: &Recipe) -> Result<Question> {
    let config = config(recipe)?;
    let (train, mut cluster) = (&recipe.train, recipe.cluster.cluster);
    refuse(&config, recipe)?;
    if let Some(devices) = args.node_devices {
        cluster.node_devices = devices;
    }
    if cluster.node_devices == 0 {
        bail!("--node-devices 0: a node has at least one device");
    }
    let devices = match (args.devices, args.mesh) {
        (_, Some(mesh)) if mesh.world_size() > MOST_DEVICES => {
            bail!("--mesh {mesh} has {} ranks; a plan is for 1 to {MOST_DEVICES} devices", mesh.world_size())
        }
        (Some(devices), _) if !(1..=MOST_DEVICES).contains(&devices) => {
            bail!("--devices {devices}: a plan is for 1 to {MOST_DEVICES} devices")
        }
        (Some(devices), Some(mesh)) if mesh.world_size() != devices => {
            bail!(
                "--mesh has {} ranks, --devices is {devices}; make them agree or drop --devices",
                mesh.world_size()
            )
        }
        (None, Some(mesh)) => mesh.world_size(),
        (Some(devices), _) => devices,
        (None, None) => recipe.cluster.devices,
    };
    let batch = Batch { rows: train.batch * train.accumulate, context: train.context };
    let space = Space { devices, mesh: args.mesh, offload: !args.no_offload };
    Ok(Question { model: config.shape(), config, batch, cluster, rows: train.batch, space })
}

/// What no plan is made for.
pub fn refuse(config: &Config, recipe: &Recipe) -> Result<()> {
    if let Some(moe) = config.moe().filter(|moe| !moe.dense_layers.is_empty()) {
        bail!(
            "a plan takes all layers alike, and layers {:?} of this {} have no experts; plan a model whose layers all have some",
            moe.dense_layers,
            config.family()
        );
    }
    if recipe.train.context > config.max_positions() {
        bail!(
            "train.context = {} is more than the {} positions of the model; lower train.context",
            recipe.train.context,
            config.max_positions()
        );
    }
    Ok(())
}

/// The model's config, with the vocabulary a new tokenizer would have: no corpus is read.
pub fn config(recipe: &Recipe) -> Result<Config> {
    match &recipe.model {
        ModelRecipe::New(json) => {
            let vocab = match &recipe.tokenizer.file {
                Some(path) => data::Tokenizer::open(path)?.vocab_size(),
                None => recipe.tokenizer.vocab,
            };
            let mut json = json.clone();
            json["vocab_size"] = json!(vocab);
            Ok(Config::from_json(&json)?)
        }
        ModelRecipe::From(path) => config_of(path),
    }
}

/// A folder needs only its config.json.
fn config_of(path: &Path) -> Result<Config> {
    if path.is_file() {
        return Ok(Config::from_json(checkpoint::ModelFiles::open(path)?.config())?);
    }
    let path = path.join("config.json");
    let text = std::fs::read(&path).with_context(|| {
        format!("cannot read {}; a plan needs the config.json of model.from, not its weights", path.display())
    })?;
    let json =
        serde_json::from_slice(&text).with_context(|| format!("{} is not valid JSON", path.display()))?;
    Ok(Config::from_json(&json)?)
}

/// What would make it fit.
fn no_fit(question: &Question, refused: &NoFit, less: Option<MeshShape>) -> String {
    let devices = question.space.devices;
    if let Some(mesh) = less {
        let fewer = mesh.world_size();
        return format!(
            "nothing fits on {devices} devices, whose number has few factors, but {fewer} of them do ({mesh}); pass --devices {fewer}"
        );
    }
    let Some(least) = &refused.least else {
        return match question.space.mesh {
            Some(_) => "no plan can be run on this mesh: it cuts heads, layers, rows or experts into more pieces than there are; take smaller axes, or leave --mesh away".to_string(),
            None => format!(
                "no plan can be run on {devices} devices: no mesh of them cuts {} layers, {} heads and {} rows into whole pieces; try another number of devices or more rows a step",
                question.model.layers, question.model.heads, question.batch.rows
            ),
        };
    };
    let need = least.memory.device();
    let mut remedies = Vec::new();
    if refused.offload_helps {
        remedies.push("leave --no-offload away: with host memory it fits".to_string());
    }
    if let Some(devices) = refused.devices {
        remedies.push(format!("take {devices} devices"));
    }
    remedies.push(format!("take devices of {:.0} GiB (cluster.memory)", (need / GIB / 0.92).ceil()));
    remedies.push("fewer tokens a row (train.context) or a smaller model".to_string());
    format!(
        "it does not fit on {devices} devices: the plan of least memory ({}) needs {} on each, of {} ({}); {}",
        least.plan.mesh,
        bytes(need as u64),
        bytes(question.cluster.device_bytes as u64),
        "all predicted",
        remedies.join("; or ")
    )
}

const GIB: f64 = (1u64 << 30) as f64;
