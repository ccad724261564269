//! The Llama family: RMSNorm, rotary positions, grouped heads, SwiGLU. Mistral, Qwen2, Qwen3,
//! SmolLM2 and the mixtures of experts differ in a few switches, all of them in the config.

mod config;
mod moe;

pub use config::{Family, LlamaConfig};
pub use moe::MoeConfig;

use crate::layers::{LinearSpec, attend, vector};
use crate::names::{Builder, Place};
use crate::{ConfigError, Linear, Recompute, Tokens};
use dist::Mesh;
use std::sync::Arc;
use tensor::{AttentionShape, Fault, Init, KvCache, Norm, ParamRef, ParamSpec, RopeTable, Tape, Var};

/// Standard deviation of initial weights; projections back into the residual stream get it
/// divided by sqrt(2 L), so that the stream's variance does not grow with depth (GPT-2 paper).
const INIT_STD: f32 = 0.02;

/// A Llama-style decoder.
#[derive(Clone)]
pub struct Llama {
    config: Box<LlamaConfig>,
    embedding: ParamRef,
    blocks: Vec<Block>,
    norm: Norm,
    head: ParamRef,
    rope: Arc<RopeTable>,
}

#[derive(Clone)]
struct Block {
    layer: usize,
    attention_norm: Norm,
    qkv: Linear,
    qk_norm: Option<(ParamRef, ParamRef)>,
    out: Linear,
    mlp_norm: Norm,
    mlp: Mlp,
    heads: (usize, usize, usize),
    eps: f32,
    window: Option<usize>,
}

/// The feed-forward part of a layer.
#[derive(Clone)]
enum Mlp {
    Dense { gate_up: Linear, down: Linear },
    Experts(moe::Moe),
}

impl Llama {
    pub(crate) fn build(
        config: &LlamaConfig,
        context: usize,
        mesh: &Mesh,
        builder: &mut Builder,
    ) -> Result<Llama, ConfigError> {
        let (v, d) = (config.vocab, config.width);
        let matrix = |name: &str| ParamSpec {
            name: name.to_string(),
            shape: vec![v, d],
            init: Init::Normal(INIT_STD),
            decay: true,
        };
        let embedding = builder.whole(matrix("embedding"), "model.embed_tokens.weight".into(), vec![v, d]);
        let blocks = (0..config.layers)
            .map(|layer| Block::build(config, layer, mesh, builder))
            .collect::<Result<_, _>>()?;
        let weight = vector(builder, "norm".into(), "model.norm.weight".into(), d, Init::Ones);
        let head = match config.tied {
            true => embedding,
            false => builder.whole(matrix("head"), "lm_head.weight".into(), vec![v, d]),
        };
        let norm = Norm::Rms { weight, eps: config.eps };
        let rope =
            Arc::new(RopeTable::new(config.head_dim, config.rope_theta, &config.rope_scaling, context));
        Ok(Llama { config: Box::new(config.clone()), embedding, blocks, norm, head, rope })
    }

    fn attention_shape(&self, block: &Block, tokens: &Tokens) -> AttentionShape {
        let (n, k, h) = block.heads;
        AttentionShape {
            b: tokens.b,
            n,
            k,
            h,
            scale: 1.0 / (h as f32).sqrt(),
            window: block.window,
            rope: Some(self.rope.clone()),
            positions: tokens.positions.clone(),
            starts: tokens.starts.clone(),
        }
    }

    pub(crate) fn hidden(
        &self,
        tape: &mut Tape<'_>,
        tokens: &Tokens,
        recompute: Recompute,
    ) -> Result<Var, Fault> {
        tape.set_layer(0);
        let mut x = tape.embedding(&[(tokens.ids.clone(), self.embedding)])?;
        for block in &self.blocks {
            tape.set_layer(block.layer);
            let shape = self.attention_shape(block, tokens);
            x = if recompute.applies_to(block.layer) {
                let block = block.clone();
                tape.recompute(&x, move |tape, x| block.forward(tape, x, &shape, None))?
            } else {
                block.forward(tape, &x, &shape, None)?
            };
        }
        tape.set_layer(self.config.layers);
        tape.norm(&x, self.norm)
    }

