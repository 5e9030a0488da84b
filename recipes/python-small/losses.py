"""Losses of models on held-out documents, and how sure the differences between them are."""

from pathlib import Path
from typing import Any

import parscale_mlx
from parscale_mlx.tokenizer import load_tokenizer
from parscale_mlx.training.batches import make_batch
from parscale_mlx.training.documents import Document, read_documents
from parscale_mlx.training.step import summed_loss

import mlx.core as mx
import numpy as np
from parscale_core.checkpoint.config import read_config

RESAMPLES, LEVEL = 2000, 95


def held_out(work: Path, plan: Any, folder: Path) -> list[list[Document]]:
    """Held-out files as windows of at most ``seq_length`` + 1 tokens, up to ``eval_tokens``."""
    tokenizer = load_tokenizer(folder, read_config(folder).raw)
    documents = read_documents([str(work / "corpus" / "held-out")], tokenizer)
    order = np.random.default_rng(0).permutation(len(documents))
    files, total, length = [], 0, plan.seq_length
    # At most a tenth of all from one file, or a single long one would decide.
    most = max(1, plan.eval_tokens // 10 // length)
    for n in order:
        tokens = documents[n].tokens
        starts = range(0, len(tokens) - 1, length)
        file = [Document(tokens[s : s + length + 1], 0, "") for s in starts][:most]
        files.append(file)
        total += count([file])
        if total >= plan.eval_tokens:
            break
    return files


def count(files: list[list[Document]]) -> int:
    """Predictions in files."""
    return sum(len(d.tokens) - 1 for file in files for d in file)


def file_losses(model: parscale_mlx.Model, files: list[list[Document]]) -> np.ndarray:
    """The summed loss of each file, in nats."""
    sums = []
    for file in files:
        total = mx.array(0.0)
        for n in range(0, len(file), 8):
            tokens, counts = make_batch(file[n : n + 8])
            total = total + summed_loss(model, mx.array(tokens), mx.array(counts))[0]
            mx.eval(total)
        sums.append(total.item())
    return np.array(sums)


def summarise(
    losses: dict[str, np.ndarray], counts: np.ndarray, control: str | None = None
) -> dict[str, dict]:
    """Mean loss a token and its difference to another model's, each with its interval.

    Args:
        losses: for each model, the summed losses of each seed's run, [seeds, files].
        counts: predictions in each file.
        control: the other model; by default one stream that was trained alike.
    """
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(counts), (RESAMPLES, len(counts)))
    tail = (100 - LEVEL) / 2

    def resampled(values: np.ndarray) -> np.ndarray:
        """The mean of each resampling of files, and of seeds, [RESAMPLES]."""
        shares = rng.multinomial(len(values), [1 / len(values)] * len(values), RESAMPLES)
        files = np.take_along_axis(shares @ values / len(values), picks, axis=1)
        return files.sum(axis=1) / counts[picks].sum(axis=1)

    def interval(means: np.ndarray) -> list[float]:
        return [float(x) for x in np.percentile(means, [tail, 100 - tail])]

    results = {}
    for name, values in losses.items():
        alike = losses.get(name.partition(",")[0] + ", P=1", losses["backbone"])
        one_stream = alike if control is None else losses[control]
        seeds = values.sum(axis=1) / counts.sum()
        results[name] = {
            "loss": float(seeds.mean()),
            "loss_interval": interval(resampled(values)),
            "difference": float(seeds.mean() - one_stream.mean(axis=0).sum() / counts.sum()),
            "difference_interval": interval(resampled(values) - resampled(one_stream))
            if values is not one_stream
            else [0.0, 0.0],
            "seeds": seeds.tolist(),
        }
    return results


def compare(
    losses: dict[str, np.ndarray], counts: np.ndarray, controls: list[str]
) -> dict[str, dict[str, dict]]:
    """What ``summarise`` says of each model against each control, by control."""
    return {control: summarise(losses, counts, control) for control in controls}


def differences(against: dict[str, dict[str, dict]], counts: np.ndarray) -> str:
    """Losses, and differences to each control, as Markdown."""
    lines = [
        f"Held-out loss in nats a token over {counts.sum():,} tokens of {len(counts)} documents; "
        f"differences with {LEVEL} % intervals by bootstrap over documents and seeds.",
        "",
        f"| model | seeds | loss | {' | '.join(f'against {name}' for name in against)} |",
        "| --- | ---: | ---: |" + " ---: |" * len(against),
    ]
    first = next(iter(against.values()))
    for name, row in first.items():
        cells = []
        for control, rows in against.items():
            r = rows[name]
            low, high = r["difference_interval"]
            same = name == control
            cells.append("" if same else f"{r['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"| {name} | {len(row['seeds'])} | {row['loss']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
