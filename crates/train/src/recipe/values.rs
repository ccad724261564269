//! A recipe as typed values, and the combinations that cannot be.

use super::keys::parse_bytes;
use super::{RecipeError, Settings, auto, new_model, stages, tiers};
use crate::moments::Moments;
use crate::optimizer::AdamWConfig;
use crate::schedule::{Decay, Schedule};
use crate::shards::Sharding;
use device::{DType, Device};
use dist::cost::{Cluster, Link, Pace, Zero};
use dist::pipeline;
use dist::{Axis, Combination, ContextAttention, Flow, FlowError, Mesh, MeshShape, Parts, Scheme};
use memory::pager::Policy;
use model::Recompute;
use std::path::PathBuf;
use std::time::Duration;
use toml::Value;

/// Everything a run is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// `[run]`
    pub run: RunRecipe,
    /// `[model]`
    pub model: ModelRecipe,
    /// `[tokenizer]`
    pub tokenizer: TokenizerRecipe,
    /// `[data]`
    pub data: DataRecipe,
    /// `[mesh]`
    pub mesh: MeshRecipe,
    /// `[train]`
    pub train: TrainRecipe,
    /// `[eval]`
    pub eval: EvalRecipe,
    /// `[sample]`
    pub sample: SampleRecipe,
    /// `[checkpoint]`
    pub checkpoint: CheckpointRecipe,
    /// `[cluster]`
    pub cluster: ClusterRecipe,
    /// `[memory]`; none: everything stays in memory.
    pub memory: Option<MemoryRecipe>,
    /// `log.tensorboard`
    pub tensorboard: bool,
}

/// `[run]`
#[derive(Clone, Debug, PartialEq)]
pub struct RunRecipe {
    /// Folder of the run.
    pub dir: PathBuf,
    /// Seed of weights and order.
    pub seed: u64,
    /// Workers.
    pub threads: usize,
}

/// `[model]`
#[derive(Clone, Debug, PartialEq)]
pub enum ModelRecipe {
    /// Fine-tune this one.
    From(PathBuf),
    /// A new one: its `config.json` without the vocabulary.
    New(serde_json::Value),
}

/// `[mesh]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeshRecipe {
    /// Whether axes, scheme and microbatches are still to be chosen.
    pub auto: bool,
    /// Ranks along each axis.
    pub shape: MeshShape,
    /// How products are spread; none: by the axes.
    pub scheme: Option<Scheme>,
    /// How those of parts of a layer are, where not by that.
    pub parts: Parts,
    /// How attention sees the tokens of other context ranks.
    pub attention: ContextAttention,
    /// Longest time a rank waits for another in one call.
    pub deadline: Duration,
    /// How ranks share the state.
    pub sharding: Sharding,
    /// In which order the stages of `pp` work.
    pub schedule: pipeline::Schedule,
}

impl MeshRecipe {
    /// How activations and weights lie on `mesh`.
    pub fn flow(&self, mesh: &Mesh) -> Result<Flow, FlowError> {
        let flow = Flow::new(mesh, self.scheme())?.with_parts(self.parts)?;
        Ok(Flow { attention: self.attention, schedule: self.schedule, ..flow })
    }

    /// The scheme of the residual stream.
    pub fn scheme(&self) -> Scheme {
        self.scheme.unwrap_or_else(|| Scheme::of(&self.shape))
    }
}

/// `[tokenizer]`
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerRecipe {
    /// File or folder.
    pub file: Option<PathBuf>,
    /// Vocabulary of a new one.
    pub vocab: usize,
}

/// `[data]`
#[derive(Clone, Debug, PartialEq)]
pub struct DataRecipe {
    /// Training files.
    pub path: Vec<PathBuf>,
    /// How they are read.
    pub format: data::Format,
    /// Validation files.
    pub valid: Vec<PathBuf>,
    /// Part held out when there are none.
    pub valid_fraction: f64,
    /// Whether the order is drawn.
    pub shuffle: bool,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq)]
pub struct TrainRecipe {
    /// Steps of the run.
    pub steps: u64,
    /// Rows per microbatch.
    pub batch: usize,
    /// Microbatches per step.
    pub accumulate: usize,
    /// Tokens per row.
    pub context: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Learning rate over the run.
    pub schedule: Schedule,
    /// Optimizer constants.
    pub adamw: AdamWConfig,
    /// Largest gradient norm; infinite when off.
    pub clip: f64,
    /// Where ops compute.
    pub device: Device,
    /// Type of weights and activations.
    pub dtype: DType,
    /// Layers that run again.
    pub recompute: Recompute,
    /// They are chosen by the predicted step (`Rerun`); `recompute` says none until then.
    pub recompute_auto: bool,
    /// Steps in a row that may be skipped.
    pub max_skipped: u64,
}

