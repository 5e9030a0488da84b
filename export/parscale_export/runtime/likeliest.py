"""The likeliest token of each row, found where the logits lie: eight bytes a row go to the host."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from parscale_export.runtime.provider import CPU, CUDA, cuda_options


class Likeliest:  # pragma: no cover - on CUDA alone
    """A small graph beside a model's, on its device.

    Args:
        provider: CPU or CUDA, by its full name.
        device: where logits are, as onnxruntime names it, and its number.
        dtype: of the logits, float32 or float16.
    """

    def __init__(
        self, provider: str, device: tuple[str, int], dtype: type[np.floating] = np.float32
    ):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        providers: list[Any] = [CPU]
        if provider == CUDA:
            providers.insert(0, (CUDA, cuda_options(device[1], cuda_graph=False)))
        graph = _graph(ir.DataType.from_numpy(np.dtype(dtype))).SerializeToString()
        self.session = ort.InferenceSession(graph, options, providers=providers)
        self.device = device
        self.run_options = ort.RunOptions()
        self.run_options.log_severity_level = 4

    def of(self, logits: ort.OrtValue) -> Callable[[], np.ndarray]:
        """What gives the tokens of logits [B, 1, vocab], as they are when it is called.

        These are int64 [B, 1]: of equals the first; -1 where logits are not numbers.
        """
        shape = logits.shape()[:2]
        tokens = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.int64, *self.device)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("logits", logits)
        binding.bind_ortvalue_output("tokens", tokens)

        def choose() -> np.ndarray:
            self.session.run_with_iobinding(binding, self.run_options)
            return tokens.numpy()

        return choose


def _graph(dtype: ir.DataType) -> onnx.ModelProto:  # pragma: no cover - on CUDA alone
    tape = ir.tape.Tape()

    def constant(value: list[int] | int, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        array = np.array(value, dtype.numpy())
        return tape.initializer(ir.tensor(array, name=f"constant{dtype.name}{value}"))

    logits = ir.Value(name="logits", shape=ir.Shape(["B", 1, "V"]), type=ir.TensorType(dtype))
    # ArgMax is a kernel of cuDNN's on CUDA.
    _, places = tape.op_multi_out("TopK", [logits, constant([1])], num_outputs=2)
    places = tape.op("Squeeze", [places, constant([2])])
    # Of NaN and infinity zero times is NaN, which is not equal to itself. A sum of the logits
    # themselves could leave float16.
    zeros = tape.op("Mul", [logits, constant(0, dtype)])
    total = tape.op("ReduceSum", [zeros, constant([2])], {"keepdims": 0})
    are_numbers = tape.op("Equal", [total, total])
    tokens = tape.op("Where", [are_numbers, places, constant(-1)])
    tokens.name, tokens.type = "tokens", ir.TensorType(ir.DataType.INT64)
    tokens.shape = ir.Shape(["B", 1])
    graph = ir.Graph(
        [logits], [tokens], nodes=tape.nodes, initializers=tape.initializers,
        opset_imports={"": 18}, name="likeliest",
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=9))
