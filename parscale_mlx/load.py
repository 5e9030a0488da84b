"""Load a model from a folder or from the hub, as published or as converted."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parscale_mlx.adapter import load_adapter, with_streams
from parscale_mlx.finite import check_logits
from parscale_mlx.model import Model
from parscale_mlx.parallel.ranks import check_same, join
from parscale_mlx.parallel.reading import read_own_rows
from parscale_mlx.parallel.shard import plan, shard_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import transformers
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from parscale_core.checkpoint import mlx_quantized
from parscale_core.checkpoint.adapter import adapter_folders, digest, read_adapter
from parscale_core.checkpoint.chat import bound_templates
from parscale_core.checkpoint.config import read_config
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.names import PUBLISHED_COLUMNS, held_columns
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_core.checkpoint.tokenizer import check_vocabulary, end_tokens, tokenizer_files
from parscale_core.checkpoint.weight_files import Entry, find_safetensors, read_header, read_headers


def load(
    path_or_name: str | Path,
    *,
    adapter_path: str | Path | None = None,
    dtype: mx.Dtype | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    parallel: str | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """Load a model and its tokenizer.

    Args:
        path_or_name: a local folder, published or converted, or a name on the hub.
        adapter_path: a stream adapter's folder. For several over one backbone, see
            ``parscale_mlx.adapter``.
        dtype, dequantize: see ``load_model``.
        revision: a branch, tag or commit of a hub repository.
        parallel: how to share the model with the other processes that ``mlx.launch`` started:
            "streams", "tensor" or "SxT"; see ``parallel.shard.plan``. This process keeps
            only its share, and reads no other where that is whole rows of a tensor.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``load_model``; or there is no tokenizer, the
            adapter is not one for this model, or the model cannot be shared so.
    """
    folder = find_folder(path_or_name, revision=revision)
    dtype = dtype or _default_dtype()
    model, config = load_model(
        folder, dtype=dtype, dequantize=dequantize, lazy=parallel is not None
    )
    if adapter_path is not None:
        model = with_streams(model, load_adapter(adapter_path, backbone=folder))
        if parallel is None:
            check_logits(model, adapter_path)
    if parallel is not None:
        group = join()
        asked = {"data type": str(dtype), "way of sharing": parallel}
        check_same(group, identity(folder, adapter_path) | asked)
        shard_model(model, plan(parallel, group, model.args))
        tensors = read_headers(find_safetensors(folder)) | _adapter_tensors(adapter_path)
        read_own_rows(model, tensors)
        mx.eval(model.parameters())
    return model, load_tokenizer(folder, config)


def load_model(
    path_or_name: str | Path,
    *,
    dtype: mx.Dtype | None = None,
    dequantize: bool = False,
    lazy: bool = False,
    revision: str | None = None,
) -> tuple[Model, dict]:
    """Load a model without its tokenizer, from a published Hugging Face folder or a converted one.

    Args:
        dtype: the type of the weights that are not quantised. By default the stored one on a GPU,
            and float32 on the CPU, whose kernels for the shorter types are many times slower.
        dequantize: compute with plain weights, which the CPU does many times faster.
        lazy: leave the weights on disk until they are used, in the stored type.

    Returns:
        The model and its ``config.json`` as a dictionary.

    Raises:
        FileNotFoundError: no such folder, hub repository or file in it.
        ValueError: what is there is not a model that this package can run; the message names the
            file and what is wrong with it.
        ImportError: the weights are PyTorch pickles and PyTorch is not installed.
    """
    checkpoint = Checkpoint(find_folder(path_or_name, revision=revision))
    model = Model(checkpoint.config)
    if checkpoint.quantization:
        _quantize(model, checkpoint)
    model.eval()
    model.load_weights(list(read_weights(checkpoint).items()))
    # model_file names Python code in the folder for mlx-lm to run.
    config = {k: v for k, v in checkpoint.config.raw.items() if k != "model_file"}
    if checkpoint.blocks is not None:
        del config["quantization_config"]
    if dequantize:
        mlx_lm_utils.dequantize_model(model)
        config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    if lazy and dtype is None:
        return model, config
    dtype = dtype or _default_dtype()
    if dtype is not None:
        model.set_dtype(dtype)
    if not lazy:
        mx.eval(model.parameters())
        check_logits(model, checkpoint.folder)
    return model, config


def read_weights(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """A checkpoint's tensors by their names in memory, left on disk until they are used."""
    files = {stored.file for stored in checkpoint.stored.values() if stored.pickled is None}
    opened = {file: _open(file) for file in files}
    weights = {}
    for name, stored in checkpoint.stored.items():
        if name.endswith("_scale_inv"):
            continue
        if stored.dtype.startswith("float8"):
            weights[name] = mx.array(checkpoint.tensor(name)).astype(mx.bfloat16)
        elif stored.pickled is not None or opened[stored.file] is None:
            weights[name] = _from_numpy(checkpoint.read(name))
        elif stored.name == PUBLISHED_COLUMNS:
            value = opened[stored.file][stored.name]
            weights[name] = held_columns(value, checkpoint.config.streams)
        else:
            weights[name] = opened[stored.file][stored.name]
    return weights


