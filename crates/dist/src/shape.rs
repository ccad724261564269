//! Ranks arranged along named axes, as plain data: sizes, coordinates and who shares an axis.
//! Pure functions; nothing here talks to anybody.

use std::fmt;
use std::str::FromStr;

/// Axes of a mesh, outermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Axis {
    /// Pipeline stages.
    Pp,
    /// Data-parallel replicas.
    Dp,
    /// Data-parallel shards of parameters, gradients and optimizer state.
    Fsdp,
    /// Context: a sequence cut among ranks.
    Cp,
    /// Experts.
    Ep,
    /// First tensor axis.
    X,
    /// Second tensor axis.
    Y,
    /// Third tensor axis.
    Z,
}

impl Axis {
    /// All of them, outermost first.
    pub const ALL: [Axis; 8] =
        [Axis::Pp, Axis::Dp, Axis::Fsdp, Axis::Cp, Axis::Ep, Axis::X, Axis::Y, Axis::Z];

    /// Name as recipes write it.
    pub const fn name(self) -> &'static str {
        match self {
            Axis::Pp => "pp",
            Axis::Dp => "dp",
            Axis::Fsdp => "fsdp",
            Axis::Cp => "cp",
            Axis::Ep => "ep",
            Axis::X => "x",
            Axis::Y => "y",
            Axis::Z => "z",
        }
    }
}

/// Why a mesh cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// An axis of no rank.
    #[error("mesh axis `{axis}` has size 0; a size is at least 1")]
    Empty {
        /// Name of the axis.
        axis: &'static str,
    },
    /// More ranks than a number holds.
    #[error("mesh `{mesh}` has more ranks than can be counted; make an axis smaller")]
    TooLarge {
        /// The mesh.
        mesh: String,
    },
    /// A text that is no mesh.
    #[error("mesh `{text}`: {problem}; write sizes like `dp=2,x=4`; axes are pp dp fsdp cp ep x y z")]
    Text {
        /// The text.
        text: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Not as many ranks as the mesh has places.
    #[error("mesh `{mesh}` has {places} places for {ranks} ranks; start {places} ranks or change an axis")]
    Ranks {
        /// The mesh.
        mesh: String,
        /// Ranks the mesh needs.
        places: usize,
        /// Ranks there are.
        ranks: usize,
    },
}

/// Sizes of every axis. Any rectangle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MeshShape {
    sizes: [usize; Axis::ALL.len()],
}

/// One place along every axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Coords {
    at: [usize; Axis::ALL.len()],
}

impl Coords {
    /// Place along an axis.
    pub fn on(&self, axis: Axis) -> usize {
        self.at[axis as usize]
    }

    /// The same place but for one axis.
    pub fn with(mut self, axis: Axis, at: usize) -> Coords {
        self.at[axis as usize] = at;
        self
    }
}

impl MeshShape {
    /// One rank.
    pub const SOLO: MeshShape = MeshShape { sizes: [1; Axis::ALL.len()] };

    /// These sizes, and 1 for every other axis.
    pub fn new(sizes: &[(Axis, usize)]) -> Result<MeshShape, MeshError> {
        let mut shape = MeshShape::SOLO;
        for (axis, size) in sizes {
            if *size == 0 {
                return Err(MeshError::Empty { axis: axis.name() });
            }
            shape.sizes[*axis as usize] = *size;
        }
        let ranks = shape.sizes.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
        if ranks.is_none() {
            return Err(MeshError::TooLarge { mesh: shape.to_string() });
        }
        Ok(shape)
    }

    /// The same with one axis of another size, at least 1.
    pub fn with(mut self, axis: Axis, size: usize) -> MeshShape {
        self.sizes[axis as usize] = size;
        self
    }

    /// Ranks along an axis.
    pub fn size(&self, axis: Axis) -> usize {
        self.sizes[axis as usize]
    }

    /// Ranks between two neighbours of an axis.
    pub fn stride(&self, axis: Axis) -> usize {
        self.sizes[axis as usize + 1..].iter().product()
    }

