//! Who carries messages between processes.

use super::frame::Header;
use super::office::Office;
use super::seat::Seat;
use super::sockets::Sockets;
use crate::CommError;
use crate::call::{Members, Place};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Carries messages to other ranks and delivers theirs to the office.
pub(super) enum Post {
    /// Processes of one machine.
    Sockets(Sockets),
    /// Processes that an MPI launcher started, on any number of machines.
    #[cfg(feature = "mpi")]
    Mpi(super::mpi::Mpi),
}

impl Post {
    /// Returns when the bytes may be written again. `WouldBlock` when `limit` has passed.
    pub(super) fn send(&self, to: usize, header: &Header, bytes: &[u8], limit: Duration) -> io::Result<()> {
        match self {
            Post::Sockets(sockets) => sockets.send(to, header, bytes, limit),
            #[cfg(feature = "mpi")]
            Post::Mpi(mpi) => mpi.send(to, header, bytes, limit),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Post::Sockets(_) => "sockets",
            #[cfg(feature = "mpi")]
            Post::Mpi(_) => "mpi",
        }
    }

    /// Everything was sent, whether or not the run has failed.
    pub(super) fn close(&self, failed: bool) {
        match self {
            Post::Sockets(sockets) => {
                let _ = failed;
                sockets.close();
            }
            #[cfg(feature = "mpi")]
            Post::Mpi(mpi) => mpi.close(failed),
        }
    }
}

/// One rank of a run whose ranks are processes.
#[derive(Clone)]
pub struct Process {
    office: Arc<Office>,
}

impl Process {
    /// Rank `rank` of `ranks` processes of this machine that meet in `folder`, which belongs to this
    /// run alone and which nobody else may enter. Waits for all of them, at most `deadline`, which is
    /// then also the longest time a rank waits for another in one call.
    pub fn join(folder: &Path, rank: usize, ranks: usize, deadline: Duration) -> Result<Process, CommError> {
        let office = super::sockets::join(folder, (rank, ranks), deadline)?;
        Ok(Process { office })
    }

    /// The rank that the MPI launcher made this process; at most once in a process.
    #[cfg(feature = "mpi")]
    pub fn over_mpi(deadline: Duration) -> Result<Process, CommError> {
        Ok(Process { office: super::mpi::join(deadline)? })
    }

    /// The same rank with another deadline of its calls.
    pub fn with_deadline(self, deadline: Duration) -> Process {
        self.office.set_deadline(deadline);
        self
    }

    /// This rank makes no more calls: its work is done, or failed for this reason and ends the run on
    /// every rank. Returns when the work of every rank is done, or with what ended the run.
    pub fn end(&self, failure: Option<String>) -> Result<(), CommError> {
        self.office.end(failure)
    }

    /// What ended the run, as soon as something has, also while this rank computes; nothing after
    /// `at_most`.
    pub fn failure_within(&self, at_most: Duration) -> Option<CommError> {
        self.office.failure_within(at_most)
    }

    /// Bytes of arrays that really crossed between processes so far: (sent, received).
    pub fn payload_bytes(&self) -> (u64, u64) {
        self.office.payload_bytes()
    }

    pub(crate) fn office(&self) -> &Arc<Office> {
        &self.office
    }

    pub(crate) fn carrier(&self) -> &'static str {
        self.office.carrier()
    }

    pub(crate) fn rank(&self) -> usize {
        self.office.rank()
    }

    pub(crate) fn world_size(&self) -> usize {
        self.office.world_size()
    }

    pub(crate) fn place(&self) -> Arc<Place> {
        self.office.place().clone()
    }

    pub(crate) fn seat(&self, members: Arc<Members>, index: usize, beside: bool) -> Seat {
        Seat::new(self.office.clone(), members, index, beside)
    }
}
