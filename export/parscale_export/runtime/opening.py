"""From an export's folder to an engine."""

from functools import partial
from pathlib import Path
from typing import Any

import transformers
from parscale_core.checkpoint.tokenizer import end_tokens

from parscale_export.runtime.engine import OnnxEngine
from parscale_export.runtime.model import OnnxModel
from parscale_export.runtime.session import find_graph, find_graphs, load_graph


def open_engine(
    path: str | Path,
    provider: str | None = None,
    *,
    streams: int | None = None,
    slots: int = 16,
    kept_bytes: int = 1 << 30,
    **options,
) -> OnnxEngine:
    """An engine over all graphs of an export's folder, or over one .onnx file.

    Args:
        streams: the default P; of a folder, model.onnx's if not given.
        provider, options: as for ``OnnxModel``.
        slots, kept_bytes: as for ``OnnxEngine``.

    Raises:
        FileNotFoundError: no graph there, no external data, or no tokenizer.
        ValueError: not one of our graphs, a provider that cannot run it, or a bad tokenizer.
    """
    path = Path(path).expanduser()
    first = find_graph(path, streams)
    graphs = find_graphs(path)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    model = OnnxModel(first, provider, **options)
    del graphs[model.streams]
    own = tokenizer.eos_token_id
    tell = model.streams == 1 or model.aggregation_weights
    return OnnxEngine(
        model,
        tokenizer,
        [*end_tokens(first.parent), *([] if own is None else [own])],
        others={
            n: partial(OnnxModel, file, model.provider, **options) for n, file in graphs.items()
        },
        gives_stream_weights=tell and all(_tells(n, file) for n, file in graphs.items()),
        slots=slots,
        kept_bytes=kept_bytes,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in an export's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or only by running code from the folder.
    """
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json in this folder")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for bad files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: the tokenizer cannot be read: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _tells(streams: int, file: Path) -> bool:
    outputs = {value.name for value in load_graph(file).graph.output}
    return streams == 1 or "aggregation_weights" in outputs
