//! Tensors and files: Hugging Face folders, GGUF, atomic training checkpoints. Knows no training.
