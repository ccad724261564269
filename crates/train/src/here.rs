//! What N ranks reach on this machine, measured with all of them busy at once, at the recipe's own
//! shapes: the figures a mesh is chosen by. Ranks are threads, each with its share of the cores.

use crate::TrainError;
use crate::learner::{Learner, LearnerOptions};
use crate::recipe::Recipe;
use crate::step::StepPlan;
use data::Batch as Rows;
use device::{Buffer, DType, Device};
use dist::cost::{
    Batch, Cluster, Link, ModelShape, Offload, Pace, Plan, Product, Zero, expert_products, price,
};
use dist::{Axis, CommError, Flow, Group, Mesh, MeshShape, Options, Scheme, launch};
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use model::{Config, Recompute};
use std::time::Instant;
use tensor::Fault;

/// Tokens of the probe on all ranks together at most, of those a microbatch has: how well workers share an op
/// depends on its size.
const TOKENS: usize = 2048;
/// Longest rows of the probe.
const CONTEXT: usize = 2048;
/// Vocabulary of the probe at most: a logit costs the same in any.
const VOCAB: usize = 4096;
/// Bytes that the layers of the probe have in use at once, all ranks together: several times what caches
/// hold, for a step finds little of what it left there.
const IN_USE: f64 = (128 << 20) as f64;
/// Times a product or a step is measured, after one that warms up.
const RUNS: usize = 3;
/// Times all of it is measured; the least of each figure counts. What disturbs a machine only ever adds, and
/// often for longer than one of these times.
const ROUNDS: usize = 4;
/// Times a collective is.
const CALLS: usize = 12;
/// Bytes of the whole array in collectives.
const SIZES: [usize; 2] = [64 << 10, 4 << 20];

/// Seconds as a sum of two costs: (amount of the first, of the second, seconds).
type Sample = (f64, f64, f64);

/// What one rank reached, or all of them.
#[derive(Clone)]
struct Reached {
    /// FLOPs, bytes packed.
    products: Vec<Sample>,
    /// Calls, bytes received.
    messages: Vec<Sample>,
    /// Seconds of attention, of norms, of the rest of the layers, of embedding, head and loss, of the optimizer.
    attention: f64,
    norms: f64,
    layers: f64,
    head: f64,
    update: f64,
    /// Of a whole step, by one clock.
    step: f64,
    params: usize,
}

impl Reached {
    /// All seconds: of samples, of parts.
    fn seconds(&mut self) -> impl Iterator<Item = &mut f64> {
        let Reached { products, messages, attention, norms, layers, head, update, step, .. } = self;
        let samples = products.iter_mut().chain(messages).map(|(.., seconds)| seconds);
        samples.chain([attention, norms, layers, head, update, step])
    }

    /// Every figure of this and of another one, as one.
    fn with(mut self, mut other: Reached, join: impl Fn(f64, f64) -> f64) -> Reached {
        self.seconds().zip(other.seconds()).for_each(|(ours, theirs)| *ours = join(*ours, *theirs));
        self
    }

    fn mean<'a>(ranks: impl ExactSizeIterator<Item = &'a Reached>) -> Reached {
        let count = ranks.len() as f64;
        let sum = ranks.cloned().reduce(|sum, rank| sum.with(rank, |a, b| a + b));
        let mut mean = sum.expect("there are ranks");
        mean.seconds().for_each(|seconds| *seconds /= count);
        mean
    }

    fn least(self, other: Reached) -> Reached {
        self.with(other, f64::min)
    }
}

/// Speeds of `ranks` ranks on this machine for the model and the recipe, in a few seconds. Errors: the
/// model cannot be built, a layer of it does not fit, a rank failed.
pub fn measure_here(config: &Config, recipe: &Recipe, ranks: usize) -> Result<Cluster, TrainError> {
    let line = MeshShape::new(&[(Axis::X, ranks)]);
    let line = line.map_err(|error| TrainError::Mesh { what: error.to_string() })?;
    let probe = Probe::new(config, recipe, ranks)?;
    let ends = launch(&line, &Options { deadline: recipe.mesh.deadline }, |mesh| probe.run(mesh));
    let reached =
        ends.map_err(|failure| TrainError::Mesh { what: format!("measuring speeds: {failure}") })?;
    // Ranks wait for each other, so that a round takes what they take on average.
    let rounds = (0..ROUNDS).map(|round| Reached::mean(reached.iter().map(|rounds| &rounds[round])));
    let least = rounds.reduce(Reached::least).expect("there are rounds");
    Ok(probe.cluster(&least))
}

