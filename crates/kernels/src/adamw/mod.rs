//! AdamW (Loshchilov and Hutter 2019) in one pass over flat memory, bound by bandwidth alone.
//!
//! With bf16 weights the f32 master is not a second copy: it is the weight plus the 16 bits below
//! it. `split` and `join` are exact inverses, so both kinds of master walk the same path, bit for
//! bit, and two bytes a parameter are saved.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

pub(crate) use cpu::Step;
pub(crate) use cuda::kind;

use device::{Device, View, ViewMut};
use half::bf16;

/// What one step needs beside the state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled decay: the weight shrinks by lr * weight_decay.
    pub weight_decay: f32,
    /// Steps taken so far, this one included (1 for the first): bias correction.
    pub step: u64,
    /// Factor on the gradient, for clipping.
    pub grad_scale: f32,
}

/// The f32 master weights.
pub enum Master<'a> {
    /// As they are.
    F32(ViewMut<'a>),
    /// The bf16 weights the model computes with, and the bits below them.
    Split {
        /// bf16
        high: ViewMut<'a>,
        /// u16
        low: ViewMut<'a>,
    },
}

/// f32 as the nearest bf16 (ties away from zero) and the 16 bits that `join` needs to undo it.
/// Exact for every value whose rounding does not overflow, that is below 3.4e38 in magnitude.
#[inline(always)]
pub fn split(x: f32) -> (bf16, u16) {
    let bits = x.to_bits();
    (bf16::from_bits((bits.wrapping_add(0x8000) >> 16) as u16), bits as u16)
}

/// The f32 that `split` took apart.
#[inline(always)]
pub fn join(high: bf16, low: u16) -> f32 {
    // A low half of 0x8000 and more was rounded up: read as signed it takes the carry back.
    f32::from_bits(((high.to_bits() as u32) << 16).wrapping_add(low as i16 as i32 as u32))
}

/// `split` of every element: a bf16 model and its low halves from f32 weights.
pub fn split_all(src: &[f32], high: &mut [bf16], low: &mut [u16]) {
    assert!(src.len() == high.len() && src.len() == low.len(), "halves of {} weights", src.len());
    cpu::split_all(src, high, low);
}

/// One step on a run of parameters; grad is f32 or bf16, m and v are f32 and updated.
pub fn update(master: Master<'_>, grad: View<'_>, m: ViewMut<'_>, v: ViewMut<'_>, hyper: &Hyper) {
    let len = match &master {
        Master::F32(weights) => weights.len(),
        Master::Split { high, low } => {
            assert_eq!(high.len(), low.len(), "low halves");
            high.len()
        }
    };
    assert!(len == grad.len() && len == m.len() && len == v.len(), "state of {len} parameters");
    match grad.device() {
        Device::Cpu => cpu::update(master, grad, m, v, hyper),
        Device::Cuda => cuda::update(master, grad, m, v, hyper),
    }
}
