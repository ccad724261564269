//! NCCL of this machine, looked up when first asked for. Loaded by hand: cudarc's bindings do not look for
//! `libnccl.so.2`, which is all that is installed with it, and stop the process where a call is missing.
//!
//! Communicators do not block: whoever waits asks in between whether somebody aborted.

use super::driver::{Address, Stream};
use super::peers::{ID_BYTES, Move, NoPeers, Peers, Team, UniqueId};
use super::{lock, present};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

type Comm = *mut c_void;
type CudaStream = *mut c_void;

/// As the library takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id([u8; ID_BYTES]);

/// The part of `ncclConfig_t` that 2.14 had: later ones take their defaults for the rest, by `version`.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

const MAGIC: c_uint = 0xcafe_beef;
/// The first that has communicators which do not block.
const OLDEST: c_int = 2_14_00;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`: what moves has no type to the library.
const BYTES: c_int = 1;

/// Looks at work that is being put on its stream that follow each other at once: enough where nobody has to come
/// first.
const LOOKS: usize = 200;
/// Between two looks thereafter.
const LOOK_EVERY: Duration = Duration::from_micros(20);
/// How long what was sent last may take at the end.
const FAREWELL: Duration = Duration::from_secs(5);

macro_rules! calls {
    ($($field:ident = $name:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// Every call we make.
        struct Calls {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Calls {
            /// The error is the name of one that is missing.
            ///
            /// # Safety
            /// The library is NCCL, and stays.
            unsafe fn of(library: &Library) -> Result<Calls, &'static str> {
                Ok(Calls {
                    // SAFETY: the signatures are those of `nccl.h`.
                    $($field: unsafe { *library.get($name.as_bytes()).map_err(|_| $name)? },)*
                })
            }
        }
    };
}

calls! {
    get_version = "ncclGetVersion" (*mut c_int) -> c_int;
    get_unique_id = "ncclGetUniqueId" (*mut Id) -> c_int;
    init_rank = "ncclCommInitRankConfig" (*mut Comm, c_int, Id, c_int, *mut Config) -> c_int;
    group_start = "ncclGroupStart" () -> c_int;
    group_end = "ncclGroupEnd" () -> c_int;
    send = "ncclSend" (*const c_void, usize, c_int, c_int, Comm, CudaStream) -> c_int;
    receive = "ncclRecv" (*mut c_void, usize, c_int, c_int, Comm, CudaStream) -> c_int;
    broadcast = "ncclBroadcast" (*const c_void, *mut c_void, usize, c_int, c_int, Comm, CudaStream) -> c_int;
    all_gather = "ncclAllGather" (*const c_void, *mut c_void, usize, c_int, Comm, CudaStream) -> c_int;
    async_error = "ncclCommGetAsyncError" (Comm, *mut c_int) -> c_int;
    finalize = "ncclCommFinalize" (Comm) -> c_int;
    destroy = "ncclCommDestroy" (Comm) -> c_int;
    abort = "ncclCommAbort" (Comm) -> c_int;
    error_string = "ncclGetErrorString" (c_int) -> *const c_char;
    last_error = "ncclGetLastError" (Comm) -> *const c_char;
}

/// The library.
pub(super) struct Nccl {
    calls: Arc<Calls>,
    version: c_int,
}

fn missing(what: String) -> NoPeers {
    let remedy =
        "install libnccl2 (or `pip install nvidia-nccl-cu12` and put the folder of its library into \
                  LD_LIBRARY_PATH), or let what ranks exchange pass through the host"
            .to_string();
    NoPeers { what, remedy }
}

impl Nccl {
    pub(super) fn find() -> Result<Nccl, NoPeers> {
        // SAFETY: NCCL does nothing when it is loaded.
        let library =
            ["libnccl.so.2", "libnccl.so"].iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let library = library.ok_or_else(|| missing("NCCL was not found (libnccl.so.2)".to_string()))?;
        // SAFETY: it goes by that name, and is never unloaded.
        let calls = unsafe { Calls::of(&library) };
        std::mem::forget(library);
        let calls = calls.map_err(|name| missing(format!("the NCCL of this machine has no {name}")))?;
        let mut version = 0;
        // SAFETY: writes a number.
        let result = unsafe { (calls.get_version)(&mut version) };
        if result != SUCCESS {
            return Err(missing(format!(
                "NCCL does not say its version: {}",
                calls.words(result, null_mut())
            )));
        }
        if version < OLDEST {
            let (version, oldest) = (version_name(version), version_name(OLDEST));
            return Err(missing(format!("NCCL {version} is older than {oldest}")));
        }
        Ok(Nccl { calls: Arc::new(calls), version })
    }
}

/// `2.32.3` of 23203; before 2.9 the minor had one digit.
fn version_name(version: c_int) -> String {
    match version {
        ..10_000 => format!("{}.{}.{}", version / 1000, version % 1000 / 100, version % 100),
        _ => format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100),
    }
}

impl Calls {
    /// What the library has to say about a result.
    fn words(&self, result: c_int, comm: Comm) -> String {
        let text = |words: *const c_char| match words.is_null() {
            true => String::new(),
            // SAFETY: strings of the library end in a zero.
            false => unsafe { CStr::from_ptr(words) }.to_string_lossy().trim().to_string(),
        };
        // SAFETY: a communicator that is alive, or none.
        let (what, last) = unsafe { (text((self.error_string)(result)), text((self.last_error)(comm))) };
        match last.is_empty() {
            true => format!("{what} ({result})"),
            false => format!("{what} ({result}): {last}"),
        }
    }

    fn check(&self, call: &str, result: c_int, comm: Comm) -> Result<(), String> {
        match result {
            SUCCESS | IN_PROGRESS => Ok(()),
            failed => Err(format!("{call}: {}", self.words(failed, comm))),
        }
    }
}

impl Peers for Nccl {
    fn name(&self) -> String {
        format!("NCCL {}", version_name(self.version))
    }

    fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = Id([0; ID_BYTES]);
        // SAFETY: writes an id.
        let result = unsafe { (self.calls.get_unique_id)(&mut id) };
        self.calls.check("ncclGetUniqueId", result, null_mut())?;
        Ok(UniqueId(id.0))
    }

    fn join(&self, id: &UniqueId, rank: usize, ranks: usize) -> Result<Arc<dyn Team>, String> {
        // Our GPU is the one of this thread from now on.
        present().driver().handle(Stream::Compute);
        let mut config =
            Config { size: size_of::<Config>(), magic: MAGIC, version: OLDEST as c_uint, blocking: 0 };
        let mut comm = null_mut();
        let (ranks, rank) = (ranks as c_int, rank as c_int);
        // SAFETY: writes a handle; the configuration is that of its version.
        let result = unsafe { (self.calls.init_rank)(&mut comm, ranks, Id(id.0), rank, &mut config) };
        self.calls.check("ncclCommInitRank", result, null_mut())?;
        Ok(Arc::new(NcclTeam { calls: self.calls.clone(), comm: Mutex::new(Some(Alive(comm))) }))
    }
}

/// A communicator that was neither aborted nor destroyed.
#[derive(Clone, Copy)]
struct Alive(Comm);

// SAFETY: a communicator may be used from any thread, by one at a time.
unsafe impl Send for Alive {}

struct NcclTeam {
    calls: Arc<Calls>,
    comm: Mutex<Option<Alive>>,
}

const ABORTED: &str = "it was ended";

impl NcclTeam {
    /// Waits until what was called last is on its stream.
    fn settle(&self) -> Result<(), String> {
        let mut looks = 0;
        loop {
            {
                let comm = lock(&self.comm);
                let Some(Alive(comm)) = *comm else { return Err(ABORTED.to_string()) };
                match self.state(comm)? {
                    SUCCESS => return Ok(()),
                    IN_PROGRESS => {}
                    failed => return Err(self.calls.words(failed, comm)),
                }
            }
            looks += 1;
            if looks < LOOKS { std::thread::yield_now() } else { std::thread::sleep(LOOK_EVERY) }
        }
    }

    fn state(&self, comm: Comm) -> Result<c_int, String> {
        let mut state = SUCCESS;
        // SAFETY: a communicator that is alive; writes a number.
        let result = unsafe { (self.calls.async_error)(comm, &mut state) };
        self.calls.check("ncclCommGetAsyncError", result, comm)?;
        Ok(state)
    }

    fn call(
        &self,
        stream: Stream,
        body: impl FnOnce(Comm, CudaStream) -> Result<(), String>,
    ) -> Result<(), String> {
        let stream = present().driver().handle(stream);
        {
            let comm = lock(&self.comm);
            let Some(Alive(comm)) = *comm else { return Err(ABORTED.to_string()) };
            body(comm, stream)?;
        }
        self.settle()
    }

    /// The moves of an open group.
    fn enqueue(&self, comm: Comm, stream: CudaStream, moves: &[Move]) -> Result<(), String> {
        for one in moves {
            // SAFETY: the promise of whoever exchanges.
            let (name, result) = unsafe {
                match *one {
                    Move::Send(at, bytes, to) => {
                        let to = to as c_int;
                        ("ncclSend", (self.calls.send)(at as *const _, bytes, BYTES, to, comm, stream))
                    }
                    Move::Receive(at, bytes, from) => {
                        let from = from as c_int;
                        ("ncclRecv", (self.calls.receive)(at as *mut _, bytes, BYTES, from, comm, stream))
                    }
                }
            };
            self.calls.check(name, result, comm)?;
        }
        Ok(())
    }
}

impl Team for NcclTeam {
    fn meet(&self) -> Result<(), String> {
        self.settle()
    }

    unsafe fn exchange(&self, stream: Stream, moves: &[Move]) -> Result<(), String> {
        self.call(stream, |comm, stream| {
            // SAFETY: a group that is closed on this thread below.
            self.calls.check("ncclGroupStart", unsafe { (self.calls.group_start)() }, comm)?;
            let enqueued = self.enqueue(comm, stream, moves);
            // SAFETY: as above.
            let ended = self.calls.check("ncclGroupEnd", unsafe { (self.calls.group_end)() }, comm);
            enqueued.and(ended)
        })
    }

    unsafe fn broadcast(&self, stream: Stream, at: Address, bytes: usize, root: usize) -> Result<(), String> {
        self.call(stream, |comm, stream| {
            let (from, to, root) = (at as *const c_void, at as *mut c_void, root as c_int);
            // SAFETY: the caller's promise.
            let result = unsafe { (self.calls.broadcast)(from, to, bytes, BYTES, root, comm, stream) };
            self.calls.check("ncclBroadcast", result, comm)
        })
    }

    unsafe fn all_gather(
        &self,
        stream: Stream,
        mine: Address,
        all: Address,
        bytes: usize,
    ) -> Result<(), String> {
        self.call(stream, |comm, stream| {
            let (mine, all) = (mine as *const c_void, all as *mut c_void);
            // SAFETY: the caller's promise.
            let result = unsafe { (self.calls.all_gather)(mine, all, bytes, BYTES, comm, stream) };
            self.calls.check("ncclAllGather", result, comm)
        })
    }

    fn problem(&self) -> Option<String> {
        let comm = lock(&self.comm);
        let Alive(comm) = (*comm)?;
        match self.state(comm) {
            Ok(SUCCESS | IN_PROGRESS) => None,
            Ok(failed) => Some(self.calls.words(failed, comm)),
            Err(words) => Some(words),
        }
    }

    fn abort(&self) {
        if let Some(Alive(comm)) = lock(&self.comm).take() {
            // SAFETY: alive until now, and nobody else has it.
            unsafe { (self.calls.abort)(comm) };
        }
    }

    fn close(&self) {
        let Some(Alive(comm)) = lock(&self.comm).take() else { return };
        present().driver().handle(Stream::Compute);
        // SAFETY: alive until now, and nobody else has it.
        unsafe {
            let start = Instant::now();
            let mut state = (self.calls.finalize)(comm);
            while state == IN_PROGRESS && start.elapsed() < FAREWELL {
                std::thread::sleep(LOOK_EVERY);
                state = self.state(comm).unwrap_or(IN_PROGRESS);
            }
            match state {
                SUCCESS => (self.calls.destroy)(comm),
                _ => (self.calls.abort)(comm),
            };
        }
    }
}
