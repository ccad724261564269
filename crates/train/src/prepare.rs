//! From a recipe to what a run is made of: model config, tokenizer, tokens. Nothing here reserves
//! memory for training.

use crate::TrainError;
use crate::estimate::Estimate;
use crate::learner::{Learner, LearnerError, LearnerOptions};
use crate::outlook::Speeds;
use crate::ranks;
use crate::recipe::{ModelRecipe, Recipe, TrainRecipe};
use crate::rerun::{NOMINAL_RATES, Rerun};
use crate::tiers::{self, Links};
use checkpoint::ModelFiles;
use data::{Document, TokenizedCorpus, Tokenizer, documents};
use device::{DType, Device};
use dist::{Communicator, Flow, Mesh};
use memory::pager::Setup;
use memory::plan::Rates;
use model::{Config, Model, Recompute};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use tensor::ParamList;
use tensor::WIDEST_ON_GPU;

/// The token that ends documents in tokenizers trained here.
const END_OF_TEXT: &str = "<|endoftext|>";

/// What takes long while a run is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A tokenizer is trained.
    TrainTokenizer,
    /// The corpus is tokenized: bytes done of all.
    Tokenize {
        /// Bytes of text done.
        done: u64,
        /// Bytes of all files.
        total: u64,
    },
}

/// Told of every stage.
pub type Report<'a> = &'a mut dyn FnMut(Stage);

/// What a run is made of.
pub struct Prepared {
    /// Shape of the model.
    pub config: Config,
    /// Its parameters.
    pub params: ParamList,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Training tokens.
    pub train: Arc<TokenizedCorpus>,
    /// Validation tokens, where some could be held out.
    pub valid: Option<Arc<TokenizedCorpus>>,
    /// What the links between tiers carry, where the run has several.
    pub links: Option<Links>,
    /// Which layers run again, where the recipe leaves that open.
    pub rerun: Option<Rerun>,
    /// Parameters of the first rank's model.
    of_rank: ParamList,
    /// The model to start from.
    files: Option<ModelFiles>,
}

impl Prepared {
    /// Read config, tokenizer and data. With `resume` the tokenizer of an earlier start is used.
    pub fn new(recipe: &Recipe, resume: bool, report: Report<'_>) -> Result<Prepared, TrainError> {
        if recipe.train.device == Device::Cuda {
            // A recipe only looks for it.
            device::cuda::gpu().map_err(|none| TrainError::Device { what: none.to_string() })?;
        }
        let files = match &recipe.model {
            ModelRecipe::From(path) => Some(ModelFiles::open(path)?),
            ModelRecipe::New(_) => None,
        };
        let tokenizer = tokenizer(recipe, files.as_ref(), resume, report)?;
        let config = config(recipe, files.as_ref(), &tokenizer)?;
        let (_, _, h) = config.heads();
        if recipe.train.device == Device::Cuda && h > WIDEST_ON_GPU {
            return Err(TrainError::Device {
                what: format!("heads of {h} columns, a GPU attends with {WIDEST_ON_GPU} at most"),
            });
        }
        let params = Model::build(&config, recipe.train.context, &Mesh::solo())?.params;
        let of_rank = check_mesh(recipe, &config)?;
        let (train, valid) = corpora(recipe, &tokenizer, report)?;
        let (links, rerun) = (None, None);
        let mut prepared = Prepared { config, params, tokenizer, train, valid, links, rerun, of_rank, files };
        let tiers = prepared.tiers(recipe);
        prepared.links = tiers.map(|setup| Links::measure(&setup, prepared.estimate(recipe).state_bytes));
        if recipe.train.recompute_auto {
            let rates = prepared.links.as_ref().map_or(NOMINAL_RATES, |links| links.rates);
            prepared.rerun = Some(choose_rerun(recipe, &prepared.config, &rates)?);
        }
        Ok(prepared)
    }

    /// Layers that run again.
    pub(crate) fn recompute(&self, recipe: &Recipe) -> Recompute {
        let chosen = self.rerun.as_ref().filter(|_| recipe.train.recompute_auto);
        chosen.map_or(recipe.train.recompute, Rerun::recompute)
    }

    /// What the run will need.
    pub fn estimate(&self, recipe: &Recipe) -> Estimate {
        // Over tiers there is no copy: a save streams from where things lie.
        let snapshot = recipe.checkpoint.background && recipe.memory.is_none();
        let train = TrainRecipe { recompute: self.recompute(recipe), ..recipe.train.clone() };
        let one = Estimate::new(&self.config, &self.params, &train, snapshot);
        let all = one.over(&self.config, &recipe.mesh, &train, recipe.memory.is_some());
        // A recipe whose schedule does not fit its stages is none.
        all.on_stages(&self.config, recipe).unwrap_or(all)
    }

