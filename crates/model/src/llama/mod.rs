//! The Llama family: RMSNorm, rotary positions, grouped heads, SwiGLU. Mistral, Qwen2, Qwen3,
//! SmolLM2 and the mixtures of experts differ in a few switches, all of them in the config.

mod config;
mod moe;

pub use config::{Family, LlamaConfig};
pub use moe::MoeConfig;

use crate::layers::{LinearSpec, StreamNorm, attend, attended, local_heads, real_rows};
use crate::names::{Builder, Place, Vector};
use crate::{ConfigError, Linear, Recompute, Slice, Stage, Tokens};
use dist::cost::Pair;
use dist::{Context, Dim, Flow, Table};
use std::sync::Arc;
use tensor::{AttentionShape, Fault, Init, KvCache, Norm, ParamRef, ParamSpec, Real, RopeTable, Tape, Var};

/// Standard deviation of initial weights; projections back into the residual stream get it
/// divided by sqrt(2 L), so that the stream's variance does not grow with depth (GPT-2 paper).
const INIT_STD: f32 = 0.02;

/// A Llama-style decoder.
#[derive(Clone)]
pub struct Llama {
    config: Box<LlamaConfig>,
    flow: Flow,
    stage: Stage,
    /// On the first stage, and where it is the head.
    embedding: Option<(ParamRef, Table)>,
    /// Of the layers of this stage.
    blocks: Vec<Block>,
    /// On the last stage.
    norm: Option<StreamNorm>,
    /// On the last stage.
    head: Option<(ParamRef, Table)>,
    rope: Arc<RopeTable>,
}

