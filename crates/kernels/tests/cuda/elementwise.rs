//! Whole arrays: the same bits, but for sums of columns.

use crate::support::{Values, close, gpu, random, same};
use device::{DType, View, ViewMut};
use kernels::elementwise::{add, add_assign, column_sums, copy, max_assign, round_to_bf16, scale};

const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// First element and number: those that lie for runs and those that do not, tails, several blocks.
const PARTS: [(usize, usize); 7] = [(0, 1), (0, 8), (1, 7), (0, 5000), (3, 5000), (8, 2051), (0, 0)];

/// Elements before and behind a part, which must stay.
fn around((first, len): (usize, usize)) -> usize {
    first + len + 9
}

#[test]
fn pairs_in_every_mix_of_types() {
    let _gpu = gpu();
    let ops: [fn(ViewMut<'_>, View<'_>); 2] = [add_assign, copy];
    for (yt, xt) in TYPES.into_iter().flat_map(|y| TYPES.map(|x| (y, x))) {
        for part in PARTS {
            let (y, x) = (Values::random(yt, around(part), 1), Values::random(xt, around(part), 2));
            for (name, op) in ["add_assign", "copy"].into_iter().zip(ops) {
                let (mut want, mut got, from) = (y.clone(), y.on_gpu(), x.on_gpu());
                op(want.cpu_mut().narrow(part.0, part.1), x.cpu().narrow(part.0, part.1));
                op(got.view_mut().narrow(part.0, part.1), from.view().narrow(part.0, part.1));
                same(&format!("{name} {yt} {xt} {part:?}"), &got.back(), &want);
            }
        }
    }
}

#[test]
fn the_larger_of_two() {
    let _gpu = gpu();
    for part in PARTS {
        let mut x = random(around(part), 2);
        x[part.0..].iter_mut().step_by(3).for_each(|x| *x = f32::NEG_INFINITY);
        let (y, x) = (Values::random(DType::F32, around(part), 1), Values::new(DType::F32, &x));
        let (mut want, mut got, from) = (y.clone(), y.on_gpu(), x.on_gpu());
        max_assign(want.cpu_mut().narrow(part.0, part.1), x.cpu().narrow(part.0, part.1));
        max_assign(got.view_mut().narrow(part.0, part.1), from.view().narrow(part.0, part.1));
        same(&format!("max_assign {part:?}"), &got.back(), &want);
    }
}

#[test]
fn sums_and_scalings_of_one_type() {
    let _gpu = gpu();
    for dtype in TYPES {
        for part @ (first, len) in PARTS {
            let [a, b, y] = [1, 2, 3].map(|seed| Values::random(dtype, around(part), seed));
            let (mut want, mut got) = (y.clone(), y.on_gpu());
            let (ga, gb) = (a.on_gpu(), b.on_gpu());
            let (ca, cb) = (a.cpu().narrow(first, len), b.cpu().narrow(first, len));
            add(ca, cb, want.cpu_mut().narrow(first, len));
            add(
                ga.view().narrow(first, len),
                gb.view().narrow(first, len),
                got.view_mut().narrow(first, len),
            );
            same(&format!("add {dtype} {part:?}"), &got.back(), &want);
            scale(want.cpu_mut().narrow(first, len), 0.3);
            scale(got.view_mut().narrow(first, len), 0.3);
            same(&format!("scale {dtype} {part:?}"), &got.back(), &want);
        }
    }
}

#[test]
fn rounding_takes_special_values_as_the_cpu_does() {
    let _gpu = gpu();
    let mut values = random(3000, 1);
    let special =
        [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff, 0x7f80_0000, 0x8000_0001, 0x7f80_0001, 1];
    values.iter_mut().skip(5).zip(special).for_each(|(value, bits)| *value = f32::from_bits(bits));
    let x = Values::new(DType::F32, &values);
    for part in [(0, 3000), (5, 2001)] {
        let (mut want, mut got) = (x.clone(), x.on_gpu());
        round_to_bf16(want.cpu_mut().narrow(part.0, part.1));
        round_to_bf16(got.view_mut().narrow(part.0, part.1));
        same("rounded", &got.back(), &want);
    }
    let (mut want, from) = (Values::zeros(DType::Bf16, 3000), x.on_gpu());
    let mut got = want.on_gpu();
    copy(want.cpu_mut(), x.cpu());
    copy(got.view_mut(), from.view());
    same("copied", &got.back(), &want);
}

#[test]
fn columns_are_added_up() {
    let _gpu = gpu();
    for dtype in TYPES {
        for (m, n, first) in
            [(1, 1, 0), (3, 40, 0), (700, 64, 0), (65, 4104, 0), (129, 37, 0), (200, 48, 1), (0, 5, 0)]
        {
            let (x, out) = (Values::random(dtype, first + m * n, 1), Values::random(DType::F32, n, 2));
            let (mut want, mut got, mut again, from) = (out.clone(), out.on_gpu(), out.on_gpu(), x.on_gpu());
            column_sums(x.cpu().narrow(first, m * n), n, want.cpu_mut());
            column_sums(from.view().narrow(first, m * n), n, got.view_mut());
            column_sums(from.view().narrow(first, m * n), n, again.view_mut());
            close(&format!("sums {dtype} {m} {n}"), &got.back(), &want, 1e-6);
            same("the same twice", &got.back(), &again.back());
        }
    }
}
