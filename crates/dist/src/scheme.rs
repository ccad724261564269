//! Tensor-parallel schemes: how a transformer's activations and weights lie on the axes x, y and z,
//! and which algorithm multiplies them.
//!
//! Products come in pairs. An *opening* one (q|k|v, gate|up) leads from the residual stream into the
//! inner width (heads, ffn), a *closing* one leads back. Between two products everything is local,
//! because the inner width is cut where heads and neurons begin.

use crate::cost::Pair;
use crate::pipeline::Schedule;
use crate::redistribute::steps_into;
use crate::{
    Algorithm, Axis, ContextAttention, Cut, Dim, Held, Keep, Layout, LayoutError, Leave, Mesh, MeshShape,
    Product, Side,
};

/// How products are spread over the tensor axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    /// Weights cut over x, the residual stream whole on every rank (Shoeybi et al. 2019).
    OneD,
    /// The same with the tokens of the residual stream cut over x (Korthikanti et al. 2022).
    OneDSequence,
    /// Tokens over x, widths over y, weights over both; panels travel (Xu et al. 2021).
    Summa,
    /// The same on every layer z of a box, tokens cut over z too and weights copied (Wang et al.
    /// 2021).
    TwoPointFiveD,
    /// Tokens, widths and weights over all three axes (Agarwal et al. 1995, Bian et al. 2021).
    ThreeD,
    /// Weights cut over x and y stay, widths cut over both travel (Pope et al. 2022).
    WeightStationary,
}

impl Scheme {
    /// All of them.
    pub const ALL: [Scheme; 6] = [
        Scheme::OneD,
        Scheme::OneDSequence,
        Scheme::Summa,
        Scheme::TwoPointFiveD,
        Scheme::ThreeD,
        Scheme::WeightStationary,
    ];

    /// Name as recipes write it.
    pub const fn name(self) -> &'static str {
        match self {
            Scheme::OneD => "1d",
            Scheme::OneDSequence => "1d-sequence",
            Scheme::Summa => "summa",
            Scheme::TwoPointFiveD => "2.5d",
            Scheme::ThreeD => "3d",
            Scheme::WeightStationary => "weight-stationary",
        }
    }

    /// The scheme of a name.
    pub fn from_name(name: &str) -> Option<Scheme> {
        Scheme::ALL.into_iter().find(|scheme| scheme.name() == name)
    }

    /// What a mesh suggests by the axes it has.
    pub fn of(mesh: &MeshShape) -> Scheme {
        match (mesh.size(Axis::Y) > 1, mesh.size(Axis::Z) > 1) {
            (false, false) => Scheme::OneD,
            (true, false) => Scheme::Summa,
            (_, true) => Scheme::ThreeD,
        }
    }

    /// Tensor axes the scheme has a use for.
    pub const fn axes(self) -> &'static [Axis] {
        match self {
            Scheme::OneD | Scheme::OneDSequence => &[Axis::X],
            Scheme::Summa | Scheme::WeightStationary => &[Axis::X, Axis::Y],
            Scheme::TwoPointFiveD | Scheme::ThreeD => &[Axis::X, Axis::Y, Axis::Z],
        }
    }

    /// Refuses tensor axes that it would leave idle.
    pub fn check(self, mesh: &MeshShape) -> Result<(), FlowError> {
        for axis in [Axis::X, Axis::Y, Axis::Z] {
            if mesh.size(axis) > 1 && !self.axes().contains(&axis) {
                return Err(FlowError::Idle {
                    scheme: self.name(),
                    axis: axis.name(),
                    size: mesh.size(axis),
                });
            }
        }
        Ok(())
    }

    /// (outer, inner) layouts on `mesh`; with x and y exchanged where it is `turned`.
    pub(crate) fn layouts(self, mesh: &MeshShape, turned: bool) -> (Layout, Layout) {
        let ([x, y], z) = (plane(turned), Axis::Z);
        let lay = |rows: &[Axis], cols: &[Axis]| Layout::new(Cut::on(mesh, rows), Cut::on(mesh, cols));
        match self {
            Scheme::OneD => (lay(&[], &[]), lay(&[], &[x])),
            Scheme::OneDSequence => (lay(&[x], &[]), lay(&[], &[x])),
            Scheme::Summa | Scheme::TwoPointFiveD => (lay(&[z, x], &[y]), lay(&[z, x], &[y])),
            Scheme::ThreeD => (lay(&[x, y], &[z]), lay(&[x, z], &[y])),
            Scheme::WeightStationary => (lay(&[], &[x, y]), lay(&[], &[y, x])),
        }
    }
}