/// `[eval]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalRecipe {
    /// Steps between validations.
    pub every: u64,
    /// Batches each; 0: all.
    pub batches: usize,
}

/// `[sample]`
#[derive(Clone, Debug, PartialEq)]
pub struct SampleRecipe {
    /// Steps between samples.
    pub every: u64,
    /// Text to continue.
    pub prompt: String,
    /// Tokens each.
    pub tokens: usize,
    /// Temperature.
    pub temperature: f32,
    /// Nucleus.
    pub top_p: f32,
}

/// `[checkpoint]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointRecipe {
    /// Steps between saves.
    pub every: u64,
    /// Saves kept.
    pub keep_last: usize,
    /// Whether a thread writes them from a copy.
    pub background: bool,
}

/// `[cluster]`
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClusterRecipe {
    /// Devices.
    pub devices: usize,
    /// What they and their links can do.
    pub cluster: Cluster,
}

/// `[memory]`
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryRecipe {
    /// Memory that plays a GPU's; none: DRAM is where ops compute.
    pub device_bytes: Option<u64>,
    /// Memory of a real GPU in bytes; none: what is free.
    pub hbm_bytes: Option<u64>,
    /// DRAM in bytes; none: what is available.
    pub dram_bytes: Option<u64>,
    /// Space on the drive in bytes; none: what is free.
    pub nvme_bytes: Option<u64>,
    /// Folder of the offload file.
    pub dir: PathBuf,
    /// Who leaves.
    pub policy: Policy,
}

/// Typed look-ups; the settings were checked against the table, so types are as it says.
pub(super) struct Get<'a>(&'a Settings);

impl Get<'_> {
    pub(super) fn int(&self, key: &'static str) -> Option<u64> {
        self.0.get(key).and_then(|v| v.as_integer()).map(|n| n as u64)
    }

    pub(super) fn float(&self, key: &'static str) -> Option<f64> {
        self.0.get(key).and_then(|v| v.as_float().or(v.as_integer().map(|n| n as f64)))
    }

    pub(super) fn flag(&self, key: &'static str) -> bool {
        self.0.get(key).and_then(|v| v.as_bool()).unwrap_or(false)
    }

    pub(super) fn text(&self, key: &'static str) -> Option<String> {
        self.0.get(key).and_then(|v| v.as_str().map(str::to_string))
    }

    pub(super) fn paths(&self, key: &'static str) -> Vec<PathBuf> {
        match self.0.get(key) {
            Some(Value::String(path)) => vec![path.into()],
            Some(Value::Array(list)) => list.iter().filter_map(|v| v.as_str()).map(PathBuf::from).collect(),
            _ => Vec::new(),
        }
    }
}

pub(super) fn need<T>(value: Option<T>, key: &'static str) -> Result<T, RecipeError> {
    value.ok_or(RecipeError::Missing(key))
}

pub(super) fn impossible<T>(what: String, remedy: &str) -> Result<T, RecipeError> {
    Err(RecipeError::Impossible { what, remedy: remedy.to_string() })
}

impl Recipe {
    pub(super) fn from_settings(settings: &Settings) -> Result<Recipe, RecipeError> {
        let get = Get(settings);
        let int = |key| need(get.int(key), key);
        let dir = need(get.text("run.dir"), "run.dir")?.into();
        let path = get.paths("data.path");
        if path.is_empty() {
            return Err(RecipeError::Missing("data.path"));
        }
        let format = match get.text("data.format").as_deref() {
            Some("text") => data::Format::Text,
            Some("jsonl") => data::Format::Jsonl,
            Some("parquet") => data::Format::Parquet,
            _ => data::Format::Auto,
        };
        let train = train(&get)?;
        Ok(Recipe {
            run: RunRecipe { dir, seed: int("run.seed")?, threads: int("run.threads")? as usize },
            model: new_model::model(settings, &get, &train)?,
            tokenizer: TokenizerRecipe {
                file: get.text("tokenizer.file").map(PathBuf::from),
                vocab: int("tokenizer.vocab")? as usize,
            },
            data: DataRecipe {
                path,
                format,
                valid: get.paths("data.valid"),
                valid_fraction: need(get.float("data.valid_fraction"), "data.valid_fraction")?,
                shuffle: get.flag("data.shuffle"),
            },
            mesh: mesh(&get, &train)?,
            memory: memory(settings, &get, train.device)?,
            train,
            eval: EvalRecipe { every: int("eval.every")?, batches: int("eval.batches")? as usize },
            sample: SampleRecipe {
                every: int("sample.every")?,
                prompt: get.text("sample.prompt").unwrap_or_default(),
                tokens: int("sample.tokens")? as usize,
                temperature: need(get.float("sample.temperature"), "sample.temperature")? as f32,
                top_p: need(get.float("sample.top_p"), "sample.top_p")? as f32,
            },
            checkpoint: CheckpointRecipe {
                every: int("checkpoint.every")?,
                keep_last: int("checkpoint.keep_last")? as usize,
                background: get.flag("checkpoint.background"),
            },
            cluster: cluster(&get)?,
            tensorboard: get.flag("log.tensorboard"),
        })
    }
}

