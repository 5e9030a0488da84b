"""Export ParScale decoders to ONNX, and run the result on onnxruntime. Never imports MLX."""

from parscale_export.export import export_onnx
from parscale_export.runtime.engine import OnnxEngine
from parscale_export.runtime.model import OnnxModel
from parscale_export.runtime.opening import open_engine

__all__ = ["OnnxEngine", "OnnxModel", "export_onnx", "open_engine"]
