//! Micro-kernels: one tile of C from one packed panel of A and one of B, all in registers.
//!
//! A panel holds, for each k, `MR` values of A (one per row of the tile); a panel of B holds `NR`
//! values (one per column). In bf16 panels a value is a pair of neighbouring k. For AMX a panel of A
//! holds, for each run of 16 pairs, those of each row side by side: the rows of its tiles.

use device::Isa;

/// Rows and columns of a register tile, whether panels hold pairs of bf16, and the cache blocks
/// that suit it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) isa: Isa,
    pub(crate) mr: usize,
    pub(crate) nr: usize,
    pub(crate) pairs: bool,
    /// Parts a value is split into (AMX): 3 bf16 make an f32, exactly.
    pub(crate) parts: usize,
    /// Values of k a block takes: a panel of A then stays in L1 while those of B pass.
    pub(crate) kc: usize,
    /// Columns whose panels of B, for one block, fill about half of L2.
    pub(crate) strip: usize,
}

/// Pairs of bf16 in a row of an AMX tile: the steps one tile product takes.
pub(crate) const RUN: usize = 16;

/// The largest tile of any kind, for stack scratch at the edges.
const MAX_TILE: usize = 32 * 32;

impl Tile {
    /// The tile for f32 panels on an instruction set.
    pub(crate) const fn f32(isa: Isa) -> Tile {
        match isa {
            // 12 accumulators, 2 of B and 1 broadcast of A: 15 of the 16 ymm registers.
            Isa::Avx2 => Tile { isa, mr: 6, nr: 16, pairs: false, parts: 1, kc: 256, strip: 256 },
            // 28 accumulators, 2 of B, 1 broadcast of A: 31 of the 32 zmm registers.
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
                Tile { isa, mr: 14, nr: 32, pairs: false, parts: 1, kc: 512, strip: 256 }
            }
            Isa::Portable => Tile { isa, mr: 4, nr: 8, pairs: false, parts: 1, kc: 256, strip: 256 },
        }
    }

    /// The tile for two bf16 operands.
    pub(crate) const fn bf16(isa: Isa) -> Tile {
        match isa {
            // Four accumulator tiles, two of A, two of B: all eight.
            Isa::Amx => Tile { isa, mr: 32, nr: 32, pairs: true, parts: 1, kc: 2048, strip: 256 },
            // Twice the values of k in the bytes of the f32 blocks.
            Isa::Avx512Bf16 => Tile { isa, mr: 14, nr: 32, pairs: true, parts: 1, kc: 1024, strip: 256 },
            _ => Tile::f32(isa),
        }
    }

    /// The tile of whole products with an f32 operand. AMX takes each f32 as three bf16 and six of
    /// their nine products; the other three are below the rounding of f32.
    pub(crate) const fn product_f32(isa: Isa) -> Tile {
        match isa {
            Isa::Amx => Tile { isa, mr: 32, nr: 32, pairs: true, parts: 3, kc: 1024, strip: 128 },
            _ => Tile::f32(isa),
        }
    }

    /// Columns of a strip where strips are all there is to share: a worker whose core somebody else
    /// takes for a while is waited for as long as a strip takes. AMX is through with one in no time.
    pub(crate) const fn shared_strip(&self) -> usize {
        if self.runs() { self.strip } else { 4 * self.nr }
    }

    /// Panel steps for `kc` values of k.
    pub(crate) const fn steps(&self, kc: usize) -> usize {
        match (self.pairs, self.runs()) {
            (true, true) => self.parts * kc.div_ceil(2).next_multiple_of(RUN),
            (true, false) => kc.div_ceil(2),
            (false, _) => kc,
        }
    }

    /// Whether panels of A hold runs of `RUN` steps a row, and panels of B whole runs of steps.
    pub(crate) const fn runs(&self) -> bool {
        self.pairs && matches!(self.isa, Isa::Amx)
    }

    /// C [rows <= mr, cols <= nr] (+)= panel A times panel B over `steps`.
    ///
    /// # Safety
    /// `a` holds steps*mr and `b` steps*nr values; `c` is writable over rows x cols with leading
    /// dimension `ldc`; the machine has `self.isa`.
    pub(crate) unsafe fn run(
        &self,
        steps: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        (rows, cols): (usize, usize),
        add: bool,
    ) {
        if rows == self.mr && cols == self.nr {
            // SAFETY: the caller's promise, for a whole tile.
            unsafe { self.whole(steps, a, b, c, ldc, add) };
            return;
        }
        let mut scratch = [0f32; MAX_TILE];
        // SAFETY: the scratch holds a whole tile of any kind; the copy stays in rows x cols.
        unsafe {
            self.whole(steps, a, b, scratch.as_mut_ptr(), self.nr, false);
            for i in 0..rows {
                for j in 0..cols {
                    let out = c.add(i * ldc + j);
                    let sum = scratch[i * self.nr + j];
                    *out = if add { *out + sum } else { sum };
                }
            }
        }
    }

    /// # Safety
    /// As `run`, with rows = mr and cols = nr.
    #[inline]
    unsafe fn whole(&self, steps: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, add: bool) {
        // SAFETY: the caller's promise; `isa` is what the machine has.
        unsafe {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Amx if self.parts == 3 => super::amx::tile_f32(steps, a, b, c, ldc, add),
                #[cfg(target_arch = "x86_64")]
                Isa::Amx if self.pairs => super::amx::tile_bf16(steps, a, b, c, ldc, add),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Bf16 if self.pairs => avx512::tile_bf16(steps, a, b, c, ldc, add),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => avx512::tile_f32(steps, a, b, c, ldc, add),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2::tile_f32(steps, a, b, c, ldc, add),
                _ => portable::tile_f32(steps, a, b, c, ldc, add),
            }
        }
    }
}

