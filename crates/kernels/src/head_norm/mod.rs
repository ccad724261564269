//! head_norm
