//! Floating-point operations counted from shapes: what utilisation is measured against.

/// FLOPs of one token of a training step, by cause.
///
/// A matrix parameter costs 2 FLOPs a token forward and 4 backward. Attention costs
/// 4 (forward) + 8 (backward) FLOPs for each pair of a query and a key it sees, for each of N*H
/// columns; with a causal mask a token sees (T+1)/2 keys on average. Recomputed values do not
/// count: utilisation measures useful work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    /// Parameters of matrices that multiply activations, the head included, the embedding not.
    pub matmul_params: usize,
    /// Sum over layers of N * H.
    pub attention_columns: usize,
}

impl Flops {
    /// Forward + backward FLOPs per token at `t` tokens a row, whole rows as one document.
    pub fn per_token(&self, t: usize) -> f64 {
        6.0 * self.matmul_params as f64 + 12.0 * self.attention_columns as f64 * (t as f64 + 1.0) / 2.0
    }

    /// The same with attention counted as if nothing were masked, as the PaLM paper (appendix B)
    /// and most published figures do.
    pub fn per_token_unmasked(&self, t: usize) -> f64 {
        6.0 * self.matmul_params as f64 + 12.0 * self.attention_columns as f64 * t as f64
    }
}
