//! SwiGLU: silu(gate) * up (Shazeer 2020), gate and up side by side in one matrix.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use device::{Device, View, ViewMut};

/// gate_up [M, 2F] (gate first) -> out [M, F].
pub fn forward(gate_up: View<'_>, f: usize, out: ViewMut<'_>) {
    assert_eq!(gate_up.len(), 2 * out.len(), "out");
    match gate_up.device() {
        Device::Cpu => cpu::forward(gate_up, f, out),
        Device::Cuda => cuda::forward(gate_up, f, out),
    }
}

/// dgate_up [M, 2F] from dout [M, F]. `act` [M, F], when asked for, becomes the forward output
/// again, so that it need not be kept between the passes.
pub fn backward(
    gate_up: View<'_>,
    f: usize,
    dout: View<'_>,
    dgate_up: ViewMut<'_>,
    act: Option<ViewMut<'_>>,
) {
    assert!(gate_up.len() == 2 * dout.len() && gate_up.len() == dgate_up.len(), "gradients");
    match gate_up.device() {
        Device::Cpu => cpu::backward(gate_up, f, dout, dgate_up, act),
        Device::Cuda => cuda::backward(gate_up, f, dout, dgate_up, act),
    }
}
