//! What N ranks reach on this machine, measured with all of them busy at once, at the recipe's own
//! shapes: the figures a mesh is chosen by. Ranks are threads, each with its share of the cores.

use crate::TrainError;
use crate::learner::{Learner, LearnerOptions};
use crate::recipe::Recipe;
use data::Batch as Rows;
use device::{Buffer, DType, Device, View, ViewMut};
use dist::cost::{Batch, Cluster, Link, ModelShape, Offload, Pace, Pair, Plan, Zero, price};
use dist::{Axis, CommError, Flow, Group, Mesh, MeshShape, Options, Scheme, launch};
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use model::{Config, Recompute};
use std::time::Instant;
use tensor::Fault;

/// Tokens of the probe: enough for products to reach their rate.
const TOKENS: usize = 512;
/// Longest rows of the probe.
const CONTEXT: usize = 2048;
/// Vocabulary of the probe at most: a logit costs the same in any.
const VOCAB: usize = 4096;
/// Layers of the probe.
const LAYERS: usize = 1;
/// Times a product or a pass is measured, after one that warms up.
const RUNS: usize = 2;
/// Times a collective is.
const CALLS: usize = 12;
/// Bytes of the whole array in collectives.
const SIZES: [usize; 2] = [64 << 10, 4 << 20];

/// Seconds as a sum of two costs: (amount of the first, of the second, seconds).
type Sample = (f64, f64, f64);

/// What one rank reached.
struct Reached {
    /// FLOPs, bytes packed.
    products: Vec<Sample>,
    /// Hops, bytes received.
    messages: Vec<Sample>,
    /// Seconds of attention, of the rest of the layers, of head and loss, of the optimizer.
    attention: f64,
    layers: f64,
    head: f64,
    update: f64,
    params: usize,
}

