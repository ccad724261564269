//! Elements a rank receives for one product, by scheme, phase and axis. `docs/cost-model.md` has
//! the derivations; tests sum them to the formulas per transformer layer.

use crate::redistribute::{Step, steps_into};
use crate::scheme::{lcm, turned};
use crate::{Axis, FlowError, MeshShape, Scheme};

/// Sizes of the tensor axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Grid {
    /// First axis.
    pub x: usize,
    /// Second axis.
    pub y: usize,
    /// Third axis.
    pub z: usize,
}

/// Sizes of a product y [M, N] = x [M, K] w [K, N].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    /// Rows of x and y: tokens.
    pub m: f64,
    /// The summed dim.
    pub k: f64,
    /// Columns of y.
    pub n: f64,
}

/// Products come in pairs that leave the residual stream and return to it (q|k|v and out, up and
/// down): the second finds its input lying the other way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Half {
    /// From the residual stream.
    Leave,
    /// Back into it.
    Return,
}

/// What a rank receives over one axis.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Flow {
    /// Elements received.
    pub elements: f64,
    /// Collectives.
    pub calls: f64,
    /// Messages one after the other that make them up: n - 1 for a ring over n ranks, log2 n for a
    /// broadcast.
    pub hops: f64,
}

/// What a rank receives for one product, over x, y and z.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Volume {
    /// For y.
    pub forward: [Flow; 3],
    /// For the gradient of x.
    pub backward_input: [Flow; 3],
    /// For the gradient of w.
    pub backward_weight: [Flow; 3],
}

/// Distinct ranks a rank exchanges data with over the tensor axes.
pub fn peers(grid: Grid) -> usize {
    (grid.x - 1) + (grid.y - 1) + (grid.z - 1)
}

/// How the products of a part of a layer lie: its scheme, on a grid whose x and y are exchanged where it
/// is turned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Laid {
    pub scheme: Scheme,
    pub grid: Grid,
    turned: bool,
}

impl Laid {
    /// A part of `scheme` beside a residual stream of scheme `stream`.
    pub fn new(mesh: &MeshShape, stream: Scheme, scheme: Scheme) -> Laid {
        let (grid, turned) = (mesh.grid(), turned(mesh, stream, scheme));
        let grid = if turned { Grid { x: grid.y, y: grid.x, ..grid } } else { grid };
        Laid { scheme, grid, turned }
    }

    /// What a rank receives for one product, over the axes of the mesh.
    /// Where an axis of the scheme lies on the mesh.
    pub fn placed(&self, axis: Axis) -> Axis {
        match axis {
            Axis::X if self.turned => Axis::Y,
            Axis::Y if self.turned => Axis::X,
            _ => axis,
        }
    }

    pub fn volume(&self, product: Product, half: Half) -> Volume {
        let mut volume = volume(self.scheme, self.grid, product, half);
        if self.turned {
            for phase in [&mut volume.forward, &mut volume.backward_input, &mut volume.backward_weight] {
                phase.swap(X, Y);
            }
        }
        volume
    }
}

/// What a rank receives over x, y and z where `elements` of the residual stream are led into a part of
/// another scheme and back, forward; backward the same. An axis that is exchanged moves twice (n - 1)/n of
/// what a rank has; one that only one of the two layouts cuts is gathered once.
pub(super) fn crossing(
    mesh: &MeshShape,
    stream: Scheme,
    part: Scheme,
    elements: f64,
) -> Result<[Flow; 3], FlowError> {
    let mut flows = [NONE; 3];
    if stream == part {
        return Ok(flows);
    }
    let (outer, _) = stream.layouts(mesh, false);
    let cut = outer.rows.axes().chain(outer.cols.axes());
    let mut here = elements / cut.map(|axis| mesh.size(axis)).product::<usize>() as f64;
    for step in steps_into(mesh, stream, part)? {
        let n = mesh.size(step.axis()) as f64;
        let flow = &mut flows[step.axis() as usize - Axis::X as usize];
        match step {
            Step::Exchange { .. } => {
                flow.add(Flow::ring(n, here));
                flow.add(Flow::ring(n, here));
            }
            Step::Gather { .. } => {
                here *= n;
                flow.add(Flow::ring(n, here));
            }
            Step::Narrow { .. } => {
                flow.add(Flow::ring(n, here));
                here /= n;
            }
        }
    }
    Ok(flows)
}

