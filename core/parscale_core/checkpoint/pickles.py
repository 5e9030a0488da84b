"""PyTorch pickles, read without running what they hold."""

from pathlib import Path
from typing import Any

import numpy as np


def read_pickle(file: Path) -> dict[str, Any]:
    """The tensors of a PyTorch pickle, mapped from disk; nothing in the file is executed.

    Raises:
        ImportError: PyTorch is not installed.
        ValueError: the file is not a pickle of tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file}: PyTorch pickles need PyTorch: pip install 'parscale[torch]'"
        ) from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever its unpickler met
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: not a PyTorch pickle of tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise ValueError(f"{file}: not a dictionary of tensors")
    return tensors


def type_name(tensor: Any) -> str:
    """The name of a PyTorch tensor's type: float32, bfloat16..."""
    return str(tensor.dtype).removeprefix("torch.")


def to_numpy(tensor: Any) -> np.ndarray:
    """A PyTorch tensor's values, in its own type."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own: move the bits
        return tensor.view(torch.int16).numpy().view(np.dtype("bfloat16"))
    return tensor.numpy()