    pub(crate) fn hidden_cached(
        &self,
        tape: &mut Tape<'_>,
        tokens: &Tokens,
        caches: &mut [KvCache],
    ) -> Result<Var, Fault> {
        let mut x = tape.embedding(&[(tokens.ids.clone(), self.embedding)])?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            tape.set_layer(block.layer);
            let shape = self.attention_shape(block, tokens);
            x = block.forward(tape, &x, &shape, Some(cache))?;
        }
        tape.norm(&x, self.norm)
    }

    pub(crate) fn head(&self) -> ParamRef {
        self.head
    }
}

impl Block {
    fn build(
        config: &LlamaConfig,
        layer: usize,
        mesh: &Mesh,
        builder: &mut Builder,
    ) -> Result<Block, ConfigError> {
        let (n, k, h) = (config.heads, config.kv_heads, config.head_dim);
        let (d, f) = (config.width, config.ffn);
        let stored = format!("model.layers.{layer}");
        let name = |part: &str| format!("layers.{layer}.{part}");
        let part = |path: &str, rows: usize| (format!("{stored}.{path}"), rows);
        let norm = |builder: &mut Builder, ours: &str, theirs: &str, width: usize| {
            vector(builder, name(ours), format!("{stored}.{theirs}.weight"), width, Init::Ones)
        };
        let linear = |builder: &mut Builder, ours: &str, inputs, bias, std, parts: &[(String, usize)]| {
            let outputs = parts.iter().map(|(_, rows)| rows).sum();
            let place = Place::Rows;
            let spec = LinearSpec { name: name(ours), inputs, outputs, bias, std, parts, place };
            Linear::build(&spec, mesh, builder)
        };
        let residual_std = INIT_STD / (2.0 * config.layers as f32).sqrt();
        let qkv_parts = [
            part("self_attn.q_proj", n * h),
            part("self_attn.k_proj", k * h),
            part("self_attn.v_proj", k * h),
        ];
        let attention_norm = norm(builder, "attention_norm", "input_layernorm", d);
        let qkv = linear(builder, "qkv", d, config.qkv_bias, INIT_STD, &qkv_parts)?;
        let qk_norm = config.qk_norm.then(|| {
            let q = norm(builder, "q_norm", "self_attn.q_norm", h);
            (q, norm(builder, "k_norm", "self_attn.k_norm", h))
        });
        let out_parts = [part("self_attn.o_proj", d)];
        let out = linear(builder, "out", n * h, config.out_bias, residual_std, &out_parts)?;
        let mlp_norm = norm(builder, "mlp_norm", "post_attention_layernorm", d);
        let mlp = match config.moe.as_ref().filter(|moe| moe.applies_to(layer)) {
            Some(moe) => Mlp::Experts(moe::Moe::build(config, moe, layer, builder)),
            None => {
                let parts = [part("mlp.gate_proj", f), part("mlp.up_proj", f)];
                let gate_up = linear(builder, "gate_up", d, false, INIT_STD, &parts)?;
                let parts = [part("mlp.down_proj", d)];
                Mlp::Dense { gate_up, down: linear(builder, "down", f, false, residual_std, &parts)? }
            }
        };
        let eps = config.eps;
        Ok(Block {
            layer,
            attention_norm: Norm::Rms { weight: attention_norm, eps },
            qkv,
            qk_norm,
            out,
            mlp_norm: Norm::Rms { weight: mlp_norm, eps },
            mlp,
            heads: (n, k, h),
            eps,
            window: config.window_of(layer),
        })
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
        let mut qkv = self.qkv.forward(tape, &h, None)?;
        drop(h);
        if let Some(weights) = self.qk_norm {
            qkv = tape.head_norm(&qkv, weights, self.heads, self.eps)?;
        }
        let attended = attend(tape, qkv, shape, cache)?;
        let x = self.out.forward(tape, &attended, Some(x))?;
        drop(attended);
        let h = tape.norm(&x, self.mlp_norm)?;
        match &self.mlp {
            Mlp::Experts(experts) => experts.forward(tape, &h, &x),
            Mlp::Dense { gate_up, down } => {
                let gate_up = gate_up.forward(tape, &h, None)?;
                drop(h);
                tape.swiglu_linear(&gate_up, down.weight(), &x)
            }
        }
    }
}
