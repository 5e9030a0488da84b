"""Products alone on a CPU: milliseconds of one, by how many rows it has.

    python benchmarks/products_onnx.py [--rows 1,2,4,8,64] [--size 1536] [--layers 24]

A chain of square matrices, larger than the processor's caches together, on one thread in processor
time: float32, MatMulNBits with 8 bits (``--precision int8``), w8a8, and w8a8 with sums that may
saturate on x86 processors without VNNI, which is not how exports are run.
"""

import argparse
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from parscale_export.builder import Builder, Options
from parscale_export.quantize import pack, quantize
from parscale_export.runtime.session import CPU
from parscale_export.w8a8 import integer_product, round_channels, rounded_rows

BLOCK = 64
SECONDS = 0.15  # of a turn; the fastest of TURNS counts
TURNS = 5


def chain(kind: str, size: int, layers: int) -> bytes:
    """A graph of products, each with the last one's result."""
    model: Any = SimpleNamespace(dtype=ir.DataType.FLOAT)  # all that is asked of a model here
    b = Builder(model, Options(), model)
    x = ir.Value(name="x", shape=ir.Shape([1, "rows", size]), type=ir.TensorType(ir.DataType.FLOAT))
    random, h = np.random.default_rng(0), x
    for n in range(layers):
        weight = random.standard_normal((size, size), np.float32) / np.float32(np.sqrt(size))

        def tensor(array: np.ndarray, part: str, n=n) -> ir.Value:
            return b.initializer(ir.Tensor(np.ascontiguousarray(array), name=f"{part}{n}"))

        if kind == "float32":
            h = b("MatMul", h, tensor(weight, "weight"))
        elif kind == "int8":
            blocks = quantize(weight, bits=8, block_size=BLOCK)
            h = b.microsoft(
                "MatMulNBits", h, tensor(pack(blocks.codes, 8), "codes"),
                tensor(blocks.scales, "scales"),
                K=size, N=size, bits=8, block_size=BLOCK, accuracy_level=4,
            )  # fmt: skip
        else:
            codes, scales = round_channels(weight)
            rows = rounded_rows(b, h, size, rotated=False)
            h = integer_product(b, rows, tensor(codes.T, "codes"), tensor(scales, "scales"))
    h.name, h.type = "y", x.type
    graph = ir.Graph(
        [x], [h], nodes=b.nodes, initializers=b.initializers,
        opset_imports={"": 23, "com.microsoft": 1}, name="products",
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


def seconds(session: ort.InferenceSession, x: np.ndarray) -> float:
    session.run(None, {"x": x})
    turns = []
    for _ in range(TURNS):
        start, runs = time.process_time(), 0
        while (spent := time.process_time() - start) < SECONDS:
            session.run(None, {"x": x})
            runs += 1
        turns.append(spent / runs)
    return min(turns)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,8,64")
    parser.add_argument("--size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    rows = [int(n) for n in args.rows.split(",")]
    print(f"{'':18}" + "".join(f"{n:>9}" for n in rows))
    for kind in ("float32", "int8", "w8a8", "w8a8 saturating"):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if kind == "w8a8":
            options.add_session_config_entry("session.x64quantprecision", "1")
        graph = chain(kind, args.size, args.layers)
        session = ort.InferenceSession(graph, options, providers=[CPU])
        times = [
            seconds(
                session, np.random.default_rng(n).standard_normal((1, n, args.size), np.float32)
            )
            for n in rows
        ]
        print(f"{kind:18}" + "".join(f"{t / args.layers * 1e3:>9.3f}" for t in times), flush=True)


if __name__ == "__main__":
    main()
