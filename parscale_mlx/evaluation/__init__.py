"""Evaluate a model: losses on text, lm-evaluation-harness, completions to be run."""
