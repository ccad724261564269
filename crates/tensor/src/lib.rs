//! One non-generic Tensor, and the tape. Knows no ranks.
