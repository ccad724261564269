//! Messages from one member to another, which may be sent long before they are taken: each direction has a team
//! of two, a stream and a thread of its own, so that a message that is not taken holds up nothing but those
//! behind it. It is put on the stream when both are there: no kernel waits on a card for a rank to come, which might
//! itself wait for the card to be idle.

use super::ledger::{Entry, Ledger};
use super::ticket::{Landed, driver};
use crate::beside::Array;
use crate::call::Call;
use crate::error::CommError;
use crate::wire;
use device::cuda::{self, ID_BYTES, Leg, Mark, Stream, Team, UniqueId};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Messages that may wait on one line; whoever sends more waits.
const QUEUED: usize = 64;

/// Which way, as seen from us: to a member or from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Way {
    To(usize),
    From(usize),
}

/// One direction between us and another member.
pub(super) struct Line {
    jobs: SyncSender<Job>,
    stream: Stream,
}

struct Job {
    array: Array,
    /// Behind what wrote the array, or used its memory before.
    after: Mark,
    call: Call,
    id: u64,
    /// Where what was received is awaited.
    landed: Option<SyncSender<Result<Landed, CommError>>>,
}

/// A message that was asked for.
pub(crate) struct Arriving {
    ledger: Arc<Ledger>,
    id: u64,
    landed: Receiver<Result<Landed, CommError>>,
}

impl Arriving {
    /// Waits until it is on its way; what is launched next finds it there.
    pub(crate) fn finish(self) -> Result<Array, CommError> {
        self.ledger.expect(self.id);
        self.landed.recv().map_err(|_| gone())?.map(Landed::take)
    }
}

fn gone() -> CommError {
    CommError::Transport("the thread for messages between two ranks is gone; is memory short?".to_string())
}

impl Line {
    pub(super) fn open(seat: &wire::Seat, ledger: &Arc<Ledger>, way: Way) -> Result<Line, CommError> {
        let (jobs, queue) = sync_channel::<Job>(QUEUED);
        let stream = ledger.new_stream();
        let (seat, watched) = (seat.clone(), Arc::downgrade(ledger));
        let work = move || {
            let mut team = None;
            for job in queue {
                // Whoever would hear of it is gone, too.
                let Some(ledger) = watched.upgrade() else { return };
                cuda::on_stream(stream, || run(&seat, &ledger, (way, stream), &mut team, job));
            }
        };
        let name = match way {
            Way::To(member) => format!("nccl-to-{member}"),
            Way::From(member) => format!("nccl-from-{member}"),
        };
        let started = std::thread::Builder::new().name(name).spawn(work);
        started
            .map_err(|error| CommError::Transport(format!("cannot start a thread for messages: {error}")))?;
        Ok(Line { jobs, stream })
    }

    pub(super) fn send(
        &self,
        ledger: &Ledger,
        seat: &wire::Seat,
        array: Array,
        call: Call,
    ) -> Result<(), CommError> {
        // The receiver may come later: nobody waits for it.
        let entry = Entry::new(seat, &call, self.stream, Vec::new()).not_awaited();
        let id = ledger.begin(entry);
        let after = ledger.now();
        self.jobs.send(Job { array, after, call, id, landed: None }).map_err(|_| gone())
    }

    pub(super) fn receive(
        &self,
        ledger: &Arc<Ledger>,
        seat: &wire::Seat,
        (array, from): (Array, usize),
        call: Call,
    ) -> Result<Arriving, CommError> {
        let entry = Entry::new(seat, &call, self.stream, vec![(from, None)]).not_awaited();
        let id = ledger.begin(entry);
        let (sender, landed) = sync_channel(1);
        let job = Job { array, after: ledger.now(), call, id, landed: Some(sender) };
        self.jobs.send(job).map_err(|_| gone())?;
        Ok(Arriving { ledger: ledger.clone(), id, landed })
    }
}

/// Puts one message on the stream; buffers that are dropped here wait for it.
fn run(
    seat: &wire::Seat,
    ledger: &Ledger,
    (way, stream): (Way, Stream),
    team: &mut Option<Arc<dyn Team>>,
    job: Job,
) {
    let Job { mut array, after, call, id, landed } = job;
    let agreed = match way {
        Way::To(member) => seat.granted(&call, member),
        Way::From(member) => ledger.until_heard(id).map(|()| seat.grant(&call, member)),
    };
    let done = agreed.and_then(|()| met(seat, ledger, way, team)).and_then(|team| {
        let body = |stream| {
            let leg = match way {
                Way::To(_) => Leg::Send(array.view(), 1),
                Way::From(_) => Leg::Receive(array.view_mut(), 0),
            };
            driver().follow(stream, after);
            cuda::exchange(&*team, stream, &[leg])
        };
        ledger.fill(id, stream, &call, body)
    });
    if let Some(landed) = landed {
        // The receiver may be gone: whoever asked gave the message up.
        drop(landed.send(done.map(|_| Landed::on(stream, array))));
    }
}

/// The team of a line, made by its first message: the sender invites.
fn met(
    seat: &wire::Seat,
    ledger: &Ledger,
    way: Way,
    team: &mut Option<Arc<dyn Team>>,
) -> Result<Arc<dyn Team>, CommError> {
    if let Some(team) = team {
        return Ok(team.clone());
    }
    let (id, rank) = match way {
        Way::To(member) => {
            let id = ledger.new_id()?;
            seat.invite(member, &id.0);
            (id, 0)
        }
        Way::From(member) => {
            let words = seat.invitation(member)?;
            let id: [u8; ID_BYTES] = words.try_into().map_err(|_| gone())?;
            (UniqueId(id), 1)
        }
    };
    let joined = ledger.join(&id, rank, 2)?;
    joined.meet().map_err(|words| ledger.broken("the first message between two ranks", &words))?;
    *team = Some(joined.clone());
    Ok(joined)
}
