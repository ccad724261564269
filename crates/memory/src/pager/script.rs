//! What a training step visits, as the last step did it: the pager's knowledge of the future.

use super::About;
use crate::trace::{Access, Chunk, ChunkId, Moment, Phase, Runs, Trace, Use};

/// One moment and the chunks it needs.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Visit {
    pub phase: Phase,
    pub op: &'static str,
    pub layer: u32,
    /// Depth of the tier it computes in.
    pub depth: usize,
    pub needs: Vec<(ChunkId, Access)>,
    /// From this visit to the next one, waiting not included.
    pub seconds: f64,
    /// Memory of others while it ran.
    pub other_bytes: u64,
}

impl Visit {
    pub fn new(about: About, depth: usize, needs: &[(ChunkId, Access)]) -> Visit {
        let About { phase, op, layer } = about;
        Visit { phase, op, layer, depth, needs: needs.to_vec(), seconds: 0.0, other_bytes: 0 }
    }

    /// Whether it makes an update, which uses gradients up.
    fn is_update(&self) -> bool {
        self.phase == Phase::Optimizer && self.needs.iter().any(|(_, access)| access.writes())
    }
}

/// The visits of a step. While the present step does what the former one did, it is *followed*;
/// from the first difference on it is written anew.
#[derive(Default)]
pub(super) struct Script {
    visits: Vec<Visit>,
    /// By visit and need: visits until the chunk is needed again, into the next step if need be.
    until_next: Vec<Vec<u32>>,
    /// By chunk: its first visit.
    first: Vec<Option<u32>>,
    anew: Vec<Visit>,
    cursor: usize,
    following: bool,
    /// Whether it was followed to its end once, and so timed when everything was warm.
    settled: bool,
}

impl Script {
    pub fn begin(&mut self) {
        self.anew.clear();
        self.cursor = 0;
        self.following = !self.visits.is_empty();
    }

    /// The next visit of the step.
    pub fn enter(&mut self, visit: Visit) {
        let same = self.following
            && self.visits.get(self.cursor).is_some_and(|known| {
                known.needs == visit.needs && known.op == visit.op && known.phase == visit.phase
            });
        if !same {
            if self.following {
                self.anew.extend_from_slice(&self.visits[..self.cursor]);
                self.following = false;
            }
            self.anew.push(visit);
        }
        self.cursor += 1;
    }

    /// How long the visit entered last took, where that was measured, and what others held meanwhile.
    pub fn measured(&mut self, seconds: Option<f64>, other_bytes: u64) {
        let visits = if self.following { &mut self.visits } else { &mut self.anew };
        let last = match self.following {
            true => visits.get_mut(self.cursor.wrapping_sub(1)),
            false => visits.last_mut(),
        };
        if let Some(visit) = last {
            (visit.seconds, visit.other_bytes) = (seconds.unwrap_or(visit.seconds), other_bytes);
        }
    }

    /// The step is done; whether it was the one that was known, and known well: what moments take in a first
    /// step is not what they take in others. `chunks` is their count.
    pub fn end(&mut self, chunks: usize) -> bool {
        let known = self.following && self.cursor == self.visits.len();
        let settled = std::mem::replace(&mut self.settled, known);
        if !known {
            match self.following {
                true => self.visits.truncate(self.cursor),
                false => self.visits = std::mem::take(&mut self.anew),
            }
            self.learn(chunks);
        }
        self.following = false;
        known && settled
    }

    fn learn(&mut self, chunks: usize) {
        let count = self.visits.len() as u32;
        let mut coming: Vec<Option<u32>> = vec![None; chunks];
        self.until_next = vec![Vec::new(); self.visits.len()];
        // Twice around: the first round only learns what comes after the end.
        for round in [count, 0] {
            for (k, visit) in self.visits.iter().enumerate().rev() {
                let at = k as u32 + round;
                if round == 0 {
                    let until = |(chunk, _): &(ChunkId, Access)| {
                        coming[chunk.0 as usize].map_or(count, |next| next - at)
                    };
                    self.until_next[k] = visit.needs.iter().map(until).collect();
                }
                for (chunk, _) in &visit.needs {
                    coming[chunk.0 as usize] = Some(at);
                }
            }
        }
        self.first = coming;
    }

    /// Whether what comes next is known.
    pub fn is_followed(&self) -> bool {
        self.following
    }

    /// Whether nothing more is to be learnt of it while it is followed.
    pub fn is_settled(&self) -> bool {
        self.following && self.settled
    }

    /// Visits of a step.
    pub fn len(&self) -> usize {
        self.visits.len()
    }

    /// First visit of a chunk in a step.
    pub fn first(&self, chunk: ChunkId) -> Option<u32> {
        self.first.get(chunk.0 as usize).copied().flatten()
    }

    /// The visit entered last: its place, and visits until each of its needs is needed again.
    pub fn here(&self) -> Option<(usize, &[u32])> {
        let k = self.cursor.checked_sub(1)?;
        self.following.then(|| (k, self.until_next[k].as_slice()))
    }

    /// The visit `ahead` visits from the one entered last, beyond the end one of the next step.
    pub fn ahead(&self, ahead: usize) -> &Visit {
        &self.visits[(self.cursor.wrapping_sub(1) + ahead) % self.visits.len()]
    }

