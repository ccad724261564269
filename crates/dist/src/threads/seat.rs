//! The collectives of one member of a group of threads. Each byte moves once: readers read in the
//! lender's memory, sums are written where they are wanted.
//!
//! A collective is two meetings: after the first everything is lent, after the second nobody looks
//! any more. What no rank lends, because it failed, ends the run.

use super::room::{LETTERS, Letter, Room};
use super::world::{World, lock};
use crate::beside::Array;
use crate::call::{Call, Members, Op};
use crate::error::CommError;
use crate::traffic::piece;
use device::{Borrowed, DType, Device, Exclusive, View, ViewMut};
use kernels::rank_sum::{Part, rank_sum};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

/// One member's place in the room of its group.
#[derive(Clone)]
pub(crate) struct Seat {
    pub(super) world: Arc<World>,
    pub(super) room: Arc<Room>,
    pub(super) members: Arc<Members>,
    pub(super) index: usize,
    /// Whether its calls run beside computation.
    pub(super) beside: bool,
}

impl Seat {
    pub(crate) fn is_beside(&self) -> bool {
        self.beside
    }

    /// In place and in one pass: member i sums piece i of everybody and writes it to everybody.
    pub(crate) fn all_reduce_sum(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        let call = self.call(Op::AllReduce, (data.dtype(), data.len()), None);
        let pieces = self.cut(data);
        self.lending(call, &[], pieces, || {
            let guards = self.borrow_all();
            let mut pieces = guards
                .iter()
                .map(|guard| guard.exclusive(self.index).ok_or_else(|| self.withdrawn()))
                .collect::<Result<Vec<Exclusive<'_>>, _>>()?;
            let mut parts: Vec<Part<'_>> =
                pieces.iter_mut().map(|piece| Part::TermAndSum(piece.view())).collect();
            rank_sum(&mut parts);
            Ok(())
        })
    }

    pub(crate) fn all_gather(&self, mine: View<'_>, out: ViewMut<'_>) -> Result<(), CommError> {
        let call = self.call(Op::AllGather, (mine.dtype(), mine.len()), None);
        self.lending(call, &[mine], Vec::new(), || {
            let mut rest = out;
            for guard in self.borrow_all() {
                let theirs = guard.shared(0).ok_or_else(|| self.withdrawn())?;
                let (piece, more) = rest.split_at(theirs.len());
                piece.bytes().copy_from_slice(theirs.bytes());
                rest = more;
            }
            Ok(())
        })
    }

    /// The first member has the array, everybody writes its piece, and at a third meeting handles of it
    /// were given out. Ranks of one process share a GPU and its order of launches, so that it may lie there.
    pub(crate) fn all_gather_shared(&self, mine: View<'_>) -> Result<Array, CommError> {
        let (dtype, len) = (mine.dtype(), mine.len() * self.members.ranks.len());
        let call = self.call(Op::AllGather, (dtype, mine.len()), None);
        let mut whole = if self.index == 0 { Some(Array::new(mine.device(), dtype, len)?) } else { None };
        self.during(call, |call| {
            let pieces = whole.as_mut().map_or_else(Vec::new, |whole| self.cut(whole.view_mut()));
            self.room.loans[self.index].lend(&[], pieces, || {
                self.meet(call, true)?;
                {
                    let guard = self.room.loans[0].borrow();
                    let mut piece = guard.exclusive(self.index).ok_or_else(|| self.withdrawn())?;
                    device::copy(piece.view(), mine);
                }
                self.meet(call, false)
            })?;
            if let Some(whole) = &whole {
                self.others().for_each(|to| *lock(&self.room.members[to].handed) = Some(whole.clone()));
            }
            self.meet(call, false)?;
            let handed = || lock(&self.room.members[self.index].handed).take();
            whole.or_else(handed).ok_or_else(|| self.withdrawn())
        })
    }

    pub(crate) fn reduce_scatter_sum(&self, mine: View<'_>, out: ViewMut<'_>) -> Result<(), CommError> {
        let call = self.call(Op::ReduceScatter, (mine.dtype(), mine.len()), None);
        self.lending(call, &[mine], Vec::new(), || {
            let guards = self.borrow_all();
            let mut parts = Vec::with_capacity(guards.len() + 1);
            for guard in &guards {
                let theirs = guard.shared(0).ok_or_else(|| self.withdrawn())?;
                parts.push(Part::Term(theirs.narrow(self.index * out.len(), out.len())));
            }
            parts.push(Part::Sum(out));
            rank_sum(&mut parts);
            Ok(())
        })
    }

