use super::{Hyper, Master, Step};
use crate::cuda::{Launch, launch, suffix};
use device::{View, ViewMut};

/// Elements of a thread.
const RUN: usize = 4;

/// The end of the name of a kernel for weights and gradients of these kinds.
pub(crate) fn kind(master: &Master<'_>, grad: View<'_>) -> String {
    let weights = match master {
        Master::F32(_) => "plain",
        Master::Split { .. } => "split",
    };
    format!("{weights}_{}", suffix(grad.dtype()))
}

impl<'a> Launch<'a> {
    /// Weights to update.
    pub fn master(self, master: &Master<'_>) -> Launch<'a> {
        match master {
            Master::F32(weights) => self.write(weights),
            Master::Split { high, low } => self.write(high).write(low),
        }
    }

    /// The numbers of a step, in the order of the kernels' `Step`.
    pub fn step(self, step: &Step) -> Launch<'a> {
        let Step { beta1, beta2, eps, keep, rate, root, grad_scale } = *step;
        let numbers = [beta1, beta2, eps, keep, rate, root, grad_scale];
        numbers.into_iter().fold(self, Launch::f32)
    }
}

pub(super) fn update(master: Master<'_>, grad: View<'_>, m: ViewMut<'_>, v: ViewMut<'_>, hyper: &Hyper) {
    launch(&format!("adamw_{}", kind(&master, grad)))
        .master(&master)
        .read(grad)
        .write(&m)
        .write(&v)
        .over(grad.len(), RUN)
        .step(&Step::new(hyper))
        .run();
}
