//! One folder per op: contract, reference, CPU. Knows no tensors, no parameters, no ranks.