fn cluster(get: &Get<'_>) -> Result<ClusterRecipe, RecipeError> {
    const GIB: f64 = (1u64 << 30) as f64;
    let int = |key| need(get.int(key), key).map(|n| n as usize);
    let float = |key| need(get.float(key), key);
    let link = |latency, rate| -> Result<Link, RecipeError> {
        Ok(Link { latency_s: float(latency)? * 1e-6, call_s: 0.0, bytes_per_s: float(rate)? * 1e9 })
    };
    let (flops_per_s, bytes_per_s) = (float("cluster.compute")? * 1e12, float("cluster.memory_rate")? * 1e9);
    let cluster = Cluster {
        node_devices: int("cluster.node_devices")?,
        device_bytes: float("cluster.memory")? * GIB,
        flops_per_s,
        device_bytes_per_s: bytes_per_s,
        host_bytes: float("cluster.host_memory")? * GIB,
        host_bytes_per_s: float("cluster.host_memory_rate")? * 1e9,
        host_link: link("cluster.host_latency", "cluster.host_rate")?,
        intra: link("cluster.intra_latency", "cluster.intra_rate")?,
        inter: link("cluster.inter_latency", "cluster.inter_rate")?,
        pace: Pace::nominal(flops_per_s, bytes_per_s),
    };
    Ok(ClusterRecipe { devices: int("cluster.devices")?, cluster })
}

fn memory(settings: &Settings, get: &Get<'_>, on: Device) -> Result<Option<MemoryRecipe>, RecipeError> {
    let hbm_bytes = get.text("memory.hbm").and_then(|text| parse_bytes(&text));
    if hbm_bytes.is_some() && on == Device::Cpu {
        return impossible(
            "memory.hbm is given, but the run computes on no GPU".into(),
            "drop memory.hbm, or set memory.simulate_device to a number of bytes of memory that plays one",
        );
    }
    if hbm_bytes.is_some() && get.text("memory.dram").is_none() {
        return impossible(
            "memory.hbm is given but memory.dram is not".into(),
            "memory.dram is the host behind the GPU; set it to \"auto\" or a number of bytes",
        );
    }
    let device = get.text("memory.simulate_device");
    let device_bytes = device.as_deref().and_then(parse_bytes);
    if device.is_some() && device_bytes.is_none() {
        return impossible(
            "memory.simulate_device is no number of bytes".into(),
            "say how much memory plays the GPU, as in \"2GiB\"",
        );
    }
    let Some(dram) = get.text("memory.dram") else {
        if device.is_some() {
            return impossible(
                "memory.simulate_device is given but memory.dram is not".into(),
                "memory.dram is the host behind the device; set it to \"auto\" or a number of bytes",
            );
        }
        if settings.gives("memory.dir") {
            return impossible(
                "memory.dir is given but memory.dram is not".into(),
                "memory.dram is what turns tiers on; set it to \"auto\" or a number of bytes",
            );
        }
        return Ok(None);
    };
    let dir = match get.text("memory.dir") {
        Some(dir) => dir,
        None => need(get.text("run.dir"), "run.dir")?,
    };
    Ok(Some(MemoryRecipe {
        device_bytes,
        hbm_bytes,
        dram_bytes: parse_bytes(&dram),
        nvme_bytes: get.text("memory.nvme").and_then(|text| parse_bytes(&text)),
        dir: dir.into(),
        policy: match get.text("memory.policy").as_deref() {
            Some("belady") => Policy::Belady,
            Some("static") => Policy::Static,
            Some("lru") => Policy::Lru,
            _ => Policy::Dynamic,
        },
    }))
}

