"""The golden cases: tiny checkpoints and what the published code computes from them."""

from dataclasses import dataclass
from pathlib import Path

import parscale_mlx

import mlx.core as mx

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ["p1", "p2-tied-sharded", "p2-torch-bin", "p4", "p4-bf16", "p8-short-prefix"]
TOLERANCE = 5e-5


@dataclass
class Row:
    """One sequence of a golden batch without its padding."""

    ids: list[int]
    logits: mx.array  # [L, vocab]
    greedy_tokens: list[int]
    greedy_logits: mx.array  # [12, vocab]; row i follows greedy token i


@dataclass
class Golden:
    name: str
    folder: Path
    model: object
    rows: list[Row]


def read_rows(folder: Path) -> list[Row]:
    expected = mx.load(str(folder / "expected.safetensors"))
    rows = []
    for k in range(sum(name.endswith("input_ids") for name in expected)):
        batch = {
            name: expected[f"b{k}.{name}"] for name in ("input_ids", "attention_mask", "logits")
        }
        for i, mask in enumerate(batch["attention_mask"].tolist()):
            start = mask.index(1)
            rows.append(
                Row(
                    ids=batch["input_ids"][i, start:].tolist(),
                    logits=batch["logits"][i, start:],
                    greedy_tokens=expected[f"b{k}.greedy_tokens"][i].tolist(),
                    greedy_logits=expected[f"b{k}.greedy_logits"][i],
                )
            )
    return rows


def load_golden(name: str) -> Golden:
    folder = GOLDEN / name
    model, _ = parscale_mlx.load_model(folder, dtype=mx.float32)
    return Golden(name, folder, model, read_rows(folder))


def difference(actual: mx.array, expected: mx.array) -> float:
    assert actual.shape == expected.shape
    return mx.abs(actual.astype(mx.float32) - expected).max().item()