#[derive(Clone)]
struct Block {
    layer: usize,
    attention_norm: StreamNorm,
    qkv: Linear,
    context: Context,
    qk_norm: Option<(ParamRef, ParamRef)>,
    out: Linear,
    mlp_norm: StreamNorm,
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

/// Standard deviation of initial weights that lead back into the residual stream.
fn residual_std(config: &LlamaConfig) -> f32 {
    INIT_STD / (2.0 * config.layers as f32).sqrt()
}

impl Llama {
    pub(crate) fn build(
        config: &LlamaConfig,
        context: usize,
        builder: &mut Builder,
    ) -> Result<Llama, ConfigError> {
        let (v, d) = (config.vocab, config.width);
        let matrix = |name: &str| ParamSpec {
            name: name.to_string(),
            shape: vec![v, d],
            init: Init::Normal(INIT_STD),
            decay: true,
        };
        let stage = builder.stage.clone();
        let (first, last) = (stage.is_first(), stage.is_last());
        let embedding = (first || last && config.tied).then(|| {
            let table = builder.table(matrix("embedding"), "model.embed_tokens.weight".into());
            if config.tied {
                builder.on_both_ends();
            }
            table
        });
        let blocks = stage.layers().map(|layer| Block::build(config, layer, builder));
        let blocks = blocks.collect::<Result<_, _>>()?;
        let norm = last.then(|| {
            let of = Vector::Outer(d, Init::Ones);
            let weight = builder.vector("norm".into(), "model.norm.weight".into(), of);
            StreamNorm::new(Norm::Rms { weight, eps: config.eps }, d, &builder.flow)
        });
        let head = last.then(|| match &embedding {
            Some(table) if config.tied => table.clone(),
            _ => builder.table(matrix("head"), "lm_head.weight".into()),
        });
        let flow = builder.flow.clone();
        let rope =
            Arc::new(RopeTable::new(config.head_dim, config.rope_theta, &config.rope_scaling, context));
        Ok(Llama { config: Box::new(config.clone()), flow, stage, embedding, blocks, norm, head, rope })
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

    pub(crate) fn slice(
        &self,
        tape: &mut Tape<'_>,
        slice: &Slice,
        x: Option<&Var>,
        tokens: &Tokens,
        recompute: Recompute,
    ) -> Result<Var, Fault> {
        let real = real_rows(&self.flow, tokens);
        let tokens = tokens.padded(&self.flow);
        let inner = attended(&self.flow, &tokens);
        let mut x = match x {
            Some(x) => x.clone(),
            None => self.embed(tape, &tokens)?,
        };
        for block in self.blocks.iter().filter(|block| slice.layers.contains(&block.layer)) {
            tape.set_layer(block.layer);
            let shape = self.attention_shape(block, &inner);
            x = if recompute.applies_to(block.layer) {
                let (block, real) = (block.clone(), real.clone());
                tape.recompute(&x, move |tape, x| block.forward(tape, (x, &real), &shape, None))?
            } else {
                tape.keep(x, |tape, x| block.forward(tape, (&x, &real), &shape, None))?
            };
        }
        if slice.last { self.end(tape, &x) } else { Ok(x) }
    }

    fn embed(&self, tape: &mut Tape<'_>, tokens: &Tokens) -> Result<Var, Fault> {
        tape.set_layer(0);
        let (param, table) = self.embedding.as_ref().expect("the first stage embeds");
        let ids = tokens.local(&self.flow, table.tokens()).ids;
        dist::embed(tape, &[(ids, *param, table)])
    }

    /// Behind the last layer.
    fn end(&self, tape: &mut Tape<'_>, x: &Var) -> Result<Var, Fault> {
        tape.set_layer(self.config.layers);
        self.norm.as_ref().expect("the last stage has the norm").forward(tape, x)
    }

    pub(crate) fn hidden_cached(
        &self,
        tape: &mut Tape<'_>,
        tokens: &Tokens,
        caches: &mut [KvCache],
    ) -> Result<Var, Fault> {
        let mut x = self.embed(tape, tokens)?;
        let real = Real::first(tokens.ids.len());
        for (block, cache) in self.blocks.iter().zip(caches) {
            tape.set_layer(block.layer);
            let shape = self.attention_shape(block, tokens);
            x = block.forward(tape, (&x, &real), &shape, Some(cache))?;
        }
        self.end(tape, &x)
    }

    /// Here or on other stages.
    pub(crate) fn has_experts(&self) -> bool {
        let moe = self.config.moe.as_ref();
        moe.is_some_and(|moe| (0..self.config.layers).any(|layer| moe.applies_to(layer)))
    }

    pub(crate) fn stage(&self) -> &Stage {
        &self.stage
    }

    pub(crate) fn stream(&self) -> (&Flow, usize) {
        (&self.flow, self.config.width)
    }

    pub(crate) fn head(&self) -> &(ParamRef, Table) {
        self.head.as_ref().expect("the last stage has the head")
    }
}

impl Mlp {
    fn build(config: &LlamaConfig, layer: usize, builder: &mut Builder) -> Result<Mlp, ConfigError> {
        if let Some(moe) = config.moe.as_ref().filter(|moe| moe.applies_to(layer)) {
            return Ok(Mlp::Experts(moe::Moe::build(config, moe, layer, builder)?));
        }
        let (d, f) = (config.width, config.ffn);
        let part = |path: &str, rows: usize| (format!("model.layers.{layer}.mlp.{path}"), rows);
        let gate_up = LinearSpec {
            name: format!("layers.{layer}.gate_up"),
            inputs: Dim::plain(d),
            outputs: Dim::of_parts(&[(f, 1), (f, 1)]),
            bias: false,
            std: INIT_STD,
            parts: vec![part("gate_proj", f), part("up_proj", f)],
            place: Place::Rows,
            pair: Pair::Mlp,
        };
        let gate_up = Linear::opening(&gate_up, builder)?;
        let down = LinearSpec {
            name: format!("layers.{layer}.down"),
            inputs: Dim::plain(f),
            outputs: Dim::plain(d),
            bias: false,
            std: residual_std(config),
            parts: vec![part("down_proj", d)],
            place: Place::Rows,
            pair: Pair::Mlp,
        };
        Ok(Mlp::Dense { gate_up, down: Linear::closing(&down, builder)? })
    }
}

impl Block {
    fn build(config: &LlamaConfig, layer: usize, builder: &mut Builder) -> Result<Block, ConfigError> {
        let (n, k, h) = (config.heads, config.kv_heads, config.head_dim);
        let (d, eps) = (config.width, config.eps);
        let stored = format!("model.layers.{layer}");
        let name = |part: &str| format!("layers.{layer}.{part}");
        let part = |path: &str, rows: usize| (format!("{stored}.{path}"), rows);
        let norm = |builder: &mut Builder, ours: &str, theirs: &str, of: Vector| {
            builder.vector(name(ours), format!("{stored}.{theirs}.weight"), of)
        };
        let stream_norm = |builder: &mut Builder, ours: &str, theirs: &str| {
            let weight = norm(builder, ours, theirs, Vector::Outer(d, Init::Ones));
            StreamNorm::new(Norm::Rms { weight, eps }, d, &builder.flow)
        };
        let spec = |ours: &str, inputs, outputs, bias, std, parts| LinearSpec {
            name: name(ours),
            inputs,
            outputs,
            bias,
            std,
            parts,
            place: Place::Rows,
            pair: Pair::Attention,
        };
        let residual_std = residual_std(config);
        let width = || Dim::plain(d);
        // A kv head and the query heads it serves stay together.
        let query_heads = Dim::of_parts(&[(k, n / k * h)]);
        let heads = Dim::of_parts(&[(k, n / k * h), (k, h), (k, h)]);
        let qkv_parts = vec![
            part("self_attn.q_proj", n * h),
            part("self_attn.k_proj", k * h),
            part("self_attn.v_proj", k * h),
        ];
        let attention_norm = stream_norm(builder, "attention_norm", "input_layernorm");
        let qkv = spec("qkv", width(), heads, config.qkv_bias, INIT_STD, qkv_parts);
        let qkv = Linear::opening(&qkv, builder)?;
        let qk_norm = config.qk_norm.then(|| {
            let q = norm(builder, "q_norm", "self_attn.q_norm", Vector::Head(h, Init::Ones));
            (q, norm(builder, "k_norm", "self_attn.k_norm", Vector::Head(h, Init::Ones)))
        });
        let out_parts = vec![part("self_attn.o_proj", d)];
        let out = spec("out", query_heads, width(), config.out_bias, residual_std, out_parts);
        let out = Linear::closing(&out, builder)?;
        let mlp_norm = stream_norm(builder, "mlp_norm", "post_attention_layernorm");
        let mlp = Mlp::build(config, layer, builder)?;
        let (n, k) = local_heads(&builder.flow, n, k);
        let (heads, window) = ((n, k, h), config.window_of(layer));
        let context = Context::new(&builder.flow.mesh, builder.flow.attention);
        Ok(Block { layer, attention_norm, qkv, context, qk_norm, out, mlp_norm, mlp, heads, eps, window })
    }

    /// x [M, D], of which the rows in `real` are no padding -> [M, D].
    fn forward(
        &self,
        tape: &mut Tape<'_>,
        (x, real): (&Var, &Real),
        shape: &AttentionShape,
        cache: Option<&mut KvCache>,
    ) -> Result<Var, Fault> {
        let h = self.attention_norm.forward(tape, x)?;
        let mut qkv = self.qkv.forward(tape, &h, None)?;
        drop(h);
        if let Some(weights) = self.qk_norm {
            qkv = tape.head_norm(&qkv, weights, self.heads, self.eps)?;
        }
        let attended = attend(tape, qkv, (&self.context, shape), cache)?;
        let x = self.out.forward(tape, &attended, Some(x))?;
        drop(attended);
        let h = self.mlp_norm.forward(tape, &x)?;
        match &self.mlp {
            Mlp::Experts(experts) => experts.forward(tape, &h, &x, real),
            Mlp::Dense { gate_up, down } => {
                let gate_up = gate_up.forward(tape, &h, None)?;
                drop(h);
                down.forward_swiglu(tape, &gate_up, &x)
            }
        }
    }
}
