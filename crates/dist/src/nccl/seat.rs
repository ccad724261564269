//! The collectives of one member of a group of ranks with a GPU each. Calls on device memory are put on a
//! stream and return; those on host memory go over the host. Every rank sends each other rank exactly what it
//! needs and sums in the order of members itself.

use super::ledger::{Entry, Ledger};
use super::line::{Arriving, Line, Way};
use crate::beside::Array;
use crate::call::{Call, Members, Op};
use crate::error::CommError;
use crate::traffic::piece;
use crate::wire;
use device::cuda::{self, ID_BYTES, Leg, Stream, Team, UniqueId};
use device::{DType, Device, View, ViewMut};
use kernels::rank_sum::{Part, rank_sum};
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::{Arc, Mutex, PoisonError};

/// One member's place in its group.
#[derive(Clone)]
pub(crate) struct Seat {
    host: wire::Seat,
    ledger: Arc<Ledger>,
    members: Arc<Members>,
    index: usize,
    own: Arc<Own>,
}

/// What comes with the first call that needs it.
#[derive(Default)]
struct Own {
    team: Mutex<Option<Arc<dyn Team>>>,
    lines: Mutex<HashMap<Way, Line>>,
}

/// What members send us, and their places in it; none at our own.
struct Pieces {
    array: Array,
    len: usize,
    own: usize,
}

impl Pieces {
    fn new(dtype: DType, len: usize, (size, own): (usize, usize)) -> Result<Pieces, CommError> {
        Ok(Pieces { array: Array::new(Device::Cuda, dtype, (size - 1) * len)?, len, own })
    }

    fn place(&self, member: usize) -> usize {
        (member - usize::from(member > self.own)) * self.len
    }

    /// To be received into, in the order of the other members.
    fn legs(&mut self) -> Vec<Leg<'_>> {
        let (len, own) = (self.len, self.own);
        let count = self.array.len.checked_div(len).unwrap_or(0);
        let mut rest = Some(self.array.view_mut());
        let members = (0..).filter(|member| *member != own).take(count);
        members
            .filter_map(|member| {
                let (piece, more) = rest.take()?.split_at(len);
                rest = Some(more);
                Some(Leg::Receive(piece, member))
            })
            .collect()
    }

    /// The sum of all, with `mine` at our own place, goes where `sum` says.
    fn sum_with(&self, size: usize, mine: Part<'_>, sum: Option<ViewMut<'_>>) {
        let mut mine = Some(mine);
        let mut parts: Vec<Part<'_>> = (0..size)
            .filter_map(|member| match member == self.own {
                true => mine.take(),
                false => Some(Part::Term(self.array.view().narrow(self.place(member), self.len))),
            })
            .collect();
        parts.extend(sum.map(Part::Sum));
        if self.len > 0 {
            rank_sum(&mut parts);
        }
    }
}

impl Seat {
    pub(super) fn new(host: wire::Seat, ledger: Arc<Ledger>, members: Arc<Members>, index: usize) -> Seat {
        Seat { host, ledger, members, index, own: Arc::default() }
    }

    pub(crate) fn is_beside(&self) -> bool {
        self.host.is_beside()
    }

    /// The host's side, once all calls before were compared.
    pub(crate) fn host(&self) -> Result<&wire::Seat, CommError> {
        self.ledger.settle(self.is_beside())?;
        Ok(&self.host)
    }

    /// Where our calls run.
    pub(crate) fn stream(&self) -> Stream {
        if self.is_beside() { Stream::Peers(0) } else { Stream::Compute }
    }

