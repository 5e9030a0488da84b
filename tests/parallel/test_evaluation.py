"""``parscale perplexity`` and ``parscale evaluate`` with ``--parallel``: one process's figures."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import rank_jobs
from helpers.rank_processes import run_ranks
from parscale_cli.main import cli

PROBLEM = {
    "prompt": "def two():\n",
    "entry_point": "two",
    "test": "def check(candidate):\n    assert candidate() == 2\n",
}


def alone(*arguments) -> dict:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def together(*arguments, mode="streams") -> dict:
    run = [*map(str, arguments), "--parallel", mode]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, [run, run])
    assert (first.exit_code, second.exit_code) == (0, 0), first.err
    assert second.out == second.err == ""
    return json.loads(first.out)


@pytest.fixture
def texts(tmp_path) -> tuple[Path, Path]:
    files = tmp_path / "text.txt", tmp_path / "other.txt"
    for n, file in enumerate(files):
        file.write_text("".join(chr(97 + (7 * i * i + n) % 26) for i in range(90)))
    return files


@pytest.mark.parametrize("mode", ["streams", "tensor"])
def test_perplexity(model, texts, mode):
    run = ("perplexity", texts[0], "--model", model, "--window", 40, "--batch-size", 2, "--json")
    (score,), (expected,) = together(*run, mode=mode)["scores"], alone(*run)["scores"]
    assert score["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


def test_other_text_on_one_rank(model, texts):
    runs = [
        ["perplexity", str(file), "--model", str(model), "--parallel", "streams"] for file in texts
    ]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, runs)
    assert (first.exit_code, second.exit_code) == (1, 1)
    assert "rank 1 differs from rank 0: its text or batch size is" in first.err


def test_completions_of_problems(model, tmp_path):
    problems = [PROBLEM | {"task_id": f"P/{n}", "prompt": f"def f{n}():\n"} for n in range(3)]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    completions = []
    for run in (together, alone):
        output = tmp_path / f"{run.__name__}.json"
        options = ("-n", 8, "--batch-size", 2, "--json", "--output", output)
        run("evaluate", "--model", model, "--code", file, "--run-generated-code", *options)
        completions.append([c["completion"] for c in json.loads(output.read_text())["completions"]])
    assert completions[0] == completions[1]
    assert len(completions[0]) == 3


def test_tasks_are_refused(model):
    run = ["evaluate", "--model", str(model), "--tasks", "x", "--parallel", "streams"]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, [run, run])
    assert (first.exit_code, second.exit_code > 0) == (2, True)
    assert "--tasks cannot go with --parallel" in first.err
