"""parscale scaling-law: against the paper's published fit, and against laws that are known."""

import csv
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.tiny_models import error_line

pytest.importorskip("scipy")
pytest.importorskip("threadpoolctl")

from parscale_core.analysis.fit import bootstrap, fit, r_squared
from parscale_core.analysis.law import PAPER, ScalingLaw
from parscale_core.analysis.loss_table import PAPER_LOSSES, Losses, read_losses

# Published beside figure 2 of the paper.
PUBLISHED_R_SQUARED = {"stack-v2-python": 0.9978, "pile": 0.9987}
PUBLISHED_K = {"stack-v2-python": 0.39, "pile": 0.33}


@pytest.fixture(scope="module")
def fits():
    return {losses.dataset: (losses, fit(losses)) for losses in read_losses(PAPER_LOSSES)}


def test_the_papers_losses(fits):
    assert {name: len(losses.loss) for name, (losses, _) in fits.items()} == {
        "stack-v2-python": 24,
        "pile": 24,
    }
    for losses, _ in fits.values():
        assert set(losses.streams) == {1, 2, 4, 8}
        # More streams and more parameters both help, everywhere in the tables.
        table = losses.loss.reshape(4, 6)
        assert (np.diff(table, axis=0) < 0).all() and (np.diff(table, axis=1) < 0).all()


@pytest.mark.parametrize("dataset", PAPER)
def test_the_fit_is_the_papers(fits, dataset):
    losses, law = fits[dataset]
    paper = PAPER[dataset]
    # Their optimiser stops a little before the optimum: 0.1 % of each number is the tolerance.
    for name in ("E", "A", "alpha", "k"):
        assert getattr(law, name) == pytest.approx(getattr(paper, name), rel=1e-3), name
    assert round(r_squared(losses, law), 4) == PUBLISHED_R_SQUARED[dataset]
    assert round(law.k, 2) == PUBLISHED_K[dataset]


def test_the_papers_demonstration_page(fits):
    """It says: 2.8B with P=4 has loss 1.01548, as 4.33B, 3.4B with P=2, and 2.38B with P=8."""
    law = fits["stack-v2-python"][1]
    assert law.loss(2.8e9, 4) == pytest.approx(1.01548, abs=2e-5)
    assert law.equivalent_parameters(2.8e9, 4) == pytest.approx(4.33e9, abs=0.005e9)
    for parameters, streams in ((3.4e9, 2), (2.38e9, 8)):
        assert law.loss(parameters, streams) == pytest.approx(1.01548, abs=2e-4)


@pytest.mark.parametrize(
    "law",
    [
        ScalingLaw(E=1.2, A=5e7, alpha=0.25, k=0.5),
        ScalingLaw(E=0.4, A=2e4, alpha=0.6, k=0.05),
        ScalingLaw(E=3.0, A=1e10, alpha=0.1, k=1.5),
    ],
)
def test_a_known_law_is_found_again(law):
    parameters, streams = (a.ravel() for a in np.meshgrid([1e7, 1e8, 3e8, 1e9, 1e10], [1, 2, 4, 8]))
    found = fit(Losses("made up", parameters, streams, law.loss(parameters, streams)))
    for name in ("E", "A", "alpha", "k"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.02), name


def test_an_outlier_hardly_moves_the_fit(fits):
    losses, law = fits["pile"]
    loss = losses.loss.copy()
    loss[7] *= 1.05
    spoilt = fit(Losses("spoilt", losses.parameters, losses.streams, loss))
    assert spoilt.k == pytest.approx(law.k, rel=0.1)


def test_bootstrap_intervals_cover_what_is_known():
    law = ScalingLaw(E=1.2, A=5e7, alpha=0.25, k=0.5)
    parameters, streams = (a.ravel() for a in np.meshgrid([1e8, 3e8, 1e9, 3e9], [1, 2, 4, 8]))
    noise = np.random.default_rng(1).normal(1, 1e-3, len(parameters))
    losses = Losses("noisy", parameters, streams, law.loss(parameters, streams) * noise)
    laws = bootstrap(losses, fit(losses), resamples=60, seed=0)
    low, high = np.percentile([x.k for x in laws], [1, 99])
    assert low < law.k < high and high - low < 0.2
    again = bootstrap(losses, fit(losses), resamples=5, seed=0)
    assert again == laws[:5]


