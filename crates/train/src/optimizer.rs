//! AdamW over flat memory: the moments, and the low halves that make bf16 weights exact f32
//! masters.

use device::{Buffer, DType, Device, OutOfMemory, View};
use kernels::adamw::{self, Hyper, Master};
use tensor::{ParamRef, ParamStore};

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
}

/// Optimizer state of a `ParamStore`, in the order of its flat arrays.
///
/// Bytes per parameter beside weights and gradients: 8 of moments, and 2 of low halves when the
/// weights are bf16.
pub struct AdamW {
    config: AdamWConfig,
    low: Option<Buffer>,
    m: Buffer,
    v: Buffer,
    len: usize,
    /// Steps applied so far.
    pub steps: u64,
}

/// One named array of a training state.
pub struct StateArray<'a> {
    /// `weights`, `low`, `m` or `v`.
    pub name: &'static str,
    /// Its elements.
    pub data: View<'a>,
}

impl AdamW {
    /// Zero moments for every parameter of `store`.
    pub fn new(config: AdamWConfig, store: &ParamStore) -> Result<AdamW, OutOfMemory> {
        let (device, len) = (store.device(), store.flat_len());
        let low = match store.dtype() {
            DType::F32 => None,
            _ => Some(Buffer::zeroed(device, len * 2)?),
        };
        let (m, v) = (Buffer::zeroed(device, len * 4)?, Buffer::zeroed(device, len * 4)?);
        Ok(AdamW { config, low, m, v, len, steps: 0 })
    }

    /// Set weights (and their low halves) of `param` from element `first` on.
    pub fn set_weights(&mut self, store: &mut ParamStore, param: ParamRef, first: usize, values: &[f32]) {
        let start = store.range(param).start + first;
        let weights = store.weight_mut(param).narrow(first, values.len());
        match &mut self.low {
            None => weights.f32().copy_from_slice(values),
            Some(low) => {
                let low = low.view_mut(DType::U16, start, values.len()).u16();
                adamw::split_all(values, weights.bf16(), low);
            }
        }
    }

    /// The f32 masters of `param`.
    pub fn master(&self, store: &ParamStore, param: ParamRef) -> Vec<f32> {
        let range = store.range(param);
        let weights = store.weight(param);
        match &self.low {
            None => weights.f32().to_vec(),
            Some(low) => {
                let low = low.view(DType::U16, range.start, range.len()).u16();
                weights.bf16().iter().zip(low).map(|(high, low)| adamw::join(*high, *low)).collect()
            }
        }
    }

    /// One step at learning rate `lr`, gradients multiplied by `grad_scale`.
    pub fn step(&mut self, store: &mut ParamStore, lr: f32, grad_scale: f32) {
        self.steps += 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        for param in store.refs() {
            let range = store.range(param);
            let weight_decay = if store.spec(param).decay { weight_decay } else { 0.0 };
            let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, step: self.steps, grad_scale };
            let (weights, grad) = store.weight_mut_and_grad(param);
            let master = match &mut self.low {
                None => Master::F32(weights),
                Some(low) => {
                    let low = low.view_mut(DType::U16, range.start, range.len());
                    Master::Split { high: weights, low }
                }
            };
            let m = self.m.view_mut(DType::F32, range.start, range.len());
            let v = self.v.view_mut(DType::F32, range.start, range.len());
            adamw::update(master, grad, m, v, &hyper);
        }
    }

    /// Everything a step reads and writes, weights included, as flat arrays.
    pub fn arrays<'a>(&'a self, store: &'a ParamStore) -> Vec<StateArray<'a>> {
        let mut arrays = vec![StateArray { name: "weights", data: store.all_weights() }];
        if let Some(low) = &self.low {
            arrays.push(StateArray { name: "low", data: low.view(DType::U16, 0, self.len) });
        }
        arrays.push(StateArray { name: "m", data: self.m.view(DType::F32, 0, self.len) });
        arrays.push(StateArray { name: "v", data: self.v.view(DType::F32, 0, self.len) });
        arrays
    }

    /// Restore each array through `read(name, bytes)`.
    pub fn restore<E>(
        &mut self,
        store: &mut ParamStore,
        mut read: impl FnMut(&str, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        read("weights", store.all_weights_mut().bytes())?;
        if let Some(low) = &mut self.low {
            read("low", low.view_mut(DType::U16, 0, self.len).bytes())?;
        }
        read("m", self.m.view_mut(DType::F32, 0, self.len).bytes())?;
        read("v", self.v.view_mut(DType::F32, 0, self.len).bytes())
    }

    /// Bytes of state per parameter, weights and f32 gradients included.
    pub const fn bytes_per_param(dtype: DType) -> usize {
        match dtype {
            DType::F32 => 4 + 4 + 8,
            _ => 2 + 2 + 4 + 8,
        }
    }
}

/// Squared global norm of the gradients in `store`.
pub fn squared_grad_norm(store: &ParamStore) -> f64 {
    match store.device() {
        Device::Cpu => kernels::global_norm::sum_of_squares(store.all_grads()),
    }
}