/// Speeds of `ranks` ranks on this machine for the model and the recipe, in about two seconds. Errors: the
/// model cannot be built, a layer of it does not fit, a rank failed.
pub fn measure_here(config: &Config, recipe: &Recipe, ranks: usize) -> Result<Cluster, TrainError> {
    let line = MeshShape::new(&[(Axis::X, ranks)]);
    let line = line.map_err(|error| TrainError::Mesh { what: error.to_string() })?;
    let probe = Probe::new(config, recipe, ranks)?;
    let ends = launch(&line, &Options { deadline: recipe.mesh.deadline }, |mesh| probe.run(mesh));
    let reached =
        ends.map_err(|failure| TrainError::Mesh { what: format!("measuring speeds: {failure}") })?;
    Ok(probe.cluster(&reached))
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
        let mut json = config.with_layers(LAYERS).to_json("bfloat16");
        json["vocab_size"] = config.vocab().min(VOCAB).into();
        let config = Config::from_json(&json)?;
        let context = recipe.train.context.min(CONTEXT);
        let rows = (TOKENS / context).max(1);
        Ok(Probe { shape: config.shape(), config, recipe, rows, context, ranks })
    }

    fn tokens(&self) -> usize {
        self.rows * self.context
    }

    fn run(&self, mesh: &Mesh) -> Result<Reached, TrainError> {
        let group = mesh.group(Axis::X);
        let products = self.products(&group)?;
        let messages = if self.ranks > 1 { messages(&group)? } else { Vec::new() };
        let mut reached =
            Reached { products, messages, attention: 0.0, layers: 0.0, head: 0.0, update: 0.0, params: 0 };
        self.pass(&group, &mut reached)?;
        Ok(reached)
    }

    /// The products of a layer forward and for both gradients, whole and cut among the ranks.
    fn products(&self, group: &Group) -> Result<Vec<Sample>, Fault> {
        let m = self.tokens();
        let pairs =
            [Pair::Attention, Pair::Mlp].into_iter().flat_map(|pair| self.shape.products(pair, m as f64));
        let mut samples = Vec::new();
        for (_, product) in pairs {
            let (k, n) = (product.k as usize, product.n as usize);
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

    /// A step of a model of one layer, op by op.
    fn pass(&self, group: &Group, reached: &mut Reached) -> Result<(), TrainError> {
        let train = &self.recipe.train;
        let options = LearnerOptions {
            context: self.context,
            dtype: train.dtype,
            adamw: train.adamw,
            recompute: Recompute::Never,
            tiers: None,
        };
        let mut learner = Learner::on(&Flow::solo(), &self.config, options)
            .map_err(|error| TrainError::Mesh { what: format!("measuring speeds: {error}") })?;
        learner.initialise(self.recipe.run.seed)?;
        let batch = self.batch();
        learner.profile(&batch)?;
        group.barrier().map_err(Fault::outside)?;
        for _ in 0..RUNS {
            for (_, op, seconds) in learner.profile(&batch)? {
                let part = match op.as_str() {
                    "attention" => &mut reached.attention,
                    "head_loss" => &mut reached.head,
                    "adamw" => &mut reached.update,
                    "embedding" => continue,
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

    /// The figures of all ranks as one: of equal ranks the mean, as each waits for the others.
    fn cluster(&self, reached: &[Reached]) -> Cluster {
        let mean = |of: fn(&Reached) -> f64| reached.iter().map(of).sum::<f64>() / reached.len() as f64;
        let all = |of: fn(&Reached) -> &Vec<Sample>| reached.iter().flat_map(of).copied().collect::<Vec<_>>();
        let (flop_s, packed_s) = fit(&all(|r| &r.products));
        let (hop_s, byte_s) = fit(&all(|r| &r.messages));
        let link = match self.ranks {
            1 => Link { latency_s: 0.0, bytes_per_s: f64::INFINITY },
            _ => Link { latency_s: hop_s, bytes_per_s: 1.0 / byte_s },
        };
        let free = device::available_bytes().map_or(f64::INFINITY, |bytes| bytes as f64);
        let update_bytes_per_s = UPDATE_BYTES * reached[0].params as f64 / mean(|r| r.update);
        let endless = f64::INFINITY;
        let cluster = Cluster {
            node_devices: self.ranks,
            device_bytes: free / self.ranks as f64,
            flops_per_s: 1.0 / flop_s,
            device_bytes_per_s: update_bytes_per_s,
            host_bytes: 0.0,
            host_bytes_per_s: update_bytes_per_s,
            host_link: link,
            intra: link,
            inter: link,
            pace: Pace {
                attention_flops_per_s: endless,
                packed_bytes_per_s: 1.0 / packed_s,
                element_bytes_per_s: endless,
                logits_per_s: endless,
                update_bytes_per_s,
                beside: false,
                sharing: (self.ranks as f64 / device::cores() as f64).max(1.0),
            },
        };
        self.rest(cluster, mean(|r| r.attention), mean(|r| r.layers), mean(|r| r.head))
    }

    /// Rates of what the pass took beside products: its seconds are linear in each.
    fn rest(&self, cluster: Cluster, attention: f64, layers: f64, head: f64) -> Cluster {
        let m = self.tokens() as f64;
        let body = ModelShape { vocab: 0, ..self.shape };
        let compute = |model: &ModelShape, pace: Pace| {
            let batch = Batch { rows: self.rows, context: self.context };
            let priced = price(model, batch, &Cluster { pace, ..cluster }, &solo(self.rows));
            priced.map_or(0.0, |price| price.seconds.compute)
        };
        let products = compute(&body, cluster.pace);
        let head_products = compute(&self.shape, cluster.pace) - products;
        let bytes = compute(&body, Pace { element_bytes_per_s: 1.0, ..cluster.pace }) - products;
        // What is left after products is never nothing, however the clock fell.
        let left = |all: f64, part: f64| (all - part).max(0.02 * all);
        let pace = Pace {
            attention_flops_per_s: 3.0 * self.shape.attention_flops(m, self.context) / attention,
            element_bytes_per_s: bytes / left(layers, products),
            logits_per_s: m * self.shape.vocab as f64 / left(head, head_products),
            ..cluster.pace
        };
        Cluster { pace, ..cluster }
    }
}

/// Bytes an update reads and writes a parameter, as the cost model counts them.
const UPDATE_BYTES: f64 = 28.0;

fn solo(rows: usize) -> Plan {
    Plan {
        mesh: MeshShape::SOLO,
        scheme: Scheme::OneD,
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
        let zeros = |dtype: DType, len: usize| -> Result<Buffer, Fault> {
            let mut buffer = Buffer::new(Device::Cpu, len * dtype.size_bytes())?;
            buffer.view_mut(dtype, 0, len).bytes().fill(0);
            Ok(buffer)
        };
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

/// Collectives of f32 over all ranks, at two sizes.
fn messages(group: &Group) -> Result<Vec<Sample>, Fault> {
    let n = group.size();
    let mut samples = Vec::new();
    for size in SIZES {
        let piece = size / DType::F32.size_bytes() / n;
        let (mut whole, mut part) = (vec![1f32; piece * n], vec![1f32; piece]);
        let bytes = (piece * (n - 1) * DType::F32.size_bytes()) as f64;
        let hops = (n - 1) as f64;
        let mut add =
            |times: f64, hops: f64, seconds: f64| samples.push((times * hops, times * bytes, seconds));
        let seconds = calls(group, || group.all_reduce_sum(ViewMut::of_f32(&mut whole)))?;
        add(2.0, hops, seconds);
        let seconds = calls(group, || group.all_gather(View::of_f32(&part), ViewMut::of_f32(&mut whole)))?;
        add(1.0, hops, seconds);
        let seconds =
            calls(group, || group.reduce_scatter_sum(View::of_f32(&whole), ViewMut::of_f32(&mut part)))?;
        add(1.0, hops, seconds);
        let seconds = calls(group, || group.broadcast(ViewMut::of_f32(&mut whole), 0))?;
        add(1.0, hops.log2().ceil().max(1.0), seconds);
    }
    Ok(samples)
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
