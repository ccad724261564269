use crate::simd::{Float, Open, exp, rows_per_task};
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
            let gate_up = &gate_up[i * rows * 2 * f..][..2 * out.len()];
            for (gate_up, out) in gate_up.chunks_exact(2 * f).zip(out.chunks_exact_mut(f)) {
                row(gate_up, out);
            }
        });
    });
}

multiversion! {
    fn row<T: Float>(gate_up: &[T], out: &mut [T]) {
        let f = out.len();
        let (gate, up) = (&gate_up[..f], &gate_up[f..2 * f]);
        for j in 0..f {
            let g = gate[j].to_f32();
            out[j] = T::from_f32(g * sigmoid(g) * up[j].to_f32());
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
            let mut acts = act.chunks_exact_mut(f);
            for (r, dgate_up) in dgate_up.chunks_exact_mut(2 * f).enumerate() {
                let row = i * rows + r;
                let gate_up = &gate_up[row * 2 * f..][..2 * f];
                row_back(gate_up, &dout[row * f..][..f], dgate_up);
                if let Some(act) = acts.next() {
                    self::row(gate_up, act);
                }
            }
        });
    });
}

multiversion! {
    fn row_back<T: Float>(gate_up: &[T], dout: &[T], dgate_up: &mut [T]) {
        let f = dout.len();
        let (gate, up) = (&gate_up[..f], &gate_up[f..2 * f]);
        let (dgate, dup) = dgate_up.split_at_mut(f);
        let dup = &mut dup[..f];
        for j in 0..f {
            let (g, d) = (gate[j].to_f32(), dout[j].to_f32());
            let s = sigmoid(g);
            let silu = g * s;
            dup[j] = T::from_f32(d * silu);
            dgate[j] = T::from_f32(d * up[j].to_f32() * (s + silu * (1.0 - s)));
        }
    }
}
