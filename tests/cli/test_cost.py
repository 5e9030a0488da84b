"""parscale cost: counts against real tensors and caches, and the paper's headline."""

import json
from dataclasses import replace

import parscale_mlx

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_models import GOLDEN, error_line
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model
from parscale_cli.cost import SIZES
from parscale_core.analysis import headline
from parscale_core.analysis.devices import DEVICES
from parscale_core.analysis.law import PAPER
from parscale_core.analysis.loss_table import PAPER_LOSSES, read_losses
from parscale_core.analysis.roofline import Machine, cost, step
from parscale_core.analysis.shape import PAPER_SHAPES, Precision, read_shape
from safetensors import safe_open

CASES = ("p1", "p2-tied-sharded", "p4", "p4-bf16", "p8-short-prefix")
A100 = Machine(DEVICES["a100"])


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_files(case):
    tensors = {}
    for file in (GOLDEN / case).glob("model*.safetensors"):
        with safe_open(file, "np") as opened:
            tensors |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    shape, _ = read_shape(GOLDEN / case)
    assert shape.parameters() == sum(int(np.prod(s)) for s in tensors.values())
    outside = [
        s for name, s in tensors.items() if "embed_tokens" not in name and "lm_head" not in name
    ]
    assert shape.parameters_outside_embedding() == sum(int(np.prod(s)) for s in outside)


@pytest.mark.parametrize("name", PAPER_SHAPES)
def test_the_papers_sizes_have_the_published_parameters(name):
    losses = read_losses(PAPER_LOSSES)[0]
    for streams in (1, 2, 4, 8):
        shape = replace(PAPER_SHAPES[name], streams=streams)
        row = losses.parameters[losses.streams == streams]
        assert shape.parameters_outside_embedding() in row


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_bytes_of_quantised_weights(bits, group, tmp_path):
    model, config = parscale_mlx.load_model(GOLDEN / "p4")
    model, config = quantize_model(
        model, config, group, bits, quant_predicate=model.quant_predicate
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape, precision = read_shape(tmp_path)
    assert (precision.weights, precision.others, precision.group) == (bits, 32, group)
    held = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    # The golden case's MLP is 160 wide, which groups of 64 do not divide: MLX leaves it alone.
    left_alone = model.layers[0].mlp.down_proj.weight.dtype == mx.float32
    if left_alone:
        rest = shape.layers * shape.hidden * shape.intermediate
        held -= rest * (4 - precision.weight_bytes)
    assert shape.weight_bytes(precision) == held


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_the_cache(case, batch):
    model, _ = parscale_mlx.load_model(GOLDEN / case, dtype=mx.float32)
    cache = model.make_cache()
    model(mx.zeros((batch, 7), mx.int32), cache=cache)
    mx.eval([c.state for c in cache])
    held = sum(a[..., : c.offset, :].nbytes for c in cache for a in (c.keys, c.values))
    shape, _ = read_shape(GOLDEN / case)
    assert shape.cache_bytes(Precision(32, 32, 32), batch=batch, tokens=7) == held


def test_operations_are_those_that_torch_counts():
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((GOLDEN / "p1" / "config.json").read_text())
    fields = {k: v for k, v in config.items() if k not in ("model_type", "auto_map", "torch_dtype")}
    qwen2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2", **fields), attn_implementation="eager"
    )
    tokens = 9
    with FlopCounterMode(display=False) as counter:
        qwen2(torch.zeros((2, tokens), dtype=torch.long), logits_to_keep=1)
    shape, _ = read_shape(GOLDEN / "p1")
    parts = step(shape, Precision(), batch=2, tokens=tokens, past=0)
    # Eager attention multiplies masked scores too: tokens of them for each token.
    full = parts.pop("attention").flops * tokens / ((tokens + 1) / 2)
    assert counter.get_total_flops() == sum(w.flops for w in parts.values()) + full


def test_streams_read_weights_once():
    shape = PAPER_SHAPES["1.6B"]
    one, eight = (
        step(replace(shape, streams=p), Precision(), batch=1, tokens=1, past=100) for p in (1, 8)
    )
    assert eight["mlp"].flops == 8 * one["mlp"].flops
    assert eight["mlp"].bytes < 1.01 * one["mlp"].bytes
    assert eight["attention"].bytes > 8 * one["attention"].bytes
    assert "aggregator" in eight and "aggregator" not in one
    assert A100.bound(one["mlp"], 16) == "memory"
    prompt = step(shape, Precision(), batch=1, tokens=2048, past=0)
    assert A100.bound(prompt["mlp"], 16) == "compute"


def test_a_long_answer_costs_the_sum_of_its_steps():
    shape, lengths = replace(PAPER_SHAPES["0.5B"], streams=4), {"batch": 2, "prompt": 100}
    total = cost(shape, Precision(), A100, **lengths, answer=300)
    steps = (
        A100.seconds(step(shape, Precision(), batch=2, tokens=1, past=100 + n), 16)
        for n in range(299)
    )
    assert total.answer == pytest.approx(total.prefill + sum(steps), rel=1e-3)


