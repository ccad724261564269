//! A model as files, wherever it comes from: a Hugging Face folder or one GGUF file, seen the same.

use crate::{Gguf, WeightError, Weights, write_file};
use data::{BpeParts, Tokenizer, TokenizerError};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A model that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ModelFilesError {
    /// Its weights.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// Its tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Its config.
    #[error("cannot read {}: {what}; name a model folder or a .gguf file", path.display())]
    Config {
        /// Which file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// A tensor of another shape than the config says.
    #[error("{}: tensor `{name}` has shape {found:?}, config.json says {expected:?}; the folder mixes two models, download it again", path.display())]
    Shape {
        /// Which folder.
        path: PathBuf,
        /// Which tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// By the config.
        expected: Vec<usize>,
    },
    /// A sentencepiece vocabulary.
    #[error("{}: its tokenizer is of kind `{kind}`, only byte-level BPE is read from GGUF; give the model's tokenizer.json apart", path.display())]
    TokenizerKind {
        /// Which file.
        path: PathBuf,
        /// `tokenizer.ggml.model`.
        kind: String,
    },
}

/// An opened model.
pub struct ModelFiles {
    path: PathBuf,
    config: Value,
    weights: Weights,
    gguf: Option<Gguf>,
}

impl ModelFiles {
    /// A folder with `config.json`, or a file whose name ends in `.gguf`.
    pub fn open(path: &Path) -> Result<ModelFiles, ModelFilesError> {
        if path.is_file() {
            let gguf = Weights::open_gguf(path)?;
            let (config, weights) = (gguf.config_json()?, gguf.hf_weights()?);
            return Ok(ModelFiles { path: path.to_path_buf(), config, weights, gguf: Some(gguf) });
        }
        let config_path = path.join("config.json");
        let wrong = |what: String| ModelFilesError::Config { path: config_path.clone(), what };
        let text = std::fs::read(&config_path).map_err(|error| wrong(error.to_string()))?;
        let config = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let weights = Weights::open_folder(path)?;
        Ok(ModelFiles { path: path.to_path_buf(), config, weights, gguf: None })
    }

    /// Where it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its `config.json`, or what a GGUF's metadata says of it.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Its tensors, under Hugging Face names.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The GGUF, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// A tensor of an expected shape, widened to f32. Folders of older GPT-2 checkpoints leave the
    /// outer module out of their names.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelFilesError> {
        let short = name.split_once('.').map_or(name, |(_, rest)| rest);
        let name = if self.weights.find(name).is_none() && self.weights.find(short).is_some() {
            short
        } else {
            name
        };
        let info = self.weights.get(name)?;
        if info.shape != shape {
            return Err(ModelFilesError::Shape {
                path: self.path.clone(),
                name: name.to_string(),
                found: info.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        Ok(self.weights.read_f32(name)?)
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, ModelFilesError> {
        let Some(gguf) = &self.gguf else { return Ok(Tokenizer::from_folder(&self.path)?) };
        let parts = gguf.tokenizer()?;
        if parts.model != "gpt2" {
            return Err(ModelFilesError::TokenizerKind { path: self.path.clone(), kind: parts.model });
        }
        // 3 is control, 4 user defined: both stand for themselves in text.
        let special = parts.token_types.iter().enumerate().filter(|(_, kind)| matches!(kind, 3 | 4));
        let special = special.map(|(id, _)| id as u32).collect();
        Ok(Tokenizer::from_bpe(&BpeParts {
            special,
            tokens: parts.tokens,
            merges: parts.merges,
            pre: parts.pre,
            bos: parts.bos,
            eos: parts.eos.into_iter().collect(),
            adds_bos: parts.add_bos,
            chat_template: parts.chat_template,
        })?)
    }
}

/// Write a tokenizer's files into `dir`, each whole or not at all.
pub fn save_tokenizer(tokenizer: &Tokenizer, dir: &Path) -> Result<(), crate::SaveError> {
    std::fs::create_dir_all(dir).map_err(crate::SaveError::io("create", dir))?;
    let files =
        tokenizer.files().map_err(|error| crate::SaveError::io("make", dir)(std::io::Error::other(error)))?;
    files.iter().try_for_each(|(name, bytes)| write_file(&dir.join(name), bytes))
}
