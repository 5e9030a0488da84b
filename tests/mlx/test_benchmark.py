"""What is compared is the same model, and what is measured is what was run."""

import json
import time
from pathlib import Path

import parscale_mlx
from parscale_mlx import machine
from parscale_mlx.benchmark.models import compared_models, random_backbone, split
from parscale_mlx.benchmark.timing import Side, measure, mlx_side

import mlx.core as mx
import pytest
from mlx_lm.utils import quantize_model

GOLDEN = Path(__file__).parent.parent / "golden"
IDS = mx.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def load(case):
    return parscale_mlx.load_model(GOLDEN / case, dtype=mx.float32)


@pytest.mark.parametrize("case", ["p1", "p2-tied-sharded", "p4"])
@pytest.mark.parametrize("bits", [None, 4])
def test_all_sides_have_the_same_weights(case, bits):
    model, config = load(case)
    if bits:
        model, config = quantize_model(model, config, 32, bits)
    backbone, adapter = split(model, config)
    own = {adapter.streams: adapter} if adapter else {}
    models = compared_models(backbone, config, [1, 2, 4], own)
    assert list(models) == ["mlx-lm", "P=1", "P=2", "P=4"]
    assert mx.allclose(models["mlx-lm"](IDS), models["P=1"](IDS), atol=1e-5)
    # The streams it came with are used, and others are not the plain model.
    mine = models[f"P={model.args.streams}"](IDS)
    assert mx.allclose(mine, model(IDS), atol=1e-5)
    for p in (2, 4):
        assert models[f"P={p}"].args.streams == p
        assert not mx.allclose(models[f"P={p}"](IDS), models["P=1"](IDS), atol=1e-3)


def test_a_side_generates_what_the_model_does():
    model, _ = load("p4")
    side = mlx_side(model, IDS)
    cache, token = side.prefill()
    ids = IDS
    for _ in range(4):
        ids = mx.concatenate([ids, mx.argmax(model(ids)[:, -1:], axis=-1)], axis=1)
    assert token.tolist() == ids[:, 5:6].tolist()
    side.decode((cache, token), 3)
    assert cache[0].offset == 48 + 5 + 3
    next_token = mx.argmax(model(ids[:, -1:], cache=cache)[:, -1:], axis=-1)
    assert next_token.tolist() == mx.argmax(model(ids)[:, -1:], axis=-1).tolist()


def test_measure_takes_turns_and_medians():
    turns = []

    def side(name, seconds):
        def prefill():
            turns.append(name)
            time.sleep(seconds)
            return name

        def decode(state, tokens):
            assert state == name
            time.sleep(seconds * tokens)

        return Side(prefill, decode, weight_bytes=1000)

    done = []
    sides = {"quick": side("quick", 0.01), "slow": side("slow", 0.05)}
    timings = measure(sides, repeats=3, tokens=2, turn_done=lambda: done.append(1))
    assert turns == ["quick", "slow"] * 4 and len(done) == 8
    # Sleeping takes at least as long as it is told to.
    assert timings["quick"].first_token >= 0.01 and timings["slow"].step >= 0.05
    assert timings["slow"].first_token > timings["quick"].first_token
    assert timings["quick"].peak_memory >= 1000


def test_processor_time_does_not_count_waiting():
    side = Side(lambda: time.sleep(0.05), lambda state, tokens: time.sleep(0.05))
    timing = measure({"idle": side}, repeats=1, tokens=1, clock=time.process_time)["idle"]
    assert timing.first_token < 0.04 and timing.step < 0.04


def test_peak_memory_counts_the_cache():
    model, _ = load("p4")
    prompt = mx.zeros((1, 200), mx.int32)
    sides = {"p4": mlx_side(model, prompt)}
    peak = measure(sides, repeats=1, tokens=2)["p4"].peak_memory
    cache = model.make_cache()
    model(prompt, cache=cache)
    mx.eval([c.state for c in cache])
    assert peak > sides["p4"].weight_bytes + sum(c.keys.nbytes + c.values.nbytes for c in cache) / 2


def test_random_weights_have_the_shape():
    config = json.loads((GOLDEN / "p4" / "config.json").read_text())
    model = random_backbone(config)
    assert model.args.streams == 1
    assert model(IDS).shape == (2, 5, config["vocab_size"])


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.05)
    assert machine.measure_flops(mx.float32) > machine.measure_flops(mx.float16) / 10 > 0
    assert machine.measure_bandwidth() > 1e8
    assert str(mx.default_device()) in machine.device_name()
