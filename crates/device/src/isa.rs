//! Which instruction set the kernels of this process use: looked up once, at run time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// Instruction sets a CPU kernel may be written for, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Isa {
    /// Plain Rust; runs everywhere, Arm included.
    Portable = 1,
    /// x86-64 with AVX2 and FMA.
    Avx2 = 2,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512 = 3,
    /// AVX-512 with bfloat16 dot products.
    Avx512Bf16 = 4,
    /// The same with AMX: bfloat16 products of whole tiles.
    Amx = 5,
}

/// 0: no choice made, the best detected one is used.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

impl Isa {
    const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    /// The best set this machine has.
    pub fn detected() -> Isa {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(detect)
    }

    /// The set kernels run on: the detected one unless `choose` narrowed it.
    pub fn active() -> Isa {
        Self::from_code(CHOSEN.load(Ordering::Relaxed)).unwrap_or_else(Isa::detected)
    }

    /// Run kernels on `isa` from now on, in the whole process (a recipe line, and tests).
    /// False, and nothing changes, when this machine lacks it.
    pub fn choose(isa: Isa) -> bool {
        let has = isa <= Isa::detected();
        if has {
            CHOSEN.store(isa as u8, Ordering::Relaxed);
        }
        has
    }

    /// Every set this machine can run, slowest first.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| *isa <= Isa::detected()).collect()
    }

    /// Name as users write and read it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Amx => "amx",
        }
    }

    fn from_code(code: u8) -> Option<Isa> {
        Self::ALL.into_iter().find(|isa| *isa as u8 == code)
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("fma") && has!("f16c")) {
        return Isa::Portable;
    }
    if !(has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq")) {
        return Isa::Avx2;
    }
    match has!("avx512bf16") {
        false => Isa::Avx512,
        true if has_amx() && may_use_tiles() => Isa::Amx,
        true => Isa::Avx512Bf16,
    }
}

/// AMX-TILE and AMX-BF16 (CPUID leaf 7, EDX bits 24 and 22).
#[cfg(target_arch = "x86_64")]
fn has_amx() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const NEEDED: u32 = 1 << 24 | 1 << 22;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & NEEDED == NEEDED
}

/// Linux saves tile registers for those only who asked (`arch_prctl(2)`, ARCH_REQ_XCOMP_PERM);
/// asked once, it holds for every thread of the process.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn may_use_tiles() -> bool {
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: changes nothing but what this process may use; an old kernel answers with an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn may_use_tiles() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}