/// What every rank runs.
struct Probe<'a> {
    config: Config,
    recipe: &'a Recipe,
    shape: ModelShape,
    rows: usize,
    context: usize,
    ranks: usize,
}

impl<'a> Probe<'a> {
    fn new(config: &Config, recipe: &'a Recipe, ranks: usize) -> Result<Probe<'a>, TrainError> {
        let context = recipe.train.context.min(CONTEXT);
        let rows = (TOKENS / context).min(recipe.train.batch).div_ceil(ranks).max(1);
        let layers = layers(&config.shape(), rows * context, ranks);
        let mut json = config.with_layers(layers).to_json("bfloat16");
        json["vocab_size"] = config.vocab().min(VOCAB).into();
        let config = Config::from_json(&json)?;
        Ok(Probe { shape: config.shape(), config, recipe, rows, context, ranks })
    }

    fn tokens(&self) -> usize {
        self.rows * self.context
    }

    fn run(&self, mesh: &Mesh) -> Result<Vec<Reached>, TrainError> {
        let mut learner = self.learner()?;
        (0..ROUNDS).map(|_| self.round(mesh, &mut learner)).collect()
    }

    fn round(&self, mesh: &Mesh, learner: &mut Learner) -> Result<Reached, TrainError> {
        let group = mesh.group(Axis::X);
        let products = self.products(&group)?;
        let messages = messages(mesh, self.recipe.train.dtype)?;
        let (attention, norms, layers, head, update, step, params) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0);
        let mut reached =
            Reached { products, messages, attention, norms, layers, head, update, step, params };
        self.pass(&group, learner, &mut reached)?;
        Ok(reached)
    }

    /// The products of a layer forward and for both gradients, whole and cut among the ranks.
    fn products(&self, group: &Group) -> Result<Vec<Sample>, Fault> {
        let mut samples = Vec::new();
        for Product { m, k, n } in self.layer_products() {
            let (m, k, n) = ((m as usize).max(1), k as usize, n as usize);
            for n in [n, n.div_ceil(self.ranks.max(2))] {
                let mut operands = Operands::new(self.recipe.train.dtype, (m, k, n))?;
                for turn in [Turn::Forward, Turn::Input, Turn::Weight] {
                    group.barrier()?;
                    operands.multiply(turn);
                    let seconds = mean(RUNS, || {
                        operands.multiply(turn);
                        Ok(())
                    })?;
                    let (flops, packed) = (2 * m * k * n, 2 * packed(turn, (m, k, n)));
                    samples.push((flops as f64, packed as f64, seconds));
                }
            }
        }
        Ok(samples)
    }

    /// Of one layer; every expert with an even share of the tokens.
    fn layer_products(&self) -> Vec<Product> {
        let m = self.tokens() as f64;
        let plain = self.shape.pairs().iter().flat_map(|pair| self.shape.products(*pair, m));
        let experts = self
            .shape
            .mixture
            .map(|mixture| expert_products(&mixture, self.shape.width, (Scheme::OneD, &MeshShape::SOLO), m));
        let experts = experts.into_iter().flatten().map(|(_, product)| product);
        plain.map(|(_, product)| product).chain(experts).collect()
    }

    /// Of a model of few layers.
    fn learner(&self) -> Result<Learner, TrainError> {
        let train = &self.recipe.train;
        let options = LearnerOptions {
            context: self.context,
            dtype: train.dtype,
            adamw: train.adamw,
            recompute: Recompute::Never,
            device: Device::Cpu,
            tiers: None,
        };
        let mut learner = Learner::on(&Flow::solo(), &self.config, options)
            .map_err(|error| TrainError::Mesh { what: format!("measuring speeds: {error}") })?;
        learner.initialise(self.recipe.run.seed)?;
        Ok(learner)
    }

    /// Its steps: as a run makes them, and op by op.
    fn pass(&self, group: &Group, learner: &mut Learner, reached: &mut Reached) -> Result<(), TrainError> {
        let batch = self.batch();
        // Weights stay as they are.
        let plan = StepPlan { lr: 0.0, clip: self.recipe.train.clip };
        learner.step(std::slice::from_ref(&batch), plan)?;
        learner.profile(&batch)?;
        group.barrier().map_err(Fault::outside)?;
        for _ in 0..RUNS {
            let started = Instant::now();
            learner.step(std::slice::from_ref(&batch), plan)?;
            reached.step += started.elapsed().as_secs_f64() / RUNS as f64;
            for (_, op, seconds) in learner.profile(&batch)? {
                let part = match op.as_str() {
                    "attention" => &mut reached.attention,
                    "rms_norm" | "layer_norm" => &mut reached.norms,
                    "head_loss" | "embedding" => &mut reached.head,
                    "adamw" => &mut reached.update,
                    _ => &mut reached.layers,
                };
                *part += seconds / RUNS as f64;
            }
        }
        reached.params = learner.params.specs().iter().map(|spec| spec.len()).sum();
        Ok(())
    }