    /// What the state may spread over; none: all of it stays in memory.
    pub fn tiers(&self, recipe: &Recipe) -> Option<Setup> {
        let of_rank = self.of_rank.specs().iter().map(|spec| spec.len()).sum();
        let setup = tiers::setup(recipe, &self.estimate(recipe), of_rank)?;
        let drive = self.links.as_ref().and_then(|links| Some(links.drive.as_ref()?.best()));
        Some(Setup { drive, ..setup })
    }

    /// Refuse a run that cannot fit before anything is reserved. `on_card`: ranks that compute on our GPU, where
    /// ranks do.
    pub fn check_memory(&self, recipe: &Recipe, on_card: usize) -> Result<(), TrainError> {
        let estimate = self.estimate(recipe);
        if let Some(setup) = self.tiers(recipe) {
            return tiers::check(recipe, &self.of_rank, &estimate, &setup);
        }
        let available = match recipe.train.device {
            Device::Cpu => device::available_bytes().map(|free| free as u64),
            Device::Cuda => tiers::card_free_bytes(),
        };
        let Some(available) = available else { return Ok(()) };
        let needs = match recipe.train.device {
            Device::Cpu => estimate.total_bytes(),
            // Snapshots lie on the host.
            Device::Cuda => {
                let ranks = recipe.mesh.shape.world_size() as u64;
                (estimate.total_bytes() - estimate.snapshot_bytes) * on_card as u64 / ranks
            }
        };
        if needs <= available {
            return Ok(());
        }
        let remedy = if recipe.train.device == Device::Cuda && recipe.mesh.shape.world_size() > 1 {
            "lower train.batch or train.context, share the state among more GPUs (mesh.fsdp, mesh.zero = 3), or choose a smaller model".to_string()
        } else if needs.saturating_sub(estimate.snapshot_bytes) <= available {
            "set checkpoint.background = false".to_string()
        } else if estimate.state_bytes + estimate.activation_bytes / 4 <= available {
            "lower train.batch or train.context, or set train.recompute = \"always\"".to_string()
        } else {
            format!(
                "set memory.dram = \"auto\" and memory.dir to a folder on a fast drive with {} free, or choose a smaller model",
                crate::bytes(estimate.state_bytes)
            )
        };
        Err(TrainError::TooLarge { needs: crate::bytes(needs), available: crate::bytes(available), remedy })
    }

    /// `bf16` or `f32`, as config.json says it.
    pub fn precision(&self, recipe: &Recipe) -> &'static str {
        match recipe.train.dtype {
            DType::F32 => "float32",
            _ => "bfloat16",
        }
    }

    /// A learner with zero weights, as the rank of the mesh of `flow`.
    pub fn learner(&self, recipe: &Recipe, flow: &Flow) -> Result<Learner, TrainError> {
        let TrainRecipe { context, device, dtype, adamw, .. } = recipe.train;
        let recompute = self.recompute(recipe);
        let processes = ranks::processes(&flow.mesh);
        let tiers = self.tiers(recipe).map(|setup| tiers::apart(setup, processes));
        let options = LearnerOptions { context, dtype, adamw, recompute, device, tiers };
        Learner::sharded(flow, &self.config, options, recipe.mesh.sharding).map_err(|error| match error {
            LearnerError::Config(error) => TrainError::Model(error),
            LearnerError::Memory(error) => TrainError::Memory(error),
            LearnerError::Tiers(error) => TrainError::Tiers(error),
        })
    }

    /// Weights at the start: from files, or drawn.
    pub fn fill(&self, recipe: &Recipe, learner: &mut Learner) -> Result<(), TrainError> {
        let Some(files) = &self.files else {
            learner.initialise(recipe.run.seed)?;
            return Ok(());
        };
        let Learner { optimizer, store, stored, params, .. } = learner;
        model::fill(
            params,
            stored,
            |name, shape| files.read(name, shape).map_err(TrainError::from),
            |param, first, values| Ok(optimizer.set_weights(store, param, first, values)?),
        )?;
        Ok(learner.share_weights()?)
    }
}

/// The host's memory as `trilith plan` takes it: for updates, the same in all candidates.
const NOMINAL_BYTES_PER_S: f64 = 100e9;

/// Choose which layers run again, from what products reach on this machine now.
fn choose_rerun(recipe: &Recipe, config: &Config, rates: &Rates) -> Result<Rerun, TrainError> {
    if recipe.mesh.shape.world_size() > 1 {
        return Err(TrainError::Mesh {
            what: "train.recompute = \"auto\" is for runs of one rank: ranks on different machines could choose differently; set it to \"never\" or \"always\"".into(),
        });
    }
    let gflops = kernels::peak::gflops(recipe.train.device, recipe.train.dtype);
    let speeds = Speeds { flops_per_s: gflops * 1e9, fastest_per_s: NOMINAL_BYTES_PER_S, host_per_s: None };
    Rerun::choose(config, recipe, &speeds, (&tiers::budgets(recipe), rates))
}

