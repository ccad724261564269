//! What N ranks reach on this machine, measured with all of them busy at once, at the recipe's own
//! shapes: the figures a mesh is chosen by. Ranks are threads, each with its share of the cores.

mod timed;

use crate::TrainError;
use crate::learner::{Learner, LearnerOptions};
use crate::recipe::Recipe;
use crate::step::StepPlan;
use data::Batch as Rows;
use device::Device;
use dist::cost::{
    Batch, Cluster, Link, ModelShape, Offload, Pace, Plan, Product, Turn, Work, Zero, expert_products, price,
};
use dist::{Axis, Flow, Group, Mesh, MeshShape, Options, Scheme, launch};
use model::{Config, Recompute};
use std::time::Instant;
use tensor::Fault;
use timed::{Operands, Sample, copies, fit, mean, messages, pages};

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
/// Times a product is measured in a round, after one that warms up.
const RUNS: usize = 3;
/// Times all of it is measured; the least of each figure counts. What disturbs a machine only ever adds, and
/// often for longer than one of these times.
const ROUNDS: usize = 10;

/// What one rank reached, or all of them.
#[derive(Clone, Default)]
struct Reached {
    /// FLOPs, bytes packed, bytes written.
    products: Vec<Sample<3>>,
    /// Calls, bytes received, those of them that are added.
    messages: Vec<Sample<3>>,
    /// Seconds of attention, of norms, of the rest of the layers, of embedding, head and loss, of the optimizer.
    attention: f64,
    norms: f64,
    layers: f64,
    head: f64,
    update: f64,
    /// Seconds a byte: of a copy, of memory that comes and goes.
    moved: f64,
    fresh: f64,
    /// Part of a step beside layers, embedding, head and loss.
    beside: f64,
    /// Of a whole step, by one clock.
    step: f64,
    params: usize,
}

impl Reached {
    /// All seconds: of samples, of parts.
    fn seconds(&mut self) -> impl Iterator<Item = &mut f64> {
        let Reached {
            products,
            messages,
            attention,
            norms,
            layers,
            head,
            update,
            moved,
            fresh,
            beside,
            step,
            params: _,
        } = self;
        let samples = products.iter_mut().map(|s| &mut s.1).chain(messages.iter_mut().map(|s| &mut s.1));
        samples.chain([attention, norms, layers, head, update, moved, fresh, beside, step])
    }

    /// Every figure of this and of another one, as one.
    fn with(mut self, mut other: Reached, join: impl Fn(f64, f64) -> f64) -> Reached {
        self.seconds().zip(other.seconds()).for_each(|(ours, theirs)| *ours = join(*ours, *theirs));
        self
    }

