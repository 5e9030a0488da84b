"""Copies between KV caches, made by onnxruntime where they lie: nothing goes through the host."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from parscale_export.runtime.provider import CPU, CUDA, cuda_options

Buffers = list[ort.OrtValue]  # one for each past of a graph, [rows, kv_heads, T, head_dim]


class RowCopier:
    """Copies parts of rows from some buffers into others, all layers in one run.

    A small graph of ScatterND, whose result is bound to its own input: it then writes in place, on
    the CPU and on CUDA.

    Args:
        buffers: how many a cache has.
        element_type: of the cache, as in ONNX. Two bytes are copied as float16 whatever they mean.
        provider: CPU or CUDA, by its full name.
        device: where the buffers are, as onnxruntime names it, and its number.
    """

    def __init__(self, buffers: int, element_type: int, provider: str, device: tuple[str, int]):
        self.count, self.device = buffers, device
        is_float32 = element_type == onnx.TensorProto.FLOAT
        self.element_type = onnx.TensorProto.FLOAT if is_float32 else onnx.TensorProto.FLOAT16
        options = ort.SessionOptions()
        options.log_severity_level = 4
        providers: list[Any] = [CPU]
        if provider == CUDA:
            providers.insert(0, (CUDA, cuda_options(device[1], cuda_graph=False)))
        graph = _graph(buffers, self.element_type).SerializeToString()
        self.session = ort.InferenceSession(graph, options, providers=providers)
        self.run_options = ort.RunOptions()
        self.run_options.log_severity_level = 4

    def copy(
        self,
        targets: Buffers,
        to_rows: Sequence[int],
        to_column: int,
        sources: Buffers,
        from_rows: Sequence[int],
        from_column: int,
        columns: int,
    ) -> None:
        """Copy columns (entries) of rows into other rows; the two may be of the same buffers."""
        if not columns or not to_rows:
            return
        binding = self.session.io_binding()
        for n, (target, source) in enumerate(zip(targets, sources, strict=True)):
            for name, value in ((f"target{n}", target), (f"source{n}", source)):
                binding.bind_input(
                    name, *self.device, self.element_type, value.shape(), value.data_ptr()
                )
            binding.bind_output(
                f"copied{n}", *self.device, self.element_type, target.shape(), target.data_ptr()
            )
        # Bound arrays are not copied: they have to live until the run is over.
        numbers = {
            "to_rows": np.array(to_rows, np.int64),
            "from_rows": np.array(from_rows, np.int64),
            "to_columns": np.arange(to_column, to_column + columns),
            "start": np.array([from_column], np.int64),
            "end": np.array([from_column + columns], np.int64),
        }
        for name, array in numbers.items():
            binding.bind_cpu_input(name, array)
        self.session.run_with_iobinding(binding, self.run_options)


def _graph(buffers: int, element_type: int) -> onnx.ModelProto:
    """target[to_rows, :, to_columns] = source[from_rows, :, start:end].

    Sizes are those of inputs, or are read in the host's memory: on CUDA nothing waits for a number
    that the device would have to send.
    """
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []
    int64 = ir.TensorType(ir.DataType.INT64)

    def given(name: str, shape: Sequence[int | str], kind: ir.TypeProtocol = int64) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=kind)

    def constant(value: int | list[int]) -> ir.Value:
        name = f"constant{len(constants)}"
        constants.append(ir.Value(name=name, const_value=ir.tensor(np.array(value), name=name)))
        return constants[-1]

    def b(op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes))
        nodes[-1].outputs[0].name = f"value{len(nodes)}"
        return nodes[-1].outputs[0]

    to_rows, from_rows = given("to_rows", ["rows"]), given("from_rows", ["rows"])
    to_columns = given("to_columns", ["columns"])
    start, end = given("start", [1]), given("end", [1])
    kind = ir.TensorType(ir.DataType(element_type))
    targets = [given(f"target{n}", ["R", "H", "T", "D"], kind) for n in range(buffers)]
    sources = [given(f"source{n}", ["S", "H", "U", "D"], kind) for n in range(buffers)]

    heads = b("Shape", targets[0], start=1, end=2)
    shape = b("Concat", b("Shape", to_rows), heads, b("Shape", to_columns), constant([1]), axis=0)
    every_head = b("Range", constant(0), b("Squeeze", heads), constant(1))
    places = (
        b("Reshape", to_rows, constant([-1, 1, 1, 1])),
        b("Reshape", every_head, constant([1, -1, 1, 1])),
        b("Reshape", to_columns, constant([1, 1, -1, 1])),
    )
    where = b("Concat", *(b("Expand", place, shape) for place in places), axis=3)
    copied = []
    for n, (target, source) in enumerate(zip(targets, sources, strict=True)):
        part = b("Gather", b("Slice", source, start, end, constant([2])), from_rows, axis=0)
        result = b("ScatterND", target, where, part)
        result.name, result.type = f"copied{n}", kind
        result.shape = ir.Shape(["R", "H", "T", "D"])
        copied.append(result)
    inputs = [to_rows, from_rows, to_columns, start, end, *targets, *sources]
    graph = ir.Graph(
        inputs, copied, nodes=nodes, initializers=constants, opset_imports={"": 18}, name="copies"
    )
    return ir.to_proto(ir.Model(graph, ir_version=9))
