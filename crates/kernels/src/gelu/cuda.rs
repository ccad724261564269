use super::GeluKind;
use crate::cuda::runs::run_of;
use crate::cuda::{launch, suffix};
use device::{View, ViewMut};

fn name(op: &str, kind: GeluKind, x: View<'_>) -> String {
    let kind = match kind {
        GeluKind::Tanh => "tanh",
        GeluKind::Erf => "erf",
    };
    format!("gelu_{op}_{kind}_{}", suffix(x.dtype()))
}

pub(super) fn forward(kind: GeluKind, x: View<'_>, y: ViewMut<'_>) {
    launch(&name("forward", kind, x)).read(x).write(&y).over(x.len(), run_of(&[x.dtype()])).run();
}

pub(super) fn backward(kind: GeluKind, x: View<'_>, dy: View<'_>, dx: ViewMut<'_>) {
    launch(&name("backward", kind, x)).read(x).read(dy).write(&dx).over(x.len(), run_of(&[x.dtype()])).run();
}
