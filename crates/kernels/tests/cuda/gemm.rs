//! The product against its twin, which sums in another order: over transposes, types, epilogues, sub-matrices,
//! alignments and tails.

use crate::support::{Values, close, gpu, same};
use device::DType::{self, Bf16, F32};
use device::View;
use kernels::gelu::GeluKind;
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};

/// What is asked for besides the product.
#[derive(Clone, Copy, Debug, Default)]
struct Finish {
    accumulate: bool,
    bias: Option<DType>,
    residual: Option<DType>,
    gelu: Option<(GeluKind, DType)>,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    sizes: (usize, usize, usize),
    transposed: [bool; 2],
    /// Of a, b and c.
    dtypes: [DType; 3],
    finish: Finish,
    /// Elements before every array and behind every row.
    first: usize,
    gap: usize,
}

/// The operands of a case, and what it writes.
struct Arrays {
    a: Values,
    b: Values,
    bias: Values,
    residual: Values,
    c: Values,
    pre: Values,
}

impl Case {
    fn arrays(&self) -> Arrays {
        let ((m, n, k), [a, b, c], finish) = (self.sizes, self.dtypes, self.finish);
        let of = |rows: usize, cols: usize, transposed: bool, dtype, seed| {
            let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
            Values::random(dtype, self.first + rows * (cols + self.gap), seed)
        };
        Arrays {
            a: of(m, k, self.transposed[0], a, 1),
            b: of(k, n, self.transposed[1], b, 2),
            bias: Values::random(finish.bias.unwrap_or(F32), self.first + n, 3),
            residual: of(m, n, false, finish.residual.unwrap_or(F32), 4),
            c: of(m, n, false, c, 5),
            // The pre-activation has no gaps.
            pre: Values::random(finish.gelu.map_or(F32, |(_, dtype)| dtype), self.first + m * n, 6),
        }
    }

    fn mat<'a>(&self, data: View<'a>, rows: usize, cols: usize, transposed: bool) -> Mat<'a> {
        let ld = if transposed { rows } else { cols } + self.gap;
        Mat { data: data.narrow(self.first, data.len() - self.first), ld, transposed }
    }

    /// c and the pre-activation as the GPU leaves them.
    fn on_gpu(&self) -> [Values; 2] {
        let ((m, n, k), finish, first) = (self.sizes, self.finish, self.first);
        let Arrays { a, b, bias, residual, c, pre } = self.arrays();
        let (a, b, bias, residual) = (a.on_gpu(), b.on_gpu(), bias.on_gpu(), residual.on_gpu());
        let (mut c, mut pre) = (c.on_gpu(), pre.on_gpu());
        let (c_len, pre_len) = (c.view().len() - first, pre.view().len() - first);
        let epilogue = Epilogue {
            bias: finish.bias.map(|_| bias.view().narrow(first, n)),
            residual: finish.residual.map(|_| self.mat(residual.view(), m, n, false)),
            gelu: finish.gelu.map(|(kind, _)| (kind, pre.view_mut().narrow(first, pre_len))),
        };
        let a = self.mat(a.view(), m, k, self.transposed[0]);
        let b = self.mat(b.view(), k, n, self.transposed[1]);
        let out = MatMut { data: c.view_mut().narrow(first, c_len), ld: n + self.gap };
        gemm(m, n, k, a, b, out, finish.accumulate, epilogue);
        [c.back(), pre.back()]
    }

    fn on_cpu(&self) -> [Values; 2] {
        let ((m, n, k), finish, first) = (self.sizes, self.finish, self.first);
        let Arrays { a, b, bias, residual, mut c, mut pre } = self.arrays();
        let (c_len, pre_len) = (c.cpu().len() - first, pre.cpu().len() - first);
        let epilogue = Epilogue {
            bias: finish.bias.map(|_| bias.cpu().narrow(first, n)),
            residual: finish.residual.map(|_| self.mat(residual.cpu(), m, n, false)),
            gelu: finish.gelu.map(|(kind, _)| (kind, pre.cpu_mut().narrow(first, pre_len))),
        };
        let a = self.mat(a.cpu(), m, k, self.transposed[0]);
        let b = self.mat(b.cpu(), k, n, self.transposed[1]);
        let out = MatMut { data: c.cpu_mut().narrow(first, c_len), ld: n + self.gap };
        gemm(m, n, k, a, b, out, finish.accumulate, epilogue);
        [c, pre]
    }

    fn check(&self) {
        let ([c, pre], [want_c, want_pre]) = (self.on_gpu(), self.on_cpu());
        // Sums differ by their order, and tensor cores cut off what others round. Products in TF32 would be further
        // off. On an H200 cuBLASLt rounds a bf16 product before it adds to it, up to 2.9e-3 as these are.
        let in_tensor_cores = self.dtypes[..2] == [Bf16, Bf16];
        let adds = self.finish.accumulate || self.finish.residual.is_some();
        let most = |dtypes: &[DType]| match dtypes.contains(&Bf16) {
            true if in_tensor_cores && adds => 4e-3,
            true => 5e-4,
            false if in_tensor_cores => 5e-5,
            false => 1e-5,
        };
        match self.finish.gelu {
            None => close(&format!("c of {self:?}"), &c, &want_c, most(&[self.dtypes[2]])),
            Some((_, dtype)) => {
                close(&format!("c of {self:?}"), &c, &want_c, most(&[self.dtypes[2], dtype]));
                close(&format!("pre-activation of {self:?}"), &pre, &want_pre, most(&[dtype]));
            }
        }
        let (outside, want_outside) = (self.outside(&c), self.outside(&want_c));
        assert!(outside == want_outside, "{self:?} wrote outside of c");
    }

    /// What lies before c and behind its rows.
    fn outside(&self, c: &Values) -> Vec<f32> {
        let ((_, n, _), floats) = (self.sizes, c.floats());
        let behind = floats[self.first..].chunks(n + self.gap).flat_map(|row| &row[n..]);
        floats[..self.first].iter().chain(behind).copied().collect()
    }
}

