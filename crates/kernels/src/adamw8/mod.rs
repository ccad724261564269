//! AdamW with moments of 8 bits: 2.016 bytes of state a parameter instead of 8, one pass over memory.
//!
//! Runs of 128 moments share an exponent; each moment is a small float below it. A second moment
//! is 5 bits of exponent and 3 of mantissa (32 octaves, so that the small ones of a run do not
//! become zero and their weights do not jump), a first moment a sign, 4 and 3 bits (16 octaves, the
//! root of 32).
//!
//! Rounding is up or down at random, with the chances that keep the mean. Rounding to the nearest
//! would freeze slow averages: a step changes a moment by less than half a code, so it would come
//! back as it was, for ever (the regression of the tests then ends 37 % above f32 with beta2 0.999;
//! with chances within 3 %). The chance is a hash of step and position, so the result depends on
//! neither threads nor on how the parameters are cut into chunks.
//!
//! The idea of 8-bit moments by blocks: Dettmers et al. 2022 (arXiv 2110.02861); why second moments
//! must not become zero: Li et al. 2023 (arXiv 2309.01507). The code is our own.

mod code;
mod convert;
mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub use convert::{Order, pack, unpack_bf16};

use crate::adamw::{Hyper, Master};
use device::{DType, Device, View, ViewMut};

/// Moments that share an exponent.
pub const BLOCK: usize = 128;

/// Bytes of the exponents of `len` moments.
pub fn exponents_len(len: usize) -> usize {
    len.div_ceil(BLOCK)
}

/// Moments of a run of parameters, as bytes. All zeros is the state before the first step.
pub struct Packed<'a> {
    /// One byte a parameter.
    pub codes: ViewMut<'a>,
    /// One byte for each `BLOCK` parameters, the last run may be shorter.
    pub exponents: ViewMut<'a>,
}

/// One step on a run of parameters that begins with the parameter numbered `first` (a multiple of
/// `BLOCK`; the number decides how its moments are rounded). `grad` is f32 or bf16 and finite; `m` and `v`
/// are updated, the weights with the moments as they were before rounding.
pub fn update(master: Master<'_>, grad: View<'_>, m: Packed<'_>, v: Packed<'_>, first: u64, hyper: &Hyper) {
    let len = match &master {
        Master::F32(weights) => weights.len(),
        Master::Split { high, low } => {
            assert_eq!(high.len(), low.len(), "low halves");
            high.len()
        }
    };
    assert!(first.is_multiple_of(BLOCK as u64), "parameter {first} begins no block of {BLOCK}");
    assert_eq!(len, grad.len(), "gradients of {len} parameters");
    for moments in [&m, &v] {
        let (codes, exponents) = (moments.codes.len(), moments.exponents.len());
        assert!(codes == len && exponents == exponents_len(len), "moments of {len} parameters");
        let types = [moments.codes.dtype(), moments.exponents.dtype()];
        assert_eq!(types, [DType::U8; 2], "types of moments");
    }
    match grad.device() {
        Device::Cpu => cpu::update(master, grad, m, v, first, hyper),
        Device::Cuda => cuda::update(master, grad, m, v, first, hyper),
    }
}

/// The moments as floats: (first, second), for inspection and tests.
pub fn unpack(m: &Packed<'_>, v: &Packed<'_>) -> (Vec<f32>, Vec<f32>) {
    let decode = |packed: &Packed<'_>, one: fn(u8, u8) -> f32| {
        let runs = packed.codes.as_view().bytes().chunks(BLOCK).zip(packed.exponents.as_view().bytes());
        runs.flat_map(|(codes, e)| codes.iter().map(move |code| one(*code, *e))).collect()
    };
    (decode(m, code::decode_signed), decode(v, code::decode))
}
