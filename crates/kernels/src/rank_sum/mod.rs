//! Sum of one piece of every rank's array, in the order of ranks, in f32.
//!
//! The order is part of the contract: a sum has the same bits whoever computes it and wherever
//! the pieces came from. bf16 is widened, summed in f32 and rounded once.

mod cpu;
#[cfg(test)]
mod reference;

use device::{Buffer, DType, Device, View, ViewMut};

/// What a rank's piece is to the sum.
pub enum Part<'a> {
    /// Added.
    Term(View<'a>),
    /// Added, then replaced by the sum.
    TermAndSum(ViewMut<'a>),
    /// Replaced by the sum.
    Sum(ViewMut<'a>),
}

impl Part<'_> {
    fn len(&self) -> usize {
        match self {
            Part::Term(view) => view.len(),
            Part::TermAndSum(view) | Part::Sum(view) => view.len(),
        }
    }

    fn kind(&self) -> (Device, DType) {
        match self {
            Part::Term(view) => (view.device(), view.dtype()),
            Part::TermAndSum(view) | Part::Sum(view) => (view.device(), view.dtype()),
        }
    }
}

/// Every `Sum` and `TermAndSum` becomes ((t0 + t1) + t2) + ... over the terms in the order given.
/// All parts have one length and one float type. Each term is read once, each sum written once.
pub fn rank_sum(parts: &mut [Part<'_>]) {
    let Some(first) = parts.first() else { return };
    let (len, (device, dtype)) = (first.len(), first.kind());
    assert!(parts.iter().all(|p| p.len() == len && p.kind() == (device, dtype)), "parts differ");
    match (device, dtype) {
        (Device::Cpu, DType::F32) => cpu::rank_sum::<f32>(parts, len),
        (Device::Cpu, DType::Bf16) => cpu::rank_sum::<half::bf16>(parts, len),
        (Device::Cuda, _) => staged(parts, len, dtype),
        (_, other) => panic!("no sum over ranks of {other}"),
    }
}

/// The sum of windows of a GPU, taken on the host: until it has a kernel of its own.
fn staged(parts: &mut [Part<'_>], len: usize, dtype: DType) {
    let bytes = len * dtype.size_bytes();
    let mut copies: Vec<Buffer> =
        parts.iter().map(|_| Buffer::new(Device::Cpu, bytes).expect("memory for a copy")).collect();
    for (part, copy) in parts.iter().zip(&mut copies) {
        match part {
            Part::Term(view) => device::copy(copy.view_mut(dtype, 0, len), *view),
            Part::TermAndSum(view) => device::copy(copy.view_mut(dtype, 0, len), view.as_view()),
            Part::Sum(_) => {}
        }
    }
    let mut on_host: Vec<Part<'_>> = parts
        .iter()
        .zip(&mut copies)
        .map(|(part, copy)| match part {
            Part::Term(_) => Part::Term(copy.view(dtype, 0, len)),
            Part::TermAndSum(_) => Part::TermAndSum(copy.view_mut(dtype, 0, len)),
            Part::Sum(_) => Part::Sum(copy.view_mut(dtype, 0, len)),
        })
        .collect();
    rank_sum(&mut on_host);
    drop(on_host);
    for (part, copy) in parts.iter_mut().zip(&copies) {
        if let Part::TermAndSum(view) | Part::Sum(view) = part {
            device::copy(view.reborrow(), copy.view(dtype, 0, len));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn terms(ranks: usize, len: usize) -> Vec<Vec<f32>> {
        let value = |rank: usize, i: usize| ((rank * 7919 + i * 104_729) % 1000) as f32 * 0.37 - 180.0;
        (0..ranks).map(|rank| (0..len).map(|i| value(rank, i)).collect()).collect()
    }

    #[test]
    fn every_rank_gets_the_reference_bits_for_every_length_and_number_of_ranks() {
        for ranks in 1..=8 {
            for len in [0, 1, 2, 63, 1023, 1024, 1025, 5000] {
                let mut data = terms(ranks, len);
                let want = reference::rank_sum(&data);
                let mut parts: Vec<Part> =
                    data.iter_mut().map(|x| Part::TermAndSum(ViewMut::of_f32(x))).collect();
                rank_sum(&mut parts);
                drop(parts);
                assert!(data.iter().all(|x| *x == want), "{ranks} ranks, {len} elements");
            }
        }
    }

    #[test]
    fn bf16_is_summed_in_f32_and_rounded_once() {
        let wide = terms(5, 1500);
        let narrow: Vec<Vec<bf16>> =
            wide.iter().map(|x| x.iter().map(|x| bf16::from_f32(*x)).collect()).collect();
        let widened: Vec<Vec<f32>> = narrow.iter().map(|x| x.iter().map(|x| x.to_f32()).collect()).collect();
        let want: Vec<bf16> = reference::rank_sum(&widened).into_iter().map(bf16::from_f32).collect();
        let mut sum = vec![bf16::ZERO; 1500];
        let mut parts: Vec<Part> = narrow.iter().map(|x| Part::Term(View::of_bf16(x))).collect();
        parts.insert(2, Part::Sum(ViewMut::of_bf16(&mut sum)));
        rank_sum(&mut parts);
        assert_eq!(sum, want);
    }
}
