//! A network of two blocks that between them use every op of the tape, and batches for it.
//!
//! Block 0: rms_norm, head_norm, attention with rope, grouped heads and a window, swiglu_linear.
//! Block 1: layer_norm, attention over learnt positions, linear_gelu, biases everywhere.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::sync::Arc;
use tensor::{
    AttentionShape, DType, Device, Fault, GeluKind, Init, Norm, ParamList, ParamRef, ParamSpec, ParamStore,
    RopeScaling, RopeTable, Tape, Targets, Tensor, Var, normal,
};

/// Vocabulary, width, query heads, kv heads, head dim, FFN width: none a multiple of a vector.
pub const V: usize = 37;
pub const D: usize = 12;
const N: usize = 4;
const K: usize = 2;
const H: usize = 6;
const F: usize = 10;
pub const MAX_T: usize = 280;
const WINDOW: usize = 5;

/// A target that asks for nothing.
pub const IGNORE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Linear {
    weight: ParamRef,
    bias: Option<ParamRef>,
}

#[derive(Clone)]
struct Grouped {
    norm: Norm,
    qkv: Linear,
    heads: (ParamRef, ParamRef),
    out: Linear,
    mlp_norm: Norm,
    gate_up: Linear,
    down: ParamRef,
    rope: Arc<RopeTable>,
}

#[derive(Clone)]
struct Plain {
    norm: Norm,
    qkv: Linear,
    out: Linear,
    mlp_norm: Norm,
    up: Linear,
    down: Linear,
    gelu: GeluKind,
}

/// Which values the tape keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    All,
    /// Each block recomputed.
    Blocks,
    /// Both blocks recomputed as one, each recomputed inside it.
    Nested,
}

#[derive(Clone)]
pub struct Net {
    pub list: ParamList,
    pub tokens: ParamRef,
    pub positions: ParamRef,
    pub head: ParamRef,
    first: Grouped,
    second: Plain,
    norm: Norm,
}

/// Rows of tokens, of one document each unless `starts` says otherwise.
#[derive(Clone)]
pub struct Batch {
    pub b: usize,
    pub ids: Arc<[u32]>,
    pub positions: Arc<[u32]>,
    pub starts: Option<Arc<[u32]>>,
    pub targets: Vec<u32>,
}

fn add(list: &mut ParamList, name: &str, shape: &[usize]) -> ParamRef {
    let spec = ParamSpec { name: name.into(), shape: shape.to_vec(), init: Init::Zeros, decay: false };
    list.add(spec)
}

fn linear(list: &mut ParamList, name: &str, outputs: usize, inputs: usize, bias: bool) -> Linear {
    let weight = add(list, &format!("{name}.weight"), &[outputs, inputs]);
    Linear { weight, bias: bias.then(|| add(list, &format!("{name}.bias"), &[outputs])) }
}

fn rms(list: &mut ParamList, name: &str) -> Norm {
    Norm::Rms { weight: add(list, &format!("{name}.scale"), &[D]), eps: 1e-5 }
}

fn layer(list: &mut ParamList, name: &str) -> Norm {
    let weight = add(list, &format!("{name}.scale"), &[D]);
    Norm::Layer { weight, bias: add(list, &format!("{name}.bias"), &[D]), eps: 1e-5 }
}

impl Grouped {
    fn new(list: &mut ParamList) -> Grouped {
        Grouped {
            norm: rms(list, "0.norm"),
            qkv: linear(list, "0.qkv", (N + 2 * K) * H, D, true),
            heads: (add(list, "0.q.scale", &[H]), add(list, "0.k.scale", &[H])),
            out: linear(list, "0.out", D, N * H, false),
            mlp_norm: rms(list, "0.mlp_norm"),
            gate_up: linear(list, "0.gate_up", 2 * F, D, false),
            down: linear(list, "0.down", D, F, false).weight,
            rope: Arc::new(RopeTable::new(H, 100.0, &RopeScaling::None, MAX_T)),
        }
    }

