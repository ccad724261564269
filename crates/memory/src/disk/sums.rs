//! A CRC32C of every page of the offload file, kept in memory: 4 bytes for 4096.
//!
//! Kept apart from the data they tell a lost or misplaced write from a good one, which a checksum
//! stored beside the data cannot. A page holds zeros until it is written.

use super::PAGE_BYTES;
use std::sync::atomic::{AtomicU32, Ordering};

/// One sum a page of the file.
pub(super) struct Sums(Box<[AtomicU32]>);

/// A page whose bytes are not the ones written.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// The page, counted in bytes from the start of the data checked.
    pub(super) at: usize,
    pub(super) found: u32,
    pub(super) want: u32,
}

impl Sums {
    /// Sums of a file of zeros.
    pub(super) fn of_zeros(file_bytes: u64) -> Sums {
        let zero = crc32c::crc32c(&[0; PAGE_BYTES]);
        let pages = file_bytes.div_ceil(PAGE_BYTES as u64);
        Sums((0..pages).map(|_| AtomicU32::new(zero)).collect())
    }

    /// Memory the sums take.
    pub(super) fn table_bytes(&self) -> usize {
        self.0.len() * size_of::<AtomicU32>()
    }

    fn pages(&self, file_offset: u64) -> &[AtomicU32] {
        &self.0[(file_offset / PAGE_BYTES as u64) as usize..]
    }

    /// Takes the sums of what is about to be written. Taken before the write, so that a write
    /// that fails half way leaves pages that no longer match: they can never be read as good.
    pub(super) fn record(&self, file_offset: u64, data: &[u8]) {
        for (page, sum) in data.chunks(PAGE_BYTES).zip(self.pages(file_offset)) {
            // The lock of the schedule orders a page's write before any read of it.
            sum.store(crc32c::crc32c(page), Ordering::Relaxed);
        }
    }

    /// Makes pages unreadable until they are written again: after a failed write nobody knows
    /// which of its bytes are old and which are new.
    pub(super) fn spoil(&self, file_offset: u64, len: usize) {
        for sum in &self.pages(file_offset)[..len.div_ceil(PAGE_BYTES)] {
            // The opposite of either candidate's sum matches neither.
            sum.store(!sum.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Compares what was read; the first page that differs.
    pub(super) fn check(&self, file_offset: u64, data: &[u8]) -> Result<(), Mismatch> {
        for (index, (page, sum)) in data.chunks(PAGE_BYTES).zip(self.pages(file_offset)).enumerate() {
            let (found, want) = (crc32c::crc32c(page), sum.load(Ordering::Relaxed));
            if found != want {
                return Err(Mismatch { at: index * PAGE_BYTES, found, want });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_names_its_page_and_fresh_pages_are_zeros() {
        let sums = Sums::of_zeros(4 * PAGE_BYTES as u64);
        assert_eq!(sums.table_bytes(), 16);
        assert_eq!(sums.check(0, &[0; 4 * PAGE_BYTES]), Ok(()));
        let mut data = vec![7; 2 * PAGE_BYTES];
        sums.record(PAGE_BYTES as u64, &data);
        assert_eq!(sums.check(PAGE_BYTES as u64, &data), Ok(()));
        sums.spoil(3 * PAGE_BYTES as u64, PAGE_BYTES);
        assert!(sums.check(3 * PAGE_BYTES as u64, &[0; PAGE_BYTES]).is_err());
        data[PAGE_BYTES + 9] ^= 1;
        assert_eq!(sums.check(PAGE_BYTES as u64, &data).unwrap_err().at, PAGE_BYTES);
    }
}
