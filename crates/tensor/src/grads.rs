//! Gradients while they are written: the first write of each overwrites, others add, and what nobody
//! wrote counts as zero.

use crate::{Fault, ParamRef, ParamStore};
use device::{View, ViewMut};
use memory::pager::About;
use memory::trace::Access;
use memory::{Class, Need, trace};
use std::ops::Range;

impl ParamStore {
    /// Gradient of one parameter. Panics when gradients were never enabled: our bug.
    pub fn grad(&self, param: ParamRef) -> View<'_> {
        self.arrays.view(Class::Grad, self.range(param))
    }

    /// The gradient to write, and whether to add to it: the first write of a step overwrites, which saves
    /// clearing the gradients and reading them once.
    pub fn grad_mut(&mut self, param: ParamRef) -> (ViewMut<'_>, bool) {
        let add = self.touch(param);
        let range = self.range(param);
        (self.arrays.view_mut(Class::Grad, range), add)
    }

    /// The same beside the weights.
    pub fn weight_and_grad(&mut self, param: ParamRef) -> (View<'_>, ViewMut<'_>, bool) {
        let add = self.touch(param);
        let range = self.range(param);
        let (weight, grad) = self.arrays.view_and_mut(Class::Param, Class::Grad, range);
        (weight, grad, add)
    }

    /// A gradient is about to be written; whether it was before.
    fn touch(&mut self, param: ParamRef) -> bool {
        let add = std::mem::replace(&mut self.touched[param.index()], true);
        if !add {
            self.clear_padding_behind(param);
        }
        add
    }

    /// Over tiers what is written first may lie in anything: padding counts in norms, and is zero.
    fn clear_padding_behind(&mut self, param: ParamRef) {
        let padding = self.padding_behind(param);
        if self.arrays.is_paged() && !padding.is_empty() {
            device::fill_zero(self.arrays.view_mut(Class::Grad, padding));
        }
    }

    /// The gradient for kernels that only add: a stale one is cleared first.
    pub fn added_grad(&mut self, param: ParamRef) -> ViewMut<'_> {
        let (mut grad, add) = self.grad_mut(param);
        if !add {
            device::fill_zero(grad.reborrow());
        }
        grad
    }

    /// The same beside the weights.
    pub fn weight_and_added_grad(&mut self, param: ParamRef) -> (View<'_>, ViewMut<'_>) {
        let (weight, mut grad, add) = self.weight_and_grad(param);
        if !add {
            device::fill_zero(grad.reborrow());
        }
        (weight, grad)
    }

    /// All gradients as one flat array, padding (always zero) included.
    pub fn all_grads(&self) -> View<'_> {
        self.arrays.view(Class::Grad, 0..self.arrays.len())
    }

    /// Start a step: every gradient counts as zero.
    pub fn clear_grads(&mut self) -> Result<(), Fault> {
        self.touched.fill(false);
        let all = 0..self.arrays.len();
        self.forget_sums(all.clone())?;
        self.use_up_grads(all)
    }

    /// Start a step while gradients of the one before still wait to be used: each counts as zero from
    /// when its chunk is used up, which must be before the first write.
    pub fn renew_grads(&mut self) {
        self.touched.fill(false);
    }

    /// End the backward passes of a step: gradients nobody wrote become zeros.
    pub fn settle_grads(&mut self) -> Result<(), Fault> {
        self.refs().try_for_each(|param| self.settle_grad(param))
    }

    /// The same for one parameter.
    pub fn settle_grad(&mut self, param: ParamRef) -> Result<(), Fault> {
        if std::mem::replace(&mut self.touched[param.index()], true) {
            return Ok(());
        }
        let elements = self.range(param);
        let need = Need { class: Class::Grad, elements: elements.clone(), access: Access::Write };
        self.bring(About { phase: trace::Phase::Backward, op: "settle", layer: 0 }, &[need])?;
        device::fill_zero(self.arrays.view_mut(Class::Grad, elements));
        self.clear_padding_behind(param);
        Ok(())
    }

    /// Gradients in `elements` that nobody wrote become zeros there, and stay unwritten elsewhere.
    pub fn clear_unwritten(&mut self, elements: Range<usize>) {
        for param in self.params_in(&elements) {
            let range = self.range(param);
            let (start, end) = (range.start.max(elements.start), range.end.min(elements.end));
            if start < end && !self.touched[param.index()] {
                device::fill_zero(self.arrays.view_mut(Class::Grad, start..end));
            }
        }
    }

    /// Whether gradients are reserved.
    pub fn has_grads(&self) -> bool {
        self.arrays.has(Class::Grad)
    }
}
