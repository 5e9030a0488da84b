"""Ranks that die, fail or differ: one clear error on rank 0, and nobody left waiting."""

import os
import re
import shutil
import signal
import time

import pytest
from helpers import rank_jobs
from helpers.golden_cases import GOLDEN
from helpers.rank_processes import Ranks, run_ranks
from helpers.tiny_models import write_tokenizer
from safetensors.numpy import load_file, save_file

PATIENCE = 15.0  # seconds; it takes two or three, but tests share the machine


@pytest.mark.parametrize(("count", "rank"), [(2, 1), (4, 2)])
def test_a_killed_rank_ends_all(count, rank):
    outcomes = run_ranks(count, rank_jobs.end_one, rank, "killed")
    assert [outcome.exit_code for outcome in outcomes].count(1) == count - 1
    assert f"Error: rank {rank} has died\n" in outcomes[0].err
    for other in outcomes[1:]:
        assert "Error" not in other.err


def test_rank_0_tells_why_another_failed():
    first, second = run_ranks(2, rank_jobs.end_one, 1, "failed")
    assert (first.exit_code, second.exit_code) == (1, 1)
    assert errors(first) == ["Error: rank 1: no memory for this"]
    assert errors(second) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Golden case p4 with a tokenizer, and the same but for one weight of one prefix."""
    root = tmp_path_factory.mktemp("models")
    for name in ("model", "other"):
        write_tokenizer(shutil.copytree(GOLDEN / "p4", root / name))
    file = root / "other" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.prefix_k"][3, 0, 47, 15] += 1
    save_file(weights, file)
    return root / "model", root / "other"


def test_other_weights_on_one_rank(folders):
    arguments = [generate(folder, "-n", 3) for folder in folders]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, arguments)
    assert (first.exit_code, second.exit_code) == (1, 1)
    (error,) = errors(first)
    assert re.search("rank 1 differs from rank 0: its checkpoint is [0-9a-f]{64}, not", error)
    assert errors(second) == []


def test_another_prompt_on_one_rank(folders):
    arguments = [generate(folders[0], "-n", n) for n in (3, 4)]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, arguments)
    assert "its prompt or sampling is" in errors(first)[0]
    assert (first.exit_code, second.exit_code) == (1, 1)


def test_a_model_that_only_one_rank_lacks(folders, tmp_path):
    arguments = [generate(folder, "-n", 3) for folder in (folders[0], tmp_path)]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, arguments)
    assert (first.exit_code, second.exit_code) == (1, 1)
    assert errors(first) == [f"Error: rank 1: {tmp_path}: no config.json in this folder"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_amid_an_answer(folders, rank):
    arguments = generate(folders[0], "-n", 100_000)
    ranks = Ranks(2, rank_jobs.run_command_of_rank, [arguments, arguments])
    while not ranks.output(0):
        time.sleep(0.05)
    killed = time.monotonic()
    ranks.processes[rank].kill()
    other = ranks.wait()[1 - rank]
    assert time.monotonic() - killed < PATIENCE
    assert other.exit_code == 1
    assert errors(other) == [f"Error: rank {rank} has died"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_frozen_amid_an_answer(folders, rank):
    arguments = generate(folders[0], "-n", 100_000, "--watch-timeout", 3)
    ranks = Ranks(2, rank_jobs.run_command_of_rank, [arguments, arguments])
    while not ranks.output(0):
        time.sleep(0.05)
    frozen = time.monotonic()
    os.kill(ranks.processes[rank].pid, signal.SIGSTOP)
    other = ranks.processes[1 - rank]
    other.join(PATIENCE)
    assert other.exitcode == 1 and time.monotonic() - frozen < PATIENCE
    ranks.processes[rank].kill()
    message = f"Error: rank {rank} has given no sign of life for 3 seconds"
    assert errors(ranks.wait()[1 - rank]) == [message]


def generate(folder, *options) -> list[str]:
    run = ["generate", "--model", folder, "-p", "Hello", "--parallel", "streams", *options]
    return [str(argument) for argument in run]


def errors(outcome) -> list[str]:
    # MLX's ring may have begun a line of its own when a rank dies.
    return re.findall("Error: .*", outcome.err)
