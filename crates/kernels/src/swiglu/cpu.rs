use crate::rows::rows_per_task;
use crate::simd::{Float, Open, exp};
use device::{View, ViewMut};

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

pub(super) fn forward(gate_up: View<'_>, f: usize, out: ViewMut<'_>) {
    by_dtype!(gate_up, T => {
        let (gate_up, out) = (T::open(gate_up), T::open_mut(out));
        let rows = rows_per_task(f);
        device::for_each_part((out, rows * f), (&mut [] as &mut [u8], 0), |i, out, _| {
            run(&gate_up[i * rows * 2 * f..][..2 * out.len()], f, out);
        });
    });
}

multiversion! {
    fn run<T: Float>(gate_up: &[T], f: usize, out: &mut [T]) {
        for (gate_up, out) in gate_up.chunks_exact(2 * f).zip(out.chunks_exact_mut(f)) {
            let (gate, up) = gate_up.split_at(f);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                let gate = gate.to_f32();
                *out = T::from_f32(gate * sigmoid(gate) * up.to_f32());
            }
        }
    }
}

pub(super) fn backward(
    gate_up: View<'_>,
    f: usize,
    dout: View<'_>,
    dgate_up: ViewMut<'_>,
    act: Option<ViewMut<'_>>,
) {
    by_dtype!(gate_up, T => {
        let (gate_up, dout, dgate_up) = (T::open(gate_up), T::open(dout), T::open_mut(dgate_up));
        let rows = rows_per_task(2 * f);
        let act = act.map_or(&mut [] as &mut [T], T::open_mut);
        let act_len = if act.is_empty() { 0 } else { rows * f };
        device::for_each_part((dgate_up, rows * 2 * f), (act, act_len), |i, dgate_up, act| {
            let gate_up = &gate_up[i * rows * 2 * f..][..dgate_up.len()];
            let dout = &dout[i * rows * f..][..dgate_up.len() / 2];
            match act.is_empty() {
                true => run_back(gate_up, f, dout, dgate_up),
                false => run_back_and_act(gate_up, f, dout, dgate_up, act),
            }
        });
    });
}

/// (d out / d gate, d out / d up = silu(gate)).
#[inline(always)]
fn slopes(gate: f32, up: f32) -> (f32, f32) {
    let s = sigmoid(gate);
    let silu = gate * s;
    (up * (s + silu * (1.0 - s)), silu)
}

multiversion! {
    fn run_back<T: Float>(gate_up: &[T], f: usize, dout: &[T], dgate_up: &mut [T]) {
        let rows = gate_up.chunks_exact(2 * f).zip(dgate_up.chunks_exact_mut(2 * f));
        for ((gate_up, dgate_up), dout) in rows.zip(dout.chunks_exact(f)) {
            let ((gate, up), (dgate, dup)) = (gate_up.split_at(f), dgate_up.split_at_mut(f));
            let ins = gate.iter().zip(up).zip(dout);
            for ((dgate, dup), ((gate, up), d)) in dgate.iter_mut().zip(dup).zip(ins) {
                let (to_gate, to_up) = slopes(gate.to_f32(), up.to_f32());
                *dgate = T::from_f32(d.to_f32() * to_gate);
                *dup = T::from_f32(d.to_f32() * to_up);
            }
        }
    }
}

multiversion! {
    fn run_back_and_act<T: Float>(gate_up: &[T], f: usize, dout: &[T], dgate_up: &mut [T], act: &mut [T]) {
        let rows = gate_up.chunks_exact(2 * f).zip(dgate_up.chunks_exact_mut(2 * f));
        let outs = dout.chunks_exact(f).zip(act.chunks_exact_mut(f));
        for ((gate_up, dgate_up), (dout, act)) in rows.zip(outs) {
            let ((gate, up), (dgate, dup)) = (gate_up.split_at(f), dgate_up.split_at_mut(f));
            let ins = gate.iter().zip(up).zip(dout);
            for (((dgate, dup), act), ((gate, up), d)) in dgate.iter_mut().zip(dup).zip(act).zip(ins) {
                let (to_gate, to_up) = slopes(gate.to_f32(), up.to_f32());
                *dgate = T::from_f32(d.to_f32() * to_gate);
                *dup = T::from_f32(d.to_f32() * to_up);
                // The very expression of the forward pass: `to_up` is gate * sigmoid(gate).
                *act = T::from_f32(to_up * up.to_f32());
            }
        }
    }
}
