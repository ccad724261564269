//! When the gradients of one unit of a pipeline's work are final: the way there or back of one
//! microbatch through one slice. Counts only; what is final sets out in `buckets`.
//!
//! A gradient is final for a unit when every use of its parameter in the slice has had its way back,
//! whether that wrote or put off. A way back counts down what the way there counted up; where gradients
//! of weights wait, what the former put off is what their own unit counts down. Microbatches are alike.

use dist::pipeline::{Unit, Work};
use std::collections::HashMap;
use std::ops::Range;
use tensor::{Moment, Phase};

/// What a unit has done to a stripe.
#[derive(Clone, Copy, PartialEq)]
enum Stripe {
    Untouched,
    Written,
    Gone,
}

pub(super) struct Units {
    /// By parameter: stripes it lies in.
    spans: Vec<Range<usize>>,
    /// By chunk, then by parameter: uses on the way there, and those a way back put off.
    there: HashMap<usize, Vec<u32>>,
    put_off: HashMap<usize, Vec<u32>>,
    chunk: usize,
    work: Work,
    /// By parameter: uses so far on a way there, uses still to come on a way back.
    uses: Vec<u32>,
    /// By parameter: uses this unit put off.
    later: Vec<u32>,
    /// By stripe: parameters with uses still to come.
    left: Vec<usize>,
    stripes: Vec<Stripe>,
}

impl Units {
    /// For parameters that lie in the stripes `spans`, `count` in all.
    pub fn new(spans: &[Range<usize>], count: usize) -> Units {
        Units {
            spans: spans.to_vec(),
            there: HashMap::new(),
            put_off: HashMap::new(),
            chunk: 0,
            work: Work::Forward,
            uses: vec![0; spans.len()],
            later: vec![0; spans.len()],
            left: vec![0; count],
            stripes: vec![Stripe::Untouched; count],
        }
    }

    pub fn begin(&mut self, unit: Unit) {
        (self.chunk, self.work) = (unit.chunk, unit.work);
        let known = match unit.work {
            Work::Forward => None,
            Work::Backward | Work::BackwardInput => self.there.get(&unit.chunk),
            Work::BackwardWeight => self.put_off.get(&unit.chunk),
        };
        match known {
            Some(uses) => self.uses.clone_from(uses),
            None => self.uses.fill(0),
        }
        self.later.fill(0);
        self.stripes.fill(Stripe::Untouched);
        self.left.fill(0);
        for (span, _) in self.spans.iter().zip(&self.uses).filter(|(_, uses)| **uses > 0) {
            self.left[span.clone()].iter_mut().for_each(|left| *left += 1);
        }
    }

    /// A moment is about to run.
    pub fn enter(&mut self, moment: &Moment<'_>) {
        for param in moment.params {
            match (moment.phase, moment.writes_grads) {
                (Phase::Forward, false) => self.uses[param.index()] += 1,
                (Phase::Backward, false) => self.later[param.index()] += 1,
                (_, true) => {
                    for stripe in &mut self.stripes[self.spans[param.index()].clone()] {
                        assert!(*stripe != Stripe::Gone, "gradients are written after they were added up");
                        *stripe = Stripe::Written;
                    }
                }
                _ => {}
            }
        }
    }

    /// A moment of the way back has ended, of parameters by their places; or one that wrote gradients on
    /// the way there. Stripes that are final for this unit.
    pub fn settle(&mut self, params: impl Iterator<Item = usize>) -> Vec<usize> {
        let mut gone = Vec::new();
        for param in params {
            let counted = self.work != Work::Forward && self.uses[param] > 0;
            if counted {
                self.uses[param] -= 1;
                if self.uses[param] > 0 {
                    continue;
                }
            }
            for stripe in self.spans[param].clone() {
                self.left[stripe] -= usize::from(counted);
                if self.left[stripe] == 0 && self.stripes[stripe] == Stripe::Written {
                    self.stripes[stripe] = Stripe::Gone;
                    gone.push(stripe);
                }
            }
        }
        gone
    }

    /// The unit has ended: stripes it wrote that were not known to be final.
    pub fn end(&mut self) -> Vec<usize> {
        match self.work {
            Work::Forward => drop(self.there.insert(self.chunk, self.uses.clone())),
            Work::BackwardInput => drop(self.put_off.insert(self.chunk, self.later.clone())),
            _ => {}
        }
        (0..self.stripes.len()).filter(|stripe| self.stripes[*stripe] == Stripe::Written).collect()
    }
}
