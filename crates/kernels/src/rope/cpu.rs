use super::RopeTable;
use crate::rows::rows_per_task;
use crate::simd::{Float, Open};
use device::ViewMut;

pub(super) fn apply(
    x: ViewMut<'_>,
    ld: usize,
    (heads, h): (usize, usize),
    positions: &[u32],
    table: &RopeTable,
    inverse: bool,
) {
    let rows = rows_per_task(ld);
    let sign = if inverse { -1.0 } else { 1.0 };
    by_dtype!(x, T => {
        device::for_each_part((T::open_mut(x), rows * ld), (&mut [] as &mut [u8], 0), |i, x, _| {
            turn(x, ld, (heads, h), &positions[i * rows..], table, sign);
        });
    });
}

multiversion! {
    fn turn<T: Float>(
        x: &mut [T], ld: usize, shape: (usize, usize), positions: &[u32], table: &RopeTable, sign: f32,
    ) {
        let (heads, h) = shape;
        for (x, position) in x.chunks_exact_mut(ld).zip(positions) {
            let (cos, sin) = table.at(*position as usize);
            for head in x[..heads * h].chunks_exact_mut(h) {
                let (a, rest) = head.split_at_mut(cos.len());
                for (((a, b), cos), sin) in a.iter_mut().zip(rest).zip(cos).zip(sin) {
                    let (p, q, sin) = (a.to_f32(), b.to_f32(), sin * sign);
                    *a = T::from_f32(p * cos - q * sin);
                    *b = T::from_f32(q * cos + p * sin);
                }
            }
        }
    }
}
