//! Bytes from one window to another, whatever memory each looks at.

use crate::cuda;
use crate::{Device, View, ViewMut};

/// to = from: equal types and lengths, bit by bit. What comes to the host is there when this returns; what
/// goes to a GPU or stays on it is there for whatever is launched next.
pub fn copy(to: ViewMut<'_>, from: View<'_>) {
    assert!(to.dtype() == from.dtype() && to.len() == from.len(), "a copy of equal types and lengths");
    let bytes = to.len() * to.dtype().size_bytes();
    let (there, here) = (to.address(), from.address());
    match (to.device(), from.device()) {
        (Device::Cpu, Device::Cpu) => to.bytes().copy_from_slice(from.bytes()),
        // SAFETY: windows of as many bytes; the host's is there while the call runs, and after it the driver
        // needs it no more.
        (Device::Cuda, Device::Cpu) => unsafe {
            cuda::present().driver().copy_up(cuda::stream(), there, here as *const u8, bytes);
        },
        (Device::Cpu, Device::Cuda) => {
            let driver = cuda::present().driver();
            // SAFETY: as above; waited for before anybody looks.
            unsafe { driver.copy_down(cuda::stream(), there as *mut u8, here, bytes) };
            driver.wait(cuda::stream());
        }
        // SAFETY: windows of as many bytes of buffers; memory of the GPU is given on in the order of launches.
        (Device::Cuda, Device::Cuda) => unsafe {
            cuda::present().driver().copy_within(cuda::stream(), there, here, bytes);
        },
    }
}

/// Every byte becomes zero.
pub fn fill_zero(to: ViewMut<'_>) {
    let (at, bytes) = (to.address(), to.len() * to.dtype().size_bytes());
    match to.device() {
        Device::Cpu => to.bytes().fill(0),
        // SAFETY: a window of as many bytes, ours alone.
        Device::Cuda => unsafe { cuda::present().driver().fill(cuda::stream(), at, 0, bytes) },
    }
}
