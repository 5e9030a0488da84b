"""Train streams, and the controls of them, over frozen SmolLM2-135M on English and code.

    python recipes/smollm2-streams/recipe.py --work DIR [--runs p2-seed0,p4-seed0] [STEP...]

Steps: prepare, train, measure, package; all of them by default. Runs are those of ``plan.py``, in
its order. What is finished is not repeated, and a run that was killed goes on from its last
checkpoint, so the command can be given again at any time.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plan import PLAN, RUNS, Run
from training import train_once

STEPS = ("prepare", "train", "measure", "package")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--work", type=Path, default=Path("smollm2-streams"))
    parser.add_argument("--runs", help="names, with commas between them (default all of plan.py)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, on a core each")
    parser.add_argument("--output", type=Path, help="where to package to (default in --work)")
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    known = {run.name: run for run in RUNS}
    names = args.runs.split(",") if args.runs else list(known)
    if wrong := (set(names) - set(known)) | (set(args.steps) - set(STEPS)):
        parser.error(f"no such run or step: {', '.join(sorted(wrong))}")
    for step in args.steps or STEPS:
        run_step(step, work, [known[name] for name in names], args.jobs, args.output)


def run_step(step: str, work: Path, runs: list[Run], jobs: int, output: Path | None) -> None:
    if step == "prepare":
        from corpus import prepare

        prepare(work)
    elif step == "train":
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda run: train_once(work, PLAN, run, threads=1), runs))
    elif step == "measure":
        from measure import measure

        measure(work, runs)
    else:
        from package import package

        package(output or work / "adapters", work)


if __name__ == "__main__":
    main()
