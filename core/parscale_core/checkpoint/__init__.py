"""A model folder on disk: its configuration, files, tensors, adapters and tokenizer, read once."""
