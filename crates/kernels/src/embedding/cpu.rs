use super::ELSEWHERE;
use crate::rows::{rows_per_task, scratch};
use crate::simd::{Float, Open};
use device::{DType, View, ViewMut};

/// Table rows a task owns.
const ROWS: usize = 512;

pub(super) fn forward(ids: &[u32], table: View<'_>, d: usize, out: ViewMut<'_>, accumulate: bool) {
    let rows = rows_per_task(d);
    by_dtype!(table, T => {
        let table = T::open(table);
        device::for_each_part((T::open_mut(out), rows * d), (&mut [] as &mut [u8], 0), |i, out, _| {
            for (r, out) in out.chunks_exact_mut(d).enumerate() {
                let id = ids[i * rows + r];
                if id == ELSEWHERE {
                    if !accumulate {
                        out.fill(T::from_f32(0.0));
                    }
                    continue;
                }
                let row = &table[id as usize * d..][..d];
                match accumulate {
                    false => out.copy_from_slice(row),
                    true => add(row, out),
                }
            }
        });
    });
}

multiversion! {
    fn add<T: Float>(row: &[T], out: &mut [T]) {
        for (out, x) in out.iter_mut().zip(row) {
            *out = T::from_f32(out.to_f32() + x.to_f32());
        }
    }
}

multiversion! {
    fn add_grad<T: Float>(row: &[T], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(row) {
            *out += x.to_f32();
        }
    }
}

pub(super) fn backward(ids: &[u32], dout: View<'_>, d: usize, dtable: ViewMut<'_>) {
    // Tokens ordered by id (and by place among equals): each task owns a run of table rows, so
    // no two write one row, and a row's sum has one order.
    let mut order = scratch(DType::U32, ids.len());
    let order = order.view_mut(DType::U32, 0, ids.len()).u32();
    order.iter_mut().zip(0..).for_each(|(token, i)| *token = i);
    order.sort_unstable_by_key(|token| (ids[*token as usize], *token));
    by_dtype!(dout, T => {
        let dout = T::open(dout);
        device::for_each_part((dtable.f32(), ROWS * d), (&mut [] as &mut [u8], 0), |i, rows, _| {
            let first = i * ROWS;
            let from = order.partition_point(|token| (ids[*token as usize] as usize) < first);
            for token in &order[from..] {
                let (token, row) = (*token as usize, ids[*token as usize] as usize - first);
                if row >= ROWS {
                    break;
                }
                add_grad(&dout[token * d..][..d], &mut rows[row * d..][..d]);
            }
        });
    });
}
