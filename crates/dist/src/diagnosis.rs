//! Who is to blame: from what every rank was last seen doing to one message. Pure.

use crate::call::{Call, Op};
use crate::error::{CommError, LastSeen};

/// What is known of one rank.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// In a call, or computing.
    pub(crate) last: LastSeen,
    /// The same for its calls beside computation.
    pub(crate) beside: LastSeen,
    /// Why it ended, if it has.
    pub(crate) ended: Option<String>,
}

/// What rank `waiting` should be told after `waited_s` seconds in `call`.
///
/// Follows who waits for whom: a member that waits elsewhere is not late itself, the one it waits
/// for is. The walk ends at a rank that is dead, computes, or makes another call in the same place.
/// One that comes back to a rank it has seen found calls made in different orders.
pub(crate) fn diagnose(ranks: &[Seen], waiting: usize, call: &Call, waited_s: f64) -> CommError {
    let mut passed = vec![waiting];
    let (mut waiter, mut awaited) = (waiting, call.clone());
    loop {
        let Some(rank) = absent(ranks, waiter, &awaited) else {
            let last = Box::new(ranks[waiter].last.clone());
            return CommError::Late { rank: waiter, waiting, waited_s, call: Box::new(awaited), last };
        };
        let seen = &ranks[rank];
        let last = Box::new(seen.last.clone());
        if let Some(reason) = &seen.ended {
            return CommError::Dead { rank, reason: reason.clone(), last };
        }
        // Whose lane is idle has not started the call: what the rank itself does is the reason.
        let lane = if awaited.beside { &seen.beside } else { &seen.last };
        let ((LastSeen::In(theirs), _) | (_, LastSeen::In(theirs))) = (lane, &seen.last) else {
            return CommError::Late { rank, waiting: waiter, waited_s, call: Box::new(awaited), last };
        };
        let same_place = (theirs.beside, &theirs.group) == (awaited.beside, &awaited.group);
        // Whose calls need not wait where they are made may be in an earlier one, for somebody else.
        let same_number = theirs.number >= awaited.number;
        if same_place && same_number && !is_pair(theirs, &awaited) || passed.contains(&rank) {
            return CommError::OutOfStep {
                rank,
                call: Box::new(theirs.clone()),
                other: waiter,
                other_call: Box::new(awaited),
            };
        }
        passed.push(rank);
        (waiter, awaited) = (rank, theirs.clone());
    }
}

/// Calls between two ranks do not count along with those of the whole group.
fn is_pair(a: &Call, b: &Call) -> bool {
    [a.op, b.op].iter().any(|op| matches!(op, Op::Send | Op::Receive))
}

/// Whether a member that is in `theirs` has been in `call`: the calls of a group are made in the order of their numbers.
fn is_past(theirs: &Call, call: &Call) -> bool {
    !is_pair(theirs, call) && theirs.number > call.number
}

/// The first rank that `waiter` waits for in `call` and that is not there.
pub(crate) fn absent(ranks: &[Seen], waiter: usize, call: &Call) -> Option<usize> {
    let here = |rank: usize| {
        let lane = if call.beside { &ranks[rank].beside } else { &ranks[rank].last };
        let same = matches!(lane, LastSeen::In(theirs) if theirs.group == call.group
            && (theirs.matches(call) || is_past(theirs, call)));
        // A process that stopped half-way through the very call was last heard from in it.
        same && ranks[rank].ended.is_none()
    };
    match call.op {
        Op::Send | Op::Receive => call.root,
        _ => call.group.ranks.iter().copied().find(|rank| *rank != waiter && !here(*rank)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Members;
    use std::sync::Arc;

    fn call(op: Op, number: u64, axes: &str, ranks: &[usize]) -> Call {
        let group = Arc::new(Members { axes: axes.to_string(), ranks: ranks.to_vec() });
        Call {
            op,
            number,
            bytes: 64,
            dtype: None,
            beside: false,
            group,
            root: None,
            layer: Some(5),
            step: 120,
        }
    }

    fn inside(call: &Call) -> Seen {
        Seen { last: LastSeen::In(call.clone()), ..computing() }
    }

    fn computing() -> Seen {
        let idle = LastSeen::Computing { step: 120, layer: Some(4), after: None };
        Seen { last: idle.clone(), beside: idle, ended: None }
    }

    #[test]
    fn a_rank_that_computes_is_late_also_for_those_who_wait_for_its_waiters() {
        let (row, column) = (call(Op::AllGather, 7, "y", &[0, 1]), call(Op::AllReduce, 3, "x", &[1, 3]));
        let ranks = [inside(&row), inside(&column), computing(), computing()];
        let error = diagnose(&ranks, 0, &row, 2.0);
        let CommError::Late { rank: 3, waiting: 1, .. } = &error else { panic!("{error}") };
        assert_eq!(
            error.to_string(),
            "rank 3 is late: rank 1 waited 2.0 s for it in all_reduce #3 on `x` (64 bytes, layer 5, step 120); \
             rank 3 was last seen computing in step 120, layer 4, before its first call; \
             raise the deadline if it was only slow"
        );
    }

    #[test]
    fn a_dead_rank_is_named_with_its_last_words() {
        let row = call(Op::AllGather, 7, "y", &[0, 1]);
        let dead = Seen { ended: Some("it ran out of memory".to_string()), ..computing() };
        let error = diagnose(&[inside(&row), dead], 0, &row, 2.0).to_string();
        assert!(error.starts_with("rank 1 is dead: it ran out of memory; it was last seen"), "{error}");
    }

    #[test]
    fn a_call_beside_waits_for_what_holds_its_rank_up() {
        let bucket = Call { beside: true, ..call(Op::AllReduce, 2, "dp", &[0, 1]) };
        let row = call(Op::AllGather, 7, "y", &[1, 2]);
        let first = Seen { beside: LastSeen::In(bucket.clone()), ..computing() };
        let error = diagnose(&[first, inside(&row), computing()], 0, &bucket, 2.0);
        assert!(matches!(error, CommError::Late { rank: 2, waiting: 1, .. }), "{error}");
    }

    #[test]
    fn other_calls_in_the_same_place_and_circles_are_out_of_step() {
        let row = call(Op::AllGather, 7, "y", &[0, 1]);
        let other = call(Op::AllReduce, 7, "y", &[0, 1]);
        let error = diagnose(&[inside(&row), inside(&other)], 0, &row, 2.0);
        assert!(matches!(error, CommError::OutOfStep { rank: 1, other: 0, .. }), "{error}");

        let world = call(Op::Barrier, 0, "world", &[0, 1]);
        let error = diagnose(&[inside(&row), inside(&world)], 0, &row, 2.0);
        assert!(matches!(error, CommError::OutOfStep { rank: 0, other: 1, .. }), "{error}");
    }
}
