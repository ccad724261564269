//! Messages between processes: a header of fixed size, then the bytes it announces.

use crate::call::{Call, Members, Op};
use crate::error::LastSeen;
use device::DType;
use std::sync::Arc;

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 64;
/// Phases of words about a call, which are no part of it: which call a rank is in, an id to meet by, and that what was
/// announced is awaited.
pub(super) const ANNOUNCED: u8 = 7;
pub(super) const INVITED: u8 = 6;
pub(super) const GRANTED: u8 = 5;
const MAGIC: u32 = 0x7472_6c33;

/// What a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Part of a call.
    Data,
    /// The sender found a reason to end the run, in the bytes; the judge decides.
    Propose,
    /// The run is over; the bytes say why.
    Failed,
    /// The sender makes no more calls.
    Ended,
    /// What are you doing?
    Ask,
    /// This.
    Answer,
}

const KINDS: [Kind; 6] = [Kind::Data, Kind::Propose, Kind::Failed, Kind::Ended, Kind::Ask, Kind::Answer];
const OPS: [Op; 9] = [
    Op::AllReduce,
    Op::AllGather,
    Op::ReduceScatter,
    Op::Broadcast,
    Op::Reduce,
    Op::AllToAll,
    Op::Send,
    Op::Receive,
    Op::Barrier,
];
const DTYPES: [DType; 5] = [DType::F32, DType::Bf16, DType::F16, DType::U32, DType::U16];

/// Everything about a message but its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) op: Op,
    pub(super) dtype: Option<DType>,
    pub(super) beside: bool,
    /// Which message of its call.
    pub(super) phase: u8,
    /// Of the group, by name and members.
    pub(super) group: u64,
    pub(super) number: u64,
    /// Bytes all ranks agree on.
    pub(super) bytes: u64,
    /// Bytes that follow.
    pub(super) payload: u64,
    pub(super) step: u64,
    pub(super) layer: Option<u32>,
    pub(super) root: Option<usize>,
}

impl Header {
    /// Of a message that is no part of a call.
    pub(super) fn control(kind: Kind, payload: usize) -> Header {
        Header {
            kind,
            op: Op::Barrier,
            dtype: None,
            beside: false,
            phase: 0,
            group: 0,
            number: 0,
            bytes: 0,
            payload: payload as u64,
            step: 0,
            layer: None,
            root: None,
        }
    }

    pub(super) fn of(call: &Call, group: u64, phase: u8, payload: usize) -> Header {
        Header {
            kind: Kind::Data,
            op: call.op,
            dtype: call.dtype,
            beside: call.beside,
            phase,
            group,
            number: call.number,
            bytes: call.bytes,
            payload: payload as u64,
            step: call.step,
            layer: call.layer,
            root: call.root,
        }
    }

    /// The call it is part of, made by a member of `group`.
    pub(super) fn call(&self, group: Arc<Members>) -> Call {
        Call {
            op: self.op,
            number: self.number,
            bytes: self.bytes,
            dtype: self.dtype,
            beside: self.beside,
            group,
            root: self.root,
            layer: self.layer,
            step: self.step,
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let place = |of: Option<usize>| of.map_or(0, |i| i as u8 + 1);
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(&MAGIC.to_le_bytes());
        put(&[
            KINDS.iter().position(|kind| *kind == self.kind).unwrap_or(0) as u8,
            OPS.iter().position(|op| *op == self.op).unwrap_or(0) as u8,
            place(self.dtype.and_then(|dtype| DTYPES.iter().position(|d| *d == dtype))),
            u8::from(self.beside) | self.phase << 1,
        ]);
        for word in [self.group, self.number, self.bytes, self.payload, self.step] {
            put(&word.to_le_bytes());
        }
        put(&self.layer.unwrap_or(u32::MAX).to_le_bytes());
        put(&self.root.map_or(u32::MAX, |root| root as u32).to_le_bytes());
        bytes
    }

    /// `None` of what no rank of this version writes.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
        let four = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let eight = |at: usize| u64::from(four(at)) | u64::from(four(at + 4)) << 32;
        let some = |word: u32| (word != u32::MAX).then_some(word);
        if four(0) != MAGIC {
            return None;
        }
        Some(Header {
            kind: *KINDS.get(usize::from(bytes[4]))?,
            op: *OPS.get(usize::from(bytes[5]))?,
            dtype: match bytes[6] {
                0 => None,
                place => Some(*DTYPES.get(usize::from(place) - 1)?),
            },
            beside: bytes[7] & 1 == 1,
            phase: bytes[7] >> 1,
            group: eight(8),
            number: eight(16),
            bytes: eight(24),
            payload: eight(32),
            step: eight(40),
            layer: some(four(48)),
            root: some(four(52)).map(|root| root as usize),
        })
    }
}

