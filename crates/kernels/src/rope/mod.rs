//! Rotary positions (Su et al. 2021) in the rotate-half convention of Hugging Face: within a head
//! of which the first R values turn (R = H in most models), pair (i, i + R/2) turns by
//! position * theta^(-2i/R).

mod cpu;
mod cuda;
mod table;
#[cfg(test)]
mod tests;

pub use table::{RopeScaling, RopeTable};

use device::{Device, ViewMut};

/// Rotate, in place, the first `heads` heads of width `h` of every row of x [M, ld]; row i stands
/// at `positions[i]`. Values of a head beyond the table's `dim` stay. `inverse` turns back, which is also the gradient.
pub fn apply(
    x: ViewMut<'_>,
    ld: usize,
    heads: usize,
    h: usize,
    positions: &[u32],
    table: &RopeTable,
    inverse: bool,
) {
    assert_eq!(x.len(), ld * positions.len(), "x is [{}, {ld}]", positions.len());
    assert!(heads * h <= ld && table.dim() <= h, "{heads} heads of {h} in rows of {ld}");
    let last = positions.iter().copied().max().unwrap_or(0) as usize;
    assert!(last < table.positions(), "position {last} of a table of {}", table.positions());
    match x.device() {
        Device::Cpu => cpu::apply(x, ld, (heads, h), positions, table, inverse),
        Device::Cuda => cuda::apply(x, ld, (heads, h), positions, table, inverse),
    }
}
