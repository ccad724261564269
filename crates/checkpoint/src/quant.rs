//! Element types of weight files and their widening to f32, one function per block layout.
//!
//! Layouts follow ggml's block structs (ggml-common.h). A block holds 32 or 256 values; the tests
//! hold each loop against a formula that finds one element's bits by its index alone.

use half::{bf16, f16};

/// Type of the elements of a stored weight. Block types share a scale among 32 or 256 values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names of the GGUF format")]
pub enum WeightType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 values of 4 bits, one scale.
    Q4_0,
    /// 32 values of 4 bits, scale and minimum.
    Q4_1,
    /// 32 values of 5 bits, one scale.
    Q5_0,
    /// 32 values of 5 bits, scale and minimum.
    Q5_1,
    /// 32 values of 8 bits, one scale.
    Q8_0,
    /// 256 values of 2 bits, 16 sub-blocks with 4-bit scales and minima.
    Q2K,
    /// 256 values of 3 bits, 16 sub-blocks with 6-bit scales.
    Q3K,
    /// 256 values of 4 bits, 8 sub-blocks with 6-bit scales and minima.
    Q4K,
    /// 256 values of 5 bits, 8 sub-blocks with 6-bit scales and minima.
    Q5K,
    /// 256 values of 6 bits, 16 sub-blocks with 8-bit scales.
    Q6K,
}

use WeightType::*;

impl WeightType {
    /// Name as the formats write it, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            F32 => "f32",
            F16 => "f16",
            Bf16 => "bf16",
            Q4_0 => "q4_0",
            Q4_1 => "q4_1",
            Q5_0 => "q5_0",
            Q5_1 => "q5_1",
            Q8_0 => "q8_0",
            Q2K => "q2_k",
            Q3K => "q3_k",
            Q4K => "q4_k",
            Q5K => "q5_k",
            Q6K => "q6_k",
        }
    }

    /// (values, bytes) of one block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            F32 => (1, 4),
            F16 | Bf16 => (1, 2),
            Q4_0 => (32, 18),
            Q4_1 => (32, 20),
            Q5_0 => (32, 22),
            Q5_1 => (32, 24),
            Q8_0 => (32, 34),
            Q2K => (256, 84),
            Q3K => (256, 110),
            Q4K => (256, 144),
            Q5K => (256, 176),
            Q6K => (256, 210),
        }
    }

    /// Bytes of `elements` values; none when they are no whole number of blocks or overflow.
    pub fn bytes(self, elements: u64) -> Option<u64> {
        let (values, bytes) = self.block();
        elements.is_multiple_of(values as u64).then_some(())?;
        (elements / values as u64).checked_mul(bytes as u64)
    }

    /// From the type number of a GGUF tensor.
    pub(crate) fn from_ggml(number: u32) -> Option<WeightType> {
        Some(match number {
            0 => F32,
            1 => F16,
            2 => Q4_0,
            3 => Q4_1,
            6 => Q5_0,
            7 => Q5_1,
            8 => Q8_0,
            10 => Q2K,
            11 => Q3K,
            12 => Q4K,
            13 => Q5K,
            14 => Q6K,
            30 => Bf16,
            _ => return None,
        })
    }

    /// Widen whole blocks: `raw` holds exactly the bytes of `out`.
    pub(crate) fn widen(self, raw: &[u8], out: &mut [f32]) {
        let (values, bytes) = self.block();
        assert_eq!(raw.len() / bytes * values, out.len(), "{} blocks do not match the output", self.name());
        for (block, out) in raw.chunks_exact(bytes).zip(out.chunks_exact_mut(values)) {
            match self {
                F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                F16 => out[0] = half_at(block, 0),
                Bf16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                Q4_0 => q4(half_at(block, 0), -8.0 * half_at(block, 0), &block[2..], out),
                Q4_1 => q4(half_at(block, 0), half_at(block, 2), &block[4..], out),
                Q5_0 => q5(half_at(block, 0), -16.0 * half_at(block, 0), &block[2..], out),
                Q5_1 => q5(half_at(block, 0), half_at(block, 2), &block[4..], out),
                Q8_0 => q8_0(block, out),
                Q2K => q2_k(block, out),
                Q3K => q3_k(block, out),
                Q4K => q4_k(block, out),
                Q5K => q5_k(block, out),
                Q6K => q6_k(block, out),
            }
        }
    }
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 16 bytes: low nibbles are values 0..16, high nibbles 16..32.
fn q4(scale: f32, min: f32, nibbles: &[u8], out: &mut [f32]) {
    let (low, high) = out.split_at_mut(16);
    for (i, byte) in nibbles[..16].iter().enumerate() {
        low[i] = f32::from(byte & 15) * scale + min;
        high[i] = f32::from(byte >> 4) * scale + min;
    }
}

