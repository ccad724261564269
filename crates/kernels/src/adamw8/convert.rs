//! Moments of 8 bits as numbers and back, for files and for runs that change their precision. A
//! code's value has 3 bits of mantissa and the exponents of an f32, so bf16 holds every one exactly,
//! and `pack` finds the same value again: a state that was saved goes on with the same bits.

use super::code::{decode, decode_signed, encode, encode_signed, exponent};
use super::{BLOCK, exponents_len};
use half::bf16;

/// Which average of the gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Of the gradients: signed.
    First,
    /// Of their squares: never negative.
    Second,
}

/// A chance of one half: rounding to the nearest code.
const NEAREST: u32 = 1 << 15;

/// Bits of an f32 that no code has.
const BELOW: u32 = (1 << 20) - 1;

/// The values of moments that begin at moment `first` of their block; exact.
pub fn unpack_bf16(order: Order, codes: &[u8], exponents: &[u8], first: usize, out: &mut [bf16]) {
    assert!(codes.len() == out.len() && exponents.len() == exponents_len(first + codes.len()));
    let one = match order {
        Order::First => decode_signed,
        Order::Second => decode,
    };
    for (i, (code, out)) in codes.iter().zip(out).enumerate() {
        *out = bf16::from_f32(one(*code, exponents[(first + i) / BLOCK]));
    }
}

/// Moments nearest to `values`, which begin with a block. What `unpack_bf16` gave, of the same
/// blocks, comes back exactly; in other blocks a value 32 octaves (first moments: 16) below its
/// block's largest takes the smallest code, or zero.
pub fn pack(order: Order, values: &[bf16], codes: &mut [u8], exponents: &mut [u8]) {
    assert!(codes.len() == values.len() && exponents.len() == exponents_len(values.len()));
    let runs = values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(exponents);
    for ((values, codes), shared) in runs {
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.to_f32().abs()));
        // What is a code already needs no room for rounding up.
        *shared = match largest.to_bits() & BELOW {
            0 => (largest.to_bits() >> 23) as u8,
            _ => exponent(largest),
        };
        for (code, x) in codes.iter_mut().zip(values) {
            *code = match order {
                Order::First => encode_signed(x.to_f32(), *shared, NEAREST),
                Order::Second => encode(x.to_f32(), *shared, NEAREST),
            };
        }
    }
}
