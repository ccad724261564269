//! What is asked of a GPU: memory, copies, launches, products. One implementation drives a real one, the
//! other plays one on the CPU for tests.

use crate::DType;
use std::ffi::c_void;
use std::num::NonZeroU64;
use std::path::Path;

/// An address in the memory of a GPU.
pub type Address = u64;

/// Memory of a GPU that can be put behind addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame(pub u64);

/// A point in the work of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub NonZeroU64);

/// Work of one stream runs in order, streams run beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Kernels.
    Compute,
    /// Copies from the host.
    Up,
    /// Copies to the host.
    Down,
    /// Moves between GPUs, and what belongs to them: as many such streams as anybody asks for, by number.
    Peers(u16),
}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// As its maker calls it.
    pub name: String,
    /// Memory in all.
    pub memory_bytes: usize,
    /// Compute capability.
    pub capability: (u32, u32),
    /// How many blocks run side by side at least.
    pub multiprocessors: u32,
    /// Version of CUDA its driver speaks.
    pub driver: (u32, u32),
    /// GPUs the driver shows, this one among them.
    pub shown: usize,
}

/// A launch of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel<'a> {
    /// Its name in the program.
    pub name: &'a str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// The text of kernels.
#[derive(Clone, Debug)]
pub struct Program<'a> {
    /// What every part begins with.
    pub common: &'a str,
    /// Parts that can be compiled beside each other.
    pub parts: &'a [&'a str],
}

/// A row-major matrix in the memory of a GPU: element (i, j) at `i * ld + j`, or at `j * ld + i` when
/// `transposed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    /// First element.
    pub at: Address,
    /// f32 or bf16.
    pub dtype: DType,
    /// Elements from one stored row to the next.
    pub ld: usize,
    /// Whether the logical matrix is the transpose of the stored one.
    pub transposed: bool,
}

/// c [m, n] = a [m, k] b [k, n] + bias [n] + added [m, n], summed in f32; where c is bf16 the product may be
/// rounded once more before something is added. `a` and `b` are of one type, f32 only where c is; the bias, which
/// begins at a multiple of 16 bytes, and what is added are of c's type; nothing but `a` and `b` is transposed.
/// `added` may be `c` itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matmul {
    /// Rows of a and c.
    pub m: usize,
    /// Columns of b and c.
    pub n: usize,
    /// Columns of a, rows of b; not 0.
    pub k: usize,
    /// Left factor.
    pub a: Matrix,
    /// Right factor.
    pub b: Matrix,
    /// Where the sum goes.
    pub c: Matrix,
    /// Added to every row.
    pub bias: Option<Address>,
    /// Added to the product.
    pub added: Option<Matrix>,
}

/// A GPU, real or played. What cannot be done for lack of memory is `None`; any other refusal means that the
/// card or our own program is broken, and panics with the name of the call.
pub trait Driver: Send + Sync {
    /// What it is.
    fn card(&self) -> Card;
    /// No other card in the world has it.
    fn uuid(&self) -> [u8; 16];
    /// Memory nobody has, of the whole card.
    fn free_bytes(&self) -> usize;

    /// Memory.
    fn allocate(&self, bytes: usize) -> Option<Address>;
    /// Memory that `allocate` gave, back; what was launched before may still use it.
    fn release(&self, at: Address);

    /// Addresses without memory, a multiple of `granularity` bytes.
    fn reserve(&self, bytes: usize) -> Option<Address>;
    /// Addresses that `reserve` gave, nothing mapped behind them any more.
    fn unreserve(&self, at: Address, bytes: usize);
    /// Bytes that frames and what they are mapped behind are multiples of.
    fn granularity(&self) -> usize;
    /// Memory without address.
    fn create(&self, bytes: usize) -> Option<Frame>;
    /// Memory that `create` gave, mapped nowhere.
    fn destroy(&self, frame: Frame);
    /// Put a frame behind addresses.
    fn map(&self, at: Address, frame: Frame, bytes: usize);
    /// Take it away, once nothing uses it any more.
    fn unmap(&self, at: Address, bytes: usize);

    /// Bytes of the host to the GPU; they may change once this has returned.
    ///
    /// # Safety
    /// Both ends hold `bytes`, and nobody else writes them meanwhile.
    unsafe fn copy_up(&self, stream: Stream, to: Address, from: *const u8, bytes: usize);
    /// Bytes of the GPU to the host; they are there once the stream was waited for.
    ///
    /// # Safety
    /// As above, until the stream was waited for.
    unsafe fn copy_down(&self, stream: Stream, to: *mut u8, from: Address, bytes: usize);
    /// Bytes within the GPU.
    ///
    /// # Safety
    /// As above.
    unsafe fn copy_within(&self, stream: Stream, to: Address, from: Address, bytes: usize);
    /// Set every byte.
    ///
    /// # Safety
    /// As above.
    unsafe fn fill(&self, stream: Stream, at: Address, byte: u8, bytes: usize);

    /// Pin memory of the host, so that copies run at the speed of the link. False where the system refuses.
    ///
    /// # Safety
    /// The memory stays until `unpin`.
    unsafe fn pin(&self, at: *mut u8, bytes: usize) -> bool;
    /// The other way.
    ///
    /// # Safety
    /// It was pinned.
    unsafe fn unpin(&self, at: *mut u8);

    /// A stream as other libraries know it, whose calls this thread is about to make.
    fn handle(&self, stream: Stream) -> *mut c_void;
    /// Wait until all work of a stream is done.
    fn wait(&self, stream: Stream);
    /// A mark behind all work of a stream so far.
    fn mark(&self, stream: Stream) -> Mark;
    /// Whether all work before a mark is done; the mark stays.
    fn is_done(&self, mark: Mark) -> bool;
    /// Let a stream wait for a mark, which is used up.
    fn follow(&self, stream: Stream, mark: Mark);

    /// Nobody waits for a mark; it is used up.
    fn forget(&self, mark: Mark);
    /// Wait until all work before a mark is done; the mark is used up.
    fn wait_for(&self, mark: Mark);

    /// Compile a program and load it; later launches find its kernels. What was compiled is kept in a folder, where
    /// one is given, for the next process. The error is the compiler's.
    fn load(&self, program: &Program<'_>, kept: Option<&Path>) -> Result<(), String>;
    /// Run a kernel on a stream.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and what they point to is there until it has run.
    unsafe fn launch(&self, stream: Stream, kernel: &Kernel<'_>, arguments: &mut [*mut c_void]);
    /// A product on the compute stream.
    ///
    /// # Safety
    /// The matrices lie in memory of the GPU that is there until it has run.
    unsafe fn matmul(&self, product: &Matmul);
}