/// Whether panels stream beside the product that uses them.
pub(super) fn overlaps(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::Summa | Scheme::TwoPointFiveD)
}

/// Panels of the summed dim: every piece of either operand is in exactly one.
pub(super) fn panels(scheme: Scheme, grid: Grid) -> usize {
    if overlaps(scheme) { lcm(grid.x, grid.y) } else { 1 }
}

/// Sizes of the product a rank computes itself, all panels together.
pub(super) fn block(scheme: Scheme, grid: Grid, product: Product, half: Half) -> Product {
    let (x, y, z) = grid.floats();
    let Product { m, k, n } = product;
    match (scheme, half) {
        (Scheme::OneD | Scheme::OneDSequence, Half::Leave) => Product { m, k, n: n / x },
        (Scheme::OneD | Scheme::OneDSequence, Half::Return) => Product { m, k: k / x, n },
        (Scheme::WeightStationary, Half::Leave) => Product { m, k: k / x, n: n / y },
        (Scheme::WeightStationary, Half::Return) => Product { m, k: k / y, n: n / x },
        (Scheme::ThreeD, Half::Leave) => Product { m: m / x, k: k / z, n: n / y },
        (Scheme::ThreeD, Half::Return) => Product { m: m / x, k: k / y, n: n / z },
        (Scheme::Summa | Scheme::TwoPointFiveD, _) => Product { m: m / (x * z), k, n: n / y },
    }
}

/// Pieces the output of a leaving product is cut into along (tokens, columns): attention needs
/// whole rows of tokens and whole heads.
pub(super) fn inner_cut(scheme: Scheme, grid: Grid) -> (usize, usize) {
    let Grid { x, y, z } = grid;
    match scheme {
        Scheme::OneD | Scheme::OneDSequence => (1, x),
        Scheme::WeightStationary => (1, x * y),
        Scheme::ThreeD | Scheme::Summa | Scheme::TwoPointFiveD => (x * z, y),
    }
}

impl Grid {
    /// Ranks.
    pub fn size(self) -> usize {
        self.x * self.y * self.z
    }

    fn floats(self) -> (f64, f64, f64) {
        (self.x as f64, self.y as f64, self.z as f64)
    }
}

impl Volume {
    /// Elements received over all axes, forward and backward.
    pub fn elements(&self) -> f64 {
        let phases = [self.forward, self.backward_input, self.backward_weight];
        phases.iter().flatten().map(|flow| flow.elements).sum()
    }

    /// Elements received over each axis, forward and backward.
    pub fn by_axis(&self) -> [Flow; 3] {
        let phases = [self.forward, self.backward_input, self.backward_weight];
        let mut sums = [Flow::default(); 3];
        for phase in phases {
            for (sum, flow) in sums.iter_mut().zip(phase) {
                sum.add(flow);
            }
        }
        sums
    }
}

impl Flow {
    /// Both after each other.
    pub fn add(&mut self, other: Flow) {
        self.elements += other.elements;
        self.calls += other.calls;
        self.hops += other.hops;
    }

    /// An all-gather or reduce-scatter over n ranks of a tensor whose gathered part on a rank has
    /// `whole` elements: (n - 1)/n of it arrive, in n - 1 hops.
    pub fn ring(n: f64, whole: f64) -> Flow {
        if n <= 1.0 {
            return Flow::default();
        }
        Flow { elements: (n - 1.0) / n * whole, calls: 1.0, hops: n - 1.0 }
    }

    /// The same elements panel by panel: each a broadcast from, or a reduction to, its owner.
    fn panels(n: f64, whole: f64, panels: f64) -> Flow {
        Flow { calls: panels, hops: panels * n.log2().ceil(), ..Flow::ring(n, whole) }.unless_alone(n)
    }

    fn unless_alone(self, n: f64) -> Flow {
        if n <= 1.0 { Flow::default() } else { self }
    }
}

const NONE: Flow = Flow { elements: 0.0, calls: 0.0, hops: 0.0 };
const X: usize = 0;
const Y: usize = 1;
const Z: usize = 2;

