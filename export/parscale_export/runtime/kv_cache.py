"""The KV cache of a generation: buffers that stay on the device, and the steps that fill them."""

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from parscale_export.runtime.copies import Buffers

if TYPE_CHECKING:
    from parscale_export.runtime.model import OnnxModel

NOT_CAPTURED = "-1"


class Cache:
    """Binds past and present to each step of a generation, without a copy to the host.

    Args:
        buffers: the cache's memory, for past and present alike; where the operators do not share
            it, what came before.
        rows: how many of the buffers' rows take part, from the first; by default all.
        steps: whether each step is of one token, after a first call.
    """

    def __init__(
        self, model: "OnnxModel", buffers: Buffers, rows: int | None = None, steps: bool = False
    ):
        self.model, self.pasts = model, buffers
        self.session = model.steps if steps else model.session
        self.types = result_types(self.session, model)
        self.binding = self.session.io_binding()
        self.run_options = run_options(NOT_CAPTURED)
        if model.shares_buffer:
            bind_buffers(self.binding, model, buffers, rows)

    def step(self, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        """Feed tokens [B, L] under the mask [B, past + L]; logits, and streams' weights if any."""
        model, binding = self.model, self.binding
        # Bound arrays are not copied: they have to live until the run is over.
        ids, mask = np.ascontiguousarray(ids), np.ascontiguousarray(mask)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        batch, tokens = ids.shape
        results = bind_results(binding, model, self.types, batch, tokens, ("cpu", 0))
        if model.shares_buffer:
            self.session.run_with_iobinding(binding, self.run_options)
        else:
            for past, value in zip(model.pasts, self.pasts, strict=True):
                binding.bind_ortvalue_input(past, value)
            for present in model.presents:
                binding.bind_output(present, *model.device)
            self.session.run_with_iobinding(binding, self.run_options)
            # Only here, since it makes an object for each output of each layer. They come in the
            # order in which they were first bound.
            self.pasts = binding.get_outputs()[len(results) :]
        return [_float32(value) for value in results]


class FixedSteps:  # pragma: no cover - on CUDA alone
    """Steps of one token, always at the same addresses and of the same shapes.

    A CUDA graph needs that: the kernels of the first step are recorded and started together in each
    later one. The mask is as long as the buffers have room, zero for what is still to come.

    Args:
        buffers: the cache's memory.
        batch, capacity: sequences, and tokens of each that the buffers have room for.
        graph_id: another for each instance; onnxruntime keeps its recordings by it.
    """

    def __init__(
        self, model: "OnnxModel", buffers: Buffers, batch: int, capacity: int, graph_id: int
    ):
        self.model, self.capacity = model, capacity
        self.binding, self.run_options = model.steps.io_binding(), run_options(str(graph_id))
        self.ids, self.mask = (
            ort.OrtValue.ortvalue_from_shape_and_type([batch, n], np.int64, *model.device)
            for n in (1, capacity)
        )
        self.binding.bind_ortvalue_input("input_ids", self.ids)
        self.binding.bind_ortvalue_input("attention_mask", self.mask)
        types = result_types(model.steps, model)
        self.results = bind_results(self.binding, model, types, batch, 1, model.device)
        self.likeliest = model.likeliest.of(self.results[0])
        bind_buffers(self.binding, model, buffers)

    def step(self, ids: np.ndarray, mask: np.ndarray, *, greedy: bool = False) -> list[np.ndarray]:
        """As ``Cache.step``, for one token.

        Args:
            greedy: instead of logits, give the likeliest tokens, int64 [B, 1]; -1 where the logits
                are not numbers.
        """
        whole = np.zeros((len(mask), self.capacity), np.int64)
        whole[:, : mask.shape[1]] = mask
        self.ids.update_inplace(np.ascontiguousarray(ids))
        self.mask.update_inplace(whole)
        self.model.steps.run_with_iobinding(self.binding, self.run_options)
        first = self.likeliest() if greedy else _float32(self.results[0])
        return [first, *map(_float32, self.results[1:])]


def result_types(session: ort.InferenceSession, model: "OnnxModel") -> list[type[np.floating]]:
    """The types of what a step gives besides the cache: of single steps on CUDA, half as long."""
    types = {output.name: output.type for output in session.get_outputs()}
    return [np.float16 if types[n] == "tensor(float16)" else np.float32 for n in model.outputs]


def bind_results(
    binding: ort.IOBinding,
    model: "OnnxModel",
    types: list[type[np.floating]],
    batch: int,
    tokens: int,
    device: tuple[str, int],
) -> Buffers:
    """Memory for what a step gives besides the cache: [batch, tokens or 1, width] each."""
    rows = tokens if model.all_logits else 1
    results = [
        ort.OrtValue.ortvalue_from_shape_and_type([batch, rows, width], dtype, *device)
        for width, dtype in zip(model.output_widths, types, strict=True)
    ]
    for name, value in zip(model.outputs, results, strict=True):
        binding.bind_ortvalue_output(name, value)
    return results


def bind_buffers(
    binding: ort.IOBinding, model: "OnnxModel", buffers: Buffers, rows: int | None = None
) -> None:
    """Let past and present of every layer be one buffer, or the first rows of it."""
    for past, present, value in zip(model.pasts, model.presents, buffers, strict=True):
        shape = value.shape()
        where = (
            *model.device,
            model.cache_type,
            [shape[0] if rows is None else rows, *shape[1:]],
            value.data_ptr(),
        )
        binding.bind_input(past, *where)
        binding.bind_output(present, *where)


def _float32(value: ort.OrtValue) -> np.ndarray:
    return value.numpy().astype(np.float32, copy=False)


def run_options(graph_id: str) -> ort.RunOptions:
    """Options of a run, with the name of the CUDA graph that it records or replays.

    Also where there are no such graphs: onnxruntime asks in every run, and raises an exception of
    its own where no name is set.
    """
    options = ort.RunOptions()
    options.log_severity_level = 4
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options
