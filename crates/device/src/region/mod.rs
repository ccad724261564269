//! A reserved run of addresses whose bytes come and go.
//!
//! Addresses are taken once and never change; memory stands behind those granules alone that are
//! *here*. What moves bytes on another thread holds a `Loan` of a granule: until it is dropped
//! nobody else can open a window on it. Windows on what is away or lent are bugs of ours and panic.

mod loan;
mod reserved;

pub use loan::{Loan, Stretch};

use crate::cuda;
use crate::memory::{ALIGN_BYTES, HUGE_PAGE_BYTES};
use crate::{DType, Device, OutOfMemory, View, ViewMut};
use reserved::{AWAY, HERE, LENT, Reserved};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Reserved addresses in granules of equal size, the last one shorter.
pub struct Region {
    block: Arc<Reserved>,
    bytes: usize,
    granule_bytes: usize,
}

impl Region {
    /// Addresses for `bytes` in granules of `granule_bytes` (a multiple of 4096), all away. On a GPU whose memory
    /// comes in larger pieces they are away by name only: memory stands behind all of them.
    pub fn reserve(device: Device, bytes: usize, granule_bytes: usize) -> Result<Region, OutOfMemory> {
        assert!(
            granule_bytes > 0 && granule_bytes.is_multiple_of(ALIGN_BYTES),
            "granules of {granule_bytes} bytes"
        );
        // A granule of huge pages must not share one with its neighbour: leaving would not free it.
        let huge = granule_bytes.is_multiple_of(HUGE_PAGE_BYTES);
        match device {
            Device::Cpu => Self::map(device, bytes, granule_bytes, (libc::MAP_NORESERVE, huge)),
            Device::Cuda if granule_bytes.is_multiple_of(cuda::present().driver().granularity()) => {
                Self::on_card(bytes, granule_bytes, granule_bytes)
            }
            Device::Cuda => Self::standing_on_card(bytes, granule_bytes),
        }
    }

    /// The same on a GPU, where granules come and go by frames of `frame_bytes`, which those of all regions
    /// share. Both are multiples of `cuda::Driver::granularity`.
    pub fn in_frames(bytes: usize, granule_bytes: usize, frame_bytes: usize) -> Result<Region, OutOfMemory> {
        Self::on_card(bytes, granule_bytes, frame_bytes)
    }

    fn on_card(bytes: usize, granule_bytes: usize, frame_bytes: usize) -> Result<Region, OutOfMemory> {
        let (device, driver) = (Device::Cuda, cuda::present().driver());
        assert!(
            granule_bytes.is_multiple_of(frame_bytes) && frame_bytes.is_multiple_of(driver.granularity()),
            "granules of {granule_bytes} bytes in frames of {frame_bytes}"
        );
        let refused = OutOfMemory { bytes, device };
        let length = bytes.max(1).checked_next_multiple_of(granule_bytes).ok_or(refused.clone())?;
        let at = driver.reserve(length).and_then(|at| NonNull::new(at as *mut u8)).ok_or(refused)?;
        let mut block = Reserved::new(device, (at, length), at, (bytes, granule_bytes));
        block.frame_bytes = frame_bytes;
        Ok(Region { block: Arc::new(block), bytes, granule_bytes })
    }

    /// The same with one frame behind all granules.
    fn standing_on_card(bytes: usize, granule_bytes: usize) -> Result<Region, OutOfMemory> {
        let (device, gpu) = (Device::Cuda, cuda::present());
        let refused = OutOfMemory { bytes, device };
        let whole = bytes.max(1).checked_next_multiple_of(granule_bytes).ok_or(refused.clone())?;
        let length = whole.checked_next_multiple_of(gpu.driver().granularity()).ok_or(refused.clone())?;
        let at = gpu.driver().reserve(length).ok_or(refused.clone())?;
        if !gpu.bring(at, length) {
            gpu.driver().unreserve(at, length);
            return Err(refused);
        }
        let ptr = NonNull::new(at as *mut u8).ok_or(refused)?;
        let mut block = Reserved::new(device, (ptr, length), ptr, (bytes, granule_bytes));
        block.stands = true;
        Ok(Region { block: Arc::new(block), bytes, granule_bytes })
    }

