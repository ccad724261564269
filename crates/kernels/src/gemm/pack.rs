//! Packing: strips of an operand copied into panels the micro-kernel reads in order, widened to
//! f32 (or kept as pairs of bf16) and padded with zeros to whole panels.

use super::Mat;
#[cfg(target_arch = "x86_64")]
mod runs;

use super::micro::Tile;
use crate::simd::Float;
use device::{Slice, View};
use half::bf16;

/// Where a strip comes from: lane i (a row of A or a column of B) at k is `data[i*lane + k*step]`;
/// one of the two strides is 1.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    data: View<'a>,
    lane: usize,
    step: usize,
}

impl<'a> Source<'a> {
    /// Rows of `a` [m, k] as lanes.
    pub(crate) fn rows(a: Mat<'a>) -> Source<'a> {
        let (lane, step) = if a.transposed { (1, a.ld) } else { (a.ld, 1) };
        Source { data: a.data, lane, step }
    }

    /// Columns of `b` [k, n] as lanes.
    pub(crate) fn columns(b: Mat<'a>) -> Source<'a> {
        Self::rows(b.t())
    }
}

/// Whose panel is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Rows are lanes.
    A,
    /// Columns are lanes.
    B,
}

/// Lanes `[i0, i0 + lanes)` and k `[k0, k0 + kc)` into one panel `out` of `width` lanes.
pub(crate) fn pack_panel(
    (tile, side): (Tile, Side),
    src: Source<'_>,
    (i0, lanes, width): (usize, usize, usize),
    (k0, kc): (usize, usize),
    out: &mut [f32],
) {
    let start = i0 * src.lane + k0 * src.step;
    let out = &mut out[..tile.steps(kc) * width];
    // Only AMX packs the two sides differently.
    let _ = side;
    match src.data.floats() {
        #[cfg(target_arch = "x86_64")]
        Slice::F32(data) if tile.runs() => {
            // SAFETY: AMX comes with AVX-512 and BF16; bounds are checked inside.
            unsafe { pack_runs(tile, &data[start..], src, lanes, kc, side, out) }
        }
        Slice::F32(data) => pack(tile, &data[start..], src, (lanes, width), kc, out),
        #[cfg(target_arch = "x86_64")]
        Slice::Bf16(data) if tile.runs() => {
            // SAFETY: as above.
            unsafe { pack_runs(tile, &data[start..], src, lanes, kc, side, out) }
        }
        Slice::Bf16(data) if tile.pairs => pack_pairs(tile, &data[start..], src, (lanes, width), kc, out),
        Slice::Bf16(data) => pack(tile, &data[start..], src, (lanes, width), kc, out),
    }
}

/// # Safety
/// The machine has AMX.
#[cfg(target_arch = "x86_64")]
unsafe fn pack_runs<T: Float>(
    tile: Tile,
    data: &[T],
    src: Source<'_>,
    lanes: usize,
    kc: usize,
    side: Side,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.parts {
            1 => runs::pack::<T, 1>(data, (src.lane, src.step), lanes, kc, side, out),
            _ => runs::pack::<T, 3>(data, (src.lane, src.step), lanes, kc, side, out),
        }
    }
}

fn pack<T: Float>(
    tile: Tile,
    data: &[T],
    src: Source<'_>,
    (lanes, width): (usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    if src.step == 1 && src.lane != 1 {
        return transpose(tile, data, src.lane, (lanes, width), kc, out);
    }
    gather(data, src.step, (lanes, width), out);
}

multiversion! {
    /// Lanes lie side by side: each step is one run of them.
    fn gather<T: Float>(data: &[T], step: usize, sizes: (usize, usize), out: &mut [f32]) {
        // A run of known length is a few vector moves; of unknown length, a call of memcpy.
        match sizes {
            (6, 6) => gather_whole::<T, 6>(data, step, out),
            (14, 14) => gather_whole::<T, 14>(data, step, out),
            (16, 16) => gather_whole::<T, 16>(data, step, out),
            (32, 32) => gather_whole::<T, 32>(data, step, out),
            (lanes, width) => {
                for (k, out) in out.chunks_exact_mut(width).enumerate() {
                    let run = &data[k * step..k * step + lanes];
                    for (out, x) in out.iter_mut().zip(run) {
                        *out = x.to_f32();
                    }
                    out[lanes..].fill(0.0);
                }
            }
        }
    }
}

#[inline(always)]
fn gather_whole<T: Float, const W: usize>(data: &[T], step: usize, out: &mut [f32]) {
    for (k, out) in out.as_chunks_mut::<W>().0.iter_mut().enumerate() {
        let run: &[T; W] = data[k * step..].first_chunk().expect("a step holds its lanes");
        for (out, x) in out.iter_mut().zip(run) {
            *out = x.to_f32();
        }
    }
}

/// Steps lie side by side: a transpose, eight lanes and eight steps at a time where AVX2 is.
fn transpose<T: Float>(
    tile: Tile,
    data: &[T],
    lane: usize,
    (lanes, width): (usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if tile.isa != device::Isa::Portable {
        // SAFETY: every set but the portable one includes AVX2; bounds are checked inside.
        return unsafe { avx2::transpose(data, lane, (lanes, width), kc, out) };
    }
    let _ = tile;
    for (k, out) in out.chunks_exact_mut(width).enumerate().take(kc) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = if i < lanes { data[i * lane + k].to_f32() } else { 0.0 };
        }
    }
}

