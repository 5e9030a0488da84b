"""Read of a shared model's weights no more rows than a rank keeps."""

from collections.abc import Mapping

from parscale_mlx.model import Model

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from parscale_core.checkpoint.names import is_prefix
from parscale_core.checkpoint.weight_files import Entry

# safetensors could slice, too, but hands over numpy arrays, and numpy has no bfloat16.
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}


def read_own_rows(model: Model, tensors: Mapping[str, Entry]) -> None:
    """Read those weights of which this rank keeps some of the rows; the others stay unread.

    MLX reads a whole tensor before it takes a slice. That remains so for a share of the columns,
    which lies all over the file, and for prefixes whose heads are shared out but not the streams.

    Args:
        model: lazily loaded, and shared out.
        tensors: by their names in memory, where the model's weights lie.
    """
    kept = dict(tree_flatten(model.parameters()))
    streams, tensor = model.parallel.stream_share, model.parallel.tensor_share
    rows = {}
    for name, (file, dtype, shape, start, size) in tensors.items():
        own = kept.get(name)
        if own is None or dtype not in DTYPES:
            continue
        share = streams if is_prefix(name) else tensor
        # Columns are others where a layer was dequantised.
        if own.shape[0] == shape[0] or not (is_prefix(name) or own.shape[1:] == tuple(shape[1:])):
            continue
        part = size // share.count
        raw = np.fromfile(file, np.uint8, part, offset=start + share.number * part)
        value = mx.array(raw).view(DTYPES[dtype]).reshape(-1, *shape[1:])
        if is_prefix(name):
            value = mx.split(value, tensor.count, axis=1)[tensor.number]
        rows[name] = mx.contiguous(value.astype(own.dtype))
        mx.eval(rows[name])
    model.load_weights(list(rows.items()), strict=False)