def test_a_wider_model_has_the_wanted_parameters():
    base = PAPER_SHAPES["1.6B"]
    wide = replace(base, streams=8).widened(2774773760)
    assert wide.parameters_outside_embedding() == pytest.approx(2774773760)
    assert (wide.layers, wide.heads, wide.streams) == (base.layers, base.heads, 1)
    real = PAPER_SHAPES["2.8B"]
    assert wide.hidden == pytest.approx(real.hidden, rel=0.01)
    assert wide.weight_bytes(Precision()) == pytest.approx(real.weight_bytes(Precision()), rel=0.01)


def test_the_papers_headline():
    less = headline.published().increase_ratio()
    # To the digits it is published with.
    assert {name: round(value) for name, value in less.items()} == headline.PUBLISHED
    # What llm-analysis itself adds up to for the same comparison.
    assert less["memory"] == pytest.approx(21.605, rel=1e-3)
    assert less["time"] == pytest.approx(6.157, rel=0.02)
    assert 1.0451 > 1.0383 > 1.0213  # the losses that equal_loss_parameters stands between
    assert 2774773760 < headline.equal_loss_parameters() < 4353203200


def test_the_advantage_shrinks_with_the_batch():
    for side in (headline.published, headline.counted):
        less = [side(batch).increase_ratio() for batch in (1, 2, 4, 8)]
        for name in ("memory", "time"):
            values = [x[name] for x in less]
            assert values == sorted(values, reverse=True)


def test_the_command(parscale, tmp_path):
    plot = tmp_path / "cost.svg"
    result = parscale("cost", "--batch", "1,4", "--streams", 8, "--device", "m1", "--device",
                      "a100", "--json", "--plot", plot)  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["parameters_outside_embedding"] == 1571472384
    assert [d["device"]["name"] for d in report["devices"]] == [
        "Apple M1, 8-core GPU",
        "NVIDIA A100 80 GB SXM",
    ]
    rows = report["devices"][1]["rows"]
    assert [(r["batch"], r["streams"]) for r in rows] == [(1, 1), (1, 8), (4, 1), (4, 8)]
    row = rows[1]
    law = PAPER["stack-v2-python"]
    assert row["equal_model"]["parameters"] == pytest.approx(1571472384 * (1 + law.k * np.log(8)))
    assert row["cost"]["memory"] < row["equal_model"]["cost"]["memory"]
    assert row["increase_ratio"]["memory"] > row["increase_ratio"]["time"] > 1
    assert plot.read_text().startswith("<?xml")


def test_a_model_of_ones_own(parscale):
    for path in (GOLDEN / "p4", GOLDEN / "p4" / "config.json"):
        result = parscale("cost", path, "--streams", 4, "--parts", "--weight-bits", 4, "--k", 0.5)
        assert result.exit_code == 0, result.output
        assert "weights of 4 bits, KV cache of 32" in result.stdout
        assert "k = 0.500" in result.stdout
        assert "aggregator" in result.stdout


def test_this_machine(parscale):
    result = parscale("cost", "0.5B", "--device", "this", "--weight-bits", 32, "--json")
    assert result.exit_code == 0, result.output
    machine = json.loads(result.stdout)["devices"][0]
    assert machine["device"]["bandwidth"] > 1e8 and machine["device"]["flops32"] > 1e8
    assert (machine["compute_share"], machine["bandwidth_share"]) == (1, 1)
    if mx.default_device() == mx.cpu:
        assert result.stderr == ""
        hint = parscale("cost", "0.5B", "--device", "this").stderr
        assert "--weight-bits 32" in hint


def test_the_paper_option(parscale):
    result = parscale("cost", "--paper")
    assert result.exit_code == 0, result.output
    line = next(x for x in result.stdout.splitlines() if x.startswith("the paper's"))
    assert "21.6x" in line and "6.2x" in line
    for assumption in headline.ASSUMPTIONS:
        assert assumption in " ".join(result.stdout.split())
    report = json.loads(parscale("cost", "--paper", "--json").stdout)
    assert report["published"] == {"memory": 22, "time": 6}
    assert report["paper"]["increase_ratio"]["memory"] == pytest.approx(21.6, abs=0.1)


def test_names_are_in_step():
    assert tuple(PAPER_SHAPES) == SIZES


def test_bad_models(parscale, tmp_path):
    config = json.loads((GOLDEN / "p4" / "config.json").read_text())
    file = tmp_path / "config.json"
    for change, message in (
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of qwen2"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
        ({"quantization": {"group_size": 64}}, "bits is None"),
    ):
        file.write_text(json.dumps(config | change))
        line = error_line(parscale("cost", tmp_path))
        assert str(file) in line and message in line
    file.write_text("{")
    assert "not valid JSON" in error_line(parscale("cost", file))
    file.unlink()
    assert "no such file" in error_line(parscale("cost", tmp_path))


def test_bad_options(parscale, tmp_path):
    for options, message in (
        (("7B",), "neither a model folder"),
        (("--streams", "65"), "from 1 to 64"),
        (("--device", "z80"), "z80"),
        (("--compute-share", "0"), "compute-share"),
        (("--paper", "--plot", tmp_path / "a.png"), "cannot go with --paper"),
    ):
        result = parscale("cost", *options)
        assert (result.exit_code, message in error_line(result)) == (2, True), result.output
