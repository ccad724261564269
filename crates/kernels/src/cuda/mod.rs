//! Kernels on a GPU: a program of all `cuda.cu` files, compiled when first needed, and how they are launched.
//! Launches run one after the other; nobody waits for them here.

pub(crate) mod rows;
pub(crate) mod runs;

use device::cuda::{Address, Kernel, Matmul, Program, gpu};
use device::{DType, Device, View, ViewMut};
use std::ffi::c_void;
use std::sync::OnceLock;

/// What every part of the program begins with.
const COMMON: &[&str] = &[
    include_str!("common.cuh"),
    include_str!("runs.cuh"),
    include_str!("rows.cuh"),
    include_str!("../attention/cuda/operands.cuh"),
    include_str!("../attention/cuda/tiles.cuh"),
];

/// Parts that are compiled beside each other. What uses another's functions comes behind it in its part.
const PARTS: &[&[&str]] = &[
    &[include_str!("../attention/cuda/forward.cu")],
    &[include_str!("../attention/cuda/backward.cu")],
    &[include_str!("../attention/cuda/plain.cu"), include_str!("../attention/cuda/sums.cu")],
    &[include_str!("../adamw/cuda.cu"), include_str!("../adamw8/cuda.cu")],
    &[include_str!("../block/cuda.cu"), include_str!("../elementwise/cuda.cu")],
    &[include_str!("../cut_norm/cuda.cu"), include_str!("../rank_sum/cuda.cu")],
    &[
        include_str!("../embedding/cuda.cu"),
        include_str!("../experts/cuda.cu"),
        include_str!("../rope/cuda.cu"),
    ],
    &[include_str!("../gelu/cuda.cu"), include_str!("../gemm/cuda.cu"), include_str!("../swiglu/cuda.cu")],
    &[
        include_str!("../cross_entropy/cuda.cu"),
        include_str!("../cross_entropy/cut/cuda.cu"),
        include_str!("../global_norm/cuda.cu"),
    ],
    &[include_str!("../rms_norm/cuda.cu"), include_str!("../head_norm/cuda.cu")],
    &[include_str!("../layer_norm/cuda.cu")],
];

/// Text of each part, whole.
pub fn parts() -> Vec<String> {
    let common = COMMON.join("\n");
    PARTS.iter().map(|part| format!("{common}\n{}", part.join("\n"))).collect()
}

/// Compile and load the kernels, once for a process: what the first launch would do.
pub fn load() -> Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let begin = || {
        let gpu = gpu().map_err(|error| error.to_string())?;
        let (common, parts) =
            (COMMON.join("\n"), PARTS.iter().map(|part| part.join("\n")).collect::<Vec<_>>());
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        gpu.load(&Program { common: &common, parts: &parts })
    };
    LOADED.get_or_init(begin).clone()
}

/// Ending of the names of kernels of a type.
pub(crate) fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
        other => panic!("no float kernel reads {other}"),
    }
}

/// Makes sure that the ops of this call have `bytes` to themselves, from the address on.
pub(crate) fn workspace(bytes: usize) -> Address {
    present().workspace(bytes)
}

/// A product; see `Matmul`.
pub(crate) fn matmul(product: &Matmul) {
    // SAFETY: the matrices are windows of buffers, whose memory is given on in the order of launches.
    unsafe { present().driver().matmul(product) };
}

fn present() -> &'static device::cuda::Gpu {
    gpu().expect("what lives on a GPU was made by one")
}

/// A launch that is being put together; arguments in the order of the kernel's parameters.
pub(crate) struct Launch<'a> {
    name: &'a str,
    grid: [u32; 3],
    threads: [u32; 3],
    shared_bytes: u32,
    arguments: Vec<u64>,
}

/// A launch of one block of a warp until more is said.
pub(crate) fn launch(name: &str) -> Launch<'_> {
    Launch { name, grid: [1; 3], threads: [32, 1, 1], shared_bytes: 0, arguments: Vec::with_capacity(16) }
}

fn small(count: usize) -> u32 {
    u32::try_from(count).unwrap_or_else(|_| panic!("{count} of something that is counted in 32 bits"))
}

impl Launch<'_> {
    /// Blocks.
    pub fn grid(self, x: usize) -> Self {
        self.grid3(x, 1, 1)
    }

    /// Blocks in three dimensions.
    pub fn grid3(mut self, x: usize, y: usize, z: usize) -> Self {
        self.grid = [x, y, z].map(small);
        self
    }

    /// Threads of a block.
    pub fn threads(mut self, x: usize) -> Self {
        self.threads = [small(x), 1, 1];
        self
    }

    /// Dynamic shared memory of a block.
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = small(bytes);
        self
    }

    /// An array to read.
    pub fn read(self, view: View<'_>) -> Self {
        assert!(view.device() == Device::Cuda, "{} reads memory of the host", self.name);
        self.address(view.address())
    }

    /// An array to write.
    pub fn write(self, view: &ViewMut<'_>) -> Self {
        assert!(view.device() == Device::Cuda, "{} writes memory of the host", self.name);
        self.address(view.address())
    }

    /// An array to read, or a null pointer.
    pub fn optional(self, view: Option<View<'_>>) -> Self {
        match view {
            Some(view) => self.read(view),
            None => self.address(0),
        }
    }

    /// An array to write, or a null pointer.
    pub fn optional_write(self, view: Option<&ViewMut<'_>>) -> Self {
        match view {
            Some(view) => self.write(view),
            None => self.address(0),
        }
    }

    /// An array of the host, copied for this op.
    pub fn ids(self, ids: &[u32]) -> Self {
        // SAFETY: integers as bytes.
        let bytes = unsafe { std::slice::from_raw_parts(ids.as_ptr().cast(), size_of_val(ids)) };
        self.address(present().upload(bytes))
    }

    /// An address.
    pub fn address(mut self, at: Address) -> Self {
        self.arguments.push(at);
        self
    }

    /// A number of 32 bits.
    pub fn u32(mut self, value: usize) -> Self {
        self.arguments.push(u64::from(small(value)));
        self
    }

    /// A number of 64 bits.
    pub fn u64(mut self, value: usize) -> Self {
        self.arguments.push(value as u64);
        self
    }

    /// A float.
    pub fn f32(mut self, value: f32) -> Self {
        self.arguments.push(u64::from(value.to_bits()));
        self
    }

    /// Launch it; nothing happens where there are no blocks.
    pub fn run(mut self) {
        if self.grid.contains(&0) {
            return;
        }
        load().unwrap_or_else(|error| panic!("{error}"));
        let Launch { name, grid, threads, shared_bytes, .. } = self;
        let kernel = Kernel { name, grid, threads, shared_bytes };
        // A driver reads as many bytes of each as the parameter has: the first, on machines there are.
        let mut pointers: Vec<*mut c_void> =
            self.arguments.iter_mut().map(|value| (value as *mut u64).cast()).collect();
        // SAFETY: kernels and their launches stand side by side in each op; windows live in buffers, whose
        // memory is given on in the order of launches.
        unsafe { present().driver().launch(device::cuda::stream(), &kernel, &mut pointers) };
    }
}