/// 4 bytes of fifth bits, bit i for value i, then nibbles as in `q4`.
fn q5(scale: f32, min: f32, rest: &[u8], out: &mut [f32]) {
    let fifth = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]);
    let (low, high) = out.split_at_mut(16);
    for (i, byte) in rest[4..20].iter().enumerate() {
        let (bit_low, bit_high) = ((fifth >> i) & 1, (fifth >> (i + 16)) & 1);
        low[i] = (u32::from(byte & 15) | bit_low << 4) as f32 * scale + min;
        high[i] = (u32::from(byte >> 4) | bit_high << 4) as f32 * scale + min;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (value, byte) in out.iter_mut().zip(&block[2..]) {
        *value = f32::from(*byte as i8) * scale;
    }
}

/// scales[16] (low nibble scale, high nibble minimum), bits[64], d, dmin.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, bits) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (sub, out) in out.chunks_exact_mut(16).enumerate() {
        let (scale, min) = (d * f32::from(scales[sub] & 15), dmin * f32::from(scales[sub] >> 4));
        let bytes = &bits[sub / 8 * 32 + sub % 2 * 16..][..16];
        let shift = sub % 8 / 2 * 2;
        for (value, byte) in out.iter_mut().zip(bytes) {
            *value = scale * f32::from((byte >> shift) & 3) - min;
        }
    }
}

/// high[32] (one bit per value), bits[64], scales[12], d.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, bits, scales, d) = (&block[..32], &block[32..96], &block[96..108], half_at(block, 108));
    for (sub, out) in out.chunks_exact_mut(16).enumerate() {
        let low_bits = if sub < 8 { scales[sub] & 15 } else { scales[sub - 8] >> 4 };
        let high_bits = (scales[8 + sub % 4] >> (sub / 4 * 2)) & 3;
        let scale = d * (f32::from(low_bits | high_bits << 4) - 32.0);
        let column = sub % 2 * 16;
        let shift = sub % 8 / 2 * 2;
        for (i, value) in out.iter_mut().enumerate() {
            let third = (high[column + i] >> (sub / 2)) & 1;
            let quant = (bits[sub / 8 * 32 + column + i] >> shift) & 3;
            // A clear third bit means minus four.
            *value = scale * (f32::from(quant | third << 2) - 4.0);
        }
    }
}

/// The 6-bit (scale, minimum) of sub-block `sub` of 8, packed into 12 bytes.
fn scale_min(packed: &[u8], sub: usize) -> (f32, f32) {
    let (scale, min) = if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        let (low, high) = (packed[sub + 4], sub - 4);
        ((low & 15) | (packed[high] >> 6) << 4, (low >> 4) | (packed[sub] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin, scales[12], nibbles[128]: 32 bytes hold two sub-blocks, low nibbles first.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin, packed, nibbles) = (half_at(block, 0), half_at(block, 2), &block[4..16], &block[16..]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(packed, sub);
        let (scale, min, shift) = (d * scale, dmin * min, sub % 2 * 4);
        for (value, byte) in out.iter_mut().zip(&nibbles[sub / 2 * 32..]) {
            *value = scale * f32::from((byte >> shift) & 15) - min;
        }
    }
}

/// As `q4_k` with fifth[32] before the nibbles: bit `sub` of byte i belongs to value i of `sub`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    let (fifth, nibbles) = (&block[16..48], &block[48..]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(packed, sub);
        let (scale, min, shift) = (d * scale, dmin * min, sub % 2 * 4);
        for (i, value) in out.iter_mut().enumerate() {
            let quant = (nibbles[sub / 2 * 32 + i] >> shift) & 15 | ((fifth[i] >> sub) & 1) << 4;
            *value = scale * f32::from(quant) - min;
        }
    }
}