mod portable {
    const MR: usize = 4;
    const NR: usize = 8;

    /// # Safety
    /// As `Tile::whole`.
    pub(super) unsafe fn tile_f32(
        steps: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        add: bool,
    ) {
        // SAFETY: the caller promises the sizes of panels and tile.
        unsafe {
            let a = std::slice::from_raw_parts(a, steps * MR);
            let b = std::slice::from_raw_parts(b, steps * NR);
            let mut acc = [[0f32; NR]; MR];
            for (a, b) in a.as_chunks::<MR>().0.iter().zip(b.as_chunks::<NR>().0) {
                for i in 0..MR {
                    for j in 0..NR {
                        acc[i][j] += a[i] * b[j];
                    }
                }
            }
            for (i, row) in acc.iter().enumerate() {
                let out = std::slice::from_raw_parts_mut(c.add(i * ldc), NR);
                for (out, sum) in out.iter_mut().zip(row) {
                    *out = if add { *out + sum } else { *sum };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    const MR: usize = 6;
    const NR: usize = 16;

    /// # Safety
    /// As `Tile::whole`, on a machine with AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn tile_f32(
        steps: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        add: bool,
    ) {
        // SAFETY: every load stays in the panels, every store in the tile, as promised; prefetches
        // may go anywhere.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 2]; MR];
            for i in 0..MR {
                _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * ldc).cast());
                _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * ldc + NR - 1).cast());
            }
            let (mut a, mut b) = (a, b);
            for _ in 0..steps {
                _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(MR * 16).cast());
                let b0 = _mm256_loadu_ps(b);
                let b1 = _mm256_loadu_ps(b.add(8));
                for (i, row) in acc.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*a.add(i));
                    row[0] = _mm256_fmadd_ps(x, b0, row[0]);
                    row[1] = _mm256_fmadd_ps(x, b1, row[1]);
                }
                a = a.add(MR);
                b = b.add(NR);
            }
            for (i, row) in acc.iter().enumerate() {
                for (half, sum) in row.iter().enumerate() {
                    let out = c.add(i * ldc + 8 * half);
                    let sum = if add { _mm256_add_ps(*sum, _mm256_loadu_ps(out)) } else { *sum };
                    _mm256_storeu_ps(out, sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    const MR: usize = 14;
    const NR: usize = 32;

    /// # Safety
    /// As `Tile::whole`, on a machine with AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn tile_f32(
        steps: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        add: bool,
    ) {
        // SAFETY: every load stays in the panels, every store in the tile, as promised.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; MR];
            let (mut a, mut b) = (a, b);
            for _ in 0..steps {
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(NR * 16).cast());
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(NR * 16 + 16).cast());
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for (i, row) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(i));
                    row[0] = _mm512_fmadd_ps(x, b0, row[0]);
                    row[1] = _mm512_fmadd_ps(x, b1, row[1]);
                }
                a = a.add(MR);
                b = b.add(NR);
            }
            store(&acc, c, ldc, add);
        }
    }

    /// # Safety
    /// As `Tile::whole`, on a machine with AVX-512 F and BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn tile_bf16(
        steps: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        add: bool,
    ) {
        // SAFETY: as above; a value is a pair of bf16 in the bits of an f32, never used as one.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; MR];
            let (mut a, mut b) = (a.cast::<i32>(), b.cast::<i32>());
            for _ in 0..steps {
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(NR * 16).cast());
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(NR * 16 + 16).cast());
                let b0: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.cast()));
                let b1: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.add(16).cast()));
                for (i, row) in acc.iter_mut().enumerate() {
                    let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(*a.add(i)));
                    row[0] = _mm512_dpbf16_ps(row[0], x, b0);
                    row[1] = _mm512_dpbf16_ps(row[1], x, b1);
                }
                a = a.add(MR);
                b = b.add(NR);
            }
            store(&acc, c, ldc, add);
        }
    }

    /// # Safety
    /// `c` is writable over a whole tile.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(acc: &[[__m512; 2]; MR], c: *mut f32, ldc: usize, add: bool) {
        for (i, row) in acc.iter().enumerate() {
            for (half, sum) in row.iter().enumerate() {
                // SAFETY: row i, columns 16*half.. lie in the tile.
                unsafe {
                    let out = c.add(i * ldc + 16 * half);
                    let sum = if add { _mm512_add_ps(*sum, _mm512_loadu_ps(out)) } else { *sum };
                    _mm512_storeu_ps(out, sum);
                }
            }
        }
    }
}
