"""Tiny model folders with a tokenizer, and what an error of the command looks like."""

import json
from pathlib import Path

from click.testing import Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

GOLDEN = Path(__file__).parent.parent / "golden"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path, *, template: bool = True, size: int = 320) -> None:
    """A tokenizer of ASCII's characters and made-up words, so that any tokens make a text.

    The end of text is the last word, which the tiny models hardly ever say.
    """
    tokens = ["<unk>", "<s>", "</s>", "Ċ", "Ġ", *map(chr, range(33, 127))]
    tokens += [f"word{n}" for n in range(len(tokens), size)]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": tokens[-1],
        "chat_template": TEMPLATE if template else None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    set_eos(folder, len(tokens) - 1)


def set_eos(folder: Path, token: int) -> None:
    """Say in config.json which token ends a text."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": token}))


def error_line(result: Result) -> str:
    """The one line of an error: nothing else on stderr but Click's usage, no traceback."""
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, result.stderr
    return lines[0]