/// low[128], high[64], scales[16] (signed), d; each half of 128 values is laid out alike.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&block[half * 64..][..64], &block[128 + half * 32..][..32]);
        let scales = &block[192 + half * 8..][..8];
        for i in 0..32 {
            for (quarter, nibble) in
                [low[i] & 15, low[i + 32] & 15, low[i] >> 4, low[i + 32] >> 4].into_iter().enumerate()
            {
                let quant = nibble | ((high[i] >> (2 * quarter)) & 3) << 4;
                let scale = d * f32::from(scales[2 * quarter + i / 16] as i8);
                out[quarter * 32 + i] = scale * (f32::from(quant) - 32.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit `at` of a little-endian bit string.
    fn bit(bytes: &[u8], at: usize) -> u32 {
        u32::from(bytes[at / 8] >> (at % 8)) & 1
    }

    /// `count` bits from bit `at`, lowest first.
    fn field(bytes: &[u8], at: usize, count: usize) -> u32 {
        (0..count).map(|i| bit(bytes, at + i) << i).sum()
    }

    /// Six-bit (scale, min) of Q4_K and Q5_K: low parts in place, high pairs borrowed from the first 8.
    fn slow_scale_min(packed: &[u8], sub: usize) -> (f32, f32) {
        let (scale, min) = match sub {
            0..4 => (field(packed, 8 * sub, 6), field(packed, 8 * (sub + 4), 6)),
            _ => (
                field(packed, 8 * (sub + 4), 4) + 16 * field(packed, 8 * (sub - 4) + 6, 2),
                field(packed, 8 * (sub + 4) + 4, 4) + 16 * field(packed, 8 * sub + 6, 2),
            ),
        };
        (scale as f32, min as f32)
    }

    /// Value `e` of one block, found by its index alone.
    fn slow(dtype: WeightType, b: &[u8], e: usize) -> f32 {
        let h = |at| half_at(b, at);
        let nibble = |start: usize| field(b, 8 * (start + e % 16) + e / 16 * 4, 4);
        match dtype {
            F32 => f32::from_bits(field(b, 0, 16) + (field(b, 16, 16) << 16)),
            F16 => h(0),
            Bf16 => f32::from_bits(field(b, 0, 16) << 16),
            Q4_0 => (nibble(2) as f32 - 8.0) * h(0),
            Q4_1 => nibble(4) as f32 * h(0) + h(2),
            Q5_0 => ((nibble(6) + 16 * bit(&b[2..], e)) as f32 - 16.0) * h(0),
            Q5_1 => (nibble(8) + 16 * bit(&b[4..], e)) as f32 * h(0) + h(2),
            Q8_0 => (field(b, 16 + 8 * e, 8) as f32 - 256.0 * bit(b, 16 + 8 * e + 7) as f32) * h(0),
            Q2K => {
                let q = field(b, 8 * (16 + e / 128 * 32 + e % 32) + e % 128 / 32 * 2, 2);
                let (scale, min) = (field(b, 8 * (e / 16), 4), field(b, 8 * (e / 16) + 4, 4));
                h(80) * scale as f32 * q as f32 - h(82) * min as f32
            }
            Q3K => {
                let q = field(b, 8 * (32 + e / 128 * 32 + e % 32) + e % 128 / 32 * 2, 2);
                let third = field(b, 8 * (e % 32) + e / 32, 1);
                let s = e / 16;
                let scale = field(b, 8 * (96 + s % 8) + s / 8 * 4, 4)
                    + 16 * field(b, 8 * (104 + s % 4) + s / 4 * 2, 2);
                h(108) * (scale as f32 - 32.0) * (q as f32 - if third == 1 { 0.0 } else { 4.0 })
            }
            Q4K => {
                let (scale, min) = slow_scale_min(&b[4..16], e / 32);
                let q = field(b, 8 * (16 + e / 64 * 32 + e % 32) + e % 64 / 32 * 4, 4);
                h(0) * scale * q as f32 - h(2) * min
            }
            Q5K => {
                let (scale, min) = slow_scale_min(&b[4..16], e / 32);
                let q = field(b, 8 * (48 + e / 64 * 32 + e % 32) + e % 64 / 32 * 4, 4)
                    + 16 * field(b, 8 * (16 + e % 32) + e / 32, 1);
                h(0) * scale * q as f32 - h(2) * min
            }
            Q6K => {
                let q = field(b, 8 * (e / 128 * 64 + e % 64) + e % 128 / 64 * 4, 4)
                    + 16 * field(b, 8 * (128 + e / 128 * 32 + e % 32) + e % 128 / 32 * 2, 2);
                let scale = b[192 + e / 16] as i8;
                h(208) * f32::from(scale) * (q as f32 - 32.0)
            }
        }
    }

    const ALL: [WeightType; 13] = [F32, F16, Bf16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K];

    #[test]
    fn blocks_match_the_formula_of_each_element() {
        let mut seed = 1u64;
        for dtype in ALL {
            let (values, bytes) = dtype.block();
            for _ in 0..50 {
                let mut block: Vec<u8> = (0..bytes).map(|_| next(&mut seed)).collect();
                // Scales in a sane range: random halves overflow to infinity and compare as NaN.
                let scales: &[usize] = match dtype {
                    F32 | Bf16 => &[],
                    Q4_1 | Q5_1 | Q4K | Q5K => &[0, 2],
                    Q2K => &[80, 82],
                    Q3K => &[108],
                    Q6K => &[208],
                    _ => &[0],
                };
                for &at in scales {
                    let scale = f16::from_f32(f32::from(next(&mut seed)) / 64.0 - 1.0);
                    block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                }
                let mut out = vec![0.0; values];
                dtype.widen(&block, &mut out);
                for (e, got) in out.iter().enumerate() {
                    let want = slow(dtype, &block, e);
                    let close = (got - want).abs() <= 1e-5 * want.abs().max(16.0);
                    assert!(close || got.to_bits() == want.to_bits(), "{dtype} value {e}: {got}, not {want}");
                }
            }
        }
    }

    fn next(seed: &mut u64) -> u8 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as u8
    }

    #[test]
    fn hand_built_blocks() {
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let mut out = [0.0; 32];
        let mut block = half(0.5).to_vec();
        block.extend([0x9F; 16]);
        Q4_0.widen(&block, &mut out);
        assert_eq!((out[0], out[16]), (3.5, 0.5));
        let mut block = half(2.0).to_vec();
        block.extend(half(-1.0));
        block.extend([0x21; 16]);
        Q4_1.widen(&block, &mut out);
        assert_eq!((out[15], out[31]), (1.0, 3.0));
        let mut block = half(1.0).to_vec();
        block.extend([1, 0, 0, 0x80]);
        block.extend([0x00; 16]);
        Q5_0.widen(&block, &mut out);
        assert_eq!((out[0], out[1], out[31]), (0.0, -16.0, 0.0));
    }

    #[test]
    fn bytes_are_whole_blocks() {
        assert_eq!(Q4_1.bytes(64), Some(40));
        assert_eq!(Q4_1.bytes(33), None);
        assert_eq!(F32.bytes(u64::MAX), None);
    }
}
