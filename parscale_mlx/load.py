"""Load a model from a folder or from the hub, as published or as converted."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parscale_mlx.adapter import load_adapter, with_streams
from parscale_mlx.arrays import quantize_layers, read_weights
from parscale_mlx.finite import check_logits
from parscale_mlx.model import Model
from parscale_mlx.parallel.ranks import check_same, join
from parscale_mlx.parallel.reading import read_own_rows
from parscale_mlx.parallel.shard import plan, shard_model
from parscale_mlx.tokenizer import load_tokenizer

import mlx.core as mx
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from parscale_core.checkpoint.adapter import digest, find_adapters, pick_adapter, read_adapter
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_core.checkpoint.tokenizer import tokenizer_files
from parscale_core.checkpoint.weight_files import Entry, find_safetensors, read_header, read_headers


def load(
    path_or_name: str | Path,
    *,
    adapter_path: str | Path | None = None,
    streams: int | None = None,
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
        streams: take the adapter with so many that came with the model, in its folder ``adapters``.
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
    if streams is not None:
        if adapter_path is not None:
            raise ValueError(
                "`streams` cannot go with `adapter_path`, which has its number of streams"
            )
        adapter_path = pick_adapter(find_adapters(folder, ()), streams)
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
) -> tuple[Model, dict[str, Any]]:
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
        quantize_layers(model, checkpoint)
    model.eval()
    model.load_weights(list(read_weights(checkpoint).items()))
    # model_file names Python code in the folder for mlx-lm to run.
    config = {k: v for k, v in checkpoint.config.raw.items() if k != "model_file"}
    if checkpoint.blocks or checkpoint.packing:
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
        found = {n: pick_adapter(found, n) for n in streams}
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
            f"draft_model={path_or_name}: its vocabulary of {own.vocab_size} tokens is not the "
            f"model's of {tokenizer.vocab_size}"
        )
    _warm_up(draft, path_or_name)
    return draft


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


def _default_dtype() -> mx.Dtype | None:
    return mx.float32 if mx.default_device() == mx.cpu else None
