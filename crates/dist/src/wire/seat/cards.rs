//! Calls on device memory at a seat: numbered along with those on host memory, and told to one member each, so
//! that all are compared around the ring.

use super::Seat;
use crate::call::{Call, Op};
use crate::error::CommError;
use crate::wire::Office;
use crate::wire::frame::{ANNOUNCED, GRANTED, Header, INVITED};
use device::DType;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

impl Seat {
    /// World rank.
    pub(crate) fn rank(&self) -> usize {
        self.members.ranks[self.index]
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn office(&self) -> &Arc<Office> {
        &self.office
    }

    /// The next call of the group.
    pub(crate) fn open(&self, op: Op, what: (DType, usize), root: Option<usize>) -> Result<Call, CommError> {
        self.office.is_over()?;
        let number = self.numbers.collective.fetch_add(1, SeqCst);
        Ok(self.call(op, number, what, root))
    }

    /// The next call between this member and another.
    pub(crate) fn open_pair(&self, op: Op, what: (DType, usize), other: usize) -> Result<Call, CommError> {
        self.office.is_over()?;
        let numbers = if op == Op::Send { &self.numbers.sent } else { &self.numbers.received };
        let number = numbers[other].fetch_add(1, SeqCst);
        Ok(self.call(op, number, what, Some(other)))
    }

    /// Tells a member that we are in a call, and how many bytes it gets where sizes vary.
    pub(crate) fn announce(&self, call: &Call, to: usize, bytes: Option<u64>) {
        let words = bytes.map_or(Vec::new(), |bytes| bytes.to_le_bytes().to_vec());
        let header = Header::of(call, self.key, ANNOUNCED, words.len());
        self.office.say(self.members.ranks[to], &header, &words);
    }

    /// The call that a member told us it is in, where we are in `call`, and how many bytes we get.
    pub(crate) fn announced(&self, call: &Call, from: usize) -> Option<(Call, Option<u64>)> {
        let slot = self.slot(call, from, ANNOUNCED);
        let message = self.office.heard(&slot)?;
        let bytes = message.array.view().bytes().try_into().ok().map(u64::from_le_bytes);
        Some((message.header.call(self.members.clone()), bytes))
    }

    /// Tells a member by which id both move memory from us to it.
    pub(crate) fn invite(&self, to: usize, id: &[u8]) {
        let call = self.call(Op::Send, 0, (DType::U16, 0), Some(to));
        let header = Header::of(&call, self.key, INVITED, id.len());
        self.office.say(self.members.ranks[to], &header, id);
    }

    /// Waits for the id of a member, for as long as the run goes on.
    pub(crate) fn invitation(&self, from: usize) -> Result<Vec<u8>, CommError> {
        let call = self.call(Op::Receive, 0, (DType::U16, 0), Some(from));
        let message = self.office.hear(self.members.ranks[from], &self.slot(&call, from, INVITED))?;
        Ok(message.array.view().bytes().to_vec())
    }

    /// Tells a member that we take what it announced.
    pub(crate) fn grant(&self, call: &Call, to: usize) {
        self.office.say(self.members.ranks[to], &Header::of(call, self.key, GRANTED, 0), &[]);
    }

    /// Waits until a member takes what we announced, for as long as the run goes on.
    pub(crate) fn granted(&self, call: &Call, by: usize) -> Result<(), CommError> {
        self.office.hear(self.members.ranks[by], &self.slot(call, by, GRANTED)).map(drop)
    }

    fn slot(&self, call: &Call, from: usize, phase: u8) -> (usize, u64, bool, u64, u8, bool) {
        let pair = matches!(call.op, Op::Send | Op::Receive);
        (self.members.ranks[from], self.key, pair, call.number, phase, self.beside)
    }
}
