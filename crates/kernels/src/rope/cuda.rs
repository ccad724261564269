use super::RopeTable;
use crate::cuda::runs::run_of;
use crate::cuda::{launch, suffix};
use device::ViewMut;

pub(super) fn apply(
    x: ViewMut<'_>,
    ld: usize,
    (heads, h): (usize, usize),
    positions: &[u32],
    table: &RopeTable,
    inverse: bool,
) {
    let half = table.dim() / 2;
    if half == 0 || heads == 0 {
        return;
    }
    let (cos, sin) = table.on_gpu();
    let runs = heads * half.div_ceil(run_of(&[x.dtype()]));
    launch(&format!("rope_apply_{}", suffix(x.dtype())))
        .grid(positions.len())
        .threads(runs.next_multiple_of(32).min(256))
        .write(&x)
        .ids(positions)
        .read(cos)
        .read(sin)
        .u32(ld)
        .u32(heads)
        .u32(h)
        .u32(half)
        .f32(if inverse { -1.0 } else { 1.0 })
        .run();
}
