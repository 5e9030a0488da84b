"""Small tokenizers that can write any text, a byte a token."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SCRIPTS = [
    "import os",
    "# 中文注释",
    "👩‍👩‍👧‍👦 ü é",
    "   indented",
    "العربية",
    "ไทย",
    "a\u0301\n\t",
]


def byte_level(*special: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """All bytes, each a token, some pairs that are not whole characters, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(alphabet)}
    merges = [("ä", "\u00b8"), ("Ń", "æ"), ("Ġ", "Ġ"), ("ð", "Ł"), ("ĳ", "©")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|end|>", *special)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    made.chat_template = template
    return made


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's: spaces are ▁, characters that have no token are bytes."""
    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁▁", "▁import", *"abcdeos中"]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES, FALLBACK = byte_level(), byte_fallback()
END = BYTES.eos_token_id


def decoded(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
