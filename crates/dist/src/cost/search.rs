//! The cheapest plan for a number of devices, and why every other family of plans lost.
//!
//! All meshes (rectangles included), schemes, schedules, microbatches, ZeRO stages, recompute and
//! offload are tried together. What keeps it to seconds for ten thousand devices: layers are priced
//! once for all plans that share them, and a mesh whose products and messages alone take longer
//! than the best whole plan of its family is left. Loops and ties have one order: the same question
//! gets the same answer.

use super::changed::{changed, other_experts};
use super::cluster::Cluster;
use super::family::Family;
use super::plan::{Offload, Plan, PlanError, Zero};
use super::price::{Price, Run, price};
use super::seconds::LayerCost;
use super::volume::{Grid, inner_cut};
use super::{Batch, ModelShape, Pair};
use crate::pipeline::Schedule;
use crate::{Axis, MeshShape, Parts, Scheme};
use std::collections::BTreeMap;

/// Shortest piece of a row a context rank gets.
const LEAST_CONTEXT: usize = 256;

/// Most slices of the model on one stage.
const MOST_CHUNKS: usize = 8;

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
    /// Plans that were priced.
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
    let mut best: Option<Price> = None;
    for devices in counts {
        let mut hunt = Hunt::new(model, batch, cluster, Space { devices, mesh: None, ..space });
        let limit = best.map_or(limit, |best| best.step().min(limit));
        (hunt.limit, hunt.one_is_enough) = (limit, true);
        hunt.all_meshes();
        let found = hunt.bests.values().filter_map(|found| found.best);
        let found = found.filter(|price| price.step() < limit);
        best = found.min_by(|a, b| a.step().total_cmp(&b.step())).or(best);
    }
    best
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

/// What a layer's cost depends on: the tensor mesh, cp, ep, rows of a microbatch.
type LayerKey = (Grid, Scheme, Parts, usize, usize, usize);

fn key(plan: &Plan) -> LayerKey {
    let (grid, cp, ep) = (plan.mesh.grid(), plan.mesh.size(Axis::Cp), plan.mesh.size(Axis::Ep));
    (grid, plan.scheme, plan.parts, cp, ep, plan.microbatch_rows)
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
    layers: BTreeMap<LayerKey, LayerCost>,
    /// Mixed layers that take less time than unmixed ones.
    paying: BTreeMap<LayerKey, bool>,
    bests: BTreeMap<Family, Found>,
    priced: usize,
}

