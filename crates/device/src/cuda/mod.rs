//! GPUs: found at run time, without a toolkit to build with. One stream runs kernels in the order in which they
//! were launched; memory that is freed goes to whoever asks next in that order, so nothing waits but who
//! reads. A thread can have its work on another stream (`on_stream`): beside the kernels.

mod driver;
#[cfg(feature = "emulate")]
mod emulated;
mod frames;
mod lt;
mod nccl;
mod nvrtc;
mod peers;
mod real;

pub use driver::{Address, Card, Driver, Frame, Kernel, Mark, Matmul, Matrix, Program, Stream};
#[cfg(feature = "emulate")]
pub use emulated::{Emulated, PlayedPeers, for_a_test};
#[cfg(feature = "emulate")]
pub use peers::play_peers;
pub use peers::{
    ID_BYTES, Leg, Move, NoPeers, Peers, Team, UniqueId, all_gather, broadcast, exchange, peers,
};

pub use nvrtc::{compile, has_compiler};

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// Why there is no GPU to work with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no GPU: {what}; {remedy}")]
pub struct NoGpu {
    /// What is missing.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

static KEPT: OnceLock<PathBuf> = OnceLock::new();

/// Keep compiled kernels in a folder from now on: compiling them takes seconds, and every process needs the same.
pub fn keep_kernels_in(folder: PathBuf) {
    // Who comes second asks for the same.
    KEPT.set(folder).ok();
}

static GPU: OnceLock<Result<Gpu, NoGpu>> = OnceLock::new();

/// Which process of its machine this one is, among those that compute on GPUs.
static SEAT: OnceLock<usize> = OnceLock::new();

/// This process is the `seat`-th of several on its machine: it takes the `seat`-th GPU the driver shows
/// (`CUDA_VISIBLE_DEVICES` chooses which those are); where there are fewer, processes take turns. To be said
/// before the GPU is first asked for; panics where it was.
pub fn choose(seat: usize) {
    assert!(GPU.get().is_none(), "a GPU is chosen before it is used");
    assert!(SEAT.set(seat).is_ok(), "a GPU is chosen once");
}

/// The GPU of this process: the first one the driver shows, the one that `choose` says, or one that was set with
/// `play`.
pub fn gpu() -> Result<&'static Gpu, NoGpu> {
    let seat = || SEAT.get().copied().unwrap_or(0);
    GPU.get_or_init(|| Ok(Gpu::on(Box::new(real::Real::of(seat())?)))).as_ref().map_err(Clone::clone)
}

/// Whether `gpu` will find one, as far as can be said without opening it: a process that only looks after others
/// takes nothing of a card.
pub fn find() -> Result<(), NoGpu> {
    static FOUND: OnceLock<Result<(), NoGpu>> = OnceLock::new();
    match GPU.get() {
        Some(gpu) => gpu.as_ref().map(|_| ()).map_err(Clone::clone),
        None => FOUND.get_or_init(|| real::find().map(|_| ())).clone(),
    }
}

/// The GPU that the `seat`-th of several processes takes, where the driver shows so many.
fn turn(seat: usize, cards: usize) -> usize {
    seat % cards.max(1)
}

/// The GPU that a buffer lives on: there is one, or there would be no such buffer.
pub(crate) fn present() -> &'static Gpu {
    gpu().expect("what lives on a GPU was made by one")
}

thread_local! {
    static STREAM: Cell<Stream> = const { Cell::new(Stream::Compute) };
}

/// The stream on which the work of this thread runs.
pub fn stream() -> Stream {
    STREAM.get()
}

/// What `body` launches, copies and fills runs on `stream`. It begins behind what was done before if the stream
/// follows a mark; buffers that are made or dropped meanwhile do what is needed by themselves.
pub fn on_stream<R>(stream: Stream, body: impl FnOnce() -> R) -> R {
    struct Back(Stream);
    impl Drop for Back {
        fn drop(&mut self) {
            STREAM.set(self.0);
        }
    }
    let _back = Back(STREAM.replace(stream));
    body()
}

/// Memory that was freed in the order of the compute stream is about to be used on this thread's.
pub(crate) fn took() {
    let stream = stream();
    if stream != Stream::Compute {
        let driver = present().driver();
        driver.follow(stream, driver.mark(Stream::Compute));
    }
}

/// Memory that this thread's stream may still use is about to go to whoever asks next in the order of the compute
/// stream, which shall not wait.
pub(crate) fn gives() {
    if stream() != Stream::Compute {
        present().driver().wait(stream());
    }
}

/// Wait until all kernels have run.
pub fn synchronise() {
    present().driver.wait(Stream::Compute);
}

/// Bytes a second that the link to the GPU carries, up and down, from memory of the host that is pinned or not.
pub fn copied_per_s(pinned: bool) -> (f64, f64) {
    const BYTES: usize = 64 << 20;
    let (gpu, mut here) = (present(), vec![1u8; BYTES]);
    let there = gpu.workspace(BYTES);
    // SAFETY: it is unpinned before it is given back.
    let pinned = pinned && unsafe { gpu.driver.pin(here.as_mut_ptr(), BYTES) };
    let mut seconds = [f64::INFINITY; 2];
    for _ in 0..4 {
        for (way, least) in seconds.iter_mut().enumerate() {
            gpu.driver.wait(Stream::Compute);
            let started = Instant::now();
            // SAFETY: both ends have as many bytes and are ours until the stream was waited for.
            unsafe {
                match way {
                    0 => gpu.driver.copy_up(Stream::Compute, there, here.as_ptr(), BYTES),
                    _ => gpu.driver.copy_down(Stream::Compute, here.as_mut_ptr(), there, BYTES),
                }
            }
            gpu.driver.wait(Stream::Compute);
            *least = least.min(started.elapsed().as_secs_f64());
        }
    }
    if pinned {
        // SAFETY: pinned above.
        unsafe { gpu.driver.unpin(here.as_mut_ptr()) };
    }
    let [up, down] = seconds.map(|seconds| BYTES as f64 / seconds);
    (up, down)
}

