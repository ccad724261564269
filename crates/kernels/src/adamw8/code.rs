//! The code: an f32 cut to its exponent and 3 bits of mantissa, counted down from the exponent of
//! its run. Integer arithmetic alone, so every instruction set gives the same codes.

/// Bits of an f32's mantissa that a code has not.
const CUT: u32 = 20;

/// Codes of a second moment, and of the magnitude of a first one; 0 is zero.
const TOP: i32 = 255;
const TOP_SIGNED: i32 = 127;

/// Exponent of a run whose largest magnitude has these bits: one for which rounding up, too, finds
/// a code.
#[inline(always)]
pub(super) fn exponent(largest: f32) -> u8 {
    ((largest.to_bits() + (1 << CUT)) >> 23) as u8
}

/// What is taken from the upper bits of a float to make its code: code `top` is 1.875 * 2^exponent.
#[inline(always)]
fn base(exponent: u8, top: i32) -> i32 {
    (exponent as i32) * 8 + 7 - top
}

#[inline(always)]
fn value(code: i32, base: i32) -> f32 {
    // Below the smallest float there is only zero.
    let bits = ((code + base).max(0) as u32) << CUT;
    f32::from_bits(if code == 0 { 0 } else { bits })
}

/// A second moment.
#[inline(always)]
pub(super) fn decode(code: u8, exponent: u8) -> f32 {
    value(code as i32, base(exponent, TOP))
}

/// A first moment.
#[inline(always)]
pub(super) fn decode_signed(code: u8, exponent: u8) -> f32 {
    let magnitude = value((code & 0x7f) as i32, base(exponent, TOP_SIGNED));
    f32::from_bits(magnitude.to_bits() | ((code as u32 & 0x80) << 24))
}

/// The code below or above `x` >= 0; above when `chance` (16 bits) says so. What is below every
/// code but not zero takes the smallest: too large a second moment is a small step, zero a huge one.
#[inline(always)]
pub(super) fn encode(x: f32, exponent: u8, chance: u32) -> u8 {
    let bits = x.to_bits();
    let code = ((bits + (chance << 4)) >> CUT) as i32 - base(exponent, TOP);
    if bits == 0 { 0 } else { code.clamp(1, TOP) as u8 }
}

/// As `encode`, with a sign; what is below every code becomes zero or the smallest, by chance.
#[inline(always)]
pub(super) fn encode_signed(x: f32, exponent: u8, chance: u32) -> u8 {
    let base = base(exponent, TOP_SIGNED);
    let magnitude = x.abs();
    let bits = magnitude.to_bits();
    let least = value(1, base);
    let code = ((bits + (chance << 4)) >> CUT) as i32 - base;
    // Exact on both sides: a power of two, and a factor of 17 bits on a mantissa of 4.
    let raised = magnitude * 65536.0 >= least * (65536 - chance) as f32;
    let small = (raised && bits != 0) as i32;
    let code = if magnitude < least { small } else { code.clamp(0, TOP_SIGNED) };
    code as u8 | ((x.to_bits() >> 24) & 0x80) as u8
}

/// Start of the chances of a run: a hash of the step and the run's number (the finaliser of
/// SplitMix64, Steele et al. 2014).
#[inline(always)]
pub(super) fn seed(step: u64, run: u64) -> u32 {
    let mut x = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ run;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) as u32
}

/// Two chances of 16 bits for the `lane`-th moments of a run (the hash "lowbias32" of C. Wellons).
#[inline(always)]
pub(super) fn chances(seed: u32, lane: u32) -> (u32, u32) {
    let mut x = seed.wrapping_add(lane.wrapping_mul(0x9e37_79b9));
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    (x >> 16, x & 0xffff)
}
