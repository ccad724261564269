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
}

impl Post {
    /// Returns when the bytes may be written again. `WouldBlock` when `limit` has passed.
    pub(super) fn send(&self, to: usize, header: &Header, bytes: &[u8], limit: Duration) -> io::Result<()> {
        match self {
            Post::Sockets(sockets) => sockets.send(to, header, bytes, limit),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Post::Sockets(_) => "sockets",
        }
    }

    /// Everything was sent.
    pub(super) fn close(&self, _office: &Office) {
        match self {
            Post::Sockets(sockets) => sockets.close(),
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

    /// Bytes of arrays that really crossed between processes so far: (sent, received).
    pub fn payload_bytes(&self) -> (u64, u64) {
        self.office.payload_bytes()
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