fn every_dtypes() -> impl Iterator<Item = [DType; 3]> {
    (0..8).map(|bits| [1, 2, 4].map(|bit| if bits & bit == 0 { F32 } else { Bf16 }))
}

fn every_finish() -> Vec<Finish> {
    let dtypes = [None, Some(F32), Some(Bf16)];
    let gelus = [None, Some((GeluKind::Tanh, F32)), Some((GeluKind::Erf, Bf16))];
    let mut list = Vec::new();
    for accumulate in [false, true] {
        for bias in dtypes {
            for residual in dtypes {
                list.extend(gelus.map(|gelu| Finish { accumulate, bias, residual, gelu }));
            }
        }
    }
    list
}

const TRANSPOSED: [[bool; 2]; 4] = [[false, false], [false, true], [true, false], [true, true]];

/// Where arrays begin and how far rows are apart: dense, aligned sub-matrices, odd ones.
const PLACES: [(usize, usize); 3] = [(0, 0), (8, 8), (1, 3)];

#[test]
fn every_epilogue_of_every_type() {
    let _turn = gpu();
    for (round, dtypes) in every_dtypes().enumerate() {
        for (at, finish) in every_finish().into_iter().enumerate() {
            let (first, gap) = PLACES[(at + round) % 3];
            let transposed = TRANSPOSED[(at / 3 + round) % 4];
            Case { sizes: (7, 24, 40), transposed, dtypes, finish, first, gap }.check();
        }
    }
}

#[test]
fn every_transpose_over_tails() {
    let _turn = gpu();
    let shapes =
        [(1, 1, 1), (1, 40, 37), (33, 5, 70), (9, 33, 2), (3, 1030, 8), (5, 17, 0), (0, 5, 3), (64, 96, 32)];
    let finishes = every_finish();
    for (round, dtypes) in every_dtypes().enumerate() {
        for (at, sizes) in shapes.into_iter().enumerate() {
            for (turn, transposed) in TRANSPOSED.into_iter().enumerate() {
                let (first, gap) = PLACES[(at + turn) % 3];
                let plain = Case { sizes, transposed, dtypes, finish: Finish::default(), first, gap };
                plain.check();
                Case { finish: finishes[(at * 11 + turn * 5 + round * 7) % finishes.len()], ..plain }.check();
            }
        }
    }
}

#[test]
fn long_sums_are_rounded_once_and_always_the_same() {
    let _turn = gpu();
    for dtypes in [[F32, F32, F32], [Bf16, Bf16, F32], [Bf16, Bf16, Bf16]] {
        for transposed in TRANSPOSED {
            let finish = Finish { accumulate: true, ..Finish::default() };
            let case = Case { sizes: (32, 48, 2048), transposed, dtypes, finish, first: 0, gap: 0 };
            case.check();
            same(&format!("{case:?} again"), &case.on_gpu()[0], &case.on_gpu()[0]);
        }
    }
}
