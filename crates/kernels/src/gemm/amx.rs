//! The register tile of AMX: 32 x 32 sums in four tile registers, two tiles of A, two of B. Each
//! tile product takes a run of 16 pairs of bf16; sums are f32, rounded to nearest even, denormals
//! count as zero.
//!
//! Tile instructions have no stable intrinsics, so they are written as assembly. The compiler never
//! uses tile registers by itself: their shape, once loaded, stays with the thread.

use super::micro::RUN;
use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
use std::cell::Cell;

/// Palette 1: eight tiles of 16 rows of 64 bytes. (Intel SDM, LDTILECFG.)
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPE: Shape = Shape {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

thread_local! {
    static SHAPED: Cell<bool> = const { Cell::new(false) };
}

/// Shape this thread's tile registers, once.
#[inline]
fn shape_tiles() {
    if !SHAPED.get() {
        // SAFETY: `Isa::Amx` is chosen only after the kernel allowed tiles; the shape is valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPE, options(nostack, preserves_flags, readonly)) };
        SHAPED.set(true);
    }
}

/// Sums [32, 32] into tile registers 0 to 3, or zeros.
///
/// # Safety
/// `c` is readable over a whole tile; the machine has AMX.
#[inline]
unsafe fn begin(c: *mut f32, ldc: usize, add: bool) {
    shape_tiles();
    let (row, below) = (4 * ldc, c.wrapping_add(16 * ldc));
    // SAFETY: the caller's promise; prefetches may go anywhere.
    unsafe {
        for i in 0..if add { 0 } else { 32 } {
            _mm_prefetch::<_MM_HINT_ET0>(c.wrapping_add(i * ldc).cast());
            _mm_prefetch::<_MM_HINT_ET0>(c.wrapping_add(i * ldc + 16).cast());
        }
        if add {
            asm!(
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 64]",
                "tileloadd tmm2, [{below} + {row}]",
                "tileloadd tmm3, [{below} + {row} + 64]",
                c = in(reg) c, below = in(reg) below, row = in(reg) row,
                options(nostack, preserves_flags, readonly),
            );
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, preserves_flags, nomem),
            );
        }
    }
}

/// Tile registers 0 to 3 into C [32, 32].
///
/// # Safety
/// `c` is writable over a whole tile; the machine has AMX.
#[inline]
unsafe fn end(c: *mut f32, ldc: usize) {
    let (row, below) = (4 * ldc, c.wrapping_add(16 * ldc));
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{c} + {row}], tmm0",
            "tilestored [{c} + {row} + 64], tmm1",
            "tilestored [{below} + {row}], tmm2",
            "tilestored [{below} + {row} + 64], tmm3",
            c = in(reg) c, below = in(reg) below, row = in(reg) row,
            options(nostack, preserves_flags),
        );
    }
}

/// Eight lines of a panel into L1, from line `$first` of the next run on. Panels stream from L2, and
/// tile loads wait for every line that is not in L1: asking a run ahead made products 2.9 times as
/// fast (measured on one core of a Xeon with AMX, panels of 64 KiB to 1 MiB).
#[rustfmt::skip]
macro_rules! ask {
    ($panel:literal, $run:literal, $first:literal) => {
        concat!(
            ask!($panel, $run, $first, 0), ask!($panel, $run, $first, 1),
            ask!($panel, $run, $first, 2), ask!($panel, $run, $first, 3),
            ask!($panel, $run, $first, 4), ask!($panel, $run, $first, 5),
            ask!($panel, $run, $first, 6), ask!($panel, $run, $first, 7),
        )
    };
    ($panel:literal, $run:literal, $first:literal, $line:literal) => {
        concat!("prefetcht0 [{", $panel, "} + ", $run, " + 64*(", $first, "+", $line, ")]\n")
    };
}