    pub(crate) fn all_gather_within(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        let piece = data.len() / self.members.ranks.len();
        let call = self.call(Op::AllGather, (data.dtype(), piece), None);
        let mut pieces = self.cut(data);
        let mine = pieces.remove(self.index);
        self.lending(call, &[mine.as_view()], Vec::new(), || {
            for (member, piece) in self.others().zip(pieces) {
                let guard = self.room.loans[member].borrow();
                let theirs = guard.shared(0).ok_or_else(|| self.withdrawn())?;
                piece.bytes().copy_from_slice(theirs.bytes());
            }
            Ok(())
        })
    }

    /// Member i sums piece i of everybody where its own lies; the others' pieces are lent to be read.
    pub(crate) fn reduce_scatter_sum_within(&self, data: ViewMut<'_>) -> Result<(), CommError> {
        let call = self.call(Op::ReduceScatter, (data.dtype(), data.len()), None);
        let mut pieces = self.cut(data);
        let mut mine = pieces.remove(self.index);
        let lent: Vec<View<'_>> = pieces.iter().map(ViewMut::as_view).collect();
        self.lending(call, &lent, Vec::new(), || {
            let guards = self.borrow_all();
            let mut mine = Some(Part::TermAndSum(mine.reborrow()));
            let mut parts = Vec::with_capacity(guards.len());
            for (member, guard) in guards.iter().enumerate() {
                parts.push(match mine.take_if(|_| member == self.index) {
                    Some(part) => part,
                    // A member lends all pieces but its own.
                    None => {
                        let at = self.index - usize::from(self.index > member);
                        Part::Term(guard.shared(at).ok_or_else(|| self.withdrawn())?)
                    }
                });
            }
            rank_sum(&mut parts);
            Ok(())
        })
    }

