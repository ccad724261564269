//! Sums over ranks: the bits of the CPU, wherever arrays lie.

use crate::either::Either;
use crate::support::{Values, gpu, same};
use device::DType::{self, Bf16, F32};
use device::Device;
use kernels::rank_sum::{Part, rank_sum};

/// What each part is to the sum.
#[derive(Clone, Copy)]
enum Is {
    Term,
    Both,
    Sum,
}

/// All parts after the sum; each array begins `first` elements behind where memory does, the last one more.
fn run(kinds: &[Is], dtype: DType, len: usize, device: Device, first: usize) -> Vec<Values> {
    let last = kinds.len() - 1;
    let array = |i: usize| {
        let values = Values::random(dtype, len, i as u64 + 1);
        Either::new(&values, device, first + usize::from(i == last && first > 0))
    };
    let mut arrays: Vec<Either> = (0..kinds.len()).map(array).collect();
    let mut parts: Vec<Part<'_>> = arrays
        .iter_mut()
        .zip(kinds)
        .map(|(array, is)| match is {
            Is::Term => Part::Term(array.view()),
            Is::Both => Part::TermAndSum(array.view_mut()),
            Is::Sum => Part::Sum(array.view_mut()),
        })
        .collect();
    rank_sum(&mut parts);
    drop(parts);
    arrays.iter().map(Either::back).collect()
}

#[test]
fn of_all_ranks_or_some() {
    let _turn = gpu();
    let of_kinds: &[&[Is]] = &[
        &[Is::Both],
        &[Is::Both, Is::Both],
        &[Is::Term, Is::Both, Is::Term],
        &[Is::Term, Is::Term, Is::Sum],
        &[Is::Both; 7],
        &[Is::Sum, Is::Term, Is::Sum, Is::Both, Is::Term],
    ];
    for kinds in of_kinds {
        for dtype in [F32, Bf16] {
            for len in [0, 1, 7, 1024, 1031, 40_003] {
                let want = run(kinds, dtype, len, Device::Cpu, 0);
                for first in [0, 1, 8] {
                    let got = run(kinds, dtype, len, Device::Cuda, first);
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        let what = format!("part {i} of {}, {len} {dtype} from {first} on", kinds.len());
                        same(&what, got, want);
                    }
                }
            }
        }
    }
}
