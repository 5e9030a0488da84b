"""A run of the float model over some text, to see what its activations are like."""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_core.checkpoint.tokenizer import check_tokens
from tokenizers import Tokenizer

from parscale_export.builder import Builder, Options
from parscale_export.graph import build
from parscale_export.runtime.session import CPU
from parscale_export.smooth import Progress, Site

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")
CHUNK = 256  # tokens of a run
ROWS = 2048  # how many rows (streams times tokens) are enough
FEWEST = 32  # tokens of a text
SAMPLES = 128  # how many of them are kept


def calibration_tokens(checkpoint: Checkpoint, text: Path | None) -> list[list[int]]:
    """Chunks of ``text`` (by default ours) in the model's tokens.

    A model without a tokenizer, or with one that is not for such a text, is run over arbitrary
    tokens, unless a text is given.

    Raises:
        ValueError: the text is too short or not UTF-8, or there is no tokenizer for it, or one with
            tokens that the model lacks.
        FileNotFoundError: there is no such text.
    """
    file, config = checkpoint.folder / "tokenizer.json", checkpoint.config
    count = max(ROWS // config.streams, 2 * CHUNK)
    ids: list[int] = []
    if text is not None:
        if not file.is_file():
            raise ValueError(f"{checkpoint.folder}: no tokenizer.json to read {text} with")
        ids = _encode(file, text)[:count]
        check_tokens(ids, config.vocab_size)
        if len(ids) < FEWEST:
            raise ValueError(
                f"{text}: {len(ids)} tokens are too few to calibrate with; give {FEWEST} or more"
            )
    elif file.is_file():
        # A tokenizer may have tokens that its model lacks.
        ids = [token for token in _encode(file, DEFAULT_TEXT) if token < config.vocab_size][:count]
    if len(ids) < FEWEST:
        random = np.random.default_rng(0)
        ids = random.integers(0, config.vocab_size, count).tolist()
    size = min(CHUNK, config.max_position_embeddings)
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [chunk for chunk in chunks if len(chunk) == size or len(chunks) == 1]


def _encode(tokenizer: Path, text: Path) -> list[int]:
    if not text.is_file():
        raise FileNotFoundError(f"{text}: no such file to calibrate with")
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: not UTF-8 text: {error}") from error
    return Tokenizer.from_file(str(tokenizer)).encode(content).ids


def observe(
    checkpoint: Checkpoint,
    chunks: list[list[int]],
    work: Path,
    progress: Progress | None = None,
) -> list[Site]:
    """Run the float32 model over chunks of tokens, and see what its layers' products read.

    Args:
        work: a folder for the float graph, which is as large as the model in float32.
    """
    config = checkpoint.config
    rows = sum(map(len, chunks)) * config.streams
    observed: dict[str, tuple[str, ...]] = {}

    def outputs(b: Builder) -> list[ir.Value]:
        values = []
        for x, modules in b.products.items():
            if not modules[0].startswith("model.layers."):
                continue  # see ``smooth``: there is nothing before them to take the scales
            columns = checkpoint.shape(f"{modules[0]}.weight")[1]
            flat = b("Reshape", x, b.constant([-1, columns]))
            sample = b(
                "Slice", flat, b.constant([0]), b.constant([rows]), b.constant([0]),
                b.constant([max(1, rows // SAMPLES)]),
            )  # fmt: skip
            observed[modules[0]] = tuple(modules)
            sample.name, sample.type = modules[0], ir.TensorType(ir.DataType.FLOAT)
            values.append(sample)
        return values

    options = Options(ops="standard" if config.head_dim % 16 else "fused")
    model = build(checkpoint, options, observe=outputs)
    RemoveUnusedNodesPass()(model)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        file = Path(folder) / "float.onnx"
        ir.save(model, file, external_data="float.data", size_threshold_bytes=1024)
        seen = _run(file, chunks, config.streams, progress)
    return [
        Site(modules, np.concatenate([values.pop(name) for values in seen]))
        for name, modules in observed.items()
    ]


def _run(
    file: Path, chunks: list[list[int]], streams: int, progress: Progress | None
) -> list[dict[str, np.ndarray]]:
    """The graph's outputs by name, for each chunk."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # The weights then stay in their file, mapped, and are not copied.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(str(file), options, providers=[CPU])
    feed = {
        value.name: np.zeros((streams, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [output.name for output in session.get_outputs()]
    seen = []
    for chunk in chunks:
        ids = np.array([chunk])
        feed |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        seen.append(dict(zip(names, session.run(None, feed), strict=True)))
        if progress is not None:
            progress("calibrating", len(seen), len(chunks))
    return seen
