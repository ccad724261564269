//! Text out of a model: prefill, decode, sampling. Knows no HTTP.
#![forbid(unsafe_code)]

mod generate;
mod loaded;
mod sampling;

pub use generate::{GenerateError, Generation, Session};
pub use loaded::{LoadError, LoadedModel};
pub use sampling::{Sampler, Sampling};
