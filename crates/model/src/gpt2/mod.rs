//! GPT-2: LayerNorm, learnt positions, GELU, biases everywhere, tied head.

use crate::config::Keys;
use crate::layers::{LinearSpec, StreamNorm, attend, attended, local_heads};
use crate::names::{Builder, Place, Vector};
use crate::{ConfigError, Linear, Recompute, Slice, Stage, Tokens};
use dist::cost::Pair;
use dist::{Context, Dim, Flow, Table};
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
    width: usize,
    flow: Flow,
    stage: Stage,
    /// On the first and the last stage.
    tokens: Option<(ParamRef, Table)>,
    /// On the first stage.
    positions: Option<(ParamRef, Table)>,
    /// Of the layers of this stage.
    blocks: Vec<Block>,
    /// On the last stage.
    norm: Option<StreamNorm>,
}

#[derive(Clone)]
struct Block {
    layer: usize,
    attention_norm: StreamNorm,
    qkv: Linear,
    context: Context,
    out: Linear,
    mlp_norm: StreamNorm,
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
            let spec = ParamSpec { name: ours.into(), shape, init, decay };
            builder.table(spec, format!("transformer.{theirs}.weight"))
        };
        let stage = builder.stage.clone();
        let (first, last) = (stage.is_first(), stage.is_last());
        let tokens = (first || last).then(|| {
            let tokens = table(builder, "embedding", "wte", config.vocab, true);
            builder.on_both_ends();
            tokens
        });
        let positions = first.then(|| table(builder, "positions", "wpe", config.max_positions, false));
        let blocks = stage.layers().map(|layer| Block::build(config, layer, builder));
        let blocks = blocks.collect::<Result<_, _>>()?;
        let norm = last.then(|| layer_norm(builder, "norm", "transformer.ln_f", config));
        let (flow, layers, width) = (builder.flow.clone(), config.layers, config.width);
        Ok(Gpt2 { layers, width, flow, stage, tokens, positions, blocks, norm })
    }

    fn embed(&self, tape: &mut Tape<'_>, tokens: &Tokens) -> Result<Var, Fault> {
        tape.set_layer(0);
        let tables = self.tokens.as_ref().zip(self.positions.as_ref());
        let (ids, positions) = tables.expect("the first stage embeds");
        let here = tokens.local(&self.flow, ids.1.tokens());
        dist::embed(tape, &[(here.ids, ids.0, &ids.1), (here.positions, positions.0, &positions.1)])
    }

    pub(crate) fn slice(
        &self,
        tape: &mut Tape<'_>,
        slice: &Slice,
        x: Option<&Var>,
        tokens: &Tokens,
        recompute: Recompute,
    ) -> Result<Var, Fault> {
        let tokens = tokens.padded(&self.flow);
        let inner = attended(&self.flow, &tokens);
        let mut x = match x {
            Some(x) => x.clone(),
            None => self.embed(tape, &tokens)?,
        };
        for block in self.blocks.iter().filter(|block| slice.layers.contains(&block.layer)) {
            tape.set_layer(block.layer);
            let shape = block.attention_shape(&inner);
            x = if recompute.applies_to(block.layer) {
                let block = block.clone();
                tape.recompute(&x, move |tape, x| block.forward(tape, x, &shape, None))?
            } else {
                tape.keep(x, |tape, x| block.forward(tape, &x, &shape, None))?
            };
        }
        if slice.last { self.end(tape, &x) } else { Ok(x) }
    }

    /// Behind the last layer.
    fn end(&self, tape: &mut Tape<'_>, x: &Var) -> Result<Var, Fault> {
        tape.set_layer(self.layers);
        self.norm.as_ref().expect("the last stage has the norm").forward(tape, x)
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
        self.end(tape, &x)
    }

    pub(crate) fn stage(&self) -> &Stage {
        &self.stage
    }

    pub(crate) fn stream(&self) -> (&Flow, usize) {
        (&self.flow, self.width)
    }

    pub(crate) fn head(&self) -> &(ParamRef, Table) {
        self.tokens.as_ref().expect("the last stage has the head")
    }
}

fn layer_norm(builder: &mut Builder, ours: &str, theirs: &str, config: &Gpt2Config) -> StreamNorm {
    let d = config.width;
    let mut vector = |part: &str, init: Init| {
        builder.vector(format!("{ours}.{part}"), format!("{theirs}.{part}"), Vector::Outer(d, init))
    };
    let (weight, bias) = (vector("weight", Init::Ones), vector("bias", Init::Zeros));
    StreamNorm::new(Norm::Layer { weight, bias, eps: config.eps }, d, &builder.flow)
}

impl Block {
    fn build(config: &Gpt2Config, layer: usize, builder: &mut Builder) -> Result<Block, ConfigError> {
        let (d, f, n, h) = (config.width, config.ffn, config.heads, config.width / config.heads);
        let stored = format!("transformer.h.{layer}");
        let parts = |theirs: &str, outputs: &Dim| vec![(format!("{stored}.{theirs}"), outputs.len())];
        let spec = |pair, ours: &str, inputs, outputs, std, parts| LinearSpec {
            name: format!("layers.{layer}.{ours}"),
            inputs,
            outputs,
            bias: true,
            std,
            parts,
            place: Place::Transposed,
            pair,
        };
        let opening = |builder: &mut Builder, pair, (ours, theirs): (&str, &str), outputs: Dim| {
            let parts = parts(theirs, &outputs);
            Linear::opening(&spec(pair, ours, Dim::plain(d), outputs, INIT_STD, parts), builder)
        };
        let residual_std = INIT_STD / (2.0 * config.layers as f32).sqrt();
        let closing = |builder: &mut Builder, pair, (ours, theirs): (&str, &str), inputs: Dim| {
            let parts = parts(theirs, &Dim::plain(d));
            Linear::closing(&spec(pair, ours, inputs, Dim::plain(d), residual_std, parts), builder)
        };
        let norm = |builder: &mut Builder, ours: &str, theirs: &str| {
            layer_norm(builder, &format!("layers.{layer}.{ours}"), &format!("{stored}.{theirs}"), config)
        };
        Ok(Block {
            layer,
            attention_norm: norm(builder, "attention_norm", "ln_1"),
            qkv: opening(builder, Pair::Attention, ("qkv", "attn.c_attn"), Dim::of_parts(&[(n, h); 3]))?,
            context: Context::new(&builder.flow.mesh, builder.flow.attention),
            out: closing(builder, Pair::Attention, ("out", "attn.c_proj"), Dim::of_parts(&[(n, h)]))?,
            mlp_norm: norm(builder, "mlp_norm", "ln_2"),
            up: opening(builder, Pair::Mlp, ("up", "mlp.c_fc"), Dim::plain(f))?,
            down: closing(builder, Pair::Mlp, ("down", "mlp.c_proj"), Dim::plain(f))?,
            heads: local_heads(&builder.flow, n, n).0,
            head_dim: h,
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
        let h = self.attention_norm.forward(tape, x)?;
        let qkv = self.qkv.forward(tape, &h, None)?;
        drop(h);
        let attended = attend(tape, qkv, (&self.context, shape), cache)?;
        let x = self.out.forward(tape, &attended, Some(x))?;
        let h = self.mlp_norm.forward(tape, &x)?;
        let act = self.up.forward_gelu(tape, &h, self.gelu)?;
        self.down.forward(tape, &act, Some(&x))
    }
}
