use crate::cuda::runs::run_of;
use crate::cuda::{launch, suffix};
use device::{View, ViewMut};

pub(super) fn forward(gate_up: View<'_>, f: usize, out: ViewMut<'_>) {
    launch(&format!("swiglu_forward_{}", suffix(gate_up.dtype())))
        .read(gate_up)
        .write(&out)
        .over_rows(out.len() / f.max(1), f, run_of(&[out.dtype()]))
        .run();
}

pub(super) fn backward(
    gate_up: View<'_>,
    f: usize,
    dout: View<'_>,
    dgate_up: ViewMut<'_>,
    act: Option<ViewMut<'_>>,
) {
    launch(&format!("swiglu_backward_{}", suffix(gate_up.dtype())))
        .read(gate_up)
        .read(dout)
        .write(&dgate_up)
        .optional_write(act.as_ref())
        .over_rows(dout.len() / f.max(1), f, run_of(&[dout.dtype()]))
        .run();
}
