//! Rotations: the same bits.

use crate::support::{Values, gpu, same};
use device::DType;
use kernels::rope::{RopeScaling, RopeTable, apply};

#[test]
fn heads_turn_and_turn_back() {
    let _gpu = gpu();
    // Values of a head that turn, width of a head, heads, columns of a row, where rows begin.
    let shapes = [
        (64, 64, 5, 448, 0),
        (16, 24, 3, 80, 0),
        (6, 10, 2, 23, 0),
        (32, 32, 2, 64, 1),
        (64, 64, 40, 2560, 0),
    ];
    for (dim, h, heads, ld, first) in shapes {
        let table = RopeTable::new(dim, 10_000.0, &RopeScaling::None, 40);
        for positions in [&[0, 1, 7, 39, 3][..], &[5], &[]] {
            for dtype in [DType::F32, DType::Bf16] {
                let len = positions.len() * ld;
                let x = Values::random(dtype, first + len, 1);
                let (mut want, mut got) = (x.clone(), x.on_gpu());
                for inverse in [false, true, true] {
                    apply(want.cpu_mut().narrow(first, len), ld, heads, h, positions, &table, inverse);
                    apply(got.view_mut().narrow(first, len), ld, heads, h, positions, &table, inverse);
                    same(&format!("{dtype} {dim} {h} {heads} {ld}"), &got.back(), &want);
                }
            }
        }
    }
}
