//! A byte-level BPE from its parts, as GGUF files carry them.

use super::{Tokenizer, TokenizerError, guarded};
use crate::chat::ChatTemplate;
use serde_json::{Value, json};
use std::sync::Arc;

/// What a GGUF file says of its tokenizer.
#[derive(Clone, Debug, Default)]
pub struct BpeParts {
    /// Tokens in the order of their ids, bytes written as GPT-2 writes them.
    pub tokens: Vec<String>,
    /// Merges, most urgent first.
    pub merges: Vec<(String, String)>,
    /// Ids of special tokens: recognised whole, left out of decoded text.
    pub special: Vec<u32>,
    /// Name of the pre-tokenisation (`tokenizer.ggml.pre`).
    pub pre: String,
    /// Beginning-of-text token.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Whether prompts begin with `bos`.
    pub adds_bos: bool,
    /// Jinja of the chat template.
    pub chat_template: Option<String>,
}

/// Words, runs of at most three digits, runs of other characters (Llama 3).
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits (Qwen2).
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn pre_tokenizer(name: &str) -> Option<Value> {
    let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let split = |regex: &str| {
        let pattern = json!({ "Regex": regex });
        json!({ "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false })
    };
    let both = |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
    Some(match name {
        "" | "default" | "gpt-2" | "gpt2" => bytes(true),
        "smollm" => both(json!({ "type": "Digits", "individual_digits": true }), bytes(true)),
        "llama-bpe" | "llama3" | "llama-v3" => both(split(LLAMA3), bytes(false)),
        "qwen2" | "deepseek-r1-qwen" => both(split(QWEN2), bytes(false)),
        _ => return None,
    })
}

impl Tokenizer {
    /// Put a tokenizer together from its parts.
    pub fn from_bpe(parts: &BpeParts) -> Result<Tokenizer, TokenizerError> {
        let wrong =
            |what: String| TokenizerError::Format { origin: "the tokenizer of the GGUF file".into(), what };
        let Some(pre) = pre_tokenizer(&parts.pre) else {
            return Err(wrong(format!("its pre-tokenisation `{}` is not supported", parts.pre)));
        };
        let vocab: serde_json::Map<String, Value> =
            parts.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        if vocab.len() != parts.tokens.len() {
            return Err(wrong("two ids have the same token".into()));
        }
        let mut added = Vec::new();
        for id in &parts.special {
            let token = parts
                .tokens
                .get(*id as usize)
                .ok_or_else(|| wrong(format!("special token {id} does not exist")))?;
            added.push(json!({ "id": id, "content": token, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false }));
        }
        let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
        let merges: Vec<_> = parts.merges.iter().map(|(a, b)| json!([a, b])).collect();
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "pre_tokenizer": pre, "post_processor": bytes, "decoder": bytes,
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": merges },
        });
        let inner = guarded(|| {
            let bytes = serde_json::to_vec(&file).map_err(|error| error.to_string())?;
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())
        });
        let template = parts.chat_template.as_deref().map(ChatTemplate::new).transpose();
        let template = template.map_err(|error| wrong(error.to_string()))?.map(Arc::new);
        Ok(Tokenizer {
            bos: parts.bos,
            eos: parts.eos.clone(),
            adds_bos: parts.adds_bos,
            template,
            ..Tokenizer::wrap(inner.map_err(wrong)?)
        })
    }
}
