//! What a run's tiers moved, for people.

use crate::show;
use std::fmt;
use train::StepMetrics;

/// Sums over the steps of a run.
#[derive(Default)]
pub struct Traffic {
    steps: u64,
    seconds: f64,
    /// By tier of memory.
    peaks: Vec<(String, u64)>,
    other_bytes: u64,
    links: Vec<Link>,
}

#[derive(Default)]
struct Link {
    name: String,
    up_bytes: u64,
    down_bytes: u64,
    up_s: f64,
    down_s: f64,
    stall_s: f64,
    /// Of the newest step.
    last: Option<(u64, u64)>,
}

impl Traffic {
    /// Count a step.
    pub fn add(&mut self, step: &StepMetrics) {
        let Some(tiers) = &step.tiers else { return };
        self.steps += 1;
        self.seconds += step.seconds;
        self.peaks.resize_with(tiers.tiers.len(), Default::default);
        for (peak, tier) in self.peaks.iter_mut().zip(&tiers.tiers) {
            *peak = (tier.tier.to_string(), peak.1.max(tier.peak_bytes));
        }
        self.other_bytes = self.other_bytes.max(tiers.other_bytes);
        self.links.resize_with(tiers.links.len(), Link::default);
        for (sum, link) in self.links.iter_mut().zip(&tiers.links) {
            sum.name = format!("{}-{}", link.upper, link.lower);
            sum.up_bytes += link.up_bytes;
            sum.down_bytes += link.down_bytes;
            sum.up_s += link.up_s;
            sum.down_s += link.down_s;
            sum.stall_s += link.stall_s;
            sum.last = link.bound_bytes.map(|bound| (link.up_bytes + link.down_bytes, bound));
        }
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_step = |bytes: u64| show::bytes(bytes / self.steps.max(1));
        let rate = |bytes: u64, seconds: f64| match seconds > 0.0 {
            true => format!("{}/s", show::bytes((bytes as f64 / seconds) as u64)),
            false => "idle".into(),
        };
        for link in &self.links {
            writeln!(
                f,
                "{}: {} up and {} down a step, at {} and {}; waited {:.1} % of the time",
                link.name,
                per_step(link.up_bytes),
                per_step(link.down_bytes),
                rate(link.up_bytes, link.up_s),
                rate(link.down_bytes, link.down_s),
                100.0 * link.stall_s / self.seconds.max(1e-9),
            )?;
            if let Some((moved, bound)) = link.last {
                let gap = (moved as f64 / bound.max(1) as f64 - 1.0).max(0.0) * 100.0;
                let (moved, bound) = (show::bytes(moved), show::bytes(bound));
                writeln!(f, "{}: the last step moved {moved}, bound {bound}, gap {gap:.1} %", link.name)?;
            }
        }
        if self.steps > 0 {
            let peak = |(tier, bytes): &(String, u64)| format!("{} in {tier}", show::bytes(*bytes));
            let peaks = self.peaks.iter().map(peak).collect::<Vec<_>>().join(", ");
            let others = show::bytes(self.other_bytes);
            writeln!(f, "peak: state {peaks}, beside {others} of activations and buffers")?;
        }
        Ok(())
    }
}