/// The axes that play x and y.
const fn plane(turned: bool) -> [Axis; 2] {
    if turned { [Axis::Y, Axis::X] } else { [Axis::X, Axis::Y] }
}

/// Whether a part lies with x and y exchanged: on a plane, weight-stationary columns nest in those of the
/// other schemes that way only.
pub(crate) fn turned(mesh: &MeshShape, stream: Scheme, part: Scheme) -> bool {
    let stays = |scheme| scheme == Scheme::WeightStationary;
    stays(stream) != stays(part) && mesh.size(Axis::X) > 1 && mesh.size(Axis::Y) > 1
}

/// Schemes of the parts of a layer; none: that of the residual stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Parts {
    /// Of q|k|v and out.
    pub attention: Option<Scheme>,
    /// Of up, gate and down.
    pub ffn: Option<Scheme>,
}

impl Parts {
    /// The scheme of a part beside a stream of scheme `stream`.
    pub fn of(&self, part: Pair, stream: Scheme) -> Scheme {
        let own = match part {
            Pair::Attention => self.attention,
            Pair::Mlp => self.ffn,
        };
        own.unwrap_or(stream)
    }

    /// Refuses parts that leave an axis idle, and those whose layout is too far from that of the stream.
    pub fn check(&self, mesh: &MeshShape, stream: Scheme) -> Result<(), FlowError> {
        for part in [self.attention, self.ffn].into_iter().flatten() {
            part.check(mesh)?;
            steps_into(mesh, stream, part)?;
        }
        Ok(())
    }

    /// What is chosen, for people: `summa`, or `attention summa, feed-forward weight-stationary, stream
    /// summa`.
    pub fn named(&self, stream: Scheme) -> String {
        let [attention, ffn] = [Pair::Attention, Pair::Mlp].map(|part| self.of(part, stream));
        match attention == stream && ffn == stream {
            true => stream.to_string(),
            false => format!("attention {attention}, feed-forward {ffn}, stream {stream}"),
        }
    }
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How activations lie between the products of one scheme on one mesh.
#[derive(Clone, Debug)]
pub struct Flow {
    /// The ranks.
    pub mesh: Mesh,
    /// The scheme.
    pub scheme: Scheme,
    /// Schemes of parts that have their own.
    pub parts: Parts,
    /// Whether x and y are exchanged.
    pub turned: bool,
    /// The residual stream [M, D].
    pub outer: Layout,
    /// Values between an opening and a closing product: heads, ffn.
    pub inner: Layout,
    /// What products that gather keep for the way back.
    pub keep: Keep,
    /// How attention sees the tokens of other context ranks.
    pub attention: ContextAttention,
    /// In which order stages work, where the mesh has several; it also says how many slices of the
    /// layers a stage has.
    pub schedule: Schedule,
}

impl Flow {
    /// Of one rank.
    pub fn solo() -> Flow {
        let (mesh, scheme, keep) = (Mesh::solo(), Scheme::OneD, Keep::default());
        let (attention, schedule) = (ContextAttention::default(), Schedule::OneFOneB);
        let (outer, inner) = (Layout::REPLICATED, Layout::REPLICATED);
        let (parts, turned) = (Parts::default(), false);
        Flow { mesh, scheme, parts, turned, outer, inner, keep, attention, schedule }
    }

