use crate::cuda::rows::Sums;
use crate::cuda::runs::run_of;
use crate::cuda::{launch, suffix};
use device::{DType, View, ViewMut};

/// y = f(y, x), by the kernel of that name.
fn pair(op: &str, y: ViewMut<'_>, x: View<'_>) {
    let types = [y.dtype(), x.dtype()];
    launch(&format!("elementwise_{op}_{}_{}", suffix(types[0]), suffix(types[1])))
        .write(&y)
        .read(x)
        .over(y.len(), run_of(&types))
        .run();
}

pub(super) fn add_assign(y: ViewMut<'_>, x: View<'_>) {
    pair("add_assign", y, x);
}

pub(super) fn max_assign(y: ViewMut<'_>, x: View<'_>) {
    pair("max_assign", y, x);
}

pub(super) fn copy(y: ViewMut<'_>, x: View<'_>) {
    pair("copy", y, x);
}

pub(super) fn add(a: View<'_>, b: View<'_>, y: ViewMut<'_>) {
    assert!(a.dtype() == b.dtype() && a.dtype() == y.dtype(), "types");
    launch(&format!("elementwise_add_{}", suffix(y.dtype())))
        .read(a)
        .read(b)
        .write(&y)
        .over(y.len(), run_of(&[y.dtype()]))
        .run();
}

pub(super) fn round_to_bf16(y: ViewMut<'_>) {
    assert_eq!(y.dtype(), DType::F32, "what is rounded");
    launch("elementwise_round_to_bf16").write(&y).over(y.len(), run_of(&[y.dtype()])).run();
}

pub(super) fn scale(y: ViewMut<'_>, factor: f32) {
    launch(&format!("elementwise_scale_{}", suffix(y.dtype())))
        .write(&y)
        .over(y.len(), run_of(&[y.dtype()]))
        .f32(factor)
        .run();
}

pub(super) fn column_sums(x: View<'_>, n: usize, out: ViewMut<'_>) {
    assert_eq!(out.dtype(), DType::F32, "sums");
    if x.is_empty() {
        return;
    }
    let rows = x.len() / n;
    let whole = n.is_multiple_of(8) && x.address().is_multiple_of(8 * x.dtype().size_bytes() as u64);
    let sums = Sums::new(rows, n, 1);
    launch(&format!("elementwise_column_sums_{}{}", suffix(x.dtype()), if whole { "" } else { "_ragged" }))
        .read(x)
        .summing(&sums)
        .u32(rows)
        .u32(n)
        .run();
    sums.add_to(&out, None);
}
