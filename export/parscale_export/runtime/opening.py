"""From an export's folder to an engine."""

from functools import partial
from pathlib import Path
from typing import Any

from parscale_core.checkpoint import tokenizer as checkpoint
from parscale_core.checkpoint.tokenizer import TOKENIZER, end_tokens

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
    **options: Any,
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
    folder = path if path.is_dir() else path.parent
    tokenizer = load_tokenizer(folder)
    model = OnnxModel(first, provider, **options)
    checkpoint.check_vocabulary(folder, tokenizer, model.vocab_size)
    del graphs[model.streams]
    tell = model.streams == 1 or model.aggregation_weights
    return OnnxEngine(
        model,
        tokenizer,
        end_tokens(folder, tokenizer),
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
    if not (folder / TOKENIZER).is_file():
        raise FileNotFoundError(f"{folder}: no {TOKENIZER} in this folder")
    return checkpoint.load_tokenizer(folder)


def _tells(streams: int, file: Path) -> bool:
    outputs = {value.name for value in load_graph(file).graph.output}
    return streams == 1 or "aggregation_weights" in outputs