    /// The same, of which some granules count as buffers while they are here (`MemoryUse::region_bytes` is
    /// without them): what others give us for a while.
    pub fn with_buffers(mut self, is_buffer: impl Fn(usize) -> bool) -> Region {
        let all = (0..self.granules()).map(is_buffer).collect();
        Arc::get_mut(&mut self.block).expect("nobody else has it yet").buffers = Some(all);
        self
    }

    /// The same in memory of the host for what goes to a GPU and comes back: granules are pinned when they come
    /// first, and their memory stays when they are sent away.
    pub fn pinned(bytes: usize, granule_bytes: usize) -> Result<Region, OutOfMemory> {
        let mut region = Self::reserve(Device::Cpu, bytes, granule_bytes)?;
        let block = Arc::get_mut(&mut region.block).expect("nobody else has it yet");
        block.pinned = Some(block.states.iter().map(|_| AtomicBool::new(false)).collect());
        // Pinned pages do not move.
        block.huge = false;
        Ok(region)
    }

    /// `bytes` of zeros in granules of `granule_bytes` (a multiple of 4096), all of them here. They
    /// may be lent one by one, but are not meant to leave. The system may refuse.
    pub fn standing(device: Device, bytes: usize, granule_bytes: usize) -> Result<Region, OutOfMemory> {
        assert!(
            granule_bytes > 0 && granule_bytes.is_multiple_of(ALIGN_BYTES),
            "granules of {granule_bytes} bytes"
        );
        let mut region = match device {
            Device::Cpu => Self::map(device, bytes, granule_bytes, (0, true))?,
            Device::Cuda => Self::standing_on_card(bytes, granule_bytes)?,
        };
        (0..region.granules()).for_each(|i| region.lend(i).bring());
        Ok(region)
    }

    /// `bytes` of zeros that are here for good: one granule. The system may refuse.
    pub fn zeroed(device: Device, bytes: usize) -> Result<Region, OutOfMemory> {
        let refused = OutOfMemory { bytes, device };
        let step = match device {
            Device::Cpu => HUGE_PAGE_BYTES,
            Device::Cuda => cuda::present().driver().granularity(),
        };
        let whole = bytes.max(1).checked_next_multiple_of(step).ok_or(refused.clone())?;
        let mut region = match device {
            Device::Cpu => Self::map(device, bytes, whole, (0, true))?,
            Device::Cuda => Self::on_card(bytes, whole, whole)?,
        };
        if bytes > 0 && !region.lend(0).try_bring() {
            return Err(refused);
        }
        Ok(region)
    }

