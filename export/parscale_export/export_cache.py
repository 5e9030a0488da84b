"""Exports that ``--runtime onnx`` makes of other models, kept in the user's cache folder."""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parscale_core.cache_folder import cache_folder
from parscale_core.file_hash import sha256
from parscale_core.progress import stages_bar

from parscale_export.export import export_onnx

# What an export is made of: weights, configuration, tokenizer, templates, adapters.
PARTS = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.txt", "*.model", "adapters/*/*")


def cached_export(folder: Path, adapters: Sequence[Path], *, all_logits: bool = False) -> Path:
    """The export of a model with its adapters, made once for what its files hold.

    Several processes may ask at the same time; the first that is done wins.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``export_onnx``.
        OSError: the cache folder cannot be written.
    """
    options: dict[str, Any] = {"all_logits": all_logits, "aggregation_weights": True}
    files = [file for part in PARTS for file in folder.glob(part) if file.is_file()]
    for adapter in adapters:
        files += [file for file in adapter.rglob("*") if file.is_file()]
    told = json.dumps([version("parscale"), len(adapters), options])
    key = hashlib.sha256((told + _digest(sorted(set(files)))).encode()).hexdigest()[:16]
    output = cache_folder() / "exports" / f"{folder.resolve().name}-{key}"
    if output.is_dir():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():
        print(f"Exporting {folder} once, into {output}", file=sys.stderr)
    with stages_bar() as progress:
        try:
            export_onnx(folder, output, adapters=adapters, progress=progress, **options)
        except FileExistsError:
            if not output.is_dir():
                raise
    return output


def _digest(files: Iterable[Path]) -> str:
    """Of names and contents; contents that did not change since the last time are not read."""
    memory = cache_folder() / "digests.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    whole = hashlib.sha256()
    for file in files:
        status = file.stat()
        place = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
        if place not in known:
            known[place] = sha256(file)
        whole.update(f"{file.parent.name}/{file.name} {known[place]}\n".encode())
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_name(f"{memory.name}.{hashlib.sha256(str(known).encode()).hexdigest()}")
    temporary.write_text(json.dumps(known), encoding="utf-8")
    temporary.replace(memory)
    return whole.hexdigest()
