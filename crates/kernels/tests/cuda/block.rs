//! Rectangles inside matrices: the same bits.

use crate::support::{OnGpu, Values, gpu, same};
use device::DType;
use kernels::block::{add, copy, finish};
use kernels::gemm::{Mat, MatMut};

const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// Rows, columns, columns of a row of what is read and of what is written, where both begin.
const SHAPES: [(usize, usize, usize, usize, usize); 5] =
    [(1, 1, 1, 1, 0), (13, 37, 50, 41, 0), (5, 64, 96, 64, 0), (5, 64, 96, 64, 3), (2, 2500, 2504, 2512, 0)];

/// The same on either device.
struct Both {
    here: Values,
    there: OnGpu,
    first: usize,
    ld: usize,
}

impl Both {
    fn new(dtype: DType, (rows, ld): (usize, usize), first: usize, seed: u64) -> Both {
        let here = Values::random(dtype, first + rows * ld, seed);
        Both { there: here.on_gpu(), here, first, ld }
    }

    fn mats(&self) -> [Mat<'_>; 2] {
        [self.here.cpu(), self.there.view()]
            .map(|v| Mat::new(v.narrow(self.first, v.len() - self.first), self.ld))
    }

    fn outs(&mut self) -> [MatMut<'_>; 2] {
        let (first, ld) = (self.first, self.ld);
        [self.here.cpu_mut(), self.there.view_mut()].map(|v| {
            let len = v.len() - first;
            MatMut { data: v.narrow(first, len), ld }
        })
    }

    fn compare(&self, what: &str) {
        same(what, &self.there.back(), &self.here);
    }
}

#[test]
fn blocks_are_copied_and_added_in_every_mix_of_types() {
    let _gpu = gpu();
    for (ct, at) in TYPES.into_iter().flat_map(|c| TYPES.map(|a| (c, a))) {
        for (rows, cols, lda, ldc, first) in SHAPES {
            let a = Both::new(at, (rows, lda), first, 1);
            let mut c = Both::new(ct, (rows, ldc), first, 2);
            for op in [add, copy, add] {
                a.mats().into_iter().zip(c.outs()).for_each(|(a, c)| op(rows, cols, a, c));
                c.compare(&format!("{ct} {at} [{rows}, {cols}]"));
            }
        }
    }
}

#[test]
fn products_are_finished_in_every_mix_of_types() {
    let _gpu = gpu();
    let types = TYPES.into_iter().flat_map(|c| TYPES.map(|a| (c, a)));
    let types = types.flat_map(|(c, a)| TYPES.into_iter().flat_map(move |b| TYPES.map(|r| (c, a, b, r))));
    for (ct, at, bt, rt) in types {
        for (rows, cols, lda, ldc, first) in SHAPES {
            let (a, bias) = (Both::new(at, (rows, lda), first, 1), Both::new(bt, (1, cols), first, 2));
            let (residual, mut c) =
                (Both::new(rt, (rows, lda), first, 3), Both::new(ct, (rows, ldc), first, 4));
            for (biased, added) in [(true, true), (true, false), (false, true), (false, false)] {
                let (bias, residual) = (bias.mats().map(|b| b.data), residual.mats());
                for (i, (a, c)) in a.mats().into_iter().zip(c.outs()).enumerate() {
                    finish(rows, cols, a, biased.then(|| bias[i]), added.then(|| residual[i]), c);
                }
                c.compare(&format!("{ct} {at} {bt} {rt} [{rows}, {cols}] {biased} {added}"));
            }
        }
    }
}
