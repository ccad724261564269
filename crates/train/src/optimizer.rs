//! AdamW over flat memory: the moments, and the low halves that make bf16 weights exact f32
//! masters. Works chunk by chunk where chunks come and go.

use crate::moments::{self, Moments};
use device::{DType, Device, OutOfMemory, View, ViewMut};
use half::bf16;
use kernels::adamw::{self, Hyper, Master};
use kernels::adamw8::{self, Packed};
use memory::pager::About;
use memory::trace::{Access, Phase};
use memory::{Class, Need, Update};
use std::ops::Range;
use tensor::{Fault, ParamRef, ParamStore};

/// What stays the same from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled decay of the parameters that ask for it (`ParamSpec::decay`).
    pub weight_decay: f32,
    /// Precision of the moments.
    pub moments: Moments,
    /// What final gradients are rounded to: f32 (not at all) or bf16.
    pub gradients: DType,
}

/// The rule that updates the flat arrays of a `ParamStore`.
///
/// Bytes per parameter beside weights and gradients: 8 of moments (2 with 8 bits), and 2 of low
/// halves when the weights are bf16.
pub struct AdamW {
    config: AdamWConfig,
    /// Steps applied so far.
    pub steps: u64,
}

/// Arrays of a training state in the order of its file, with their names.
const SAVED: [(&str, Class); 4] =
    [("weights", Class::Param), ("low", Class::Master), ("m", Class::M), ("v", Class::V)];

impl AdamW {
    /// Zero moments for every parameter of `store`.
    pub fn new(config: AdamWConfig, store: &mut ParamStore) -> Result<AdamW, OutOfMemory> {
        if store.dtype() != DType::F32 {
            store.arrays_mut().add(Class::Master, DType::U16)?;
        }
        store.enable_moments(config.moments.dtype())?;
        if config.gradients == DType::Bf16 {
            store.round_grads();
        }
        Ok(AdamW { config, steps: 0 })
    }

    /// Set weights (and their low halves) of `param` from element `first` on.
    pub fn set_weights(
        &self,
        store: &mut ParamStore,
        param: ParamRef,
        first: usize,
        values: &[f32],
    ) -> Result<(), Fault> {
        let start = store.range(param).start + first;
        let split = store.arrays().has(Class::Master);
        for piece in store.arrays().pieces(start..start + values.len()) {
            let values = &values[piece.start - start..piece.end - start];
            let need = |class| Need { class, elements: piece.clone(), access: Access::ReadWrite };
            let needs = [need(Class::Param), need(Class::Master)];
            store.bring(LOAD, &needs[..1 + usize::from(split)])?;
            if !split {
                device::copy(store.arrays_mut().view_mut(Class::Param, piece), View::of_f32(values));
                continue;
            }
            let [high, low] = store.arrays_mut().views_mut([Class::Param, Class::Master], piece);
            if high.device() == Device::Cpu {
                adamw::split_all(values, high.bf16(), low.u16());
                continue;
            }
            let (mut above, mut below) = (vec![bf16::ZERO; values.len()], vec![0; values.len()]);
            adamw::split_all(values, &mut above, &mut below);
            device::copy(high, View::of_bf16(&above));
            device::copy(low, View::of_u16(&below));
        }
        Ok(())
    }

    /// One step at learning rate `lr`, gradients multiplied by `grad_scale`.
    pub fn step(&mut self, store: &mut ParamStore, lr: f32, grad_scale: f32) -> Result<(), Fault> {
        self.steps += 1;
        self.update_all(store, lr, grad_scale)
    }

    /// The same for a step that is counted already. From the first chunk on: those are the ones a
    /// backward pass leaves resident.
    pub(crate) fn update_all(&self, store: &mut ParamStore, lr: f32, grad_scale: f32) -> Result<(), Fault> {
        let mut pieces = store.arrays().pieces(0..store.flat_len());
        pieces.try_for_each(|piece| self.update(store, piece, lr, grad_scale))
    }

