//! Text out of a model: prefill, decode, sampling. Knows no HTTP.
