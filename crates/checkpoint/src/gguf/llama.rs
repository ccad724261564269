//! A GGUF of the llama family seen as a Hugging Face folder: config, names, order of rows, tokenizer.
//!
//! Source: llama.cpp, convert_hf_to_gguf.py and gguf-py/gguf/constants.py, read backwards.

use super::{Gguf, Value};
use crate::weights::{Rows, WeightError, Weights};
use serde_json::{Map, json};
use std::collections::BTreeMap;

/// A tokenizer as a GGUF stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTokenizer {
    /// `gpt2` (byte-level BPE) or `llama` (sentencepiece).
    pub model: String,
    /// Name of the pre-tokenizer, empty if the file has none.
    pub pre: String,
    /// Tokens by id.
    pub tokens: Vec<String>,
    /// Scores by id; only sentencepiece vocabularies have them.
    pub scores: Vec<f32>,
    /// Pairs in the order of their rank.
    pub merges: Vec<(String, String)>,
    /// Types by id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// Unknown.
    pub unk: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Whether every sequence starts with `bos`.
    pub add_bos: bool,
    /// Jinja template of a conversation.
    pub chat_template: Option<String>,
}

/// The tensors outside layers: Hugging Face name, GGUF name.
const OUTER: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// The tensors of a layer, without `.weight` or `.bias`.
const LAYER: [(&str, &str); 11] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];

