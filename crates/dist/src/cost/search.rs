//! The cheapest plan for a number of devices, and why every other family of plans lost.
//!
//! All meshes (rectangles included), schemes, schedules, microbatches, ZeRO stages, recompute and
//! offload are tried together. What keeps it to seconds for ten thousand devices: layers are priced
//! once for all plans that share them, and a mesh whose products and messages alone take longer
//! than the best whole plan of its family is left. Loops and ties have one order: the same question
//! gets the same answer.

use super::changed::{changed, other_experts};
use super::choices::{divisors, grids, microbatches, mixed, offloads, schedules, schemes, zeros};
use super::cluster::Cluster;
use super::family::Family;
use super::plan::{Offload, Plan, PlanError, Zero};
use super::price::{Price, Run, price};
use super::seconds::LayerCost;
use super::volume::{Grid, inner_cut};
use super::{Batch, ModelShape, Pair};
use crate::pipeline::Schedule;
use crate::{Axis, MeshShape, Parts, Scheme};
use std::collections::{BTreeMap, HashMap};

/// Shortest piece of a row a context rank gets.
const LEAST_CONTEXT: usize = 256;

/// Numbers of devices that `fewer` tries.
const MOST_COUNTS: usize = 6;

/// What may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Space {
    /// Devices; each is one rank.
    pub devices: usize,
    /// This mesh only.
    pub mesh: Option<MeshShape>,
    /// Whether host memory may be used.
    pub offload: bool,
}

/// The best of a family.
#[derive(Clone, Debug, PartialEq)]
pub struct Contender {
    /// Which family.
    pub family: Family,
    /// Its best plan that fits.
    pub best: Option<Price>,
    /// Its plan of least memory, where none fits; nothing where no plan of it can be run.
    pub least: Option<Price>,
    /// Why it is not the choice.
    pub why: String,
}

/// The chosen plan with one thing changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Variation {
    /// What is changed.
    pub what: String,
    /// What that costs, if it can be run.
    pub price: Result<Price, PlanError>,
}

/// What the search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The cheapest plan that fits.
    pub best: Price,
    /// Every family, the choice's own first, then by step time.
    pub contenders: Vec<Contender>,
    /// The choice with one thing changed.
    pub variations: Vec<Variation>,
    /// Plans that were priced, as far as it took to know that they are not the best.
    pub priced: usize,
}

/// Nothing fits.
#[derive(Clone, Debug, PartialEq)]
pub struct NoFit {
    /// The plan of least memory, unless no mesh can be run at all.
    pub least: Option<Price>,
    /// Fewest devices, of those tried, on which something fits.
    pub devices: Option<usize>,
    /// Whether host memory would make it fit.
    pub offload_helps: bool,
}

/// Find the cheapest plan that fits. When nothing does, the answer says what would.
pub fn search(
    model: &ModelShape,
    batch: Batch,
    cluster: &Cluster,
    space: Space,
) -> Result<Decision, Box<NoFit>> {
    let mut hunt = Hunt::new(model, batch, cluster, space);
    hunt.all_meshes();
    let best =
        hunt.bests.values().filter_map(|found| found.best).min_by(|a, b| a.step().total_cmp(&b.step()));
    match best {
        Some(best) => Ok(hunt.decide(best)),
        None => Err(Box::new(hunt.no_fit())),
    }
}