    fn map(
        device: Device,
        bytes: usize,
        granule_bytes: usize,
        (flags, huge): (i32, bool),
    ) -> Result<Region, OutOfMemory> {
        let refused = OutOfMemory { bytes, device };
        let huge = huge && bytes >= HUGE_PAGE_BYTES;
        let align = if huge { HUGE_PAGE_BYTES } else { ALIGN_BYTES };
        let rounded = bytes.max(1).checked_next_multiple_of(ALIGN_BYTES).ok_or(refused.clone())?;
        let length = rounded.checked_add(align - ALIGN_BYTES).ok_or(refused.clone())?;
        let (read_write, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags);
        // SAFETY: a fresh anonymous mapping touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, read_write, flags, -1, 0) };
        let start = if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast::<u8>()) };
        let start = start.ok_or(refused)?;
        let shift = (start.as_ptr() as usize).next_multiple_of(align) - start.as_ptr() as usize;
        // SAFETY: `shift` is less than `align`, which the mapping has room for.
        let ptr = unsafe { start.add(shift) };
        advise_pages(ptr, rounded, huge);
        let mut block = Reserved::new(device, (start, length), ptr, (bytes, granule_bytes));
        block.huge = huge;
        Ok(Region { block: Arc::new(block), bytes, granule_bytes })
    }

    /// Where its bytes live while they are here.
    pub fn device(&self) -> Device {
        self.block.device
    }

    /// Its size.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// How many granules it has.
    pub fn granules(&self) -> usize {
        self.block.states.len()
    }

    /// Memory behind granule `i` while it is here: whole pages.
    pub fn granule_bytes(&self, i: usize) -> usize {
        self.block.bytes_of(i)
    }

    /// Whether granule `i` is here and not lent.
    pub fn is_here(&self, i: usize) -> bool {
        self.block.states[i].load(Ordering::Acquire) == HERE
    }

    /// Whether somebody holds a loan of granule `i`.
    pub fn is_lent(&self, i: usize) -> bool {
        self.block.states[i].load(Ordering::Acquire) == LENT
    }

    /// Put memory behind granule `i`; it reads as zeros.
    pub fn bring(&mut self, i: usize) {
        let mut loan = self.lend(i);
        loan.bring();
        loan.touch();
    }

    /// Give the memory of granule `i` back; its bytes are lost.
    pub fn send_away(&mut self, i: usize) {
        self.lend(i).send_away();
    }

    /// Lend granule `i`, here or away, to whoever moves it, maybe on another thread.
    pub fn lend(&mut self, i: usize) -> Loan {
        let was = self.block.states[i].swap(LENT, Ordering::AcqRel);
        assert_ne!(was, LENT, "granule {i} is lent twice");
        // Kernels that were launched so far may still use it.
        let mark = (self.device() == Device::Cuda && was == HERE)
            .then(|| cuda::present().driver().mark(cuda::stream()));
        let granule = u32::try_from(i).expect("granules are counted in 32 bits");
        Loan { block: self.block.clone(), granule, here: was == HERE, mark }
    }

    /// Lend adjacent granules, each here or away, as one run.
    pub fn lend_run(&mut self, granules: Range<usize>) -> Stretch {
        Stretch { device: self.device(), loans: granules.map(|i| self.lend(i)).collect() }
    }

    /// Bytes of memory behind the granules that are here or lent while here.
    pub fn resident_bytes(&self) -> usize {
        let here = |i: &usize| self.block.states[*i].load(Ordering::Acquire) != AWAY;
        (0..self.granules()).filter(here).map(|i| self.granule_bytes(i)).sum()
    }

    /// Read `len` elements of `dtype` from element `start` on; all of them must be here.
    pub fn view(&self, dtype: DType, start: usize, len: usize) -> View<'_> {
        let ptr = self.check(dtype, start, len);
        // SAFETY: in bounds and here (checked), zeros or written since; writers need `&mut self` or
        // a loan, which the check excludes.
        unsafe { View::new(self.device(), dtype, ptr, len) }
    }

    /// Write `len` elements of `dtype` from element `start` on; all of them must be here.
    pub fn view_mut(&mut self, dtype: DType, start: usize, len: usize) -> ViewMut<'_> {
        let ptr = self.check(dtype, start, len);
        // SAFETY: as above, and `&mut self` excludes every other window.
        unsafe { ViewMut::new(self.device(), dtype, ptr, len) }
    }

    fn check(&self, dtype: DType, start: usize, len: usize) -> *mut u8 {
        let size = dtype.size_bytes();
        let bytes = start * size..(start + len) * size;
        assert!(bytes.end <= self.bytes, "{} of {} bytes", bytes.end, self.bytes);
        for granule in self.granules_of(&bytes) {
            assert!(self.is_here(granule), "bytes {bytes:?} are opened while granule {granule} is not here");
        }
        // SAFETY: in bounds, checked above.
        unsafe { self.block.ptr.as_ptr().add(bytes.start) }
    }

    fn granules_of(&self, bytes: &Range<usize>) -> Range<usize> {
        if bytes.is_empty() {
            return 0..0;
        }
        bytes.start / self.granule_bytes..(bytes.end - 1) / self.granule_bytes + 1
    }
}

