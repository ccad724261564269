//! Memory that transfers read and write: owned, page-aligned, moved into a request and back.
//!
//! Ownership is what makes the engine sound: while the drive works on a block nobody else holds it.

use super::PAGE_BYTES;
use super::slots::Slot;
use device::{Buffer, DType, Device, OutOfMemory, View, ViewMut};

/// A run of whole pages. Made by [`super::Disk::block`] it is registered with the drive's ring.
pub struct Block {
    buffer: Buffer,
    /// Place among the ring's registered buffers; given back when the block is dropped.
    pub(super) slot: Option<Slot>,
}

impl Block {
    /// At least `bytes`, rounded up to whole pages, of unspecified contents.
    pub fn new(bytes: usize) -> Result<Block, OutOfMemory> {
        let refused = OutOfMemory { bytes, device: Device::Cpu };
        let rounded = bytes.max(1).checked_next_multiple_of(PAGE_BYTES).ok_or(refused)?;
        Ok(Block { buffer: Buffer::new(Device::Cpu, rounded)?, slot: None })
    }

    /// Takes a buffer as it is; gives it back when it is shared or not of whole pages.
    pub fn from_buffer(mut buffer: Buffer) -> Result<Block, Buffer> {
        let whole = buffer.len_bytes() > 0 && buffer.len_bytes().is_multiple_of(PAGE_BYTES);
        match whole && buffer.is_unique() {
            true => Ok(Block { buffer, slot: None }),
            false => Err(buffer),
        }
    }

    /// The memory as a plain buffer; its place in the ring is given back.
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }

    /// Size in bytes, a multiple of 4096.
    pub fn len(&self) -> usize {
        self.buffer.len_bytes()
    }

    /// Never: a block has a page at least.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Everything.
    pub fn bytes(&self) -> &[u8] {
        self.view(DType::U16, 0, self.len() / 2).bytes()
    }

    /// Everything, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len() / 2;
        self.view_mut(DType::U16, 0, len).bytes()
    }

    /// `len` elements of `dtype` from element `start` on.
    pub fn view(&self, dtype: DType, start: usize, len: usize) -> View<'_> {
        self.buffer.view(dtype, start, len)
    }

    /// `len` elements of `dtype` from element `start` on, to be written.
    pub fn view_mut(&mut self, dtype: DType, start: usize, len: usize) -> ViewMut<'_> {
        self.buffer.view_mut(dtype, start, len)
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Block({} bytes)", self.len())
    }
}
