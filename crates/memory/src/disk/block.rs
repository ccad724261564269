//! Memory that transfers read and write: owned, page-aligned, moved into a request and back.
//!
//! Ownership is what makes the engine sound: while the drive works on a block nobody else holds it.

use super::PAGE_BYTES;
use super::slots::Slot;
use device::{Buffer, DType, Device, Loan, OutOfMemory};

/// A run of whole pages. Made by [`super::Disk::block`] it is registered with the drive's ring.
pub struct Block {
    memory: Memory,
    /// Place among the ring's registered buffers; given back when the block is dropped.
    pub(super) slot: Option<Slot>,
}

enum Memory {
    Owned(Buffer),
    Lent(Loan),
}

impl Block {
    /// At least `bytes`, rounded up to whole pages, of unspecified contents.
    pub fn new(bytes: usize) -> Result<Block, OutOfMemory> {
        let refused = OutOfMemory { bytes, device: Device::Cpu };
        let rounded = bytes.max(1).checked_next_multiple_of(PAGE_BYTES).ok_or(refused)?;
        Ok(Block { memory: Memory::Owned(Buffer::new(Device::Cpu, rounded)?), slot: None })
    }

    /// A granule of a region, which is here: it is moved without a copy in between.
    pub fn from_loan(loan: Loan) -> Block {
        Block { memory: Memory::Lent(loan), slot: None }
    }

    /// The granule of `from_loan`.
    pub fn into_loan(self) -> Option<Loan> {
        match self.memory {
            Memory::Lent(loan) => Some(loan),
            Memory::Owned(_) => None,
        }
    }

    /// The memory of a block that is no granule, as a plain buffer; its place in the ring is given
    /// back.
    pub fn into_buffer(self) -> Option<Buffer> {
        match self.memory {
            Memory::Owned(buffer) => Some(buffer),
            Memory::Lent(_) => None,
        }
    }

    /// Size in bytes, a multiple of 4096.
    pub fn len(&self) -> usize {
        match &self.memory {
            Memory::Owned(buffer) => buffer.len_bytes(),
            Memory::Lent(loan) => loan.len_bytes(),
        }
    }

    /// Never: a block has a page at least.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Everything.
    pub fn bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Owned(buffer) => buffer.view(DType::U16, 0, buffer.len_bytes() / 2).bytes(),
            Memory::Lent(loan) => loan.bytes(),
        }
    }

    /// Everything, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Owned(buffer) => buffer.view_mut(DType::U16, 0, buffer.len_bytes() / 2).bytes(),
            Memory::Lent(loan) => loan.bytes_mut(),
        }
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Block({} bytes)", self.len())
    }
}
