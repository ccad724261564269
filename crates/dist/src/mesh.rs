//! Ranks arranged along named axes, and who carries their messages.

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

/// Who carries messages between the ranks of a mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Communicator {
    /// One rank: nothing to carry.
    Solo,
}

/// The ranks of a run along their axes, as seen from one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    communicator: Communicator,
}

impl Mesh {
    /// A mesh of one rank.
    pub fn solo() -> Mesh {
        Mesh { communicator: Communicator::Solo }
    }

    /// Ranks along an axis.
    pub fn size(&self, _axis: Axis) -> usize {
        match self.communicator {
            Communicator::Solo => 1,
        }
    }

    /// Our place along an axis.
    pub fn coord(&self, _axis: Axis) -> usize {
        match self.communicator {
            Communicator::Solo => 0,
        }
    }

    /// All ranks.
    pub fn world_size(&self) -> usize {
        Axis::ALL.iter().map(|axis| self.size(*axis)).product()
    }

    /// Who carries the messages.
    pub fn communicator(&self) -> &Communicator {
        &self.communicator
    }
}
