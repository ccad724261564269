//! Memory of a GPU that is played: pages of the host. New memory is full of NaN, and what lies behind an
//! allocation cannot be touched, so that kernels which read or write what they should not are found.

use crate::cuda::driver::{Address, Frame};
use std::collections::{BTreeMap, HashMap};
use std::ptr::null_mut;

/// Bytes that frames are multiples of, as on GPUs there are.
pub(super) const GRANULE_BYTES: usize = 4 << 10;

/// Allocations begin at multiples, as on GPUs there are; up to as many bytes behind one are watched.
const ALIGN_BYTES: usize = 256;

const PAGE_BYTES: usize = 4096;

/// What new memory is full of.
const UNWRITTEN: u8 = 0xff;

/// Pages of the host that are behind an allocation.
struct Pages {
    first: Address,
    bytes: usize,
}

pub(super) struct Memory {
    total_bytes: usize,
    used_bytes: usize,
    allocations: HashMap<Address, Pages>,
    /// Bytes from each address on that can be used.
    spans: BTreeMap<Address, usize>,
    /// By number.
    frames: HashMap<u64, usize>,
    /// Holds the frames, each at the offset it is called by; never the same twice.
    file: libc::c_int,
    file_bytes: usize,
}

impl Memory {
    pub fn new(total_bytes: usize) -> Memory {
        // SAFETY: makes a file without name.
        let file = unsafe { libc::memfd_create(c"emulated".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(file >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        Memory {
            total_bytes,
            used_bytes: 0,
            allocations: HashMap::new(),
            spans: BTreeMap::new(),
            frames: HashMap::new(),
            file,
            file_bytes: 0,
        }
    }

    pub fn free_bytes(&self) -> usize {
        self.total_bytes - self.used_bytes
    }

    /// Whether all of it can be used.
    pub fn holds(&self, at: Address, bytes: usize) -> bool {
        let (mut at, end) = (at, at + bytes as u64);
        while at < end {
            match self.spans.range(..=at).next_back() {
                Some((first, bytes)) if at < first + *bytes as u64 => at = first + *bytes as u64,
                _ => return false,
            }
        }
        true
    }

    fn take(&mut self, bytes: usize) -> bool {
        let fits = bytes <= self.free_bytes();
        self.used_bytes += if fits { bytes } else { 0 };
        fits
    }

    pub fn allocate(&mut self, bytes: usize) -> Option<Address> {
        let counted = bytes.max(1).next_multiple_of(ALIGN_BYTES);
        if !self.take(counted) {
            return None;
        }
        let all = counted.next_multiple_of(PAGE_BYTES);
        let first = pages(null_mut(), all + PAGE_BYTES, libc::PROT_READ | libc::PROT_WRITE, 0, (-1, 0));
        let at = first + (all - counted) as u64;
        // SAFETY: pages that were just made: the last one is made unusable, the others are filled.
        unsafe {
            libc::mprotect((first + all as u64) as *mut _, PAGE_BYTES, libc::PROT_NONE);
            std::ptr::write_bytes(at as *mut u8, UNWRITTEN, counted);
        }
        self.spans.insert(at, bytes);
        self.allocations.insert(at, Pages { first, bytes: all + PAGE_BYTES });
        Some(at)
    }

    pub fn release(&mut self, at: Address) {
        let pages = self.allocations.remove(&at).unwrap_or_else(|| panic!("{at:#x} was not allocated"));
        let bytes = self.spans.remove(&at).expect("an allocation can be used");
        let counted = bytes.max(1).next_multiple_of(ALIGN_BYTES);
        // SAFETY: the rest of the last bytes that were allocated.
        let behind =
            unsafe { std::slice::from_raw_parts((at as usize + bytes) as *const u8, counted - bytes) };
        assert!(
            behind.iter().all(|byte| *byte == UNWRITTEN),
            "a kernel wrote behind the {bytes} bytes at {at:#x}"
        );
        // SAFETY: the pages of the allocation, which nobody uses any more.
        unsafe { libc::munmap(pages.first as *mut _, pages.bytes) };
        self.used_bytes -= counted;
    }

    pub fn reserve(&mut self, bytes: usize) -> Option<Address> {
        assert!(bytes > 0 && bytes.is_multiple_of(GRANULE_BYTES), "{bytes} bytes of addresses");
        // Rounded up to a granule's boundary; what is left over at both ends goes.
        let first = pages(null_mut(), bytes + GRANULE_BYTES, libc::PROT_NONE, libc::MAP_NORESERVE, (-1, 0));
        let at = first.next_multiple_of(GRANULE_BYTES as u64);
        let before = (at - first) as usize;
        // SAFETY: pages that were just made.
        unsafe {
            if before > 0 {
                libc::munmap(first as *mut _, before);
            }
            libc::munmap((at + bytes as u64) as *mut _, GRANULE_BYTES - before);
        }
        Some(at)
    }

    pub fn unreserve(&mut self, at: Address, bytes: usize) {
        let mapped = self.spans.range(at..at + bytes as u64).next();
        assert!(mapped.is_none(), "a frame is still mapped at {:#x}", mapped.expect("seen").0);
        // SAFETY: addresses that were reserved, with nothing behind them.
        unsafe { libc::munmap(at as *mut _, bytes) };
    }

    pub fn create(&mut self, bytes: usize) -> Option<Frame> {
        assert!(bytes > 0 && bytes.is_multiple_of(GRANULE_BYTES), "a frame of {bytes} bytes");
        if !self.take(bytes) {
            return None;
        }
        let frame = Frame(self.file_bytes as u64);
        self.file_bytes += bytes;
        // SAFETY: the file is ours.
        let grown = unsafe { libc::ftruncate(self.file, self.file_bytes as libc::off_t) };
        assert_eq!(grown, 0, "ftruncate: {}", std::io::Error::last_os_error());
        self.frames.insert(frame.0, bytes);
        let at = self.pages_of(frame, null_mut(), bytes, 0);
        // SAFETY: pages that were just mapped, and are not any more thereafter.
        unsafe {
            std::ptr::write_bytes(at as *mut u8, UNWRITTEN, bytes);
            libc::munmap(at as *mut _, bytes);
        }
        Some(frame)
    }

    fn pages_of(&self, frame: Frame, at: *mut libc::c_void, bytes: usize, flags: libc::c_int) -> Address {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        pages(at, bytes, access, flags, (self.file, frame.0 as libc::off_t))
    }

    pub fn destroy(&mut self, frame: Frame) {
        let bytes = self.frames.remove(&frame.0).unwrap_or_else(|| panic!("{frame:?} was not created"));
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the file is ours, and this part of it a frame's that is mapped nowhere, by contract.
        unsafe { libc::fallocate(self.file, hole, frame.0 as libc::off_t, bytes as libc::off_t) };
        self.used_bytes -= bytes;
    }

    pub fn map(&mut self, at: Address, frame: Frame, bytes: usize) {
        assert_eq!(self.frames.get(&frame.0), Some(&bytes), "{frame:?} is mapped as {bytes} bytes");
        let taken = self.spans.range(..at + bytes as u64).next_back();
        assert!(taken.is_none_or(|(first, bytes)| first + *bytes as u64 <= at), "{at:#x} is mapped already");
        self.pages_of(frame, at as *mut _, bytes, libc::MAP_FIXED);
        self.spans.insert(at, bytes);
    }

    pub fn unmap(&mut self, at: Address, bytes: usize) {
        assert_eq!(self.spans.remove(&at), Some(bytes), "{at:#x} is unmapped");
        pages(at as *mut _, bytes, libc::PROT_NONE, libc::MAP_FIXED | libc::MAP_NORESERVE, (-1, 0));
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours, and mappings of it stay.
        unsafe { libc::close(self.file) };
    }
}

/// Pages of a file, or of none, at `at` if the flags say so.
fn pages(
    at: *mut libc::c_void,
    bytes: usize,
    access: libc::c_int,
    flags: libc::c_int,
    (file, offset): (libc::c_int, libc::off_t),
) -> Address {
    let kind = if file < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    // SAFETY: new pages, or in place of pages that we have reserved.
    let at = unsafe { libc::mmap(at, bytes, access, kind | flags, file, offset) };
    assert!(at != libc::MAP_FAILED, "mmap of {bytes} bytes: {}", std::io::Error::last_os_error());
    at as Address
}