    /// Rows whose every token is learned.
    fn batch(&self) -> Rows {
        let (b, t, v) = (self.rows, self.context, self.config.vocab());
        let ids: Vec<u32> = (0..b * t).map(|i| (i * 7919 % v) as u32).collect();
        let positions = (0..b * t).map(|i| (i % t) as u32).collect();
        let targets = ids.clone();
        Rows { b, t, ids, targets, positions, starts: vec![0; b * t], learned: b * t, samples: Vec::new() }
    }

    fn cluster(&self, reached: &Reached) -> Cluster {
        let Reached { attention, norms, layers, head, update, step, params, .. } = *reached;
        let (flop_s, packed_s) = fit(&reached.products);
        let (call_s, byte_s) = fit(&reached.messages);
        // No messages: no time, at an infinite rate.
        let link = Link { latency_s: 0.0, call_s, bytes_per_s: 1.0 / byte_s };
        let free = device::available_bytes().map_or(f64::INFINITY, |bytes| bytes as f64);
        // What a step has beside its layers and its head: the update, the norm of all gradients, what is
        // cleared and counted. It goes with the parameters.
        let beside = (step - attention - norms - layers - head).max(update);
        let per_s = |seconds: f64| UPDATE_BYTES * params as f64 / seconds;
        let (memory_bytes_per_s, update_bytes_per_s) = (per_s(update), per_s(beside));
        let endless = f64::INFINITY;
        let cluster = Cluster {
            node_devices: self.ranks,
            device_bytes: free / self.ranks as f64,
            flops_per_s: 1.0 / flop_s,
            device_bytes_per_s: memory_bytes_per_s,
            host_bytes: 0.0,
            host_bytes_per_s: memory_bytes_per_s,
            host_link: link,
            intra: link,
            inter: link,
            pace: Pace {
                attention_flops_per_s: endless,
                packed_bytes_per_s: 1.0 / packed_s,
                norm_bytes_per_s: endless,
                element_bytes_per_s: endless,
                logits_per_s: endless,
                update_bytes_per_s,
                beside: false,
                sharing: (self.ranks as f64 / device::cores() as f64).max(1.0),
            },
        };
        let cluster = self.rest(cluster, [attention, norms, layers, head]);
        // The clock of whole steps has the last word: parts timed one by one take longer together.
        let all = self.compute(&self.shape, &cluster) + beside;
        faster(cluster, all / step)
    }

    /// Seconds of a step without its optimizer.
    fn compute(&self, model: &ModelShape, cluster: &Cluster) -> f64 {
        let batch = Batch { rows: self.rows, context: self.context };
        let priced = price(model, batch, cluster, &solo(self.rows));
        priced.map_or(0.0, |price| price.seconds.compute)
    }

    /// Rates of what the pass took beside products: its seconds are linear in each.
    fn rest(&self, cluster: Cluster, [attention, norms, layers, head]: [f64; 4]) -> Cluster {
        let m = self.tokens() as f64;
        let body = ModelShape { vocab: 0, ..self.shape };
        let compute = |model: &ModelShape, pace: Pace| self.compute(model, &Cluster { pace, ..cluster });
        let products = compute(&body, cluster.pace);
        let head_products = compute(&self.shape, cluster.pace) - products;
        let bytes = |pace: Pace| compute(&body, pace) - products;
        let stream = bytes(Pace { norm_bytes_per_s: 1.0, ..cluster.pace });
        let inner = bytes(Pace { element_bytes_per_s: 1.0, ..cluster.pace });
        // What is left after products is never nothing, however the clock fell.
        let left = |all: f64, part: f64| (all - part).max(0.02 * all);
        let pace = Pace {
            attention_flops_per_s: 3.0 * self.shape.attention_flops(m, self.context) / attention,
            norm_bytes_per_s: stream / norms,
            element_bytes_per_s: inner / left(layers, products),
            logits_per_s: m * self.shape.vocab as f64 / left(head, head_products),
            ..cluster.pace
        };
        Cluster { pace, ..cluster }
    }
}

