//! `--device`: where a command computes.

use anyhow::{Error, Result};
use clap::ValueEnum;
use device::{Device, cuda};
use std::path::PathBuf;

#[derive(Clone, Copy, ValueEnum)]
pub enum On {
    Cpu,
    /// The first GPU the driver shows
    Cuda,
}

impl On {
    /// The device, or why there is none.
    pub fn device(self) -> Result<Device> {
        match self {
            On::Cpu => Ok(Device::Cpu),
            On::Cuda => {
                cuda::gpu()?;
                kernels::cuda::load().map_err(Error::msg)?;
                Ok(Device::Cuda)
            }
        }
    }
}

/// Compiled kernels wait for the next process in the user's cache folder, where there is one.
pub fn keep_kernels() {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    if let Some(cache) = cache.filter(|cache| cache.is_absolute()).or_else(home) {
        cuda::keep_kernels_in(cache.join("trilith/kernels"));
    }
}
