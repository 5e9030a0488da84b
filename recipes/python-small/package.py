"""Make the folder that goes into the wheel: a quantised backbone and adapters over it."""

import shutil
from pathlib import Path

from parscale_mlx.adapter import load_adapter, save_adapter
from parscale_mlx.convert import convert

import mlx.core as mx
from parscale_core.checkpoint.adapter import fingerprint
from parscale_core.convert_settings import Quantization
from plan import Plan
from runs import stage_two

BITS, GROUP = 8, 64
CARD = """\
---
library_name: mlx
pipeline_tag: text-generation
license: psf-2.0
tags:
- mlx
- parscale
---

# {name}

A Qwen2-type decoder of Python source, trained from nothing by `recipes/python-small`, with stream
adapters for {streams} streams in `adapters`. It learnt from the source of Python's standard
library, which is licensed under the PSF licence. What it writes looks like Python and means little.
It looks back {context} tokens. `results.md` holds its losses.
"""


def package(work: Path, plan: Plan, output: Path) -> None:
    """Write backbone and adapters of the first seed, the adapters in half precision.

    An adapter knows its backbone by hash, so the adapters are written anew for the quantised one.
    """
    convert(
        work / "runs" / "backbone" / "model",
        output,
        quantization=Quantization(bits=BITS, group_size=GROUP),
        dtype="float16",
        force=True,
    )
    for run in stage_two(work, plan):
        if run.train_all or run.streams == 1 or run.seed != plan.seeds[0]:
            continue
        adapter = load_adapter(run.result)
        adapter.weights = {k: v.astype(mx.float16) for k, v in adapter.weights.items()}
        adapter.backbone, adapter.backbone_sha256 = output.name, fingerprint(output)
        save_adapter(output / "adapters" / f"p{run.streams}", adapter, force=True)
    card = CARD.format(
        name=output.name, streams=", ".join(map(str, plan.streams)), context=plan.seq_length
    )
    (output / "README.md").write_text(card)
    shutil.copyfile(work / "results.md", output / "results.md")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"Wrote {output}: {size / 1e6:.1f} MB")
