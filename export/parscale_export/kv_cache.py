"""The KV cache of a generation: buffers that stay on the device, and the steps that fill them."""

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from parscale_export.runner import OnnxModel

Buffers = list[ort.OrtValue]
NOT_CAPTURED = "-1"


class Cache:
    """Binds past and present to each step of a generation, without a copy to the host.

    Args:
        buffers: the cache's memory, for past and present alike; where the operators do not share
            it, empty caches to begin with.
    """

    def __init__(self, model: "OnnxModel", buffers: Buffers):
        self.model, self.pasts = model, buffers
        self.binding = model.session.io_binding()
        self.run_options = run_options(NOT_CAPTURED if model.cuda_graph else None)
        # onnxruntime gives outputs back in the order in which they were first bound.
        self._bind_outputs()
        if model.shares_buffer:
            bind_buffers(self.binding, model, buffers)

    def _bind_outputs(self) -> None:
        for name in self.model.outputs:
            self.binding.bind_output(name, "cpu")

    def step(self, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        """Feed tokens [B, L] under the mask [B, past + L]; logits, and streams' weights if any."""
        model, binding = self.model, self.binding
        # Bound arrays are not copied: they have to live until the run is over.
        ids, mask = np.ascontiguousarray(ids), np.ascontiguousarray(mask)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        self._bind_outputs()
        if not model.shares_buffer:
            for past, value in zip(model.pasts, self.pasts, strict=True):
                binding.bind_ortvalue_input(past, value)
            for present in model.presents:
                binding.bind_output(present, *model.device)
        model.session.run_with_iobinding(binding, self.run_options)
        values = binding.get_outputs()
        count = len(model.outputs)
        if not model.shares_buffer:
            self.pasts = values[count:]
        return [value.numpy() for value in values[:count]]


class FixedSteps:
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
        self.binding, self.run_options = model.session.io_binding(), run_options(str(graph_id))
        self.ids, self.mask = (
            ort.OrtValue.ortvalue_from_shape_and_type([batch, n], np.int64, *model.device)
            for n in (1, capacity)
        )
        self.binding.bind_ortvalue_input("input_ids", self.ids)
        self.binding.bind_ortvalue_input("attention_mask", self.mask)
        self.results = [
            ort.OrtValue.ortvalue_from_shape_and_type([batch, 1, width], np.float32, *model.device)
            for width in model.output_widths
        ]
        for name, value in zip(model.outputs, self.results, strict=True):
            self.binding.bind_ortvalue_output(name, value)
        bind_buffers(self.binding, model, buffers)

    def step(self, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        """As ``Cache.step``, for one token."""
        whole = np.zeros((len(mask), self.capacity), np.int64)
        whole[:, : mask.shape[1]] = mask
        self.ids.update_inplace(np.ascontiguousarray(ids))
        self.mask.update_inplace(whole)
        self.model.session.run_with_iobinding(self.binding, self.run_options)
        return [value.numpy() for value in self.results]


def bind_buffers(binding: ort.IOBinding, model: "OnnxModel", buffers: Buffers) -> None:
    """Let past and present of every layer be one buffer."""
    for past, present, value in zip(model.pasts, model.presents, buffers, strict=True):
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)


def run_options(graph_id: str | None) -> ort.RunOptions:
    """Options of a run, with the name of the CUDA graph that it records or replays."""
    options = ort.RunOptions()
    options.log_severity_level = 4
    if graph_id is not None:
        options.add_run_config_entry("gpu_graph_id", graph_id)
    return options