    /// The other members in order.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.index;
        (0..self.members.ranks.len()).filter(move |member| *member != own)
    }

    pub(crate) fn broadcast(&self, data: ViewMut<'_>, root: usize) -> Result<(), CommError> {
        let call = self.call(Op::Broadcast, (data.dtype(), data.len()), Some(root));
        if self.index == root {
            return self.lending(call, &[data.as_view()], Vec::new(), || Ok(()));
        }
        self.lending(call, &[], Vec::new(), || {
            let guard = self.room.loans[root].borrow();
            let theirs = guard.shared(0).ok_or_else(|| self.withdrawn())?;
            data.bytes().copy_from_slice(theirs.bytes());
            Ok(())
        })
    }

    /// Member i sums piece i of everybody into the root's array.
    pub(crate) fn reduce_sum(&self, data: ViewMut<'_>, root: usize) -> Result<(), CommError> {
        let call = self.call(Op::Reduce, (data.dtype(), data.len()), Some(root));
        let own = piece(data.len(), self.members.ranks.len(), self.index);
        let sum = || {
            let guards = self.borrow_all();
            let mut target = guards[root].exclusive(self.index).ok_or_else(|| self.withdrawn())?;
            let mut target = Some(Part::TermAndSum(target.view()));
            let mut parts = Vec::with_capacity(guards.len());
            for (member, guard) in guards.iter().enumerate() {
                parts.push(match target.take_if(|_| member == root) {
                    Some(part) => part,
                    None => {
                        let theirs = guard.shared(0).ok_or_else(|| self.withdrawn())?;
                        Part::Term(theirs.narrow(own.start, own.len()))
                    }
                });
            }
            rank_sum(&mut parts);
            Ok(())
        };
        if self.index == root {
            let pieces = self.cut(data);
            return self.lending(call, &[], pieces, sum);
        }
        self.lending(call, &[data.as_view()], Vec::new(), sum)
    }

    pub(crate) fn all_to_all(
        &self,
        (mine, send): (View<'_>, &[usize]),
        (out, receive): (ViewMut<'_>, &[usize]),
    ) -> Result<(), CommError> {
        let mut start = 0;
        let runs: Vec<View<'_>> = send
            .iter()
            .map(|len| {
                start += len;
                mine.narrow(start - len, *len)
            })
            .collect();
        self.lending(self.call(Op::AllToAll, (mine.dtype(), 0), None), &runs, Vec::new(), || {
            let mut rest = out;
            for (member, guard) in self.borrow_all().iter().enumerate() {
                let theirs = guard.shared(self.index).ok_or_else(|| self.withdrawn())?;
                if (theirs.len(), theirs.dtype()) != (receive[member], rest.dtype()) {
                    let problem = format!(
                        "member {member} sends {} {}, member {} expects {} {}",
                        theirs.len(),
                        theirs.dtype(),
                        self.index,
                        receive[member],
                        rest.dtype()
                    );
                    return Err(self.refuse(Op::AllToAll, problem));
                }
                let (run, more) = rest.split_at(theirs.len());
                run.bytes().copy_from_slice(theirs.bytes());
                rest = more;
            }
            Ok(())
        })
    }

    pub(crate) fn barrier(&self) -> Result<(), CommError> {
        let call = Call { dtype: None, ..self.call(Op::Barrier, (DType::F32, 0), None) };
        self.during(call, |call| self.meet(call, true))
    }

    /// Copies into a letter, so that neither side waits for the other.
    pub(crate) fn send(&self, data: View<'_>, to: usize) -> Result<(), CommError> {
        self.post(Op::Send, Array::copied(Device::Cpu, data)?, to)
    }

    pub(crate) fn receive(&self, data: ViewMut<'_>, from: usize) -> Result<(), CommError> {
        let number = self.ask(from);
        let array = self.take(Op::Receive, (data.dtype(), data.len()), (from, number))?;
        data.bytes().copy_from_slice(array.view().bytes());
        Ok(())
    }

    /// Gives every other member a handle of `data`; no byte moves.
    pub(crate) fn post_handles(&self, data: &Array) -> Result<(), CommError> {
        self.others().try_for_each(|to| self.post(Op::Broadcast, data.clone(), to))
    }

    /// Gives one member a handle of `data`; no byte moves.
    pub(crate) fn post_handle(&self, data: Array, to: usize) -> Result<(), CommError> {
        self.post(Op::Send, data, to)
    }

    /// Gives a member a handle of `data`; no byte moves.
    pub(crate) fn post_letter(&self, data: Array, to: usize) -> Result<(), CommError> {
        self.post(Op::Send, data, to)
    }

    /// The letter that we asked a member for.
    pub(crate) fn take_letter(&self, what: (DType, usize), from: (usize, u64)) -> Result<Array, CommError> {
        self.take(Op::Receive, what, from)
    }

    /// The number of the next letter from a member, which is ours to take from now on.
    pub(crate) fn ask(&self, from: usize) -> u64 {
        let mut letters = lock(&self.room.members[self.index].letters[from]);
        letters.asked += 1;
        letters.asked - 1
    }

    /// The handle that we asked a member for.
    pub(crate) fn take_handle(
        &self,
        op: Op,
        what: (DType, usize),
        from: (usize, u64),
    ) -> Result<Array, CommError> {
        self.take(op, what, from)
    }

    fn post(&self, op: Op, array: Array, to: usize) -> Result<(), CommError> {
        let letters = &self.room.members[to].letters[self.index];
        let number = lock(letters).sent;
        let call = Call { number, ..self.call(Op::Send, (array.dtype, array.len), Some(to)) };
        self.during(call, |call| {
            self.wait(call, || lock(letters).waiting.len() < LETTERS)?;
            let mut letters = lock(letters);
            letters.sent += 1;
            letters.waiting.push_back(Letter { array, call: Call { op, ..call.clone() } });
            Ok(())
        })?;
        self.room.ring();
        Ok(())
    }

    fn take(
        &self,
        op: Op,
        (dtype, len): (DType, usize),
        (from, number): (usize, u64),
    ) -> Result<Array, CommError> {
        let letters = &self.room.members[self.index].letters[from];
        let at = || lock(letters).waiting.iter().position(|letter| letter.call.number == number);
        let call = Call { number, ..self.call(Op::Receive, (dtype, len), Some(from)) };
        let letter = self.during(call, |call| {
            self.wait(call, || at().is_some())?;
            let at = at().expect("waited for it, and nobody else takes it");
            let letter = lock(letters).waiting.remove(at).expect("found above");
            let is_broadcast = [op, letter.call.op].map(|op| op == Op::Broadcast);
            if (letter.array.dtype, letter.array.len) == (dtype, len) && is_broadcast[0] == is_broadcast[1] {
                return Ok(letter);
            }
            Err(self.world.fail(CommError::OutOfStep {
                rank: self.members.ranks[self.index],
                call: Box::new(Call { op, ..call.clone() }),
                other: self.members.ranks[from],
                other_call: Box::new(letter.call),
            }))
        })?;
        self.room.ring();
        Ok(letter.array)
    }

    fn call(&self, op: Op, (dtype, len): (DType, usize), root: Option<usize>) -> Call {
        let place = self.world.place(self.members.ranks[self.index]);
        Call {
            op,
            number: self.room.members[self.index].number.load(SeqCst),
            bytes: (len * dtype.size_bytes()) as u64,
            dtype: Some(dtype),
            beside: self.beside,
            group: self.members.clone(),
            root: root.map(|root| self.members.ranks[root]),
            layer: place.layer(),
            step: place.step(),
        }
    }

    /// Publishes the call while `body` runs.
    fn during<R>(
        &self,
        call: Call,
        body: impl FnOnce(&Call) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        self.world.check()?;
        let rank = self.members.ranks[self.index];
        self.world.enter(rank, call.clone());
        let result = body(&call);
        // A rank that failed stays where it was: that is what its last words should say.
        if result.is_ok() {
            self.world.leave(rank, self.beside);
        }
        result
    }

    /// Lends, lets `body` look at what the others lend, and takes back when all have looked.
    fn lending(
        &self,
        call: Call,
        shared: &[View<'_>],
        exclusive: Vec<ViewMut<'_>>,
        body: impl FnOnce() -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        self.during(call, |call| {
            self.room.loans[self.index].lend(shared, exclusive, || {
                self.meet(call, true)?;
                body()?;
                self.meet(call, false)
            })
        })
    }

    /// Waits until every member has come; the `first` meeting of a call compares the calls.
    fn meet(&self, call: &Call, first: bool) -> Result<(), CommError> {
        let room = &self.room;
        if first {
            let own = &room.members[self.index];
            own.number.fetch_add(1, SeqCst);
            *lock(&own.call) = Some(call.clone());
        }
        let check = || match room.odd_one().filter(|_| first) {
            None => Ok(()),
            Some((a, b)) => Err(self.world.fail(self.out_of_step(a, b))),
        };
        match room.arrive(check)? {
            None => Ok(()),
            Some(meeting) => self.wait(call, || room.meetings.load(SeqCst) > meeting),
        }
    }

    fn wait(&self, call: &Call, ready: impl Fn() -> bool) -> Result<(), CommError> {
        self.world.wait((self.members.ranks[self.index], call), &self.room.bell, ready)
    }

    fn out_of_step(&self, a: usize, b: usize) -> CommError {
        let call = |member: usize| lock(&self.room.members[member].call).clone().map(Box::new);
        match (call(b), call(a)) {
            (Some(call), Some(other_call)) => CommError::OutOfStep {
                rank: self.members.ranks[b],
                call,
                other: self.members.ranks[a],
                other_call,
            },
            _ => self.refuse(Op::Barrier, format!("members {a} and {b} met without a call")),
        }
    }

    fn refuse(&self, op: Op, problem: String) -> CommError {
        let (axes, ranks) = (self.members.axes.clone(), self.members.ranks.len());
        self.world.fail(CommError::Argument { op: op.name(), axes, ranks, problem })
    }

    /// What a member says that finds nothing lent after a meeting: the run is over.
    fn withdrawn(&self) -> CommError {
        match self.world.check() {
            Err(error) => error,
            Ok(()) => self.refuse(Op::Barrier, "a member lent nothing in a collective".to_string()),
        }
    }

    fn borrow_all(&self) -> Vec<Borrowed<'_>> {
        self.room.loans.iter().map(|loan| loan.borrow()).collect()
    }

    /// One window a member, in order.
    fn cut<'a>(&self, data: ViewMut<'a>) -> Vec<ViewMut<'a>> {
        let (len, members) = (data.len(), self.members.ranks.len());
        let mut rest = Some(data);
        (0..members)
            .filter_map(|member| {
                let (own, more) = rest.take()?.split_at(piece(len, members, member).len());
                rest = Some(more);
                Some(own)
            })
            .collect()
    }
}
