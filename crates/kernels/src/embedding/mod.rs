//! Rows of a table, and the scatter of their gradients.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use device::{Device, View, ViewMut};

/// An id whose row lies in another rank's part of the table: here it is a row of zeros.
pub const ELSEWHERE: u32 = u32::MAX;

/// out [M, D] = (out +) table[ids]; table [V, D], every id below V or `ELSEWHERE`.
pub fn forward(ids: &[u32], table: View<'_>, d: usize, out: ViewMut<'_>, accumulate: bool) {
    check(ids, table.len(), d, out.len());
    match table.device() {
        Device::Cpu => cpu::forward(ids, table, d, out, accumulate),
        Device::Cuda => cuda::forward(ids, table, d, out, accumulate),
    }
}

/// dtable[ids] += dout; dtable [V, D] f32. Equal ids add up in the order of the tokens.
pub fn backward(ids: &[u32], dout: View<'_>, d: usize, dtable: ViewMut<'_>) {
    check(ids, dtable.len(), d, dout.len());
    match dout.device() {
        Device::Cpu => cpu::backward(ids, dout, d, dtable),
        Device::Cuda => cuda::backward(ids, dout, d, dtable),
    }
}

fn check(ids: &[u32], table: usize, d: usize, out: usize) {
    assert_eq!(ids.len() * d, out, "rows");
    let top = ids.iter().copied().filter(|id| *id != ELSEWHERE).max().map_or(0, |id| id as usize + 1);
    assert!(top * d <= table, "{top} rows of a table of {} rows", table / d.max(1));
}