    fn forward(&self, tape: &mut Tape<'_>, x: &Var, batch: &Batch) -> Result<Var, Fault> {
        let h = tape.norm(x, self.norm)?;
        let qkv = tape.linear(&h, self.qkv.weight, self.qkv.bias, None)?;
        let qkv = tape.head_norm(&qkv, self.heads, (N, K, H), 1e-5)?;
        let attended = tape.attention(qkv, &batch.shape(Some(WINDOW), Some(self.rope.clone())))?;
        let x = tape.linear(&attended, self.out.weight, None, Some(x))?;
        let h = tape.norm(&x, self.mlp_norm)?;
        let gate_up = tape.linear(&h, self.gate_up.weight, None, None)?;
        tape.swiglu_linear(&gate_up, self.down, &x)
    }
}

impl Plain {
    fn new(list: &mut ParamList, gelu: GeluKind) -> Plain {
        Plain {
            norm: layer(list, "1.norm"),
            qkv: linear(list, "1.qkv", (N + 2 * K) * H, D, true),
            out: linear(list, "1.out", D, N * H, true),
            mlp_norm: layer(list, "1.mlp_norm"),
            up: linear(list, "1.up", F, D, true),
            down: linear(list, "1.down", D, F, true),
            gelu,
        }
    }

    fn forward(&self, tape: &mut Tape<'_>, x: &Var, batch: &Batch) -> Result<Var, Fault> {
        let h = tape.norm(x, self.norm)?;
        let qkv = tape.linear(&h, self.qkv.weight, self.qkv.bias, None)?;
        let attended = tape.attention(qkv, &batch.shape(None, None))?;
        let x = tape.linear(&attended, self.out.weight, self.out.bias, Some(x))?;
        let h = tape.norm(&x, self.mlp_norm)?;
        let act = tape.linear_gelu(&h, self.up.weight, self.up.bias, self.gelu)?;
        tape.linear(&act, self.down.weight, self.down.bias, Some(&x))
    }
}

impl Net {
    pub fn new(gelu: GeluKind, tied: bool) -> Net {
        let mut list = ParamList::default();
        let tokens = add(&mut list, "tokens", &[V, D]);
        let positions = add(&mut list, "positions", &[MAX_T, D]);
        let first = Grouped::new(&mut list);
        let second = Plain::new(&mut list, gelu);
        let norm = rms(&mut list, "norm");
        let head = if tied { tokens } else { add(&mut list, "head", &[V, D]) };
        Net { list, tokens, positions, head, first, second, norm }
    }

    /// Random values for every parameter, norm scales around 1, with gradients reserved.
    pub fn store(&self, dtype: DType) -> ParamStore {
        let mut store = ParamStore::new(Device::Cpu, dtype, &self.list).unwrap();
        for param in store.refs() {
            let spec = store.spec(param).clone();
            let (mean, std) = if spec.name.ends_with("scale") { (1.0, 0.2) } else { (0.0, 0.4) };
            let values = (0..spec.len()).map(|i| mean + std * normal(5, &spec.name, i as u64));
            set(&mut store, param, &values.collect::<Vec<_>>());
        }
        store.enable_grads().unwrap();
        store
    }

    fn blocks(&self, tape: &mut Tape<'_>, x: &Var, batch: &Batch, keep: Keep) -> Result<Var, Fault> {
        let ((first, second), b) = ((self.first.clone(), self.second.clone()), batch.clone());
        if keep == Keep::All {
            tape.set_layer(0);
            let x = first.forward(tape, x, batch)?;
            tape.set_layer(1);
            return second.forward(tape, &x, batch);
        }
        tape.set_layer(0);
        let x = tape.recompute(x, move |tape, x| first.forward(tape, x, &b))?;
        let b = batch.clone();
        tape.set_layer(1);
        tape.recompute(&x, move |tape, x| second.forward(tape, x, &b))
    }

