//! Families of plans: each has its best, and a reason why it is not the choice.

use std::fmt;

/// How the products of a plan are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// Not at all.
    NoTensor,
    /// 1D.
    OneD,
    /// SUMMA everywhere.
    Summa,
    /// Weight-stationary everywhere.
    WeightStationary,
    /// On a plane, attention by the one and the feed-forward part by the other.
    Mixed,
    /// 2.5D.
    TwoPointFiveD,
    /// 3D.
    ThreeD,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 7] = [
        Family::NoTensor,
        Family::OneD,
        Family::Summa,
        Family::WeightStationary,
        Family::Mixed,
        Family::TwoPointFiveD,
        Family::ThreeD,
    ];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::NoTensor => "no tensor axis",
            Family::OneD => "1D",
            Family::Summa => "2D SUMMA",
            Family::WeightStationary => "2D weight-stationary",
            Family::Mixed => "2D mixed",
            Family::TwoPointFiveD => "2.5D",
            Family::ThreeD => "3D",
        })
    }
}
