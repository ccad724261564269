//! Corpora, tokenizers, packing and the resumable loader.
//!
//! Files come from anywhere: whatever they hold, the answer is documents or an error that names
//! file and line. The order of samples depends on seed and epoch alone. Knows no tensors.
#![forbid(unsafe_code)]

mod chat;
mod corpus;
mod jsonl;
mod loader;
#[cfg(feature = "parquet")]
mod parquet_file;
mod records;
mod samples;
mod tokenizer;
mod tokens;

pub use chat::{ChatError, ChatTemplate, Message};
pub use corpus::{CorpusError, DOCUMENT_MARK, Document, Documents, Format, Piece, documents};
pub use loader::{Loader, order};
pub use samples::{Batch, IGNORE, Samples};
pub use tokenizer::{BpeParts, DecodeStream, Tokenizer, TokenizerError};
pub use tokens::TokenizedCorpus;
