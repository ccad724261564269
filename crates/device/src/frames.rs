//! Huge pages on their way from a granule that leaves to one that comes.
//!
//! A page that is given back to the system is cleared before anybody gets it again, although what
//! comes in from a drive overwrites it whole. Here pages move from address to address instead
//! (`mremap`), contents and all.

use crate::Loan;
use crate::memory::HUGE_PAGE_BYTES;
use std::ptr::NonNull;

/// Pages that have left their granule and wait for another.
pub struct Frames {
    /// Addresses of our own where they wait, from the first on.
    start: NonNull<u8>,
    mapping: (NonNull<u8>, usize),
    places: usize,
    waiting: usize,
}

// SAFETY: the addresses are owned by this value alone.
unsafe impl Send for Frames {}

impl Frames {
    /// Place for `bytes` of pages that move among granules of `region_bytes` in all. `None` where the system
    /// cannot move pages so, or would have to keep a mapping for each of more pages than it likes.
    pub fn new(bytes: usize, region_bytes: usize) -> Option<Frames> {
        let places = bytes / HUGE_PAGE_BYTES;
        if places == 0 || region_bytes / HUGE_PAGE_BYTES + places > most_mappings()? / 4 {
            return None;
        }
        let length = (places + 2) * HUGE_PAGE_BYTES;
        let start = map(length)?;
        let shift = start.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // SAFETY: `shift` is less than a huge page, of which the mapping has one more than are used.
        let first = unsafe { start.add(shift) };
        let frames = Frames { start: first, mapping: (start, length), places, waiting: 0 };
        // One page, from the last place to the first: whether this system does it at all.
        move_page(frames.place(places), first).then_some(frames)
    }

    /// Bytes that wait.
    pub fn waiting_bytes(&self) -> usize {
        self.waiting * HUGE_PAGE_BYTES
    }

    /// Sends the granule of a loan away, its bytes lost, and keeps its pages where there is place.
    pub fn send_away(&mut self, loan: &mut Loan) {
        let Some(pages) = loan.huge_pages() else { return loan.send_away() };
        if self.waiting + pages.len() > self.places {
            return loan.send_away();
        }
        for page in pages {
            if move_page(page, self.place(self.waiting)) {
                self.waiting += 1;
            }
        }
        // What did not move goes back to the system.
        loan.send_away();
    }

    /// Puts memory behind the granule of a loan, waiting pages first. Its bytes are anything: they
    /// are to be overwritten whole.
    pub fn bring(&mut self, loan: &mut Loan) {
        loan.bring_anything();
        for page in loan.huge_pages().unwrap_or_default() {
            if self.waiting == 0 {
                return;
            }
            self.waiting -= 1;
            if !move_page(self.place(self.waiting), page) {
                self.waiting += 1;
                return;
            }
        }
    }

    /// Gives pages back to the system until at most `bytes` wait.
    pub fn keep(&mut self, bytes: usize) {
        let keep = (bytes / HUGE_PAGE_BYTES).min(self.waiting);
        let length = (self.waiting - keep) * HUGE_PAGE_BYTES;
        if length > 0 {
            // SAFETY: pages of our own mapping that no window looks at.
            unsafe { libc::madvise(self.place(keep).as_ptr().cast(), length, libc::MADV_DONTNEED) };
            self.waiting = keep;
        }
    }

    fn place(&self, nth: usize) -> NonNull<u8> {
        debug_assert!(nth <= self.places);
        // SAFETY: within the mapping, which has place for one more.
        unsafe { self.start.add(nth * HUGE_PAGE_BYTES) }
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        // SAFETY: our own mapping; what waits in it is nobody's.
        unsafe { libc::munmap(self.mapping.0.as_ptr().cast(), self.mapping.1) };
    }
}

#[cfg(target_os = "linux")]
fn most_mappings() -> Option<usize> {
    std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()
}

#[cfg(not(target_os = "linux"))]
fn most_mappings() -> Option<usize> {
    None
}

fn map(bytes: usize) -> Option<NonNull<u8>> {
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh anonymous mapping touches nothing that exists.
    let start =
        unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags | libc::MAP_NORESERVE, -1, 0) };
    if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
}

/// Moves what lies behind a huge page of addresses behind another, whose own is dropped; both stay mapped.
/// False where the system refuses, and nothing has changed.
#[cfg(target_os = "linux")]
fn move_page(from: NonNull<u8>, to: NonNull<u8>) -> bool {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // SAFETY: both are whole pages of mappings that this room owns and that nobody looks at: the caller
    // has the loan, or they wait here.
    let moved =
        unsafe { libc::mremap(from.as_ptr().cast(), HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, flags, to.as_ptr()) };
    moved != libc::MAP_FAILED
}

#[cfg(not(target_os = "linux"))]
fn move_page(_: NonNull<u8>, _: NonNull<u8>) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::{DType, Device, Region};

    #[test]
    fn pages_move_with_their_bytes_and_addresses_stay() {
        let (page, f32s) = (HUGE_PAGE_BYTES, HUGE_PAGE_BYTES / 4);
        let mut region = Region::reserve(Device::Cpu, 8 * page, 2 * page).unwrap();
        // Linux before 5.7 does not.
        let Some(mut frames) = Frames::new(3 * page, 8 * page) else { return };
        (0..2).for_each(|i| region.bring(i));
        region.view_mut(DType::F32, 0, 4 * f32s).f32().fill(2.5);
        // There is place for three pages: the second granule goes back to the system.
        (0..2).for_each(|i| frames.send_away(&mut region.lend(i)));
        assert_eq!((frames.waiting_bytes(), region.resident_bytes()), (2 * page, 0));
        frames.bring(&mut region.lend(2));
        assert_eq!(frames.waiting_bytes(), 0);
        assert!(region.view(DType::F32, 4 * f32s, 2 * f32s).f32().iter().all(|x| *x == 2.5));
        // Who left reads zeros when it comes without waiting pages.
        (0..2).for_each(|i| region.bring(i));
        assert!(region.view(DType::F32, 0, 4 * f32s).f32().iter().all(|x| *x == 0.0));
        frames.send_away(&mut region.lend(2));
        frames.keep(page);
        assert_eq!(frames.waiting_bytes(), page);
        frames.bring(&mut region.lend(3));
        assert_eq!(frames.waiting_bytes(), 0);
        region.view_mut(DType::F32, 6 * f32s, 2 * f32s).f32().fill(1.0);
    }

    #[test]
    fn small_pages_are_left_to_the_system() {
        let mut region = Region::reserve(Device::Cpu, 2 * 4096, 4096).unwrap();
        let Some(mut frames) = Frames::new(4 * HUGE_PAGE_BYTES, 2 * 4096) else { return };
        region.bring(0);
        region.view_mut(DType::F32, 0, 1024).f32().fill(1.0);
        frames.send_away(&mut region.lend(0));
        frames.bring(&mut region.lend(0));
        assert_eq!(frames.waiting_bytes(), 0);
        assert!(region.view(DType::F32, 0, 1024).f32().iter().all(|x| *x == 0.0));
        assert!(Frames::new(4 * HUGE_PAGE_BYTES, 1 << 50).is_none(), "more mappings than the system keeps");
    }
}
