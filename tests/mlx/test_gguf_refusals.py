"""GGUF files that are wrong or say what is not understood: one line that names the key."""

import resource
import subprocess
import sys
import time

from parscale_mlx.convert import convert
from parscale_mlx.load import load_model

import numpy as np
import pytest
from helpers.gguf_files import random_weights, write_gguf
from helpers.llama_cpp import words
from test_gguf import byte_tokenizer, failure

HEADS = "llama.attention.head_count"


def changed(key, value):
    """For a GGUF writer, one key with another value; None takes it away."""

    def add(writer):
        values = writer.kv_data[0]
        values.pop(key, None)
        if value is None:
            return
        whole = "int32" if isinstance(value, int) and value < 0 else "uint32"
        kinds = [(bool, "bool"), (str, "string"), (int, whole), (float, "float32")]
        kind = next((kind for own, kind in kinds if isinstance(value, own)), "array")
        getattr(writer, f"add_{kind}")(key, value)

    return add


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        (HEADS, [4, 2], "the same in every layer"),
        (HEADS, "four", "a whole number"),
        (HEADS, 4.0, "a whole number"),
        (HEADS, 0, "at least 1"),
        (HEADS, 8, "self_attn.k_proj.weight has shape"),
        ("llama.block_count", 1, "the 2 of the tensors"),
        ("llama.block_count", 4_000_000_000, "the 2 of the tensors"),
        ("llama.feed_forward_length", 4_000_000_000, "mlp.gate_proj.weight has shape"),
        ("llama.embedding_length", 4_000, "shape"),
        ("llama.context_length", None, "has no llama.context_length"),
        ("llama.vocab_size", 7, "the 320 of the tensors"),
        ("llama.attention.value_length", 8, "the 16 of the keys"),
        ("llama.attention.sliding_window", 128, "the only value"),
        ("llama.attention.causal", False, "the only value"),
        ("llama.attention.scale", 0.5, "the only value"),
        ("llama.logit_scale", 0.125, "the only value"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "a number"),
        ("llama.attention.q_lora_rank", 8, "is not understood"),
        ("llama.rope.freq_base", "big", "a number"),
        ("llama.rope.freq_base", 0.0, "more than 1"),
        ("llama.rope.scaling.type", "longrope", "not one of none, linear, yarn"),
        ("llama.rope.scaling.attn_factor", 0.5, "the type is not yarn"),
        ("llama.rope.scaling.yarn_beta_fast", 16.0, "the only value"),
        ("llama.rope.scaling.factor", -2.0, "a positive number"),
        ("general.type", "adapter", "where a model is needed"),
        ("general.architecture", 5, "a text"),
    ],
)
def test_metadata(tmp_path, key, value, word):
    metadata = [words, changed(key, value)]
    line = failure(write_gguf(tmp_path / "m.gguf", *random_weights(), metadata=metadata))
    assert word in line and any(name in line for name in (key, "shape", "head_dim"))


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("logit_scale", None, "has no granite.logit_scale"),
        ("logit_scale", 0.0, "logits_scaling is 0"),
        ("attention.scale", -0.5, "attention_multiplier is -0.5"),
        ("embedding_scale", "big", "a number"),
        ("rope.scaling.finetuned", False, "rotary embedding is used"),
        ("final_logit_softcapping", 30.0, "the only value"),
    ],
)
def test_metadata_of_granite(tmp_path, key, value, word):
    metadata = [words, changed("granite.logit_scale", 2.0), changed(f"granite.{key}", value)]
    kind = {"architecture": "granite", "metadata": metadata}
    assert word in failure(write_gguf(tmp_path / "m.gguf", *random_weights(), **kind))


def test_equal_arrays_are_one_value(tmp_path):
    metadata = [changed(HEADS, [4, 4]), changed("llama.feed_forward_length", [96, 96])]
    file = write_gguf(tmp_path / "m.gguf", *random_weights(), metadata=metadata)
    convert(file, tmp_path / "out")
    _, config = load_model(tmp_path / "out")
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 96)


TOKENS = [f"t{n}" for n in range(320)]


