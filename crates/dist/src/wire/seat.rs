//! The collectives of one member of a group of processes. Every rank sends each other rank exactly
//! what it needs and sums in the order of members itself, so the bits are those of threads.

mod cards;

use super::frame::Header;
use super::office::Office;
use crate::beside::Array;
use crate::call::{Call, Members, Op};
use crate::error::CommError;
use crate::traffic::piece;
use device::{DType, View, ViewMut};
use kernels::rank_sum::{Part, rank_sum};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// One member's place in its group.
#[derive(Clone)]
pub(crate) struct Seat {
    office: Arc<Office>,
    members: Arc<Members>,
    key: u64,
    index: usize,
    beside: bool,
    numbers: Arc<Numbers>,
}

/// Numbers of the next calls.
struct Numbers {
    collective: AtomicU64,
    sent: Vec<AtomicU64>,
    received: Vec<AtomicU64>,
}

impl Seat {
    pub(crate) fn new(office: Arc<Office>, members: Arc<Members>, index: usize, beside: bool) -> Seat {
        let zeros = || members.ranks.iter().map(|_| AtomicU64::new(0)).collect();
        let numbers = Arc::new(Numbers { collective: AtomicU64::new(0), sent: zeros(), received: zeros() });
        let key = office.enroll(&members);
        Seat { office, members, key, index, beside, numbers }
    }

    pub(crate) fn is_beside(&self) -> bool {
        self.beside
    }

    /// Everybody gets the pieces it sums, then everybody gets the sums.
    pub(crate) fn all_reduce_sum(&self, mut data: ViewMut<'_>) -> Result<(), CommError> {
        let (dtype, len) = (data.dtype(), data.len());
        self.collective(Op::AllReduce, (dtype, len), None, |call| {
            let of = |member: usize| piece(len, self.size(), member);
            for to in self.others() {
                let theirs = data.as_view().narrow(of(to).start, of(to).len());
                self.send(call, to, 0, theirs.bytes())?;
            }
            let own = of(self.index);
            let pieces = self.take_all(call, own.len() * dtype.size_bytes())?;
            self.sum(&pieces, dtype, data.reborrow().narrow(own.start, own.len()));
            for to in self.others() {
                self.send(call, to, 1, data.as_view().narrow(own.start, own.len()).bytes())?;
            }
            for from in self.others() {
                let theirs = self.take(call, from, (1, of(from).len() * dtype.size_bytes()))?;
                let target = data.reborrow().narrow(of(from).start, of(from).len());
                target.bytes().copy_from_slice(theirs.view().bytes());
            }
            Ok(())
        })
    }

    pub(crate) fn all_gather(&self, mine: View<'_>, out: ViewMut<'_>) -> Result<(), CommError> {
        self.collective(Op::AllGather, (mine.dtype(), mine.len()), None, |call| {
            for to in self.others() {
                self.send(call, to, 0, mine.bytes())?;
            }
            let mut rest = out;
            for member in 0..self.size() {
                let (target, more) = rest.split_at(mine.len());
                match member == self.index {
                    true => target.bytes().copy_from_slice(mine.bytes()),
                    false => target
                        .bytes()
                        .copy_from_slice(self.take(call, member, (0, mine.bytes().len()))?.view().bytes()),
                }
                rest = more;
            }
            Ok(())
        })
    }

    pub(crate) fn reduce_scatter_sum(&self, mine: View<'_>, mut out: ViewMut<'_>) -> Result<(), CommError> {
        self.collective(Op::ReduceScatter, (mine.dtype(), mine.len()), None, |call| {
            let len = out.len();
            for to in self.others() {
                self.send(call, to, 0, mine.narrow(to * len, len).bytes())?;
            }
            let pieces = self.take_all(call, len * mine.dtype().size_bytes())?;
            out.reborrow().bytes().copy_from_slice(mine.narrow(self.index * len, len).bytes());
            self.sum(&pieces, mine.dtype(), out);
            Ok(())
        })
    }

