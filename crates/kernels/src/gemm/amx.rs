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

/// Sums [32, 32] into tile registers 0 to 3, or zeros.
///
/// # Safety
/// `c` is readable over a whole tile; the machine has AMX.
#[inline]
unsafe fn begin(c: *mut f32, ldc: usize, add: bool) {
    shape_tiles();
    let (row, below) = (4 * ldc, c.wrapping_add(16 * ldc));
    // SAFETY: the caller's promise.
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
    // SAFETY: panels hold 2 KiB a run each, C a whole tile, as promised.
    unsafe {
        begin(c, ldc, add);
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
    macro_rules! load_a {
        ($part:literal) => {
            concat!(
                "tileloadd tmm4, [{a} + {narrow} + 2048*",
                $part,
                "]\n",
                "tileloadd tmm5, [{a} + {narrow} + 2048*",
                $part,
                " + 1024]",
            )
        };
    }
    macro_rules! load_b {
        ($part:literal) => {
            concat!(
                "tileloadd tmm6, [{b} + {wide} + 2048*",
                $part,
                "]\n",
                "tileloadd tmm7, [{b} + {wide} + 2048*",
                $part,
                " + 64]",
            )
        };
    }
    macro_rules! multiply {
        () => {
            "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7"
        };
    }
    // SAFETY: panels hold 6 KiB a run each, C a whole tile, as promised.
    unsafe {
        begin(c, ldc, add);
        asm!(
            "2:",
            load_a!("0"), load_b!("2"), multiply!(),
            load_b!("1"), multiply!(),
            load_b!("0"), multiply!(),
            load_a!("1"), multiply!(),
            load_b!("1"), multiply!(),
            load_a!("2"), load_b!("0"), multiply!(),
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
