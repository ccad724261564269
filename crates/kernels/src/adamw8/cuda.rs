use super::{BLOCK, Packed, exponents_len};
use crate::adamw::{Hyper, Master, Step, kind};
use crate::cuda::launch;
use device::View;

/// Threads of a block, whose warps take a run each.
const THREADS: usize = 256;

pub(super) fn update(
    master: Master<'_>,
    grad: View<'_>,
    m: Packed<'_>,
    v: Packed<'_>,
    first: u64,
    hyper: &Hyper,
) {
    launch(&format!("adamw8_{}", kind(&master, grad)))
        .grid(exponents_len(grad.len()).div_ceil(THREADS / 32))
        .threads(THREADS)
        .master(&master)
        .read(grad)
        .write(&m.codes)
        .write(&m.exponents)
        .write(&v.codes)
        .write(&v.exponents)
        .u64(grad.len())
        .u64(hyper.step as usize)
        .u64(first as usize / BLOCK)
        .step(&Step::new(hyper))
        .run();
}
