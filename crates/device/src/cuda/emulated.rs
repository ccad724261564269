//! A GPU played by the CPU, for tests where there is none: the text of the kernels is compiled for the host
//! (`emulate/emulate.h`), its memory is the host's, and all work is done when a call returns.

mod memory;
mod peers;
mod program;

use super::driver::{self, Address, Card, Driver, Frame, Kernel, Mark, Matmul, Matrix, Stream};
use super::{gpu, lock, play};
use crate::DType;
use half::bf16;
use memory::Memory;
pub use peers::PlayedPeers;
use program::Program;
use std::ffi::c_void;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, Once};

/// The GPU of a process that tests, for one test at a time: its memory is counted for the whole process, and ops
/// share a workspace. The CPU plays it unless this was built with `TRILITH_GPU=real`, which takes the machine's own.
pub fn for_a_test() -> MutexGuard<'static, ()> {
    static CHOSEN: Once = Once::new();
    static TURN: Mutex<()> = Mutex::new(());
    CHOSEN.call_once(|| {
        if option_env!("TRILITH_GPU") == Some("real") {
            eprintln!("on {}", gpu().expect("TRILITH_GPU=real asks for a GPU").card().name);
        } else {
            assert!(play(Box::new(Emulated::new(1 << 30))), "nobody asked for a GPU before");
        }
    });
    lock(&TURN)
}

/// The GPU that is played.
pub struct Emulated {
    card: Card,
    memory: Mutex<Memory>,
    program: Mutex<Option<Program>>,
}

impl Emulated {
    /// One with that much memory.
    pub fn new(memory_bytes: usize) -> Emulated {
        let card = Card {
            name: "emulated".into(),
            memory_bytes,
            capability: (8, 0),
            multiprocessors: 4,
            driver: (13, 0),
            shown: 1,
        };
        Emulated { card, memory: Mutex::new(Memory::new(memory_bytes)), program: Mutex::new(None) }
    }

    /// Stops on addresses that are none of the GPU's.
    fn check(&self, at: Address, bytes: usize) {
        assert!(lock(&self.memory).holds(at, bytes), "{bytes} bytes at {at:#x} are not in the GPU's memory");
    }

    fn check_matrix(&self, matrix: &Matrix, rows: usize, columns: usize) {
        let (rows, columns) = if matrix.transposed { (columns, rows) } else { (rows, columns) };
        assert!(matrix.ld >= columns, "rows of {columns} elements, {} apart", matrix.ld);
        if rows * columns > 0 {
            self.check(matrix.at, ((rows - 1) * matrix.ld + columns) * matrix.dtype.size_bytes());
        }
    }
}

