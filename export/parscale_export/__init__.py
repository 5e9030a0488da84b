"""Export ParScale decoders to ONNX, and run the result on onnxruntime. Never imports MLX."""

from parscale_export.export import export_onnx
from parscale_export.runtime.model import OnnxModel

__all__ = ["OnnxModel", "export_onnx"]
