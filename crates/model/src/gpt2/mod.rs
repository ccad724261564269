//! GPT-2: LayerNorm, learnt positions, GELU, biases everywhere, tied head.

use crate::config::Keys;
use crate::layers::{LinearSpec, attend, vector};
use crate::names::{Builder, Place};
use crate::{ConfigError, Linear, Recompute, Tokens};
use dist::Mesh;
use serde_json::{Value, json};
use tensor::{AttentionShape, Fault, GeluKind, Init, KvCache, Norm, ParamRef, ParamSpec, Tape, Var};

const INIT_STD: f32 = 0.02;

/// Sizes of a GPT-2 model.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    /// Vocabulary V.
    pub vocab: usize,
    /// Width D.
    pub width: usize,
    /// Layers L.
    pub layers: usize,
    /// Heads N.
    pub heads: usize,
    /// FFN width F.
    pub ffn: usize,
    /// Longest sequence, in tokens.
    pub max_positions: usize,
    /// Added to the variance in norms.
    pub eps: f32,
    /// Exact GELU (`gelu`) or its tanh approximation (`gelu_new`).
    pub exact_gelu: bool,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Token that ends a text.
    pub eos: Option<u32>,
}

impl Gpt2Config {
    pub(crate) fn from_keys(keys: &Keys<'_>) -> Result<Gpt2Config, ConfigError> {
        let (width, heads) = (keys.required("n_embd")?, keys.required("n_head")?);
        if !width.is_multiple_of(heads) {
            let remedy = format!("must be a multiple of `n_head` = {heads}");
            return Err(ConfigError::Unsupported { key: "n_embd", value: width.to_string(), remedy });
        }
        let exact_gelu = match keys.text("activation_function")?.unwrap_or("gelu_new") {
            "gelu_new" | "gelu_pytorch_tanh" => false,
            "gelu" => true,
            other => {
                let remedy = "supported are gelu_new, gelu_pytorch_tanh and gelu".to_string();
                let value = other.to_string();
                return Err(ConfigError::Unsupported { key: "activation_function", value, remedy });
            }
        };
        check_switches(keys)?;
        Ok(Gpt2Config {
            vocab: keys.required("vocab_size")?,
            width,
            layers: keys.required("n_layer")?,
            heads,
            ffn: keys.positive("n_inner")?.unwrap_or(4 * width),
            max_positions: keys.required("n_positions")?,
            eps: keys.scale("layer_norm_epsilon")?.unwrap_or(1e-5),
            exact_gelu,
            bos: keys.token("bos_token_id")?,
            eos: keys.token("eos_token_id")?,
        })
    }

    pub(crate) fn to_json(&self, dtype: &str) -> Value {
        json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.ffn,
            "n_positions": self.max_positions,
            "layer_norm_epsilon": self.eps.to_string().parse::<f64>().unwrap_or(self.eps as f64),
            "activation_function": if self.exact_gelu { "gelu" } else { "gelu_new" },
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": true,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
            "torch_dtype": dtype,
            "use_cache": true,
        })
    }
}

/// Switches that change what is computed and that only their usual value is built for.
fn check_switches(keys: &Keys<'_>) -> Result<(), ConfigError> {
    let switches = [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
        ("tie_word_embeddings", true),
    ];
    for (key, usual) in switches {
        if keys.flag(key)?.unwrap_or(usual) != usual {
            let (value, remedy) = ((!usual).to_string(), format!("only {usual} is supported"));
            return Err(ConfigError::Unsupported { key, value, remedy });
        }
    }
    Ok(())
}

/// A GPT-2 decoder.
#[derive(Clone)]
pub struct Gpt2 {
    layers: usize,
    tokens: ParamRef,
    positions: ParamRef,
    blocks: Vec<Block>,
    norm: Norm,
}

#[derive(Clone)]
struct Block {
    layer: usize,
    attention_norm: Norm,
    qkv: Linear,
    out: Linear,
    mlp_norm: Norm,
    up: Linear,
    down: Linear,
    heads: usize,
    head_dim: usize,
    gelu: GeluKind,
}

impl Gpt2 {
    pub(crate) fn build(
        config: &Gpt2Config,
        context: usize,
        mesh: &Mesh,
        builder: &mut Builder,
    ) -> Result<Gpt2, ConfigError> {
        if context > config.max_positions {
            return Err(ConfigError::Unsupported {
                key: "n_positions",
                value: config.max_positions.to_string(),
                remedy: format!(
                    "shorter than the {context} tokens asked for; learnt positions do not stretch"
                ),
            });
        }
        let table = |builder: &mut Builder, ours: &str, theirs: &str, rows: usize, decay: bool| {
            let shape = vec![rows, config.width];
            let init = Init::Normal(INIT_STD);
            let spec = ParamSpec { name: ours.into(), shape: shape.clone(), init, decay };
            builder.whole(spec, format!("transformer.{theirs}.weight"), shape)
        };
        let tokens = table(builder, "embedding", "wte", config.vocab, true);
        let positions = table(builder, "positions", "wpe", config.max_positions, false);
        let blocks = (0..config.layers)
            .map(|layer| Block::build(config, layer, mesh, builder))
            .collect::<Result<_, _>>()?;
        let norm = layer_norm(builder, "norm", "transformer.ln_f", config);
        Ok(Gpt2 { layers: config.layers, tokens, positions, blocks, norm })
    }

