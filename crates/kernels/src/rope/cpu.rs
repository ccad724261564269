use super::RopeTable;
use crate::simd::{Float, Open, rows_per_task};
use device::ViewMut;

pub(super) fn apply(
    x: ViewMut<'_>,
    ld: usize,
    heads: usize,
    positions: &[u32],
    table: &RopeTable,
    inverse: bool,
) {
    let rows = rows_per_task(ld);
    by_dtype!(x, T => {
        device::for_each_part((T::open_mut(x), rows * ld), (&mut [] as &mut [u8], 0), |i, x, _| {
            for (r, x) in x.chunks_exact_mut(ld).enumerate() {
                let (cos, sin) = table.at(positions[i * rows + r] as usize);
                turn(&mut x[..heads * table.dim()], cos, sin, if inverse { -1.0 } else { 1.0 });
            }
        });
    });
}

multiversion! {
    fn turn<T: Float>(x: &mut [T], cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        let sin = &sin[..half];
        for head in x.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            let b = &mut b[..half];
            for j in 0..half {
                let (p, q) = (a[j].to_f32(), b[j].to_f32());
                let (c, s) = (cos[j], sin[j] * sign);
                a[j] = T::from_f32(p * c - q * s);
                b[j] = T::from_f32(q * c + p * s);
            }
        }
    }
}