def test_the_command(parscale, tmp_path):
    plot = tmp_path / "law.svg"
    result = parscale("scaling-law", "--parameters", "1.6B", "--streams", "8,1", "--bootstrap", 10,
                      "--json", "--plot", plot)  # fmt: skip
    assert result.exit_code == 0, result.output
    stack, pile = json.loads(result.stdout)["fits"]
    assert (stack["dataset"], pile["dataset"]) == ("stack-v2-python", "pile")
    plain, streams = stack["predictions"]
    assert (plain["streams"], streams["streams"]) == (1, 8)
    assert plain["equivalent_parameters"]["value"] == 1.6e9
    law = PAPER["stack-v2-python"]
    assert streams["loss"]["value"] == pytest.approx(law.loss(1.6e9, 8), abs=1e-4)
    for estimate in (stack["parameters"]["k"], streams["loss"], streams["equivalent_parameters"]):
        assert estimate["low"] < estimate["value"] < estimate["high"]
    assert plot.read_text().startswith("<?xml") and list(tmp_path.iterdir()) == [plot]


def test_a_table_of_ones_own(parscale, tmp_path):
    law = ScalingLaw(E=1.5, A=3e7, alpha=0.3, k=0.4)
    file = tmp_path / "mine.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["loss", "note", "parameters", "streams"])
        for n in (1e8, 2e8, 4e8):
            for p in (1, 2, 4):
                writer.writerow([law.loss(n, p), "a, b\nc", n, p])
    result = parscale("scaling-law", file, "--bootstrap", 10, "--parameters", "135M")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("all: 9 losses, R² 1.0000")
    lines = result.stdout.splitlines()
    assert lines[-2].startswith("  135M with P=4: loss") and "beyond" not in lines[-2]
    assert lines[-1].startswith("  135M with P=8: loss") and "beyond the table" in lines[-1]


HEAD = "parameters,streams,loss\n"
GOOD = "1e8,1,3.0\n2e8,1,2.9\n1e8,2,2.9\n2e8,2,2.8\n4e8,2,2.7\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("# nothing but this\n", "empty"),
        (HEAD, "no data"),
        ("parameters,loss\n1e8,3\n", "line 1: no column streams"),
        ("# comment\n\n" + HEAD + "1e8,1,3.0\n1e8,2,-3\n", "line 5: loss is -3"),
        (HEAD + "1e8,1,3.0\n1e8,x,3\n", "line 3: streams is x"),
        (HEAD + "1e8,0.5,3.0\n", "line 2: streams is 0.5, where at least 1"),
        (HEAD + "1e8,1\n", "line 2: loss is missing"),
        (HEAD + "1e8,1,nan\n", "line 2: loss is nan"),
        (HEAD + '1e8,1,"3.0\n', "line 2: not CSV"),
        (HEAD + "1e8,1,3\n1e8,2,2.9\n", "2 losses; at least 5"),
        (HEAD + GOOD.replace(",2,", ",1,"), "all streams are the same"),
        (HEAD + GOOD.replace("2e8", "1e8").replace("4e8", "1e8"), "all parameters are the same"),
        (HEAD + "1e8,1,3\n2e8,1,3\n1e8,2,3\n2e8,2,3\n4e8,2,3\n", "all losses are the same"),
    ],
)
def test_bad_tables(parscale, tmp_path, text, message):
    file = tmp_path / "bad.csv"
    file.write_text(text)
    line = error_line(parscale("scaling-law", file))
    assert message in line
    if "same" not in message and "losses;" not in message:
        assert line.startswith(f"Error: {file}")


def test_bad_options(parscale, tmp_path):
    binary = tmp_path / "x.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in error_line(parscale("scaling-law", binary))
    for options, code, message in (
        (("--parameters", "many"), 2, "'many' is not a number of parameters"),
        (("--streams", "1,x"), 2, "is not a list of whole numbers"),
        (("--streams", "0"), 2, "each at least 1"),
        (("--plot", tmp_path / "law.gif"), 2, ".png, .svg, .pdf"),
        (("--plot", tmp_path / "no" / "law.png"), 1, "no folder"),
        (("/nowhere.csv",), 2, "does not exist"),
    ):
        result = parscale("scaling-law", *options)
        assert (result.exit_code, message in error_line(result)) == (code, True), result.output
    there = tmp_path / "there.png"
    there.write_text("mine")
    assert "exists already" in error_line(parscale("scaling-law", "--plot", there))
    assert there.read_text() == "mine"


def test_missing_packages_are_one_line(parscale, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scipy" else find_spec(name)
    )
    assert error_line(parscale("scaling-law")) == (
        "Error: scaling-law needs scipy: pip install 'parscale[analysis]'"
    )


def test_the_analysis_imports_no_engine():
    code = (
        "import sys, pkgutil, importlib, parscale_core.analysis as a\n"
        "for m in pkgutil.walk_packages(a.__path__, a.__name__ + '.'):\n"
        "    importlib.import_module(m.name)\n"
        "assert not {'mlx', 'onnx', 'onnxruntime', 'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