    fn embed(&self, tape: &mut Tape<'_>, tokens: &Tokens) -> Result<Var, Fault> {
        tape.set_layer(0);
        tape.embedding(&[(tokens.ids.clone(), self.tokens), (tokens.positions.clone(), self.positions)])
    }

    pub(crate) fn hidden(
        &self,
        tape: &mut Tape<'_>,
        tokens: &Tokens,
        recompute: Recompute,
    ) -> Result<Var, Fault> {
        let mut x = self.embed(tape, tokens)?;
        for block in &self.blocks {
            tape.set_layer(block.layer);
            let shape = block.attention_shape(tokens);
            x = if recompute.applies_to(block.layer) {
                let block = block.clone();
                tape.recompute(&x, move |tape, x| block.forward(tape, x, &shape, None))?
            } else {
                block.forward(tape, &x, &shape, None)?
            };
        }
        tape.set_layer(self.layers);
        tape.norm(&x, self.norm)
    }

    pub(crate) fn hidden_cached(
        &self,
        tape: &mut Tape<'_>,
        tokens: &Tokens,
        caches: &mut [KvCache],
    ) -> Result<Var, Fault> {
        let mut x = self.embed(tape, tokens)?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            tape.set_layer(block.layer);
            x = block.forward(tape, &x, &block.attention_shape(tokens), Some(cache))?;
        }
        tape.norm(&x, self.norm)
    }

    pub(crate) fn head(&self) -> ParamRef {
        self.tokens
    }
}

fn layer_norm(builder: &mut Builder, ours: &str, theirs: &str, config: &Gpt2Config) -> Norm {
    let d = config.width;
    let weight = vector(builder, format!("{ours}.weight"), format!("{theirs}.weight"), d, Init::Ones);
    let bias = vector(builder, format!("{ours}.bias"), format!("{theirs}.bias"), d, Init::Zeros);
    Norm::Layer { weight, bias, eps: config.eps }
}

impl Block {
    fn build(
        config: &Gpt2Config,
        layer: usize,
        mesh: &Mesh,
        builder: &mut Builder,
    ) -> Result<Block, ConfigError> {
        let (d, f) = (config.width, config.ffn);
        let stored = format!("transformer.h.{layer}");
        let linear = |builder: &mut Builder, ours: &str, theirs: &str, inputs, outputs, std| {
            let spec = LinearSpec {
                name: format!("layers.{layer}.{ours}"),
                inputs,
                outputs,
                bias: true,
                std,
                parts: &[(format!("{stored}.{theirs}"), outputs)],
                place: Place::Transposed,
            };
            Linear::build(&spec, mesh, builder)
        };
        let residual_std = INIT_STD / (2.0 * config.layers as f32).sqrt();
        let norm = |builder: &mut Builder, ours: &str, theirs: &str| {
            layer_norm(builder, &format!("layers.{layer}.{ours}"), &format!("{stored}.{theirs}"), config)
        };
        Ok(Block {
            layer,
            attention_norm: norm(builder, "attention_norm", "ln_1"),
            qkv: linear(builder, "qkv", "attn.c_attn", d, 3 * d, INIT_STD)?,
            out: linear(builder, "out", "attn.c_proj", d, d, residual_std)?,
            mlp_norm: norm(builder, "mlp_norm", "ln_2"),
            up: linear(builder, "up", "mlp.c_fc", d, f, INIT_STD)?,
            down: linear(builder, "down", "mlp.c_proj", f, d, residual_std)?,
            heads: config.heads,
            head_dim: d / config.heads,
            gelu: if config.exact_gelu { GeluKind::Erf } else { GeluKind::Tanh },
        })
    }

    fn attention_shape(&self, tokens: &Tokens) -> AttentionShape {
        AttentionShape {
            b: tokens.b,
            n: self.heads,
            k: self.heads,
            h: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: None,
            rope: None,
            positions: tokens.positions.clone(),
            starts: tokens.starts.clone(),
        }
    }

    /// x [M, D] -> [M, D].
    fn forward(
        &self,
        tape: &mut Tape<'_>,
        x: &Var,
        shape: &AttentionShape,
        cache: Option<&mut KvCache>,
    ) -> Result<Var, Fault> {
        let h = tape.norm(x, self.attention_norm)?;
        let qkv = self.qkv.forward(tape, &h, None)?;
        drop(h);
        let attended = attend(tape, qkv, shape, cache)?;
        let x = self.out.forward(tape, &attended, Some(x))?;
        let h = tape.norm(&x, self.mlp_norm)?;
        let act = tape.linear_gelu(&h, self.up.weight(), self.up.bias(), self.gelu)?;
        self.down.forward(tape, &act, Some(&x))
    }
}
