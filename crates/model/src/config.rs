//! Reading `config.json` of a model folder, old spellings and new.

use crate::{Gpt2Config, LlamaConfig, MoeConfig};
use serde_json::Value;
use tensor::RopeScaling;

/// Shape and family of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// Llama 2/3, Mistral, Mixtral, Qwen2, Qwen3, their mixtures of experts, SmolLM2.
    Llama(LlamaConfig),
    /// GPT-2.
    Gpt2(Gpt2Config),
}

/// A `config.json` that does not describe a model we can build.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// `model_type` names no family we have.
    #[error(
        "model_type `{0}` is not supported; supported are llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe and gpt2"
    )]
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
    /// More ranks than experts.
    #[error(transparent)]
    FewExperts(#[from] dist::FewExperts),
    /// Ranks that would share experts, where there are none.
    #[error(
        "mesh.ep = {ranks} shares experts among ranks, and `{family}` has none; use mesh.dp for more replicas"
    )]
    NoExperts {
        /// Its `model_type`.
        family: &'static str,
        /// Ranks along `ep`.
        ranks: usize,
    },
    /// More slices than layers.
    #[error(
        "a model of {layers} layers cannot be cut into {stages} stages of {chunks} slices (mesh.pp and mesh.virtual): every slice has a layer; lower one of the two"
    )]
    Stages {
        /// Layers of the model.
        layers: usize,
        /// Ranks of the pipeline.
        stages: usize,
        /// Slices of each.
        chunks: usize,
    },
    /// A mesh the scheme has no use for.
    #[error(transparent)]
    Flow(#[from] dist::FlowError),
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

    /// The same model with other layers: the first `layers` of them, or more like the last.
    pub fn with_layers(&self, layers: usize) -> Config {
        let mut config = self.clone();
        match &mut config {
            Config::Llama(config) => {
                let last = config.windows.last().copied().flatten();
                config.windows.resize(layers, last);
                config.layers = layers;
            }
            Config::Gpt2(config) => config.layers = layers,
        }
        config
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

    /// Feed-forward width F a token meets.
    pub fn ffn(&self) -> usize {
        match self {
            Config::Llama(config) => match &config.moe {
                Some(moe) => moe.choices * moe.ffn + moe.shared_ffn.unwrap_or(0),
                None => config.ffn,
            },
            Config::Gpt2(config) => config.ffn,
        }
    }

    /// Experts of a layer; 0 where there are none.
    pub fn experts(&self) -> usize {
        self.moe().map_or(0, |moe| moe.experts)
    }

    /// The experts in the place of feed-forward parts, where there are some.
    pub fn moe(&self) -> Option<&MoeConfig> {
        match self {
            Config::Llama(config) => config.moe.as_ref(),
            Config::Gpt2(_) => None,
        }
    }

    /// Parameters of the experts a token does not go to, in all layers.
    pub fn idle_params(&self) -> usize {
        self.params_of(|moe| moe.experts - moe.choices)
    }

    /// Parameters of all experts that ranks share along `ep`, in all layers.
    pub fn expert_params(&self) -> usize {
        self.params_of(|moe| moe.experts)
    }

    fn params_of(&self, experts: impl Fn(&MoeConfig) -> usize) -> usize {
        self.moe().map_or(0, |moe| {
            let layers = (0..self.layers()).filter(|layer| moe.applies_to(*layer)).count();
            layers * experts(moe) * 3 * self.width() * moe.ffn
        })
    }

    /// Whether the feed-forward part has a gate beside its input (SwiGLU).
    pub fn gated(&self) -> bool {
        matches!(self, Config::Llama(_))
    }

    /// Whether queries and keys pass a norm of their own.
    pub fn qk_norm(&self) -> bool {
        matches!(self, Config::Llama(config) if config.qk_norm)
    }

    /// Whether the embedding is the head.
    pub fn tied(&self) -> bool {
        match self {
            Config::Llama(config) => config.tied,
            Config::Gpt2(_) => true,
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

    /// The numbers that cost depends on; layers without experts between others count as if they had some.
    pub fn shape(&self) -> dist::cost::ModelShape {
        let (heads, kv_heads, head_dim) = self.heads();
        let tied = match self {
            Config::Llama(config) => config.tied,
            Config::Gpt2(_) => true,
        };
        let mixture = self.moe().map(|moe| dist::cost::MixtureShape {
            experts: moe.experts,
            choices: moe.choices,
            ffn: moe.ffn,
            shared_ffn: moe.shared_ffn.unwrap_or(0),
        });
        dist::cost::ModelShape {
            layers: self.layers(),
            width: self.width(),
            heads,
            kv_heads,
            head_dim,
            ffn: mixture.map_or(self.ffn(), |mixture| mixture.shared_ffn),
            gated: self.gated(),
            vocab: self.vocab(),
            tied,
            mixture,
        }
    }

    /// FLOPs a token of each layer, and of the head: what slices of a pipeline are balanced by.
    pub(crate) fn layer_flops(&self, context: usize) -> (Vec<f64>, f64) {
        let per_token = |flops: crate::Flops| flops.per_token(context);
        let head = crate::Flops { matmul_params: self.vocab() * self.width(), attention_columns: 0 };
        ((0..self.layers()).map(|layer| per_token(self.layer(layer))).collect(), per_token(head))
    }

    /// What one layer counts for.
    fn layer(&self, layer: usize) -> crate::Flops {
        let ((n, k, h), d) = (self.heads(), self.width());
        let mlp = match self {
            // Of experts only those a token goes to.
            Config::Llama(config) => match config.moe.as_ref().filter(|moe| moe.applies_to(layer)) {
                Some(moe) => moe.active_params(d),
                None => 3 * d * config.ffn,
            },
            Config::Gpt2(config) => 2 * d * config.ffn,
        };
        crate::Flops { matmul_params: d * (n + 2 * k) * h + n * h * d + mlp, attention_columns: n * h }
    }

    /// What utilisation counts.
    pub fn flops(&self) -> crate::Flops {
        let head = crate::Flops { matmul_params: self.vocab() * self.width(), attention_columns: 0 };
        (0..self.layers()).fold(head, |sum, layer| {
            let layer = self.layer(layer);
            crate::Flops {
                matmul_params: sum.matmul_params + layer.matmul_params,
                attention_columns: sum.attention_columns + layer.attention_columns,
            }
        })
    }
}

/// Typed look-ups in a JSON object, with errors that name the key.
pub(crate) struct Keys<'a>(pub(crate) &'a Value);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn wrong(key: &str, found: &Value, expected: &'static str) -> ConfigError {
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
        let (limit, expected) = limit(key);
        let fits = |v: &Value| v.as_u64().filter(|n| *n <= limit).map(|n| n as usize);
        self.get(key).map(|v| fits(v).ok_or_else(|| Self::wrong(key, v, expected))).transpose()
    }

    /// A size that may be absent but not zero.
    pub(crate) fn positive(&self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        self.size(key)?.map(|size| above_zero(key, size)).transpose()
    }

    /// A number above zero that an f32 can hold.
    pub(crate) fn scale(&self, key: &str) -> Result<Option<f32>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let scale = self.number(key)?.map(|x| x as f32).filter(|x| x.is_finite() && *x > 0.0);
        scale.map(Some).ok_or_else(|| Self::wrong(key, value, "a finite number above 0"))
    }

    pub(crate) fn required(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.positive(key)?.ok_or(ConfigError::Missing(key))
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

    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>, ConfigError> {
        self.get(key).map(|v| v.as_array().ok_or_else(|| Self::wrong(key, v, "a list"))).transpose()
    }

    fn object(&self, key: &str) -> Result<Option<Keys<'a>>, ConfigError> {
        let object = |v: &'a Value| v.is_object().then_some(Keys(v));
        self.get(key).map(|v| object(v).ok_or_else(|| Self::wrong(key, v, "an object"))).transpose()
    }

    /// (theta, scaling) from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old).
    pub(crate) fn rope(&self) -> Result<(f32, RopeScaling), ConfigError> {
        let inner = match self.object("rope_parameters")? {
            Some(keys) => Some(keys),
            None => self.object("rope_scaling")?,
        };
        let nested_theta = inner.as_ref().map(|keys| keys.scale("rope_theta")).transpose()?.flatten();
        let theta = nested_theta.or(self.scale("rope_theta")?).unwrap_or(10_000.0);
        let Some(keys) = inner else { return Ok((theta, RopeScaling::None)) };
        let kind = keys.text("rope_type")?.or(keys.text("type")?).unwrap_or("default");
        let need = |key: &'static str| keys.scale(key)?.ok_or(ConfigError::Missing(key));
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need("factor")? },
            "llama3" => {
                let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
                if low >= high {
                    let remedy = format!("must be above `low_freq_factor` = {low}");
                    let (key, value) = ("high_freq_factor", high.to_string());
                    return Err(ConfigError::Unsupported { key, value, remedy });
                }
                RopeScaling::Llama3 {
                    factor: need("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_positions: keys.required("original_max_position_embeddings")?,
                }
            }
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

/// Largest value of a size. Sizes multiply: these bounds lie far above any model and keep
/// parameters, their bytes with optimizer state, and FLOPs inside 64 bits.
fn limit(key: &str) -> (u64, &'static str) {
    match key {
        "head_dim" => (1 << 10, "a whole number to 2^10"),
        "num_attention_heads"
        | "num_key_value_heads"
        | "n_head"
        | "num_experts"
        | "num_local_experts"
        | "num_experts_per_tok" => (1 << 12, "a whole number to 2^12"),
        "num_hidden_layers" | "n_layer" => (1 << 14, "a whole number to 2^14"),
        "hidden_size"
        | "intermediate_size"
        | "n_embd"
        | "n_inner"
        | "moe_intermediate_size"
        | "shared_expert_intermediate_size" => (1 << 20, "a whole number to 2^20"),
        _ => (1 << 31, "a whole number to 2^31"),
    }
}

fn above_zero(key: &'static str, size: usize) -> Result<usize, ConfigError> {
    match size {
        0 => Err(ConfigError::Unsupported { key, value: "0".into(), remedy: "must be positive".into() }),
        size => Ok(size),
    }
}
