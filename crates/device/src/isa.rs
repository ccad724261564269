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
}

/// 0: no choice made, the best detected one is used.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

impl Isa {
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
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16]
            .into_iter()
            .filter(|isa| *isa <= Isa::detected())
            .collect()
    }

    /// Name as users write and read it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
        }
    }

    fn from_code(code: u8) -> Option<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().find(|isa| *isa as u8 == code)
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
    if has!("avx512bf16") { Isa::Avx512Bf16 } else { Isa::Avx512 }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}