/// The cheapest plan on nine tenths of the devices or more, on the largest numbers of whole nodes with small
/// factors, if a step takes less than `limit` seconds: sometimes faster than all of them, and what
/// is left when their number has no factors.
pub fn fewer(model: &ModelShape, batch: Batch, cluster: &Cluster, space: Space, limit: f64) -> Option<Price> {
    let node = cluster.node_devices;
    let counts = (space.devices * 9 / 10..space.devices).rev();
    let counts = counts.filter(|n| n.is_multiple_of(node) && smooth(*n)).take(MOST_COUNTS);
    let best_on = |devices| {
        let mut hunt = Hunt::new(model, batch, cluster, Space { devices, mesh: None, ..space });
        (hunt.limit, hunt.one_is_enough) = (limit, true);
        hunt.all_meshes();
        let found = hunt.bests.values().filter_map(|found| found.best);
        found.filter(|price| price.step() < limit).min_by(|a, b| a.step().total_cmp(&b.step()))
    };
    // Beside each other, and no hunt asks what another found: the answer is that of one after the other.
    let found: Vec<Option<Price>> = std::thread::scope(|scope| {
        let hunts: Vec<_> = counts.map(|devices| scope.spawn(move || best_on(devices))).collect();
        let join = |hunt: std::thread::ScopedJoinHandle<'_, _>| {
            hunt.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        hunts.into_iter().map(join).collect()
    });
    found.into_iter().flatten().min_by(|a, b| a.step().total_cmp(&b.step()))
}

/// Whether 2, 3, 5 and 7 are the only prime factors.
fn smooth(mut n: usize) -> bool {
    for prime in [2, 3, 5, 7] {
        while n > 0 && n.is_multiple_of(prime) {
            n /= prime;
        }
    }
    n == 1
}

#[derive(Clone, Copy, Default)]
struct Found {
    best: Option<Price>,
    least: Option<Price>,
}

/// Seconds of a layer, forward and backward, by what they depend on beside the tensor mesh, cp and ep:
/// schemes and rows of a microbatch.
type Layers = BTreeMap<(Scheme, Parts, usize), f64>;

/// A plan of a family as far as its layers cost the same however its replicas share state.
struct Spread {
    family: Family,
    plan: Plan,
    layer: LayerCost,
    /// Seconds no step of such a plan is below.
    bound: f64,
}

struct Hunt<'a> {
    model: &'a ModelShape,
    batch: Batch,
    cluster: &'a Cluster,
    space: Space,
    /// Plans that take longer are of no interest.
    limit: f64,
    /// Whether the best of all will do, whatever its family.
    one_is_enough: bool,
    /// By tensor mesh, cp and ep. Never walked through: its order is not the search's.
    layers: HashMap<(Grid, usize, usize), Layers>,
    bests: BTreeMap<Family, Found>,
    priced: usize,
}

