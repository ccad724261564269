//! The angles, computed once in f64.

use device::{Buffer, DType, Device, View};
use std::sync::OnceLock;

/// Stretching of the angles for contexts longer than the model was first trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// Positions divided by a factor (Chen et al. 2023).
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3: low frequencies divided by a factor, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original / low` are low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original / high` are high frequencies.
        high_freq_factor: f32,
        /// Context of the first training, in tokens.
        original_max_positions: usize,
    },
}

/// Cosines and sines for positions `0..positions` and the R/2 frequencies of a head.
pub struct RopeTable {
    dim: usize,
    positions: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Cosines, then sines, in the memory of the GPU, from the first time they are needed there.
    there: OnceLock<Buffer>,
}

impl RopeTable {
    /// Angles for the `dim` values of a head that turn (even), base `theta`, positions below `positions`.
    pub fn new(dim: usize, theta: f32, scaling: &RopeScaling, positions: usize) -> RopeTable {
        assert!(dim.is_multiple_of(2), "pairs of {dim} values");
        let frequencies: Vec<f64> = (0..dim / 2)
            .map(|i| scaled((theta as f64).powf(-2.0 * i as f64 / dim as f64), scaling))
            .collect();
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (cos, sin) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        RopeTable { dim, positions, cos, sin, there: OnceLock::new() }
    }

    /// Values of a head that turn.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Positions covered.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// (cosines, sines) of a position. [R/2]
    pub(super) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let half = self.dim / 2;
        let range = position * half..(position + 1) * half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// All cosines, and all sines, on the GPU. [positions, R/2]
    pub(super) fn on_gpu(&self) -> (View<'_>, View<'_>) {
        let len = self.cos.len();
        let there = self.there.get_or_init(|| {
            let bytes = 2 * len * size_of::<f32>();
            // A row op has no way to fail; no model runs where its angles find no room.
            let mut buffer = Buffer::new(Device::Cuda, bytes).unwrap_or_else(|error| panic!("{error}"));
            device::copy(buffer.view_mut(DType::F32, 0, len), View::of_f32(&self.cos));
            device::copy(buffer.view_mut(DType::F32, len, len), View::of_f32(&self.sin));
            buffer
        });
        (there.view(DType::F32, 0, len), there.view(DType::F32, len, len))
    }
}

fn scaled(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f64,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let wavelength = std::f64::consts::TAU / frequency;
            let original = original_max_positions as f64;
            let (low, high) = (low_freq_factor as f64, high_freq_factor as f64);
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / factor as f64
            } else {
                let keep = (original / wavelength - low) / (high - low);
                (1.0 - keep) * frequency / factor as f64 + keep * frequency
            }
        }
    }
}