fn train(get: &Get<'_>) -> Result<TrainRecipe, RecipeError> {
    let int = |key| need(get.int(key), key);
    let float = |key| need(get.float(key), key);
    let (steps, lr) = (int("train.steps")?, float("train.lr")?);
    // A run cut short for a trial keeps its recipe: it then is all warmup.
    let warmup = get.int("train.warmup").unwrap_or((steps / 10).min(100)).min(steps);
    let min_lr = get.float("train.min_lr").unwrap_or(lr / 10.0);
    if min_lr > lr {
        return impossible(
            format!("train.min_lr = {min_lr} is above train.lr = {lr}"),
            "the minimum is where the decay ends, at most train.lr",
        );
    }
    let schedule = get.text("train.schedule").unwrap_or_default();
    if get.0.gives("train.decay") && schedule != "wsd" {
        return impossible(
            format!("train.decay is given but train.schedule = \"{schedule}\""),
            "train.decay belongs to train.schedule = \"wsd\"",
        );
    }
    let decay = match schedule.as_str() {
        "linear" => Decay::Linear,
        "wsd" => Decay::Wsd { decay: get.int("train.decay").unwrap_or(steps.div_ceil(5)) },
        "constant" => Decay::Constant,
        _ => Decay::Cosine,
    };
    let recompute = match (get.int("train.recompute_layers"), get.text("train.recompute").as_deref()) {
        (Some(layers), _) => Recompute::First(layers as usize),
        (None, Some("always")) => Recompute::Always,
        _ => Recompute::Never,
    };
    let automatic =
        get.int("train.recompute_layers").is_none() && get.text("train.recompute").as_deref() == Some("auto");
    let clip = float("train.clip")?;
    Ok(TrainRecipe {
        steps,
        batch: int("train.batch")? as usize,
        accumulate: int("train.accumulate")? as usize,
        context: int("train.context")? as usize,
        lr,
        schedule: Schedule { lr, min_lr, warmup, steps, decay },
        adamw: AdamWConfig {
            beta1: float("train.beta1")? as f32,
            beta2: float("train.beta2")? as f32,
            eps: float("train.eps")? as f32,
            weight_decay: float("train.weight_decay")? as f32,
            moments: match get.text("train.moments").as_deref() {
                Some("8bit") => Moments::Bits8,
                _ => Moments::F32,
            },
            gradients: match get.text("train.gradients").as_deref() {
                Some("bf16") => DType::Bf16,
                _ => DType::F32,
            },
        },
        clip: if clip > 0.0 { clip } else { f64::INFINITY },
        dtype: if get.text("train.precision").as_deref() == Some("f32") { DType::F32 } else { DType::Bf16 },
        device: tiers::device(get)?,
        recompute,
        recompute_auto: automatic,
        max_skipped: int("train.max_skipped")?,
    })
}

fn mesh(get: &Get<'_>, train: &TrainRecipe) -> Result<MeshRecipe, RecipeError> {
    let size = |axis, key| need(get.int(key), key).map(|size| (axis, size as usize));
    let sizes = [
        size(Axis::Pp, "mesh.pp")?,
        size(Axis::Dp, "mesh.dp")?,
        size(Axis::Fsdp, "mesh.fsdp")?,
        size(Axis::Cp, "mesh.cp")?,
        size(Axis::Ep, "mesh.ep")?,
        size(Axis::X, "mesh.x")?,
        size(Axis::Y, "mesh.y")?,
        size(Axis::Z, "mesh.z")?,
    ];
    let shape = match MeshShape::new(&sizes) {
        Ok(shape) => shape,
        Err(error) => return impossible(error.to_string(), "lower the sizes in [mesh]"),
    };
    let replicas = shape.replicas();
    if !train.batch.is_multiple_of(replicas) {
        return impossible(
            format!(
                "train.batch = {} does not divide by {replicas}, the product of mesh.dp, mesh.fsdp and mesh.ep",
                train.batch
            ),
            "every replica learns from the same number of rows; choose a multiple",
        );
    }
    let scheme = |key| Scheme::from_name(&get.text(key).unwrap_or_default());
    let parts = Parts { attention: scheme("mesh.attention_scheme"), ffn: scheme("mesh.ffn_scheme") };
    let scheme = scheme("mesh.scheme");
    if get.text("memory.dram").is_some() {
        tiers::of_ranks(get, &shape)?;
    }
    let attention = get.text("mesh.attention").and_then(|name| ContextAttention::from_name(&name));
    let deadline = Duration::from_secs_f64(need(get.float("mesh.deadline"), "mesh.deadline")?);
    let zero = match need(get.int("mesh.zero"), "mesh.zero")? {
        1 => Zero::One,
        2 => Zero::Two,
        _ => Zero::Three,
    };
    let sharding = Sharding { zero, overlap: get.flag("mesh.overlap") };
    let attention = attention.unwrap_or_default();
    Combination { mesh: shape, scheme, parts, context: train.context }.check()?;
    let schedule = stages::schedule(get, &shape, train)?;
    let auto = auto::asked(get, &shape, (scheme, parts))?;
    Ok(MeshRecipe { auto, shape, scheme, parts, attention, deadline, sharding, schedule })
}
