//! Ranks as threads of one process: a rank lends its windows, the others read and write them in
//! place. `world` is who there is and what each does, `room` where a group meets, `seat` the
//! collectives of one member.

mod room;
mod seat;
mod world;

pub(crate) use seat::Seat;
pub use world::Rank;
pub(crate) use world::World;
