"""The recipe from end to end, on a model and a corpus so small that they learn next to nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "python-small" / "recipe.py"


@pytest.mark.slow
def test_from_nothing_to_a_package(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = ["--pretrain-tokens", "3000", "--stream-tokens", "1500", "--corpus-bytes", "300000"]
    command = [sys.executable, RECIPE, "--work", tmp_path, "--quick", *sizes]
    options = ["--streams", "2", "--seeds", "0", "--jobs", "1", "--eval-tokens", "500"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):  # the second time there is nothing left to train
        run = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert "begin" not in run.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    trained = {"streams only, P=2", "whole model, P=1", "whole model, P=2"}
    controls = {"one stream, prefix of 8", "one stream, prefix of 16"}
    assert {"backbone", *trained, *controls} == set(results)
    for name, result in results.items():
        low, high = result["loss_interval"]
        assert low < result["loss"] < high, name
    for kind in ("png", "svg", "md"):
        assert (tmp_path / f"results.{kind}").stat().st_size > 100
    trained, held_out = (
        {path.relative_to(part) for path in part.rglob("*.py")}
        for part in (tmp_path / "corpus" / "train", tmp_path / "corpus" / "held-out")
    )
    assert trained and held_out and not trained & held_out

    import parscale_mlx

    packaged = tmp_path / "packaged"
    model, tokenizer = parscale_mlx.load(packaged, adapter_path=packaged / "adapters" / "p2")
    text = "def f(x):\n        return x + 1  # é\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert model.args.streams == 2
    assert parscale_mlx.generate(model, tokenizer, text, max_tokens=3)