    /// All ranks.
    pub fn world_size(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Replicas that see different rows: dp x fsdp x ep.
    pub fn replicas(&self) -> usize {
        [Axis::Dp, Axis::Fsdp, Axis::Ep].iter().map(|axis| self.size(*axis)).product()
    }

    /// The rank at a place: the last axis runs fastest.
    pub fn rank(&self, coords: Coords) -> usize {
        self.sizes.iter().zip(coords.at).fold(0, |rank, (size, at)| {
            assert!(at < *size, "place {at} on an axis of {size}");
            rank * size + at
        })
    }

    /// The place of a rank.
    pub fn coords(&self, rank: usize) -> Coords {
        assert!(rank < self.world_size(), "rank {rank} of {}", self.world_size());
        let mut at = [0; Axis::ALL.len()];
        let mut rest = rank;
        for (at, size) in at.iter_mut().zip(self.sizes).rev() {
            *at = rest % size;
            rest /= size;
        }
        Coords { at }
    }

    /// Ranks that differ from `rank` in these axes only, itself among them, in ascending order.
    pub fn ranks_over(&self, rank: usize, axes: &[Axis]) -> Vec<usize> {
        let mut places = vec![self.coords(rank)];
        for axis in Axis::ALL.into_iter().filter(|axis| axes.contains(axis)) {
            places = places
                .into_iter()
                .flat_map(|place| (0..self.size(axis)).map(move |at| place.with(axis, at)))
                .collect();
        }
        places.into_iter().map(|place| self.rank(place)).collect()
    }

    /// Checks that there are as many ranks as places.
    pub fn expect_ranks(&self, ranks: usize) -> Result<(), MeshError> {
        let places = self.world_size();
        if places == ranks {
            return Ok(());
        }
        Err(MeshError::Ranks { mesh: self.to_string(), places, ranks })
    }
}

/// As `FromStr` reads it: `dp=2,x=4`; the mesh of one rank is `solo`.
impl fmt::Display for MeshShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes = Axis::ALL.into_iter().filter(|axis| self.size(*axis) != 1);
        let parts: Vec<String> = axes.map(|axis| format!("{}={}", axis.name(), self.size(axis))).collect();
        f.write_str(if parts.is_empty() { "solo".to_string() } else { parts.join(",") }.as_str())
    }
}

impl FromStr for MeshShape {
    type Err = MeshError;

    fn from_str(text: &str) -> Result<MeshShape, MeshError> {
        let wrong = |problem: String| MeshError::Text { text: text.to_string(), problem };
        if text.trim() == "solo" {
            return Ok(MeshShape::SOLO);
        }
        let mut sizes: Vec<(Axis, usize)> = Vec::new();
        for part in text.split(',') {
            let (name, size) =
                part.split_once('=').ok_or_else(|| wrong(format!("`{}` is not axis=size", part.trim())))?;
            let axis = Axis::ALL
                .into_iter()
                .find(|axis| axis.name() == name.trim())
                .ok_or_else(|| wrong(format!("no axis is called `{}`", name.trim())))?;
            let size = size.trim().parse().map_err(|_| wrong(format!("`{}` is not a size", size.trim())))?;
            if sizes.iter().any(|(seen, _)| *seen == axis) {
                return Err(wrong(format!("axis `{}` stands twice", axis.name())));
            }
            sizes.push((axis, size));
        }
        MeshShape::new(&sizes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(text: &str) -> MeshShape {
        text.parse().unwrap()
    }

    #[test]
    fn ranks_and_places_are_two_names_of_one_thing() {
        for text in ["solo", "pp=2,dp=3,x=4", "fsdp=5,cp=2,ep=3,y=2,z=2"] {
            let shape = shape(text);
            assert_eq!(shape.to_string(), text);
            for rank in 0..shape.world_size() {
                assert_eq!(shape.rank(shape.coords(rank)), rank);
            }
        }
    }

    #[test]
    fn the_last_axis_runs_fastest() {
        let mesh = shape("dp=2,x=2,y=3");
        assert_eq!(mesh.ranks_over(7, &[Axis::Y]), [6, 7, 8]);
        assert_eq!(mesh.ranks_over(7, &[Axis::X]), [7, 10]);
        assert_eq!(mesh.ranks_over(7, &[Axis::Dp]), [1, 7]);
        assert_eq!(mesh.ranks_over(7, &[Axis::Y, Axis::Dp]), [0, 1, 2, 6, 7, 8]);
        assert_eq!(mesh.ranks_over(7, &[Axis::Pp]), [7]);
        assert_eq!(mesh.ranks_over(7, &Axis::ALL), (0..12).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_no_mesh_is_refused_with_its_name() {
        for (text, want) in [
            ("x=0", "`x` has size 0"),
            ("x", "`x` is not axis=size"),
            ("w=2", "no axis is called `w`"),
            ("x=-1", "`-1` is not a size"),
            ("x=2,x=2", "axis `x` stands twice"),
            ("x=4294967296,y=4294967296,z=2", "more ranks than can be counted"),
        ] {
            let refused = text.parse::<MeshShape>().unwrap_err().to_string();
            assert!(refused.contains(want), "{text}: {refused}");
        }
        let refused = shape("dp=2,x=4").expect_ranks(6).unwrap_err().to_string();
        assert!(refused.contains("8 places for 6 ranks"), "{refused}");
    }
}
