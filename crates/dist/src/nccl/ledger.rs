//! Calls on device memory that are under way, and the thread of this process that watches them: it compares
//! each with what another member says, notices the one that is not done in time or that NCCL failed, and ends
//! the run on every rank with one message.

use crate::call::{Call, Op};
use crate::error::CommError;
use crate::nccl::ticket::driver;
use crate::wire;
use device::cuda::{self, Mark, Peers, Stream, Team, UniqueId};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks at what is under way.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// The same for who waits for what others say.
const LISTEN_EVERY: Duration = Duration::from_micros(100);
/// How long leaving all teams may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// Of one process. Dropped, it ends the watch and leaves the teams.
pub(crate) struct Ledger {
    watched: Arc<Watched>,
    /// Streams given out; the first is that of calls beside computation.
    streams: AtomicU16,
    peers: &'static dyn Peers,
}

struct Watched {
    office: Arc<wire::Office>,
    library: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    /// In the order in which they were begun.
    entries: Vec<Entry>,
    teams: Vec<Arc<dyn Team>>,
    watching: bool,
    closed: bool,
}

/// A call under way.
pub(crate) struct Entry {
    pub(crate) seat: wire::Seat,
    pub(crate) call: Call,
    pub(crate) stream: Stream,
    /// Whether somebody waits for it: only then it can be late.
    pub(crate) awaited: bool,
    /// Members who have yet to say that they are in the same call, and how many bytes they owe us where sizes vary.
    pub(crate) unheard: Vec<(usize, Option<u64>)>,
    id: u64,
    /// Since when it could be done.
    since: Instant,
    /// None while it is being put on its stream.
    mark: Option<Mark>,
}

impl Entry {
    /// Nobody waits for it yet, or ever.
    pub(crate) fn not_awaited(self) -> Entry {
        Entry { awaited: false, ..self }
    }

