//! A model ready to speak: its files, read.

use checkpoint::{ModelFiles, ModelFilesError, WeightType};
use data::Tokenizer;
use device::{DType, Device, OutOfMemory, View};
use dist::Mesh;
use model::{Config, ConfigError, Model};
use std::path::Path;
use tensor::{ParamStore, WIDEST_ON_GPU};

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its files.
    #[error(transparent)]
    Files(#[from] ModelFilesError),
    /// Its config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system has no memory left.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// It would not fit, said before anything is reserved.
    #[error(
        "the model needs {needs_mib} MiB of memory, {available_mib} MiB are available; free memory, or load it with --dtype bf16 or a smaller --context"
    )]
    TooLarge {
        /// Weights and caches.
        needs_mib: u64,
        /// Free now.
        available_mib: u64,
    },
    /// The GPU has no kernels for it.
    #[error(
        "heads of {columns} columns, a GPU attends with {WIDEST_ON_GPU} at most; leave out --device cuda"
    )]
    Device {
        /// Of a head.
        columns: usize,
    },
    /// Another model's tokenizer.
    #[error(
        "the tokenizer has {tokens} tokens, the model's vocabulary is {vocab}: they belong to different models; put the model's own tokenizer.json into its folder"
    )]
    Vocabulary {
        /// Of the tokenizer.
        tokens: usize,
        /// Of the model.
        vocab: usize,
    },
}

/// A model with its weights and its tokenizer.
pub struct LoadedModel {
    /// Shape.
    pub config: Config,
    /// Layers.
    pub model: Model,
    /// Weights.
    pub store: ParamStore,
    /// Text to tokens.
    pub tokenizer: Tokenizer,
    /// Tokens a sequence may have.
    pub context: usize,
}

impl LoadedModel {
    /// From a Hugging Face folder or a GGUF file, onto a device. `dtype` defaults to f32 for f32 files and bf16
    /// for all others; `context` is cut to what the model was made for.
    pub fn open(
        path: &Path,
        device: Device,
        dtype: Option<DType>,
        context: usize,
    ) -> Result<LoadedModel, LoadError> {
        let files = ModelFiles::open(path)?;
        let config = Config::from_json(files.config())?;
        let tokenizer = files.tokenizer()?;
        let (tokens, vocab) = (tokenizer.vocab_size(), config.vocab());
        if tokens > vocab {
            return Err(LoadError::Vocabulary { tokens, vocab });
        }
        let context = context.min(config.max_positions());
        let whole = files.weights().infos().iter().all(|info| info.dtype == WeightType::F32);
        let dtype = dtype.unwrap_or(if whole { DType::F32 } else { DType::Bf16 });
        let (_, _, columns) = config.heads();
        if device == Device::Cuda && columns > WIDEST_ON_GPU {
            return Err(LoadError::Device { columns });
        }
        let built = Model::build(&config, context, &Mesh::solo())?;
        check_memory(&config, &built.params, (device, dtype), context)?;
        let mut store = ParamStore::new(device, dtype, &built.params)?;
        model::fill(
            &built.params,
            &built.stored,
            |name, shape| files.read(name, shape).map_err(LoadError::from),
            |param, first, values| {
                store.set_weights(param, first, View::of_f32(values)).map_err(LoadError::from)
            },
        )?;
        Ok(LoadedModel { config, model: built.model, store, tokenizer, context })
    }
}

fn check_memory(
    config: &Config,
    params: &tensor::ParamList,
    (device, dtype): (Device, DType),
    context: usize,
) -> Result<(), LoadError> {
    let (_, k, h) = config.heads();
    let count: usize = params.specs().iter().map(|spec| spec.len()).sum();
    let needs = (count + 2 * config.layers() * context * k * h) * dtype.size_bytes();
    let available = match device {
        Device::Cpu => device::available_bytes(),
        Device::Cuda => device::cuda::gpu().ok().map(|gpu| gpu.driver().free_bytes()),
    };
    match available {
        Some(available) if needs > available => Err(LoadError::TooLarge {
            needs_mib: (needs >> 20) as u64,
            available_mib: (available >> 20) as u64,
        }),
        _ => Ok(()),
    }
}
