//! Panels for AMX, 32 lanes wide. A: for each run of 16 pairs, the run of every lane, lane after
//! lane: the rows of its tiles. B: pair after pair, all lanes of it side by side: the rows of its
//! tiles. The two differ by a transpose of 16 x 16 pairs, and so do sources whose k or whose lanes
//! lie side by side.

use super::Side;
use crate::gemm::micro::RUN;
use crate::simd::Float;
use std::arch::x86_64::*;

const WIDTH: usize = 32;

/// Lane i at k is `data[i*lane + k*step]`, one of the strides 1, in one or three parts (`load`).
/// `out` is a whole panel of `kc` values of k, run by run, in it part by part; lanes and values that
/// are not there become zeros.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pack<T: Float, const PARTS: usize>(
    data: &[T],
    (lane, step): (usize, usize),
    lanes: usize,
    kc: usize,
    side: Side,
    out: &mut [f32],
) {
    let k_adjacent = step == 1 && (lane != 1 || lanes == 1);
    assert!(lanes <= WIDTH && (k_adjacent || lane == 1));
    assert!(lanes == 0 || kc == 0 || (lanes - 1) * lane + (kc - 1) * step < data.len());
    for (run, out) in out.chunks_exact_mut(PARTS * RUN * WIDTH).enumerate() {
        let k0 = run * 2 * RUN;
        let values = kc.saturating_sub(k0).min(2 * RUN);
        if k_adjacent {
            ask_ahead(data.as_ptr().wrapping_add(k0 + AHEAD), lane, lanes);
        }
        for half in 0..2 {
            let first = half * RUN;
            let count = lanes.saturating_sub(first).min(RUN);
            let from = data.as_ptr().wrapping_add(first * lane + k0 * step);
            // SAFETY: `count` lanes of `values` values from k0 on lie inside `data`, asserted above.
            let parts: [_; PARTS] = unsafe {
                match (k_adjacent, (count, values) == (RUN, 2 * RUN)) {
                    (true, true) => rows_of_lanes::<T, PARTS, true>(from, lane, (count, values)),
                    (true, false) => rows_of_lanes::<T, PARTS, false>(from, lane, (count, values)),
                    (false, true) => rows_of_pairs::<T, PARTS, true>(from, step, (count, values)),
                    (false, false) => rows_of_pairs::<T, PARTS, false>(from, step, (count, values)),
                }
            };
            let (base, stride) = match side {
                Side::A => (first * RUN, RUN),
                Side::B => (first, WIDTH),
            };
            for (rows, out) in parts.into_iter().zip(out.chunks_exact_mut(RUN * WIDTH)) {
                // Rows are lanes where k is adjacent, and A wants lanes; else they are pairs.
                let rows = if k_adjacent == (side == Side::A) { rows } else { transpose(rows) };
                for (i, row) in rows.into_iter().enumerate() {
                    // SAFETY: 16 words within the 16 x 32 of this run.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(base + i * stride).cast(), row) };
                }
            }
        }
    }
}

/// Elements asked for ahead of those being packed: 32 streams are more than the hardware follows.
const AHEAD: usize = 256;

#[inline]
fn ask_ahead<T>(from: *const T, lane: usize, lanes: usize) {
    for i in 0..lanes {
        // SAFETY: a prefetch may go anywhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(i * lane).cast()) };
    }
}

/// One register a lane: 16 pairs of it, for each part. `WHOLE` counts are known to the compiler,
/// which then unrolls everything into registers.
///
/// # Safety
/// `values` values lie at each of `count` lanes from `from` on.
// Indices, not iterators: every register is named by a constant once unrolled.
#[allow(clippy::needless_range_loop)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn rows_of_lanes<T: Float, const PARTS: usize, const WHOLE: bool>(
    from: *const T,
    lane: usize,
    counts: (usize, usize),
) -> [[__m512i; RUN]; PARTS] {
    let (count, values) = if WHOLE { (RUN, 2 * RUN) } else { counts };
    let mut rows = [[_mm512_setzero_si512(); RUN]; PARTS];
    for i in 0..RUN {
        if i < count {
            let from = from.wrapping_add(i * lane);
            // SAFETY: only `values` values are read.
            let (low, high): ([__m256i; PARTS], [__m256i; PARTS]) =
                unsafe { (load(from, values.min(RUN)), load(from.wrapping_add(RUN), values.max(RUN) - RUN)) };
            for part in 0..PARTS {
                rows[part][i] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low[part]), high[part]);
            }
        }
    }
    rows
}

