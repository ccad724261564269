//! Tensors and files: Hugging Face folders, GGUF, atomic training checkpoints.
//!
//! Files come from anywhere, so every count and offset is checked against the file's own length
//! before it is believed. What is written appears whole or not at all. This room knows no training
//! and no models: it returns tensors, tokenizers and JSON.
#![forbid(unsafe_code)]

mod atomic;
mod effects;
mod folder;
pub mod gguf;
mod model_files;
mod quant;
pub mod safetensors;
mod state;
mod weights;

pub use atomic::{FileWriter, FolderWriter, SaveError, clean_leftovers, write_file};
pub use folder::{OutTensor, save_folder};
pub use gguf::{Gguf, GgufTokenizer, Metadata};
pub use model_files::{ModelFiles, ModelFilesError, save_tokenizer};
pub use quant::WeightType;
pub use state::{Array, ArrayInfo, Checkpoint, Found, Newest, SaveReport, Saver, StateDir, StateError};
pub use state::{BLOCK_BYTES, Manifest, ManifestError, parse_manifest};
pub use weights::{FormatError, WeightError, WeightInfo, Weights};
