"""Golden cases, and a stand-in for a runtime that knows nothing of this package."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors reads bfloat16 once this is imported
import numpy as np
import onnxruntime as ort
from packaging.version import Version
from parscale_core.checkpoint.config import read_config, tensor_shapes
from parscale_export.runtime.session import STANDARD_SINCE
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ["p1", "p2-tied-sharded", "p2-torch-bin", "p4", "p4-bf16", "p8-short-prefix"]
LAYOUTS = ("batch", "heads")
OPERATORS = ("fused", "standard") if Version(ort.__version__) >= STANDARD_SINCE else ("fused",)


@dataclass
class Batch:
    """One golden batch: left-padded ids and mask [B, L], and what follows from them."""

    ids: np.ndarray
    mask: np.ndarray
    logits: np.ndarray  # [B, L, vocab], meaningful where the mask is 1
    tokens: np.ndarray  # [B, 12], greedy
    token_logits: np.ndarray  # [B, 12, vocab]; row i follows greedy token i

    @property
    def prompts(self) -> list[list[int]]:
        return [row[keep].tolist() for row, keep in zip(self.ids, self.mask == 1, strict=True)]


def batches(case: str) -> list[Batch]:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    names = ("input_ids", "attention_mask", "logits", "greedy_tokens", "greedy_logits")
    count = sum(name.endswith(".input_ids") for name in expected)
    return [Batch(*(expected[f"b{k}.{name}"] for name in names)) for k in range(count)]


def variant(folder: Path, case: str = "p4", tensors: dict | None = None, **config) -> Path:
    """A copy of a golden checkpoint with other config fields, and other tensors if given."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (GOLDEN / case).iterdir():
        if file.name != "expected.safetensors":
            shutil.copyfile(file, folder / file.name)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def random_model(folder: Path, case: str = "p4", *, outlier: float = 0.0, **config) -> Path:
    """A random checkpoint with other dimensions than a golden case's.

    Args:
        outlier: added to one channel of the embeddings: residuals of Qwen2 have such channels.
    """
    folder.mkdir(parents=True)
    golden = json.loads((GOLDEN / case / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(golden | config))
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in tensor_shapes(read_config(folder)).items():
        tensor = random.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            tensor = 1 + tensor * np.float32(0.05)
        else:
            tensor *= np.float32(0.05 if "prefix" in name else 1 / np.sqrt(shape[-1]))
        if outlier and "embed_tokens" in name:
            tensor[:, 7] += outlier
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


class GenericRuntime:
    """A graph run by onnxruntime alone, past and present handed on as separate arrays."""

    def __init__(self, file: Path):
        self.session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.past: dict[str, np.ndarray] = {}
        self.mask: np.ndarray | None = None
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                self.past[value.name] = np.zeros(
                    (0, value.shape[1], 0, value.shape[3]),
                    np.float16 if "float16" in value.type else np.float32,
                )

    def step(self, ids, mask=None) -> np.ndarray:
        """Logits [B, L, vocab] of new tokens [B, L]; ``mask`` [B, L] says which are padding."""
        ids = np.asarray(ids, np.int64)
        mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        self.mask = mask if self.mask is None else np.concatenate([self.mask, mask], axis=1)
        names = [output.name for output in self.session.get_outputs()]
        feed = {"input_ids": ids, "attention_mask": self.mask} | self.past
        results = dict(zip(names, self.session.run(None, feed), strict=True))
        self.past = {
            name: results[name.replace("past_key_values.", "present.")] for name in self.past
        }
        return results["logits"]

    def start(self, rows: int) -> "GenericRuntime":
        """Begin anew, with an empty cache of so many rows."""
        self.mask = None
        self.past = {
            name: np.zeros((rows, value.shape[1], 0, value.shape[3]), value.dtype)
            for name, value in self.past.items()
        }
        return self
