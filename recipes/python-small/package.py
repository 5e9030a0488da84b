"""Make the folder that goes into the wheel: a quantised backbone and adapters over it."""

import shutil
from pathlib import Path

from parscale_mlx.adapter import fingerprint, load_adapter, save_adapter
from parscale_mlx.convert import convert

import mlx.core as mx
from plan import Plan
from runs import stage_two

BITS, GROUP = 8, 64


def package(work: Path, plan: Plan, output: Path) -> None:
    """Write backbone and adapters of the first seed, the adapters in half precision.

    An adapter knows its backbone by hash, so the adapters are written anew for the quantised one.
    """
    convert(
        work / "runs" / "backbone" / "model",
        output,
        quantize=True,
        q_bits=BITS,
        q_group_size=GROUP,
        dtype="float16",
        force=True,
    )
    for run in stage_two(work, plan):
        if run.train_all or run.seed != plan.seeds[0]:
            continue
        adapter = load_adapter(run.result)
        adapter.weights = {k: v.astype(mx.float16) for k, v in adapter.weights.items()}
        adapter.backbone, adapter.backbone_sha256 = output.name, fingerprint(output)
        save_adapter(output / "adapters" / f"p{run.streams}", adapter, force=True)
    shutil.copyfile(work / "results.md", output / "results.md")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"Wrote {output}: {size / 1e6:.1f} MB")
