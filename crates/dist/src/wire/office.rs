//! What one process knows of the others: messages that have come, who has ended, and the one error
//! that ends the run everywhere.

mod cards;

use super::frame::{ANNOUNCED, GRANTED, Header, INVITED, Kind, decode_seen, encode_seen, key};
use super::post::Post;
use crate::bell::Bell;
use crate::beside::Array;
use crate::call::{Call, Members, Op, Place};
use crate::diagnosis::{Seen, diagnose};
use crate::error::{CommError, LastSeen};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a healthy process may take to answer a question. Its answering thread computes nothing,
/// so this is about how busy the machine is.
const GRACE: Duration = Duration::from_millis(700);
/// A waiting rank looks this often at what no bell tells it.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Where a message is to be found: sender, group, whether between two, number, phase, lane.
pub(super) type Slot = (usize, u64, bool, u64, u8, bool);

/// A message that has come.
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) array: Array,
}

pub(crate) struct Office {
    rank: usize,
    deadline_ns: AtomicU64,
    place: Arc<Place>,
    post: Post,
    mail: Mutex<HashMap<Slot, Message>>,
    bell: Bell,
    /// Our own calls: in the foreground, and beside computation.
    stations: [Mutex<Station>; 2],
    /// The oldest of those on device memory that are not done, which we do not stay in.
    on_device: Mutex<[Option<Call>; 2]>,
    not_compared: AtomicUsize,
    peers: Vec<Peer>,
    groups: Mutex<HashMap<u64, Arc<Members>>>,
    /// Bytes of parts of calls that we sent and got.
    payload: [AtomicU64; 2],
    failed: AtomicBool,
    failure: OnceLock<CommError>,
    spin: bool,
}

#[derive(Default)]
struct Station {
    now: Option<Call>,
    last: Option<Call>,
}

/// What we know of another rank.
#[derive(Default)]
struct Peer {
    ended: Mutex<Option<String>>,
    /// The last call it sent us a part of.
    last: Mutex<Option<Call>>,
    /// What it answered.
    answer: Mutex<Option<[LastSeen; 2]>>,
}

/// How the end of a process shows in the connection to it.
pub(super) fn gone(error: &std::io::Error) -> String {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        UnexpectedEof | BrokenPipe | ConnectionReset => "killed, or ended without a word".to_string(),
        _ => error.to_string(),
    }
}

