//! What can go wrong with the offload file, each naming the thing, the value and the remedy.

use super::Op;
use rustix::io::Errno;
use std::fmt;
use std::path::PathBuf;

/// Where in the offload file an operation was: its folder, the region, and the bytes in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Folder of the offload file.
    pub dir: PathBuf,
    /// Region by the name the layout gave it.
    pub region: String,
    /// First byte, counted from the region's start.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { dir, region, offset, len } = self;
        write!(f, "region `{region}`, {len} bytes at {offset}, of the offload file in {}", dir.display())
    }
}

/// Bytes as people read them, rounded: "24.0 GiB".
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let step = |(value, _), unit| (value / 1024.0, unit);
        if self.0 < 1024 {
            return write!(f, "{} bytes", self.0);
        }
        let units = UNITS.iter().take(self.0.ilog2() as usize / 10);
        let (value, unit) = units.fold((self.0 as f64, &""), step);
        write!(f, "{value:.1} {unit}")
    }
}

/// A failure of the disk tier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The folder cannot hold an offload file at all.
    #[error("cannot make an offload file in {}: {cause}; name a folder of a local drive that you may write", dir.display())]
    Open {
        /// The folder.
        dir: PathBuf,
        /// What the system said.
        cause: Errno,
    },
    /// The drive or the quota has less space than the run needs.
    #[error(
        "the offload file needs {} in {}, {} are free: {} are missing; \
         free that much, name a folder of another drive, or give the run more memory",
        Size(*need_bytes), dir.display(), Size(*free_bytes), Size(need_bytes.saturating_sub(*free_bytes))
    )]
    NoSpace {
        /// The folder.
        dir: PathBuf,
        /// Bytes of all regions.
        need_bytes: u64,
        /// Bytes free when the run asked.
        free_bytes: u64,
    },
    /// A limit on the size of files is lower than the run needs.
    #[error(
        "the offload file needs {}, this process may write files of {}; \
         raise the limit (`ulimit -f unlimited`)",
        Size(*need_bytes), Size(*limit_bytes)
    )]
    FileLimit {
        /// Bytes of all regions.
        need_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// Reserving failed for another reason.
    #[error("cannot reserve {} in {}: {cause}; name a folder of a healthy local drive", Size(*need_bytes), dir.display())]
    Reserve {
        /// The folder.
        dir: PathBuf,
        /// Bytes of all regions.
        need_bytes: u64,
        /// What the system said.
        cause: Errno,
    },
    /// No thread could be started for the transfers.
    #[error("cannot start a thread for the offload file: {cause}; raise the limit on threads (`ulimit -u`)")]
    Thread {
        /// What the system said.
        cause: String,
    },
    /// No memory for the blocks of a measurement.
    #[error("cannot measure the drive: {refused}")]
    Memory {
        /// What the system refused.
        refused: device::OutOfMemory,
    },
    /// A request that no layout allows: a bug of the caller, told instead of done.
    #[error("{place}: refused: {why}")]
    Refused {
        /// What was asked for.
        place: Place,
        /// The rule it breaks.
        why: &'static str,
    },
    /// The drive failed an operation.
    #[error(
        "{op} of {place} failed: {cause}; go on from the last checkpoint, on another drive if it happens again"
    )]
    Io {
        /// Read or write.
        op: Op,
        /// Where.
        place: Place,
        /// What the system said.
        cause: Errno,
    },
    /// Reserved space was not enough: a thin or compressed volume ran full, or a quota did.
    #[error(
        "write of {place} failed: the drive or the quota is full although space was reserved; free space, then go on"
    )]
    Full {
        /// Where.
        place: Place,
    },
    /// The file ends before the region does.
    #[error(
        "{op} of {place} found the end of the file: another program cut it short; go on from the last checkpoint"
    )]
    Truncated {
        /// Read or write.
        op: Op,
        /// Where.
        place: Place,
    },
    /// The drive gave other bytes than were written.
    #[error(
        "read of {place}: checksum {found:08x} where {want:08x} was written, the bytes are damaged or stale; \
         go on from the last checkpoint, on another drive if it happens again"
    )]
    Damaged {
        /// The page of 4096 bytes.
        place: Place,
        /// CRC32C of what was read.
        found: u32,
        /// CRC32C of what was written.
        want: u32,
    },
    /// The offload file was closed before the request was served.
    #[error("the offload file was closed before the request was served")]
    Closed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        let sizes = [0, 1023, 1024, 24 << 30, u64::MAX].map(|bytes| Size(bytes).to_string());
        assert_eq!(sizes, ["0 bytes", "1023 bytes", "1.0 KiB", "24.0 GiB", "16.0 EiB"]);
    }
}