/// Let `driver` play the GPU of this process, for tests. False when there is one already.
#[cfg(feature = "emulate")]
pub fn play(driver: Box<dyn Driver>) -> bool {
    let mut was_set = false;
    GPU.get_or_init(|| {
        was_set = true;
        Ok(Gpu::on(driver))
    })
    .as_ref()
    .is_ok_and(|_| was_set)
}

/// A GPU and what one process has of it.
pub struct Gpu {
    driver: Box<dyn Driver>,
    card: Card,
    /// Workspaces that no thread has.
    spare: Mutex<Vec<Workspace>>,
    /// Small arrays on their way up.
    uploads: Mutex<Uploads>,
    frames: Mutex<frames::Frames>,
    /// Told of whoever leaves `frames`.
    left: Condvar,
}

/// Memory that one op uses between its launches. Every thread has its own: launches of several may come in
/// between each other.
#[derive(Clone, Copy)]
struct Workspace {
    bytes: usize,
    at: Address,
}

/// The workspace of a thread. When the thread ends another one gets it.
#[derive(Default)]
struct Own(Option<Workspace>);

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(own) = self.0 {
            lock(&present().spare).push(own);
        }
    }
}

thread_local! {
    static OWN: RefCell<Own> = RefCell::default();
}

/// A ring in the memory of the GPU through which small arrays pass.
struct Uploads {
    ring: Address,
    used: usize,
    /// Streams but the compute stream that may still read it.
    others: Vec<Stream>,
}

/// Bytes of the ring. What was uploaded is overwritten after as many.
const RING_BYTES: usize = 32 << 20;

/// Where arrays begin in the ring and in the workspace.
const ALIGN_BYTES: usize = 256;

/// The first workspace, and what others have at least.
const WORKSPACE_BYTES: usize = 32 << 20;
const LEAST_WORKSPACE_BYTES: usize = 1 << 20;

impl Gpu {
    fn on(driver: Box<dyn Driver>) -> Gpu {
        let card = driver.card();
        let first = |bytes| driver.allocate(bytes).unwrap_or_else(|| no_room(bytes));
        let (ring, workspace) = (first(RING_BYTES), first(WORKSPACE_BYTES));
        Gpu {
            card,
            spare: Mutex::new(vec![Workspace { bytes: WORKSPACE_BYTES, at: workspace }]),
            uploads: Mutex::new(Uploads { ring, used: 0, others: Vec::new() }),
            frames: Mutex::default(),
            left: Condvar::new(),
            driver,
        }
    }

    /// What it is.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The calls to it.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Make the kernels of a program known; the error is the compiler's.
    pub fn load(&self, program: &Program<'_>) -> Result<(), String> {
        self.driver.load(program, KEPT.get().map(PathBuf::as_path))
    }

    /// At least `bytes` that the op which asks has to itself until the next one of its thread asks.
    pub fn workspace(&self, bytes: usize) -> Address {
        OWN.with_borrow_mut(|own| {
            let had = own.0.take().or_else(|| lock(&self.spare).pop());
            let own = own.0.insert(had.filter(|had| had.bytes >= bytes).unwrap_or_else(|| {
                if let Some(had) = had {
                    // Ops before may still use it.
                    self.driver.wait(Stream::Compute);
                    self.driver.release(had.at);
                }
                let bytes = bytes.next_power_of_two().max(LEAST_WORKSPACE_BYTES);
                Workspace { bytes, at: self.driver.allocate(bytes).unwrap_or_else(|| no_room(bytes)) }
            }));
            own.at
        })
    }

    /// A copy of `bytes` in the GPU's memory, for ops that are launched next; it is overwritten after many
    /// others.
    pub fn upload(&self, bytes: &[u8]) -> Address {
        let mut uploads = lock(&self.uploads);
        assert!(bytes.len() <= RING_BYTES, "{} bytes of an argument of an op", bytes.len());
        if uploads.used + bytes.len() > RING_BYTES {
            self.driver.wait(Stream::Compute);
            uploads.others.drain(..).for_each(|stream| self.driver.wait(stream));
            uploads.used = 0;
        }
        let at = uploads.ring + uploads.used as u64;
        if stream() != Stream::Compute && !uploads.others.contains(&stream()) {
            uploads.others.push(stream());
        }
        uploads.used += bytes.len().next_multiple_of(ALIGN_BYTES);
        // SAFETY: the part of the ring is inside it, and no op launched before reads it: those that could
        // were waited for.
        unsafe { self.driver.copy_up(stream(), at, bytes.as_ptr(), bytes.len()) };
        at
    }
}

fn no_room(bytes: usize) -> ! {
    panic!("the GPU has no {bytes} bytes left for what its ops need between two launches")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #[test]
    fn processes_take_a_card_each_and_turns_where_there_are_fewer() {
        let of = |cards| [0, 1, 2, 3, 4].map(|seat| super::turn(seat, cards));
        assert_eq!(of(8), [0, 1, 2, 3, 4]);
        assert_eq!(of(2), [0, 1, 0, 1, 0]);
        assert_eq!(of(1), [0; 5]);
        assert_eq!(of(0), [0; 5]);
    }
}
