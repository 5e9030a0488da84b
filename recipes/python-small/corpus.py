"""The training text: the source of Python's standard library, cut into three parts by file.

``train`` is learnt from. ``tune`` is what the runs are evaluated on while they go and what settings
were chosen by. ``held-out`` is measured once, at the end.
"""

import hashlib
import json
import platform
import shutil
import sysconfig
from pathlib import Path

from plan import Plan
from transformers import Qwen2Tokenizer

HELD_OUT, TUNE = 0.05, 0.05  # shares of the files
# Tables, not programs: they would only teach to count.
LEFT_OUT = {"site-packages", "encodings", "pydoc_data", "__pycache__", "lib2to3"}
# It is no chat model: what is said so far is text to go on with.
CONTINUE = "{{ messages | map(attribute='content') | join('\\n') }}"
SAMPLE_BYTES = 8_000_000  # of text that the tokenizer learns from


def prepare(work: Path, plan: Plan) -> None:
    """Write ``corpus`` in its three parts, and ``config`` with tokenizer and sizes."""
    if (work / "config").is_dir():
        return
    shutil.rmtree(work / "corpus", ignore_errors=True)
    files = copy_source(work / "corpus", plan.corpus_bytes)
    print(f"{len(files)} files of Python {platform.python_version()}'s library", flush=True)
    new = work / "config.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    tokenizer = train_tokenizer(work / "corpus" / "train", plan.vocabulary)
    tokenizer.chat_template = CONTINUE
    tokenizer.save_pretrained(new)
    (new / "config.json").write_text(json.dumps(model_config(plan), indent=4))
    new.rename(work / "config")


def copy_source(corpus: Path, limit: int) -> list[Path]:
    """Copy the library's files; which are held out follows from their names alone.

    Args:
        limit: take about this many bytes only.
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen, size = [], 0
    # In the order of a hash, so that a part of the files is a fair sample.
    for file in sorted(root.rglob("*.py"), key=lambda f: _hash(f.relative_to(root))):
        path = file.relative_to(root)
        text = file.read_bytes()
        if LEFT_OUT & set(path.parts) or not text.strip() or not _is_utf8(text):
            continue
        if size > limit:
            break
        target = corpus / _part(path) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)
        chosen.append(path)
        size += len(text)
    return chosen


def train_tokenizer(folder: Path, vocabulary: int) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen2's way of cutting text into words."""

    def texts():
        size = 0
        for file in sorted(folder.rglob("*.py"), key=lambda f: _hash(f.relative_to(folder))):
            text = file.read_text(encoding="utf-8")
            yield text
            size += len(text)
            if size > SAMPLE_BYTES:
                return

    return Qwen2Tokenizer().train_new_from_iterator(texts(), vocab_size=vocabulary)


def model_config(plan: Plan) -> dict:
    """The ``config.json`` of the decoder."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": plan.hidden_size,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads,
        "num_key_value_heads": plan.kv_heads,
        "intermediate_size": plan.intermediate_size,
        "vocab_size": plan.vocabulary,
        "max_position_embeddings": plan.seq_length,  # it has not learnt to look back any further
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def _part(path: Path) -> str:
    place = _hash(path) % 1000 / 1000
    if place < HELD_OUT:
        return "held-out"
    return "tune" if place < HELD_OUT + TUNE else "train"


def _hash(path: Path) -> int:
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
