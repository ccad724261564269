use crate::cuda::{launch, suffix};
use crate::gemm::{Mat, MatMut};
use device::DType;

/// Columns of a thread, in every mix of types.
const RUN: usize = 8;

pub(super) fn walk(
    (rows, cols): (usize, usize),
    a: Mat<'_>,
    c: MatMut<'_>,
    added: [Option<Mat<'_>>; 2],
    keep: bool,
) {
    // What is kept comes first: c + a, as a + c has the same bits.
    let kept = keep.then(|| Mat::new(c.data.as_view(), c.ld));
    let [first, second] = if keep { [kept, None] } else { added };
    let name = format!("block_sum_{}_{}", suffix(c.data.dtype()), suffix(a.data.dtype()));
    let mut sum = launch(&name).write(&c.data).u64(c.ld).read(a.data).u64(a.ld);
    for one in [first, second] {
        let is_bf16 = one.is_some_and(|one| one.data.dtype() == DType::Bf16);
        sum =
            sum.optional(one.map(|one| one.data)).u64(one.map_or(0, |one| one.ld)).u32(usize::from(is_bf16));
    }
    sum.over_rows(rows, cols, RUN).run();
}
