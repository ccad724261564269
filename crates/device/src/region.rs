//! A reserved run of addresses whose bytes come and go.
//!
//! Addresses are taken once and never change; memory stands behind those granules alone that are
//! *here*. What moves bytes on another thread holds a `Loan` of a granule: until it is dropped
//! nobody else can open a window on it. Windows on what is away or lent are bugs of ours and panic.

use crate::memory::{ALIGN_BYTES, HUGE_PAGE_BYTES, count_committed, count_returned};
use crate::{DType, Device, OutOfMemory, View, ViewMut};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

const AWAY: u8 = 0;
const HERE: u8 = 1;
const LENT: u8 = 2;

/// Reserved addresses in granules of equal size, the last one shorter.
pub struct Region {
    block: Arc<Reserved>,
    device: Device,
    bytes: usize,
    granule_bytes: usize,
}

/// One granule, exclusively ours until dropped, on whatever thread; here or away.
pub struct Loan {
    block: Arc<Reserved>,
    granule: usize,
    here: bool,
}

struct Reserved {
    /// First byte of the mapping, and its length.
    mapping: (NonNull<u8>, usize),
    /// First byte of the region: the mapping's, aligned to what its pages should be.
    ptr: NonNull<u8>,
    states: Box<[AtomicU8]>,
    bytes: usize,
    granule_bytes: usize,
    /// Whether it stands on huge pages where the system has them.
    huge: bool,
}

impl Reserved {
    /// Memory behind a granule while it is here: whole pages.
    fn bytes_of(&self, granule: usize) -> usize {
        let left = self.bytes - granule * self.granule_bytes;
        left.next_multiple_of(ALIGN_BYTES).min(self.granule_bytes)
    }
}

// SAFETY: the addresses are owned by this block alone; who may touch which granule is governed by
// the borrows of `Region` and the states.
unsafe impl Send for Reserved {}
// SAFETY: as above.
unsafe impl Sync for Reserved {}

impl Drop for Reserved {
    fn drop(&mut self) {
        let here = |i: &usize| self.states[*i].load(Ordering::Acquire) == HERE;
        (0..self.states.len()).filter(here).for_each(|i| count_returned(self.bytes_of(i)));
        // SAFETY: our own mapping; no window outlives the region, no loan outlives this block.
        unsafe { libc::munmap(self.mapping.0.as_ptr().cast(), self.mapping.1) };
    }
}

impl Region {
    /// Addresses for `bytes` in granules of `granule_bytes` (a multiple of 4096), all away.
    pub fn reserve(device: Device, bytes: usize, granule_bytes: usize) -> Result<Region, OutOfMemory> {
        assert!(
            granule_bytes > 0 && granule_bytes.is_multiple_of(ALIGN_BYTES),
            "granules of {granule_bytes} bytes"
        );
        // A granule of huge pages must not share one with its neighbour: leaving would not free it.
        let huge = granule_bytes.is_multiple_of(HUGE_PAGE_BYTES);
        Self::map(device, bytes, granule_bytes, (libc::MAP_NORESERVE, huge))
    }

    /// `bytes` of zeros in granules of `granule_bytes` (a multiple of 4096), all of them here. They
    /// may be lent one by one, but are not meant to leave. The system may refuse.
    pub fn standing(device: Device, bytes: usize, granule_bytes: usize) -> Result<Region, OutOfMemory> {
        assert!(
            granule_bytes > 0 && granule_bytes.is_multiple_of(ALIGN_BYTES),
            "granules of {granule_bytes} bytes"
        );
        let mut region = Self::map(device, bytes, granule_bytes, (0, true))?;
        (0..region.granules()).for_each(|i| region.bring(i));
        Ok(region)
    }

