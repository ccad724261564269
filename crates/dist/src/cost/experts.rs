//! Layers of experts: the slices of neurons a rank has, the rows that come to them, and what the router,
//! the exchange and the balance make it receive. Loads are taken as even. `crates/dist/tests/experts.rs`
//! compares the flows with the counters of `dist::Experts`.

use super::cluster::Cluster;
use super::plan::Plan;
use super::volume::{Flow, Product};
use super::{MixtureShape, ModelShape};
use crate::MeshShape;
use crate::{Axis, Scheme};

/// What a rank receives over one axis.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertFlow {
    /// Values of tokens and their gradients, in elements.
    pub rows: Flow,
    /// Scores, choices, weights, counts and sums, in words of four bytes.
    pub words: Flow,
}

/// What one layer of experts makes a rank receive over each axis, in the order of `Axis::ALL`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertFlows {
    /// On the way there; once more where the layer runs again.
    pub forward: [ExpertFlow; Axis::ALL.len()],
    /// On the way back.
    pub backward: [ExpertFlow; Axis::ALL.len()],
}

/// Bytes of a word.
pub(super) const WORD_BYTES: f64 = 4.0;

/// How tokens come to the slices of the experts' neurons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Enter {
    /// They are there: the residual stream is whole.
    Whole,
    /// Tokens of other ranks are gathered.
    Tokens,
    /// Columns are.
    Columns,
}

/// How the experts of a scheme lie on the tensor axes, as `dist::Experts` lays them out.
struct Lies {
    /// Axes that cut neurons, outermost first.
    slices: &'static [Axis],
    /// Axes that cut the tokens of the residual stream.
    tokens: &'static [Axis],
    enter: Enter,
}

impl Lies {
    fn of(scheme: Scheme, mesh: &MeshShape) -> Lies {
        use Axis::{X, Y, Z};
        let (slices, tokens, enter): (&'static [Axis], &'static [Axis], _) = match scheme {
            Scheme::OneD => (&[X], &[], Enter::Whole),
            Scheme::OneDSequence => (&[X], &[X], Enter::Tokens),
            Scheme::Summa | Scheme::TwoPointFiveD => (&[Y], &[Z, X], Enter::Columns),
            // Without z the columns of the stream are whole, and y cuts heads and neurons.
            Scheme::ThreeD if mesh.size(Z) == 1 => (&[Y], &[X, Y], Enter::Tokens),
            Scheme::ThreeD => (&[Z], &[X, Y], Enter::Columns),
            Scheme::WeightStationary => (&[X, Y], &[], Enter::Columns),
        };
        Lies { slices, tokens, enter }
    }

    /// Axes along which experts are copies that see other tokens.
    fn copies(&self) -> impl Iterator<Item = Axis> + '_ {
        self.tokens.iter().copied().filter(|axis| !self.slices.contains(axis))
    }

    /// Pieces the columns of the residual stream are cut into.
    fn columns(&self, mesh: &MeshShape) -> f64 {
        if self.enter == Enter::Columns { ranks(mesh, self.slices.iter().copied()) } else { 1.0 }
    }

    /// Tokens of `m` in a rank's piece of the residual stream.
    fn streamed(&self, mesh: &MeshShape, m: f64) -> f64 {
        m / ranks(mesh, self.tokens.iter().copied())
    }

    /// Tokens of `m` a rank's slices serve.
    fn served(&self, mesh: &MeshShape, m: f64) -> f64 {
        m / ranks(mesh, self.copies())
    }
}

fn ranks(mesh: &MeshShape, axes: impl Iterator<Item = Axis>) -> f64 {
    axes.map(|axis| mesh.size(axis)).product::<usize>() as f64
}

/// Experts of the rank that has most.
fn fullest(mixture: &MixtureShape, mesh: &MeshShape) -> f64 {
    mixture.experts.div_ceil(mesh.size(Axis::Ep)) as f64
}

fn all_reduce(n: f64, whole: f64) -> Flow {
    let mut flow = Flow::ring(n, whole);
    flow.add(flow);
    flow
}

/// What a layer of experts of `width` makes the fullest rank receive for a microbatch of `m` tokens, the
/// sums of the balance apart (`pool_flows`).
pub fn expert_flows(
    mixture: &MixtureShape,
    width: usize,
    (scheme, mesh): (Scheme, &MeshShape),
    m: f64,
) -> ExpertFlows {
    let lies = Lies::of(scheme, mesh);
    let (d, k, e) = (width as f64, mixture.choices as f64, mixture.experts as f64);
    let (streamed, served) = (lies.streamed(mesh, m), lies.served(mesh, m));
    // Scores of the router, and of the gate of an expert for all tokens.
    let (scores, gate) = (streamed * e, if mixture.shared_ffn > 0 { streamed } else { 0.0 });
    let mut flows = ExpertFlows::default();
    let mut outside = 1.0;
    for axis in lies.slices {
        let n = mesh.size(*axis) as f64;
        let (there, back) = (&mut flows.forward[*axis as usize], &mut flows.backward[*axis as usize]);
        match lies.enter {
            Enter::Whole => {
                // Sums of outputs, and of the inputs' gradients.
                there.rows.add(all_reduce(n, served * d));
                back.rows.add(all_reduce(n, served * d));
                back.words.add(all_reduce(n, served * k));
            }
            Enter::Tokens => {
                // Gathered to enter and scattered to leave, and the reverse.
                there.rows.add(all_reduce(n, served * d));
                back.rows.add(all_reduce(n, served * d));
                // Weights and choices; gradients of weights.
                there.words.add(all_reduce(n, served * k));
                back.words.add(Flow::ring(n, served * k));
            }
            Enter::Columns => {
                there.rows.add(all_reduce(n, served * d / outside));
                back.rows.add(all_reduce(n, served * d / outside));
                there.words.add(all_reduce(n, scores));
                back.words.add(all_reduce(n, served * k));
                if gate > 0.0 {
                    there.words.add(all_reduce(n, gate));
                    back.words.add(all_reduce(n, gate));
                }
            }
        }
        outside *= n;
    }
    let exchange = exchange(mixture, mesh, served, d);
    flows.forward[Axis::Ep as usize] = exchange;
    flows.backward[Axis::Ep as usize].rows.add(exchange.rows);
    flows
}

