"""``parscale bench --parallel``: the sides, what they send, and what is refused."""

import json
import sys

import pytest
from click.testing import CliRunner
from helpers import rank_jobs
from helpers.rank_processes import run_ranks
from parscale_cli.main import cli

RUN = ("bench", "--tokens", "3", "--repeats", "1", "--prompt", "5")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells bytes sent")


def bench(*options, count=2):
    run = [*RUN, *map(str, options)]
    return run_ranks(count, rank_jobs.run_command_of_rank, [run] * count)


@pytest.fixture(scope="module")
def rows(model) -> list[dict]:
    options = ("--model", model, "--streams", "1,2,4", "--json")
    first, second = bench(*options, "--parallel", "streams,tensor")
    assert (first.exit_code, second.exit_code) == (0, 0), first.err
    assert first.err == second.out == second.err == ""
    report = json.loads(first.out)
    assert (report["ranks"], report["tokens"], report["repeats"]) == (2, 3, 1)
    return report["rows"]


def test_every_side_takes_its_time(rows):
    assert [(row["streams"], row["prompt"], row["side"]) for row in rows] == [
        (P, 5, side) for P in (1, 2, 4) for side in ("one process", "streams", "tensor")
    ]
    for n, row in enumerate(rows):
        alone = rows[n - n % 3]
        assert row["first_token"] > 0 and row["step"] > 0
        assert row["step_speed_up"] == pytest.approx(alone["step"] / row["step"])
        assert (row["peak_memory"] < alone["peak_memory"]) == (row is not alone)


@needs_linux
def test_bytes_on_the_wire_are_those_of_the_formula(rows):
    hidden, layers = 64 * 4, 3
    for row in rows:
        P = row["streams"]
        # Two ranks cannot share the streams of P=1: they share its layers.
        whole = {"one process": 0, "streams": P // 2 * hidden, "tensor": 0}[row["side"]]
        if row["side"] == "tensor" or (row["side"], P) == ("streams", 1):
            whole = layers * 2 * P * hidden + 4  # two sums a layer, and rank 0's token
        assert row["sent_bytes"] == row["formula_bytes"] == whole


def test_a_table_of_a_shape(model):
    shape = model / "config.json"
    first, second = bench("--shape", shape, "--parallel", "2x1")
    assert first.exit_code == 0, first.err
    lines = first.out.splitlines()
    assert lines[0].startswith(f"{shape} on 2 x Device(")
    alone, shared = (line.split() for line in lines[4:])
    assert alone[:4] == ["8", "5", "one", "process"]
    assert shared[:3] == ["8", "5", "2x1"]
    assert shared[-4:-1] == ["1,024", "1,024", "1"] or sys.platform != "linux"
    assert second.out == ""


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--batch", 2), 2, "--batch cannot go with --parallel"),
    (("--quantize", 4), 2, "--quantize cannot go with --parallel"),
    (("--cpu-time",), 2, "--cpu-time cannot go with --parallel"),
    (("--plot", "a.svg"), 2, "--plot cannot go with --parallel"),
    (("--adapter", "."), 2, "--adapter needs --model"),
    (("--parallel", "4x2"), 1, "4x2 takes 8 ranks, but there are 2"),
    (("--model", "no-such-folder/model/here"), 1, "neither a folder here nor a model on the hub"),
])  # fmt: skip
def test_what_is_refused(options, code, message):
    first, second = bench("--parallel", "streams", *options)
    assert (first.exit_code, second.exit_code) == (code, 1)
    errors = [line for line in first.err.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in first.err
    assert second.out == second.err == ""


@pytest.mark.parametrize(("modes", "message"), [
    ("streams", "this is the only process"),
    ("streams,", "streams, tensor or SxT"),
    ("streams,4by2", "streams, tensor or SxT"),
])  # fmt: skip
def test_wrong_usage_of_one_process(modes, message):
    result = CliRunner().invoke(cli, [*RUN, "--parallel", modes])
    assert result.exit_code == 2
    assert message in result.stderr


def test_ranks_that_are_asked_different_things(model):
    runs = [[*RUN, "--model", str(model), "--streams", P, "--parallel", "streams"] for P in "24"]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, runs)
    assert (first.exit_code, second.exit_code) == (1, 1)
    assert "rank 1 differs from rank 0: its shape or option is" in first.err
