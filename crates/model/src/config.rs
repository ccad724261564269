//! Reading `config.json` of a model folder, old spellings and new.

use crate::{Gpt2Config, LlamaConfig};
use serde_json::Value;
use tensor::RopeScaling;

/// Shape and family of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// Llama 2/3, Mistral, Qwen2, Qwen3, SmolLM2.
    Llama(LlamaConfig),
    /// GPT-2.
    Gpt2(Gpt2Config),
}

/// A `config.json` that does not describe a model we can build.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// `model_type` names no family we have.
    #[error("model_type `{0}` is not supported; supported are llama, mistral, qwen2, qwen3 and gpt2")]
    UnknownFamily(String),
    /// A key is absent.
    #[error("config.json has no `{0}`; is it the config of a causal language model?")]
    Missing(&'static str),
    /// A key holds something else than expected.
    #[error("config.json: `{key}` is {found}, expected {expected}")]
    WrongType {
        /// Which key.
        key: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// A key holds a value we cannot build.
    #[error("config.json: `{key}` = {value}: {remedy}")]
    Unsupported {
        /// Which key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        remedy: String,
    },
    /// Layouts that do not multiply.
    #[error(transparent)]
    Layout(#[from] dist::LayoutError),
}

impl Config {
    /// From the text of a `config.json`, parsed.
    pub fn from_json(json: &Value) -> Result<Config, ConfigError> {
        let keys = Keys(json);
        match keys.text("model_type")?.ok_or(ConfigError::Missing("model_type"))? {
            "gpt2" => Ok(Config::Gpt2(Gpt2Config::from_keys(&keys)?)),
            family => Ok(Config::Llama(LlamaConfig::from_keys(family, &keys)?)),
        }
    }

    /// A `config.json` that `transformers` reads.
    pub fn to_json(&self, dtype: &str) -> Value {
        match self {
            Config::Llama(config) => config.to_json(dtype),
            Config::Gpt2(config) => config.to_json(dtype),
        }
    }

    /// Vocabulary size V.
    pub fn vocab(&self) -> usize {
        match self {
            Config::Llama(config) => config.vocab,
            Config::Gpt2(config) => config.vocab,
        }
    }

    /// Layers L.
    pub fn layers(&self) -> usize {
        match self {
            Config::Llama(config) => config.layers,
            Config::Gpt2(config) => config.layers,
        }
    }

    /// Model width D.
    pub fn width(&self) -> usize {
        match self {
            Config::Llama(config) => config.width,
            Config::Gpt2(config) => config.width,
        }
    }

    /// (query heads N, kv heads K, head dim H).
    pub fn heads(&self) -> (usize, usize, usize) {
        match self {
            Config::Llama(config) => (config.heads, config.kv_heads, config.head_dim),
            Config::Gpt2(config) => (config.heads, config.heads, config.width / config.heads),
        }
    }

    /// Longest sequence the model was made for, in tokens.
    pub fn max_positions(&self) -> usize {
        match self {
            Config::Llama(config) => config.max_positions,
            Config::Gpt2(config) => config.max_positions,
        }
    }

    /// Family name as users know it.
    pub fn family(&self) -> &'static str {
        match self {
            Config::Llama(config) => config.family.name(),
            Config::Gpt2(_) => "gpt2",
        }
    }

    /// What utilisation counts.
    pub fn flops(&self) -> crate::Flops {
        let (n, k, h) = self.heads();
        let (layers, d) = (self.layers(), self.width());
        let mlp = match self {
            Config::Llama(config) => 3 * d * config.ffn,
            Config::Gpt2(config) => 2 * d * config.ffn,
        };
        let attention = d * (n + 2 * k) * h + n * h * d;
        crate::Flops {
            matmul_params: layers * (attention + mlp) + self.vocab() * d,
            attention_columns: layers * n * h,
        }
    }
}

/// Typed look-ups in a JSON object, with errors that name the key.
pub(crate) struct Keys<'a>(pub(crate) &'a Value);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(key: &str, found: &Value, expected: &'static str) -> ConfigError {
        let mut found = found.to_string();
        if found.len() > 60 {
            found = found.chars().take(57).collect::<String>() + "...";
        }
        ConfigError::WrongType { key: key.to_string(), found, expected }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| Self::wrong(key, v, "a string"))).transpose()
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.get(key).map(|v| v.as_bool().ok_or_else(|| Self::wrong(key, v, "true or false"))).transpose()
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| Self::wrong(key, v, "a number"))).transpose()
    }

    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        // Sizes multiply: a limit far above any model keeps every product inside 64 bits.
        let fits = |v: &Value| v.as_u64().filter(|n| *n <= 1 << 31).map(|n| n as usize);
        self.get(key)
            .map(|v| fits(v).ok_or_else(|| Self::wrong(key, v, "a whole number below 2^31")))
            .transpose()
    }

    pub(crate) fn required(&self, key: &'static str) -> Result<usize, ConfigError> {
        match self.size(key)?.ok_or(ConfigError::Missing(key))? {
            0 => Err(ConfigError::Unsupported { key, value: "0".into(), remedy: "must be positive".into() }),
            size => Ok(size),
        }
    }

    /// `eos_token_id` and its like: a number or a list of numbers, of which the first counts.
    pub(crate) fn token(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        self.get(key)
            .map(|v| {
                let first = v.as_array().and_then(|list| list.first()).unwrap_or(v);
                one(first).ok_or_else(|| Self::wrong(key, v, "a token id"))
            })
            .transpose()
    }

    pub(crate) fn list(&self, key: &str) -> Option<&'a Vec<Value>> {
        self.get(key).and_then(Value::as_array)
    }

    /// (theta, scaling) from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old).
    pub(crate) fn rope(&self) -> Result<(f32, RopeScaling), ConfigError> {
        let nested = self.get("rope_parameters").or_else(|| self.get("rope_scaling"));
        let inner = nested.map(Keys);
        let nested_theta = inner.as_ref().map(|keys| keys.number("rope_theta")).transpose()?.flatten();
        let theta = nested_theta.or(self.number("rope_theta")?).unwrap_or(10_000.0) as f32;
        let Some(keys) = inner else { return Ok((theta, RopeScaling::None)) };
        let kind = keys.text("rope_type")?.or(keys.text("type")?).unwrap_or("default");
        let need = |key: &'static str| keys.number(key)?.ok_or(ConfigError::Missing(key));
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need("factor")? as f32 },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")? as f32,
                low_freq_factor: need("low_freq_factor")? as f32,
                high_freq_factor: need("high_freq_factor")? as f32,
                original_max_positions: need("original_max_position_embeddings")? as usize,
            },
            other => {
                return Err(ConfigError::Unsupported {
                    key: "rope_type",
                    value: other.to_string(),
                    remedy: "supported are default, linear and llama3".into(),
                });
            }
        };
        Ok((theta, scaling))
    }
}