/// A message's text. Arrays have elements of two bytes.
fn words(error: &CommError) -> String {
    let text = error.to_string();
    if text.len() % 2 == 1 { text + " " } else { text }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Office {
    pub(super) fn new(rank: usize, ranks: usize, deadline: Duration, post: Post) -> Office {
        Office {
            rank,
            deadline_ns: AtomicU64::new(deadline.as_nanos() as u64),
            place: Arc::default(),
            post,
            mail: Mutex::default(),
            bell: Bell::default(),
            stations: Default::default(),
            on_device: Mutex::default(),
            not_compared: AtomicUsize::new(0),
            peers: (0..ranks).map(|_| Peer::default()).collect(),
            groups: Mutex::default(),
            payload: [const { AtomicU64::new(0) }; 2],
            failed: AtomicBool::new(false),
            failure: OnceLock::new(),
            spin: ranks <= device::cores(),
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn carrier(&self) -> &'static str {
        self.post.name()
    }

    pub(super) fn world_size(&self) -> usize {
        self.peers.len()
    }

    pub(super) fn payload_bytes(&self) -> (u64, u64) {
        (self.payload[0].load(SeqCst), self.payload[1].load(SeqCst))
    }

    pub(super) fn set_deadline(&self, deadline: Duration) {
        self.deadline_ns.store(deadline.as_nanos() as u64, SeqCst);
    }

    fn deadline(&self) -> Duration {
        Duration::from_nanos(self.deadline_ns.load(SeqCst))
    }

    pub(super) fn place(&self) -> &Arc<Place> {
        &self.place
    }

    /// The key of a group in headers; from now on its calls can be named.
    pub(super) fn enroll(&self, group: &Arc<Members>) -> u64 {
        let key = key(group);
        lock(&self.groups).insert(key, group.clone());
        key
    }

    pub(super) fn check(&self) -> Result<(), CommError> {
        if !self.failed.load(SeqCst) {
            return Ok(());
        }
        Err(self.failure.get().expect("set before the flag").clone())
    }

    pub(super) fn enter(&self, call: Call) {
        let mut station = lock(&self.stations[usize::from(call.beside)]);
        station.now = Some(call);
    }

    pub(super) fn leave(&self, beside: bool) {
        let mut station = lock(&self.stations[usize::from(beside)]);
        station.last = station.now.take();
    }

    /// A message has come; called by the post's own threads.
    pub(super) fn deliver(&self, from: usize, header: Header, array: Array) {
        let peer = &self.peers[from];
        match header.kind {
            Kind::Data => {
                if ![ANNOUNCED, INVITED, GRANTED].contains(&header.phase) {
                    self.payload[1].fetch_add(header.payload, SeqCst);
                }
                let group = lock(&self.groups).get(&header.group).cloned();
                if let Some(group) = group {
                    *lock(&peer.last) = Some(header.call(group));
                }
                let pair = matches!(header.op, Op::Send | Op::Receive);
                let slot = (from, header.group, pair, header.number, header.phase, header.beside);
                lock(&self.mail).insert(slot, Message { header, array });
            }
            Kind::Propose | Kind::Failed => {
                let text = String::from_utf8_lossy(array.view().bytes()).trim_end().to_string();
                let news = !self.failed.load(SeqCst);
                let first = self.fail_here(CommError::Reported(text));
                if news && header.kind == Kind::Propose {
                    self.tell(&first);
                }
            }
            Kind::Ended => {
                let reason = "its work ended while others still waited".to_string();
                lock(&peer.ended).get_or_insert(reason);
            }
            Kind::Ask => {
                let [last, beside] = self.own();
                let answer = encode_seen([&last, &beside]);
                // Who asks and cannot be answered finds out by itself.
                let _ = self.post.send(from, &Header::control(Kind::Answer, answer.len()), &answer, GRACE);
            }
            Kind::Answer => *lock(&peer.answer) = decode_seen(array.view().bytes()),
        }
        self.bell.ring();
    }

    /// The connection to a rank broke; called by the post's own threads.
    pub(super) fn lost(&self, from: usize, reason: &str) {
        if lock(&self.peers[from].ended).is_some() || self.failed.load(SeqCst) {
            return;
        }
        let reason = format!("its process is gone ({reason})");
        *lock(&self.peers[from].ended) = Some(reason.clone());
        let last = Box::new(self.last_heard(from));
        self.fail(CommError::Dead { rank: from, reason, last });
    }

    /// Ends the run on every rank and returns why. Ranks may find reasons at the same time, so that all
    /// hear the same one the lowest rank alive is the judge: the first reason it hears it tells
    /// everybody. When it stays silent whoever found a reason tells it.
    pub(super) fn fail(&self, error: CommError) -> CommError {
        if let Err(first) = self.check() {
            return first;
        }
        if let Some(judge) = (0..self.rank).find(|rank| lock(&self.peers[*rank].ended).is_none()) {
            let text = words(&error);
            let header = Header::control(Kind::Propose, text.len());
            if self.post.send(judge, &header, text.as_bytes(), GRACE).is_ok() {
                self.patiently(3 * GRACE, || self.failed.load(SeqCst));
            }
            if let Err(first) = self.check() {
                return first;
            }
        }
        let first = self.fail_here(error);
        self.tell(&first);
        first
    }

    fn tell(&self, error: &CommError) {
        let text = words(error);
        for rank in self.others() {
            // A rank that cannot be told is the dead one, or finds its connections broken.
            let _ = self.post.send(rank, &Header::control(Kind::Failed, text.len()), text.as_bytes(), GRACE);
        }
    }

    fn fail_here(&self, error: CommError) -> CommError {
        let first = self.failure.get_or_init(|| error).clone();
        self.failed.store(true, SeqCst);
        self.bell.ring();
        first
    }

    /// We make no more calls, because of `failure` or because our work is done. The latter is true when
    /// it is of every rank: a rank that then stops or dies still fails the run.
    pub(crate) fn end(&self, failure: Option<String>) -> Result<(), CommError> {
        let ended = match failure {
            Some(reason) => {
                let last = Box::new(self.own()[0].clone());
                Err(self.fail(CommError::Dead { rank: self.rank, reason, last }))
            }
            None => {
                self.all_compared();
                for rank in self.others() {
                    let _ = self.post.send(rank, &Header::control(Kind::Ended, 0), &[], GRACE);
                }
                self.all_ended()
            }
        };
        if let Err(first) = &ended {
            // Also when another rank has told everybody: our connections close now, and whoever sees
            // that before it hears the other would take us for the cause.
            self.tell(first);
        }
        self.post.close(ended.is_err());
        ended
    }

    fn all_ended(&self) -> Result<(), CommError> {
        let missing = || self.others().find(|rank| lock(&self.peers[*rank].ended).is_none());
        let start = Instant::now();
        self.patiently(self.deadline(), || missing().is_none() || self.failed.load(SeqCst));
        self.check()?;
        let Some(rank) = missing() else { return Ok(()) };
        let reason =
            format!("its work had not ended {:.1} s after that of others", start.elapsed().as_secs_f64());
        let last = Box::new(self.last_heard(rank));
        *lock(&self.peers[rank].ended) = Some(reason.clone());
        Err(self.fail(CommError::Dead { rank, reason, last }))
    }

    /// Sends a part of a call.
    pub(super) fn send(
        &self,
        call: &Call,
        to: usize,
        header: &Header,
        bytes: &[u8],
    ) -> Result<(), CommError> {
        let start = Instant::now();
        match self.post.send(to, header, bytes, self.deadline()) {
            Ok(()) => {
                self.payload[0].fetch_add(bytes.len() as u64, SeqCst);
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(self.overdue(call, start)),
            Err(error) => {
                self.lost(to, &gone(&error));
                self.check()?;
                let reason = lock(&self.peers[to].ended).clone().unwrap_or_default();
                let last = Box::new(self.last_heard(to));
                Err(self.fail(CommError::Dead { rank: to, reason, last }))
            }
        }
    }

    /// Waits for a part of a call from a rank, as `header` describes it, and checks that the rank is
    /// in the same call.
    pub(super) fn take(&self, call: &Call, from: usize, header: &Header) -> Result<Array, CommError> {
        let pair = matches!(call.op, Op::Send | Op::Receive);
        let slot = (from, header.group, pair, header.number, header.phase, header.beside);
        self.wait(call, from, || lock(&self.mail).contains_key(&slot))?;
        let message = lock(&self.mail).remove(&slot).expect("waited for it, and nobody else takes it");
        let theirs = message.header.call(call.group.clone());
        let same = match pair {
            true => (theirs.bytes, theirs.dtype) == (call.bytes, call.dtype),
            false => theirs.matches(call),
        };
        if same && (message.header.payload == header.payload || call.op == Op::AllToAll) {
            return Ok(message.array);
        }
        let (call, other_call) = (Box::new(call.clone()), Box::new(theirs));
        Err(self.fail(CommError::OutOfStep { rank: self.rank, call, other: from, other_call }))
    }

    fn wait(&self, call: &Call, from: usize, ready: impl Fn() -> bool) -> Result<(), CommError> {
        let over = || ready() || self.failed.load(SeqCst);
        if !self.bell.hover(self.spin, over) {
            let start = Instant::now();
            while !over() {
                let left = self.deadline().saturating_sub(start.elapsed());
                self.bell.sleep(left.min(LOOK_EVERY), over);
                let ended = lock(&self.peers[from].ended).clone();
                if over() {
                    break;
                }
                if let Some(reason) = ended {
                    let last = Box::new(self.last_heard(from));
                    return Err(self.fail(CommError::Dead { rank: from, reason, last }));
                }
                if left.is_zero() {
                    return Err(self.overdue(call, start));
                }
            }
        }
        if ready() { Ok(()) } else { self.check() }
    }

    /// Asks everybody what they do and says who is to blame.
    fn overdue(&self, call: &Call, since: Instant) -> CommError {
        let waited_s = since.elapsed().as_secs_f64();
        for rank in self.others() {
            *lock(&self.peers[rank].answer) = None;
            let _ = self.post.send(rank, &Header::control(Kind::Ask, 0), &[], GRACE);
        }
        let answered = |rank: usize| lock(&self.peers[rank].answer).is_some();
        self.patiently(GRACE, || self.others().all(answered) || self.failed.load(SeqCst));
        if let Err(first) = self.check() {
            return first;
        }
        for rank in self.others().filter(|rank| !answered(*rank)) {
            let silent = || "its process does not answer: stopped, hung or cut off".to_string();
            lock(&self.peers[rank].ended).get_or_insert_with(silent);
        }
        let seen: Vec<Seen> = (0..self.world_size()).map(|rank| self.seen(rank)).collect();
        self.fail(diagnose(&seen, self.rank, call, waited_s))
    }

    /// What ended the run, as soon as something has; nothing after `at_most`.
    pub(super) fn failure_within(&self, at_most: Duration) -> Option<CommError> {
        self.patiently(at_most, || self.failed.load(SeqCst));
        self.check().err()
    }

    fn patiently(&self, at_most: Duration, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() && start.elapsed() < at_most {
            self.bell.sleep(LOOK_EVERY, &done);
        }
    }

    fn seen(&self, rank: usize) -> Seen {
        if rank == self.rank {
            let [last, beside] = self.own();
            return Seen { last, beside, ended: None };
        }
        let ended = lock(&self.peers[rank].ended).clone();
        match lock(&self.peers[rank].answer).clone() {
            Some([last, beside]) => Seen { last, beside, ended },
            None => {
                let last = self.last_heard(rank);
                Seen { beside: last.clone(), last, ended }
            }
        }
    }

    /// What we know of a rank that cannot be asked.
    fn last_heard(&self, rank: usize) -> LastSeen {
        match lock(&self.peers[rank].last).clone() {
            Some(call) => LastSeen::In(call),
            None => LastSeen::Computing { step: 0, layer: None, after: None },
        }
    }

    fn own(&self) -> [LastSeen; 2] {
        [0, 1].map(|lane: usize| {
            let on_device = lock(&self.on_device)[lane].clone();
            let station = lock(&self.stations[lane]);
            // What is not done on the device was called before.
            match on_device.as_ref().or(station.now.as_ref()) {
                Some(call) => LastSeen::In(call.clone()),
                None => {
                    let (step, layer) = (self.place.step(), self.place.layer());
                    LastSeen::Computing { step, layer, after: station.last.clone() }
                }
            }
        })
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.rank;
        (0..self.peers.len()).filter(move |rank| *rank != own)
    }
}
