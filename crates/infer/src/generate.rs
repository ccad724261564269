//! One sequence after the other: a session keeps the keys and values of what was said, so that a
//! turn of a conversation costs only its own tokens.

use crate::{Sampler, Sampling};
use model::{Config, Model};
use tensor::{Fault, KvCache, ParamStore, Tape};

/// Tokens of a prompt that pass through the model at a time: bounds the memory of prefill.
const PREFILL_TOKENS: usize = 512;

/// Why no text came.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Nothing to continue.
    #[error("the prompt has no tokens; give some text, or a tokenizer with a beginning-of-text token")]
    EmptyPrompt,
    /// Longer than the session.
    #[error("the prompt has {tokens} tokens, the model takes {context}; shorten the prompt")]
    TooLong {
        /// Of the prompt.
        tokens: usize,
        /// Of the session.
        context: usize,
    },
    /// A token the model does not have.
    #[error(
        "token {id} of the prompt is beyond the model's vocabulary of {vocab}: the tokenizer belongs to another model"
    )]
    UnknownToken {
        /// Which.
        id: u32,
        /// Of the model.
        vocab: usize,
    },
    /// The model could not be run.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// What a model has seen of one sequence.
pub struct Session {
    caches: Vec<KvCache>,
    /// Tokens whose keys and values are cached.
    seen: Vec<u32>,
    context: usize,
    vocab: usize,
}

impl Session {
    /// Room for `context` tokens on the device and in the type of the weights in `store`.
    pub fn new(config: &Config, store: &ParamStore, context: usize) -> Result<Session, Fault> {
        let (_, k, h) = config.heads();
        let caches = (0..config.layers())
            .map(|_| KvCache::new(store.device(), store.dtype(), context, k * h))
            .collect::<Result<_, _>>()?;
        Ok(Session { caches, seen: Vec::new(), context, vocab: config.vocab() })
    }

    /// Tokens it has room for.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits [V] of the token after `ids`. What `ids` shares with the tokens seen before is not
    /// computed again.
    pub fn logits(
        &mut self,
        model: &Model,
        store: &mut ParamStore,
        ids: &[u32],
    ) -> Result<Vec<f32>, GenerateError> {
        self.check(ids)?;
        let shared = self.seen.iter().zip(ids).take_while(|(a, b)| a == b).count();
        // The last token always runs: its logits are what is asked for.
        let kept = shared.min(ids.len() - 1);
        self.caches.iter_mut().for_each(|cache| cache.truncate(kept));
        self.seen.truncate(kept);
        let mut tape = Tape::running(store);
        let mut logits = Vec::new();
        for chunk in ids[kept..].chunks(PREFILL_TOKENS) {
            let hidden = model.hidden_cached(&mut tape, chunk, &mut self.caches)?;
            self.seen.extend(chunk);
            if self.seen.len() == ids.len() {
                let last = hidden.value.narrow_rows(chunk.len() - 1, 1);
                logits = tape.logits(&last, model.head())?.to_f32();
            }
        }
        Ok(logits)
    }

    fn check(&self, ids: &[u32]) -> Result<(), GenerateError> {
        let (tokens, context, vocab) = (ids.len(), self.context, self.vocab);
        match ids.iter().find(|id| **id as usize >= vocab) {
            _ if ids.is_empty() => Err(GenerateError::EmptyPrompt),
            _ if tokens > context => Err(GenerateError::TooLong { tokens, context }),
            Some(id) => Err(GenerateError::UnknownToken { id: *id, vocab }),
            None => Ok(()),
        }
    }
}

/// A continuation being drawn, token by token.
pub struct Generation<'a> {
    model: &'a Model,
    store: &'a mut ParamStore,
    session: &'a mut Session,
    sampler: Sampler,
    ids: Vec<u32>,
    prompt: usize,
    stop: Vec<u32>,
    max_tokens: usize,
    done: bool,
}

impl<'a> Generation<'a> {
    /// Continue `prompt` until a token of `stop`, `max_tokens` tokens, or the end of the context.
    pub fn new(
        (model, store, session): (&'a Model, &'a mut ParamStore, &'a mut Session),
        prompt: &[u32],
        sampling: Sampling,
        stop: &[u32],
        max_tokens: usize,
    ) -> Result<Generation<'a>, GenerateError> {
        session.check(prompt)?;
        Ok(Generation {
            model,
            store,
            session,
            sampler: Sampler::new(sampling),
            ids: prompt.to_vec(),
            prompt: prompt.len(),
            stop: stop.to_vec(),
            max_tokens,
            done: false,
        })
    }

    /// The next token; `None` at the end. The stop token itself is not returned.
    pub fn next_token(&mut self) -> Result<Option<u32>, GenerateError> {
        let full = self.ids.len() > self.session.context || self.ids.len() - self.prompt >= self.max_tokens;
        if self.done || full {
            return Ok(None);
        }
        let logits = self.session.logits(self.model, self.store, &self.ids)?;
        let token = self.sampler.draw(&logits);
        if self.stop.contains(&token) {
            self.done = true;
            return Ok(None);
        }
        self.ids.push(token);
        Ok(Some(token))
    }

    /// Prompt and continuation so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}
