//! Tensor-parallel schemes: how a transformer's activations and weights lie on the axes x, y and z,
//! and which algorithm multiplies them.
//!
//! Products come in pairs. An *opening* one (q|k|v, gate|up) leads from the residual stream into the
//! inner width (heads, ffn), a *closing* one leads back. Between two products everything is local,
//! because the inner width is cut where heads and neurons begin.

use crate::pipeline::Schedule;
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
    pub fn of(mesh: &Mesh) -> Scheme {
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
                return Err(FlowError { scheme: self.name(), axis: axis.name(), size: mesh.size(axis) });
            }
        }
        Ok(())
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
        Flow { mesh, scheme, outer, inner, keep, attention, schedule }
    }

    /// Refuses axes that the scheme would leave idle.
    pub fn new(mesh: &Mesh, scheme: Scheme) -> Result<Flow, FlowError> {
        use Axis::{X, Y, Z};
        scheme.check(mesh.shape())?;
        let cut = |axes: &[Axis]| Cut::over(mesh, axes);
        let lay = |rows: &[Axis], cols: &[Axis]| Layout::new(cut(rows), cut(cols));
        let (outer, inner) = match scheme {
            Scheme::OneD => (lay(&[], &[]), lay(&[], &[X])),
            Scheme::OneDSequence => (lay(&[X], &[]), lay(&[], &[X])),
            Scheme::Summa | Scheme::TwoPointFiveD => (lay(&[Z, X], &[Y]), lay(&[Z, X], &[Y])),
            Scheme::ThreeD => (lay(&[X, Y], &[Z]), lay(&[X, Z], &[Y])),
            Scheme::WeightStationary => (lay(&[], &[X, Y]), lay(&[], &[Y, X])),
        };
        let (keep, attention) = (Keep::default(), ContextAttention::default());
        let schedule = Schedule::OneFOneB;
        Ok(Flow { mesh: mesh.clone(), scheme, outer, inner, keep, attention, schedule })
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
        use Axis::{X, Y, Z};
        let lay = |rows, cols| Layout::new(Cut::over(&self.mesh, &[rows]), Cut::over(&self.mesh, &[cols]));
        match self.scheme {
            Scheme::OneD | Scheme::OneDSequence => Layout::new(Cut::over(&self.mesh, &[X]), Cut::WHOLE),
            Scheme::ThreeD => lay(Y, Z),
            _ => lay(Y, X),
        }
    }

    fn closing_weight(&self) -> Layout {
        use Axis::{X, Y, Z};
        let lay = |rows, cols| Layout::new(Cut::over(&self.mesh, &[rows]), Cut::over(&self.mesh, &[cols]));
        match self.scheme {
            Scheme::OneD | Scheme::OneDSequence => Layout::new(Cut::WHOLE, Cut::over(&self.mesh, &[X])),
            Scheme::ThreeD => lay(Z, Y),
            Scheme::WeightStationary => lay(X, Y),
            _ => lay(Y, X),
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
            Scheme::ThreeD => Cut::over(&self.mesh, &[Axis::X]),
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

/// A mesh with an axis that the scheme cannot use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "scheme `{scheme}` has no use for mesh axis {axis} = {size}; set mesh.{axis} = 1, or another mesh.scheme"
)]
pub struct FlowError {
    /// Name of the scheme.
    pub scheme: &'static str,
    /// Name of the axis.
    pub axis: &'static str,
    /// Its size.
    pub size: usize,
}