/// Refuse a model that cannot lie on the recipe's mesh before the run's folder is touched.
/// Returns the parameters of its first rank.
fn check_mesh(recipe: &Recipe, config: &Config) -> Result<ParamList, TrainError> {
    let shape = recipe.mesh.shape;
    let mesh = Mesh::new(shape, Communicator::null(0, shape.world_size()))
        .map_err(|error| TrainError::Mesh { what: error.to_string() })?;
    Ok(Model::build_on(config, recipe.train.context, &recipe.mesh.flow(&mesh)?)?.params)
}

fn tokenizer(
    recipe: &Recipe,
    files: Option<&ModelFiles>,
    resume: bool,
    report: Report<'_>,
) -> Result<Tokenizer, TrainError> {
    if let Some(path) = &recipe.tokenizer.file {
        return Ok(Tokenizer::open(path)?);
    }
    if let Some(files) = files {
        return Ok(files.tokenizer()?);
    }
    if resume && recipe.run.dir.join("tokenizer.json").exists() {
        return Ok(Tokenizer::from_folder(&recipe.run.dir)?);
    }
    report(Stage::TrainTokenizer);
    // An unreadable corpus ends the texts early; tokenizing it right after says what is wrong.
    let texts = documents(&recipe.data.path, recipe.data.format)?
        .map_while(Result::ok)
        .flat_map(|document: Document| document.pieces)
        .map(|piece| piece.text);
    Ok(Tokenizer::train_bpe(texts, recipe.tokenizer.vocab, END_OF_TEXT)?)
}

fn config(recipe: &Recipe, files: Option<&ModelFiles>, tokenizer: &Tokenizer) -> Result<Config, TrainError> {
    let tokens = tokenizer.vocab_size();
    let config = match (&recipe.model, files) {
        (ModelRecipe::New(json), _) => {
            let mut json = json.clone();
            json["vocab_size"] = json!(tokens);
            Config::from_json(&json)?
        }
        (ModelRecipe::From(path), Some(files)) => {
            let config = Config::from_json(files.config())?;
            let (context, limit) = (recipe.train.context, config.max_positions());
            if context > limit {
                return Err(TrainError::Context { context, limit, path: path.clone() });
            }
            config
        }
        (ModelRecipe::From(path), None) => unreachable!("{} was opened", path.display()),
    };
    match config.vocab() {
        vocab if vocab < tokens => Err(TrainError::Vocabulary { tokens, vocab }),
        _ => Ok(config),
    }
}

type Corpora = (Arc<TokenizedCorpus>, Option<Arc<TokenizedCorpus>>);

fn corpora(recipe: &Recipe, tokenizer: &Tokenizer, report: Report<'_>) -> Result<Corpora, TrainError> {
    let mut tokenize = |paths: &[PathBuf]| {
        let documents = documents(paths, recipe.data.format)?.with_chat(tokenizer.chat());
        let total = documents.total_bytes();
        TokenizedCorpus::build(documents, tokenizer, &mut |done| report(Stage::Tokenize { done, total }))
    };
    let train = tokenize(&recipe.data.path)?;
    if recipe.data.valid.is_empty() {
        let (train, valid) = train.split_validation(recipe.data.valid_fraction);
        return Ok((Arc::new(train), valid.map(Arc::new)));
    }
    let valid = tokenize(&recipe.data.valid)?;
    Ok((Arc::new(train), Some(Arc::new(valid))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Settings;

    #[test]
    fn experts_are_refused_where_ranks_have_none_before_a_folder_is_touched() {
        let on = |family: &str, mesh: &str| {
            let text = "
                run.dir = 'run'
                data.path = 'corpus.txt'
                model = { layers = 2, width = 32, heads = 4 }
                train.batch = 8
            ";
            let mut settings = Settings::parse(text, "a test").unwrap();
            settings.set(&format!("model.family={family}")).unwrap();
            if family == "mixtral" {
                settings.set("model.experts=4").unwrap();
            }
            settings.set(mesh).unwrap();
            let recipe = settings.recipe().unwrap();
            let ModelRecipe::New(mut json) = recipe.model.clone() else { unreachable!() };
            json["vocab_size"] = json!(64);
            check_mesh(&recipe, &Config::from_json(&json).unwrap())
        };
        for mesh in ["mesh.x=1", "mesh.x=2", "mesh.dp=2", "mesh.ep=4"] {
            on("mixtral", mesh).unwrap();
        }
        let few = on("mixtral", "mesh.ep=8").unwrap_err().to_string();
        assert!(few.contains("mesh.ep = 8") && few.contains("at most 4"), "{few}");
        let none = on("llama", "mesh.ep=2").unwrap_err().to_string();
        assert!(none.contains("`llama` has none"), "{none}");
    }
}