    /// Everybody gets the pieces it sums, then everybody gets the sums.
    pub(crate) fn all_reduce_sum(&self, mut data: ViewMut<'_>) -> Result<(), CommError> {
        if data.device() == Device::Cpu {
            return self.host()?.all_reduce_sum(data);
        }
        let (dtype, len) = (data.dtype(), data.len());
        let of = |member: usize| piece(len, self.size(), member);
        let own = of(self.index);
        self.collective(Op::AllReduce, (dtype, len), None, |team, stream| {
            let mut pieces = Pieces::new(dtype, own.len(), (self.size(), self.index)).map_err(words)?;
            let mut legs = pieces.legs();
            legs.extend(
                self.others().map(|to| Leg::Send(data.as_view().narrow(of(to).start, of(to).len()), to)),
            );
            cuda::exchange(team, stream, &legs)?;
            drop(legs);
            let mine = data.reborrow().narrow(own.start, own.len());
            pieces.sum_with(self.size(), Part::TermAndSum(mine), None);
            if len.is_multiple_of(self.size()) {
                return cuda::all_gather(team, stream, (None, self.index), (&data, self.size()));
            }
            self.spread(team, stream, data)
        })
    }

    /// Everybody gets everybody's piece of an array whose pieces differ in length.
    fn spread(&self, team: &dyn Team, stream: Stream, data: ViewMut<'_>) -> Result<(), String> {
        let (len, mut rest) = (data.len(), Some(data));
        let mut pieces: Vec<(usize, ViewMut<'_>)> = (0..self.size())
            .filter_map(|member| {
                let (own, more) = rest.take()?.split_at(piece(len, self.size(), member).len());
                rest = Some(more);
                Some((member, own))
            })
            .collect();
        let (_, mine) = pieces.remove(self.index);
        let mut legs: Vec<Leg<'_>> = self.others().map(|to| Leg::Send(mine.as_view(), to)).collect();
        legs.extend(pieces.into_iter().map(|(from, piece)| Leg::Receive(piece, from)));
        cuda::exchange(team, stream, &legs)
    }

    pub(crate) fn all_gather(&self, mine: View<'_>, out: ViewMut<'_>) -> Result<(), CommError> {
        if mine.device() == Device::Cpu {
            return self.host()?.all_gather(mine, out);
        }
        self.collective(Op::AllGather, (mine.dtype(), mine.len()), None, |team, stream| {
            cuda::all_gather(team, stream, (Some(mine), self.index), (&out, self.size()))
        })
    }

    pub(crate) fn all_gather_within(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        if data.device() == Device::Cpu {
            return self.host()?.all_gather_within(data);
        }
        let what = (data.dtype(), data.len() / self.size());
        self.collective(Op::AllGather, what, None, |team, stream| {
            cuda::all_gather(team, stream, (None, self.index), (&data, self.size()))
        })
    }

    pub(crate) fn reduce_scatter_sum(&self, mine: View<'_>, out: ViewMut<'_>) -> Result<(), CommError> {
        if mine.device() == Device::Cpu {
            return self.host()?.reduce_scatter_sum(mine, out);
        }
        let (dtype, len) = (mine.dtype(), out.len());
        self.collective(Op::ReduceScatter, (dtype, mine.len()), None, |team, stream| {
            let pieces = self.scatter(team, stream, mine)?;
            let own = mine.narrow(self.index * len, len);
            pieces.sum_with(self.size(), Part::Term(own), Some(out));
            Ok(())
        })
    }

    pub(crate) fn reduce_scatter_sum_within(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        if data.device() == Device::Cpu {
            return self.host()?.reduce_scatter_sum_within(data);
        }
        let (dtype, len) = (data.dtype(), data.len() / self.size());
        self.collective(Op::ReduceScatter, (dtype, data.len()), None, |team, stream| {
            let pieces = self.scatter(team, stream, data.as_view())?;
            let own = data.narrow(self.index * len, len);
            pieces.sum_with(self.size(), Part::TermAndSum(own), None);
            Ok(())
        })
    }

    /// Everybody gets its piece of everybody's.
    fn scatter(&self, team: &dyn Team, stream: Stream, mine: View<'_>) -> Result<Pieces, String> {
        let len = mine.len() / self.size();
        let mut pieces = Pieces::new(mine.dtype(), len, (self.size(), self.index)).map_err(words)?;
        let mut legs = pieces.legs();
        legs.extend(self.others().map(|to| Leg::Send(mine.narrow(to * len, len), to)));
        cuda::exchange(team, stream, &legs)?;
        drop(legs);
        Ok(pieces)
    }

    pub(crate) fn broadcast(&self, data: ViewMut<'_>, root: usize) -> Result<(), CommError> {
        if data.device() == Device::Cpu {
            return self.host()?.broadcast(data, root);
        }
        self.collective(Op::Broadcast, (data.dtype(), data.len()), Some(root), |team, stream| {
            cuda::broadcast(team, stream, &data, root)
        })
    }

    pub(crate) fn reduce_sum(&self, data: ViewMut<'_>, root: usize) -> Result<(), CommError> {
        if data.device() == Device::Cpu {
            return self.host()?.reduce_sum(data, root);
        }
        let (dtype, len) = (data.dtype(), data.len());
        self.collective(Op::Reduce, (dtype, len), Some(root), |team, stream| {
            if self.index != root {
                return cuda::exchange(team, stream, &[Leg::Send(data.as_view(), root)]);
            }
            let mut pieces = Pieces::new(dtype, len, (self.size(), root)).map_err(words)?;
            cuda::exchange(team, stream, &pieces.legs())?;
            pieces.sum_with(self.size(), Part::TermAndSum(data), None);
            Ok(())
        })
    }

    pub(crate) fn all_to_all(
        &self,
        (mine, send): (View<'_>, &[usize]),
        (out, receive): (ViewMut<'_>, &[usize]),
    ) -> Result<(), CommError> {
        if mine.device() == Device::Cpu {
            return self.host()?.all_to_all((mine, send), (out, receive));
        }
        let team = self.team()?;
        let call = self.host.open(Op::AllToAll, (mine.dtype(), 0), None)?;
        let bytes = |len: usize| Some((len * mine.dtype().size_bytes()) as u64);
        self.others().for_each(|to| self.host.announce(&call, to, bytes(send[to])));
        let unheard = self.others().map(|from| (from, bytes(receive[from]))).collect();
        self.made(&call, unheard, |stream| {
            let start = |member: usize| send[..member].iter().sum::<usize>();
            let run = |member: usize| mine.narrow(start(member), send[member]);
            let (mut rest, mut legs) = (out, Vec::new());
            for (member, len) in receive.iter().enumerate() {
                let (target, more) = rest.split_at(*len);
                rest = more;
                match member == self.index {
                    true => device::copy(target, run(member)),
                    false => legs.push(Leg::Receive(target, member)),
                }
            }
            legs.extend(self.others().map(|to| Leg::Send(run(to), to)));
            cuda::exchange(&*team, stream, &legs)
        })
    }

    pub(crate) fn barrier(&self) -> Result<(), CommError> {
        self.host()?.barrier()
    }

    /// Around the ring of members.
    pub(crate) fn shift(&self, data: View<'_>, out: ViewMut<'_>) -> Result<(), CommError> {
        let (size, own) = (self.size(), self.index);
        let (to, from) = ((own + 1) % size, (own + size - 1) % size);
        let (team, what) = (self.team()?, (data.dtype(), data.len()));
        self.host.announce(&self.host.open_pair(Op::Send, what, to)?, to, None);
        let call = self.host.open_pair(Op::Receive, what, from)?;
        self.made(&call, vec![(from, None)], |stream| {
            cuda::exchange(&*team, stream, &[Leg::Send(data, to), Leg::Receive(out, from)])
        })
    }

    /// A copy of it is sent, so that neither side waits for the other.
    pub(crate) fn send(&self, data: View<'_>, to: usize) -> Result<(), CommError> {
        if data.device() == Device::Cpu {
            return self.host()?.send_to(data, to);
        }
        let mut array = Array::new(Device::Cuda, data.dtype(), data.len())?;
        device::copy(array.view_mut(), data);
        self.send_array(array, to)
    }

    pub(crate) fn receive(&self, data: ViewMut<'_>, from: usize) -> Result<(), CommError> {
        if data.device() == Device::Cpu {
            return self.host()?.receive(data, from);
        }
        let array = self.ask((data.dtype(), data.len()), from)?.finish()?;
        device::copy(data, array.view());
        Ok(())
    }

    /// Sends what nobody writes any more.
    pub(crate) fn send_array(&self, array: Array, to: usize) -> Result<(), CommError> {
        let call = self.host.open_pair(Op::Send, (array.dtype, array.len), to)?;
        self.host.announce(&call, to, None);
        self.over(Way::To(to), |line| line.send(&self.ledger, &self.host, array, call))
    }

    /// Asks for the next message of a member.
    pub(crate) fn ask(&self, (dtype, len): (DType, usize), from: usize) -> Result<Arriving, CommError> {
        let array = Array::new(Device::Cuda, dtype, len)?;
        let call = self.host.open_pair(Op::Receive, (dtype, len), from)?;
        self.over(Way::From(from), |line| line.receive(&self.ledger, &self.host, (array, from), call))
    }

    /// The host's side for messages, which are compared by themselves.
    pub(crate) fn letters(&self) -> &wire::Seat {
        &self.host
    }

    fn over<R>(&self, way: Way, body: impl FnOnce(&Line) -> Result<R, CommError>) -> Result<R, CommError> {
        let mut lines = self.own.lines.lock().unwrap_or_else(PoisonError::into_inner);
        match lines.entry(way) {
            Slot::Occupied(line) => body(line.get()),
            Slot::Vacant(slot) => body(slot.insert(Line::open(&self.host, &self.ledger, way)?)),
        }
    }

    fn size(&self) -> usize {
        self.members.ranks.len()
    }

    /// The other members in order.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.index;
        (0..self.members.ranks.len()).filter(move |member| *member != own)
    }

    /// Makes a call of the whole group, told to the next member and compared with the one before.
    fn collective(
        &self,
        op: Op,
        what: (DType, usize),
        root: Option<usize>,
        body: impl FnOnce(&dyn Team, Stream) -> Result<(), String>,
    ) -> Result<(), CommError> {
        let team = self.team()?;
        let (size, own) = (self.size(), self.index);
        let call = self.host.open(op, what, root)?;
        self.host.announce(&call, (own + 1) % size, None);
        self.made(&call, vec![((own + size - 1) % size, None)], |stream| body(&*team, stream))
    }

    fn made(
        &self,
        call: &Call,
        unheard: Vec<(usize, Option<u64>)>,
        body: impl FnOnce(Stream) -> Result<(), String>,
    ) -> Result<(), CommError> {
        let entry = Entry::new(&self.host, call, self.stream(), unheard);
        self.ledger.during(entry, |stream| cuda::on_stream(stream, || body(stream))).map(drop)
    }

    /// All members, who meet when the first call needs it; the first one invites.
    fn team(&self) -> Result<Arc<dyn Team>, CommError> {
        let mut team = self.own.team.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(team) = &*team {
            return Ok(team.clone());
        }
        let mut id = match self.index {
            0 => self.ledger.new_id()?,
            _ => UniqueId([0; ID_BYTES]),
        };
        self.host.broadcast(ViewMut::of_bytes(DType::U16, &mut id.0), 0)?;
        let joined = self.ledger.join(&id, self.index, self.size())?;
        let call = self.host.open(Op::Barrier, (DType::U16, 0), None)?;
        self.ledger.during(Entry::new(&self.host, &call, self.stream(), Vec::new()), |_| joined.meet())?;
        *team = Some(joined.clone());
        Ok(joined)
    }
}

fn words(error: CommError) -> String {
    error.to_string()
}