    pub(crate) fn new(
        seat: &wire::Seat,
        call: &Call,
        stream: Stream,
        unheard: Vec<(usize, Option<u64>)>,
    ) -> Entry {
        Entry {
            seat: seat.clone(),
            call: call.clone(),
            stream,
            awaited: true,
            unheard,
            id: 0,
            since: Instant::now(),
            mark: None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    pub(crate) fn new(office: Arc<wire::Office>, peers: &'static dyn Peers) -> Arc<Ledger> {
        let watched =
            Watched { office, library: peers.name(), state: Mutex::default(), changed: Condvar::new() };
        Arc::new(Ledger { watched: Arc::new(watched), streams: AtomicU16::new(1), peers })
    }

    /// A stream of its own.
    pub(crate) fn new_stream(&self) -> Stream {
        Stream::Peers(self.streams.fetch_add(1, Relaxed))
    }

    /// Behind what this thread's stream was given so far.
    pub(crate) fn now(&self) -> Mark {
        driver().mark(cuda::stream())
    }

    /// What the library did not do ends the run, if nothing has yet.
    pub(crate) fn broken(&self, what: &str, words: &str) -> CommError {
        self.watched.broken(what, words)
    }

    /// An id by which members find each other.
    pub(crate) fn new_id(&self) -> Result<UniqueId, CommError> {
        self.peers.unique_id().map_err(|words| self.watched.broken("an id", &words))
    }

    /// Joins those who have the id; they are met later.
    pub(crate) fn join(&self, id: &UniqueId, rank: usize, ranks: usize) -> Result<Arc<dyn Team>, CommError> {
        let team =
            self.peers.join(id, rank, ranks).map_err(|words| self.watched.broken("joining", &words))?;
        lock(&self.watched.state).teams.push(team.clone());
        // The run may have failed before anybody could end this one.
        if let Err(error) = self.watched.office.is_over() {
            team.abort();
            return Err(error);
        }
        Ok(team)
    }

    /// Makes a call: it is watched from now on, and `body` puts it on its stream.
    pub(crate) fn during(
        &self,
        entry: Entry,
        body: impl FnOnce(Stream) -> Result<(), String>,
    ) -> Result<u64, CommError> {
        let (stream, call) = (entry.stream, entry.call.clone());
        let id = self.begin(entry);
        self.fill(id, stream, &call, body)
    }

    /// A call that is watched from now on and made later, by `fill`.
    pub(crate) fn begin(&self, entry: Entry) -> u64 {
        let mut state = lock(&self.watched.state);
        state.next += 1;
        let id = state.next;
        state.entries.push(Entry { id, ..entry });
        state.publish(&self.watched.office);
        if !state.watching {
            state.watching = true;
            let watched = self.watched.clone();
            // Without it nothing would be found late.
            std::thread::Builder::new()
                .name("nccl-watch".to_string())
                .spawn(move || watched.watch())
                .expect("a thread can be started");
        }
        drop(state);
        self.watched.changed.notify_all();
        id
    }

    pub(crate) fn fill(
        &self,
        id: u64,
        stream: Stream,
        call: &Call,
        body: impl FnOnce(Stream) -> Result<(), String>,
    ) -> Result<u64, CommError> {
        body(stream).map_err(|words| self.watched.broken(&call.to_string(), &words))?;
        let mark = driver().mark(stream);
        let mut state = lock(&self.watched.state);
        match state.entries.iter_mut().find(|entry| entry.id == id) {
            Some(entry) => entry.mark = Some(mark),
            None => driver().forget(mark),
        }
        Ok(id)
    }

    /// Waits until a call was compared, for as long as those it is compared with are there.
    pub(crate) fn until_heard(&self, id: u64) -> Result<(), CommError> {
        loop {
            let mut state = lock(&self.watched.state);
            let Some(entry) = state.entries.iter_mut().find(|entry| entry.id == id) else { return Ok(()) };
            let left = entry.left();
            let compared = entry.compare();
            if compared.is_ok() && entry.unheard.is_empty() {
                return Ok(());
            }
            drop(state);
            if let Err(error) = compared {
                return Err(self.watched.office.end_with(error));
            }
            self.watched.office.is_over()?;
            if let Some(left) = left {
                return Err(left);
            }
            self.watched.office.listen(LOOK_EVERY);
        }
    }

    /// From now on somebody waits for a call.
    pub(crate) fn expect(&self, id: u64) {
        let mut state = lock(&self.watched.state);
        if let Some(entry) = state.entries.iter_mut().find(|entry| entry.id == id) {
            (entry.awaited, entry.since) = (true, Instant::now());
        }
        state.publish(&self.watched.office);
    }

    /// Waits until the calls made so far, or so far beside computation, have been compared.
    pub(crate) fn settle(&self, beside: bool) -> Result<(), CommError> {
        // The foreground of another member may wait for our calls beside computation, not the other way.
        let open = |entry: &Entry| {
            let between_two = matches!(entry.call.op, Op::Send | Op::Receive);
            let before = !beside || entry.call.beside && !between_two;
            entry.awaited && before && !entry.unheard.is_empty()
        };
        let mut state = lock(&self.watched.state);
        loop {
            let mut compared = state.entries.iter_mut().filter(|entry| open(entry)).map(Entry::compare);
            if let Some(error) = compared.find_map(Result::err) {
                drop(state);
                return Err(self.watched.office.end_with(error));
            }
            if !state.entries.iter().any(open) {
                state.publish(&self.watched.office);
                return Ok(());
            }
            self.watched.office.is_over()?;
            let waited = self.watched.changed.wait_timeout(state, LISTEN_EVERY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        let teams = {
            let mut state = lock(&self.watched.state);
            state.closed = true;
            self.watched.office.publish([None, None], 0);
            std::mem::take(&mut state.teams)
        };
        self.watched.changed.notify_all();
        let (start, over) = (Instant::now(), self.watched.office.is_over().is_err());
        for team in teams {
            if over || start.elapsed() > FAREWELL { team.abort() } else { team.close() }
        }
    }
}

impl State {
    /// The oldest call of each lane that somebody waits for.
    fn publish(&self, office: &wire::Office) {
        let oldest = |beside: bool| {
            let awaited = |entry: &&Entry| entry.awaited && entry.call.beside == beside;
            self.entries.iter().find(awaited).map(|entry| entry.call.clone())
        };
        let not_compared =
            self.entries.iter().filter(|entry| entry.awaited && !entry.unheard.is_empty()).count();
        office.publish([oldest(false), oldest(true)], not_compared);
    }

    /// Takes out what is done and was compared, in the order of each stream.
    fn retire(&mut self, office: &wire::Office) {
        let mut waiting: Vec<Stream> = Vec::new();
        let mut at = 0;
        while at < self.entries.len() {
            let entry = &mut self.entries[at];
            let done = !waiting.contains(&entry.stream)
                && entry.unheard.is_empty()
                && entry.mark.is_some_and(|mark| driver().is_done(mark));
            if !done {
                waiting.push(entry.stream);
                at += 1;
                continue;
            }
            let entry = self.entries.remove(at);
            entry.mark.into_iter().for_each(|mark| driver().forget(mark));
            office.finished(entry.call);
            // Whoever is next on the stream had to wait for this one.
            if let Some(next) = self.entries[at..].iter_mut().find(|next| next.stream == entry.stream) {
                next.since = Instant::now();
            }
        }
        self.publish(office);
    }

    /// The first call that should have been done, if one should: on each stream the first that is awaited counts.
    fn overdue(&self, deadline: Duration) -> Option<(Call, Instant)> {
        let mut seen: Vec<Stream> = Vec::new();
        for entry in self.entries.iter().filter(|entry| entry.awaited) {
            if seen.contains(&entry.stream) {
                continue;
            }
            seen.push(entry.stream);
            if entry.since.elapsed() > deadline {
                return Some((entry.call.clone(), entry.since));
            }
        }
        None
    }
}

impl Entry {
    /// The end of a member that has yet to say something.
    fn left(&self) -> Option<CommError> {
        self.unheard.iter().find_map(|(from, _)| self.seat.office().left(self.call.group.ranks[*from]))
    }

    /// Compares with what members have said by now.
    fn compare(&mut self) -> Result<(), CommError> {
        let (seat, call) = (&self.seat, &self.call);
        let mut wrong = None;
        self.unheard.retain(|(from, owed)| {
            let rank = call.group.ranks[*from];
            // What a rank said came before it left.
            let left = if self.awaited { seat.office().left(rank) } else { None };
            let Some((theirs, bytes)) = seat.announced(call, *from) else {
                wrong = wrong.take().or(left);
                return true;
            };
            let same = match call.op {
                Op::Receive => (theirs.op, theirs.bytes, theirs.dtype) == (Op::Send, call.bytes, call.dtype),
                _ => theirs.matches(call),
            };
            if !same {
                let (mine, other_call) = (Box::new(call.clone()), Box::new(theirs));
                wrong = Some(CommError::OutOfStep { rank: seat.rank(), call: mine, other: rank, other_call });
            } else if *owed != bytes {
                let (got, want) = (bytes.unwrap_or(0), owed.unwrap_or(0));
                let problem =
                    format!("member {from} sends {got} bytes, member {} expects {want}", seat.index());
                let (axes, ranks) = (call.group.axes.clone(), call.group.ranks.len());
                wrong = Some(CommError::Argument { op: call.op.name(), axes, ranks, problem });
            }
            false
        });
        wrong.map_or(Ok(()), Err)
    }
}

/// What ends the run.
enum Verdict {
    /// It is over.
    Over,
    Wrong(CommError),
    /// The library says so, in this call.
    Broken(String, String),
    /// Not done, since then.
    Late(Call, Instant),
}

impl Watched {
    /// What the library did not do ends the run, if nothing has yet.
    fn broken(&self, what: &str, words: &str) -> CommError {
        // It notices that a rank is gone, too, but not why.
        self.office.over_soon().unwrap_or_else(|| {
            let problem = format!("{} failed in {what}: {words}", self.library);
            self.office.end_with(CommError::Transport(problem))
        })
    }

    fn watch(&self) {
        let mut state = lock(&self.state);
        while !state.closed {
            if state.entries.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let verdict = self.look(&mut state);
            drop(state);
            self.changed.notify_all();
            if let Some(verdict) = verdict {
                self.pass(verdict);
                return self.end();
            }
            std::thread::sleep(LOOK_EVERY);
            state = lock(&self.state);
        }
    }

    fn look(&self, state: &mut State) -> Option<Verdict> {
        if self.office.is_over().is_err() {
            return Some(Verdict::Over);
        }
        if let Some(error) = state.entries.iter_mut().find_map(|entry| entry.compare().err()) {
            return Some(Verdict::Wrong(error));
        }
        state.retire(&self.office);
        // Where nothing is under way the next call hears of it.
        let first = state.entries.first()?;
        if let Some(words) = state.teams.iter().find_map(|team| team.problem()) {
            return Some(Verdict::Broken(first.call.to_string(), words));
        }
        let (call, since) = state.overdue(self.office.longest_wait())?;
        Some(Verdict::Late(call, since))
    }

    /// Ends the run on every rank, in one message.
    fn pass(&self, verdict: Verdict) {
        match verdict {
            Verdict::Over => {}
            Verdict::Wrong(error) => drop(self.office.end_with(error)),
            Verdict::Broken(call, words) => drop(self.broken(&call, &words)),
            Verdict::Late(call, since) => drop(self.office.blame(&call, since)),
        }
    }

    /// The run is over: nothing on a stream waits for others any more.
    fn end(&self) {
        let mut ended = 0;
        loop {
            let state = lock(&self.state);
            if state.closed || state.teams.len() == ended {
                return;
            }
            let teams = state.teams.clone();
            drop(state);
            teams.iter().for_each(|team| team.abort());
            ended = teams.len();
        }
    }
}
