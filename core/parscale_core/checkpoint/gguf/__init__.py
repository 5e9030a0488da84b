"""GGUF files: their metadata, tensors and tokenizer, unpacked as a Hugging Face-like folder."""
