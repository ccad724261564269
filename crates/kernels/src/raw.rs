//! A float matrix many tasks write at once, each its own part: what slices cannot say.

use crate::simd::Float;
use device::SliceMut;
use half::bf16;

/// A float matrix written by many tasks, each its own part.
#[derive(Clone, Copy)]
pub(crate) enum RawFloats {
    F32(*mut f32),
    Bf16(*mut bf16),
}
// SAFETY: tasks write disjoint parts.
unsafe impl Send for RawFloats {}
// SAFETY: as above.
unsafe impl Sync for RawFloats {}

impl RawFloats {
    /// The elements of a writable view, for as long as the caller's borrow of it lasts.
    pub(crate) fn of(view: device::ViewMut<'_>) -> RawFloats {
        match view.floats() {
            SliceMut::F32(data) => RawFloats::F32(data.as_mut_ptr()),
            SliceMut::Bf16(data) => RawFloats::Bf16(data.as_mut_ptr()),
        }
    }

    /// # Safety
    /// Elements `[start, start + out.len())` are inside and not written meanwhile.
    pub(crate) unsafe fn read(self, start: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                RawFloats::F32(p) => widen(std::slice::from_raw_parts(p.add(start), out.len()), out),
                RawFloats::Bf16(p) => widen(std::slice::from_raw_parts(p.add(start), out.len()), out),
            }
        }
    }

    /// # Safety
    /// Elements `[start, start + values.len())` are inside and ours.
    pub(crate) unsafe fn write(self, start: usize, values: &[f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                RawFloats::F32(p) => {
                    narrow(values, std::slice::from_raw_parts_mut(p.add(start), values.len()))
                }
                RawFloats::Bf16(p) => {
                    narrow(values, std::slice::from_raw_parts_mut(p.add(start), values.len()))
                }
            }
        }
    }
}

impl RawFloats {
    /// Add, in f32, to what is there.
    ///
    /// # Safety
    /// Elements `[start, start + values.len())` are inside and ours.
    pub(crate) unsafe fn add(self, start: usize, values: &[f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                RawFloats::F32(p) => join(values, std::slice::from_raw_parts_mut(p.add(start), values.len())),
                RawFloats::Bf16(p) => {
                    join(values, std::slice::from_raw_parts_mut(p.add(start), values.len()))
                }
            }
        }
    }
}

multiversion! {
    fn join<T: Float>(from: &[f32], out: &mut [T]) {
        for (out, x) in out.iter_mut().zip(from) {
            *out = T::from_f32(out.to_f32() + *x);
        }
    }
}

multiversion! {
    fn widen<T: Float>(from: &[T], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(from) {
            *out = x.to_f32();
        }
    }
}

multiversion! {
    fn narrow<T: Float>(from: &[f32], out: &mut [T]) {
        for (out, x) in out.iter_mut().zip(from) {
            *out = T::from_f32(*x);
        }
    }
}
