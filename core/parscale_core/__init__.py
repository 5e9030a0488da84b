"""What needs no engine: model folders, the engine protocol, the HTTP server, analysis.

Nothing here imports mlx, onnx, onnxruntime or torch.
"""
