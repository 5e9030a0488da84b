"""Exports of the golden cases, each made once."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.onnx_cases import CASES, GOLDEN, LAYOUTS, OPERATORS
from parscale_export import OnnxModel, export_onnx


@dataclass
class Exported:
    """One golden case as one kind of graph."""

    case: str
    kv_layout: str
    ops: str
    precision: str
    folder: Path
    model: OnnxModel

    @property
    def streams(self) -> int:
        return self.model.streams

    def rows(self, batch: int) -> int:
        return batch * (self.streams if self.kv_layout == "batch" else 1)


@pytest.fixture(
    scope="session",
    params=itertools.product(CASES, LAYOUTS, OPERATORS, ("fp32", "fp16")),
    ids="-".join,
)
def exported(request, tmp_path_factory) -> Exported:
    """A golden case with the logits of every token, in every layout, operator set and float."""
    case, kv_layout, ops, precision = request.param
    if case == "p2-torch-bin":
        pytest.importorskip("torch", reason="pytorch_model.bin needs PyTorch")
    folder = export_onnx(
        GOLDEN / case,
        tmp_path_factory.mktemp("exports") / "-".join(request.param),
        kv_layout=kv_layout,
        ops=ops,
        precision=precision,
        all_logits=True,
        aggregation_weights=True,
    )
    return Exported(*request.param, folder, OnnxModel(folder))
