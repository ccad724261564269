//! What plays a GPU keeps its promises: results, and mistakes that are found.

use device::DType;
use device::cuda::{Driver, Emulated, Kernel, Matmul, Matrix, Program, Stream};
use half::bf16;
use std::ffi::c_void;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

const PROGRAM: &str = concat!(include_str!("../../kernels/src/cuda/common.cuh"), include_str!("emulate.cu"));

static GPU: LazyLock<Emulated> = LazyLock::new(|| {
    let gpu = Emulated::new(64 << 20);
    gpu.load(&Program { common: PROGRAM, parts: &[] }, None).unwrap_or_else(|error| panic!("{error}"));
    gpu
});

/// One test at a time: some of them fork.
fn gpu() -> (MutexGuard<'static, ()>, &'static Emulated) {
    static TURN: Mutex<()> = Mutex::new(());
    (TURN.lock().unwrap_or_else(PoisonError::into_inner), &GPU)
}

fn up<T: Copy>(gpu: &Emulated, values: &[T]) -> u64 {
    let at = gpu.allocate(size_of_val(values)).expect("room");
    // SAFETY: as many bytes as there are.
    unsafe { gpu.copy_up(Stream::Up, at, values.as_ptr().cast(), size_of_val(values)) };
    at
}

fn down<T: Copy + Default>(gpu: &Emulated, at: u64, len: usize) -> Vec<T> {
    let mut values = vec![T::default(); len];
    // SAFETY: as above; any bits are a value of the types that are used.
    unsafe { gpu.copy_down(Stream::Down, values.as_mut_ptr().cast(), at, len * size_of::<T>()) };
    values
}

fn run(gpu: &Emulated, name: &str, grid: [u32; 3], threads: [u32; 3], shared: usize, arguments: &[u64]) {
    let mut arguments = arguments.to_vec();
    let mut pointers: Vec<*mut c_void> =
        arguments.iter_mut().map(|argument| (argument as *mut u64).cast()).collect();
    let kernel = Kernel { name, grid, threads, shared_bytes: shared as u32 };
    // SAFETY: the kernels of `emulate.cu`, with what they ask for.
    unsafe { gpu.launch(Stream::Compute, &kernel, &mut pointers) };
}

fn small(i: usize) -> f32 {
    (i * 7919 % 31) as f32 / 8.0 - 2.0
}

#[test]
fn sums_over_blocks() {
    let (_turn, gpu) = gpu();
    let (rows, d) = (5, 1000);
    let x: Vec<f32> = (0..rows * d).map(small).collect();
    let rounded: Vec<bf16> = x.iter().copied().map(bf16::from_f32).collect();
    for (name, at) in [("test_sums_f32", up(gpu, &x)), ("test_sums_bf16", up(gpu, &rounded))] {
        for threads in [32, 96, 256] {
            let y = gpu.allocate(rows * 8).expect("room");
            run(gpu, name, [rows as u32, 1, 1], [threads, 1, 1], 0, &[at, y, d as u64]);
            let got: Vec<f32> = down(gpu, y, 2 * rows);
            for (row, got) in got.chunks_exact(2).enumerate() {
                let want: f32 = x[row * d..][..d].iter().sum();
                assert_eq!(got, [want, threads as f32 - 1.0], "{name} {threads} {row}");
            }
            gpu.release(y);
        }
    }
}

#[test]
fn products_of_fragments() {
    let (_turn, gpu) = gpu();
    let a: Vec<bf16> = (0..256).map(|i| bf16::from_f32(small(i))).collect();
    let b: Vec<bf16> = (0..256).map(|i| bf16::from_f32(small(3 * i + 1))).collect();
    let (at_a, at_b, c) = (up(gpu, &a), up(gpu, &b), gpu.allocate(1024).expect("room"));
    for (name, transposed) in [("test_product", false), ("test_product_transposed", true)] {
        run(gpu, name, [1; 3], [32, 1, 1], 0, &[at_a, at_b, c]);
        let got: Vec<f32> = down(gpu, c, 256);
        for (at, got) in got.iter().enumerate() {
            let (i, j) = (at / 16, at % 16);
            let first = if i >= 8 && j % 2 == 1 { 1.0 } else { 0.0 };
            let want = (0..16).fold(first, |sum, k| {
                let y = if transposed { b[k * 16 + j] } else { b[j * 16 + k] };
                sum + a[i * 16 + k].to_f32() * y.to_f32()
            });
            assert_eq!(*got, want, "{name} ({i}, {j})");
        }
    }
}

