//! Arrays on either device, so that one call is made on both.

use crate::support::{OnGpu, Values};
use device::{Device, View, ViewMut};

/// Values that lie on the host or on the GPU, some elements behind where memory begins.
pub struct Either {
    place: Place,
    first: usize,
}

enum Place {
    Host(Values),
    Gpu(OnGpu),
}

impl Either {
    /// The values from element `first` on.
    pub fn new(values: &Values, device: Device, first: usize) -> Either {
        let floats = values.floats();
        let shifted = [&vec![7.0; first][..], &floats].concat();
        let values = Values::new(values.cpu().dtype(), &shifted);
        let place = match device {
            Device::Cpu => Place::Host(values),
            Device::Cuda => Place::Gpu(values.on_gpu()),
        };
        Either { place, first }
    }

    pub fn view(&self) -> View<'_> {
        let view = match &self.place {
            Place::Host(values) => values.cpu(),
            Place::Gpu(values) => values.view(),
        };
        view.narrow(self.first, view.len() - self.first)
    }

    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let view = match &mut self.place {
            Place::Host(values) => values.cpu_mut(),
            Place::Gpu(values) => values.view_mut(),
        };
        let len = view.len() - self.first;
        view.narrow(self.first, len)
    }

    /// What is there now.
    pub fn back(&self) -> Values {
        let mut back = Values::zeros(self.view().dtype(), self.view().len());
        device::copy(back.cpu_mut(), self.view());
        back
    }
}
