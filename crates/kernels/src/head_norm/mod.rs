//! RMSNorm over each head of q and k inside a packed q|k|v matrix, as Qwen3 does; v is copied.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use device::{Device, View, ViewMut};

/// Query heads N, key heads K, head dim H of a packed matrix [M, (N + 2K) H].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n: usize,
    /// Key and value heads.
    pub k: usize,
    /// Head dim.
    pub h: usize,
}

impl Heads {
    fn width(&self) -> usize {
        (self.n + 2 * self.k) * self.h
    }
}

/// qkv [M, (N+2K)H], wq and wk [H] -> out like qkv, inv_rms [M, N+K] f32.
pub fn forward(
    qkv: View<'_>,
    wq: View<'_>,
    wk: View<'_>,
    heads: Heads,
    eps: f32,
    out: ViewMut<'_>,
    inv_rms: ViewMut<'_>,
) {
    assert!(qkv.len() == out.len() && wq.len() == heads.h && wk.len() == heads.h);
    assert_eq!(inv_rms.len() * heads.width(), qkv.len() * (heads.n + heads.k), "inv_rms");
    match qkv.device() {
        Device::Cpu => cpu::forward(qkv, (wq, wk), heads, eps, out, inv_rms),
        Device::Cuda => cuda::forward(qkv, (wq, wk), heads, eps, out, inv_rms),
    }
}

/// dqkv like qkv; dwq and dwk [H] f32 are added to.
pub fn backward(
    qkv: View<'_>,
    wq: View<'_>,
    wk: View<'_>,
    inv_rms: View<'_>,
    heads: Heads,
    dout: View<'_>,
    dqkv: ViewMut<'_>,
    dwq: ViewMut<'_>,
    dwk: ViewMut<'_>,
) {
    assert!(qkv.len() == dout.len() && qkv.len() == dqkv.len(), "gradients");
    assert!(dwq.len() == heads.h && dwk.len() == heads.h, "weight gradients");
    match qkv.device() {
        Device::Cpu => cpu::backward(qkv, (wq, wk), inv_rms, heads, dout, dqkv, (dwq, dwk)),
        Device::Cuda => cuda::backward(qkv, (wq, wk), inv_rms, heads, dout, dqkv, (dwq, dwk)),
    }
}