#[test]
fn copies_under_way() {
    let (_turn, gpu) = gpu();
    let (tiles, threads) = (5usize, 64usize);
    let x: Vec<f32> = (0..tiles * threads * 4).map(small).collect();
    let n = x.len() - 20;
    let (at, y) = (up(gpu, &x), gpu.allocate(threads * 4).expect("room"));
    run(gpu, "test_pipeline", [1; 3], [64, 1, 1], 2 * threads * 16, &[at, y, n as u64, tiles as u64]);
    for (thread, got) in down::<f32>(gpu, y, threads).iter().enumerate() {
        let places = (0..tiles * 4).map(|i| i / 4 * threads * 4 + 4 * (threads - 1 - thread) + i % 4);
        assert_eq!(*got, places.filter(|at| *at < n).map(|at| x[at]).sum::<f32>(), "{thread}");
    }
}

#[test]
fn threads_that_leave_and_lanes_that_trade() {
    let (_turn, gpu) = gpu();
    for n in [1usize, 32, 50, 128] {
        let y = gpu.allocate(512).expect("room");
        run(gpu, "test_some_leave", [2, 1, 1], [128, 1, 1], 0, &[y, n as u64]);
        let want: Vec<f32> = (0..n).map(|i| (127 - (n - 1 - i)) as f32).collect();
        assert_eq!(down::<f32>(gpu, y, n), want);
    }
    let y = gpu.allocate(512).expect("room");
    run(gpu, "test_shuffles", [1; 3], [64, 1, 1], 0, &[y]);
    let want = (0..64u32).flat_map(|i| [(i / 32 * 32 + (i + 1) % 32).pow(2), i ^ 5]);
    assert_eq!(down::<u32>(gpu, y, 128), want.collect::<Vec<u32>>());
    let y = gpu.allocate(60 * 24 * 8).expect("room");
    let scale = u64::from(2.0f32.to_bits());
    run(gpu, "test_places", [3, 4, 5], [2, 3, 4], 0, &[y, 1 << 40, scale]);
    assert_eq!(down::<u64>(gpu, y, 60 * 24), (0..60 * 24).map(|i| (1 << 40) + 2 * i).collect::<Vec<u64>>());
}

#[test]
fn what_was_not_written_is_nan() {
    let (_turn, gpu) = gpu();
    let y = gpu.allocate(512).expect("room");
    assert!(down::<f32>(gpu, y, 128).iter().all(|value| value.is_nan()));
    run(gpu, "test_unwritten", [2, 1, 1], [64, 1, 1], 256, &[y]);
    assert!(down::<f32>(gpu, y, 128).iter().all(|value| value.is_nan()));
    run(gpu, "test_without_barrier", [1; 3], [64, 1, 1], 0, &[y, 1]);
    assert!(down::<f32>(gpu, y, 64).iter().all(|value| !value.is_nan()));
    run(gpu, "test_without_barrier", [1; 3], [64, 1, 1], 0, &[y, 0]);
    assert!(down::<f32>(gpu, y, 64).iter().any(|value| value.is_nan()));
}

/// What is said to the error stream when the launch stops the process, a copy of this one.
fn last_words(launch: impl FnOnce()) -> String {
    let mut ends = [0; 2];
    // SAFETY: the copy launches and ends; only this thread goes on in it, and no other launches now.
    let child = unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        match libc::fork() {
            0 => {
                libc::dup2(ends[1], 2);
                launch();
                libc::_exit(0)
            }
            child => child,
        }
    };
    let (mut words, mut buffer, mut status) = (String::new(), [0u8; 512], 0);
    // SAFETY: ends of the pipe, and a buffer of that size.
    unsafe {
        libc::close(ends[1]);
        loop {
            let got = libc::read(ends[0], buffer.as_mut_ptr().cast(), buffer.len());
            if got <= 0 {
                break;
            }
            words.push_str(&String::from_utf8_lossy(&buffer[..got as usize]));
        }
        libc::close(ends[0]);
        libc::waitpid(child, &mut status, 0);
    }
    assert!(libc::WIFSIGNALED(status), "the launch went well: {words}");
    words
}

