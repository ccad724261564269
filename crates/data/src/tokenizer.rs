//! Text to tokens and back: any `tokenizer.json`, or a byte-level BPE trained here.

mod files;
mod parts;
mod train;

pub use parts::BpeParts;

use crate::chat::ChatTemplate;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

/// A tokenizer that cannot be read or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("cannot read tokenizer {}: {source}; give a tokenizer.json or a folder that holds one", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no tokenizer.
    #[error(
        "{origin} is not a tokenizer: {what}; download it again or train one with `trilith tokenizer train`"
    )]
    Format {
        /// File or kind.
        origin: String,
        /// What is wrong.
        what: String,
    },
    /// A text cannot be encoded or tokens cannot be decoded.
    #[error("the tokenizer failed: {0}; it may be damaged, test it with `trilith tokenizer encode`")]
    Use(String),
    /// A tokenizer cannot be trained.
    #[error("cannot train a tokenizer: {what}; {remedy}")]
    Train {
        /// Why.
        what: String,
        /// What would do.
        remedy: &'static str,
    },
}

/// A tokenizer with its special tokens and its chat template. Cloning shares it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    bos: Option<u32>,
    eos: Vec<u32>,
    adds_bos: bool,
    template: Option<Arc<ChatTemplate>>,
}

/// The library reads foreign files; a panic of its own becomes an error of the file.
fn guarded<T>(body: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| Err("the tokenizer library gave up on it".into()))
}

impl Tokenizer {
    fn wrap(inner: tokenizers::Tokenizer) -> Tokenizer {
        let known = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "<|im_end|>"];
        let eos = known.iter().find_map(|token| inner.token_to_id(token)).into_iter().collect();
        Tokenizer { inner: Arc::new(inner), bos: None, eos, adds_bos: false, template: None }
    }

    /// From the bytes of a `tokenizer.json`.
    pub fn from_bytes(json: &[u8]) -> Result<Tokenizer, TokenizerError> {
        Self::from_named_bytes(json, "the file")
    }

    fn from_named_bytes(json: &[u8], origin: &str) -> Result<Tokenizer, TokenizerError> {
        let inner = guarded(|| tokenizers::Tokenizer::from_bytes(json).map_err(|error| error.to_string()));
        inner.map(Tokenizer::wrap).map_err(|what| TokenizerError::Format { origin: origin.to_string(), what })
    }

    /// Tokens of a text; special tokens written in it are recognised, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, false)
    }

    /// The same, beginning with the beginning-of-text token where the tokenizer wants one.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode_with(text, true)?;
        if let (true, Some(bos)) = (self.adds_bos, self.bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoded = guarded(|| self.inner.encode_fast(text, special).map_err(|error| error.to_string()));
        Ok(encoded.map_err(TokenizerError::Use)?.get_ids().to_vec())
    }

    /// Tokens of many texts, in parallel.
    pub fn encode_all(&self, texts: Vec<String>) -> Result<Vec<Vec<u32>>, TokenizerError> {
        let encoded =
            guarded(|| self.inner.encode_batch_fast(texts, false).map_err(|error| error.to_string()));
        Ok(encoded.map_err(TokenizerError::Use)?.iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// Text of tokens; without special tokens when `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        guarded(|| self.inner.decode(ids, skip_special).map_err(|error| error.to_string()))
            .map_err(TokenizerError::Use)
    }

    /// Decode tokens as they come.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special, ids: Vec::new(), read: 0, emitted: String::new() }
    }

    /// Highest id + 1, added tokens included.
    pub fn vocab_size(&self) -> usize {
        let highest = self.inner.get_vocab(true).values().copied().max();
        highest.map_or(0, |id| id as usize + 1)
    }

    /// Id of a token as it is written in `tokenizer.json`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Token of an id as it is written in `tokenizer.json`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Beginning-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens that end a text or a turn.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The token that separates documents: the first end-of-text token.
    pub fn end_of_text(&self) -> Option<u32> {
        self.eos.first().copied()
    }

    /// How conversations become text.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_deref()
    }

    /// The template, with the special tokens it needs: (template, bos, eos).
    pub fn chat(&self) -> (ChatTemplate, String, String) {
        let template = self.chat_template().cloned().unwrap_or_else(ChatTemplate::chatml);
        let text = |id: Option<u32>| id.and_then(|id| self.id_to_token(id)).unwrap_or_default();
        (template, text(self.bos), text(self.end_of_text()))
    }
}

/// Tokens become text as soon as they form whole characters.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Tokens since the last whole character, and a few before them for context.
    ids: Vec<u32>,
    /// How many of them are out.
    read: usize,
    /// Their text.
    emitted: String,
}

impl DecodeStream<'_> {
    /// Add a token; the text that is now certain.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TokenizerError> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        // A replacement character at the end may be the first bytes of a longer character.
        if text.len() <= self.emitted.len() || text.ends_with('\u{fffd}') {
            return Ok(None);
        }
        let new = text.strip_prefix(self.emitted.as_str()).map(str::to_string);
        // What came before is context only: decoders look back a token for spaces.
        self.ids.drain(..self.read);
        self.read = self.ids.len();
        self.emitted = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(Some(new.unwrap_or(text)))
    }

    /// What is left, half characters as replacement characters.
    pub fn finish(self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(text.strip_prefix(self.emitted.as_str()).unwrap_or_default().to_string())
    }
}

#[cfg(test)]
mod tests;
