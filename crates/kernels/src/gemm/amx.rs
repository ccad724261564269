//! The register tile of AMX: 32 x 32 sums in four tile registers, two tiles of A, two of B. Each
//! tile product takes a run of 16 pairs of bf16; sums are f32, rounded to nearest even, denormals
//! count as zero.
//!
//! Tile instructions have no stable intrinsics, so they are written as assembly. The compiler never
//! uses tile registers by itself: their shape, once loaded, stays with the thread.

use super::micro::RUN;
use std::arch::asm;
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
    shape_tiles();
    let (row, below) = (4 * ldc, c.wrapping_add(16 * ldc));
    // SAFETY: panels hold runs x 2 KiB each, C a whole tile, as promised.
    unsafe {
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
        asm!(
            "2:",
            "tileloadd tmm6, [{b} + {wide}]",
            "tileloadd tmm4, [{a} + {narrow}]",
            "tileloadd tmm7, [{b} + {wide} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a} + {narrow} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a}, 2048",
            "add {b}, 2048",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "dec {runs}",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "jnz 2b",
            "tilestored [{c} + {row}], tmm0",
            "tilestored [{c} + {row} + 64], tmm1",
            "tilestored [{below} + {row}], tmm2",
            "tilestored [{below} + {row} + 64], tmm3",
            a = inout(reg) a => _,
            b = inout(reg) b => _,
            runs = inout(reg) steps / RUN => _,
            narrow = in(reg) 64usize,
            wide = in(reg) 128usize,
            c = in(reg) c,
            below = in(reg) below,
            row = in(reg) row,
            options(nostack),
        );
    }
}

/// FLOPs of a loop of tile products from registers to registers.
pub(crate) fn peak() -> f64 {
    const ROUNDS: usize = 60_000;
    shape_tiles();
    // SAFETY: registers only; every tile is set before it is read.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) ROUNDS => _,
            options(nostack, nomem),
        );
    }
    (ROUNDS * 4 * 2 * 16 * 16 * 32) as f64
}