#[test]
fn mistakes_stop_the_process() {
    let (_turn, gpu) = gpu();
    let y = gpu.allocate(1024).expect("room");
    let says = |name: &str, threads: u32, shared: usize, arguments: &[u64], what: &str| {
        let words = last_words(|| run(gpu, name, [1; 3], [threads, 1, 1], shared, arguments));
        assert!(words.contains(&format!("kernel {name}, block (0, 0, 0)")), "{words}");
        assert!(words.contains(what), "{words}");
    };
    says("test_apart", 64, 0, &[y], "56 in sync, the first (0, 0, 0); 8 in shuffle_xor, the first (32");
    says("test_left", 32, 0, &[y], "of its warp have ended");
    says("test_behind", 32, 0, &[y, 256], "uses address");
    says("test_behind_shared", 32, 100, &[y, 30], "wrote behind the 100 bytes");
    says("test_behind_shared", 32, 100, &[y, 32], "uses address");
    says("test_crooked", 32, 16, &[y], "copy_async_16 from");
    says("test_behind", 64, 0, &[y, 0], "launched with blocks of 64 threads, 32 at most");
    says("test_sums_f32", 48, 0, &[y, y, 4], "have ended or never were");
}

#[test]
fn memory_behind_addresses() {
    let (_turn, gpu) = gpu();
    let free = gpu.free_bytes();
    let granule = gpu.granularity();
    let at = gpu.reserve(3 * granule).expect("addresses");
    let frame = gpu.create(granule).expect("a frame");
    assert_eq!(gpu.free_bytes(), free - granule);
    gpu.map(at + granule as u64, frame, granule);
    assert!(down::<f32>(gpu, at + granule as u64, 8).iter().all(|value| value.is_nan()));
    run(gpu, "test_behind", [1; 3], [1, 1, 1], 0, &[at, granule as u64 / 4 + 3]);
    gpu.unmap(at + granule as u64, granule);
    gpu.map(at, frame, granule);
    assert_eq!(down::<f32>(gpu, at, 4)[3], 1.0, "what a frame holds moves with it");
    gpu.unmap(at, granule);
    gpu.destroy(frame);
    gpu.unreserve(at, 3 * granule);
    assert_eq!(gpu.free_bytes(), free);
    assert!(
        gpu.allocate(free + 1).is_none() && gpu.create(free.next_multiple_of(granule) + granule).is_none()
    );
}

#[test]
fn products_of_matrices() {
    let (_turn, gpu) = gpu();
    let (m, n, k) = (5, 7, 9);
    let a: Vec<bf16> = (0..m * (k + 2)).map(|i| bf16::from_f32(small(i))).collect();
    let b: Vec<bf16> = (0..n * k).map(|i| bf16::from_f32(small(i + 5))).collect();
    let (bias, old): (Vec<f32>, Vec<f32>) = ((0..n).map(small).collect(), (0..m * n).map(small).collect());
    let c = Matrix { at: up(gpu, &old), dtype: DType::F32, ld: n, transposed: false };
    let product = Matmul {
        m,
        n,
        k,
        a: Matrix { at: up(gpu, &a), dtype: DType::Bf16, ld: k + 2, transposed: false },
        b: Matrix { at: up(gpu, &b), dtype: DType::Bf16, ld: k, transposed: true },
        c,
        bias: Some(up(gpu, &bias)),
        added: Some(c),
    };
    // SAFETY: matrices of these sizes were just made.
    unsafe { gpu.matmul(&product) };
    for (at, got) in down::<f32>(gpu, c.at, m * n).iter().enumerate() {
        let (i, j) = (at / n, at % n);
        let sum: f32 = (0..k).map(|l| a[i * (k + 2) + l].to_f32() * b[j * k + l].to_f32()).sum();
        assert_eq!(*got, sum + bias[j] + old[at], "({i}, {j})");
    }
}

#[test]
fn errors_of_the_compiler_are_told() {
    let gpu = Emulated::new(1 << 20);
    let broken = "KERNEL(broken, 32, (float* y), { y[0] = nobody; })";
    let broken = Program { common: "", parts: &[broken] };
    let error = gpu.load(&broken, None).expect_err("no such word");
    assert!(error.contains("nobody"), "{error}");
}
