//! What a step moved, and what it waited for.

use super::mover::{Carried, MEMORIES};
use crate::Tier;
use crate::plan::Stretch;

/// Traffic of one link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkCount {
    /// The faster end.
    pub upper: Tier,
    /// The slower end.
    pub lower: Tier,
    /// Bytes towards the faster tier.
    pub up_bytes: u64,
    /// Bytes towards the slower tier.
    pub down_bytes: u64,
    /// Seconds in which bytes came up.
    pub up_s: f64,
    /// Seconds in which bytes went down.
    pub down_s: f64,
    /// Seconds in which the computation waited.
    pub stall_s: f64,
    /// No placement of the recorded step moves fewer bytes; none until it is known.
    pub bound_bytes: Option<u64>,
}

impl LinkCount {
    /// Share by which the bytes moved exceed the bound.
    pub fn gap(&self) -> Option<f64> {
        let (moved, bound) = ((self.up_bytes + self.down_bytes) as f64, self.bound_bytes? as f64);
        Some(if moved <= bound { 0.0 } else { (moved - bound) / bound.max(1.0) })
    }
}

/// What chunks held in one tier of memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TierCount {
    /// Which tier.
    pub tier: Tier,
    /// Most that chunks held at once.
    pub peak_bytes: u64,
    /// What they may hold.
    pub capacity_bytes: u64,
}

/// Traffic since the last report.
#[derive(Clone, Debug, PartialEq)]
pub struct TierReport {
    /// By link, fastest first.
    pub links: Vec<LinkCount>,
    /// By tier of memory, fastest first.
    pub tiers: Vec<TierCount>,
    /// Most that everything else was seen to hold in the fastest tier.
    pub other_bytes: u64,
    /// What every placement has to do in either stretch of the recorded step; none until it is known.
    pub stretches: Option<[Stretch; 2]>,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Snapshot {
    pub sent: [Carried; MEMORIES],
    pub stall_s: [f64; MEMORIES],
}

impl Snapshot {
    /// What a link did since `then`; `tiers` are its ends.
    pub fn since(&self, then: &Snapshot, link: usize, tiers: &[Tier]) -> LinkCount {
        let (now, was) = (self.sent[link], then.sent[link]);
        LinkCount {
            upper: tiers[link],
            lower: tiers[link + 1],
            up_bytes: now.up_bytes - was.up_bytes,
            down_bytes: now.down_bytes - was.down_bytes,
            up_s: now.up_s - was.up_s,
            down_s: now.down_s - was.down_s,
            stall_s: self.stall_s[link] - then.stall_s[link],
            bound_bytes: None,
        }
    }
}
