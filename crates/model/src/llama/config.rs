//! Sizes and switches of the Llama family, to and from `config.json`.

use super::MoeConfig;
use crate::ConfigError;
use crate::config::Keys;
use serde_json::{Value, json};
use tensor::RopeScaling;

/// Which relative a config describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral: sliding window.
    Mistral,
    /// Qwen2: biases on q, k, v.
    Qwen2,
    /// Qwen3: norms on q and k heads.
    Qwen3,
    /// Mixtral: experts in every layer.
    Mixtral,
    /// Qwen2 with experts, one of them shared.
    Qwen2Moe,
    /// Qwen3 with experts.
    Qwen3Moe,
}

impl Family {
    /// `model_type` in `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Mixtral => "mixtral",
            Family::Qwen2Moe => "qwen2_moe",
            Family::Qwen3Moe => "qwen3_moe",
        }
    }

    const fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Mixtral => "MixtralForCausalLM",
            Family::Qwen2Moe => "Qwen2MoeForCausalLM",
            Family::Qwen3Moe => "Qwen3MoeForCausalLM",
        }
    }
}

/// Sizes and switches of a Llama-style model.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Which relative.
    pub family: Family,
    /// Vocabulary V.
    pub vocab: usize,
    /// Width D.
    pub width: usize,
    /// Layers L.
    pub layers: usize,
    /// Query heads N.
    pub heads: usize,
    /// Key and value heads K.
    pub kv_heads: usize,
    /// Head dim H.
    pub head_dim: usize,
    /// FFN width F.
    pub ffn: usize,
    /// Added to the mean square in norms.
    pub eps: f32,
    /// Base of the rotary angles.
    pub rope_theta: f32,
    /// Stretching of the rotary angles for long contexts.
    pub rope_scaling: RopeScaling,
    /// Longest sequence, in tokens.
    pub max_positions: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub out_bias: bool,
    /// Norms on q and k heads.
    pub qk_norm: bool,
    /// Sliding window in tokens, per layer; empty when no layer has one.
    pub windows: Vec<Option<usize>>,
    /// Experts in the place of the feed-forward part.
    pub moe: Option<MoeConfig>,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Token that ends a text.
    pub eos: Option<u32>,
}

impl LlamaConfig {
    pub(crate) fn from_keys(family: &str, keys: &Keys<'_>) -> Result<LlamaConfig, ConfigError> {
        let family = match family {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "mixtral" => Family::Mixtral,
            "qwen2_moe" => Family::Qwen2Moe,
            "qwen3_moe" => Family::Qwen3Moe,
            other => return Err(ConfigError::UnknownFamily(other.to_string())),
        };
        let (width, heads) = (keys.required("hidden_size")?, keys.required("num_attention_heads")?);
        let layers = keys.required("num_hidden_layers")?;
        let head_dim = match keys.positive("head_dim")? {
            Some(dim) => dim,
            None if width.is_multiple_of(heads) => width / heads,
            None => return Err(indivisible("hidden_size", width, "num_attention_heads", heads)),
        };
        let kv_heads = keys.positive("num_key_value_heads")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(indivisible("num_attention_heads", heads, "num_key_value_heads", kv_heads));
        }
        if !head_dim.is_multiple_of(2) {
            let remedy = "rotary positions need an even head dim".to_string();
            return Err(ConfigError::Unsupported { key: "head_dim", value: head_dim.to_string(), remedy });
        }
        check_activation(keys)?;
        let (rope_theta, rope_scaling) = keys.rope()?;
        let biased = match family {
            Family::Qwen2 => true,
            Family::Qwen2Moe => keys.flag("qkv_bias")?.unwrap_or(true),
            _ => false,
        };
        let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
        if keys.flag("mlp_bias")?.unwrap_or(false) {
            let remedy = "biases in the MLP are not supported".to_string();
            return Err(ConfigError::Unsupported { key: "mlp_bias", value: "true".into(), remedy });
        }
        Ok(LlamaConfig {
            family,
            vocab: keys.required("vocab_size")?,
            width,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn: keys.required("intermediate_size")?,
            eps: keys.scale("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            max_positions: keys.positive("max_position_embeddings")?.unwrap_or(2048),
            tied: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: biased || attention_bias,
            out_bias: !biased && attention_bias,
            qk_norm: matches!(family, Family::Qwen3 | Family::Qwen3Moe),
            windows: windows(family, layers, keys)?,
            moe: MoeConfig::from_keys(family, keys, layers)?,
            bos: keys.token("bos_token_id")?,
            eos: keys.token("eos_token_id")?,
        })
    }

