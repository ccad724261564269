//! What a step moved, and what it waited for.

use super::mover::Carried;
use crate::Tier;

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

/// Traffic since the last report.
#[derive(Clone, Debug, PartialEq)]
pub struct TierReport {
    /// By link, fastest first.
    pub links: Vec<LinkCount>,
    /// Most that chunks held in DRAM.
    pub peak_bytes: u64,
    /// Most that everything else was seen to hold.
    pub other_bytes: u64,
    /// What chunks may hold.
    pub capacity_bytes: u64,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Snapshot {
    pub carried: Carried,
    pub stall_s: f64,
}

pub(super) fn between(then: &Snapshot, now: &Snapshot, other_bytes: u64, capacity_bytes: u64) -> TierReport {
    let nvme = LinkCount {
        upper: Tier::Dram,
        lower: Tier::Nvme,
        up_bytes: now.carried.read_bytes - then.carried.read_bytes,
        down_bytes: now.carried.written_bytes - then.carried.written_bytes,
        up_s: now.carried.read_s - then.carried.read_s,
        down_s: now.carried.written_s - then.carried.written_s,
        stall_s: now.stall_s - then.stall_s,
        bound_bytes: None,
    };
    TierReport { links: vec![nvme], peak_bytes: now.carried.peak_bytes, other_bytes, capacity_bytes }
}
