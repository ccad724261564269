//! What the machine could do at most: FMAs from registers to registers on every worker. Products
//! are measured against it, and so is a training step's utilisation.

use device::Isa;
use std::hint::black_box;
use std::time::Instant;

/// f32 GFLOP/s of the pool the caller runs in, best of several short runs.
pub fn gflops_f32() -> f64 {
    best(|| run(Isa::active(), false))
}

/// bf16 GFLOP/s (f32 accumulation) of the pool the caller runs in; the f32 figure where the
/// machine has no bf16 instructions.
pub fn gflops_bf16() -> f64 {
    match Isa::active() {
        isa @ (Isa::Avx512Bf16 | Isa::Amx) => best(|| run(isa, true)),
        _ => gflops_f32(),
    }
}

/// Loop length: about 5 ms a worker.
const ROUNDS: usize = 1_000_000;

fn best(run: impl Fn() -> f64 + Sync) -> f64 {
    (0..8)
        .map(|_| {
            let flops = std::sync::Mutex::new(0.0);
            let workers = device::num_threads();
            let start = Instant::now();
            device::for_each_index(workers, |_| {
                let done = run();
                *flops.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) += done;
            });
            let seconds = start.elapsed().as_secs_f64();
            flops.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) / seconds / 1e9
        })
        .fold(0.0, f64::max)
}

/// Returns the FLOPs done.
fn run(isa: Isa, bf16: bool) -> f64 {
    match isa {
        // SAFETY: `active` and `available` never exceed what the machine was found to have.
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if bf16 => crate::gemm::amx::peak(),
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 if bf16 => unsafe { x86::bf16() },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { x86::avx512() },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::avx2() },
        _ => {
            let _ = bf16;
            let mut acc = [1f32; 32];
            let (x, y) = (black_box(0.999f32), black_box(1e-9f32));
            for _ in 0..ROUNDS {
                acc.iter_mut().for_each(|a| *a = *a * x + y);
            }
            black_box(acc);
            (ROUNDS * 32 * 2) as f64
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::ROUNDS;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2() -> f64 {
        let mut acc = [_mm256_set1_ps(1.0); 12];
        let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-9)));
        for _ in 0..ROUNDS {
            for a in acc.iter_mut() {
                *a = _mm256_fmadd_ps(*a, x, y);
            }
        }
        black_box(acc);
        (ROUNDS * 12 * 8 * 2) as f64
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512() -> f64 {
        let mut acc = [_mm512_set1_ps(1.0); 12];
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-9)));
        for _ in 0..ROUNDS {
            for a in acc.iter_mut() {
                *a = _mm512_fmadd_ps(*a, x, y);
            }
        }
        black_box(acc);
        (ROUNDS * 12 * 16 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16() -> f64 {
        let mut acc = [_mm512_set1_ps(1.0); 12];
        let bits = black_box(0x3000_3000);
        // SAFETY: both are 512 bits of plain data.
        let x: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(bits)) };
        for _ in 0..ROUNDS {
            for a in acc.iter_mut() {
                *a = _mm512_dpbf16_ps(*a, x, x);
            }
        }
        black_box(acc);
        (ROUNDS * 12 * 32 * 2) as f64
    }
}
