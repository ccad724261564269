//! The optimizer's state beside the weights: windows for an update, and moments of 8 bits with the exponents of
//! their blocks.

use crate::{BLOCK, ParamStore};
use device::{Buffer, DType, Device, OutOfMemory, View, ViewMut};
use memory::{Class, Update};
use std::ops::Range;

impl ParamStore {
    /// Reserve moments (f32 or u8), as far as they are not there.
    pub fn enable_moments(&mut self, moments: DType) -> Result<(), OutOfMemory> {
        self.arrays.add(Class::M, moments)?;
        self.arrays.add(Class::V, moments)?;
        if moments == DType::U8 {
            // Beside the state: over tiers updates run on the host.
            let device = if self.arrays.is_paged() { Device::Cpu } else { self.arrays.device() };
            let one = || Buffer::zeroed(device, self.arrays.len().div_ceil(BLOCK));
            self.exponents = Some([one()?, one()?]);
        }
        Ok(())
    }

    /// Windows on the same elements of every class for one update, and on the exponents of their
    /// blocks (first, second moments) where moments have 8 bits.
    pub fn update(&mut self, elements: Range<usize>) -> (Update<'_>, Option<[ViewMut<'_>; 2]>) {
        let blocks = elements.start / BLOCK..elements.end.div_ceil(BLOCK);
        let exponents = self
            .exponents
            .as_mut()
            .map(|pair| pair.each_mut().map(|one| one.view_mut(DType::U8, blocks.start, blocks.len())));
        (self.arrays.update(elements), exponents)
    }

    /// Codes of 8-bit moments of `class` and the exponents of their blocks.
    pub fn codes(&self, class: Class, elements: Range<usize>) -> (View<'_>, View<'_>) {
        let blocks = elements.start / BLOCK..elements.end.div_ceil(BLOCK);
        let pair = self.exponents.as_ref().expect("moments of 8 bits were enabled");
        let exponents = pair[usize::from(class == Class::V)].view(DType::U8, blocks.start, blocks.len());
        (self.arrays.view(class, elements), exponents)
    }

    /// The same to be written.
    pub fn codes_mut(&mut self, class: Class, elements: Range<usize>) -> (ViewMut<'_>, ViewMut<'_>) {
        let blocks = elements.start / BLOCK..elements.end.div_ceil(BLOCK);
        let pair = self.exponents.as_mut().expect("moments of 8 bits were enabled");
        let exponents = pair[usize::from(class == Class::V)].view_mut(DType::U8, blocks.start, blocks.len());
        (self.arrays.view_mut(class, elements), exponents)
    }
}
