//! Corpora, tokenizers, packing and the resumable loader. Knows no tensors.
