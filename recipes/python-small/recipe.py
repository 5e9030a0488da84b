"""Train a small model of Python source, and P = 2, 4 and 8 streams over it, from nothing.

    python recipes/python-small/recipe.py --work DIR [--quick] [all|prepare|train|measure|package]

Every step leaves what it made in the work folder and is not repeated; a run that was killed goes on
from its last checkpoint.
"""

import argparse
import dataclasses
from pathlib import Path

from plan import QUICK, Plan

STEPS = ("prepare", "train", "measure", "package")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}, or all")
    parser.add_argument("--work", type=Path, default=Path("python-small"))
    parser.add_argument("--quick", action="store_true", help="minutes, to see that all works")
    parser.add_argument("--output", type=Path, help="where to package to; by default in --work")
    for field in dataclasses.fields(Plan):
        option = "--" + field.name.replace("_", "-")
        if field.type in (int, float, str):
            parser.add_argument(option, type=field.type)
        elif field.name in ("streams", "seeds"):
            parser.add_argument(option, type=lambda s: tuple(map(int, s.split(","))))
    args = parser.parse_args()
    steps = STEPS if not args.steps or args.steps == ["all"] else args.steps
    if wrong := set(steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(wrong))}")
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Plan)}
    plan = dataclasses.replace(
        QUICK if args.quick else Plan(), **{k: v for k, v in given.items() if v is not None}
    )
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        if step in steps:
            run_step(step, work, plan, args.output or work / "packaged")


def run_step(step: str, work: Path, plan: Plan, output: Path) -> None:
    # Imported where they are needed: stage 1 and 2 compute in processes of their own.
    if step == "prepare":
        from corpus import prepare

        prepare(work, plan)
    elif step == "train":
        from runs import pretrain, train_streams

        pretrain(work, plan)
        train_streams(work, plan)
    elif step == "measure":
        from measure import measure

        measure(work, plan)
    else:
        from package import package

        package(work, plan, output)


if __name__ == "__main__":
    main()
