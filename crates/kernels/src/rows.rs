//! Loops over rows: how many a task takes, scratch, arrays that several outputs are cut from, and
//! sums over rows with the same bits whatever the number of threads.

use device::{Buffer, DType, Device, Slice, View};
use std::marker::PhantomData;
use std::ops::{Deref, Range};

/// Rows a task takes: about 64 Ki elements, so that a task outweighs its start; a function of the
/// width alone.
pub(crate) fn rows_per_task(width: usize) -> usize {
    ((1 << 16) / width.max(1)).max(1)
}

/// Rows a task sums before its partial sums are folded; at most 64 tasks, so that partial sums
/// stay small beside what they sum.
fn rows_per_partial(rows: usize, width: usize) -> usize {
    rows_per_task(width).max(rows.div_ceil(64))
}

/// Scratch of `len` elements, unspecified contents, from the cache of freed buffers.
pub(crate) fn scratch(dtype: DType, len: usize) -> Buffer {
    match Buffer::new(Device::Cpu, len * dtype.size_bytes()) {
        Ok(buffer) => buffer,
        // A row op has no way to fail; the system is out of memory for a few rows.
        Err(error) => panic!("{error}"),
    }
}

/// A small vector (norm weights, biases) in f32, converted only where it is not.
pub(crate) enum Widened<'a> {
    Borrowed(&'a [f32]),
    Converted(Buffer, usize),
}

impl<'a> Widened<'a> {
    pub(crate) fn new(view: View<'a>) -> Widened<'a> {
        match view.floats() {
            Slice::F32(data) => Widened::Borrowed(data),
            Slice::Bf16(data) => {
                let mut buffer = scratch(DType::F32, data.len());
                let wide = buffer.view_mut(DType::F32, 0, data.len()).f32();
                wide.iter_mut().zip(data).for_each(|(wide, x)| *wide = x.to_f32());
                Widened::Converted(buffer, data.len())
            }
        }
    }
}

impl Deref for Widened<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Widened::Borrowed(data) => data,
            Widened::Converted(buffer, len) => buffer.view(DType::F32, 0, *len).f32(),
        }
    }
}

/// An array that tasks take parts of, for ops with more outputs than `device::for_each_part` cuts.
pub(crate) struct Parts<'a, T> {
    ptr: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts, whose users promise to keep them disjoint.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Parts<'a, T> {
        Parts { ptr: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }

    /// # Safety
    /// No two parts alive at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: in bounds (checked); exclusive by the caller's promise and our borrow.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

/// `body(first row, rows of out, sums)` for runs of rows of out [_, d], in parallel; `sums`, zeros
/// at first, are then added in the order of the rows to `totals`, which follow each other in it.
pub(crate) fn with_sums<T: Send, const N: usize>(
    (out, d): (&mut [T], usize),
    totals: [&mut [f32]; N],
    body: impl Fn(usize, &mut [T], &mut [f32]) + Sync + Send,
) {
    let rows = out.len() / d.max(1);
    let width = totals.iter().map(|total| total.len()).sum::<usize>();
    let chunk = rows_per_partial(rows, d);
    let len = rows.div_ceil(chunk) * width;
    let mut buffer = scratch(DType::F32, len);
    let partial = buffer.view_mut(DType::F32, 0, len).f32();
    device::for_each_part((out, chunk * d), (&mut *partial, width), |i, out, sums| {
        sums.fill(0.0);
        body(i * chunk, out, sums);
    });
    add_partials(partial, totals);
}

/// The same for an op without an output row by row: `body(rows, sums)`.
pub(crate) fn sum_rows(
    rows: usize,
    total: &mut [f32],
    body: impl Fn(Range<usize>, &mut [f32]) + Sync + Send,
) {
    let width = total.len();
    let chunk = rows_per_partial(rows, width);
    let len = rows.div_ceil(chunk) * width;
    let mut buffer = scratch(DType::F32, len);
    let partial = buffer.view_mut(DType::F32, 0, len).f32();
    device::for_each_part((&mut *partial, width), (&mut [] as &mut [u8], 0), |i, sums, _| {
        sums.fill(0.0);
        body(i * chunk..((i + 1) * chunk).min(rows), sums);
    });
    add_partials(partial, [total]);
}

fn add_partials<const N: usize>(partial: &[f32], totals: [&mut [f32]; N]) {
    let width = totals.iter().map(|total| total.len()).sum::<usize>().max(1);
    let mut first = 0;
    for total in totals {
        for sums in partial.chunks_exact(width) {
            let sums = &sums[first..][..total.len()];
            total.iter_mut().zip(sums).for_each(|(total, x)| *total += x);
        }
        first += total.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_added_to_their_totals_in_the_order_of_the_rows() {
        let (rows, d) = (700, 1000);
        let mut out = vec![0u32; rows * d];
        let (mut count, mut both) = (vec![1f32; 1], vec![0f32; 2]);
        with_sums((&mut out, d), [&mut count, &mut both], |first, out, sums| {
            for (r, row) in out.chunks_exact_mut(d).enumerate() {
                row.fill((first + r) as u32);
                sums[0] += 1.0;
                sums[1] += (first + r) as f32;
                sums[2] -= 1.0;
            }
        });
        assert!(out.chunks(d).enumerate().all(|(r, row)| row.iter().all(|x| *x == r as u32)));
        assert_eq!((count[0], both[0], both[1]), (701.0, 244_650.0, -700.0));
    }

    #[test]
    fn no_rows_add_nothing() {
        let mut total = vec![2f32; 3];
        sum_rows(0, &mut total, |_, _| unreachable!());
        with_sums((&mut [] as &mut [f32], 3), [&mut total], |_, _, _| unreachable!());
        assert_eq!(total, [2.0; 3]);
    }
}