    /// `bytes` of zeros that are here for good: one granule. The system may refuse.
    pub fn zeroed(device: Device, bytes: usize) -> Result<Region, OutOfMemory> {
        let whole = bytes.max(1).checked_next_multiple_of(HUGE_PAGE_BYTES);
        let whole = whole.ok_or(OutOfMemory { bytes, device })?;
        let mut region = Self::map(device, bytes, whole, (0, true))?;
        if bytes > 0 {
            region.bring(0);
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
        let states = (0..bytes.div_ceil(granule_bytes)).map(|_| AtomicU8::new(AWAY)).collect();
        let block = Reserved { mapping: (start, length), ptr, states, bytes, granule_bytes, huge };
        Ok(Region { block: Arc::new(block), device, bytes, granule_bytes })
    }

    /// Where its bytes live while they are here.
    pub fn device(&self) -> Device {
        self.device
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
        self.lend(i).bring();
    }

    /// Give the memory of granule `i` back; its bytes are lost.
    pub fn send_away(&mut self, i: usize) {
        self.lend(i).send_away();
    }

    /// Lend granule `i`, here or away, to whoever moves it, maybe on another thread.
    pub fn lend(&mut self, i: usize) -> Loan {
        let was = self.block.states[i].swap(LENT, Ordering::AcqRel);
        assert_ne!(was, LENT, "granule {i} is lent twice");
        Loan { block: self.block.clone(), granule: i, here: was == HERE }
    }

    /// Lend adjacent granules, each here or away, as one run.
    pub fn lend_run(&mut self, granules: Range<usize>) -> Stretch {
        Stretch { device: self.device, loans: granules.map(|i| self.lend(i)).collect() }
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
        unsafe { View::new(self.device, dtype, ptr, len) }
    }

    /// Write `len` elements of `dtype` from element `start` on; all of them must be here.
    pub fn view_mut(&mut self, dtype: DType, start: usize, len: usize) -> ViewMut<'_> {
        let ptr = self.check(dtype, start, len);
        // SAFETY: as above, and `&mut self` excludes every other window.
        unsafe { ViewMut::new(self.device, dtype, ptr, len) }
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

/// Adjacent granules, exclusively ours until dropped, on whatever thread.
pub struct Stretch {
    device: Device,
    loans: Vec<Loan>,
}

impl Stretch {
    /// Put memory behind those that are away; they read as zeros.
    pub fn bring(&mut self) {
        self.loans.iter_mut().filter(|loan| !loan.here).for_each(Loan::bring);
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
            assert!(loan.here, "granule {} is opened while it is away", loan.granule);
        }
        // SAFETY: the granules are adjacent in one mapping, here, and lent to us alone; `&mut self`
        // excludes every other window on them.
        unsafe { ViewMut::new(self.device, dtype, loans[0].first(), bytes / dtype.size_bytes()) }
    }
}

impl Loan {
    /// Bytes of memory behind it while it is here.
    pub fn len_bytes(&self) -> usize {
        self.block.bytes_of(self.granule)
    }

    fn first(&self) -> *mut u8 {
        // SAFETY: a granule of the region begins inside its mapping.
        unsafe { self.block.ptr.as_ptr().add(self.granule * self.block.granule_bytes) }
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
        assert!(!self.here, "granule {} is brought twice", self.granule);
        self.here = true;
        count_committed(self.len_bytes());
    }

    /// Give its memory back; its bytes are lost.
    pub fn send_away(&mut self) {
        assert!(self.here, "granule {} is sent away twice", self.granule);
        self.here = false;
        // SAFETY: whole pages of our own mapping that nobody else may touch while they are lent;
        // they read as zeros afterwards.
        unsafe { libc::madvise(self.first().cast(), self.len_bytes(), libc::MADV_DONTNEED) };
        count_returned(self.len_bytes());
    }

    /// The bytes, for reading.
    pub fn bytes(&self) -> &[u8] {
        assert!(self.here, "granule {} is read while it is away", self.granule);
        // SAFETY: in bounds by construction; the state keeps everyone else out.
        unsafe { std::slice::from_raw_parts(self.first(), self.len_bytes()) }
    }

    /// The bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        assert!(self.here, "granule {} is written while it is away", self.granule);
        // SAFETY: as above, and this is the only loan of the granule.
        unsafe { std::slice::from_raw_parts_mut(self.first(), self.len_bytes()) }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let state = if self.here { HERE } else { AWAY };
        self.block.states[self.granule].store(state, Ordering::Release);
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
