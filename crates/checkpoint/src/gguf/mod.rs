//! Reading GGUF: typed metadata and tensors. Version 2 and 3, little endian.
//!
//! Source: the GGUF specification (ggml, docs/gguf.md).

mod llama;
mod metadata;
mod parse;

pub use llama::GgufTokenizer;
pub use metadata::{Array, Metadata, Value};
pub use parse::{Entry, Header, parse_header};

use crate::weights::{FormatError, Rows, WeightError, WeightInfo, Weights, open};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// First guess at the length of a header. Vocabularies make headers of a few megabytes.
const FIRST_BYTES: u64 = 4 << 20;
/// Longest header we read: above the largest vocabularies by a factor of eight.
const MAX_HEADER: u64 = 256 << 20;

/// A GGUF file.
#[derive(Debug, Clone)]
pub struct Gguf {
    /// Keys and values, in the order of the file.
    pub metadata: Metadata,
    /// Tensors under their GGUF names.
    pub weights: Weights,
    /// Version of the format.
    pub version: u32,
    /// Alignment of tensors in bytes.
    pub alignment: u64,
}

impl Weights {
    /// A GGUF file.
    pub fn open_gguf(path: &Path) -> Result<Gguf, WeightError> {
        let (file, file_len) = open(path)?;
        let header = read_header(&file, file_len, path)?;
        let infos = header.tensors.into_iter().map(|entry| WeightInfo {
            name: entry.name,
            shape: entry.shape,
            dtype: entry.dtype,
            bytes: entry.bytes,
            file: path.to_path_buf(),
            offset: entry.offset,
            rows: Rows::InOrder,
        });
        let infos = infos.collect();
        let mut weights = Weights::empty(path);
        weights.add_file(path, Arc::new(file), infos);
        Ok(Gguf { metadata: header.metadata, weights, version: header.version, alignment: header.alignment })
    }
}

/// The header says nowhere how long it is: read a prefix and double it while it proves too short.
fn read_header(file: &File, file_len: u64, path: &Path) -> Result<Header, WeightError> {
    let mut prefix = FIRST_BYTES.min(file_len);
    loop {
        let mut bytes = vec![0; prefix as usize];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|source| WeightError::Io { path: path.to_path_buf(), source })?;
        match parse_header(&bytes, file_len) {
            Err(FormatError::Truncated { .. }) if prefix < file_len.min(MAX_HEADER) => {
                prefix = (prefix * 2).min(file_len).min(MAX_HEADER);
            }
            other => return other.map_err(|error| error.at(path)),
        }
    }
}
