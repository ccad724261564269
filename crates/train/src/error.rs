//! Why a run cannot begin or go on.

use std::io;
use std::path::PathBuf;

/// Why a run cannot begin or go on. What was saved before stays.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The recipe is wrong.
    #[error(transparent)]
    Recipe(#[from] crate::recipe::RecipeError),
    /// The model cannot be built.
    #[error(transparent)]
    Model(#[from] model::ConfigError),
    /// The model to start from cannot be read.
    #[error(transparent)]
    Files(#[from] checkpoint::ModelFilesError),
    /// Its weights cannot be read.
    #[error(transparent)]
    Weights(#[from] checkpoint::WeightError),
    /// The data cannot be read.
    #[error(transparent)]
    Corpus(#[from] data::CorpusError),
    /// The tokenizer cannot be read or used.
    #[error(transparent)]
    Tokenizer(#[from] data::TokenizerError),
    /// A file cannot be written.
    #[error(transparent)]
    Save(#[from] checkpoint::SaveError),
    /// A state cannot be saved or read.
    #[error(transparent)]
    State(#[from] checkpoint::StateError),
    /// The log cannot be written.
    #[error(transparent)]
    Metrics(#[from] crate::metrics::MetricsError),
    /// The system has no memory left.
    #[error(transparent)]
    Memory(#[from] device::OutOfMemory),
    /// The tiers of the state cannot be set up.
    #[error(transparent)]
    Tiers(#[from] memory::pager::PagerError),
    /// The drive lost bytes too often in a row.
    #[error("{0}; that was failure {nth} in a row: find the drive's fault, then go on with --resume", nth = .0.nth)]
    Lost(Box<crate::recovery::Lost>),
    /// A step could not be run.
    #[error(transparent)]
    Fault(#[from] tensor::Fault),
    /// The mesh has no use for an axis.
    #[error(transparent)]
    Flow(#[from] dist::FlowError),
    /// The mesh cannot be laid out.
    #[error("{what}")]
    Mesh {
        /// What is wrong, with a remedy.
        what: String,
    },
    /// The GPU has no kernels for it, or cannot be opened.
    #[error("{what}; set train.device = \"cpu\"")]
    Device {
        /// What it cannot do.
        what: String,
    },
    /// It would not fit, said before anything is reserved.
    #[error("this run needs about {needs} of memory, {available} are available; {remedy}")]
    TooLarge {
        /// Predicted.
        needs: String,
        /// Free now.
        available: String,
        /// What would do.
        remedy: String,
    },
    /// Budgets of `[memory]` no plan can work within.
    #[error("{what}; {remedy}")]
    Budget {
        /// Which budget, and what is needed.
        what: String,
        /// What would do.
        remedy: String,
    },
    /// The run folder cannot be used.
    #[error("cannot use {}: {source}; choose another run.dir or make it writable", path.display())]
    Folder {
        /// Which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process trains there.
    #[error("{} is in use by another trilith; wait for it to end or choose another run.dir", path.display())]
    Locked {
        /// Which folder.
        path: PathBuf,
    },
    /// A run is there already.
    #[error("{} holds a run at step {step}; pass --resume to go on with it, --overwrite to begin again, or choose another run.dir", path.display())]
    Exists {
        /// Which folder.
        path: PathBuf,
        /// Its newest step.
        step: u64,
    },
    /// Nothing can be resumed because all states are damaged.
    #[error("{} holds no whole state: {first}; pass --overwrite to begin again", path.display())]
    NoWholeState {
        /// Which folder.
        path: PathBuf,
        /// What is wrong with the newest.
        first: String,
    },
    /// A state of another version.
    #[error("{}: {what}; it was saved by another version of trilith, begin again with --overwrite", path.display())]
    StateMeta {
        /// Which state.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The recipe or the data changed under a run.
    #[error("{} was saved with {key} = {then}, now it is {now}; restore it, or begin another run in another run.dir", path.display())]
    Changed {
        /// Which state.
        path: PathBuf,
        /// What changed.
        key: String,
        /// At the save.
        then: String,
        /// Now.
        now: String,
    },
    /// Tokenizer and model do not belong together.
    #[error(
        "the tokenizer has {tokens} tokens, the model's vocabulary is {vocab}; give the model's own tokenizer in tokenizer.file"
    )]
    Vocabulary {
        /// Of the tokenizer.
        tokens: usize,
        /// Of the model.
        vocab: usize,
    },
    /// Rows longer than the model.
    #[error("train.context = {context} is more than the {limit} positions of {}; lower train.context", path.display())]
    Context {
        /// Tokens per row.
        context: usize,
        /// Of the model.
        limit: usize,
        /// Which model.
        path: PathBuf,
    },
    /// The loss does not come back.
    #[error(
        "{count} steps in a row had a loss or gradient that is not finite, the last at step {step} with samples {samples:?}; lower train.lr, check those samples, or resume from an earlier state in run.dir/state"
    )]
    NotFinite {
        /// Steps in a row.
        count: u64,
        /// The last of them.
        step: u64,
        /// Its samples.
        samples: Vec<u64>,
    },
    /// The pool of workers cannot start.
    #[error("cannot start {count} worker threads; lower run.threads")]
    Threads {
        /// How many.
        count: usize,
    },
}
