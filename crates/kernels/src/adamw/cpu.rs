use super::{Hyper, Master, join, split};
use device::{View, ViewMut};
use half::bf16;

const CHUNK: usize = 1 << 14;

/// The numbers a step boils down to.
#[derive(Clone, Copy)]
struct Step {
    beta1: f32,
    beta2: f32,
    eps: f32,
    keep: f32,
    /// lr / (1 - beta1^t)
    rate: f32,
    /// 1 / sqrt(1 - beta2^t)
    root: f32,
    grad_scale: f32,
}

impl Step {
    fn new(hyper: &Hyper) -> Step {
        let t = hyper.step as f64;
        Step {
            beta1: hyper.beta1,
            beta2: hyper.beta2,
            eps: hyper.eps,
            keep: 1.0 - hyper.lr * hyper.weight_decay,
            rate: (hyper.lr as f64 / (1.0 - (hyper.beta1 as f64).powf(t))) as f32,
            root: (1.0 / (1.0 - (hyper.beta2 as f64).powf(t)).sqrt()) as f32,
            grad_scale: hyper.grad_scale,
        }
    }

    #[inline(always)]
    fn apply(&self, w: f32, g: f32, m: &mut f32, v: &mut f32) -> f32 {
        let g = g * self.grad_scale;
        *m = self.beta1 * *m + (1.0 - self.beta1) * g;
        *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
        w * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps)
    }
}

pub(super) fn update(master: Master<'_>, grad: View<'_>, m: ViewMut<'_>, v: ViewMut<'_>, hyper: &Hyper) {
    let (step, g) = (Step::new(hyper), grad.f32());
    let mut moments: Vec<(&mut [f32], &mut [f32])> =
        m.f32().chunks_mut(CHUNK).zip(v.f32().chunks_mut(CHUNK)).collect();
    match master {
        Master::F32(weights) => {
            device::for_each_part((weights.f32(), CHUNK), (&mut moments, 1), |i, w, moments| {
                let (m, v) = &mut moments[0];
                run_f32(step, w, &g[i * CHUNK..][..w.len()], m, v);
            });
        }
        Master::Split { high, low } => {
            let mut lows: Vec<_> =
                low.u16().chunks_mut(CHUNK).zip(moments).map(|(low, (m, v))| (low, m, v)).collect();
            device::for_each_part((high.bf16(), CHUNK), (&mut lows, 1), |i, high, state| {
                let (low, m, v) = &mut state[0];
                run_split(step, high, low, &g[i * CHUNK..][..high.len()], m, v);
            });
        }
    }
}

pub(super) fn split_all(src: &[f32], high: &mut [bf16], low: &mut [u16]) {
    device::for_each_part((high, CHUNK), (low, CHUNK), |i, high, low| {
        run_split_all(&src[i * CHUNK..][..high.len()], high, low);
    });
}

multiversion! {
    fn run_split_all(src: &[f32], high: &mut [bf16], low: &mut [u16]) {
        for ((x, high), low) in src.iter().zip(high).zip(low) {
            (*high, *low) = split(*x);
        }
    }
}

multiversion! {
    fn run_f32(step: Step, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let n = w.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            w[i] = step.apply(w[i], g[i], &mut m[i], &mut v[i]);
        }
    }
}

multiversion! {
    fn run_split(step: Step, high: &mut [bf16], low: &mut [u16], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let n = high.len();
        let (low, g, m, v) = (&mut low[..n], &g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let w = step.apply(join(high[i], low[i]), g[i], &mut m[i], &mut v[i]);
            (high[i], low[i]) = split(w);
        }
    }
}