/// Hugging Face name of a GGUF tensor.
fn hf_name(gguf: &str) -> Option<String> {
    if let Some((hf, _)) = OUTER.iter().find(|(_, name)| *name == gguf) {
        return Some(hf.to_string());
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let (stem, kind) = rest.rsplit_once('.')?;
    // Only the plain spelling of a number, or two tensors could claim one name.
    let number = layer.parse::<u32>().ok().filter(|number| number.to_string() == layer)?;
    let (hf, _) = LAYER.iter().find(|(_, name)| *name == stem)?;
    matches!(kind, "weight" | "bias").then(|| format!("model.layers.{number}.{hf}.{kind}"))
}

/// The decimal a person would write for a stored f32: 1e-5, not 9.999999747378752e-6.
fn short(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

impl Gguf {
    fn wrong(&self, key: &str, what: impl Into<String>) -> WeightError {
        let path = self.weights.path().to_path_buf();
        WeightError::Metadata { path, key: key.to_string(), what: what.into() }
    }

    /// A required positive whole number, at most 2^31.
    fn size(&self, key: &str) -> Result<usize, WeightError> {
        match self.metadata.get(key) {
            None => Err(self.wrong(key, "is missing; is the file a language model?")),
            Some(value) => match value.as_u64() {
                Some(n) if (1..=1 << 31).contains(&n) => Ok(n as usize),
                _ => Err(self.wrong(key, "is no positive whole number below 2^31")),
            },
        }
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, WeightError> {
        self.metadata.get(key).map(|_| self.size(key)).transpose()
    }

    fn float(&self, key: &str) -> Result<Option<f32>, WeightError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match value.as_f64().map(|value| value as f32) {
            Some(value) if value.is_finite() && value > 0.0 => Ok(Some(value)),
            _ => Err(self.wrong(key, "is no positive number")),
        }
    }

    /// `general.architecture`, one of those we know.
    fn architecture(&self) -> Result<&str, WeightError> {
        let key = "general.architecture";
        match self.metadata.get_str(key) {
            Some(name @ ("llama" | "qwen2" | "qwen3")) => Ok(name),
            Some(name) => Err(self.wrong(key, format!("is {name:?}; supported are llama, qwen2 and qwen3"))),
            None => Err(self.wrong(key, "is missing; is the file a language model?")),
        }
    }

    /// (query heads, kv heads, head dim H).
    fn heads(&self, arch: &str) -> Result<(usize, usize, usize), WeightError> {
        let heads = self.size(&format!("{arch}.attention.head_count"))?;
        let kv_heads = self.optional_size(&format!("{arch}.attention.head_count_kv"))?.unwrap_or(heads);
        let key = format!("{arch}.attention.key_length");
        let head_dim = match self.optional_size(&key)? {
            Some(size) => size,
            None => self.size(&format!("{arch}.embedding_length"))? / heads,
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(
                self.wrong(&key, format!("makes heads of {head_dim}; they must be even and positive"))
            );
        }
        Ok((heads, kv_heads, head_dim))
    }

    /// Rows of the embedding, else what the metadata say.
    fn vocab(&self, arch: &str) -> Result<usize, WeightError> {
        if let Some(&[rows, _]) = self.weights.find("token_embd.weight").map(|info| info.shape.as_slice()) {
            return Ok(rows);
        }
        let key = format!("{arch}.vocab_size");
        match (self.optional_size(&key)?, self.metadata.get_array("tokenizer.ggml.tokens")) {
            (Some(size), _) => Ok(size),
            (None, Some(tokens)) => Ok(tokens.len()),
            (None, None) => Err(self.wrong(&key, "is missing, and so are the embedding and the tokens")),
        }
    }

    fn rope_scaling(&self, arch: &str) -> Result<Option<serde_json::Value>, WeightError> {
        if self.weights.find("rope_freqs.weight").is_some() {
            let what = "holds Llama 3.1 frequency factors, from which the scaling cannot be told; use the model's safetensors folder";
            return Err(self.wrong("rope_freqs.weight", what));
        }
        let key = format!("{arch}.rope.scaling.type");
        match self.metadata.get_str(&key) {
            None | Some("none") => Ok(None),
            Some("linear") => {
                let key = format!("{arch}.rope.scaling.factor");
                let factor = self.float(&key)?.ok_or_else(|| self.wrong(&key, "is missing"))?;
                Ok(Some(json!({ "rope_type": "linear", "factor": short(factor) })))
            }
            Some(kind) => Err(self.wrong(&key, format!("is {kind:?}; supported are none and linear"))),
        }
    }

    /// What `config.json` of the same model would say. For architectures llama, qwen2 and qwen3.
    pub fn config_json(&self) -> Result<serde_json::Value, WeightError> {
        let arch = self.architecture()?;
        let key = |rest: &str| format!("{arch}.{rest}");
        if self.metadata.get_u32(&key("expert_count")).is_some_and(|experts| experts > 0) {
            return Err(
                self.wrong(&key("expert_count"), "makes it a mixture of experts, which is not supported")
            );
        }
        let class = match arch {
            "llama" => "LlamaForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            _ => "Qwen3ForCausalLM",
        };
        let (heads, kv_heads, head_dim) = self.heads(arch)?;
        let eps = key("attention.layer_norm_rms_epsilon");
        let eps = self.float(&eps)?.ok_or_else(|| self.wrong(&eps, "is missing"))?;
        let theta = self.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        let biased = self.weights.find("blk.0.attn_q.bias").is_some();
        let mut config = Map::new();
        let mut set = |name: &str, value: serde_json::Value| config.insert(name.to_string(), value);
        set("architectures", json!([class]));
        set("model_type", json!(arch));
        set("hidden_size", json!(self.size(&key("embedding_length"))?));
        set("intermediate_size", json!(self.size(&key("feed_forward_length"))?));
        set("num_hidden_layers", json!(self.size(&key("block_count"))?));
        set("num_attention_heads", json!(heads));
        set("num_key_value_heads", json!(kv_heads));
        set("head_dim", json!(head_dim));
        set("hidden_act", json!("silu"));
        set("rms_norm_eps", json!(short(eps)));
        set("rope_theta", json!(short(theta)));
        if let Some(scaling) = self.rope_scaling(arch)? {
            set("rope_scaling", scaling);
        }
        set("max_position_embeddings", json!(self.size(&key("context_length"))?));
        set("vocab_size", json!(self.vocab(arch)?));
        set("tie_word_embeddings", json!(self.weights.find("output.weight").is_none()));
        set("attention_bias", json!(biased));
        for (name, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(id) = self.metadata.get_u32(&format!("tokenizer.ggml.{key}_token_id")) {
                set(name, json!(id));
            }
        }
        Ok(serde_json::Value::Object(config))
    }

    /// Hugging Face name to GGUF name, of every tensor that has one.
    pub fn hf_name_map(&self) -> BTreeMap<String, String> {
        let named = |name: &str| hf_name(name).map(|hf| (hf, name.to_string()));
        self.weights.infos().iter().filter_map(|info| named(&info.name)).collect()
    }

    /// The tensors under their Hugging Face names and with Hugging Face's order of rows, so that a
    /// loader reads a GGUF as it reads a folder. Llama files have the rows of q and k interleaved.
    pub fn hf_weights(&self) -> Result<Weights, WeightError> {
        let arch = self.architecture()?;
        let (_, _, head) = self.heads(arch)?;
        let interleaved =
            |name: &str| arch == "llama" && (name.contains(".q_proj.") || name.contains(".k_proj."));
        for info in self.weights.infos() {
            let rows = info.shape.first().copied().unwrap_or(0);
            if hf_name(&info.name).is_some_and(|name| interleaved(&name)) && !rows.is_multiple_of(head) {
                return Err(
                    self.wrong(&info.name, format!("has {rows} rows, no multiple of heads of {head}"))
                );
            }
        }
        Ok(self.weights.renamed(|info| {
            let name = hf_name(&info.name)?;
            let rows = if interleaved(&name) { Rows::Interleaved { head } } else { Rows::InOrder };
            Some((name, rows))
        }))
    }

    /// All elements of a tensor by its Hugging Face name, in Hugging Face's order.
    pub fn read_hf_f32(&self, hf_name: &str) -> Result<Vec<f32>, WeightError> {
        self.hf_weights()?.read_f32(hf_name)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Result<GgufTokenizer, WeightError> {
        let text = |key: &str| self.metadata.get_str(key).map(str::to_string);
        let id = |name: &str| self.metadata.get_u32(&format!("tokenizer.ggml.{name}_token_id"));
        let list = |key: &str| self.metadata.get_array(key).and_then(|list| list.as_text());
        let model = "tokenizer.ggml.model";
        let model = text(model).ok_or_else(|| self.wrong(model, "is missing; give the tokenizer apart"))?;
        let tokens = "tokenizer.ggml.tokens";
        let tokens = list(tokens).ok_or_else(|| self.wrong(tokens, "is no list of strings"))?.to_vec();
        let key = "tokenizer.ggml.merges";
        let merges = list(key).unwrap_or_default().iter().map(|merge| {
            // A part may itself start with a space, so the first character is never the separator.
            let skip = merge.chars().next().map_or(0, char::len_utf8);
            let at = merge[skip..].find(' ').map(|at| at + skip);
            let at = at.ok_or_else(|| self.wrong(key, format!("holds {merge:?}, which is no pair")))?;
            Ok((merge[..at].to_string(), merge[at + 1..].to_string()))
        });
        let merges = merges.collect::<Result<_, WeightError>>()?;
        let numbers = |key: &str| -> Result<Vec<Value>, WeightError> {
            let Some(list) = self.metadata.get_array(key) else { return Ok(Vec::new()) };
            match list.values() {
                Some(values) if list.len() == tokens.len() => Ok(values.collect()),
                Some(_) => {
                    Err(self.wrong(key, format!("has {} items for {} tokens", list.len(), tokens.len())))
                }
                None => Err(self.wrong(key, "is no list of numbers")),
            }
        };
        let types = numbers("tokenizer.ggml.token_type")?;
        let scores = numbers("tokenizer.ggml.scores")?;
        let add_bos = self.metadata.get_bool("tokenizer.ggml.add_bos_token").unwrap_or(model == "llama");
        Ok(GgufTokenizer {
            pre: text("tokenizer.ggml.pre").unwrap_or_default(),
            merges,
            token_types: types
                .iter()
                .map(|v| v.as_i64().and_then(|n| n.try_into().ok()).unwrap_or(1))
                .collect(),
            scores: scores.iter().map(|v| v.as_f64().unwrap_or(0.0) as f32).collect(),
            bos: id("bos"),
            eos: id("eos"),
            unk: id("unknown"),
            pad: id("padding"),
            add_bos,
            chat_template: text("tokenizer.chat_template"),
            model,
            tokens,
        })
    }
}