    /// Of all ranks: each figure on average, but a step as it is in a run, where nobody goes on before the last.
    fn of_all<'a>(ranks: impl ExactSizeIterator<Item = &'a Reached> + Clone) -> Reached {
        let count = ranks.len() as f64;
        let last = ranks.clone().map(|rank| rank.step).fold(0.0, f64::max);
        let sum = ranks.cloned().reduce(|sum, rank| sum.with(rank, |a, b| a + b));
        let mut all = sum.expect("there are ranks");
        all.seconds().for_each(|seconds| *seconds /= count);
        all.step = last;
        all
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
    let round = |round: usize| Reached::of_all(reached.iter().map(|rounds| &rounds[round]));
    let rounds: Vec<Reached> = (0..ROUNDS).map(round).collect();
    // A difference of two clocks has no least that means something.
    let mut beside: Vec<f64> = rounds.iter().map(|round| round.beside).collect();
    beside.sort_by(f64::total_cmp);
    let least = rounds.into_iter().reduce(Reached::least).expect("there are rounds");
    Ok(probe.cluster(&Reached { beside: beside[ROUNDS / 2], ..least }))
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
        let (mut learner, batch) = (self.learner()?, self.batch());
        learner.step(std::slice::from_ref(&batch), self.step_plan())?;
        learner.profile(&batch)?;
        (0..ROUNDS).map(|_| self.round(mesh, &mut learner)).collect()
    }

    fn round(&self, mesh: &Mesh, learner: &mut Learner) -> Result<Reached, TrainError> {
        let group = mesh.group(Axis::X);
        let products = self.products(&group)?;
        let messages = messages(mesh, self.recipe.train.dtype)?;
        let dtype = self.recipe.train.dtype;
        let moved = copies(&group, dtype, self.shape.width.div_ceil(2))?;
        let fresh = pages(&group, dtype, self.shape.params() as usize)?;
        let mut reached = Reached { products, messages, moved, fresh, ..Reached::default() };
        self.pass(&group, learner, &mut reached)?;
        Ok(reached)
    }

    /// The products of a layer forward and for both gradients, whole and cut among the ranks either way.
    fn products(&self, group: &Group) -> Result<Vec<Sample<3>>, Fault> {
        let (mut samples, ranks) = (Vec::new(), self.ranks.max(2));
        for Product { m, k, n } in self.layer_products() {
            let (m, k, n) = ((m as usize).max(1), k as usize, n as usize);
            for (k, n) in [(k, n), (k, n.div_ceil(ranks)), (k.div_ceil(ranks), n)] {
                let mut operands = Operands::cold(self.recipe.train.dtype, (m, k, n))?;
                let count = operands.len();
                for turn in [Turn::Forward, Turn::Input, Turn::Weight] {
                    group.barrier()?;
                    operands[count - 1].multiply(turn);
                    let mut run = 0;
                    let seconds = mean(RUNS, || {
                        operands[run % count].multiply(turn);
                        run += 1;
                        Ok(())
                    })?;
                    let product = Product { m: m as f64, k: k as f64, n: n as f64 };
                    let Work { flops, packed_bytes, written_bytes } = Work::of(turn, product, 1.0);
                    samples.push(([flops, packed_bytes, written_bytes], seconds));
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

    /// A step of it: as a run makes it, and op by op.
    fn pass(&self, group: &Group, learner: &mut Learner, reached: &mut Reached) -> Result<(), TrainError> {
        let batch = self.batch();
        group.barrier().map_err(Fault::outside)?;
        let started = Instant::now();
        learner.step(std::slice::from_ref(&batch), self.step_plan())?;
        reached.step = started.elapsed().as_secs_f64();
        group.barrier().map_err(Fault::outside)?;
        for (_, op, seconds) in learner.profile(&batch)? {
            let part = match op.as_str() {
                "attention" => &mut reached.attention,
                "rms_norm" | "layer_norm" => &mut reached.norms,
                "head_loss" | "embedding" => &mut reached.head,
                "adamw" => &mut reached.update,
                _ => &mut reached.layers,
            };
            *part += seconds;
        }
        let Reached { attention, norms, layers, head, .. } = reached;
        reached.beside = 1.0 - (*attention + *norms + *layers + *head) / reached.step;
        reached.params = learner.params.specs().iter().map(|spec| spec.len()).sum();
        Ok(())
    }

    /// Weights stay as they are.
    fn step_plan(&self) -> StepPlan {
        StepPlan { lr: 0.0, clip: self.recipe.train.clip }
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
        let Reached { attention, norms, layers, head, update, moved, fresh, step, params, .. } = *reached;
        let [flop_s, packed_s, written_s] = fit(&reached.products);
        let [call_s, byte_s, summed_s] = fit(&reached.messages);
        // No messages: no time, at an infinite rate.
        let link = Link { latency_s: 0.0, call_s, bytes_per_s: 1.0 / byte_s };
        let free = device::available_bytes().map_or(f64::INFINITY, |bytes| bytes as f64);
        // What a step has beside its layers and its head: the update, the norm of all gradients, what is
        // cleared and counted. It goes with the parameters.
        let beside = (reached.beside * step).max(update);
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
                written_bytes_per_s: 1.0 / written_s,
                norm_bytes_per_s: endless,
                element_bytes_per_s: endless,
                logits_per_s: endless,
                moved_bytes_per_s: 1.0 / moved,
                summed_bytes_per_s: 1.0 / summed_s,
                fresh_bytes_per_s: 1.0 / fresh,
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
        written_bytes_per_s: times * pace.written_bytes_per_s,
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

/// Layers of the probe: as many as have `IN_USE` bytes in use on all ranks, of those the model has.
fn layers(shape: &ModelShape, tokens: usize, ranks: usize) -> usize {
    // Weight and gradient; what is kept of a token, in two bytes each.
    let kept = shape.qkv() + shape.attended() + shape.up() + 4.0 * shape.width as f64;
    let each = 6.0 * shape.layer_params() + 2.0 * kept * tokens as f64;
    let wanted = (IN_USE / (each * ranks as f64)).ceil() as usize;
    wanted.clamp(1, shape.layers.max(1))
}
