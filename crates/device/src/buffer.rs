//! Bytes on a device. Shared by `Arc`; written only by whoever holds the last handle.

use crate::memory::{give, take};
use crate::{DType, Device, View, ViewMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// The system would not give `bytes` on `device`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot allocate {bytes} bytes on {device}; use a smaller model, batch or sequence")]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub bytes: usize,
    /// Where.
    pub device: Device,
}

/// A block of bytes on a device, page-aligned. Cloning shares it.
#[derive(Clone)]
pub struct Buffer {
    block: Arc<Block>,
}

struct Block {
    device: Device,
    ptr: NonNull<u8>,
    bytes: usize,
    /// Of the whole block, which may be larger than what was asked for.
    held_bytes: usize,
}

// SAFETY: the block is plain bytes; access is governed by the borrows of `Buffer`.
unsafe impl Send for Block {}
// SAFETY: shared handles only read.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        give(self.device, self.ptr, self.held_bytes);
    }
}

impl Buffer {
    /// `bytes` of unspecified contents (an earlier buffer's bytes, or zeros).
    pub fn new(device: Device, bytes: usize) -> Result<Buffer, OutOfMemory> {
        let (ptr, held_bytes) = take(device, bytes).ok_or(OutOfMemory { bytes, device })?;
        Ok(Buffer { block: Arc::new(Block { device, ptr, bytes, held_bytes }) })
    }

    /// `bytes` of zeros.
    pub fn zeroed(device: Device, bytes: usize) -> Result<Buffer, OutOfMemory> {
        let mut buffer = Self::new(device, bytes)?;
        crate::fill_zero(buffer.view_mut(DType::U8, 0, bytes));
        Ok(buffer)
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        self.block.device
    }

    /// Its size.
    pub fn len_bytes(&self) -> usize {
        self.block.bytes
    }

    /// Whether this is the only handle, so that writing is allowed.
    pub fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.block).is_some()
    }

    /// How many handles there are.
    pub fn handles(&self) -> usize {
        Arc::strong_count(&self.block)
    }

    /// Whether both are handles of one block.
    pub fn is_same(&self, other: &Buffer) -> bool {
        Arc::ptr_eq(&self.block, &other.block)
    }

    /// Read `len` elements of `dtype` from element `start` on.
    pub fn view(&self, dtype: DType, start: usize, len: usize) -> View<'_> {
        self.check(dtype, start, len);
        // SAFETY: in bounds (checked), initialised at allocation, not written while `self` is
        // borrowed: writers need `&mut` on the only handle.
        unsafe {
            let ptr = self.block.ptr.as_ptr().add(start * dtype.size_bytes());
            View::new(self.block.device, dtype, ptr, len)
        }
    }

    /// Write `len` elements of `dtype` from element `start` on.
    /// Panics when another handle is alive: that is a bug of ours, a race in waiting.
    pub fn view_mut(&mut self, dtype: DType, start: usize, len: usize) -> ViewMut<'_> {
        self.check(dtype, start, len);
        assert!(self.is_unique(), "a shared buffer of {} bytes was opened for writing", self.block.bytes);
        // SAFETY: in bounds (checked), and this is the only handle, mutably borrowed.
        unsafe {
            let ptr = self.block.ptr.as_ptr().add(start * dtype.size_bytes());
            ViewMut::new(self.block.device, dtype, ptr, len)
        }
    }

    fn check(&self, dtype: DType, start: usize, len: usize) {
        let end = (start + len) * dtype.size_bytes();
        assert!(end <= self.block.bytes, "{end} of {} bytes", self.block.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_block_is_reused_and_the_books_balance() {
        let before = crate::memory_use();
        let bytes = 12_345_678;
        let first = Buffer::new(Device::Cpu, bytes).unwrap();
        let held = crate::memory_use();
        assert!(held.live_bytes >= before.live_bytes + bytes);
        let ptr = first.block.ptr;
        drop(first);
        let second = Buffer::zeroed(Device::Cpu, bytes).unwrap();
        assert_eq!(second.block.ptr, ptr);
        assert!(second.view(DType::F32, 0, bytes / 4).f32().iter().all(|x| *x == 0.0));
    }

    #[test]
    #[should_panic(expected = "shared buffer")]
    fn writing_through_a_shared_handle_is_refused() {
        let mut a = Buffer::new(Device::Cpu, 64).unwrap();
        let _b = a.clone();
        a.view_mut(DType::F32, 0, 1);
    }

    #[test]
    fn a_request_no_machine_can_serve_is_an_error() {
        let refused = Buffer::new(Device::Cpu, usize::MAX / 2).err().unwrap();
        assert!(refused.to_string().contains("cannot allocate"));
    }
}