    /// Refuses axes that the scheme would leave idle.
    pub fn new(mesh: &Mesh, scheme: Scheme) -> Result<Flow, FlowError> {
        scheme.check(mesh.shape())?;
        Ok(Flow { mesh: mesh.clone(), ..Flow::solo() }.lying(scheme, false))
    }

    /// The same with parts of layers that have their own schemes. Refuses those that do not go together.
    pub fn with_parts(self, parts: Parts) -> Result<Flow, FlowError> {
        parts.check(self.mesh.shape(), self.scheme)?;
        Ok(Flow { parts, ..self })
    }

    /// The same choices for another rank of as many, or for another mesh.
    pub fn on(&self, mesh: &Mesh) -> Result<Flow, FlowError> {
        self.scheme.check(mesh.shape())?;
        let there = Flow { mesh: mesh.clone(), ..self.clone() };
        there.lying(self.scheme, false).with_parts(self.parts)
    }

    /// How values lie in a part of a layer, between where it leaves the residual stream and where it
    /// returns.
    pub fn part(&self, part: Pair) -> Flow {
        let scheme = self.parts.of(part, self.scheme);
        let turned = turned(self.mesh.shape(), self.scheme, scheme);
        Flow { parts: Parts::default(), ..self.clone() }.lying(scheme, turned)
    }

    fn lying(self, scheme: Scheme, turned: bool) -> Flow {
        let (outer, inner) = scheme.layouts(self.mesh.shape(), turned);
        Flow { scheme, turned, outer, inner, ..self }
    }

    /// Pieces of whole rows of tokens that every part can cut: a multiple of this is a lawful number of
    /// rows.
    pub fn row_pieces(&self) -> usize {
        let parts = [Pair::Attention, Pair::Mlp].map(|part| self.part(part));
        let flows = [&parts[0], &parts[1], self];
        let cuts = flows.into_iter().flat_map(|flow| [flow.outer.rows, flow.inner.rows]);
        cuts.map(|cut| cut.pieces(&self.mesh)).fold(1, lcm)
    }

    /// The same with its stages working in the order of `schedule`.
    pub fn scheduled(self, schedule: Schedule) -> Flow {
        Flow { schedule, ..self }
    }

    /// From the residual stream to the inner width: w [outputs, inputs].
    pub fn opening(&self, outputs: Dim, inputs: Dim) -> Result<Weighted, LayoutError> {
        let orders = (self.inner.cols, self.outer.cols);
        self.weighted(self.outer, self.opening_weight(), (outputs, inputs), orders, self.inner)
    }

    /// From the inner width back to the residual stream.
    pub fn closing(&self, outputs: Dim, inputs: Dim) -> Result<Weighted, LayoutError> {
        let orders = (self.outer.cols, self.inner.cols);
        self.weighted(self.inner, self.closing_weight(), (outputs, inputs), orders, self.outer)
    }

    fn opening_weight(&self) -> Layout {
        let ([x, y], z) = (plane(self.turned), Axis::Z);
        let lay = |rows, cols| Layout::new(Cut::over(&self.mesh, &[rows]), Cut::over(&self.mesh, &[cols]));
        match self.scheme {
            Scheme::OneD | Scheme::OneDSequence => Layout::new(Cut::over(&self.mesh, &[x]), Cut::WHOLE),
            Scheme::ThreeD => lay(y, z),
            _ => lay(y, x),
        }
    }

    fn closing_weight(&self) -> Layout {
        let ([x, y], z) = (plane(self.turned), Axis::Z);
        let lay = |rows, cols| Layout::new(Cut::over(&self.mesh, &[rows]), Cut::over(&self.mesh, &[cols]));
        match self.scheme {
            Scheme::OneD | Scheme::OneDSequence => Layout::new(Cut::WHOLE, Cut::over(&self.mesh, &[x])),
            Scheme::ThreeD => lay(z, y),
            Scheme::WeightStationary => lay(x, y),
            _ => lay(y, x),
        }
    }

