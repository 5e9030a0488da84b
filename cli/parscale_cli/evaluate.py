"""``parscale evaluate``: tasks of lm-evaluation-harness, and programming problems."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from parscale_core.checkpoint.output import check_file, working_file

from parscale_cli.engines import follows, open_all
from parscale_cli.options.command import command, heading, option, refuse
from parscale_cli.options.common import (
    FOLDER,
    force_option,
    json_option,
    many_streams_options,
    model_option,
    output_option,
    runtime_options,
)
from parscale_cli.options.parallel import parallel_option
from parscale_cli.options.types import Real, Whole, WholeNumbers

if TYPE_CHECKING:
    from parscale_core.evaluation.problems import Problem
    from parscale_core.evaluation.samples import Sample

CODE_TOKENS = 512


class ProblemsFile(click.Path):
    """A file of problems; ``humaneval`` is that of an installed package."""

    def convert(self, value, param, ctx):
        if value == "humaneval":
            from parscale_core.evaluation.problems import humaneval_file

            return humaneval_file()
        return super().convert(value, param, ctx)


@dataclass
class Figure:
    """One number in the table: a task's metric for one number of streams."""

    task: str
    metric: str
    streams: int
    value: float
    error: float | None


@command()
@model_option()
@many_streams_options
@heading("Tasks")
@option(
    "--tasks",
    metavar="NAME,NAME",
    help="Tasks of lm-evaluation-harness, as gsm8k,arc_easy; patterns are allowed.",
)
@option(
    "--include-path",
    "folders",
    multiple=True,
    type=FOLDER,
    metavar="DIR",
    help="A folder of more tasks, as YAML files, which may name local data.",
)
@option("--num-fewshot", type=Whole(0), help="Examples in a task's prompts.")
@option(
    "--chat-template/--no-chat-template",
    "use_template",
    default=None,
    help="Put tasks' prompts into the model's chat template.  [default: if it has one]",
)
@heading("Programming problems")
@option(
    "--code",
    "files",
    multiple=True,
    type=ProblemsFile(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE|humaneval",
    help="Programming problems in HumanEval's or MBPP's format (JSON, may be .gz), or HumanEval "
    "itself.",
)
@option(
    "--run-generated-code",
    is_flag=True,
    help="Run what the model writes, as --code demands. Its process has limits, which keep "
    "accidents small but not a program that means harm.",
)
@option("--samples", type=Whole(1), default=1, help="Completions of each problem.")
@option("--k", "ks", type=WholeNumbers("K,K"), default="1", help="Report pass@k for each of these.")
@option(
    "--temp",
    type=Real(0),
    help="Sampling temperature of completions.  [default: 0 for a single one, else 0.8]",
)
@option("--top-p", type=Real(0, 1, min_open=True), default=0.95, help="Nucleus of that sampling.")
@option(
    "--code-timeout",
    type=Real(0, min_open=True),
    default=5.0,
    metavar="SECONDS",
    help="Time for one program.",
)
@option(
    "--code-memory", type=Whole(64), default=1024, metavar="MIB", help="Memory for one program."
)
@heading("Both")
@option("--limit", type=Whole(1), metavar="N", help="Of each task the first N only.")
@option(
    "-n",
    "--max-tokens",
    type=Whole(1),
    help=f"Tokens in an answer at most.  [default: what a task says; {CODE_TOKENS} for code]",
)
@option("--batch-size", type=Whole(1), default=8, help="Sequences to compute at a time.")
@option("--seed", type=Whole(0), default=0, help="Seed of random numbers.")
@output_option("Write the figures, and every completion, to this JSON file.", folder=False)
@force_option("Replace the output.")
@json_option
@runtime_options
@parallel_option
@click.pass_context
def evaluate(ctx, model, runtime, output, force, as_json, **options):
    """Evaluate models on tasks and programming problems; one table, task by number of streams."""
    tasks = [name.strip() for name in (options.pop("tasks") or "").split(",") if name.strip()]
    files, folders = options.pop("files"), options.pop("folders")
    if tasks and options["parallel"] is not None:
        raise click.UsageError(
            "--tasks cannot go with --parallel: the harness's model would give each process "
            "questions of its own; --code can"
        )
    _check(ctx, tasks, files, output, force, options)
    problems = _read_all(files, options["limit"])
    harness = manager = None
    if tasks:
        harness = _import_harness()
        manager, tasks = harness.open_tasks(tasks, folders)
    figures: list[Figure] = []
    completions: list[dict] = []
    size = options["batch_size"]
    with open_all(ctx, model, runtime, options, size=size, all_logits=bool(tasks)) as engine:
        asked = [asdict(problem) for own in problems.values() for problem in own]
        if follows(engine, "problems or options", [asked, str(options)]):
            return
        for count in options["streams"] or sorted(engine.streams):
            if harness:
                figures += _run_tasks(harness, manager, tasks, count, engine, options)
            for file, own in problems.items():
                samples = list(_run_code(own, count, engine, options))
                figures += _pass_figures(file, count, samples, options["ks"])
                completions += [_as_dict(file, count, sample) for sample in samples]
    report = {"figures": [vars(figure) for figure in figures]}
    if output is not None:
        whole = report | {"completions": completions}
        with working_file(output) as new:
            new.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print(figures)


def _check(
    ctx: click.Context,
    tasks: list[str],
    files: tuple[Path, ...],
    output,
    force: bool,
    options: dict,
) -> None:
    if not tasks and not files:
        raise click.UsageError("give --tasks NAMES, --code FILE, or both")
    if files and not options["run_generated_code"]:
        raise click.UsageError(
            "--code runs programs that the model writes on this machine; "
            "say --run-generated-code if you want that"
        )
    if not files:
        refuse(ctx, "needs --code", "samples", "ks", "temp", "top_p", "code_timeout", "code_memory")
    if not tasks:
        refuse(ctx, "needs --tasks", "folders", "num_fewshot", "use_template")
    if max(options["ks"]) > options["samples"]:
        raise click.UsageError(
            f"pass@{max(options['ks'])} needs --samples of at least {max(options['ks'])}"
        )
    if options["temp"] is None:
        options["temp"] = 0.0 if options["samples"] == 1 else 0.8
    if options["samples"] > 1 and options["temp"] == 0:
        raise click.UsageError("--samples at --temp 0 would all be the same")
    if options["temp"] == 0:
        refuse(ctx, "needs --temp above 0", "top_p")
    if output is None:
        refuse(ctx, "needs --output", "force")
    else:
        check_file(output, force=force)


def _read_all(files: tuple[Path, ...], limit: int | None) -> dict[str, list["Problem"]]:
    from parscale_core.evaluation.problems import read_problems

    return {file.name: read_problems(file)[:limit] for file in files}


def _import_harness() -> Any:
    # The harness takes seconds to import, and what it imports looks at these then.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from parscale_core.evaluation import harness
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0].startswith("parscale"):
            raise
        raise ImportError(
            f"--tasks needs lm-evaluation-harness (no module {error.name}): "
            "pip install 'parscale[evaluate]'"
        ) from error
    return harness


