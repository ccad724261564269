//! What a run's tiers moved and its ranks exchanged, for people.

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
    axes: Vec<Axis>,
}

/// What this rank exchanged over one set of axes.
#[derive(Default)]
struct Axis {
    name: String,
    steps: u64,
    seconds: f64,
    sent_bytes: u64,
    received_bytes: u64,
    exposed_s: f64,
    beside_s: f64,
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
        for messages in &step.messages {
            let at = self.axes.iter().position(|axis| axis.name == messages.axes).unwrap_or_else(|| {
                self.axes.push(Axis { name: messages.axes.clone(), ..Axis::default() });
                self.axes.len() - 1
            });
            let axis = &mut self.axes[at];
            axis.steps += 1;
            axis.seconds += step.seconds;
            axis.sent_bytes += messages.sent_bytes;
            axis.received_bytes += messages.received_bytes;
            axis.exposed_s += messages.exposed_s;
            axis.beside_s += messages.beside_s;
        }
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
        self.axes.iter().filter(|axis| axis.steps > 0).try_for_each(|axis| writeln!(f, "{axis}"))
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_step = |bytes: u64| show::bytes(bytes / self.steps.max(1));
        let of_time = |seconds: f64| 100.0 * seconds / self.seconds.max(1e-9);
        write!(
            f,
            "{}: rank 0 sent {} and received {} a step, and waited for it {:.1} % of the time",
            self.name,
            per_step(self.sent_bytes),
            per_step(self.received_bytes),
            of_time(self.exposed_s),
        )?;
        match self.beside_s > 0.0 {
            true => write!(f, "; calls beside computation took {:.1} %", of_time(self.beside_s)),
            false => Ok(()),
        }
    }
}
