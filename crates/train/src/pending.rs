//! Updates that wait for the next step: where chunks come and go and the gradient is clipped by its
//! global norm, nothing can be updated before the whole backward pass is over. Instead of streaming
//! the whole state by while nothing else computes, each chunk is updated right before the first
//! moment of the next forward pass that reads its weights, so that the state moves beside it.
//!
//! Whoever looks at weights or state between two steps calls `Learner::finish_updates` first.

use crate::optimizer::AdamW;
use crate::step::chunks;
use std::ops::Range;
use tensor::{Fault, Moment, ParamStore, Phase};

/// The updates of the last step that are still to be made.
#[derive(Default)]
pub(crate) struct Pending {
    /// Learning rate and factor of the gradients; none: nothing is to be updated.
    rule: Option<(f32, f32)>,
    /// By chunk: its elements, while its moment is still to come.
    left: Vec<Option<Range<usize>>>,
}

impl Pending {
    /// The gradients are whole: they will be applied with `lr` and multiplied by `factor`.
    pub fn put(&mut self, store: &ParamStore, lr: f32, factor: f32) {
        self.rule = Some((lr, factor));
        self.left = chunks(store).map(Some).collect();
    }

    /// Whether gradients are still needed.
    pub fn is_some(&self) -> bool {
        self.rule.is_some()
    }

    /// A step begins that makes its updates like this. Where there are none, as in the first step, the pager
    /// is told of each that falls out, so that all steps are alike.
    pub fn begin_step(&mut self, store: &ParamStore) {
        if self.rule.is_none() {
            self.left = chunks(store).map(Some).collect();
        }
    }

    /// A moment of a recorded pass is about to run: update the weights it reads, and on the way back
    /// whatever no moment has read.
    pub fn before(
        &mut self,
        moment: &Moment<'_>,
        optimizer: &AdamW,
        store: &mut ParamStore,
    ) -> Result<(), Fault> {
        if moment.phase == Phase::Backward {
            return self.finish(optimizer, store);
        }
        moment.params.iter().try_for_each(|param| {
            let chunks = store.pieces_of(*param);
            self.make(chunks, optimizer, store)
        })
    }

    /// Make all that are left.
    pub fn finish(&mut self, optimizer: &AdamW, store: &mut ParamStore) -> Result<(), Fault> {
        self.make(0..self.left.len(), optimizer, store)?;
        self.left.clear();
        self.rule = None;
        Ok(())
    }

    fn make(&mut self, chunks: Range<usize>, optimizer: &AdamW, store: &mut ParamStore) -> Result<(), Fault> {
        for chunk in chunks {
            let Some(elements) = self.left.get_mut(chunk).and_then(Option::take) else { continue };
            match self.rule {
                Some((lr, factor)) => optimizer.update(store, elements, lr, factor)?,
                None => optimizer.pass_over(store, elements)?,
            }
        }
        Ok(())
    }
}
