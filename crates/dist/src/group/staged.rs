//! Arrays of a GPU for carriers that reach memory of the host alone.

use super::{Carrier, Group};
use crate::beside::Array;
use crate::error::CommError;
use device::{Device, View, ViewMut};

impl Group {
    /// Whether data on `device` passes through memory of the host, which is all that these carriers reach.
    /// Where nothing moves nothing is copied either.
    pub(super) fn is_staged(&self, device: Device) -> bool {
        match self.carrier {
            Carrier::Null | Carrier::Nccl(_) => false,
            Carrier::Threads(_) | Carrier::Processes(_) => device == Device::Cuda,
        }
    }

    /// Makes a call on copies in memory of the host.
    pub(super) fn staged(
        &self,
        mine: View<'_>,
        out: ViewMut<'_>,
        call: impl FnOnce(View<'_>, ViewMut<'_>) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let mine = Array::copied(Device::Cpu, mine)?;
        let mut here = Array::new(Device::Cpu, out.dtype(), out.len())?;
        call(mine.view(), here.view_mut())?;
        device::copy(out, here.view());
        Ok(())
    }

    /// The same for a call that reads and writes one array.
    pub(super) fn staged_within(
        &self,
        data: ViewMut<'_>,
        call: impl FnOnce(ViewMut<'_>) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let mut here = Array::copied(Device::Cpu, data.as_view())?;
        call(here.view_mut())?;
        device::copy(data, here.view());
        Ok(())
    }
}
