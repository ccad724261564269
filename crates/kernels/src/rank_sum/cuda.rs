use super::Part;
use crate::cuda::runs::run_of;
use crate::cuda::{launch, suffix};
use device::DType;

/// Of parts on one GPU.
pub(super) fn rank_sum(parts: &mut [Part<'_>], len: usize, dtype: DType) {
    let is_term = |part: &&Part<'_>| matches!(part, Part::Term(_) | Part::TermAndSum(_));
    let is_sum = |part: &&Part<'_>| matches!(part, Part::Sum(_) | Part::TermAndSum(_));
    let addresses = |of: &dyn Fn(&&Part<'_>) -> bool| -> Vec<u64> {
        let address = |part: &Part<'_>| match part {
            Part::Term(view) => view.address(),
            Part::TermAndSum(view) | Part::Sum(view) => view.address(),
        };
        parts.iter().filter(of).map(address).collect()
    };
    let (terms, sums) = (addresses(&is_term), addresses(&is_sum));
    assert!(!terms.is_empty(), "a sum of no terms");
    let (run, all) = (run_of(&[dtype]), [&terms[..], &sums[..]].concat());
    let fits = all.iter().all(|at| at.is_multiple_of((run * dtype.size_bytes()) as u64));
    let halves: Vec<u32> = all.iter().flat_map(|at| [*at as u32, (at >> 32) as u32]).collect();
    launch(&format!("rank_sum_{}", suffix(dtype)))
        .ids(&halves)
        .u32(terms.len())
        .u32(sums.len())
        .u32(usize::from(fits))
        .over(len, run)
        .run();
}