def open_models(
    folder: Path,
    adapters: Sequence[Path],
    streams: Sequence[int] = (),
    *,
    parallel: str | None = None,
    dequantize: bool = False,
) -> tuple[dict[int, Model], TokenizerWrapper]:
    """Load a model and the stream adapters over it.

    Args:
        adapters: folders; with none, those that came with the model, in its folder ``adapters``.
        streams: numbers of them to have models of; by default all that there are.
        parallel: as for ``load``. Each model then has arrays of its own.
        dequantize: see ``load_model``.

    Returns:
        By number of streams, models that share their backbone's arrays; and the tokenizer.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``load``.
        ValueError: there is no model of so many streams.
    """
    found = find_adapters(folder, adapters)
    if streams:
        found = {n: _pick(found, n) for n in streams}
    backbone, config = load_model(folder, lazy=parallel is not None, dequantize=dequantize)
    models = {}
    for count, adapter in sorted(found.items()):
        model = backbone
        if parallel is not None:
            model, _ = load(folder, adapter_path=adapter, dequantize=dequantize, parallel=parallel)
        elif adapter is not None:
            model = with_streams(backbone, load_adapter(adapter, backbone=folder))
        _warm_up(model, adapter or folder)
        models[count] = model
    return models, load_tokenizer(folder, config)


def load_draft(path_or_name: str | Path, tokenizer: TokenizerWrapper) -> Model:
    """Load a model that drafts for another in speculative decoding.

    Args:
        tokenizer: the other's.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``load``.
        ValueError: the two have different vocabularies.
    """
    draft, own = load(path_or_name)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--draft-model {path_or_name}: its vocabulary of {own.vocab_size} tokens is not the "
            f"model's of {tokenizer.vocab_size}"
        )
    _warm_up(draft, path_or_name)
    return draft


def load_tokenizer(folder: Path, config: dict) -> TokenizerWrapper:
    """The tokenizer in a model's folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it cannot be read, or only by running code from the folder.
    """
    if not any(folder.glob("tokenizer*")):
        raise FileNotFoundError(f"{folder}: no tokenizer files (tokenizer.json) in this folder")
    bound_templates()
    # transformers warns of every model_type it has no class for; only its tokenizer is wanted here.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(
            folder, {"trust_remote_code": False}, eos_token_ids=end_tokens(folder)
        )
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for bad files
        raise ValueError(f"{folder}: the tokenizer cannot be read: {_one_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    check_vocabulary(folder, tokenizer, config["vocab_size"])
    return tokenizer


def find_adapter(folder: Path, adapters: Sequence[Path], streams: int | None) -> Path | None:
    """Of the stream adapters over a model, the one with as many streams as are wanted.

    Args:
        folder, adapters: as for ``find_adapters``.
        streams: None for the most that there are; 1 for the model without streams.

    Returns:
        The adapter's folder, or None for the model as it is.

    Raises:
        FileNotFoundError, ValueError: as ``find_adapters``; or neither the model nor an adapter
            has as many streams as are wanted.
    """
    found = find_adapters(folder, adapters)
    return _pick(found, max(found) if streams is None else streams)


def find_adapters(folder: Path, adapters: Sequence[Path]) -> dict[int, Path | None]:
    """The stream adapters over a model by their number of streams, and None for the model's own.

    Args:
        folder: the model's.
        adapters: folders; with none, those that came with the model, in its folder ``adapters``.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: one is not a stream adapter, or two have equally many streams.
    """
    found: dict[int, Path | None] = {read_config(folder).streams: None}
    for adapter in adapter_folders(folder, adapters):
        n = read_adapter(adapter).streams
        # A prefix for one stream takes the place of the model without any.
        if n in found and (found[n] is not None or n > 1):
            raise ValueError(f"{found[n] or folder} and {adapter} both have {n} streams")
        found[n] = adapter
    return found


def identity(folder: Path, adapter: str | Path | None = None) -> dict[str, str]:
    """What must not differ between processes that share a model, for ``ranks.check_same``.

    Raises:
        FileNotFoundError, ValueError: the model is not whole, or not safetensors.
    """
    settings = hashlib.sha256()
    for file in sorted({*folder.glob("*config.json"), *tokenizer_files(folder)}):
        settings.update(file.read_bytes())
    return {
        "checkpoint": digest(read_headers(find_safetensors(folder))),
        "configuration or tokenizer": settings.hexdigest(),
        "adapter": digest(_adapter_tensors(adapter)),
    }


def _adapter_tensors(adapter: str | Path | None) -> dict[str, Entry]:
    return {} if adapter is None else read_header(read_adapter(adapter).weights)


def _warm_up(model: Model, name: object) -> None:
    # What a model computes once and keeps (tables of its rotary embedding) is computed here, not on
    # a thread that generates.
    mx.eval(model.parameters())
    check_logits(model, name)


def _pick(found: dict[int, Path | None], streams: int) -> Path | None:
    if streams not in found:
        there = ", ".join(map(str, sorted(found)))
        raise ValueError(f"no model or adapter here has {streams} streams, only {there}")
    return found[streams]


def _quantize(model: Model, checkpoint: Checkpoint) -> None:
    """Put quantised layers where the checkpoint holds them, in place."""

    def settings(path: str, module: nn.Module) -> dict | bool:
        if not checkpoint.is_quantized(f"{path}.weight"):
            return False
        mode, group_size, bits = mlx_quantized.settings(checkpoint.quantization, path)
        return {"group_size": group_size, "bits": bits, "mode": mode}

    nn.quantize(model, class_predicate=settings)


def _open(file: Path) -> Any:
    """The arrays of a safetensors file; None where it holds one of a type that MLX has not."""
    try:
        return mx.load(str(file))
    except RuntimeError:
        return None


def _from_numpy(value: np.ndarray) -> mx.array:
    if value.dtype == np.dtype("bfloat16"):  # MLX takes no such array from numpy: move its bits
        return mx.array(value.view(np.uint16)).view(mx.bfloat16)
    return mx.array(value)


def _default_dtype() -> mx.Dtype | None:
    return mx.float32 if mx.default_device() == mx.cpu else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
