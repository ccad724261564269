//! SwiGLU and GELU: the expressions of the CPU, but for e^x.

use crate::support::{OnGpu, Values, close, gpu, random, same};
use device::DType;
use kernels::gelu::{self, GeluKind};
use kernels::swiglu;

const TYPES: [(DType, f64); 2] = [(DType::F32, 1e-6), (DType::Bf16, 2e-3)];

fn spread(dtype: DType, len: usize, seed: u64) -> Values {
    Values::new(dtype, &random(len, seed).iter().map(|x| 6.0 * x).collect::<Vec<_>>())
}

#[test]
fn swiglu_there_and_back() {
    let _gpu = gpu();
    for (dtype, most) in TYPES {
        for (m, f, first) in
            [(1, 1, 0), (3, 17, 0), (5, 64, 0), (2, 2504, 0), (7, 40, 1), (2, 300, 0), (0, 8, 0)]
        {
            let what = |name: &str| format!("{name} {dtype} {m} {f} {first}");
            let (x, dy) = (spread(dtype, first + 2 * m * f, 1), Values::random(dtype, first + m * f, 2));
            let (gx, gdy) = (x.on_gpu(), dy.on_gpu());
            let (cx, cdy) = (x.cpu().narrow(first, 2 * m * f), dy.cpu().narrow(first, m * f));
            let (vx, vdy) = (gx.view().narrow(first, 2 * m * f), gdy.view().narrow(first, m * f));
            let (mut want, mut dx) = (Values::zeros(dtype, m * f), Values::zeros(dtype, 2 * m * f));
            let [mut got, mut act] = [0, 1].map(|_| want.on_gpu());
            let (mut gdx, mut alone) = (dx.on_gpu(), dx.on_gpu());
            swiglu::forward(cx, f, want.cpu_mut());
            swiglu::forward(vx, f, got.view_mut());
            close(&what("y"), &got.back(), &want, most);
            swiglu::backward(cx, f, cdy, dx.cpu_mut(), None);
            swiglu::backward(vx, f, vdy, gdx.view_mut(), Some(act.view_mut()));
            swiglu::backward(vx, f, vdy, alone.view_mut(), None);
            close(&what("dx"), &gdx.back(), &dx, most);
            same(&what("dx with and without y"), &gdx.back(), &alone.back());
            same(&what("y again"), &act.back(), &got.back());
        }
    }
}

#[test]
fn gelu_there_and_back() {
    let _gpu = gpu();
    for (dtype, most) in TYPES {
        for kind in [GeluKind::Tanh, GeluKind::Erf] {
            for (first, len) in [(0, 1), (0, 5003), (3, 777), (0, 0)] {
                let (x, dy) = (spread(dtype, first + len, 1), Values::random(dtype, first + len, 2));
                let (gx, gdy) = (x.on_gpu(), dy.on_gpu());
                let mut want = [0, 1].map(|_| Values::zeros(dtype, len));
                let mut got: [OnGpu; 2] = [want[0].on_gpu(), want[1].on_gpu()];
                let (cx, vx) = (x.cpu().narrow(first, len), gx.view().narrow(first, len));
                gelu::forward(kind, cx, want[0].cpu_mut());
                gelu::forward(kind, vx, got[0].view_mut());
                gelu::backward(kind, cx, dy.cpu().narrow(first, len), want[1].cpu_mut());
                gelu::backward(kind, vx, gdy.view().narrow(first, len), got[1].view_mut());
                for (what, got, want) in [("y", &got[0], &want[0]), ("dx", &got[1], &want[1])] {
                    close(&format!("{what} {kind:?} {dtype} {len}"), &got.back(), want, most);
                }
            }
        }
    }
}
