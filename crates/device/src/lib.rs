//! What a machine is made of: devices, buffers, instruction sets, worker threads.
//!
//! This room knows bytes and element types; it never learns a shape, a tensor or a parameter.
//! `unsafe` is allowed here and in `kernels` only.

mod buffer;
mod copy;
pub mod cuda;
mod dtype;
mod frames;
mod isa;
mod loan;
mod memory;
mod region;
mod threads;
mod view;

pub use buffer::{Buffer, OutOfMemory};
pub use copy::{copy, fill_zero};
pub use dtype::DType;
pub use frames::Frames;
pub use isa::Isa;
pub use loan::{Borrowed, Exclusive, Window};
pub use memory::{
    MemoryUse, available_bytes, limit_parked, memory_use, memory_use_of, release_cached, reset_peak,
    resident_bytes,
};
pub use region::{Loan, Region, Stretch};
pub use threads::{Threads, cores, for_each_chunk, for_each_index, for_each_part, num_threads};
pub use view::{Slice, SliceMut, View, ViewMut};

/// Where a buffer lives and where its ops run. A value, never a type parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The cores and the DRAM of this machine.
    Cpu,
    /// The GPU of this process (`cuda::gpu`) and its memory.
    Cuda,
}

impl Device {
    /// All there are.
    pub const ALL: [Device; 2] = [Device::Cpu, Device::Cuda];

    /// Only memory of the host opens into slices; anything else is our bug.
    fn assert_opens(self) {
        assert!(self == Device::Cpu, "memory of a GPU was opened on the host");
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        })
    }
}