fn pack_pairs(
    tile: Tile,
    data: &[bf16],
    src: Source<'_>,
    (lanes, width): (usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    let at = |i: usize, k: usize| if k < kc { data[i * src.lane + k * src.step] } else { bf16::ZERO };
    #[cfg(target_arch = "x86_64")]
    if src.step == 1 && src.lane != 1 && tile.isa != device::Isa::Portable {
        // Pairs of neighbouring k already lie together: transposing 32-bit words is enough.
        // The last step of an odd kc is mended below.
        let whole = kc / 2;
        // SAFETY: AVX2 is there; bounds are checked inside, in pairs.
        unsafe { avx2::transpose_pairs(data, src.lane, (lanes, width), whole, &mut out[..whole * width]) };
        for (q, out) in out.chunks_exact_mut(width).enumerate().skip(whole) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = if i < lanes { pair(at(i, 2 * q), at(i, 2 * q + 1)) } else { 0.0 };
            }
        }
        return;
    }
    let _ = tile;
    let whole = if src.lane == 1 { kc / 2 } else { 0 };
    gather_pairs(data, src.step, (lanes, width), &mut out[..whole * width]);
    for (q, out) in out.chunks_exact_mut(width).enumerate().skip(whole) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = if i < lanes { pair(at(i, 2 * q), at(i, 2 * q + 1)) } else { 0.0 };
        }
    }
}

#[inline(always)]
fn pair(low: bf16, high: bf16) -> f32 {
    f32::from_bits(low.to_bits() as u32 | (high.to_bits() as u32) << 16)
}

multiversion! {
    /// As `gather`, two steps at a time, woven into pairs.
    fn gather_pairs(data: &[bf16], step: usize, sizes: (usize, usize), out: &mut [f32]) {
        match sizes {
            (14, 14) => gather_whole_pairs::<14>(data, step, out),
            (32, 32) => gather_whole_pairs::<32>(data, step, out),
            (lanes, width) => {
                for (q, out) in out.chunks_exact_mut(width).enumerate() {
                    let low = &data[2 * q * step..][..lanes];
                    let high = &data[(2 * q + 1) * step..][..lanes];
                    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
                        *out = pair(*low, *high);
                    }
                    out[lanes..].fill(0.0);
                }
            }
        }
    }
}

