"""Quantise a model in MLX: all weights alike, by one of mlx-lm's recipes, or learnt from text.

The prefixes and the aggregator stay as they are, whatever the recipe.
"""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any

from parscale_mlx.model import Model

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.dynamic_quant import estimate_sensitivities
from mlx_lm.utils import quantize_model
from parscale_core.convert_settings import LEARNT, MIXED, MODES, RECIPES, Quantization

MORE_BITS = {2: 4, 3: 4, 4: 6, 5: 6, 6: 8}  # what "dynamic" gives the sensitive half of the weights
WINDOW, HELD_OUT = 256, 8  # tokens a window of the text; windows that are not learnt from
LEARNING_RATE = 3e-5
SEED = 0
# From a module's path and the module: whether to quantise it, or how.
Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]


def check_quantization(how: Quantization) -> Quantization:
    """The same, with the mode's defaults for what was left out.

    Raises:
        ValueError: MLX has no such mode, not with these bits and this group size, or the recipe
            does not go with them.
    """
    if how.mode not in MODES:
        raise ValueError(f"mode {how.mode!r} is not one of {', '.join(MODES)}")
    if how.recipe is not None:
        _check_recipe(how)
    usual_group_size, usual_bits = MODES[how.mode]
    if how.recipe in MIXED:  # named by their fewest and most bits
        usual_bits = int(how.recipe.split("_")[1])
    group_size, bits = how.group_size or usual_group_size, how.bits or usual_bits
    try:
        mx.quantize(mx.zeros((1, 16 * group_size)), group_size, bits, mode=how.mode)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("[quantize] ")) from error
    return replace(how, bits=bits, group_size=group_size)


def _check_recipe(how: Quantization) -> None:
    if how.recipe not in RECIPES:
        raise ValueError(f"recipe {how.recipe!r} is not one of {', '.join(RECIPES)}")
    if how.mode != "affine":
        raise ValueError(f"recipe {how.recipe!r} goes with the mode affine only, not {how.mode}")
    if how.everything:
        raise ValueError(f"recipe {how.recipe!r} leaves the aggregator as it is")
    if how.recipe in MIXED and how.bits is not None:
        raise ValueError(f"recipe {how.recipe!r} chooses the bits itself")
    if how.recipe in LEARNT and how.bits not in (None, *MORE_BITS):
        raise ValueError(f"recipe {how.recipe!r} learns with fewer than 8 bits")


def cut_windows(tokenizer: Any, text: str, count: int) -> list[list[int]]:
    """Windows of a text to learn from: ``count`` and those held out, or as many as there are.

    Raises:
        ValueError: the text is too short.
    """
    ids = tokenizer.encode(text)
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    if len(windows) < HELD_OUT + 4:
        raise ValueError(
            f"the text to learn from has {len(ids)} tokens; at least {(HELD_OUT + 4) * WINDOW} "
            "are needed"
        )
    return windows[: count + HELD_OUT]


def quantize(
    model: Model,
    config: dict[str, Any],
    how: Quantization,
    *,
    teacher: Model | None = None,
    windows: list[list[int]] | None = None,
) -> dict[str, Any]:
    """Quantise a model in place; returns its new configuration.

    Args:
        how: from ``check_quantization``.
        teacher: for the learnt recipes, the same model in full precision.
        windows: for the learnt recipes, from ``cut_windows``.

    Raises:
        ValueError: no weight has rows that the groups divide.
    """
    predicate: Predicate | None = None
    if how.everything:
        predicate = lambda path, module: True  # noqa: E731
    elif how.recipe in MIXED:
        assert how.group_size is not None
        # mlx-lm's type for it has one argument more than it takes.
        mixed: Any = mixed_quant_predicate_builder(how.recipe, model, how.group_size)
        predicate = _but_aggregator(mixed)
    elif how.recipe == "dynamic":
        assert teacher is not None and windows is not None
        predicate = _but_aggregator(_sensitive(teacher, how, windows))
    with redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        _, config = quantize_model(  # in place
            model, config, how.group_size, how.bits, mode=how.mode, quant_predicate=predicate
        )
    if not any(hasattr(module, "bits") for module in model.modules()):
        raise ValueError(f"no weight has rows that groups of {how.group_size} divide")
    if how.recipe == "dwq":
        assert teacher is not None and windows is not None
        _distil(model, teacher, windows)
    return config


def _but_aggregator(predicate: Predicate) -> Predicate:
    return lambda path, module: "aggregator" not in path and predicate(path, module)


def _sensitive(teacher: Model, how: Quantization, windows: list[list[int]]) -> Predicate:
    """A predicate that gives more bits to the most sensitive layers, half of the weights in all."""
    assert how.bits is not None
    more = {"bits": MORE_BITS[how.bits], "group_size": how.group_size, "mode": how.mode}
    data = mx.array(windows[:-HELD_OUT])
    with _quiet():
        scores = estimate_sensitivities(
            teacher, data, how.bits, how.group_size, more["bits"], how.group_size, batch_size=1
        )
    modules: Any = tree_flatten(teacher.leaf_modules(), is_leaf=nn.Module.is_module)
    sizes = {
        path: module.weight.size
        for path, module in modules
        if hasattr(module, "to_quantized") and "aggregator" not in path
    }
    budget, chosen = sum(sizes.values()) / 2, set()
    for path, _ in sorted(scores, key=lambda item: -item[1]):
        if path in sizes and sizes[path] <= budget:
            chosen.add(path)
            budget -= sizes[path]
    return lambda path, module: more if path in chosen else True


def _distil(model: Model, teacher: Model, windows: list[list[int]]) -> None:
    """Learn scales and biases so that the logits become the teacher's (mlx-lm's DWQ)."""
    model.freeze()  # DWQ takes the frozen scales and biases up again, and nothing else
    data = [(window, 0) for window in windows]
    with _quiet(), _dequantised(model):
        dwq_quantize(
            model,
            lambda batch, index, split: teacher(batch),
            optimizers.Adam(learning_rate=LEARNING_RATE, bias_correction=True),
            data[:-HELD_OUT],
            data[-HELD_OUT:],
            batch_size=1,
            max_seq_length=WINDOW,
            seed=SEED,
            dtype=model.model.norm.weight.dtype,
        )
    model.eval()


class _DequantisedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        x = x @ _weight(self).T
        return x + self["bias"] if "bias" in self else x


class _DequantisedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return x @ _weight(self).T


def _weight(module: Any) -> mx.array:
    return mx.dequantize(
        module["weight"], module["scales"], module["biases"], module.group_size, module.bits
    )


@contextmanager
def _dequantised(model: Model) -> Iterator[None]:
    """Compute with dequantised weights on a CPU, for which MLX has no fast quantised product."""
    classes: dict[type[nn.Module], type[nn.Module]] = {
        nn.QuantizedLinear: _DequantisedLinear,
        nn.QuantizedEmbedding: _DequantisedEmbedding,
    }
    modules: list[Any] = model.modules() if mx.default_device() == mx.cpu else []
    found = [(module, type(module)) for module in modules if type(module) in classes]
    for module, kind in found:
        module.__class__ = classes[kind]
    try:
        yield
    finally:
        for module, kind in found:
            module.__class__ = kind


@contextmanager
def _quiet() -> Iterator[None]:
    # mlx-lm writes its losses to standard output, which is for results, and its progress to
    # standard error whether that is a terminal or not.
    elsewhere = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(elsewhere):
        yield
