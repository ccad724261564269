use super::{Hyper, Master, join, split};
use crate::rows::Parts;
use crate::simd::{Float, Open};
use device::{View, ViewMut};
use half::bf16;

const CHUNK: usize = 1 << 14;

/// The numbers a step boils down to.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(super) beta1: f32,
    pub(super) beta2: f32,
    pub(super) eps: f32,
    pub(super) keep: f32,
    /// lr / (1 - beta1^t)
    pub(super) rate: f32,
    /// 1 / sqrt(1 - beta2^t)
    pub(super) root: f32,
    pub(super) grad_scale: f32,
}

impl Step {
    pub(crate) fn new(hyper: &Hyper) -> Step {
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

    /// The new weight; the moments are updated in place.
    #[inline(always)]
    pub(crate) fn apply(&self, w: f32, g: f32, m: &mut f32, v: &mut f32) -> f32 {
        let g = g * self.grad_scale;
        *m = self.beta1 * *m + (1.0 - self.beta1) * g;
        *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
        w * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps)
    }
}

pub(super) fn update(master: Master<'_>, grad: View<'_>, m: ViewMut<'_>, v: ViewMut<'_>, hyper: &Hyper) {
    by_dtype!(grad, G => run(master, G::open(grad), m, v, Step::new(hyper)));
}

fn run<G: Float>(master: Master<'_>, g: &[G], m: ViewMut<'_>, v: ViewMut<'_>, step: Step) {
    let (m, v) = (Parts::new(m.f32()), Parts::new(v.f32()));
    match master {
        Master::F32(weights) => {
            device::for_each_part((weights.f32(), CHUNK), (&mut [] as &mut [u8], 0), |i, w, _| {
                let at = i * CHUNK..i * CHUNK + w.len();
                // SAFETY: each task takes the state of its own weights.
                let (m, v) = unsafe { (m.part(at.clone()), v.part(at.clone())) };
                run_f32(step, w, &g[at], m, v);
            });
        }
        Master::Split { high, low } => {
            device::for_each_part((high.bf16(), CHUNK), (low.u16(), CHUNK), |i, high, low| {
                let at = i * CHUNK..i * CHUNK + high.len();
                // SAFETY: as above.
                let (m, v) = unsafe { (m.part(at.clone()), v.part(at.clone())) };
                run_split(step, high, low, &g[at], m, v);
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
    fn run_f32<G: Float>(step: Step, w: &mut [f32], g: &[G], m: &mut [f32], v: &mut [f32]) {
        let n = w.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            w[i] = step.apply(w[i], g[i].to_f32(), &mut m[i], &mut v[i]);
        }
    }
}

multiversion! {
    fn run_split<G: Float>(
        step: Step,
        high: &mut [bf16],
        low: &mut [u16],
        g: &[G],
        m: &mut [f32],
        v: &mut [f32],
    ) {
        let n = high.len();
        let (low, g, m, v) = (&mut low[..n], &g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let w = step.apply(join(high[i], low[i]), g[i].to_f32(), &mut m[i], &mut v[i]);
            (high[i], low[i]) = split(w);
        }
    }
}
