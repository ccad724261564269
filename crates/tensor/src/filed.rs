//! Values kept for the way back that need not stay in memory: over tiers each is *filed*, copied into a
//! slot of the pager chunk by chunk, and comes back when the tape is walked back. Where the slot's
//! chunks are in between, the plan of the step decides. No bit changes.

use crate::tape::Phase;
use crate::{Fault, ParamStore, Tape, Tensor};
use memory::pager::About;
use memory::trace::{self, Access};
use memory::{Class, Need};
use std::ops::Range;

/// A value kept for the way back.
pub(crate) enum Saved {
    /// In memory.
    Here(Tensor),
    /// In a slot of the tiers.
    Filed {
        /// Which slot.
        slot: usize,
        /// Its shape.
        shape: Vec<usize>,
    },
}

impl Tape<'_> {
    /// Keep a value: in the next slot, where there is one that it fits in.
    pub(crate) fn file(&mut self, value: &Tensor) -> Result<Saved, Fault> {
        let slot = self.slots_taken;
        let fits = self.params.arrays().filed().is_some_and(|(filed, _)| {
            slot < filed.slots && value.len() <= filed.elements && value.dtype() == filed.dtype
        });
        if !fits {
            return Ok(Saved::Here(value.clone()));
        }
        self.slots_taken += 1;
        let about = About { op: "file", ..self.about() };
        for piece in pieces(self.params, slot, value.len()) {
            let need =
                Need { class: Class::Activation, elements: piece.there.clone(), access: Access::Write };
            self.params.bring(about, &[need])?;
            let from = value.view().narrow(piece.here.start, piece.here.len());
            let to = self.params.arrays_mut().view_mut(Class::Activation, piece.there);
            kernels::elementwise::copy(to, from);
        }
        Ok(Saved::Filed { slot, shape: value.shape().to_vec() })
    }

    /// The value again; its slot is free, and what lay there worth nothing.
    pub(crate) fn take_back(&mut self, saved: Saved) -> Result<Tensor, Fault> {
        let (slot, shape) = match saved {
            Saved::Here(value) => return Ok(value),
            Saved::Filed { slot, shape } => (slot, shape),
        };
        let (filed, _) = self.params.arrays().filed().expect("there are slots where a value was filed");
        let mut value = Tensor::new(self.params.device(), filed.dtype, &shape)?;
        let about = About { op: "take back", ..self.about() };
        for piece in pieces(self.params, slot, value.len()) {
            let need = Need { class: Class::Activation, elements: piece.there.clone(), access: Access::Read };
            self.params.bring(about, &[need])?;
            let from = self.params.arrays().view(Class::Activation, piece.there.clone());
            let to = value.view_mut().narrow(piece.here.start, piece.here.len());
            kernels::elementwise::copy(to, from);
            self.params.arrays_mut().discard(Class::Activation, piece.chunk).map_err(Fault::outside)?;
        }
        // What was filed last comes back first.
        self.slots_taken = slot;
        Ok(value)
    }

    fn about(&self) -> About {
        let phase = match self.phase() {
            Phase::Forward => trace::Phase::Forward,
            Phase::Backward => trace::Phase::Backward,
            Phase::Recompute => trace::Phase::Recompute,
        };
        About { phase, op: "", layer: self.layer() as u32 }
    }
}

/// A run of a value that lies in one chunk.
struct Piece {
    /// Its elements in the value.
    here: Range<usize>,
    /// Its elements in the array of slots.
    there: Range<usize>,
    /// All elements of the chunk.
    chunk: Range<usize>,
}

fn pieces(params: &ParamStore, slot: usize, len: usize) -> Vec<Piece> {
    let Some((filed, chunk)) = params.arrays().filed() else { return Vec::new() };
    let first = filed.start(slot, chunk);
    let piece = |start: usize| {
        let here = start..(start + chunk).min(len);
        let there = first + here.start..first + here.end;
        Piece { chunk: there.start..there.start + chunk, here, there }
    };
    (0..len).step_by(chunk).map(piece).collect()
}