    pub(crate) fn all_gather_within(&self, mut data: ViewMut<'_>) -> Result<(), CommError> {
        let (dtype, len) = (data.dtype(), data.len() / self.size());
        self.collective(Op::AllGather, (dtype, len), None, |call| {
            for to in self.others() {
                self.send(call, to, 0, data.as_view().narrow(self.index * len, len).bytes())?;
            }
            for from in self.others() {
                let theirs = self.take(call, from, (0, len * dtype.size_bytes()))?;
                let target = data.reborrow().narrow(from * len, len);
                target.bytes().copy_from_slice(theirs.view().bytes());
            }
            Ok(())
        })
    }

    pub(crate) fn reduce_scatter_sum_within(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        let (dtype, len) = (data.dtype(), data.len() / self.size());
        self.collective(Op::ReduceScatter, (dtype, data.len()), None, |call| {
            for to in self.others() {
                self.send(call, to, 0, data.as_view().narrow(to * len, len).bytes())?;
            }
            let pieces = self.take_all(call, len * dtype.size_bytes())?;
            self.sum(&pieces, dtype, data.narrow(self.index * len, len));
            Ok(())
        })
    }

    pub(crate) fn broadcast(&self, data: ViewMut<'_>, root: usize) -> Result<(), CommError> {
        self.collective(Op::Broadcast, (data.dtype(), data.len()), Some(root), |call| {
            if self.index == root {
                return self.others().try_for_each(|to| self.send(call, to, 0, data.as_view().bytes()));
            }
            let theirs = self.take(call, root, (0, call.bytes as usize))?;
            data.bytes().copy_from_slice(theirs.view().bytes());
            Ok(())
        })
    }

    pub(crate) fn reduce_sum(&self, data: ViewMut<'_>, root: usize) -> Result<(), CommError> {
        let dtype = data.dtype();
        self.collective(Op::Reduce, (dtype, data.len()), Some(root), |call| {
            if self.index != root {
                return self.send(call, root, 0, data.as_view().bytes());
            }
            let pieces = self.take_all(call, call.bytes as usize)?;
            self.sum(&pieces, dtype, data);
            Ok(())
        })
    }

