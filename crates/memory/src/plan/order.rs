//! How short a step can be when its moments keep their order: what crosses the drive's link in each of
//! its two stretches, whatever is kept where. docs/memory.md derives it.

use super::types::{Budgets, LinkRate};
use crate::Tier;
use crate::trace::{Access, Moment, Phase, Runs, Trace};

/// What every plan has to do in a run of moments.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stretch {
    /// Seconds its moments compute.
    pub compute_s: f64,
    /// Bytes that come up from the drive meanwhile, at least.
    pub up_bytes: u64,
    /// Bytes that go down meanwhile, at least.
    pub down_bytes: u64,
}

impl Stretch {
    /// Seconds it takes at least, with a link that carries both ways at the same time.
    pub fn seconds(&self, rate: LinkRate) -> f64 {
        let (up_s, down_s) = (self.up_bytes as f64 / rate.up_per_s, self.down_bytes as f64 / rate.down_per_s);
        self.compute_s.max(up_s).max(down_s)
    }
}

/// From the end of the backward pass to the beginning of the next one, where updates run that wait for the
/// norm; and the rest of the step. None without a drive or without a backward pass.
pub fn stretches(trace: &Trace, budgets: &Budgets) -> Option<[Stretch; 2]> {
    budgets.nvme?;
    let backward = |moment: &Moment| moment.phase == Phase::Backward;
    let first = trace.moments.iter().position(backward)?;
    let end = trace.moments.iter().rposition(backward)? + 1;
    let count = trace.moments.len();
    Some([stretch(trace, budgets, (end, count - end + first)), stretch(trace, budgets, (first, end - first))])
}

/// Of `len` moments from `from` on, cyclic.
fn stretch(trace: &Trace, budgets: &Budgets, (from, len): (usize, usize)) -> Stretch {
    let count = trace.moments.len();
    let above: u64 = [Tier::Hbm, Tier::Dram].iter().filter_map(|tier| budgets.of(*tier)).sum();
    // What chunks, those on their way up among them, have above the drive when a moment ends.
    let room = |before: usize| above.saturating_sub(trace.moments[(before + count - 1) % count].other_bytes);
    // By chunk: its first use in the stretch, its first use after it, whether it is written.
    let mut inside: Vec<Option<(usize, Access)>> = vec![None; trace.chunks.len()];
    let (mut after, mut written) = (inside.clone(), vec![false; trace.chunks.len()]);
    for used in &trace.uses {
        let chunk = used.chunk.0 as usize;
        let since = |start: usize| (used.moment as usize + 2 * count - start) % count;
        let earlier = |first: &mut Option<(usize, Access)>, at: usize| {
            if first.is_none_or(|(then, _)| at < then) {
                *first = Some((at, used.access));
            }
        };
        earlier(&mut after[chunk], since(from + len));
        if since(from) < len {
            earlier(&mut inside[chunk], since(from));
            written[chunk] |= used.access.writes();
        }
    }
    let reads = |first: Option<(usize, Access)>| first.is_some_and(|(_, access)| access.reads());
    let (mut up_bytes, mut down_bytes) = (0, 0);
    // What can be made again need not move.
    for (index, chunk) in trace.chunks.iter().enumerate().filter(|(_, chunk)| chunk.recompute_s.is_none()) {
        up_bytes += if reads(inside[index]) { chunk.bytes } else { 0 };
        down_bytes += if written[index] && reads(after[index]) { chunk.bytes } else { 0 };
    }
    let quickest = |at: usize| match &trace.moments[at % count] {
        Moment { runs: Runs::Either { host_s }, seconds, .. } => seconds.min(*host_s),
        moment => moment.seconds,
    };
    Stretch {
        compute_s: (from..from + len).map(quickest).sum(),
        up_bytes: up_bytes.saturating_sub(room(from)),
        down_bytes: down_bytes.saturating_sub(room(from + len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Class;

    /// Three updates of ten bytes each, the first with a gradient of ten, and a backward pass that makes it; room
    /// for 25 bytes, of which the backward pass itself takes 5.
    #[test]
    fn a_step_by_hand() {
        let mut trace = Trace::default();
        let state = [0; 3].map(|_| trace.add_chunk(Class::M, 10));
        let grad = trace.add_chunk(Class::Grad, 10);
        let moment = |phase, seconds, other_bytes| Moment {
            phase,
            op: "op".to_owned(),
            layer: 0,
            seconds,
            other_bytes,
            runs: Runs::Fastest,
        };
        for chunk in state {
            trace.add_moment(moment(Phase::Optimizer, 1.0, 0));
            trace.add_use(chunk, Access::ReadWrite);
            if chunk == state[0] {
                trace.add_use(grad, Access::Read);
            }
        }
        trace.add_moment(moment(Phase::Backward, 10.0, 5));
        trace.add_use(grad, Access::Write);
        let budgets = Budgets { hbm: None, dram: Some(25), nvme: Some(1000) };
        // 40 bytes are read and 20 may be there; 30 are written and 25 may stay. A gradient that was used is
        // worth nothing, and in the backward pass nothing has to move.
        let updates = Stretch { compute_s: 3.0, up_bytes: 20, down_bytes: 5 };
        let backward = Stretch { compute_s: 10.0, up_bytes: 0, down_bytes: 0 };
        assert_eq!(stretches(&trace, &budgets), Some([updates, backward]));
        let rate = LinkRate { up_per_s: 2.0, down_per_s: 1.0 };
        assert_eq!([updates.seconds(rate), backward.seconds(rate)], [10.0, 10.0]);
        assert_eq!(stretches(&trace, &Budgets { nvme: None, ..budgets }), None);
        // Wherever the step is said to begin.
        trace.moments.rotate_left(2);
        trace.uses.iter_mut().for_each(|used| used.moment = (used.moment + 2) % 4);
        trace.uses.sort_by_key(|used| used.moment);
        assert_eq!(stretches(&trace, &budgets), Some([updates, backward]));
        trace.moments.retain(|moment| moment.phase != Phase::Backward);
        assert_eq!(stretches(&trace, &budgets), None);
    }
}
