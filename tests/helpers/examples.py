"""The examples run as a user would, and what they have to print."""

import json
import subprocess
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.onnx_cases import batches

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CASES = ["p4", "p8-short-prefix"]


def prompt_and_answer(case: str) -> tuple[list[int], list[int]]:
    """A golden prompt, and the twelve tokens that follow it greedily."""
    batch = batches(case)[-1]
    return batch.prompts[0], batch.tokens[0].tolist()


def run(*command) -> str:
    """What a command prints."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def tokens_option(*prompts: list[int]) -> list[str]:
    return ["--max-tokens", "12", "--tokens", ";".join(",".join(map(str, p)) for p in prompts)]


def word(token: int) -> str:
    """A token id as a capital and a small letter."""
    return "ABCDEFGHIJKLMNOPQRST"[token // 16] + "abcdefghijklmnop"[token % 16]


def words(tokens: list[int]) -> str:
    """Token ids as the text that ``write_tokenizer``'s tokenizer makes of them."""
    return "".join(map(word, tokens))


def write_tokenizer(folder: Path, size: int = 320) -> None:
    """A byte-level BPE tokenizer, as Qwen2 has it, whose tokens are the words of their ids."""
    tokens = [word(n) for n in range(size)]
    letters = sorted(set("".join(tokens)))
    vocabulary = {token: n for n, token in enumerate([*tokens, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(token[0], token[1]) for token in tokens]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": word(0)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
