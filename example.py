"""What this project does, in thirty lines: one decoder, several streams, two runtimes.

    pip install . && python example.py

The model comes with the package: two million parameters that learnt from Python's standard library,
with adapters for two, four and eight streams.
"""

import tempfile

from parscale_mlx.engine import open_engine as open_on_mlx

from parscale_core.engine import Request, Sampling
from parscale_export import export_onnx
from parscale_export import open_engine as open_on_onnxruntime

PROMPT = "def read(path):\n    with open("


def answer(engine, streams: int) -> None:
    """Print an answer, and how much each stream counts, as the mean over its tokens."""
    ids = engine.tokenizer.encode(PROMPT)
    request = Request(ids, streams=streams, sampling=Sampling(max_tokens=12), stream_weights=True)
    pieces = list(engine.submit(request))
    shares = zip(*(p.stream_weights for p in pieces if p.stream_weights), strict=True)
    means = ", ".join(f"{sum(share) / len(share):.2f}" for share in shares)
    print(f"P={streams}  {''.join(p.text for p in pieces)!r}  streams: {means}")


with open_on_mlx("python-small", streams=[1, 4, 8]) as engine:
    for streams in (1, 4, 8):
        answer(engine, streams)

with tempfile.TemporaryDirectory() as folder:
    export_onnx("python-small", f"{folder}/onnx", aggregation_weights=True)
    with open_on_onnxruntime(f"{folder}/onnx", streams=4) as engine:
        answer(engine, 4)