    /// The part of a step, already counted in `steps`, that falls on `elements`, which lie in one
    /// chunk. Their gradients are used up.
    pub fn update(
        &self,
        store: &mut ParamStore,
        elements: Range<usize>,
        lr: f32,
        grad_scale: f32,
    ) -> Result<(), Fault> {
        let needs = needs(store, &elements);
        store.bring(UPDATE, &needs)?;
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        for param in store.params_in(&elements) {
            let range = store.range(param);
            let part = range.start.max(elements.start)..range.end.min(elements.end);
            if part.is_empty() {
                continue;
            }
            let weight_decay = if store.spec(param).decay { weight_decay } else { 0.0 };
            let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, step: self.steps, grad_scale };
            // The number of a block decides how it is rounded: the same wherever a copy lies.
            let first = ((param.index() as u64) << 40) + (part.start - range.start) as u64;
            let (update, exponents) = store.update(part);
            let Update { param, grad, master, m, v } = update;
            let master = match master {
                None => Master::F32(param),
                Some(low) => Master::Split { high: param, low },
            };
            match exponents {
                None => adamw::update(master, grad, m, v, &hyper),
                Some([m_exponents, v_exponents]) => {
                    let m = Packed { codes: m, exponents: m_exponents };
                    let v = Packed { codes: v, exponents: v_exponents };
                    adamw8::update(master, grad, m, v, first, &hyper);
                }
            }
        }
        store.use_up_grads(elements)
    }

    /// An update that usual steps make falls out in this one.
    pub(crate) fn pass_over(&self, store: &mut ParamStore, elements: Range<usize>) -> Result<(), Fault> {
        let needs = needs(store, &elements);
        store.arrays_mut().pass_over(UPDATE, &needs).map_err(Fault::outside)
    }

    /// Everything a step reads and writes, weights included, as flat arrays of a state: (name, bytes
    /// saved).
    pub fn arrays(&self, store: &ParamStore) -> Vec<(&'static str, u64)> {
        let saved = SAVED.iter().filter(|(_, class)| store.arrays().has(*class));
        saved.map(|(name, class)| (*name, (store.flat_len() * saved_size(store, *class)) as u64)).collect()
    }

    /// Copy bytes of one of `arrays` from byte `first` on.
    pub fn read(&self, store: &mut ParamStore, name: &str, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        let (class, start, size) = place(store, name, first);
        for piece in store.arrays().pieces(start..start + out.len() / size) {
            let need = Need { class, elements: piece.clone(), access: Access::Read };
            store.bring(SAVE, &[need])?;
            let out = &mut out[(piece.start - start) * size..(piece.end - start) * size];
            match store.arrays().dtype(class) {
                DType::U8 => moments::read(store, class, piece, out),
                dtype => device::copy(ViewMut::of_bytes(dtype, out), store.arrays().view(class, piece)),
            }
        }
        Ok(())
    }

    /// Set bytes of one of `arrays` from byte `first` on; of 8-bit moments whole blocks.
    pub fn write(&self, store: &mut ParamStore, name: &str, first: u64, bytes: &[u8]) -> Result<(), Fault> {
        let (class, start, size) = place(store, name, first);
        for piece in store.arrays().pieces(start..start + bytes.len() / size) {
            let need = Need { class, elements: piece.clone(), access: Access::ReadWrite };
            store.bring(LOAD, &[need])?;
            let bytes = &bytes[(piece.start - start) * size..(piece.end - start) * size];
            match store.arrays().dtype(class) {
                DType::U8 => moments::write(store, class, piece, bytes),
                dtype => {
                    device::copy(store.arrays_mut().view_mut(class, piece), View::of_bytes(dtype, bytes))
                }
            }
        }
        Ok(())
    }

    /// Bytes of state per parameter, weights and f32 gradients included.
    pub const fn bytes_per_param(dtype: DType, moments: Moments) -> usize {
        let weights = match dtype {
            DType::F32 => 4,
            _ => 2 + 2,
        };
        weights + 4 + 2 * moments.dtype().size_bytes()
    }

    /// Bytes of a saved state per parameter.
    pub const fn saved_per_param(moments: Moments) -> usize {
        4 + 2 * moments.saved_size()
    }
}

/// What an update of `elements` reads and writes.
fn needs(store: &ParamStore, elements: &Range<usize>) -> Vec<Need> {
    let need = |class, access| Need { class, elements: elements.clone(), access };
    let mut needs = vec![need(store.final_class(), Access::Read)];
    let changed = SAVED.iter().filter(|(_, class)| store.arrays().has(*class));
    needs.extend(changed.map(|(_, class)| need(*class, Access::ReadWrite)));
    needs
}

/// Class of a saved array, element of a byte, bytes of an element.
fn place(store: &ParamStore, name: &str, first: u64) -> (Class, usize, usize) {
    let class = SAVED.iter().find(|(known, _)| *known == name).map(|(_, class)| *class);
    let class = class.unwrap_or_else(|| panic!("no array `{name}` is saved"));
    let size = saved_size(store, class);
    (class, first as usize / size, size)
}

/// Bytes of an element of a class in a state.
fn saved_size(store: &ParamStore, class: Class) -> usize {
    match store.arrays().dtype(class) {
        DType::U8 => Moments::Bits8.saved_size(),
        other => other.size_bytes(),
    }
}

const LOAD: About = About { phase: Phase::Optimizer, op: "load", layer: 0 };
const SAVE: About = About { phase: Phase::Optimizer, op: "save", layer: 0 };
const UPDATE: About = About { phase: Phase::Optimizer, op: "adamw", layer: 0 };

/// Squared norm of the final gradient of one parameter, which must be resident. The global norm is the
/// root of their sum in the order of the parameters: so it has the same bits whether a gradient was
/// summed the moment it was ready or at the end.
pub fn squared_norm(store: &ParamStore, param: ParamRef) -> f64 {
    kernels::global_norm::sum_of_squares(store.final_grad(param))
}
