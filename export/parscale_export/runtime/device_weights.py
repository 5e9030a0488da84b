"""A graph's weights in the device's memory, once for all sessions that use them."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx.external_data_helper import ExternalDataInfo


def upload(
    file: Path, device: tuple[str, int]
) -> dict[str, ort.OrtValue]:  # pragma: no cover - on CUDA alone
    """The external tensors of a graph by name; one is in the host's memory at a time.

    Args:
        file: the graph, whose data files have been looked at (see ``read_graph``).
        device: as onnxruntime names it, and its number.
    """
    values = {}
    for tensor in onnx.load(str(file), load_external_data=False).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        about = ExternalDataInfo(tensor)
        value = ort.OrtValue.ortvalue_from_shape_and_type(
            list(tensor.dims), tensor.data_type, *device
        )
        # Whatever the type, its bytes are copied.
        size = (about.length or 0) // max(1, int(np.prod(tensor.dims)))
        data = np.memmap(
            file.parent / about.location,
            f"u{size}",
            mode="r",
            offset=about.offset or 0,
            shape=tuple(tensor.dims),
        )
        value.update_inplace(np.ascontiguousarray(data))
        # A view: sessions share only memory that is not an OrtValue's own.
        values[tensor.name] = ort.OrtValue.from_dlpack(value)
    return values
