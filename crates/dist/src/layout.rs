//! How a matrix lies on a mesh: which axes cut its rows, which cut its columns, and over which it
//! is a sum still to be taken. Whatever is not cut along an axis lies whole on every rank of it.

use crate::{Axis, Mesh, MeshShape};

/// Axes that cut one dim, outermost first: rank (i, j) of a cut over x, y holds piece i * |y| + j.
/// Axes of one rank cut nothing and are left out, so that layouts compare as they lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cut {
    axes: [Option<Axis>; 4],
}

impl Cut {
    /// Not cut.
    pub const WHOLE: Cut = Cut { axes: [None; 4] };

    /// Cut over those of `axes` that have more than one rank on `mesh`.
    pub fn over(mesh: &Mesh, axes: &[Axis]) -> Cut {
        Cut::on(mesh.shape(), axes)
    }

    /// The same by sizes alone.
    pub(crate) fn on(mesh: &MeshShape, axes: &[Axis]) -> Cut {
        let mut cut = Cut::WHOLE;
        let larger = axes.iter().filter(|axis| mesh.size(**axis) > 1);
        for (slot, axis) in cut.axes.iter_mut().zip(larger) {
            *slot = Some(*axis);
        }
        cut
    }

    /// Its axes, outermost first.
    pub fn axes(&self) -> impl DoubleEndedIterator<Item = Axis> + use<> {
        self.axes.into_iter().flatten()
    }

    /// Whether nothing cuts.
    pub fn is_whole(&self) -> bool {
        self.axes[0].is_none()
    }

    /// Whether `axis` is among its axes.
    pub fn has(&self, axis: Axis) -> bool {
        self.axes.contains(&Some(axis))
    }

    /// The innermost axis: the one whose gathering leaves the outer cut.
    pub fn innermost(&self) -> Option<Axis> {
        self.axes().next_back()
    }

    /// Cut over `axis` inside of these.
    pub fn inside(mut self, axis: Axis) -> Cut {
        let slot = self.axes.iter_mut().find(|slot| slot.is_none());
        *slot.expect("at most four axes cut one dim") = Some(axis);
        self
    }

    /// The cut that gathering the innermost axis leaves.
    pub fn outer(mut self) -> Cut {
        if let Some(slot) = self.axes.iter_mut().rev().find(|slot| slot.is_some()) {
            *slot = None;
        }
        self
    }

    /// Number of pieces.
    pub fn pieces(&self, mesh: &Mesh) -> usize {
        self.axes().map(|axis| mesh.size(axis)).product()
    }

    /// The piece of this rank.
    pub fn index(&self, mesh: &Mesh) -> usize {
        self.axes().fold(0, |index, axis| index * mesh.size(axis) + mesh.coord(axis))
    }
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.axes().map(Axis::name).collect();
        f.write_str(&names.join(","))
    }
}

/// Layout of a matrix: activations [M, K] have tokens as rows, weights [N, K] outputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Layout {
    /// What cuts the rows.
    pub rows: Cut,
    /// What cuts the columns.
    pub cols: Cut,
    /// Axes whose ranks hold summands.
    pub partial: Cut,
}

impl Layout {
    /// Whole on every rank.
    pub const REPLICATED: Layout = Layout { rows: Cut::WHOLE, cols: Cut::WHOLE, partial: Cut::WHOLE };

    /// Cut along rows and columns.
    pub fn new(rows: Cut, cols: Cut) -> Layout {
        Layout { rows, cols, partial: Cut::WHOLE }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = [("rows over", self.rows), ("columns over", self.cols), ("partial over", self.partial)];
        let parts: Vec<String> = named
            .iter()
            .filter(|(_, cut)| !cut.is_whole())
            .map(|(name, cut)| format!("{name} {cut}"))
            .collect();
        if parts.is_empty() { f.write_str("[replicated]") } else { write!(f, "[{}]", parts.join("; ")) }
    }
}

/// Two matrices that do not meet as they lie.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no {what} of {a} and {b}: {why}; lay one of them out as the other asks, or pin another scheme")]
pub struct LayoutError {
    /// What was asked for: `product`, `sum`.
    pub what: &'static str,
    /// The first layout: of the activations in a product.
    pub a: Layout,
    /// The second: of the weights in a product.
    pub b: Layout,
    /// What does not fit.
    pub why: &'static str,
}
