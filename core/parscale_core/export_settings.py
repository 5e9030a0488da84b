"""What an export is told: its choices, and the defaults of each target, stand here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOATS = ("fp32", "fp16", "bf16")
QUANTISED = ("int8", "int4")
PRECISIONS = (*FLOATS, *QUANTISED, "w8a8")
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {"kv_layout": "batch", "ops": "fused", "precision": "fp32"},
    "cuda": {"kv_layout": "batch", "ops": "fused", "precision": "fp16", "activations": "fp16"},
    # The fastest, all in all, for any number of streams: see docs/onnx-benchmarks.md.
    "cpu": {"kv_layout": "batch", "ops": "fused", "precision": "w8a8", "block_size": 64},
    "genai": {"kv_layout": "heads", "ops": "fused", "precision": "int8"},
    "genai-cuda": {
        "kv_layout": "heads", "ops": "fused", "precision": "fp16", "activations": "fp16",
    },
    "web": {"kv_layout": "heads", "ops": "fused", "precision": "int4"},
}  # fmt: skip
BLOCK_SIZE = 32  # where a preset has none
CHOICES = {
    "target": tuple(target for target in PRESETS if target),
    "kv_layout": ("batch", "heads"),
    "ops": ("fused", "standard"),
    "precision": PRECISIONS,
    "activations": FLOATS,
    "head_precision": PRECISIONS,
    "embedding_precision": (*FLOATS, *QUANTISED),
    "aggregator_precision": PRECISIONS,
    "accuracy_level": (0, 1, 2, 3, 4),
}


@dataclass(frozen=True)
class ExportSettings:
    """How a model is exported to ONNX; None stands for what suits the rest.

    Attributes:
        target: "cuda", "cpu", "genai", "genai-cuda" or "web" sets the next three unless they are
            given (see ``PRESETS``), and writes the files that onnxruntime-genai and transformers.js
            read. For CUDA, int4 is symmetric: it has no offsets.
        kv_layout: "batch" (streams are rows of the batch) or "heads" (streams are heads: an
            ordinary decoder's interface, for runtimes that know nothing of streams).
        ops: "fused" (onnxruntime's GroupQueryAttention and MatMulNBits) or "standard" (ai.onnx
            opset 23 alone).
        precision: "fp32", "fp16", "bf16", or for the weight matrices "int8", "int4", or "w8a8":
            8-bit weights and activations, for CPUs, above all for several streams.
        activations: "fp32", "fp16" or "bf16", for all that is not quantised; by default that of
            ``precision``, and for int8, int4 and w8a8 "fp32" (for CUDA, "fp16").
        head_precision: of the logits' projection; by default ``precision``, "int8" for int4 and
            w8a8.
        embedding_precision: by default "int8" where the head is quantised (not for CUDA), else
            ``activations``.
        aggregator_precision: by default ``activations``, "w8a8" for w8a8.
        block_size: columns that share a scale, a power of two from 16; by default the target's.
        accuracy_level: MatMulNBits' own: 4 computes with 8-bit activations, 0 does not round them.
        calibrate: a text file for w8a8 to measure activations on; by default one of ours.
        all_logits: logits of every token, [B, L, vocab]; otherwise of the last, [B, 1, vocab].
        aggregation_weights: a second output, float32 [B, L or 1, P]: how much each stream counts.
    """

    target: str | None = None
    kv_layout: str | None = None
    ops: str | None = None
    precision: str | None = None
    activations: str | None = None
    head_precision: str | None = None
    embedding_precision: str | None = None
    aggregator_precision: str | None = None
    block_size: int | None = None
    accuracy_level: int = 4
    calibrate: str | Path | None = None
    all_logits: bool = False
    aggregation_weights: bool = False
