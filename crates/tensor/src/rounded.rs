//! Gradients of a whole step that are rounded to bf16 before anybody reads them: the norm, and the
//! update. Sums over uses, microbatches and ranks are f32 and stay so.
//!
//! Where everything stays in memory they are rounded in place. Over tiers they are rounded into an
//! array of their own, so that two bytes travel and lie below, and the sums are worth nothing any
//! more. Both have the same values.

use crate::{Fault, ParamRef, ParamStore};
use device::View;
use memory::pager::About;
use memory::trace::{Access, Phase};
use memory::{Class, Need};
use std::ops::Range;

impl ParamStore {
    /// Whether final gradients are rounded.
    pub fn rounds_grads(&self) -> bool {
        self.rounds
    }

    /// From now on final gradients are rounded. Over tiers that was settled when the store was made.
    pub fn round_grads(&mut self) {
        assert!(
            !self.arrays().is_paged() || self.arrays().has(Class::Grad16),
            "an array for what is rounded"
        );
        self.rounds = true;
    }

    /// The class in which gradients lie once they are final.
    pub fn final_class(&self) -> Class {
        if self.arrays().has(Class::Grad16) { Class::Grad16 } else { Class::Grad }
    }

    /// Final gradient of one parameter, f32 or bf16.
    pub fn final_grad(&self, param: ParamRef) -> View<'_> {
        self.arrays().view(self.final_class(), self.range(param))
    }

    /// Nothing is added any more to the gradient of `param` in this step: round it where that is
    /// asked for, once, and make it resident until the next moment. `about` says who reads it.
    pub fn finish_grad(&mut self, about: About, param: ParamRef) -> Result<(), Fault> {
        let elements = self.range(param);
        let need = |class, access| Need { class, elements: elements.clone(), access };
        if !self.rounds {
            return self.bring(about, &[need(Class::Grad, Access::Read)]);
        }
        // Rounded where ops compute: the sum was written there last.
        let about = About { phase: Phase::Backward, op: "round", ..about };
        let needs = [need(Class::Grad, Access::Read), need(Class::Grad16, Access::Write)];
        self.bring(about, &needs)?;
        self.round(elements);
        Ok(())
    }

    /// Round sums that are final and resident.
    pub fn round(&mut self, elements: Range<usize>) {
        if self.final_class() == Class::Grad {
            return kernels::elementwise::round_to_bf16(self.arrays_mut().view_mut(Class::Grad, elements));
        }
        let (sum, rounded) = self.arrays_mut().view_and_mut(Class::Grad, Class::Grad16, elements);
        kernels::elementwise::copy(rounded, sum);
    }

    /// The gradients of `elements` were rounded: of chunks that lie in them whole the sums are worth
    /// nothing any more. Nothing happens where sums are what is read.
    pub fn forget_sums(&mut self, elements: Range<usize>) -> Result<(), Fault> {
        match self.final_class() {
            Class::Grad16 => self.arrays_mut().discard(Class::Grad, elements).map_err(Fault::outside),
            _ => Ok(()),
        }
    }

    /// An update has used the gradients of `elements`.
    pub fn use_up_grads(&mut self, elements: Range<usize>) -> Result<(), Fault> {
        let class = self.final_class();
        self.arrays_mut().discard(class, elements).map_err(Fault::outside)
    }
}