/// One register a pair: that pair of 16 lanes, for each part.
///
/// # Safety
/// `count` lanes lie side by side at each of `values` steps from `from` on.
// Indices, not iterators: every register is named by a constant once unrolled.
#[allow(clippy::needless_range_loop)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn rows_of_pairs<T: Float, const PARTS: usize, const WHOLE: bool>(
    from: *const T,
    step: usize,
    counts: (usize, usize),
) -> [[__m512i; RUN]; PARTS] {
    let (count, values) = if WHOLE { (RUN, 2 * RUN) } else { counts };
    let none = [_mm256_setzero_si256(); PARTS];
    let at = |k: usize| match k < values {
        // SAFETY: only `count` lanes of steps before `values` are read.
        true => unsafe { load(from.wrapping_add(k * step), count) },
        false => none,
    };
    let mut rows = [[_mm512_setzero_si512(); RUN]; PARTS];
    for q in 0..RUN {
        let (low, high) = (at(2 * q), at(2 * q + 1));
        for part in 0..PARTS {
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high[part]));
            rows[part][q] = _mm512_or_si512(_mm512_cvtepu16_epi32(low[part]), high);
        }
    }
    rows
}

/// The first `count` of 16 elements in bf16 parts, zeros after them: one part is the nearest bf16;
/// three parts, each the upper half of what the former left, sum to the f32 exactly (8 bits of its
/// 24-bit significand each).
///
/// # Safety
/// `count` elements lie at `from`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn load<T: Float, const PARTS: usize>(from: *const T, count: usize) -> [__m256i; PARTS] {
    let mask = u16::MAX.checked_shr(RUN as u32 - count as u32).unwrap_or(0);
    let mut parts = [_mm256_setzero_si256(); PARTS];
    if size_of::<T>() == 2 {
        // SAFETY: masked lanes are not touched; T is f32 or bf16, told apart by size.
        parts[0] = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        return parts;
    }
    // SAFETY: as above.
    let mut rest = unsafe { _mm512_maskz_loadu_ps(mask, from.cast()) };
    if PARTS == 1 {
        // SAFETY: a register of bf16 is plain bits.
        parts[0] = unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(rest)) };
        return parts;
    }
    for part in parts.iter_mut() {
        let bits = _mm512_castps_si512(rest);
        *part = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits));
        let upper = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(upper));
    }
    parts
}

/// Transpose of 16 x 16 words: pairs of words, then quads, then 128-bit lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512i; RUN]) -> [__m512i; RUN] {
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    let mut s = t;
    for i in 0..4 {
        for odd in 0..2 {
            let (a, b) = (t[4 * i + odd], t[4 * i + 2 + odd]);
            s[4 * i + 2 * odd] = _mm512_unpacklo_epi64(a, b);
            s[4 * i + 2 * odd + 1] = _mm512_unpackhi_epi64(a, b);
        }
    }
    // s[4i + j] now holds, in its 128-bit lane l, word 4l + j of rows 4i..4i+4.
    let mut out = r;
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(s[j], s[4 + j]);
        let high = _mm512_shuffle_i32x4::<0xdd>(s[j], s[4 + j]);
        let low2 = _mm512_shuffle_i32x4::<0x88>(s[8 + j], s[12 + j]);
        let high2 = _mm512_shuffle_i32x4::<0xdd>(s[8 + j], s[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        out[4 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
    out
}
