//! `--device`: where a command computes.

use anyhow::{Result, anyhow};
use clap::ValueEnum;
use device::{Device, cuda};

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
                cuda::gpu().map_err(|none| anyhow!("{none}"))?;
                kernels::cuda::load().map_err(|error| anyhow!("{error}"))?;
                Ok(Device::Cuda)
            }
        }
    }
}
