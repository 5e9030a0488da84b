"""Run exports on onnxruntime."""
