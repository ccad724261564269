//! Fast against reference over tails, transposes, types, epilogues, instruction sets and threads.

use super::reference::product;
use super::*;
use device::{DType, Isa, Threads};
use half::bf16;

struct Owned {
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    dtype: DType,
}

impl Owned {
    fn new(len: usize, dtype: DType, seed: u32) -> Owned {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let f32s: Vec<f32> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        let bf16s = f32s.iter().map(|x| bf16::from_f32(*x)).collect();
        Owned { f32s, bf16s, dtype }
    }

    fn view(&self) -> View<'_> {
        match self.dtype {
            DType::F32 => View::of_f32(&self.f32s),
            _ => View::of_bf16(&self.bf16s),
        }
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        match self.dtype {
            DType::F32 => ViewMut::of_f32(&mut self.f32s),
            _ => ViewMut::of_bf16(&mut self.bf16s),
        }
    }

    fn get(&self, i: usize) -> f64 {
        match self.dtype {
            DType::F32 => self.f32s[i] as f64,
            _ => self.bf16s[i].to_f64(),
        }
    }
}

struct Case {
    sizes: (usize, usize, usize),
    transposed: (bool, bool),
    dtypes: (DType, DType, DType),
    accumulate: bool,
    epilogue: bool,
}

fn operand(rows: usize, cols: usize, transposed: bool, dtype: DType, seed: u32) -> (Owned, usize) {
    let (outer, inner) = if transposed { (cols, rows) } else { (rows, cols) };
    (Owned::new(outer * (inner + 3), dtype, seed), inner + 3)
}

/// Run one case on one instruction set; returns C's bytes after checking every element.
fn check(case: &Case, isa: Isa) -> Vec<u8> {
    let (m, n, k) = case.sizes;
    let (ad, bd, cd) = case.dtypes;
    let (a, lda) = operand(m, k, case.transposed.0, ad, 1);
    let (b, ldb) = operand(k, n, case.transposed.1, bd, 2);
    let mat = |x, ld, transposed| Mat { data: x, ld, transposed };
    let (am, bm) = (mat(a.view(), lda, case.transposed.0), mat(b.view(), ldb, case.transposed.1));
    let (bias, residual) = (Owned::new(n, bd, 3), Owned::new(m * n, cd, 4));
    let mut c = Owned::new(m * (n + 1), cd, 5);
    let before: Vec<f64> = (0..m * (n + 1)).map(|i| c.get(i)).collect();
    let epilogue = || match case.epilogue {
        false => Epilogue::default(),
        true => {
            Epilogue { bias: Some(bias.view()), residual: Some(Mat::new(residual.view(), n)), gelu: None }
        }
    };
    let out = MatMut { data: c.view_mut(), ld: n + 1 };
    cpu::gemm(isa, case.sizes, am, bm, out, case.accumulate, epilogue());
    let (want, size) = product(case.sizes, am, bm);
    for i in 0..m {
        for j in 0..n {
            let mut want = want[i * n + j];
            let mut size = size[i * n + j] + want.abs();
            if case.accumulate {
                want += before[i * (n + 1) + j];
                size += before[i * (n + 1) + j].abs();
            }
            if case.epilogue {
                want += bias.get(j) + residual.get(i * n + j);
                size += 2.0;
            }
            let rounding = if cd == DType::Bf16 { want.abs() / 256.0 } else { 0.0 };
            let got = c.get(i * (n + 1) + j);
            let bound = 4.0 * f32::EPSILON as f64 * size * (1.0 + (k as f64).sqrt() / 8.0) + rounding;
            assert!((got - want).abs() <= bound, "{:?} {isa:?} ({i},{j}): {got} for {want}", case.sizes);
        }
        assert_eq!(c.get(i * (n + 1) + n), before[i * (n + 1) + n], "wrote past the row");
    }
    match cd {
        DType::F32 => c.f32s.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        _ => c.bf16s.iter().flat_map(|x| x.to_ne_bytes()).collect(),
    }
}

#[test]
fn every_instruction_set_agrees_with_the_reference_over_tails() {
    let (f, b) = (DType::F32, DType::Bf16);
    let dtypes = [(f, f, f), (b, b, f), (b, b, b), (f, b, f), (b, f, b)];
    let shapes = [
        (1, 1, 1),
        (1, 40, 37),
        (5, 16, 8),
        (6, 16, 256),
        (7, 17, 9),
        (9, 33, 1),
        (13, 31, 257),
        (14, 32, 300),
        (61, 130, 70),
        (33, 5, 515),
        (200, 259, 19),
        (9, 3, 0),
    ];
    for isa in Isa::available() {
        for sizes in shapes {
            for (n, dtypes) in dtypes.into_iter().enumerate() {
                for transposed in [(false, false), (false, true), (true, false), (true, true)] {
                    let (accumulate, epilogue) = (n % 2 == 1, (n + sizes.0) % 2 == 0);
                    check(&Case { sizes, transposed, dtypes, accumulate, epilogue }, isa);
                }
            }
        }
    }
    if Isa::detected() < Isa::Avx512Bf16 {
        println!("not tested here: this machine stops at {}", Isa::detected().name());
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    for dtype in [DType::F32, DType::Bf16] {
        let case = Case {
            sizes: (301, 517, 600),
            transposed: (false, true),
            dtypes: (dtype, dtype, dtype),
            accumulate: false,
            epilogue: true,
        };
        let on = |threads| Threads::new(threads).unwrap().run(|| check(&case, Isa::detected()));
        let one = on(1);
        assert!(on(2) == one && on(3) == one);
    }
}

#[test]
fn gelu_stores_its_input_and_its_output() {
    let (m, n, k) = (10, 20, 30);
    let (a, b) = (Owned::new(m * k, DType::F32, 1), Owned::new(n * k, DType::F32, 2));
    let (mut pre, mut out) = (vec![0f32; m * n], vec![0f32; m * n]);
    let epilogue =
        Epilogue { gelu: Some((GeluKind::Tanh, ViewMut::of_f32(&mut pre))), ..Epilogue::default() };
    let c = MatMut { data: ViewMut::of_f32(&mut out), ld: n };
    gemm(m, n, k, Mat::new(a.view(), k), Mat::new(b.view(), k).t(), c, false, epilogue);
    let (want, _) = product((m, n, k), Mat::new(a.view(), k), Mat::new(b.view(), k).t());
    for i in 0..m * n {
        assert!((pre[i] as f64 - want[i]).abs() < 1e-5);
        assert!((out[i] - crate::gelu::gelu(GeluKind::Tanh, pre[i])).abs() < 1e-6);
    }
}