    /// Loss of every position; a recording tape is then ready for its backward pass.
    pub fn losses(
        &self,
        tape: &mut Tape<'_>,
        batch: &Batch,
        scale: f32,
        keep: Keep,
    ) -> Result<Tensor, Fault> {
        let lookups = [(batch.ids.clone(), self.tokens), (batch.positions.clone(), self.positions)];
        let x = tape.embedding(&lookups)?;
        let x = match keep {
            Keep::All | Keep::Blocks => self.blocks(tape, &x, batch, keep)?,
            Keep::Nested => {
                let (net, batch) = (self.clone(), batch.clone());
                tape.recompute(&x, move |tape, x| net.blocks(tape, x, &batch, Keep::Blocks))?
            }
        };
        tape.set_layer(2);
        let x = tape.norm(&x, self.norm)?;
        tape.head_loss(&x, self.head, Targets { ids: &batch.targets, scale })
    }

    /// Losses, with gradients of their sum times `scale` added to the store.
    pub fn train(&self, store: &mut ParamStore, batch: &Batch, scale: f32, keep: Keep) -> Vec<f32> {
        let mut tape = Tape::recording(store);
        let losses = self.losses(&mut tape, batch, scale, keep).unwrap().to_f32();
        tape.backward().unwrap();
        losses
    }

    /// Losses alone.
    pub fn evaluate(&self, store: &mut ParamStore, batch: &Batch) -> Vec<f32> {
        self.losses(&mut Tape::running(store), batch, 1.0, Keep::All).unwrap().to_f32()
    }
}

impl Batch {
    /// `b` rows of `t` random tokens; every seventh target is ignored.
    pub fn random(b: usize, t: usize, seed: u64) -> Batch {
        let token = |name: &str, i: usize| (normal(seed, name, i as u64).abs() * 1e4) as u32 % V as u32;
        let target = |i| if i % 7 == 3 { IGNORE } else { token("targets", i) };
        Batch {
            b,
            ids: (0..b * t).map(|i| token("ids", i)).collect(),
            positions: (0..b * t).map(|i| (i % t) as u32).collect(),
            starts: None,
            targets: (0..b * t).map(target).collect(),
        }
    }

    /// The same tokens cut into documents of these lengths, which repeat until a row is full.
    pub fn cut(mut self, lengths: &[usize]) -> Batch {
        let t = self.ids.len() / self.b;
        let mut starts = Vec::new();
        while starts.len() < t {
            for length in lengths {
                let start = starts.len() as u32;
                starts.extend(std::iter::repeat_n(start, (*length).min(t - starts.len())));
            }
        }
        self.starts = Some((0..self.ids.len()).map(|i| starts[i % t]).collect());
        self.positions = (0..self.ids.len()).map(|i| (i % t) as u32 - starts[i % t]).collect();
        self
    }

    /// Tokens `[from, to)` as one row of one document.
    pub fn only(&self, from: usize, to: usize) -> Batch {
        Batch {
            b: 1,
            ids: self.ids[from..to].into(),
            positions: (0..(to - from) as u32).collect(),
            starts: None,
            targets: self.targets[from..to].to_vec(),
        }
    }

    fn shape(&self, window: Option<usize>, rope: Option<Arc<RopeTable>>) -> AttentionShape {
        let (positions, starts) = (self.positions.clone(), self.starts.clone());
        let scale = 1.0 / (H as f32).sqrt();
        AttentionShape { b: self.b, n: N, k: K, h: H, scale, window, rope, positions, starts }
    }
}

/// Overwrite a parameter.
pub fn set(store: &mut ParamStore, param: ParamRef, values: &[f32]) {
    let rounded = Tensor::from_f32(values, store.dtype(), &[values.len()]).unwrap();
    store.weight_mut(param).bytes().copy_from_slice(rounded.view().bytes());
}

/// Gradient of a parameter.
pub fn grad(store: &ParamStore, param: ParamRef) -> Vec<f32> {
    store.grad(param).f32().to_vec()
}

/// Each gradient of `found` against that of the same name in `expected`.
pub fn assert_grads(found: &ParamStore, expected: &ParamStore, tolerance: f32) {
    for param in expected.refs() {
        let (name, expected) = (&expected.spec(param).name, grad(expected, param));
        let found = grad(found, found.find(name).unwrap());
        let largest = expected.iter().fold(0f32, |top, x| top.max(x.abs()));
        for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
            assert!((a - b).abs() <= tolerance * largest, "{name}[{i}]: {a} beside {b}, largest {largest}");
        }
    }
}