    /// Sliding window of a layer, in tokens.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    pub(crate) fn to_json(&self, dtype: &str) -> Value {
        let mut json = json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.name(),
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": tidy(self.eps),
            "rope_theta": tidy(self.rope_theta),
            "attention_bias": self.qkv_bias && !matches!(self.family, Family::Qwen2 | Family::Qwen2Moe),
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
            "torch_dtype": dtype,
            "use_cache": true,
        });
        json["rope_scaling"] = match &self.rope_scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": tidy(*factor)}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                json!({
                    "rope_type": "llama3",
                    "factor": tidy(*factor),
                    "low_freq_factor": tidy(*low_freq_factor),
                    "high_freq_factor": tidy(*high_freq_factor),
                    "original_max_position_embeddings": original_max_positions,
                })
            }
        };
        if let Some(moe) = &self.moe {
            moe.write(self.family, &mut json);
        }
        if self.family == Family::Qwen2Moe {
            json["qkv_bias"] = json!(self.qkv_bias);
        }
        let window = self.windows.iter().copied().flatten().next();
        match self.family {
            Family::Llama => {}
            Family::Mistral | Family::Mixtral => json["sliding_window"] = json!(window),
            Family::Qwen2 | Family::Qwen3 | Family::Qwen2Moe | Family::Qwen3Moe => {
                json["use_sliding_window"] = json!(window.is_some());
                json["sliding_window"] = json!(window);
                // Older readers know only a first layer from which all slide.
                let whole = self.windows.iter().take_while(|window| window.is_none()).count();
                json["max_window_layers"] = json!(whole.min(self.layers));
                if window.is_some() {
                    let kind = |layer| match self.window_of(layer) {
                        Some(_) => "sliding_attention",
                        None => "full_attention",
                    };
                    json["layer_types"] = (0..self.layers).map(kind).collect();
                }
            }
        }
        json
    }
}

/// An f32 as the short decimal people write, not as the nearest f64.
pub(super) fn tidy(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x as f64)
}

fn indivisible(key: &'static str, value: usize, by: &str, divisor: usize) -> ConfigError {
    ConfigError::Unsupported {
        key,
        value: value.to_string(),
        remedy: format!("must be a multiple of `{by}` = {divisor}"),
    }
}

fn check_activation(keys: &Keys<'_>) -> Result<(), ConfigError> {
    match keys.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(()),
        other => Err(ConfigError::Unsupported {
            key: "hidden_act",
            value: other.to_string(),
            remedy: "this family uses silu".into(),
        }),
    }
}

fn windows(family: Family, layers: usize, keys: &Keys<'_>) -> Result<Vec<Option<usize>>, ConfigError> {
    // Qwen2-MoE writes 0 for none.
    if family == Family::Qwen2Moe && keys.size("sliding_window")? == Some(0) {
        return Ok(Vec::new());
    }
    let Some(window) = keys.positive("sliding_window")? else { return Ok(Vec::new()) };
    if let Some(types) = keys.list("layer_types")? {
        if types.len() != layers {
            let remedy = format!("must name a kind for each of the {layers} layers");
            let value = format!("{} kinds", types.len());
            return Err(ConfigError::Unsupported { key: "layer_types", value, remedy });
        }
        return types.iter().map(|kind| window_of_kind(kind, window)).collect();
    }
    let first = match family {
        Family::Llama => return Ok(Vec::new()),
        Family::Mistral | Family::Mixtral => 0,
        _ if keys.flag("use_sliding_window")?.unwrap_or(false) => {
            keys.size("max_window_layers")?.unwrap_or(28)
        }
        _ => return Ok(Vec::new()),
    };
    Ok((0..layers).map(|i| (i >= first).then_some(window)).collect())
}

fn window_of_kind(kind: &Value, window: usize) -> Result<Option<usize>, ConfigError> {
    match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => Ok(Some(window)),
        _ => Err(Keys::wrong("layer_types", kind, "full_attention or sliding_attention")),
    }
}
