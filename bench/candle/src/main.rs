//! The training step in candle, f32, CPU, with its public layers and optimizer.
//!
//! candle's fused rope, norm and softmax have no backward, so training takes the composed ones.

use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use candle_nn::rotary_emb::rope_slow;
use candle_nn::{Embedding, Linear, Module, RmsNorm, loss, ops};

#[path = "../../peer.rs"]
mod peer;
use peer::{Args, Config};

/// Makes parameters and remembers them for the optimizer.
struct Params {
    vars: Vec<Var>,
    device: Device,
}

impl Params {
    fn matrix(&mut self, rows: usize, columns: usize) -> Result<Tensor> {
        let var = Var::randn(0f32, 0.02, (rows, columns), &self.device)?;
        self.vars.push(var.clone());
        Ok(var.as_tensor().clone())
    }

    fn linear(&mut self, inputs: usize, outputs: usize) -> Result<Linear> {
        Ok(Linear::new(self.matrix(outputs, inputs)?, None))
    }

    fn norm(&mut self, width: usize) -> Result<RmsNorm> {
        let var = Var::ones(width, DType::F32, &self.device)?;
        self.vars.push(var.clone());
        Ok(RmsNorm::new(var.as_tensor().clone(), 1e-5))
    }
}

struct Block {
    norm_attn: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm_ffn: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Rotary tables `[T, H/2]` and the causal mask `[T, T]` (0 or -inf), shared by the blocks.
struct Positions {
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
}

impl Block {
    fn new(c: &Config, p: &mut Params) -> Result<Block> {
        Ok(Block {
            norm_attn: p.norm(c.d)?,
            q: p.linear(c.d, c.d)?,
            k: p.linear(c.d, c.d)?,
            v: p.linear(c.d, c.d)?,
            o: p.linear(c.d, c.d)?,
            norm_ffn: p.norm(c.d)?,
            gate: p.linear(c.d, c.f)?,
            up: p.linear(c.d, c.f)?,
            down: p.linear(c.f, c.d)?,
        })
    }

    /// `[B, T, D]` to `[B, T, D]`.
    fn forward(&self, x: &Tensor, c: &Config, at: &Positions) -> Result<Tensor> {
        let h = self.norm_attn.forward_diff(x)?;
        let heads = |linear: &Linear| {
            linear.forward(&h)?.reshape((c.b, c.t, c.n, c.head_dim()))?.transpose(1, 2)?.contiguous()
        };
        let q = rope_slow(&heads(&self.q)?, &at.cos, &at.sin)?;
        let k = rope_slow(&heads(&self.k)?, &at.cos, &at.sin)?;
        let scores = (q.matmul(&k.t()?)? * (1.0 / (c.head_dim() as f64).sqrt()))?;
        let weights = ops::softmax(&scores.broadcast_add(&at.mask)?, D::Minus1)?;
        let y = weights.matmul(&heads(&self.v)?)?.transpose(1, 2)?.reshape((c.b, c.t, c.d))?;
        let x = (x + self.o.forward(&y)?)?;

        let h = self.norm_ffn.forward_diff(&x)?;
        let h = (self.gate.forward(&h)?.silu()? * self.up.forward(&h)?)?;
        x + self.down.forward(&h)?
    }
}

struct Llama {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    at: Positions,
}

impl Llama {
    fn new(c: &Config, p: &mut Params) -> Result<Llama> {
        let (cos, sin) = c.rope_tables();
        let mask: Vec<f32> =
            (0..c.t * c.t).map(|i| if i % c.t > i / c.t { f32::NEG_INFINITY } else { 0.0 }).collect();
        let table = |values| Tensor::from_vec(values, (c.t, c.head_dim() / 2), &p.device);
        let at = Positions {
            cos: table(cos)?,
            sin: table(sin)?,
            mask: Tensor::from_vec(mask, (c.t, c.t), &p.device)?,
        };
        Ok(Llama {
            embedding: Embedding::new(p.matrix(c.v, c.d)?, c.d),
            blocks: (0..c.l).map(|_| Block::new(c, p)).collect::<Result<_>>()?,
            norm: p.norm(c.d)?,
            head: p.linear(c.d, c.v)?,
            at,
        })
    }

    /// Mean cross-entropy of `[B, T]` inputs against `[B * T]` targets.
    fn loss(&self, inputs: &Tensor, targets: &Tensor, c: &Config) -> Result<Tensor> {
        let mut x = self.embedding.forward(inputs)?;
        for block in &self.blocks {
            x = block.forward(&x, c, &self.at)?;
        }
        let h = self.norm.forward_diff(&x)?.reshape((c.tokens(), c.d))?;
        loss::cross_entropy(&self.head.forward(&h)?, targets)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let c = &args.config;
    let mut params = Params { vars: Vec::new(), device: Device::Cpu };
    let model = Llama::new(c, &mut params)?;
    let adamw = ParamsAdamW { lr: 3e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let mut adamw = AdamW::new(params.vars, adamw)?;

    let (inputs, targets) = c.batch();
    let inputs = Tensor::from_vec(inputs, (c.b, c.t), &params.device)?;
    let targets = Tensor::from_vec(targets, c.tokens(), &params.device)?;
    for step in 0..args.steps {
        let start = Instant::now();
        let loss = model.loss(&inputs, &targets, c)?;
        let grads = loss.backward()?;
        adamw.step(&grads)?;
        let value = loss.to_scalar::<f32>()?;
        // Freeing the graph is part of a step.
        drop((loss, grads));
        peer::report("candle-f32", c, step, start.elapsed().as_secs_f64(), value);
    }
    Ok(())
}