@pytest.mark.parametrize(
    ("kind", "key", "value", "word"),
    [
        ("gpt2", "merges", None, "a byte-level vocabulary needs"),
        ("gpt2", "merges", [], "a byte-level vocabulary needs"),
        ("gpt2", "merges", ["1 2", "1 2 3"], "'1 2 3' does not join"),
        ("gpt2", "merges", ["1 2", "12"], "'12' does not join"),
        ("gpt2", "merges", ["q zzz"], "'q zzz' does not join"),
        ("gpt2", "merges", [1, 2], "a list of texts"),
        ("gpt2", "eos_token_id", 999, "one of the 320 tokens"),
        ("gpt2", "bos_token_id", -7, "at least -1"),
        ("gpt2", "padding_token_id", "0", "a whole number"),
        ("gpt2", "add_bos_token", 1, "true or false"),
        ("gpt2", "pre", 3, "a text"),
        ("gpt2", "token_type", [1, 2, 3], "3 numbers, but there are 320 tokens"),
        ("gpt2", "tokens", "abc", "a list of texts"),
        ("llama", "scores", None, "has no tokenizer.ggml.scores"),
        ("llama", "scores", [0.0, 1.0], "2 numbers, but there are 320 tokens"),
        ("llama", "unknown_token_id", 320, "one of the 320 tokens"),
        ("llama", "tokens", [*TOKENS[:-1], "t0"], "'t0' twice, as 0 and 319"),
        ("llama", "tokens", [*TOKENS, "more"], "321 tokens, but the embedding only 320 rows"),
    ],
)
def test_tokenizers(tmp_path, kind, key, value, word):
    vocabulary = words if kind == "llama" else byte_tokenizer(size=320)
    change = changed(f"tokenizer.ggml.{key}", value)
    file = write_gguf(tmp_path / "m.gguf", *random_weights(), metadata=[vocabulary, change])
    line = failure(file)
    assert word in line and f"tokenizer.ggml.{key}" in line


def test_an_id_that_stands_for_none(tmp_path):
    unset = changed("tokenizer.ggml.padding_token_id", 0xFFFFFFFF)
    file = write_gguf(tmp_path / "m.gguf", *random_weights(), metadata=[words, unset])
    assert convert(file, tmp_path / "out").streams == 1


FUZZ = """
import resource, sys
from pathlib import Path
from parscale_mlx.convert import convert
for file in map(Path, sys.argv[1:]):
    for dry_run in (True, False):
        try:
            convert(file, file.with_suffix(""), dry_run=dry_run)
        except (ValueError, OSError) as error:
            assert "\\n" not in str(error) and file.name in str(error), repr(error)
    print(file.name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


def mutations(data: bytes, count: int, header: int):
    """Bytes flipped, numbers made extreme, pieces cut out, doubled or swapped; fixed seed."""
    random = np.random.default_rng(0)
    extremes = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
    for n in range(count):
        changed = bytearray(data)
        # Most of what can go wrong is in the header.
        end = header if n % 5 else len(data)
        for _ in range(int(random.integers(1, 4))):
            at = int(random.integers(4, end - 16))
            size = int(random.integers(1, 16))
            match n % 4:
                case 0:
                    changed[at] ^= 1 << int(random.integers(8))
                case 1:
                    value = extremes[int(random.integers(len(extremes)))]
                    changed[at : at + 8] = value.to_bytes(8, "little")
                case 2:
                    del changed[at : at + size]
                case 3:
                    changed[at:at] = changed[at : at + size]
        yield bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mutated_files(tmp_path, kind):
    """No traceback, no hang, and no more than 1 GB of memory."""
    vocabulary = words if kind == "llama" else byte_tokenizer(size=320)
    whole = write_gguf(tmp_path / "whole.gguf", *random_weights(), metadata=[vocabulary])
    data = whole.read_bytes()
    header = data.rindex(b"output_norm.weight") + 64
    files = []
    for n, changed_data in enumerate(mutations(data, 150, header)):
        files.append(tmp_path / f"{n}.gguf")
        files[-1].write_bytes(changed_data)
    limit = 4 << 30  # an allocation beyond it fails, before this machine's memory is gone
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {lines[-1:]}: {done.stderr[-2000:]}"
    assert len(lines) == 150 and time.monotonic() - started < 300
    # What the process needs for a file that is whole, and 1 GB.
    assert max(int(size) for _, size in lines) < (1 << 20) + 600_000