    pub(crate) fn all_to_all(
        &self,
        (mine, send): (View<'_>, &[usize]),
        (out, receive): (ViewMut<'_>, &[usize]),
    ) -> Result<(), CommError> {
        self.collective(Op::AllToAll, (mine.dtype(), 0), None, |call| {
            let start = |member: usize| send[..member].iter().sum::<usize>();
            for to in self.others() {
                self.send(call, to, 0, mine.narrow(start(to), send[to]).bytes())?;
            }
            let mut rest = out;
            for (member, len) in receive.iter().enumerate() {
                let (target, more) = rest.split_at(*len);
                rest = more;
                if member == self.index {
                    target.bytes().copy_from_slice(mine.narrow(start(member), *len).bytes());
                    continue;
                }
                let theirs = self.take(call, member, (0, 0))?;
                let (got, want) = (theirs.view().bytes().len(), target.len() * target.dtype().size_bytes());
                if got != want {
                    let (axes, ranks) = (self.members.axes.clone(), self.size());
                    let problem =
                        format!("member {member} sends {got} bytes, member {} expects {want}", self.index);
                    let op = Op::AllToAll.name();
                    return Err(self.office.fail(CommError::Argument { op, axes, ranks, problem }));
                }
                target.bytes().copy_from_slice(theirs.view().bytes());
            }
            Ok(())
        })
    }

    pub(crate) fn barrier(&self) -> Result<(), CommError> {
        self.collective(Op::Barrier, (DType::U16, 0), None, |call| {
            self.others().try_for_each(|to| self.send(call, to, 0, &[]))?;
            self.others().try_for_each(|from| self.take(call, from, (0, 0)).map(drop))
        })
    }

    pub(crate) fn send_to(&self, data: View<'_>, to: usize) -> Result<(), CommError> {
        let number = self.numbers.sent[to].fetch_add(1, SeqCst);
        let call = self.call(Op::Send, number, (data.dtype(), data.len()), Some(to));
        self.during(call, |call| self.send(call, to, 0, data.bytes()))
    }

    pub(crate) fn receive(&self, data: ViewMut<'_>, from: usize) -> Result<(), CommError> {
        let asked = (from, self.ask(from));
        let array = self.take_asked((data.dtype(), data.len()), asked)?;
        data.bytes().copy_from_slice(array.view().bytes());
        Ok(())
    }

    /// The number of the next message from a member, which is ours to take from now on.
    pub(crate) fn ask(&self, from: usize) -> u64 {
        self.numbers.received[from].fetch_add(1, SeqCst)
    }

    /// The message that we asked a member for.
    pub(crate) fn take_asked(
        &self,
        (dtype, len): (DType, usize),
        (from, number): (usize, u64),
    ) -> Result<Array, CommError> {
        let call = self.call(Op::Receive, number, (dtype, len), Some(from));
        let array = self.during(call, |call| self.take(call, from, (0, call.bytes as usize)))?;
        Ok(Array { buffer: array.buffer, dtype, len })
    }

    fn size(&self) -> usize {
        self.members.ranks.len()
    }

    /// The other members, the next one first: so not everybody sends to the same one.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (own, size) = (self.index, self.size());
        (1..size).map(move |step| (own + step) % size)
    }

    fn call(&self, op: Op, number: u64, (dtype, len): (DType, usize), root: Option<usize>) -> Call {
        let place = self.office.place();
        Call {
            op,
            number,
            bytes: (len * dtype.size_bytes()) as u64,
            dtype: (op != Op::Barrier).then_some(dtype),
            beside: self.beside,
            group: self.members.clone(),
            root: root.map(|root| self.members.ranks[root]),
            layer: place.layer(),
            step: place.step(),
        }
    }

    fn collective(
        &self,
        op: Op,
        what: (DType, usize),
        root: Option<usize>,
        body: impl FnOnce(&Call) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let number = self.numbers.collective.fetch_add(1, SeqCst);
        self.during(self.call(op, number, what, root), body)
    }

    /// Publishes the call while `body` runs.
    fn during<R>(
        &self,
        call: Call,
        body: impl FnOnce(&Call) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        self.office.check()?;
        self.office.enter(call.clone());
        let result = body(&call);
        if result.is_ok() {
            self.office.leave(self.beside);
        }
        result
    }

    fn send(&self, call: &Call, to: usize, phase: u8, bytes: &[u8]) -> Result<(), CommError> {
        let header = Header::of(call, self.key, phase, bytes.len());
        self.office.send(call, self.members.ranks[to], &header, bytes)
    }

    /// The part of `bytes` bytes that a member sends us; runs of an all-to-all may have others.
    fn take(&self, call: &Call, from: usize, (phase, bytes): (u8, usize)) -> Result<Array, CommError> {
        self.office.take(call, self.members.ranks[from], &Header::of(call, self.key, phase, bytes))
    }

    /// A part from every other member; nothing at our own place.
    fn take_all(&self, call: &Call, bytes: usize) -> Result<Vec<Option<Array>>, CommError> {
        (0..self.size())
            .map(|from| match from == self.index {
                true => Ok(None),
                false => self.take(call, from, (0, bytes)).map(Some),
            })
            .collect()
    }

    /// `own` becomes the sum of itself and the pieces, in the order of members.
    fn sum(&self, pieces: &[Option<Array>], dtype: DType, own: ViewMut<'_>) {
        let len = own.len();
        let mut own = Some(own);
        let mut parts: Vec<Part<'_>> = pieces
            .iter()
            .filter_map(|piece| match piece {
                Some(array) => Some(Part::Term(array.buffer.view(dtype, 0, len))),
                None => own.take().map(Part::TermAndSum),
            })
            .collect();
        rank_sum(&mut parts);
    }
}