    fn algorithm(&self) -> Algorithm {
        let (enter, leave) = match self.scheme {
            Scheme::Summa | Scheme::TwoPointFiveD => return Algorithm::Panels,
            Scheme::OneD => (None, Leave::Whole),
            Scheme::OneDSequence | Scheme::ThreeD => (Some(Side::Rows), Leave::Cut(Side::Rows)),
            Scheme::WeightStationary => (Some(Side::Cols), Leave::Cut(Side::Cols)),
        };
        Algorithm::Gather { enter, leave, keep: self.keep }
    }

    /// `orders` are the cuts of y's and x's columns, which say how pieces of the weight follow.
    fn weighted(
        &self,
        x: Layout,
        w: Layout,
        (rows, cols): (Dim, Dim),
        orders: (Cut, Cut),
        wanted: Layout,
    ) -> Result<Weighted, LayoutError> {
        let order = |cut: Cut, order: Cut| {
            let outer: Vec<Axis> = order.axes().take(cut.axes().count()).collect();
            if outer.into_iter().eq(cut.axes()) { order } else { cut }
        };
        let stored = match self.scheme {
            Scheme::ThreeD => Cut::over(&self.mesh, &plane(self.turned)[..1]),
            _ => Cut::WHOLE,
        };
        let bias = Held::plainly(rows.clone(), wanted.cols);
        let rows = Held { dim: rows, order: order(w.rows, orders.0), cut: w.rows, stored };
        let cols = Held { dim: cols, order: order(w.cols, orders.1), cut: w.cols, stored: Cut::WHOLE };
        let product = Product::new(&self.mesh, self.algorithm(), x, (&rows, &cols))?;
        if product.y != wanted {
            let why = "the product does not lie where what follows looks for it";
            return Err(LayoutError { what: "sum", a: product.y, b: wanted, why });
        }
        Ok(Weighted { product, rows, cols, bias })
    }
}

/// A product with what its ranks hold of the weight [N, K] and of a bias [N].
#[derive(Clone, Debug)]
pub struct Weighted {
    /// The product.
    pub product: Product,
    /// Rows of the weight.
    pub rows: Held,
    /// Columns of the weight.
    pub cols: Held,
    /// Elements of the bias.
    pub bias: Held,
}

/// Schemes and axes that do not go together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// A mesh with an axis that the scheme cannot use.
    #[error(
        "scheme `{scheme}` has no use for mesh axis {axis} = {size}; set mesh.{axis} = 1, or another mesh.scheme"
    )]
    Idle {
        /// Name of the scheme.
        scheme: &'static str,
        /// Name of the axis.
        axis: &'static str,
        /// Its size.
        size: usize,
    },
    /// Layouts that no few steps connect.
    #[error(
        "the residual stream of scheme `{stream}` lies as {from}, that of scheme `{part}` as {to}: no two exchanges lead from one to the other; give mesh.scheme, mesh.attention_scheme and mesh.ffn_scheme one name"
    )]
    Apart {
        /// Scheme of the stream.
        stream: &'static str,
        /// Scheme of the part.
        part: &'static str,
        /// Layout of the stream.
        from: Layout,
        /// Layout that the part asks for.
        to: Layout,
    },
    /// A width whose pieces do not lie inside each other.
    #[error(
        "width {width} does not divide into the {pieces} pieces that columns are exchanged in between schemes `{stream}` and `{part}`; choose a mesh that divides it, or one scheme for all parts"
    )]
    Width {
        /// Scheme of the stream.
        stream: &'static str,
        /// Scheme of the part.
        part: &'static str,
        /// Columns of the residual stream.
        width: usize,
        /// Pieces they are cut into.
        pieces: usize,
    },
}

/// Least common multiple.
pub(crate) fn lcm(a: usize, b: usize) -> usize {
    let (mut high, mut low) = (a, b);
    while low != 0 {
        (high, low) = (low, high % low);
    }
    a / high * b
}
