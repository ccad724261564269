//! The obvious sum over ranks.

/// Element by element, rank by rank.
pub(super) fn rank_sum(terms: &[Vec<f32>]) -> Vec<f32> {
    (0..terms[0].len()).map(|i| terms[1..].iter().fold(terms[0][i], |sum, term| sum + term[i])).collect()
}