/// One way over `ep`: how many rows come, then the rows of others to the experts here, and ours back from
/// theirs. With E/N experts a rank both are (N - 1)/N of the k `served` rows.
fn exchange(mixture: &MixtureShape, mesh: &MeshShape, served: f64, d: f64) -> ExpertFlow {
    let n = mesh.size(Axis::Ep) as f64;
    if n == 1.0 {
        return ExpertFlow::default();
    }
    let (own, rows) = (fullest(mixture, mesh), served * mixture.choices as f64);
    let part = own / mixture.experts as f64;
    let flow = |elements| Flow { elements, calls: 1.0, hops: n - 1.0 };
    let mut both = flow((n - 1.0) * part * rows * d);
    both.add(flow((1.0 - part) * rows * d));
    ExpertFlow { rows: both, words: flow((n - 1.0) * own) }
}

/// Words a rank receives over each axis for the sums of one layer's balance, 2 E + 1 over all ranks that
/// see other tokens, on the way there.
pub fn pool_flows(mixture: &MixtureShape, scheme: Scheme, mesh: &MeshShape) -> [Flow; Axis::ALL.len()] {
    let mut flows = [Flow::default(); Axis::ALL.len()];
    let lies = Lies::of(scheme, mesh);
    for axis in [Axis::Dp, Axis::Fsdp, Axis::Ep, Axis::Cp].iter().chain(lies.tokens) {
        flows[*axis as usize] = all_reduce(mesh.size(*axis) as f64, (2 * mixture.experts + 1) as f64);
    }
    flows
}

/// What the fullest rank multiplies for one layer and `m` tokens, forward: (how many, each). Every expert
/// gets as many rows.
pub fn expert_products(
    mixture: &MixtureShape,
    width: usize,
    (scheme, mesh): (Scheme, &MeshShape),
    m: f64,
) -> [(f64, Product); 3] {
    let lies = Lies::of(scheme, mesh);
    let (d, e) = (width as f64, mixture.experts as f64);
    let slices = ranks(mesh, lies.slices.iter().copied()) as usize;
    let f = mixture.ffn.div_ceil(slices) as f64;
    let here = lies.served(mesh, m) * (mixture.choices * mesh.size(Axis::Ep)) as f64 / e;
    let own = fullest(mixture, mesh);
    let route = Product { m: lies.streamed(mesh, m), k: d / lies.columns(mesh), n: e };
    [(1.0, route), (own, Product { m: here, k: d, n: 2.0 * f }), (own, Product { m: here, k: f, n: d })]
}

/// Elements a rank keeps of one layer of experts for `m` tokens: the router's input and probabilities,
/// the rows that came and what they gave first, and the rows that came back.
pub(super) fn kept(model: &ModelShape, mixture: &MixtureShape, plan: &Plan, m: f64) -> f64 {
    let mesh = &plan.mesh;
    let lies = Lies::of(plan.scheme, mesh);
    let at = (plan.scheme, mesh);
    let [(_, route), (own, up), _] = expert_products(mixture, model.width, at, m);
    let back = lies.served(mesh, m) * (mixture.choices * model.width) as f64;
    // Rows of the expert every token goes to wait for its gate.
    let shared = if mixture.shared_ffn > 0 { route.m * route.k } else { 0.0 };
    let probabilities = route.m * route.n * WORD_BYTES / super::memory::ACTIVATION_BYTES;
    route.m * route.k + probabilities + own * up.m * (up.k + up.n) + back + shared
}

/// Parameters of the experts of one layer the fullest rank has, and of its router.
pub(super) fn params(model: &ModelShape, mixture: &MixtureShape, plan: &Plan) -> (f64, f64) {
    let [_, (own, up), (_, down)] =
        expert_products(mixture, model.width, (plan.scheme, &plan.mesh), plan.microbatch_rows as f64);
    let columns = Lies::of(plan.scheme, &plan.mesh).columns(&plan.mesh);
    (own * (up.k * up.n + down.k * down.n), model.router_params() / columns)
}

/// Whether gradients of experts, and of routers, are summed over `axis`, whose ranks see other tokens.
pub(super) fn summed(plan: &Plan, axis: Axis) -> (bool, bool) {
    let lies = Lies::of(plan.scheme, &plan.mesh);
    match axis {
        Axis::Dp | Axis::Cp => (true, true),
        Axis::Ep => (false, true),
        _ => (lies.copies().any(|copy| copy == axis), lies.tokens.contains(&axis)),
    }
}

/// Seconds of flows over all axes: nothing hides them, for an expert waits for its rows.
pub(super) fn seconds(cluster: &Cluster, mesh: &MeshShape, flows: &[ExpertFlow; Axis::ALL.len()]) -> f64 {
    let each = Axis::ALL.iter().zip(flows).map(|(axis, flow)| {
        let link = cluster.link(mesh, *axis);
        link.seconds(flow.rows, super::memory::ACTIVATION_BYTES) + link.seconds(flow.words, WORD_BYTES)
    });
    each.sum()
}
