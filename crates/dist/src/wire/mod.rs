//! Ranks as processes: the same collectives over messages. `frame` is what a message looks like,
//! `post` who carries it (`sockets`, `mpi`), `office` what a rank knows of the others and how it ends
//! a run, `seat` the collectives of one member.

mod frame;
#[cfg(feature = "mpi")]
mod mpi;
mod office;
mod post;
mod seat;
mod sockets;

pub(crate) use office::Office;
pub use post::Process;
pub(crate) use seat::Seat;
