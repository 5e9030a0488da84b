"""``parscale chat --parallel``: rank 0's conversation, with the answers of one process."""

import subprocess

import pytest
from click.testing import CliRunner
from helpers import rank_jobs
from helpers.rank_processes import LAUNCH, launched, run_ranks
from parscale_cli.main import cli

LINES = "Hello\nAnd then?\n/nonsense\n/reset\nHello\n/quit\nnever read\n"


def alone(*run) -> tuple[str, str]:
    result = CliRunner().invoke(cli, [*run], input=LINES)
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


@pytest.mark.parametrize("mode", ["streams", "tensor"])
def test_a_conversation(model, mode):
    run = ("chat", "--model", str(model), "--max-tokens", "8")
    shared = [*run, "--parallel", mode]
    first, second = run_ranks(2, rank_jobs.run_command_with_input, LINES, [shared, shared])
    assert (first.exit_code, second.exit_code) == (0, 0), first.err
    assert (first.out, first.err) == alone(*run)
    assert first.out.count("\n") == 3
    assert second.out == second.err == ""


def test_the_end_of_the_input_ends_it(model):
    run = ["chat", "--model", str(model), "--parallel", "streams"]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, [run, run])
    assert (first.exit_code, second.exit_code) == (0, 0), first.err
    assert first.out == second.out == ""


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not beside this Python")
def test_under_mlx_launch(model):
    run = ("chat", "--model", str(model), "--max-tokens", "8")
    with subprocess.Popen(
        [*launched(2), *run, "--parallel", "streams"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdin.write(LINES)
        process.stdin.flush()  # and never closed
        assert process.stdout.read() == alone(*run)[0]
        assert process.wait(60) == 0
