//! How a tensor lies on a mesh: for each axis whole, cut along a dim, or a sum still to be taken.
//! Which products are lawful is decided here, when the model is built, before any byte moves.

use crate::Axis;

/// What one mesh axis does to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Placement {
    /// Every rank of the axis holds the whole.
    Replicate,
    /// Rank i of the axis holds the i-th piece along this dim.
    Shard(u8),
    /// The value is the sum over the ranks of the axis.
    Partial,
}

/// Placement of a tensor on every mesh axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    placements: [Placement; Axis::ALL.len()],
}

impl Layout {
    /// Whole on every rank.
    pub const REPLICATED: Layout = Layout { placements: [Placement::Replicate; Axis::ALL.len()] };

    /// The same layout with one axis placed differently.
    pub fn with(mut self, axis: Axis, placement: Placement) -> Layout {
        self.placements[axis as usize] = placement;
        self
    }

    /// Placement on one axis.
    pub fn on(&self, axis: Axis) -> Placement {
        self.placements[axis as usize]
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts: Vec<String> = Axis::ALL
            .iter()
            .filter_map(|axis| match self.on(*axis) {
                Placement::Replicate => None,
                Placement::Shard(dim) => Some(format!("{}: dim {dim}", axis.name())),
                Placement::Partial => Some(format!("{}: partial", axis.name())),
            })
            .collect();
        if parts.is_empty() { f.write_str("[replicated]") } else { write!(f, "[{}]", parts.join(", ")) }
    }
}

/// Two layouts that cannot be multiplied as they lie.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no product of x {x} and w {w} on axis `{axis}`; shard both along the summed dim, or redistribute one"
)]
pub struct LayoutError {
    /// Layout of the activations [M, K].
    pub x: Layout,
    /// Layout of the weights [N, K].
    pub w: Layout,
    /// Name of the axis they disagree on.
    pub axis: &'static str,
}

/// Layout of y [M, N] = x [M, K] w [N, K]^T computed where the pieces lie, without moving any.
pub fn product(x: &Layout, w: &Layout) -> Result<Layout, LayoutError> {
    use Placement::{Partial, Replicate, Shard};
    let mut y = Layout::REPLICATED;
    for axis in Axis::ALL {
        let placed = match (x.on(axis), w.on(axis)) {
            (Replicate, Replicate) => Replicate,
            (Shard(0), Replicate) => Shard(0),
            (Replicate, Shard(0)) => Shard(1),
            (Shard(1), Shard(1)) => Partial,
            (Partial, Replicate) => Partial,
            _ => return Err(LayoutError { x: *x, w: *w, axis: axis.name() }),
        };
        y = y.with(axis, placed);
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Placement::{Partial, Shard};

    #[test]
    fn megatron_pairs_column_and_row_cuts_into_one_partial_sum() {
        let x = Layout::REPLICATED;
        let columns = Layout::REPLICATED.with(Axis::X, Shard(0));
        let rows = Layout::REPLICATED.with(Axis::X, Shard(1));
        let hidden = product(&x, &columns).unwrap();
        assert_eq!(hidden.on(Axis::X), Shard(1));
        assert_eq!(product(&hidden, &rows).unwrap().on(Axis::X), Partial);
    }

    #[test]
    fn a_wrong_pair_names_both_layouts_and_the_axis() {
        let x = Layout::REPLICATED.with(Axis::Y, Shard(1));
        let refused = product(&x, &Layout::REPLICATED).unwrap_err().to_string();
        assert!(
            refused.contains("[y: dim 1]") && refused.contains("[replicated]") && refused.contains("`y`")
        );
    }
}
