//! How many bits a moment has, and what a saved state holds of it: 8-bit moments are saved as bf16,
//! which holds their values exactly, so a state knows no blocks and goes on under any mesh and with
//! either kind of moments.

use device::{DType, Device, View, ViewMut};
use half::bf16;
use kernels::adamw8::{BLOCK, Order, pack, unpack_bf16};
use memory::Class;
use std::borrow::Cow;
use std::ops::Range;
use tensor::ParamStore;

/// Precision of the optimizer's moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Moments {
    /// 4 bytes each.
    #[default]
    F32,
    /// 1 byte each, and one for every 128 that share an exponent (`kernels::adamw8`).
    Bits8,
}

const _: () = assert!(BLOCK == tensor::BLOCK, "blocks of the kernel are blocks of the store");

impl Moments {
    /// Type of their flat arrays.
    pub const fn dtype(self) -> DType {
        match self {
            Moments::F32 => DType::F32,
            Moments::Bits8 => DType::U8,
        }
    }

    /// Bytes of one in a saved state.
    pub const fn saved_size(self) -> usize {
        match self {
            Moments::F32 => 4,
            Moments::Bits8 => 2,
        }
    }
}

fn order(class: Class) -> Order {
    if class == Class::V { Order::Second } else { Order::First }
}

/// Copy 8-bit moments of `elements` to `out` as bf16.
pub(crate) fn read(store: &ParamStore, class: Class, elements: Range<usize>, out: &mut [u8]) {
    let within = elements.start % BLOCK;
    let (codes, exponents) = store.codes(class, elements);
    let mut values = vec![bf16::ZERO; codes.len()];
    unpack_bf16(order(class), &here(codes), &here(exponents), within, &mut values);
    for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *out = value.to_le_bytes();
    }
}

/// Set 8-bit moments of `elements`, whole blocks, from bf16.
pub(crate) fn write(store: &mut ParamStore, class: Class, elements: Range<usize>, bytes: &[u8]) {
    assert!(elements.start.is_multiple_of(BLOCK), "moments are written in whole blocks");
    let values: Vec<bf16> = bytes.as_chunks().0.iter().map(|value| bf16::from_le_bytes(*value)).collect();
    let (mut codes, mut exponents) = (vec![0; elements.len()], vec![0; elements.len().div_ceil(BLOCK)]);
    pack(order(class), &values, &mut codes, &mut exponents);
    let (to_codes, to_exponents) = store.codes_mut(class, elements);
    device::copy(to_codes, View::of_bytes(DType::U8, &codes));
    device::copy(to_exponents, View::of_bytes(DType::U8, &exponents));
}

/// Bytes of a window, of whatever device.
fn here(view: View<'_>) -> Cow<'_, [u8]> {
    if view.device() == Device::Cpu {
        return Cow::Borrowed(view.bytes());
    }
    let mut bytes = vec![0; view.len()];
    device::copy(ViewMut::of_bytes(DType::U8, &mut bytes), view);
    Cow::Owned(bytes)
}

/// Moments of a state with `from` bytes each as `to` bytes each: bf16 widened, or f32 rounded.
pub(crate) fn resize(bytes: &[u8], from: usize, to: usize) -> Cow<'_, [u8]> {
    match (from, to) {
        (4, 2) => {
            let floats = bytes.as_chunks().0.iter().map(|x| bf16::from_f32(f32::from_le_bytes(*x)));
            Cow::Owned(floats.flat_map(bf16::to_le_bytes).collect())
        }
        (2, 4) => {
            let floats = bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32());
            Cow::Owned(floats.flat_map(f32::to_le_bytes).collect())
        }
        _ => Cow::Borrowed(bytes),
    }
}