    /// Where the next visit computed when the step was recorded, if it is the known one.
    pub fn next_depth(&self, phase: Phase, op: &str, needs: &[(ChunkId, Access)]) -> Option<usize> {
        let known = self.visits.get(self.cursor).filter(|_| self.following)?;
        (known.needs == needs && known.op == op && known.phase == phase).then_some(known.depth)
    }

    /// By visit: depth, and its needs.
    pub fn visits(&self) -> impl Iterator<Item = (usize, &[(ChunkId, Access)])> {
        self.visits.iter().map(|visit| (visit.depth, visit.needs.as_slice()))
    }

    /// The step for the planner; `chunk` describes one by index.
    pub fn trace(&self, chunks: usize, chunk: impl Fn(usize) -> Chunk) -> Trace {
        let mut written = vec![false; chunks];
        let mut trace = Trace { chunks: (0..chunks).map(&chunk).collect(), ..Trace::default() };
        for (k, visit) in self.visits.iter().enumerate() {
            trace.moments.push(Moment {
                phase: visit.phase,
                op: visit.op.to_string(),
                layer: visit.layer,
                seconds: visit.seconds,
                other_bytes: visit.other_bytes,
                runs: if visit.depth == 0 { Runs::Fastest } else { Runs::Host },
            });
            for (id, access) in &visit.needs {
                // A gradient begins as nothing in every step, and is nothing again once it was used for
                // an update; until then, which may be in the next step, it must be kept.
                let grad = trace.chunks[id.0 as usize].class.is_grad();
                let begun = &mut written[id.0 as usize];
                let access = match grad && access.writes() && !*begun {
                    true => Access::Write,
                    false => *access,
                };
                *begun = (*begun || access.writes()) && !visit.is_update();
                trace.uses.push(Use { moment: k as u32, chunk: *id, access });
            }
        }
        trace
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(chunks: &[u32]) -> Visit {
        let needs = chunks.iter().map(|chunk| (ChunkId(*chunk), Access::Read)).collect();
        Visit { phase: Phase::Forward, op: "op", layer: 0, depth: 0, needs, seconds: 0.0, other_bytes: 0 }
    }

    fn run(script: &mut Script, steps: &[&[u32]]) -> bool {
        script.begin();
        steps.iter().for_each(|chunks| script.enter(visit(chunks)));
        script.end(4)
    }

    #[test]
    fn a_step_that_repeats_is_followed_and_its_future_is_known() {
        let mut script = Script::default();
        let step: &[&[u32]] = &[&[0], &[1, 2], &[1], &[0]];
        assert!(!run(&mut script, step));
        assert_eq!(script.until_next, [vec![3], vec![1, 4], vec![3], vec![1]]);
        assert_eq!((script.first(ChunkId(2)), script.first(ChunkId(3))), (Some(1), None));
        // Followed for the first time it is timed; then nothing more is learnt.
        assert!(!run(&mut script, step));
        assert!(run(&mut script, step));
        script.begin();
        script.enter(visit(&[0]));
        assert_eq!(script.ahead(1), &visit(&[1, 2]));
        assert_eq!(script.ahead(4), &visit(&[0]));
    }

    #[test]
    fn a_gradient_is_kept_until_its_update_be_it_in_the_next_step() {
        let about = |phase, op| About { phase, op, layer: 0 };
        let update = [(ChunkId(0), Access::Read), (ChunkId(1), Access::ReadWrite)];
        let step = [
            Visit::new(about(Phase::Optimizer, "adamw"), 0, &update),
            Visit::new(about(Phase::Forward, "op"), 0, &[(ChunkId(1), Access::Read)]),
            Visit::new(about(Phase::Backward, "op"), 0, &[(ChunkId(0), Access::ReadWrite)]),
            Visit::new(about(Phase::Backward, "op"), 0, &[(ChunkId(0), Access::ReadWrite)]),
            Visit::new(about(Phase::Optimizer, "norm"), 0, &[(ChunkId(0), Access::Read)]),
        ];
        let accesses = |first: usize| -> Vec<Access> {
            let mut script = Script::default();
            script.begin();
            (0..5).for_each(|i| script.enter(step[(first + i) % 5].clone()));
            script.end(2);
            let classes = [crate::Class::Grad, crate::Class::M];
            let trace = script.trace(2, |i| Chunk { class: classes[i], bytes: 8, recompute_s: None });
            trace.uses.iter().filter(|used| used.chunk == ChunkId(0)).map(|used| used.access).collect()
        };
        let (read, add, write) = (Access::Read, Access::ReadWrite, Access::Write);
        assert_eq!(accesses(0), [read, write, add, read]);
        assert_eq!(accesses(1), [write, add, read, read]);
    }

    #[test]
    fn a_step_that_differs_is_written_anew() {
        let mut script = Script::default();
        run(&mut script, &[&[0], &[1], &[0]]);
        script.begin();
        script.enter(visit(&[0]));
        assert!(script.is_followed());
        script.enter(visit(&[2]));
        assert!(!script.is_followed());
        assert!(!script.end(4));
        assert_eq!(script.visits, [visit(&[0]), visit(&[2])]);
        // A step that ends early is another step, too.
        assert_eq!([(); 3].map(|()| run(&mut script, &[&[0]])), [false, false, true]);
    }
}