impl<'a> Hunt<'a> {
    fn new(model: &'a ModelShape, batch: Batch, cluster: &'a Cluster, space: Space) -> Hunt<'a> {
        let (layers, paying, bests) = Default::default();
        let (limit, one_is_enough, priced) = (f64::INFINITY, false, 0);
        Hunt { model, batch, cluster, space, limit, one_is_enough, layers, paying, bests, priced }
    }

    fn all_meshes(&mut self) {
        if let Some(mesh) = self.space.mesh {
            return self.on_mesh(mesh);
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
            for fsdp in divisors(replicas / ep) {
                let mesh = base.with(Axis::Ep, ep).with(Axis::Fsdp, fsdp);
                self.on_mesh(mesh.with(Axis::Dp, replicas / ep / fsdp));
            }
        }
    }

    fn on_mesh(&mut self, mesh: MeshShape) {
        if mesh.replicas() > self.batch.rows {
            return;
        }
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
                if family != Family::Mixed || self.pays(&plan) {
                    self.on_microbatch(family, plan);
                }
            }
        }
    }

    /// Whether a layer of mixed schemes takes less time than it does in each of them alone, where heads
    /// allow that: a plan that gains nothing there gains nothing elsewhere. Asked once a layer's cost.
    fn pays(&mut self, plan: &Plan) -> bool {
        if let Some(known) = self.paying.get(&key(plan)) {
            return *known;
        }
        let own = self.layer(plan).layer.total();
        let pays = [Pair::Attention, Pair::Mlp].into_iter().all(|part| {
            let alone = Plan { scheme: plan.scheme_of(part), parts: Parts::default(), ..*plan };
            let heads = inner_cut(alone.scheme, alone.mesh.grid()).1;
            heads > self.model.heads || own < self.layer(&alone).layer.total()
        });
        self.paying.insert(key(plan), pays);
        pays
    }

    fn layer(&mut self, plan: &Plan) -> &LayerCost {
        let (model, batch, cluster) = (self.model, self.batch, self.cluster);
        self.layers.entry(key(plan)).or_insert_with(|| LayerCost::new(model, batch, cluster, plan))
    }

    /// All plans that share mesh, schemes and microbatch.
    fn on_microbatch(&mut self, family: Family, plan: Plan) {
        if plan.check(self.model, self.batch).is_err() {
            return;
        }
        let each = self.layer(&plan).layer.total() / self.cluster.pace.sharing;
        let found = self.bests.entry(family).or_default();
        let layers = self.model.layers.div_ceil(plan.mesh.size(Axis::Pp));
        let bound = plan.microbatches(self.batch) as f64 * layers as f64 * each;
        if bound >= found.best.map_or(self.limit, |best| best.step().min(self.limit)) {
            return;
        }
        let layer = &self.layers[&key(&plan)];
        let mut fitting: Vec<Plan> = Vec::new();
        for plan in variants(&plan, self.model, self.batch, self.space.offload) {
            // To share more never takes less time: it is for what does not fit otherwise.
            let least = Plan { zero: Zero::One, ..plan };
            if fitting.contains(&least) {
                continue;
            }
            let Ok(pipeline) = plan.check(self.model, self.batch) else { continue };
            let run =
                Run { model: self.model, batch: self.batch, cluster: self.cluster, plan: &plan, pipeline };
            let price = run.price(layer);
            self.priced += 1;
            if price.fits(self.cluster) {
                fitting.push(least);
                if found.best.is_none_or(|best| price.step() < best.step()) {
                    found.best = Some(price);
                    if self.one_is_enough {
                        self.limit = self.limit.min(price.step());
                    }
                }
            } else if found.best.is_none()
                && found.least.is_none_or(|least| price.memory.device() < least.memory.device())
            {
                found.least = Some(price);
            }
        }
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

/// Sizes of x, y, z with this product: 1D as (p, 1, 1); two axes both above 1; three all above 1 or
/// depth over a plane. Every grid once.
fn grids(tensor: usize) -> Vec<Grid> {
    let mut grids = Vec::new();
    for z in divisors(tensor) {
        for y in divisors(tensor / z) {
            let x = tensor / z / y;
            // A line or a plane is spelled one way; z is for depth and cubes.
            let line = y == 1 && z == 1;
            if line || (x > 1 && y > 1) {
                grids.push(Grid { x, y, z });
            }
        }
    }
    grids
}

/// Families that run on a grid. Plain 1D is not tried: sequence-parallel 1D moves the same bytes and
/// keeps less.
pub(super) fn schemes(grid: Grid) -> Vec<(Family, Scheme)> {
    match grid {
        Grid { x: 1, y: 1, z: 1 } => vec![(Family::NoTensor, Scheme::OneD)],
        Grid { y: 1, z: 1, .. } => vec![(Family::OneD, Scheme::OneDSequence)],
        Grid { z: 1, .. } => {
            vec![(Family::Summa, Scheme::Summa), (Family::WeightStationary, Scheme::WeightStationary)]
        }
        _ => vec![(Family::TwoPointFiveD, Scheme::TwoPointFiveD), (Family::ThreeD, Scheme::ThreeD)],
    }
}

/// Schemes of the residual stream and of one part that has its own, on a plane.
pub(super) fn mixed(grid: Grid) -> Vec<(Scheme, Parts)> {
    if grid.x == 1 || grid.y == 1 || grid.z > 1 {
        return Vec::new();
    }
    let pairs = [(Scheme::Summa, Scheme::WeightStationary), (Scheme::WeightStationary, Scheme::Summa)];
    let parts = |(stream, other)| {
        let attention = Parts { attention: Some(other), ffn: None };
        [(stream, attention), (stream, Parts { attention: None, ffn: Some(other) })]
    };
    pairs.into_iter().flat_map(parts).collect()
}

/// Rows of a microbatch: divisors, and powers of two for rows that have few.
fn microbatches(rows: usize) -> Vec<usize> {
    let powers = (0..usize::BITS).map(|bit| 1usize << bit).take_while(|power| *power <= rows);
    let mut all: Vec<usize> = divisors(rows).into_iter().chain(powers).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Every choice that leaves mesh, schemes and microbatch alone. GPipe is not among them: it takes
/// 1F1B's time and more memory.
pub(super) fn variants(plan: &Plan, model: &ModelShape, batch: Batch, offload: bool) -> Vec<Plan> {
    let pp = plan.mesh.size(Axis::Pp);
    let mut schedules = vec![Schedule::OneFOneB];
    if pp > 1 {
        schedules.push(Schedule::ZeroBubble);
        if plan.microbatches(batch).is_multiple_of(pp) {
            let chunks = (2..=MOST_CHUNKS).filter(|v| model.layers.is_multiple_of(pp * v));
            schedules.extend(chunks.map(|chunks| Schedule::Interleaved { chunks }));
        }
    }
    let zeros: &[Zero] = match plan.mesh.size(Axis::Fsdp) {
        1 => &[Zero::One],
        _ => &[Zero::One, Zero::Two, Zero::Three],
    };
    let mut all = Vec::new();
    for schedule in schedules {
        for zero in zeros {
            for recompute in [false, true] {
                for offload in offloads(offload) {
                    all.push(Plan { schedule, zero: *zero, recompute, offload, ..*plan });
                }
            }
        }
    }
    all
}

pub(super) fn offloads(allowed: bool) -> Vec<Offload> {
    let all = [(false, false), (true, false), (false, true), (true, true)];
    let all = all.map(|(optimizer, activations)| Offload { optimizer, activations });
    all[..if allowed { 4 } else { 1 }].to_vec()
}

/// All divisors, ascending.
fn divisors(n: usize) -> Vec<usize> {
    let low: Vec<usize> = (1..=n.isqrt()).filter(|d| n.is_multiple_of(*d)).collect();
    let high = low.iter().rev().map(|d| n / d).filter(|d| d * d > n);
    low.iter().copied().chain(high).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_and_grids_are_complete() {
        assert_eq!(divisors(36), [1, 2, 3, 4, 6, 9, 12, 18, 36]);
        assert_eq!(divisors(1), [1]);
        let named = grids(8).iter().map(|g| (g.x, g.y, g.z)).collect::<Vec<_>>();
        assert_eq!(named, [(8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2)]);
        assert_eq!(microbatches(12), [1, 2, 3, 4, 6, 8, 12]);
    }
}
