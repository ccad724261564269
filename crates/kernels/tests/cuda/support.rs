//! A GPU for the tests, values on it, and how close results must be.

use device::{Buffer, DType, Device, View, ViewMut};
use half::bf16;
use std::sync::MutexGuard;

/// The GPU with its kernels, ours until the guard is dropped.
pub fn gpu() -> MutexGuard<'static, ()> {
    let turn = device::cuda::for_a_test();
    kernels::cuda::load().unwrap_or_else(|error| panic!("{error}"));
    turn
}

/// Values of a type on the host.
pub struct Values {
    buffer: Buffer,
    dtype: DType,
    len: usize,
}

impl Clone for Values {
    fn clone(&self) -> Values {
        let mut copy = Values::zeros(self.dtype, self.len);
        device::copy(copy.cpu_mut(), self.cpu());
        copy
    }
}

impl Values {
    /// Floats rounded to `dtype`.
    pub fn new(dtype: DType, values: &[f32]) -> Values {
        let mut made = Values::zeros(dtype, values.len());
        match dtype {
            DType::F32 => made.cpu_mut().f32().copy_from_slice(values),
            DType::Bf16 => {
                let out = made.cpu_mut().bf16();
                out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(*value));
            }
            other => panic!("floats as {other}"),
        }
        made
    }

    /// Zeros of any type.
    pub fn zeros(dtype: DType, len: usize) -> Values {
        let buffer = Buffer::zeroed(Device::Cpu, len * dtype.size_bytes()).expect("room for a test");
        Values { buffer, dtype, len }
    }

    /// Random floats around 0, the same for the same seed.
    pub fn random(dtype: DType, len: usize, seed: u64) -> Values {
        Values::new(dtype, &random(len, seed))
    }

    /// The elements on the host.
    pub fn cpu(&self) -> View<'_> {
        self.buffer.view(self.dtype, 0, self.len)
    }

    /// The same to be written.
    pub fn cpu_mut(&mut self) -> ViewMut<'_> {
        self.buffer.view_mut(self.dtype, 0, self.len)
    }

    /// A copy on the GPU.
    pub fn on_gpu(&self) -> OnGpu {
        let bytes = (self.len * self.dtype.size_bytes()).max(1);
        let mut buffer = Buffer::new(Device::Cuda, bytes).expect("room for a test");
        device::copy(buffer.view_mut(self.dtype, 0, self.len), self.cpu());
        OnGpu { buffer, dtype: self.dtype, len: self.len }
    }

    /// As f32.
    pub fn floats(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => self.cpu().f32().to_vec(),
            DType::Bf16 => self.cpu().bf16().iter().map(|value| value.to_f32()).collect(),
            other => panic!("floats of {other}"),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.cpu().bytes()
    }
}

/// Values in the memory of the GPU.
pub struct OnGpu {
    buffer: Buffer,
    dtype: DType,
    len: usize,
}

impl OnGpu {
    /// The elements.
    pub fn view(&self) -> View<'_> {
        self.buffer.view(self.dtype, 0, self.len)
    }

    /// The same to be written.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        self.buffer.view_mut(self.dtype, 0, self.len)
    }

    /// What is there once all that was launched has run.
    pub fn back(&self) -> Values {
        let mut values = Values::zeros(self.dtype, self.len);
        device::copy(values.cpu_mut(), self.view());
        values
    }
}

/// Floats in [-1, 1), the same for the same seed.
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// |got - want| / |want| as vectors is below `most`, and no value is no number.
pub fn close(what: &str, got: &Values, want: &Values, most: f64) {
    let (got, want) = (got.floats(), want.floats());
    assert_eq!(got.len(), want.len(), "{what}");
    let square = |x: f64| x * x;
    let apart: f64 = got.iter().zip(&want).map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
    let size: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    let relative = (apart / size.max(1e-30)).sqrt();
    assert!(relative < most, "{what}: off by {relative:.3e}, {most:.1e} at most");
}

/// The same bits.
pub fn same(what: &str, got: &Values, want: &Values) {
    let different = got.bytes().iter().zip(want.bytes()).position(|(got, want)| got != want);
    assert!(
        different.is_none() && got.bytes().len() == want.bytes().len(),
        "{what}: byte {different:?} differs"
    );
}
