//! The offload file: reserved before the run, gone after it however it ends.
//!
//! The file has no name (`O_TMPFILE`, or unlinked the moment it exists), so the system frees it with
//! the process, also after a kill. A crash between creating and unlinking leaves a named file; the
//! next run in the folder sees that no one holds its lock and removes it.

use super::error::DiskError;
use super::faults::{Faults, Point};
use super::{Op, PAGE_BYTES};
use rustix::fs::{self, FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Files of runs begin so, where a file system needs names.
const PREFIX: &str = ".trilith-offload-";

/// Space on a drive, owned by this process.
pub(super) struct OffloadFile {
    fd: OwnedFd,
    pub(super) dir: PathBuf,
    /// Whether transfers go past the page cache.
    pub(super) direct: bool,
}

impl OffloadFile {
    /// Reserves `bytes`, all zeros, in `dir`.
    pub(super) fn create(dir: &Path, bytes: u64, faults: Option<&Faults>) -> Result<OffloadFile, DiskError> {
        let limit = getrlimit(Resource::Fsize).current;
        if let Some(limit_bytes) = limit.filter(|limit| *limit < bytes) {
            return Err(DiskError::FileLimit { need_bytes: bytes, limit_bytes });
        }
        let open_error = |cause| DiskError::Open { dir: dir.to_path_buf(), cause };
        remove_stale(dir).map_err(open_error)?;
        let fd = open_nameless(dir).map_err(open_error)?;
        reserve(&fd, bytes, faults).map_err(|cause| refused(dir, bytes, cause))?;
        let direct = go_direct(&fd, faults).map_err(open_error)?;
        Ok(OffloadFile { fd, dir: dir.to_path_buf(), direct })
    }

    /// One operation on whole pages, by the calling thread.
    pub(super) fn transfer(&self, op: Op, at: u64, data: &mut [u8]) -> Result<usize, Errno> {
        match op {
            Op::Read => rustix::io::pread(&self.fd, data, at),
            Op::Write => rustix::io::pwrite(&self.fd, data, at),
        }
    }
}

impl Drop for OffloadFile {
    fn drop(&mut self) {
        // The kernel puts a ring, and with it the file, away some time after it was closed; who
        // asks for space next must find it.
        fs::ftruncate(&self.fd, 0).ok();
    }
}

impl AsFd for OffloadFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn refused(dir: &Path, need_bytes: u64, cause: Errno) -> DiskError {
    let dir = dir.to_path_buf();
    match cause {
        Errno::NOSPC | Errno::DQUOT => {
            // A quota says less than the drive has: then nothing is known to be free.
            let free = fs::statvfs(&dir).map_or(0, |s| s.f_bavail * s.f_frsize);
            let free_bytes = if free < need_bytes { free } else { 0 };
            DiskError::NoSpace { dir, need_bytes, free_bytes }
        }
        cause => DiskError::Reserve { dir, need_bytes, cause },
    }
}

fn open_nameless(dir: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match fs::open(dir, flags | OFlags::TMPFILE, mode) {
        // The kernel or the file system knows no nameless files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) if dir.is_dir() => {
            open_unlinked(dir, flags, mode)
        }
        opened => opened,
    }
}

fn open_unlinked(dir: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let pid = std::process::id();
    for attempt in 0..100 {
        let path = dir.join(format!("{PREFIX}{pid}-{attempt}"));
        let fd = match fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Err(Errno::EXIST) => continue,
            opened => opened?,
        };
        // Held while we live. File systems without locks only lose the removal of stale files.
        fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).ok();
        match fs::unlink(&path) {
            Ok(()) | Err(Errno::NOENT) => return Ok(fd),
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EXIST)
}

/// Removes named offload files whose processes are gone: nobody holds their lock.
fn remove_stale(dir: &Path) -> Result<(), Errno> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    for entry in std::fs::read_dir(dir).map_err(errno)? {
        let Ok(entry) = entry else { continue };
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(file) = File::options().read(true).write(true).open(entry.path()) else { continue };
        if fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            std::fs::remove_file(entry.path()).ok();
        }
    }
    Ok(())
}

fn reserve(fd: &OwnedFd, bytes: u64, faults: Option<&Faults>) -> Result<(), Errno> {
    Faults::refuse(faults, Point::Reserve)?;
    loop {
        match fs::fallocate(fd, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return fill(fd, bytes),
            reserved => return reserved,
        }
    }
}

/// Reserves by writing zeros, where a file system cannot promise space.
fn fill(fd: &OwnedFd, bytes: u64) -> Result<(), Errno> {
    let zeros = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let len = zeros.len().min((bytes - at) as usize);
        match rustix::io::pwrite(fd, &zeros[..len], at) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => at += written as u64,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Turns the page cache off for this file; false where the file system cannot.
fn go_direct(fd: &OwnedFd, faults: Option<&Faults>) -> Result<bool, Errno> {
    let flags = fs::fcntl_getfl(fd)?;
    let asked =
        Faults::refuse(faults, Point::Direct).and_then(|()| fs::fcntl_setfl(fd, flags | OFlags::DIRECT));
    match asked {
        Ok(()) => {}
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(false),
        Err(error) => return Err(error),
    }
    // Some file systems take the flag and refuse the transfer.
    let mut page = Page([0; PAGE_BYTES]);
    match rustix::io::pread(fd, &mut page.0, 0) {
        Err(Errno::INVAL | Errno::OPNOTSUPP) => fs::fcntl_setfl(fd, flags).map(|()| false),
        Err(error) => Err(error),
        Ok(_) => Ok(true),
    }
}

#[repr(align(4096))]
struct Page([u8; PAGE_BYTES]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_files_go_and_files_in_use_stay() {
        let dir = tempfile::tempdir().unwrap();
        let [dead, alive, other] = [".trilith-offload-1-0", ".trilith-offload-2-0", "mine"];
        for name in [dead, alive, other] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        let held = File::open(dir.path().join(alive)).unwrap();
        fs::flock(&held, FlockOperation::LockExclusive).unwrap();
        let file = OffloadFile::create(dir.path(), PAGE_BYTES as u64, None).unwrap();
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(!dir.path().join(dead).exists());
        drop(file);
    }

    #[test]
    fn an_unlinked_file_is_as_good_as_a_nameless_one() {
        let dir = tempfile::tempdir().unwrap();
        let fd = open_unlinked(dir.path(), OFlags::RDWR, Mode::RUSR | Mode::WUSR).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        fill(&fd, 3 << 20).unwrap();
        assert_eq!(fs::fstat(&fd).unwrap().st_size, 3 << 20);
    }

    #[test]
    fn refusals_name_the_folder_and_the_bytes_missing() {
        let dir = tempfile::tempdir().unwrap();
        let need = 1 << 60;
        // ext4 answers EFBIG beyond its largest file, others ENOSPC: both are errors with a remedy.
        let error = OffloadFile::create(dir.path(), need, None).err().unwrap().to_string();
        assert!(error.contains("1.0 EiB") && error.contains("name a folder"), "{error}");
        let full = Faults::none().at(Point::Reserve, 0, super::super::faults::Fault::Errno(Errno::NOSPC));
        let error = OffloadFile::create(dir.path(), PAGE_BYTES as u64, Some(&full)).err().unwrap();
        assert!(matches!(error, DiskError::NoSpace { need_bytes: 4096, .. }), "{error}");
        let absent = OffloadFile::create(&dir.path().join("absent"), 1, None).err().unwrap().to_string();
        assert!(absent.contains("cannot make an offload file in") && absent.contains("absent"), "{absent}");
    }
}