/// Name of a group in headers: FNV-1a over its axes and ranks, the same in every process.
pub(super) fn key(group: &Members) -> u64 {
    let ranks = group.ranks.iter().flat_map(|rank| (*rank as u64).to_le_bytes());
    let bytes = group.axes.bytes().chain([0]).chain(ranks);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// What a rank answers when asked what it does: for each lane a state, a header, a group.
pub(super) fn encode_seen(lanes: [&LastSeen; 2]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for seen in lanes {
        let (state, call, place) = match seen {
            LastSeen::In(call) => (2, Some(call), (call.step, call.layer)),
            LastSeen::Computing { step, layer, after } => {
                (u8::from(after.is_some()), after.as_ref(), (*step, *layer))
            }
        };
        bytes.push(state);
        bytes.extend(place.0.to_le_bytes());
        bytes.extend(place.1.unwrap_or(u32::MAX).to_le_bytes());
        let Some(call) = call else { continue };
        bytes.extend(Header::of(call, 0, 0, 0).encode());
        bytes.extend((call.group.axes.len() as u32).to_le_bytes());
        bytes.extend(call.group.axes.as_bytes());
        bytes.extend((call.group.ranks.len() as u32).to_le_bytes());
        call.group.ranks.iter().for_each(|rank| bytes.extend((*rank as u32).to_le_bytes()));
    }
    // Arrays have elements of two bytes.
    bytes.resize(bytes.len().next_multiple_of(2), 0);
    bytes
}

/// What `encode_seen` wrote; `None` of anything else.
pub(super) fn decode_seen(mut bytes: &[u8]) -> Option<[LastSeen; 2]> {
    let mut lane = || -> Option<LastSeen> {
        let mut take = |len: usize| {
            let (head, tail) = bytes.split_at_checked(len)?;
            bytes = tail;
            Some(head)
        };
        let state = take(1)?[0];
        let step = u64::from_le_bytes(take(8)?.try_into().ok()?);
        let layer = u32::from_le_bytes(take(4)?.try_into().ok()?);
        let layer = (layer != u32::MAX).then_some(layer);
        if state == 0 {
            return Some(LastSeen::Computing { step, layer, after: None });
        }
        let header = Header::decode(take(HEADER_BYTES)?.try_into().ok()?)?;
        let len = u32::from_le_bytes(take(4)?.try_into().ok()?) as usize;
        let axes = String::from_utf8(take(len)?.to_vec()).ok()?;
        let len = u32::from_le_bytes(take(4)?.try_into().ok()?) as usize;
        let ranks = take(len.checked_mul(4)?)?
            .chunks_exact(4)
            .map(|rank| u32::from_le_bytes([rank[0], rank[1], rank[2], rank[3]]) as usize)
            .collect();
        let call = header.call(Arc::new(Members { axes, ranks }));
        Some(match state {
            2 => LastSeen::In(call),
            _ => LastSeen::Computing { step, layer, after: Some(call) },
        })
    };
    Some([lane()?, lane()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        let group = Arc::new(Members { axes: "dp+fsdp".to_string(), ranks: vec![1, 5, 9] });
        Call {
            op: Op::ReduceScatter,
            number: 77,
            bytes: 1 << 40,
            dtype: Some(DType::Bf16),
            beside: true,
            group,
            root: Some(5),
            layer: None,
            step: 123_456_789_012,
        }
    }

    #[test]
    fn headers_come_back_as_they_went() {
        let call = call();
        let header = Header::of(&call, key(&call.group), 1, 4096);
        assert_eq!(Header::decode(&header.encode()), Some(header));
        assert_eq!(header.call(call.group.clone()), call);
        let ended = Header::control(Kind::Ended, 0);
        assert_eq!(Header::decode(&ended.encode()), Some(ended));
        let mut wrong = header.encode();
        wrong[0] ^= 1;
        assert_eq!(Header::decode(&wrong), None);
        let mut wrong = header.encode();
        wrong[5] = 200;
        assert_eq!(Header::decode(&wrong), None);
    }

    #[test]
    fn answers_come_back_and_cut_ones_are_refused() {
        let lanes =
            [LastSeen::In(call()), LastSeen::Computing { step: 9, layer: Some(3), after: Some(call()) }];
        let bytes = encode_seen([&lanes[0], &lanes[1]]);
        assert_eq!(decode_seen(&bytes), Some(lanes));
        for len in 0..bytes.len() - 1 {
            assert_eq!(decode_seen(&bytes[..len]), None, "{len} of {}", bytes.len());
        }
    }
}
