//! The training step in burn, flex backend, f32, CPU, with its public layers and optimizer.

use std::time::Instant;

use burn::module::Module;
use burn::nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::silu;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Int, Tensor, TensorData};

#[path = "../../peer.rs"]
mod peer;
use peer::{Args, Config};

const NORMAL: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

fn linear(inputs: usize, outputs: usize, device: &Device) -> Linear {
    LinearConfig::new(inputs, outputs).with_bias(false).with_initializer(NORMAL).init(device)
}

/// Rotary tables `[1, 1, T, H/2]`, shared by the blocks.
struct Rope {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rope {
    fn new(c: &Config, device: &Device) -> Rope {
        let (cos, sin) = c.rope_tables();
        let table =
            |values| Tensor::<4>::from_data(TensorData::new(values, [1, 1, c.t, c.head_dim() / 2]), device);
        Rope { cos: table(cos), sin: table(sin) }
    }

    /// Rotates pairs (i, i + H/2) of `[B, N, T, H]`.
    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (a, b) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
        let rotated_a = a.clone() * self.cos.clone() - b.clone() * self.sin.clone();
        let rotated_b = b * self.cos.clone() + a * self.sin.clone();
        Tensor::cat(vec![rotated_a, rotated_b], 3)
    }
}

#[derive(Module, Debug)]
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

impl Block {
    fn new(c: &Config, device: &Device) -> Block {
        Block {
            norm_attn: RmsNormConfig::new(c.d).init(device),
            q: linear(c.d, c.d, device),
            k: linear(c.d, c.d, device),
            v: linear(c.d, c.d, device),
            o: linear(c.d, c.d, device),
            norm_ffn: RmsNormConfig::new(c.d).init(device),
            gate: linear(c.d, c.f, device),
            up: linear(c.d, c.f, device),
            down: linear(c.f, c.d, device),
        }
    }

    /// `[B, T, D]` to `[B, T, D]`.
    fn forward(&self, x: Tensor<3>, c: &Config, rope: &Rope) -> Tensor<3> {
        let h = self.norm_attn.forward(x.clone());
        let heads = |linear: &Linear| {
            linear.forward(h.clone()).reshape([c.b, c.t, c.n, c.head_dim()]).swap_dims(1, 2)
        };
        let (q, k) = (rope.rotate(heads(&self.q)), rope.rotate(heads(&self.k)));
        let causal = AttentionModuleOptions { is_causal: true, ..Default::default() };
        let y = attention(q, k, heads(&self.v), None, None, causal);
        let x = x + self.o.forward(y.swap_dims(1, 2).reshape([c.b, c.t, c.d]));

        let h = self.norm_ffn.forward(x.clone());
        x + self.down.forward(silu(self.gate.forward(h.clone())) * self.up.forward(h))
    }
}

#[derive(Module, Debug)]
struct Llama {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
}

impl Llama {
    fn new(c: &Config, device: &Device) -> Llama {
        Llama {
            embedding: EmbeddingConfig::new(c.v, c.d).with_initializer(NORMAL).init(device),
            blocks: (0..c.l).map(|_| Block::new(c, device)).collect(),
            norm: RmsNormConfig::new(c.d).init(device),
            head: linear(c.d, c.v, device),
        }
    }

    /// Logits `[B * T, V]` of inputs `[B, T]`.
    fn forward(&self, inputs: Tensor<2, Int>, c: &Config, rope: &Rope) -> Tensor<2> {
        let mut x = self.embedding.forward(inputs);
        for block in &self.blocks {
            x = block.forward(x, c, rope);
        }
        self.head.forward(self.norm.forward(x).reshape([c.tokens(), c.d]))
    }
}

fn main() {
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global().expect("rayon's global pool");
    let c = &args.config;
    let device = Device::flex().autodiff();
    device.seed(0);
    let mut model = Llama::new(c, &device);
    let cross_entropy: CrossEntropyLoss = CrossEntropyLossConfig::new().init(&device);
    let adamw = AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.95);
    let mut adamw = adamw.with_epsilon(1e-8).with_weight_decay(0.1).init();

    let (inputs, targets) = c.batch();
    let signed = |tokens: Vec<u32>| tokens.into_iter().map(i64::from).collect::<Vec<_>>();
    let inputs = Tensor::<2, Int>::from_data(TensorData::new(signed(inputs), [c.b, c.t]), &device);
    let targets = Tensor::<1, Int>::from_data(TensorData::new(signed(targets), [c.tokens()]), &device);
    let rope = Rope::new(c, &device);
    for step in 0..args.steps {
        let start = Instant::now();
        let logits = model.forward(inputs.clone(), c, &rope);
        let loss = cross_entropy.forward(logits, targets.clone());
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = adamw.step(3e-4, model, grads);
        let value = loss.into_scalar::<f32>();
        peer::report("burn-flex-f32", c, step, start.elapsed().as_secs_f64(), value);
    }
}