#[inline(always)]
fn gather_whole_pairs<const W: usize>(data: &[bf16], step: usize, out: &mut [f32]) {
    for (q, out) in out.as_chunks_mut::<W>().0.iter_mut().enumerate() {
        let low: &[bf16; W] = data[2 * q * step..].first_chunk().expect("a step holds its lanes");
        let high: &[bf16; W] = data[(2 * q + 1) * step..].first_chunk().expect("a step holds its lanes");
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = pair(*low, *high);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use crate::simd::Float;
    use half::bf16;
    use std::arch::x86_64::*;

    /// Eight consecutive elements, widened.
    ///
    /// # Safety
    /// `p` points to eight readable elements; the machine has AVX2.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load8<T: Float>(p: *const T) -> __m256 {
        // SAFETY: the caller's promise; T is f32 or bf16, told apart by size.
        unsafe {
            if size_of::<T>() == 4 {
                _mm256_loadu_ps(p.cast())
            } else {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
        let lo = |a, b| _mm256_unpacklo_ps(a, b);
        let hi = |a, b| _mm256_unpackhi_ps(a, b);
        let t = [
            lo(r[0], r[1]),
            hi(r[0], r[1]),
            lo(r[2], r[3]),
            hi(r[2], r[3]),
            lo(r[4], r[5]),
            hi(r[4], r[5]),
            lo(r[6], r[7]),
            hi(r[6], r[7]),
        ];
        let s = [
            _mm256_shuffle_ps::<0x44>(t[0], t[2]),
            _mm256_shuffle_ps::<0xee>(t[0], t[2]),
            _mm256_shuffle_ps::<0x44>(t[1], t[3]),
            _mm256_shuffle_ps::<0xee>(t[1], t[3]),
            _mm256_shuffle_ps::<0x44>(t[4], t[6]),
            _mm256_shuffle_ps::<0xee>(t[4], t[6]),
            _mm256_shuffle_ps::<0x44>(t[5], t[7]),
            _mm256_shuffle_ps::<0xee>(t[5], t[7]),
        ];
        [
            _mm256_permute2f128_ps::<0x20>(s[0], s[4]),
            _mm256_permute2f128_ps::<0x20>(s[1], s[5]),
            _mm256_permute2f128_ps::<0x20>(s[2], s[6]),
            _mm256_permute2f128_ps::<0x20>(s[3], s[7]),
            _mm256_permute2f128_ps::<0x31>(s[0], s[4]),
            _mm256_permute2f128_ps::<0x31>(s[1], s[5]),
            _mm256_permute2f128_ps::<0x31>(s[2], s[6]),
            _mm256_permute2f128_ps::<0x31>(s[3], s[7]),
        ]
    }

    /// Store the first `count` of eight lanes.
    ///
    /// # Safety
    /// `p` has room for `count` floats.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store_lanes(p: *mut f32, v: __m256, count: usize) {
        // SAFETY: each arm writes at most `count` floats.
        unsafe {
            match count {
                8 => _mm256_storeu_ps(p, v),
                6 => {
                    // Masked stores are slow on Zen; the common 6 is a quad and a pair.
                    _mm_storeu_ps(p, _mm256_castps256_ps128(v));
                    _mm_storel_pd(p.add(4).cast(), _mm_castps_pd(_mm256_extractf128_ps::<1>(v)));
                }
                _ => {
                    let mut lanes = [0f32; 8];
                    _mm256_storeu_ps(lanes.as_mut_ptr(), v);
                    std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, count);
                }
            }
        }
    }

    /// # Safety
    /// The machine has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose<T: Float>(
        data: &[T],
        lane: usize,
        (lanes, width): (usize, usize),
        kc: usize,
        out: &mut [f32],
    ) {
        assert!(lanes <= width && out.len() >= kc * width);
        assert!(lanes == 0 || (lanes - 1) * lane + kc <= data.len());
        for i0 in (0..width).step_by(8) {
            let count = (width - i0).min(8);
            let mut k = 0;
            while k + 8 <= kc {
                let mut rows = [_mm256_setzero_ps(); 8];
                for (r, row) in rows.iter_mut().enumerate().take(lanes.saturating_sub(i0).min(8)) {
                    // SAFETY: lane i0+r < lanes, and k..k+8 <= kc: inside `data`, asserted above.
                    *row = unsafe { load8(data.as_ptr().add((i0 + r) * lane + k)) };
                }
                for (step, v) in transpose8(rows).into_iter().enumerate() {
                    // SAFETY: step k+step < kc, lanes i0..i0+count <= width: inside `out`.
                    unsafe { store_lanes(out.as_mut_ptr().add((k + step) * width + i0), v, count) };
                }
                k += 8;
            }
            for k in k..kc {
                for i in i0..i0 + count {
                    out[k * width + i] = if i < lanes { data[i * lane + k].to_f32() } else { 0.0 };
                }
            }
        }
    }

    /// As `transpose` for 32-bit pairs of bf16: `steps` pairs a lane.
    ///
    /// # Safety
    /// The machine has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose_pairs(
        data: &[bf16],
        lane: usize,
        (lanes, width): (usize, usize),
        steps: usize,
        out: &mut [f32],
    ) {
        assert!(lanes <= width && out.len() >= steps * width);
        assert!(lanes == 0 || (lanes - 1) * lane + 2 * steps <= data.len());
        for i0 in (0..width).step_by(8) {
            let count = (width - i0).min(8);
            let mut q = 0;
            while q < steps {
                let valid = (steps - q).min(8);
                let mut rows = [_mm256_setzero_ps(); 8];
                for (r, row) in rows.iter_mut().enumerate().take(lanes.saturating_sub(i0).min(8)) {
                    // SAFETY: 2*valid bf16 from pair q of lane i0+r lie inside `data`.
                    unsafe {
                        let from = data.as_ptr().add((i0 + r) * lane + 2 * q).cast::<f32>();
                        if valid == 8 {
                            *row = _mm256_loadu_ps(from);
                        } else {
                            let mut words = [0f32; 8];
                            std::ptr::copy_nonoverlapping(
                                from.cast::<u8>(),
                                words.as_mut_ptr().cast(),
                                4 * valid,
                            );
                            *row = _mm256_loadu_ps(words.as_ptr());
                        }
                    }
                }
                for (step, v) in transpose8(rows).into_iter().enumerate().take(valid) {
                    // SAFETY: step q+step < steps, lanes i0..i0+count <= width: inside `out`.
                    unsafe { store_lanes(out.as_mut_ptr().add((q + step) * width + i0), v, count) };
                }
                q += 8;
            }
        }
    }
}
