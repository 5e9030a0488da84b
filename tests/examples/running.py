"""The examples run as a user would, and what they have to print."""

import json
import subprocess
from pathlib import Path

from cases import batches
from tokenizers import Tokenizer, models, pre_tokenizers

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


def words(tokens: list[int]) -> str:
    """Token ids as the text that ``write_tokenizer``'s tokenizer makes of them."""
    return " ".join(f"word{token}" for token in tokens)


def write_tokenizer(folder: Path, size: int = 320) -> None:
    """A tokenizer whose words name their ids."""
    vocabulary = {f"word{n}": n for n in range(size)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "word0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