impl<'a> Hunt<'a> {
    fn new(model: &'a ModelShape, batch: Batch, cluster: &'a Cluster, space: Space) -> Hunt<'a> {
        let (layers, bests) = Default::default();
        let (limit, one_is_enough, priced) = (f64::INFINITY, false, 0);
        Hunt { model, batch, cluster, space, limit, one_is_enough, layers, bests, priced }
    }

    fn all_meshes(&mut self) {
        if let Some(mesh) = self.space.mesh {
            let spreads = self.spreads(mesh);
            return self.on_mesh(mesh, &spreads);
        }
        let devices = self.space.devices;
        for pp in divisors(devices).into_iter().filter(|pp| *pp <= self.model.layers) {
            for tensor in divisors(devices / pp) {
                for grid in grids(tensor) {
                    let rest = devices / pp / tensor;
                    let base = MeshShape::SOLO.with(Axis::Pp, pp).with(Axis::X, grid.x);
                    let base = base.with(Axis::Y, grid.y).with(Axis::Z, grid.z);
                    for cp in divisors(rest) {
                        if cp > 1 && self.batch.context / cp < LEAST_CONTEXT {
                            break;
                        }
                        self.on_replicas(base.with(Axis::Cp, cp), rest / cp);
                    }
                }
            }
        }
    }

    /// All ways to make `replicas` replicas share experts and state.
    fn on_replicas(&mut self, base: MeshShape, replicas: usize) {
        let most = self.model.mixture.map_or(1, |mixture| mixture.experts);
        for ep in divisors(replicas).into_iter().filter(|ep| *ep <= most) {
            let mesh = base.with(Axis::Ep, ep).with(Axis::Dp, replicas / ep);
            let spreads = self.spreads(mesh);
            for fsdp in divisors(replicas / ep) {
                let mesh = mesh.with(Axis::Fsdp, fsdp).with(Axis::Dp, replicas / ep / fsdp);
                self.on_mesh(mesh, &spreads);
            }
        }
    }

    /// Schemes and microbatches that may still be worth something on a mesh.
    fn spreads(&mut self, mesh: MeshShape) -> Vec<Spread> {
        let mut spreads = Vec::new();
        if mesh.replicas() > self.batch.rows {
            return spreads;
        }
        let place = (mesh.grid(), mesh.size(Axis::Cp), mesh.size(Axis::Ep));
        let mut layers = self.layers.remove(&place).unwrap_or_default();
        let rows = microbatches(self.batch.rows.div_ceil(mesh.replicas()));
        let one = schemes(mesh.grid()).into_iter().map(|(family, scheme)| (family, scheme, Parts::default()));
        let parts = mixed(mesh.grid()).into_iter().map(|(scheme, parts)| (Family::Mixed, scheme, parts));
        for (family, scheme, parts) in one.chain(parts) {
            let mut plan = Plan {
                mesh,
                scheme,
                parts,
                zero: Zero::One,
                schedule: Schedule::OneFOneB,
                microbatch_rows: 1,
                recompute: false,
                offload: Offload::default(),
            };
            let attention = plan.laid(Pair::Attention);
            if inner_cut(attention.scheme, attention.grid).1 > self.model.heads {
                continue;
            }
            let tokens = plan.token_cut();
            for microbatch_rows in rows.iter().filter(|rows| **rows >= tokens) {
                plan.microbatch_rows = *microbatch_rows;
                spreads.extend(self.spread(family, plan, &mut layers));
            }
        }
        self.layers.insert(place, layers);
        spreads
    }

    fn spread(&self, family: Family, plan: Plan, known: &mut Layers) -> Option<Spread> {
        let (model, batch, cluster) = (self.model, self.batch, self.cluster);
        let each = self.layer_seconds(&plan, known) / cluster.pace.sharing;
        let layers = model.layers.div_ceil(plan.mesh.size(Axis::Pp));
        let bound = plan.microbatches(batch) as f64 * layers as f64 * each;
        if bound >= self.limit(family) || (family == Family::Mixed && !self.pays(&plan, known)) {
            return None;
        }
        plan.check(model, batch).ok()?;
        Some(Spread { family, plan, layer: LayerCost::new(model, batch, cluster, &plan), bound })
    }

    /// Whether a layer of mixed schemes takes less time than it does in each of them alone, where heads
    /// allow that: a plan that gains nothing there gains nothing elsewhere.
    fn pays(&self, plan: &Plan, known: &mut Layers) -> bool {
        let own = self.layer_seconds(plan, known);
        [Pair::Attention, Pair::Mlp].into_iter().all(|part| {
            let alone = Plan { scheme: plan.scheme_of(part), parts: Parts::default(), ..*plan };
            let heads = inner_cut(alone.scheme, alone.mesh.grid()).1;
            heads > self.model.heads || own < self.layer_seconds(&alone, known)
        })
    }

    fn layer_seconds(&self, plan: &Plan, known: &mut Layers) -> f64 {
        let seconds = || LayerCost::headless(self.model, self.batch, self.cluster, plan).layer.total();
        *known.entry((plan.scheme, plan.parts, plan.microbatch_rows)).or_insert_with(seconds)
    }

    /// Seconds that a plan of a family must stay below to be of interest.
    fn limit(&self, family: Family) -> f64 {
        let best = self.bests.get(&family).and_then(|found| found.best);
        best.map_or(self.limit, |best| best.step().min(self.limit))
    }

    fn on_mesh(&mut self, mesh: MeshShape, spreads: &[Spread]) {
        for spread in spreads {
            if spread.bound < self.limit(spread.family) {
                self.on_spread(spread, Plan { mesh, ..spread.plan });
            }
        }
    }

    /// All plans that share mesh, schemes and microbatch.
    fn on_spread(&mut self, spread: &Spread, plan: Plan) {
        let (model, batch, cluster) = (self.model, self.batch, self.cluster);
        for schedule in schedules(&plan, model, batch) {
            for recompute in [false, true] {
                let plan = Plan { schedule, recompute, ..plan };
                let Ok(pipeline) = plan.check(model, batch) else { continue };
                let run = Run::new((model, batch, cluster), plan, pipeline, &spread.layer);
                for offload in offloads(self.space.offload) {
                    // To share more never takes less time: it is for what does not fit otherwise.
                    let mut shared = zeros(&plan.mesh).iter();
                    shared.find(|zero| self.weigh(spread.family, &run, (**zero, *offload)));
                }
            }
        }
    }

    /// Price a plan as far as it takes to know that it is not the best; whether it fits, or is too slow.
    fn weigh(&mut self, family: Family, run: &Run<'_>, (zero, offload): (Zero, Offload)) -> bool {
        self.priced += 1;
        if run.least() >= self.limit(family) {
            return true;
        }
        let (memory, found) = (run.memory(zero, offload), self.bests.entry(family).or_default());
        let fits = memory.fits(self.cluster);
        if fits {
            let price = run.price(zero, offload);
            if found.best.is_none_or(|best| price.step() < best.step()) {
                found.best = Some(price);
                if self.one_is_enough {
                    self.limit = self.limit.min(price.step());
                }
            }
        } else if found.best.is_none()
            && found.least.is_none_or(|least| memory.device() < least.memory.device())
        {
            found.least = Some(run.price(zero, offload));
        }
        fits
    }

    fn decide(self, best: Price) -> Decision {
        let mut contenders: Vec<Contender> = Family::ALL
            .into_iter()
            .map(|family| {
                let found = self.bests.get(&family).copied().unwrap_or_default();
                let why = why_lost(&found, &best, self.cluster);
                Contender { family, best: found.best, least: found.least, why }
            })
            .collect();
        let step = |contender: &Contender| contender.best.map_or(f64::INFINITY, |price| price.step());
        contenders.sort_by(|a, b| step(a).total_cmp(&step(b)));
        let variations = self.variations(&best.plan);
        Decision { best, contenders, variations, priced: self.priced }
    }

    fn variations(&self, plan: &Plan) -> Vec<Variation> {
        let mut all = changed(plan, self.space.offload);
        if self.model.mixture.is_some() {
            all.extend(other_experts(plan));
        }
        all.into_iter()
            .map(|(what, plan)| Variation { what, price: price(self.model, self.batch, self.cluster, &plan) })
            .collect()
    }

    fn no_fit(&self) -> NoFit {
        let least = self.bests.values().filter_map(|found| found.least);
        let least = least.min_by(|a, b| a.memory.device().total_cmp(&b.memory.device()));
        let fits = |space: Space| {
            let mut hunt = Hunt::new(self.model, self.batch, self.cluster, space);
            hunt.all_meshes();
            hunt.bests.values().any(|found| found.best.is_some())
        };
        let offload_helps = !self.space.offload && fits(Space { offload: true, ..self.space });
        let more = (1..=6).map(|doubled| self.space.devices << doubled);
        let pinned = self.space.mesh.is_some();
        let devices = if pinned || offload_helps {
            None
        } else {
            more.into_iter().find(|devices| fits(Space { devices: *devices, ..self.space }))
        };
        NoFit { least, devices, offload_helps }
    }
}

/// The part that costs a family most against the choice.
fn why_lost(found: &Found, best: &Price, cluster: &Cluster) -> String {
    let Some(price) = found.best else {
        return match found.least {
            None => "no mesh of it can be run: too few heads, rows or factors".into(),
            Some(least) if least.memory.device() > cluster.device_bytes => {
                format!("does not fit: {:.1} GiB a device at least", least.memory.device() / GIB)
            }
            Some(_) => "does not fit beside what the driver and the communicator take".into(),
        };
    };
    if price.step() <= best.step() {
        return "the choice".into();
    }
    let (name, more) = price.seconds.most_over(&best.seconds);
    format!("{name} +{:.0} % of the step", 100.0 * more / best.step())
}

const GIB: f64 = (1u64 << 30) as f64;