/// What a rank receives for one product.
pub fn volume(scheme: Scheme, grid: Grid, product: Product, half: Half) -> Volume {
    match scheme {
        Scheme::OneD | Scheme::OneDSequence => one_d(grid.x, product, half),
        Scheme::Summa => summa(grid, product),
        Scheme::TwoPointFiveD => two_point_five_d(grid, product),
        Scheme::ThreeD => three_d(grid, product, half),
        Scheme::WeightStationary => weight_stationary(grid, product, half),
    }
}

/// 1D over p ranks: columns of w leaving, rows returning. Leaving, the tokens of x are gathered and
/// the sums of its gradient scattered: (p - 1)/p MK each. Returning, the same for y: (p - 1)/p MN.
/// Where the residual stream is whole, the two of one place are one all-reduce of the same bytes.
pub fn one_d(p: usize, product: Product, half: Half) -> Volume {
    let Product { m, k, n } = product;
    let moved = if half == Half::Leave { m * k } else { m * n };
    let pass = [Flow::ring(p as f64, moved), NONE, NONE];
    Volume { forward: pass, backward_input: pass, backward_weight: [NONE; 3] }
}

/// SUMMA on x rows by y columns; x [M/x, K/y], w [K/x, N/y], y [M/x, N/y]. A pass over the
/// activations costs (y - 1) MK / xy along the row, one over the weights (x - 1) KN / xy along the
/// column; forward and both gradients are one pass over each.
pub fn summa(grid: Grid, product: Product) -> Volume {
    let (x, y, _) = grid.floats();
    let Product { m, k, n } = product;
    let panels = lcm(grid.x, grid.y) as f64;
    // A rank's row holds [M/x, K], its column [K, N/y].
    let pass = [Flow::panels(x, k * n / y, panels), Flow::panels(y, m * k / x, panels), NONE];
    Volume { forward: pass, backward_input: pass, backward_weight: pass }
}

/// SUMMA on each of z layers with M/z tokens, then the sum of the weights' gradient over the
/// layers: reduce-scatter and all-gather, 2 (z - 1)/z KN / xy.
pub fn two_point_five_d(grid: Grid, product: Product) -> Volume {
    let (x, y, z) = grid.floats();
    let mut volume = summa(grid, Product { m: product.m / z, ..product });
    let mut sum = Flow::ring(z, product.k * product.n / (x * y));
    sum.add(sum);
    volume.backward_weight[Z] = sum;
    volume
}

/// 3D: leaving, x [M/x, K/z] is cut among y, w [K/z, N/y] among x, y [M/x, N/y] among z. Each is
/// gathered or scattered once forward and once backward; returning, y and z change places.
pub fn three_d(grid: Grid, product: Product, half: Half) -> Volume {
    let (x, y, z) = grid.floats();
    let Product { m, k, n } = product;
    let (from, gather, to, scatter) = match half {
        Half::Leave => (Y, y, Z, z),
        Half::Return => (Z, z, Y, y),
    };
    let weights = Flow::ring(x, k * n / (gather * scatter));
    let mut activations = [NONE; 3];
    activations[from] = Flow::ring(gather, m * k / (x * scatter));
    activations[to] = Flow::ring(scatter, m * n / (x * gather));
    let mut forward = activations;
    forward[X] = weights;
    Volume { forward, backward_input: activations, backward_weight: [weights, NONE, NONE] }
}

/// Weight-stationary on x by y: leaving, x [M, K/x] is gathered from y ranks and the sums of
/// y [M, N/y] scattered among x; returning, x and y change places. Backward the same with
/// gradients; those of the weights need nothing more, as the gathered input is kept.
pub fn weight_stationary(grid: Grid, product: Product, half: Half) -> Volume {
    let (x, y, _) = grid.floats();
    let Product { m, k, n } = product;
    let (from, gather, to, scatter) = match half {
        Half::Leave => (Y, y, X, x),
        Half::Return => (X, x, Y, y),
    };
    let mut pass = [NONE; 3];
    pass[from] = Flow::ring(gather, m * k / scatter);
    pass[to] = Flow::ring(scatter, m * n / gather);
    Volume { forward: pass, backward_input: pass, backward_weight: [NONE; 3] }
}