/// All that a device does, so many times as fast.
fn faster(cluster: Cluster, times: f64) -> Cluster {
    let pace = cluster.pace;
    let pace = Pace {
        attention_flops_per_s: times * pace.attention_flops_per_s,
        packed_bytes_per_s: times * pace.packed_bytes_per_s,
        norm_bytes_per_s: times * pace.norm_bytes_per_s,
        element_bytes_per_s: times * pace.element_bytes_per_s,
        logits_per_s: times * pace.logits_per_s,
        update_bytes_per_s: times * pace.update_bytes_per_s,
        ..pace
    };
    Cluster { flops_per_s: times * cluster.flops_per_s, pace, ..cluster }
}

/// Bytes an update reads and writes a parameter, as the cost model counts them.
const UPDATE_BYTES: f64 = 28.0;

fn solo(rows: usize) -> Plan {
    Plan {
        mesh: MeshShape::SOLO,
        scheme: Scheme::OneD,
        parts: Default::default(),
        zero: Zero::One,
        schedule: dist::pipeline::Schedule::OneFOneB,
        microbatch_rows: rows,
        recompute: false,
        offload: Offload::default(),
    }
}

/// Which product of a linear layer y [M, N] = x [M, K] wᵀ [K, N].
#[derive(Clone, Copy)]
enum Turn {
    Forward,
    Input,
    Weight,
}

/// Elements both operands have.
fn packed(turn: Turn, (m, k, n): (usize, usize, usize)) -> usize {
    match turn {
        Turn::Forward => m * k + n * k,
        Turn::Input => m * n + n * k,
        Turn::Weight => m * n + m * k,
    }
}

/// x [M, K], w [N, K], y [M, N] and the gradient of w.
struct Operands {
    sizes: (usize, usize, usize),
    dtype: DType,
    x: Buffer,
    w: Buffer,
    y: Buffer,
    dw: Buffer,
}

impl Operands {
    fn new(dtype: DType, (m, k, n): (usize, usize, usize)) -> Result<Operands, Fault> {
        let (x, w, y) = (zeros(dtype, m * k)?, zeros(dtype, n * k)?, zeros(dtype, m * n)?);
        Ok(Operands { sizes: (m, k, n), dtype, x, w, y, dw: zeros(DType::F32, n * k)? })
    }

    fn multiply(&mut self, turn: Turn) {
        let (dtype, (m, k, n), none) = (self.dtype, self.sizes, Epilogue::default());
        let Operands { x, w, y, dw, .. } = self;
        match turn {
            Turn::Forward => {
                let (x, w) = (Mat::new(x.view(dtype, 0, m * k), k), Mat::new(w.view(dtype, 0, n * k), k));
                let data = y.view_mut(dtype, 0, m * n);
                gemm(m, n, k, x, w.t(), MatMut { data, ld: n }, false, none);
            }
            Turn::Input => {
                let (dy, w) = (Mat::new(y.view(dtype, 0, m * n), n), Mat::new(w.view(dtype, 0, n * k), k));
                let data = x.view_mut(dtype, 0, m * k);
                gemm(m, k, n, dy, w, MatMut { data, ld: k }, false, none);
            }
            Turn::Weight => {
                let (dy, x) = (Mat::new(y.view(dtype, 0, m * n), n), Mat::new(x.view(dtype, 0, m * k), k));
                let data = dw.view_mut(DType::F32, 0, n * k);
                gemm(n, k, m, dy.t(), x, MatMut { data, ld: k }, true, none);
            }
        }
    }
}

fn zeros(dtype: DType, len: usize) -> Result<Buffer, Fault> {
    let mut buffer = Buffer::new(Device::Cpu, len * dtype.size_bytes())?;
    buffer.view_mut(dtype, 0, len).bytes().fill(0);
    Ok(buffer)
}

/// Layers of the probe: as many as have `IN_USE` bytes in use on all ranks, of those the model has.
fn layers(shape: &ModelShape, tokens: usize, ranks: usize) -> usize {
    // Weight and gradient; what is kept of a token, in two bytes each.
    let kept = shape.qkv() + shape.attended() + shape.up() + 4.0 * shape.width as f64;
    let each = 6.0 * shape.layer_params() + 2.0 * kept * tokens as f64;
    let wanted = (IN_USE / (each * ranks as f64)).ceil() as usize;
    wanted.clamp(1, shape.layers.max(1))
}

