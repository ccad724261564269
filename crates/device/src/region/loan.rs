//! Granules that somebody has alone, to move their bytes on another thread.

use super::reserved::{AWAY, HERE, Reserved};
use crate::cuda::{self, Address, Mark, Stream};
use crate::memory::HUGE_PAGE_BYTES;
use crate::{DType, Device, ViewMut};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One granule, exclusively ours until dropped, on whatever thread; here or away.
pub struct Loan {
    pub(super) block: Arc<Reserved>,
    pub(super) granule: u32,
    pub(super) here: bool,
    /// On a GPU: behind what was launched before it was lent.
    pub(super) mark: Option<Mark>,
}

/// Adjacent granules, exclusively ours until dropped, on whatever thread.
pub struct Stretch {
    pub(super) device: Device,
    pub(super) loans: Vec<Loan>,
}

impl Stretch {
    /// Put memory behind those that are away; they read as zeros.
    pub fn bring(&mut self) {
        for loan in self.loans.iter_mut().filter(|loan| !loan.here) {
            loan.bring();
            loan.touch();
        }
    }

    /// Give the memory of all but the `keep`-th back; their bytes are lost.
    pub fn send_away_but(&mut self, keep: usize) {
        let others = self.loans.iter_mut().enumerate().filter(|(i, loan)| *i != keep && loan.here);
        others.for_each(|(_, loan)| loan.send_away());
    }

    /// Granules.
    pub fn granules(&self) -> usize {
        self.loans.len()
    }

    /// All of it as elements of `dtype`; every granule must be here.
    pub fn view_mut(&mut self, dtype: DType) -> ViewMut<'_> {
        self.open(dtype, 0..self.loans.len())
    }

    /// The `i`-th granule, which must be here.
    pub fn granule_mut(&mut self, i: usize, dtype: DType) -> ViewMut<'_> {
        self.open(dtype, i..i + 1)
    }

    fn open(&mut self, dtype: DType, granules: Range<usize>) -> ViewMut<'_> {
        let loans = &self.loans[granules];
        let bytes: usize = loans.iter().map(Loan::len_bytes).sum();
        for loan in loans {
            assert!(loan.here, "granule {} is opened while it is away", loan.granule());
        }
        // SAFETY: the granules are adjacent in one mapping, here, and lent to us alone; `&mut self`
        // excludes every other window on them.
        unsafe { ViewMut::new(self.device, dtype, loans[0].first(), bytes / dtype.size_bytes()) }
    }
}

impl Loan {
    /// Bytes of memory behind it while it is here.
    pub fn len_bytes(&self) -> usize {
        self.block.bytes_of(self.granule())
    }

    fn granule(&self) -> usize {
        self.granule as usize
    }

    fn first(&self) -> *mut u8 {
        self.block.first(self.granule())
    }

    /// Its huge pages, where it consists of such.
    pub(crate) fn huge_pages(&self) -> Option<Vec<NonNull<u8>>> {
        let (first, bytes) = (NonNull::new(self.first())?, self.len_bytes());
        let huge = self.block.huge && bytes.is_multiple_of(HUGE_PAGE_BYTES);
        // SAFETY: pages of the granule.
        let page = |nth: usize| unsafe { first.add(nth * HUGE_PAGE_BYTES) };
        huge.then(|| (0..bytes / HUGE_PAGE_BYTES).map(page).collect())
    }

    /// Put memory behind it; it reads as zeros.
    pub fn bring(&mut self) {
        assert!(self.try_bring(), "{}", self.no_room());
    }

    pub(super) fn try_bring(&mut self) -> bool {
        let brought = self.try_bring_anything();
        match self.block.device {
            Device::Cuda if brought => {
                let (at, bytes) = (self.first() as Address, self.len_bytes());
                // SAFETY: memory that is ours alone; kernels that used it before run before.
                unsafe { cuda::present().driver().fill(cuda::stream(), at, 0, bytes) };
            }
            Device::Cpu if self.block.is_pinned(self.granule()) => self.bytes_mut().fill(0),
            _ => {}
        }
        brought
    }

    /// Has the system find all pages of a granule that is used at once: for less than a fault each. Older systems
    /// refuse; then they come one by one.
    pub(super) fn touch(&mut self) {
        #[cfg(target_os = "linux")]
        if self.block.device == Device::Cpu {
            // SAFETY: pages of our own mapping that are ours alone; they keep their bytes.
            unsafe { libc::madvise(self.first().cast(), self.len_bytes(), libc::MADV_POPULATE_WRITE) };
        }
    }

    /// The same with bytes that are anything: they are to be overwritten whole.
    pub fn bring_anything(&mut self) {
        assert!(self.try_bring_anything(), "{}", self.no_room());
    }

    fn try_bring_anything(&mut self) -> bool {
        assert!(!self.here, "granule {} is brought twice", self.granule());
        self.here = self.block.bring(self.granule());
        self.here
    }

    fn no_room(&self) -> String {
        format!("the GPU has no {} bytes left for a chunk; lower memory.hbm", self.len_bytes())
    }

    /// Give its memory back; its bytes are lost.
    pub fn send_away(&mut self) {
        assert!(self.here, "granule {} is sent away twice", self.granule());
        self.here = false;
        self.block.send_away(self.granule());
    }

    /// Its bytes become those of another, of whatever memory; they are there when this returns.
    pub fn copy_from(&mut self, from: &mut Loan) {
        assert!(
            self.here && from.here && self.len_bytes() == from.len_bytes(),
            "a copy between two granules"
        );
        let (to, source, bytes) = (self.first(), from.first(), self.len_bytes());
        let driver = || cuda::present().driver();
        match (self.block.device, from.block.device) {
            (Device::Cpu, Device::Cpu) => self.bytes_mut().copy_from_slice(from.bytes()),
            // SAFETY: both granules are ours alone, and waited for.
            (Device::Cuda, Device::Cpu) => unsafe {
                driver().copy_up(Stream::Up, to as Address, source, bytes);
                driver().wait(Stream::Up);
            },
            (Device::Cpu, Device::Cuda) => {
                if let Some(mark) = from.mark.take() {
                    driver().follow(Stream::Down, mark);
                }
                // SAFETY: as above; what was launched before the loan writes before the copy reads.
                unsafe { driver().copy_down(Stream::Down, to, source as Address, bytes) };
                driver().wait(Stream::Down);
            }
            (Device::Cuda, Device::Cuda) => unreachable!("chunks move between memories"),
        }
    }

    /// The bytes, for reading.
    pub fn bytes(&self) -> &[u8] {
        assert!(
            self.here && self.block.device == Device::Cpu,
            "granule {} is not to be read",
            self.granule()
        );
        // SAFETY: in bounds by construction; the state keeps everyone else out.
        unsafe { std::slice::from_raw_parts(self.first(), self.len_bytes()) }
    }

    /// The bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        assert!(
            self.here && self.block.device == Device::Cpu,
            "granule {} is not to be written",
            self.granule()
        );
        // SAFETY: as above, and this is the only loan of the granule.
        unsafe { std::slice::from_raw_parts_mut(self.first(), self.len_bytes()) }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(mark) = self.mark.take() {
            cuda::present().driver().forget(mark);
        }
        let state = if self.here { HERE } else { AWAY };
        self.block.states[self.granule()].store(state, Ordering::Release);
    }
}