/// C [32, 32] (+)= A B over `steps` pairs, a multiple of 16.
///
/// # Safety
/// As `Tile::whole`, on a machine with AMX.
pub(super) unsafe fn tile_bf16(
    steps: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    // SAFETY: panels hold 2 KiB a run each, C a whole tile, as promised; prefetches may go anywhere.
    unsafe {
        begin(c, ldc, add);
        asm!(
            "2:",
            ask!("b", 2048, 0),
            "tileloadd tmm6, [{b} + {wide}]",
            ask!("b", 2048, 8),
            "tileloadd tmm4, [{a} + {narrow}]",
            ask!("b", 2048, 16),
            "tileloadd tmm7, [{b} + {wide} + 64]",
            ask!("b", 2048, 24),
            "tdpbf16ps tmm0, tmm4, tmm6",
            ask!("a", 2048, 0),
            "tileloadd tmm5, [{a} + {narrow} + 1024]",
            ask!("a", 2048, 8),
            "tdpbf16ps tmm1, tmm4, tmm7",
            ask!("a", 2048, 16),
            "tdpbf16ps tmm2, tmm5, tmm6",
            ask!("a", 2048, 24),
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {runs}",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "jnz 2b",
            a = inout(reg) a => _,
            b = inout(reg) b => _,
            runs = inout(reg) steps / RUN => _,
            narrow = in(reg) 64usize,
            wide = in(reg) 128usize,
            options(nostack, readonly),
        );
        end(c, ldc);
    }
}

/// Part `$part` of A, or of B, into tile registers, and the four products of what is loaded.
macro_rules! part {
    (a $part:literal) => {
        concat!(
            "tileloadd tmm4, [{a} + {narrow} + 2048*",
            $part,
            "]\n",
            "tileloadd tmm5, [{a} + {narrow} + 2048*",
            $part,
            " + 1024]",
        )
    };
    (b $part:literal) => {
        concat!(
            "tileloadd tmm6, [{b} + {wide} + 2048*",
            $part,
            "]\n",
            "tileloadd tmm7, [{b} + {wide} + 2048*",
            $part,
            " + 64]",
        )
    };
    (multiply) => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\n\
         tdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// The same for values in three parts: six products a run, those of parts (i, j) with i + j < 3.
/// What is left out is below 2^-24 of |a| |b|.
///
/// # Safety
/// As `Tile::whole`, on a machine with AMX.
pub(super) unsafe fn tile_f32(
    steps: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    // SAFETY: panels hold 6 KiB a run each, C a whole tile, as promised; prefetches may go anywhere.
    unsafe {
        begin(c, ldc, add);
        #[rustfmt::skip]
        asm!(
            "2:",
            part!(a 0), ask!("b", 6144, 0), part!(b 2), ask!("b", 6144, 8), part!(multiply),
            ask!("b", 6144, 16), part!(b 1), ask!("b", 6144, 24), part!(multiply),
            ask!("b", 6144, 32), part!(b 0), ask!("b", 6144, 40), part!(multiply),
            ask!("b", 6144, 48), part!(a 1), ask!("b", 6144, 56), part!(multiply),
            ask!("b", 6144, 64), part!(b 1), ask!("b", 6144, 72), part!(multiply),
            ask!("b", 6144, 80), part!(a 2), part!(b 0), ask!("b", 6144, 88), part!(multiply),
            ask!("a", 6144, 0), ask!("a", 6144, 8), ask!("a", 6144, 16), ask!("a", 6144, 24),
            ask!("a", 6144, 32), ask!("a", 6144, 40), ask!("a", 6144, 48), ask!("a", 6144, 56),
            ask!("a", 6144, 64), ask!("a", 6144, 72), ask!("a", 6144, 80), ask!("a", 6144, 88),
            "add {a}, 6144",
            "add {b}, 6144",
            "dec {runs}",
            "jnz 2b",
            a = inout(reg) a => _,
            b = inout(reg) b => _,
            runs = inout(reg) steps / (3 * RUN) => _,
            narrow = in(reg) 64usize,
            wide = in(reg) 128usize,
            options(nostack, readonly),
        );
        end(c, ldc);
    }
}
