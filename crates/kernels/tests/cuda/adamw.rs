//! Updates of weights: the same bits, whatever moments they keep, so that they may run on either side.

use crate::support::{OnGpu, Values, gpu, random, same};
use device::{DType, View, ViewMut};
use kernels::adamw::{self, Hyper, Master};
use kernels::adamw8::{self, BLOCK, Packed, exponents_len};

/// Of weights (bf16 and low halves, or f32) and of moments (8 bits, or f32).
#[derive(Clone, Copy, Debug)]
struct Kind {
    split: bool,
    bits8: bool,
}

impl Kind {
    /// Weights, low halves, moments, exponents of moments, as far as there are any.
    fn state(self, n: usize) -> Vec<Values> {
        let start = random(n, 1);
        let mut state = vec![Values::new(DType::F32, &start)];
        if self.split {
            let (mut high, mut low) = (Values::zeros(DType::Bf16, n), Values::zeros(DType::U16, n));
            adamw::split_all(&start, high.cpu_mut().bf16(), low.cpu_mut().u16());
            state = vec![high, low];
        }
        let dtype = if self.bits8 { DType::U8 } else { DType::F32 };
        state.extend([dtype; 2].map(|dtype| Values::zeros(dtype, n)));
        if self.bits8 {
            state.extend([DType::U8; 2].map(|dtype| Values::zeros(dtype, exponents_len(n))));
        }
        state
    }

    /// A step on the elements from `first` on.
    fn step(self, state: Vec<ViewMut<'_>>, grad: View<'_>, first: usize, step: u64) {
        let hyper =
            Hyper { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.3 };
        let mut state = state.into_iter();
        let mut next = |first, len| state.next().expect("an array of the state").narrow(first, len);
        let len = grad.len();
        let high = next(first, len);
        let master = match self.split {
            true => Master::Split { high, low: next(first, len) },
            false => Master::F32(high),
        };
        let [m, v] = [0, 1].map(|_| next(first, len));
        if !self.bits8 {
            return adamw::update(master, grad, m, v, &hyper);
        }
        let [m, v] = [m, v].map(|codes| Packed { codes, exponents: next(first / BLOCK, exponents_len(len)) });
        adamw8::update(master, grad, m, v, (first / BLOCK * BLOCK) as u64, &hyper);
    }
}

/// Gradients that differ by many orders of magnitude inside a run, with zeros among them.
fn rugged(dtype: DType, n: usize, seed: u64) -> Values {
    let (x, size) = (random(n, seed), random(n, seed + 1));
    let scaled = |(x, size): (&f32, &f32)| if *size > 0.9 { 0.0 } else { x * (size * 14.0).exp() };
    Values::new(dtype, &x.iter().zip(&size).map(scaled).collect::<Vec<_>>())
}

fn follow(kind: Kind, n: usize, first: usize, dtype: DType) {
    let mut want = kind.state(n);
    let mut got: Vec<OnGpu> = want.iter().map(Values::on_gpu).collect();
    for step in 1..=4 {
        let grad = rugged(dtype, n, 50 * step);
        let there = grad.on_gpu();
        let grad = grad.cpu().narrow(first, n - first);
        kind.step(want.iter_mut().map(Values::cpu_mut).collect(), grad, first, step);
        let grad = there.view().narrow(first, n - first);
        kind.step(got.iter_mut().map(OnGpu::view_mut).collect(), grad, first, step);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            same(&format!("{kind:?} {dtype} {first}..{n} step {step} array {i}"), &got.back(), want);
        }
    }
}

#[test]
fn steps_have_the_bits_of_the_cpu() {
    let _gpu = gpu();
    for dtype in [DType::F32, DType::Bf16] {
        for (split, bits8) in [(false, false), (true, false), (false, true), (true, true)] {
            for (n, first) in [(1, 0), (127, 0), (128, 0), (5000, 0), (2050, 3), (1153, 128)] {
                follow(Kind { split, bits8 }, n, first, dtype);
            }
        }
    }
}