def _run_tasks(
    harness, manager, tasks: list[str], count: int, engine: Any, options: dict
) -> Iterator[Figure]:
    use_template = options["use_template"]
    if use_template is None:
        use_template = bool(engine.tokenizer.chat_template)
    if options["run_generated_code"]:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    results = harness.evaluate(
        harness.ModelInHarness(
            engine,
            count,
            max_tokens=options["max_tokens"],
            use_chat_template=use_template,
            seed=options["seed"],
        ),
        manager,
        tasks,
        num_fewshot=options["num_fewshot"],
        limit=options["limit"],
        seed=options["seed"],
        run_unsafe_code=options["run_generated_code"],
    )
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            yield Figure(task, name, count, value, error if isinstance(error, float) else None)


def _run_code(
    problems: list["Problem"], count: int, engine: Any, options: dict
) -> Iterator["Sample"]:
    from parscale_core.engine import Request, Sampling
    from parscale_core.evaluation.prompt_tokens import cut_prompt
    from parscale_core.evaluation.samples import run_samples
    from parscale_core.evaluation.sandbox import Limits
    from parscale_core.progress import hidden
    from tqdm import tqdm

    asked = [problem for problem in problems for _ in range(options["samples"])]
    cuts = [cut_prompt(engine.tokenizer, problem.prompt, problem.likely) for problem in asked]
    answers = []
    for number, ((ids, _), problem) in enumerate(zip(cuts, asked, strict=True)):
        sampling = Sampling(
            options["max_tokens"] or CODE_TOKENS,
            options["temp"],
            options["top_p"],
            seed=options["seed"] + number,
        )
        request = Request(ids, streams=count, sampling=sampling, stop=problem.stops)
        answers.append(engine.submit(request))
    bar = tqdm(answers, desc=f"P={count}", unit=" answers", disable=hidden(), leave=False)
    texts = ["".join(piece.text for piece in answer) for answer in bar]
    completions = [
        (problem, problem.completion(cut + text))
        for (_, cut), problem, text in zip(cuts, asked, texts, strict=True)
    ]
    limits = Limits(options["code_timeout"], options["code_memory"] << 20)
    yield from run_samples(completions, limits, os.cpu_count() or 1)


def _pass_figures(
    file: str, count: int, samples: list["Sample"], ks: tuple[int, ...]
) -> Iterator[Figure]:
    from parscale_core.analysis.pass_at_k import estimate

    for k in ks:
        value, error = estimate(samples, k)
        yield Figure(file, f"pass@{k}", count, value, error)


def _as_dict(file: str, count: int, sample: "Sample") -> dict:
    return {
        "file": file,
        "streams": count,
        "task_id": sample.problem.name,
        "completion": sample.completion,
        "passed": sample.outcome.passed,
        "result": sample.outcome.reason,
    }


def _print(figures: list[Figure]) -> None:
    columns = sorted({figure.streams for figure in figures})
    rows: dict[tuple[str, str], dict[int, Figure]] = {}
    for figure in figures:
        rows.setdefault((figure.task, figure.metric), {})[figure.streams] = figure
    widths = [max(6, *(len(row[n]) for row in rows)) + 2 for n in (0, 1)]
    head = f"{'task':{widths[0]}}{'metric':{widths[1]}}"
    click.echo(head + "".join(f"{f'P={n}':>17}" for n in columns))
    for (task, metric), row in rows.items():
        cells = [_cell(row[n]) if n in row else "" for n in columns]
        click.echo(f"{task:{widths[0]}}{metric:{widths[1]}}" + "".join(f"{c:>17}" for c in cells))
    if any(figure.error is not None for figure in figures):
        click.echo("±: standard error", file=sys.stderr)


def _cell(figure: Figure) -> str:
    error = "" if figure.error is None else f" ±{figure.error:.4f}"
    return f"{figure.value:.4f}{error}"