/// Collectives of gradients and of activations over groups of every size that ranks divide into, all groups
/// of a size at once.
fn messages(mesh: &Mesh, dtype: DType) -> Result<Vec<Sample>, Fault> {
    let (ranks, rank) = (mesh.world_size(), mesh.rank());
    let all = mesh.group(Axis::X);
    let types = if dtype == DType::F32 { vec![dtype] } else { vec![DType::F32, dtype] };
    let mut samples = Vec::new();
    for n in (2..=ranks).filter(|n| ranks.is_multiple_of(*n)) {
        let first = rank / n * n;
        let group = mesh.group_of(&format!("probe of {n}"), &(first..first + n).collect::<Vec<_>>());
        for (size, dtype) in SIZES.into_iter().flat_map(|size| types.iter().map(move |dtype| (size, *dtype)))
        {
            all.barrier()?;
            exchange(&group, size, dtype, &mut samples)?;
        }
    }
    Ok(samples)
}

/// Of `size` bytes in the whole array. A sum on all ranks counts as two calls: it is priced as one to scatter
/// the sums and one to gather them.
fn exchange(group: &Group, size: usize, dtype: DType, samples: &mut Vec<Sample>) -> Result<(), Fault> {
    let (n, len) = (group.size(), size / dtype.size_bytes() / group.size());
    let bytes = (len * (n - 1) * dtype.size_bytes()) as f64;
    let (mut whole, mut part) = (zeros(dtype, n * len)?, zeros(dtype, len)?);
    let mut add = |times: f64, seconds: f64| samples.push((times, times * bytes, seconds));
    add(2.0, calls(group, || group.all_reduce_sum(whole.view_mut(dtype, 0, n * len)))?);
    add(1.0, calls(group, || group.all_gather(part.view(dtype, 0, len), whole.view_mut(dtype, 0, n * len)))?);
    let scatter = || group.reduce_scatter_sum(whole.view(dtype, 0, n * len), part.view_mut(dtype, 0, len));
    add(1.0, calls(group, scatter)?);
    add(1.0, calls(group, || group.broadcast(whole.view_mut(dtype, 0, n * len), 0))?);
    Ok(())
}

fn calls(group: &Group, mut call: impl FnMut() -> Result<(), CommError>) -> Result<f64, Fault> {
    call()?;
    group.barrier()?;
    mean(CALLS, || Ok(call()?))
}

/// Mean seconds of a run: where ranks share cores, single runs are long or short by whose turn it is.
fn mean(runs: usize, mut run: impl FnMut() -> Result<(), Fault>) -> Result<f64, Fault> {
    let started = Instant::now();
    for _ in 0..runs {
        run()?;
    }
    Ok(started.elapsed().as_secs_f64() / runs as f64)
}

/// The costs a and b of seconds = a x + b y that leave the least relative error, neither below zero.
fn fit(samples: &[Sample]) -> (f64, f64) {
    let (mut xx, mut xy, mut yy, mut x1, mut y1) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for (x, y, seconds) in samples.iter().filter(|(.., seconds)| *seconds > 0.0) {
        let (x, y) = (x / seconds, y / seconds);
        (xx, xy, yy, x1, y1) = (xx + x * x, xy + x * y, yy + y * y, x1 + x, y1 + y);
    }
    let alone = |one: f64, square: f64| if square > 0.0 { one / square } else { 0.0 };
    let det = xx * yy - xy * xy;
    let (a, b) = ((x1 * yy - y1 * xy) / det, (y1 * xx - x1 * xy) / det);
    match (a > 0.0, b > 0.0) {
        (true, true) => (a, b),
        (_, true) => (0.0, alone(y1, yy)),
        _ => (alone(x1, xx), 0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_found_again_and_never_below_zero() {
        let samples: Vec<Sample> =
            [(1.0, 5.0), (2.0, 3.0), (7.0, 1.0)].map(|(x, y)| (x, y, 3.0 * x + 0.5 * y)).to_vec();
        let (a, b) = fit(&samples);
        assert!((a - 3.0).abs() < 1e-9 && (b - 0.5).abs() < 1e-9, "{a} {b}");
        // The larger takes less: all of it is the first cost.
        assert_eq!(fit(&[(1.0, 1.0, 1.0), (1.0, 2.0, 0.5)]).1, 0.0);
        assert_eq!(fit(&[]), (0.0, 0.0));
    }
}