impl Driver for Emulated {
    fn card(&self) -> Card {
        self.card.clone()
    }

    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }

    fn free_bytes(&self) -> usize {
        lock(&self.memory).free_bytes()
    }

    fn allocate(&self, bytes: usize) -> Option<Address> {
        lock(&self.memory).allocate(bytes)
    }

    fn release(&self, at: Address) {
        lock(&self.memory).release(at);
    }

    fn reserve(&self, bytes: usize) -> Option<Address> {
        lock(&self.memory).reserve(bytes)
    }

    fn unreserve(&self, at: Address, bytes: usize) {
        lock(&self.memory).unreserve(at, bytes);
    }

    fn granularity(&self) -> usize {
        memory::GRANULE_BYTES
    }

    fn create(&self, bytes: usize) -> Option<Frame> {
        lock(&self.memory).create(bytes)
    }

    fn destroy(&self, frame: Frame) {
        lock(&self.memory).destroy(frame);
    }

    fn map(&self, at: Address, frame: Frame, bytes: usize) {
        lock(&self.memory).map(at, frame, bytes);
    }

    fn unmap(&self, at: Address, bytes: usize) {
        lock(&self.memory).unmap(at, bytes);
    }

    unsafe fn copy_up(&self, _: Stream, to: Address, from: *const u8, bytes: usize) {
        self.check(to, bytes);
        // SAFETY: the caller's promise, and the GPU's end was just looked up.
        unsafe { std::ptr::copy(from, to as *mut u8, bytes) };
    }

    unsafe fn copy_down(&self, _: Stream, to: *mut u8, from: Address, bytes: usize) {
        self.check(from, bytes);
        // SAFETY: as above.
        unsafe { std::ptr::copy(from as *const u8, to, bytes) };
    }

    unsafe fn copy_within(&self, _: Stream, to: Address, from: Address, bytes: usize) {
        self.check(to, bytes);
        self.check(from, bytes);
        // SAFETY: as above.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
    }

    unsafe fn fill(&self, _: Stream, at: Address, byte: u8, bytes: usize) {
        self.check(at, bytes);
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(at as *mut u8, byte, bytes) };
    }

    unsafe fn pin(&self, _: *mut u8, _: usize) -> bool {
        true
    }

    unsafe fn unpin(&self, _: *mut u8) {}

    fn handle(&self, _: Stream) -> *mut c_void {
        std::ptr::null_mut()
    }

    fn wait(&self, _: Stream) {}

    fn mark(&self, _: Stream) -> Mark {
        Mark(NonZeroU64::MIN)
    }

    fn is_done(&self, _: Mark) -> bool {
        true
    }

    fn follow(&self, _: Stream, _: Mark) {}

    fn forget(&self, _: Mark) {}

    fn wait_for(&self, _: Mark) {}

    fn load(&self, program: &driver::Program<'_>, _: Option<&Path>) -> Result<(), String> {
        let source = [&[program.common], program.parts].concat().join("\n");
        *lock(&self.program) = Some(Program::compile(&source)?);
        Ok(())
    }

    unsafe fn launch(&self, _: Stream, kernel: &Kernel<'_>, arguments: &mut [*mut c_void]) {
        let program = lock(&self.program);
        let program = program.as_ref().expect("a program is loaded before its kernels are launched");
        // SAFETY: the caller's promise.
        unsafe { program.launch(kernel, arguments) };
    }

    unsafe fn matmul(&self, product: &Matmul) {
        let Matmul { m, n, k, a, b, c, bias, added } = *product;
        self.check_matrix(&a, m, k);
        self.check_matrix(&b, k, n);
        self.check_matrix(&c, m, n);
        if let Some(added) = &added {
            self.check_matrix(added, m, n);
        }
        if let Some(bias) = bias {
            self.check(bias, n * c.dtype.size_bytes());
            assert!(bias.is_multiple_of(16), "{product:?}");
        }
        assert!(k > 0 && a.dtype == b.dtype && !c.transposed, "{product:?}");
        assert!(a.dtype != DType::F32 || c.dtype == DType::F32, "{product:?}");
        // SAFETY: all elements lie in memory of the GPU, where nothing else runs meanwhile, by contract.
        unsafe {
            let factor: Vec<f32> = (0..k * n).map(|at| read(&b, at / n, at % n)).collect();
            let mut sums = vec![0.0f32; n];
            for i in 0..m {
                sums.fill(0.0);
                for (l, row) in factor.chunks_exact(n.max(1)).enumerate() {
                    let x = read(&a, i, l);
                    sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
                }
                for (j, sum) in sums.iter().enumerate() {
                    let bias = bias.map(|at| read(&Matrix { at, ..c }, 0, j));
                    let added = added.map(|added| read(&added, i, j));
                    write(&c, i, j, sum + bias.unwrap_or(0.0) + added.unwrap_or(0.0));
                }
            }
        }
    }
}

/// Where an element lies.
fn place(matrix: &Matrix, i: usize, j: usize) -> Address {
    let (i, j) = if matrix.transposed { (j, i) } else { (i, j) };
    matrix.at + ((i * matrix.ld + j) * matrix.dtype.size_bytes()) as u64
}

/// # Safety
/// The element is there.
unsafe fn read(matrix: &Matrix, i: usize, j: usize) -> f32 {
    let at = place(matrix, i, j);
    // SAFETY: the caller's promise; elements are aligned.
    unsafe {
        match matrix.dtype {
            DType::F32 => *(at as *const f32),
            DType::Bf16 => (*(at as *const bf16)).to_f32(),
            other => panic!("no product has factors of {other}"),
        }
    }
}

/// # Safety
/// The element is there.
unsafe fn write(matrix: &Matrix, i: usize, j: usize, value: f32) {
    let at = place(matrix, i, j);
    // SAFETY: as above.
    unsafe {
        match matrix.dtype {
            DType::F32 => *(at as *mut f32) = value,
            DType::Bf16 => *(at as *mut bf16) = bf16::from_f32(value),
            other => panic!("no product is one of {other}"),
        }
    }
}
