//! The addresses of a region, and the memory behind its granules.

use crate::Device;
use crate::cuda::{self, Address};
use crate::memory::{ALIGN_BYTES, count_committed, count_given, count_returned, count_taken};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// A granule without memory.
pub(super) const AWAY: u8 = 0;
/// With memory, open to windows.
pub(super) const HERE: u8 = 1;
/// Somebody's alone, with memory or without.
pub(super) const LENT: u8 = 2;

pub(super) struct Reserved {
    pub device: Device,
    /// First byte of the mapping, and its length.
    pub mapping: (NonNull<u8>, usize),
    /// First byte of the region: the mapping's, aligned to what its pages should be.
    pub ptr: NonNull<u8>,
    pub states: Box<[AtomicU8]>,
    pub bytes: usize,
    pub granule_bytes: usize,
    /// Whether it stands on huge pages where the system has them.
    pub huge: bool,
    /// On a GPU: bytes of its memory that come and go as one.
    pub frame_bytes: usize,
    /// On a GPU: whether one frame stands behind all granules for good, here or away.
    pub stands: bool,
    /// Where granules stay pinned for copies to the GPU once they have come: which have.
    pub pinned: Option<Box<[AtomicBool]>>,
    /// Which granules are buffers, where some are; none: no granule is.
    pub buffers: Option<Box<[bool]>>,
}

impl Reserved {
    /// Granules of `granule_bytes` that are all away, in `mapping` from `ptr` on.
    pub fn new(
        device: Device,
        mapping: (NonNull<u8>, usize),
        ptr: NonNull<u8>,
        (bytes, granule_bytes): (usize, usize),
    ) -> Reserved {
        let states = (0..bytes.div_ceil(granule_bytes)).map(|_| AtomicU8::new(AWAY)).collect();
        Reserved {
            device,
            mapping,
            ptr,
            states,
            bytes,
            granule_bytes,
            huge: false,
            frame_bytes: 0,
            stands: false,
            pinned: None,
            buffers: None,
        }
    }

    /// Memory behind a granule while it is here: whole pages.
    pub fn bytes_of(&self, granule: usize) -> usize {
        let left = self.bytes - granule * self.granule_bytes;
        left.next_multiple_of(ALIGN_BYTES).min(self.granule_bytes)
    }

    pub fn first(&self, granule: usize) -> *mut u8 {
        // SAFETY: a granule of the region begins inside its mapping.
        unsafe { self.ptr.as_ptr().add(granule * self.granule_bytes) }
    }

    /// Of a GPU: the frames behind a granule.
    fn frames(&self, granule: usize) -> impl Iterator<Item = Address> + use<> {
        let (first, step) = (self.first(granule) as Address, self.frame_bytes);
        (0..self.bytes_of(granule).div_ceil(step)).map(move |frame| first + (frame * step) as u64)
    }

    /// Memory behind a granule, whatever its bytes; false, and nothing done, where there is none.
    pub fn bring(&self, granule: usize) -> bool {
        if self.device == Device::Cuda && !self.stands {
            let (gpu, mut brought) = (cuda::present(), Vec::new());
            for frame in self.frames(granule) {
                if !gpu.bring(frame, self.frame_bytes) {
                    brought.into_iter().for_each(|frame| gpu.take_away(frame, self.frame_bytes));
                    return false;
                }
                brought.push(frame);
            }
        }
        self.pin(granule);
        let count = if self.is_buffer(granule) { count_taken } else { count_committed };
        count(self.device, self.bytes_of(granule));
        true
    }

    fn is_buffer(&self, granule: usize) -> bool {
        self.buffers.as_ref().is_some_and(|buffers| buffers[granule])
    }

    /// The memory of a granule has been given back.
    fn count_gone(&self, granule: usize) {
        let count = if self.is_buffer(granule) { count_given } else { count_returned };
        count(self.device, self.bytes_of(granule));
    }

    /// Pin a granule that comes for the first time. Where the system refuses, copies are slower.
    fn pin(&self, granule: usize) {
        let Some(pinned) = &self.pinned else { return };
        if !pinned[granule].load(Ordering::Acquire) {
            // SAFETY: pages of our own mapping, which are unpinned before it goes.
            let done = unsafe { cuda::present().driver().pin(self.first(granule), self.bytes_of(granule)) };
            pinned[granule].store(done, Ordering::Release);
        }
    }

    pub fn is_pinned(&self, granule: usize) -> bool {
        self.pinned.as_ref().is_some_and(|pinned| pinned[granule].load(Ordering::Acquire))
    }

    pub fn send_away(&self, granule: usize) {
        let (first, bytes) = (self.first(granule), self.bytes_of(granule));
        match self.device {
            // It comes again, and pinning costs more than the memory is worth.
            Device::Cpu if self.is_pinned(granule) => {}
            // SAFETY: whole pages of our own mapping that nobody else may touch while they are lent;
            // they read as zeros afterwards.
            Device::Cpu => unsafe {
                libc::madvise(first.cast(), bytes, libc::MADV_DONTNEED);
            },
            Device::Cuda if self.stands => {}
            Device::Cuda => {
                let gpu = cuda::present();
                self.frames(granule).for_each(|frame| gpu.take_away(frame, self.frame_bytes));
            }
        }
        self.count_gone(granule);
    }
}

// SAFETY: the addresses are owned by this block alone; who may touch which granule is governed by
// the borrows of `Region` and the states.
unsafe impl Send for Reserved {}
// SAFETY: as above.
unsafe impl Sync for Reserved {}

impl Drop for Reserved {
    fn drop(&mut self) {
        let here = (0..self.states.len()).filter(|i| self.states[*i].load(Ordering::Acquire) == HERE);
        match self.device {
            Device::Cpu => {
                here.for_each(|i| self.count_gone(i));
                for (i, _) in
                    self.pinned.iter().flatten().enumerate().filter(|(_, is)| is.load(Ordering::Acquire))
                {
                    // SAFETY: it was pinned when it came first.
                    unsafe { cuda::present().driver().unpin(self.first(i)) };
                }
                // SAFETY: our own mapping; no window outlives the region, no loan outlives this block.
                unsafe { libc::munmap(self.mapping.0.as_ptr().cast(), self.mapping.1) };
            }
            Device::Cuda => {
                here.for_each(|i| self.send_away(i));
                let (gpu, at) = (cuda::present(), self.mapping.0.as_ptr() as Address);
                if self.stands {
                    gpu.take_away(at, self.mapping.1);
                }
                gpu.clear(at..at + self.mapping.1 as u64);
                gpu.driver().unreserve(at, self.mapping.1);
            }
        }
    }
}