/// Small granules must not stand on huge pages they share: one that comes would bring its neighbours.
fn advise_pages(ptr: NonNull<u8>, bytes: usize, huge: bool) {
    #[cfg(target_os = "linux")]
    {
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: advice on our own fresh mapping; a refusal changes nothing.
        unsafe { libc::madvise(ptr.as_ptr().cast(), bytes, advice) };
    }
    let _ = (ptr, bytes, huge);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_stay_and_bytes_come_and_go() {
        let mut region = Region::reserve(Device::Cpu, 3 * 4096 + 100, 4096).unwrap();
        assert_eq!((region.granules(), region.granule_bytes(3)), (4, 4096));
        region.bring(1);
        region.bring(2);
        region.view_mut(DType::F32, 1024, 2048).f32().fill(2.5);
        let address = region.view(DType::F32, 1024, 1).f32().as_ptr();
        region.send_away(1);
        assert!(!region.is_here(1) && region.is_here(2));
        region.bring(1);
        assert_eq!(region.view(DType::F32, 1024, 1).f32().as_ptr(), address);
        assert!(region.view(DType::F32, 1024, 1024).f32().iter().all(|x| *x == 0.0));
        assert!(region.view(DType::F32, 2048, 1024).f32().iter().all(|x| *x == 2.5));
    }

    #[test]
    fn a_loan_moves_bytes_on_another_thread_and_keeps_everyone_else_out() {
        let mut region = Region::reserve(Device::Cpu, 2 * 4096, 4096).unwrap();
        region.bring(0);
        let mut loan = region.lend(0);
        assert!(!region.is_here(0));
        std::thread::spawn(move || loan.bytes_mut().fill(7)).join().unwrap();
        assert!(region.view(DType::U16, 0, 2048).bytes().iter().all(|x| *x == 7));
        let (mut comes, mut goes) = (region.lend(1), region.lend(0));
        comes.bring();
        goes.send_away();
        drop((comes, goes));
        assert!(region.is_here(1) && !region.is_here(0));
    }

    #[test]
    fn a_run_of_granules_is_one_window_and_keeps_what_it_should() {
        let mut region = Region::reserve(Device::Cpu, 4 * 4096, 4096).unwrap();
        region.bring(2);
        region.view_mut(DType::F32, 2048, 1024).f32().fill(3.0);
        let mut run = region.lend_run(1..3);
        run.bring();
        let window = run.view_mut(DType::F32).f32();
        assert!(window.len() == 2048 && window[..1024] == [0.0; 1024] && window[1024..] == [3.0; 1024]);
        window[..1024].fill(4.0);
        run.send_away_but(1);
        assert!(run.granule_mut(1, DType::F32).f32().iter().all(|x| *x == 3.0));
        drop(run);
        assert!(!region.is_here(1) && region.is_here(2));
        assert_eq!(region.resident_bytes(), 4096);
        let standing = Region::standing(Device::Cpu, 3 << 20, 4096).unwrap();
        assert_eq!(standing.resident_bytes(), 3 << 20);
        assert!(standing.view(DType::F32, 0, 3 << 18).f32().iter().all(|x| *x == 0.0));
    }

    #[test]
    #[should_panic(expected = "granule 1 is not here")]
    fn what_is_away_cannot_be_opened() {
        let mut region = Region::reserve(Device::Cpu, 2 * 4096, 4096).unwrap();
        region.bring(0);
        region.view(DType::F32, 1000, 100);
    }

    #[test]
    #[should_panic(expected = "granule 0 is not here")]
    fn what_is_lent_cannot_be_opened() {
        let mut region = Region::reserve(Device::Cpu, 4096, 4096).unwrap();
        region.bring(0);
        let _loan = region.lend(0);
        region.view(DType::F32, 0, 1);
    }

    #[test]
    fn a_reservation_costs_nothing_and_one_no_machine_has_is_refused() {
        let region = Region::reserve(Device::Cpu, 1 << 40, 2 << 20).unwrap();
        assert_eq!(region.granules(), 1 << 19);
        assert!(Region::zeroed(Device::Cpu, usize::MAX / 2).is_err());
    }
}
