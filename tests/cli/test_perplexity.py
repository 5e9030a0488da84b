"""``parscale perplexity``: against the losses of whole texts, with both runtimes, and refusals."""

import json
import math

from parscale_mlx import load_adapter, load_model, with_streams

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny_models import error_line
from parscale_core.analysis.intervals import bootstrap_means, percentiles
from parscale_core.evaluation.text import windows
from parscale_export import export_onnx


@pytest.fixture(scope="module")
def texts() -> list[str]:
    random = np.random.default_rng(1)
    return ["".join(map(chr, random.integers(97, 123, 60 + n))) for n in range(30)]


@pytest.fixture(scope="module")
def file(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "held-out.jsonl"
    lines = [json.dumps(t if n % 2 else {"text": t}) for n, t in enumerate(texts)]
    file.write_text("\n".join([*lines[:5], "", *lines[5:]]))
    return file


def losses(model, tokenizer, text: str) -> list[float]:
    """Of every token but the first, in one forward pass without a cache."""
    ids = mx.array(tokenizer.encode(text))
    return nn.losses.cross_entropy(model(ids[None, :-1])[0], ids[1:]).tolist()


def run(parscale, *arguments) -> dict:
    result = parscale("perplexity", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_perplexities_are_those_of_whole_texts(parscale, backbone, adapter, file, texts):
    model, _ = load_model(backbone)
    from parscale_mlx.tokenizer import load_tokenizer

    from parscale_core.checkpoint.config import read_config

    tokenizer = load_tokenizer(backbone, read_config(backbone).raw)
    models = {1: model, 4: with_streams(model, load_adapter(adapter))}
    report = run(parscale, file, "--model", backbone, "--adapter", adapter, "--batch-size", 4)
    assert (report["documents"], report["windows"]) == (30, 30)
    assert report["resampled"] == "documents"
    for streams, score in zip((1, 4), report["scores"], strict=True):
        own = [losses(models[streams], tokenizer, text) for text in texts]
        mean = sum(map(sum, own)) / sum(map(len, own))
        assert score["streams"] == streams
        assert score["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert score["interval"]["low"] < score["perplexity"] < score["interval"]["high"]
        # One byte a token here, and no first token is scored.
        assert score["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-4)
    one, four = report["scores"]
    assert four["times"] == pytest.approx(four["perplexity"] / one["perplexity"])
    assert four["times_interval"]["low"] < four["times"] < four["times_interval"]["high"]
    # The same text twice over tells more of the difference than of either one.
    width = four["times_interval"]["high"] - four["times_interval"]["low"]
    apart = (four["interval"]["high"] - four["interval"]["low"]) / one["perplexity"]
    assert width < 2 * apart


def test_windows_with_a_stride_see_what_came_before(parscale, model, tmp_path):
    from parscale_mlx import load

    loaded, tokenizer = load(model)
    text = "the quick brown fox jumps over the lazy dog " * 4
    file = tmp_path / "long.txt"
    file.write_text(text)
    report = run(parscale, file, "--model", model, "--window", 40, "--stride", 10)
    total, count, done = 0.0, 0, 1
    ids = tokenizer.encode(text)
    for begin in range(0, len(ids), 10):
        end = min(begin + 40, len(ids))
        part = mx.array([ids[begin:end]])
        all_losses = nn.losses.cross_entropy(loaded(part[:, :-1])[0], part[0, 1:]).tolist()
        total += sum(all_losses[-(end - done) :])
        count, done = count + end - done, end
        if end == len(ids):
            break
    assert report["tokens"] == count == len(ids) - 1
    assert report["resampled"] == "windows"
    assert report["scores"][0]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(("length", "size", "stride"), [(100, 10, 5), (7, 10, 5), (21, 10, 9)])
def test_every_token_is_scored_once(length, size, stride):
    tokens = list(range(length))
    parts = list(windows(["x"], lambda _: tokens, size, stride))
    assert [t for part in parts for t in part.tokens[-part.scored :]] == tokens[1:]
    assert all(part.scored <= len(part.tokens) - (size - stride) for part in parts[1:])


@pytest.mark.parametrize("ops", ["fused", "standard"])
def test_onnxruntime_says_the_same(parscale, model, file, tmp_path, ops):
    export = export_onnx(model, tmp_path / "onnx", all_logits=True, ops=ops)
    arguments = ("--window", 30, "--limit", 10)
    in_mlx = run(parscale, file, "--model", model, *arguments)
    on_onnx = run(parscale, file, "--model", export, *arguments)
    assert on_onnx["scores"][0]["perplexity"] == pytest.approx(
        in_mlx["scores"][0]["perplexity"], rel=1e-3
    )
    assert on_onnx["tokens"] == in_mlx["tokens"] and on_onnx["windows"] == 10
    whole = run(parscale, file, "--model", export)
    assert whole["windows"] == run(parscale, file, "--model", model)["windows"] == 30
    last_only = export_onnx(model, tmp_path / "last")
    assert "all_logits" in error_line(parscale("perplexity", file, "--model", last_only))


def test_bootstrap_intervals_hold_what_they_say():
    """Over many samples of a known mean, 90 % intervals hold it about 90 % of the time."""
    random, held = np.random.default_rng(2), 0
    for n in range(100):
        counts = random.integers(20, 200, 60)
        means = random.normal(3.0, 0.5, 60)
        interval = percentiles(bootstrap_means((means * counts)[None], counts, seed=n)[0], 0.9)
        held += interval.low < 3.0 < interval.high
    assert 0.8 < held / 100 < 0.97


def test_the_table(parscale, backbone, adapter, adapter2, file):
    run = ("perplexity", file, "--model", backbone, "--adapter", adapter, "--adapter", adapter2)
    result = parscale(*run, "--streams", "2,4")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("30 documents, 30 windows") and "times that of P=2" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["2", "4"]


def test_a_text_of_one_window_has_no_interval(parscale, model, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("short")
    report = run(parscale, file, "--model", model)
    assert report["scores"][0]["interval"] is None and report["tokens"] == 4


@pytest.mark.parametrize(
    ("content", "arguments", "code", "word"),
    [
        (b"", [], 1, "no text"),
        (b"x", [], 1, "no text of two tokens"),
        (b"\xff\xfe\xff", [], 1, "UTF-8"),
        (b"some text", ["--streams", "2"], 1, "2 streams"),
        (b"some text", ["--window", "4", "--stride", "4"], 2, "--stride"),
        (b"some text", ["--window", "1000"], 2, "512"),
        (b"some text", ["--level", "1"], 2, "--level"),
        (b"some text", ["--model", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_what_is_refused(parscale, model, tmp_path, content, arguments, code, word):
    file = tmp_path / "held-out.txt"
    file.write_bytes(content)
    result = parscale("perplexity", file, "--model", model, *arguments)
    assert result.exit_code == code and word in error_line(result)


def test_lines_that_are_no_text(parscale, model, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('"fine"\n{"no": 1}\n')
    line = error_line(parscale("perplexity", file, "--model", model))
    assert str(file) in line and "line 2" in line
