"""A model folder on disk, read without any engine."""
