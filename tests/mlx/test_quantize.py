"""``convert --quantize --q-recipe``: mixed bits, bits by sensitivity, scales learnt from text."""

import shutil

import parscale_mlx
from parscale_mlx.convert import convert

import mlx.core as mx
import pytest
from helpers.golden_cases import GOLDEN, difference
from helpers.tiny_models import write_tokenizer
from mlx_lm.convert import mixed_quant_predicate_builder
from parscale_core.convert_settings import Quantization

TEXT = "".join(f"line {n} of a text to learn from, {n * n} of all\n" for n in range(400))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "p4"
    shutil.copytree(GOLDEN / "p4", folder)
    write_tokenizer(folder)
    return folder


def quantised(source, output, **how):
    quantization = Quantization(group_size=32, windows=8, text=TEXT, **how)
    convert(source, output, quantization=quantization)
    model, config = parscale_mlx.load_model(output)
    return model, config


@pytest.mark.parametrize("recipe", ["mixed_3_6", "mixed_4_6"])
def test_mixed_recipes_are_mlx_lms(source, tmp_path, recipe):
    model, _ = quantised(source, tmp_path / "q", recipe=recipe)
    full, _ = parscale_mlx.load_model(source)
    theirs = mixed_quant_predicate_builder(recipe, full, 32)
    for path, module in model.named_modules():
        if hasattr(module, "bits"):
            assert module.bits == theirs(path, module)["bits"], path
    assert not hasattr(model.model.aggregator.fc1, "bits")


def test_dynamic_gives_more_bits_to_about_half(source, tmp_path):
    model, _ = quantised(source, tmp_path / "q", recipe="dynamic")
    sizes = {4: 0, 6: 0}
    for _, module in model.named_modules():
        if hasattr(module, "bits"):
            sizes[module.bits] += module.weight.size * 32 // module.bits
    assert 0 < sizes[6] <= sum(sizes.values()) / 2
    assert not hasattr(model.model.aggregator.fc1, "bits")


@pytest.mark.slow
def test_dwq_comes_nearer_to_the_full_model_and_leaves_the_streams(source, tmp_path):
    plain, _ = quantised(source, tmp_path / "plain", bits=3)
    learnt, _ = quantised(source, tmp_path / "dwq", bits=3, recipe="dwq")
    full, _ = parscale_mlx.load_model(source)
    ids = mx.array([parscale_mlx.load(source)[1].encode(TEXT)[-200:]])

    def distance(model):
        p, q = (mx.log(mx.softmax(m(ids), axis=-1)) for m in (full, model))
        return (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()

    assert 0 < distance(learnt) < distance(plain)
    for mine, theirs in zip(learnt.layers, full.layers, strict=True):
        assert difference(mine.self_attn.prefix_k, theirs.self_attn.prefix_k) == 0
    assert difference(learnt.model.aggregator.fc1.weight, full.model.aggregator.fc1.weight) == 0


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(recipe="awq"), "is not one of mixed_2_6"),
        (dict(recipe="dwq", mode="mxfp4"), "mode affine only"),
        (dict(recipe="mixed_3_6", bits=4), "chooses the bits itself"),
        (dict(recipe="dwq", bits=8), "fewer than 8 bits"),
        (dict(recipe="dwq", everything=True), "leaves the aggregator"),
    ],
    ids=str,
)
def test_what_does_not_go_together(source, tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "q", quantization=Quantization(**how))
    assert not (tmp_path / "q").exists()


def test_a_text_that_is_too_short(source, tmp_path):
    with pytest.raises(ValueError, match="at least 3072"):
        convert(source, tmp_path / "q", quantization=Quantization(recipe="dwq", text="short"))
    assert not (tmp_path / "q").exists()
