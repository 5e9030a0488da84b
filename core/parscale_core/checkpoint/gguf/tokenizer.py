"""The tokenizer that a GGUF file describes, as the ``tokenizer.json`` that transformers reads.

A GGUF file holds a vocabulary, merges and the *name* of the rule that splits text into words; the
rules themselves are in llama.cpp. Those of Llama- and Qwen2-family models are here.
"""

from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from parscale_core.checkpoint.gguf.container import GGUF

TOKENS, MERGES, SCORES, TYPES = (
    f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type")
)
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
UNSET = 0xFFFFFFFF  # llama.cpp's LLAMA_TOKEN_NULL, as an id
# Tokens that end a text or a turn by their names, whatever the metadata say (llama.cpp's list).
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
    "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>", "<eos>",
)  # fmt: skip

# Names of tokenizer.ggml.pre, by the rule they stand for.
WORDS = ("gpt-2", "gpt2", "mpt", "olmo", "jais")
WORDS_AND_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
QWEN2 = ("qwen2", "deepseek-r1-qwen", "kormo", "megrez")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "▁"


def end_tokens(file: GGUF) -> list[int]:
    """Ids of the tokens that end a text or a turn, by their key or by their name.

    Raises:
        ValueError: a key names no token.
    """
    tokens = _tokens(file)
    named = [token_id(file, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    by_name = [number for number, token in enumerate(tokens) if token in ENDS]
    return list(dict.fromkeys([*(n for n in named if n is not None), *by_name]))


def save_tokenizer(file: GGUF, rows: int, folder: Path) -> None:
    """Write the tokenizer and chat template of a GGUF file; nothing where it has none.

    Args:
        rows: of the embedding.

    Raises:
        ValueError: its kind of vocabulary or its rule for splitting text is not known, or its
            lists do not fit together; the message names the key.
    """
    kind, tokens = file.text("tokenizer.ggml.model"), _tokens(file)
    if kind is None or kind == "none" or not tokens:
        return
    if len(tokens) > rows:
        raise ValueError(
            f"{file.path}: {TOKENS} has {len(tokens)} tokens, but the embedding only {rows} rows"
        )
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{file.path}: tokenizer.ggml.model {kind!r} is not one of gpt2, llama")
    vocabulary = _vocabulary(file, tokens)
    tokenizer = (_byte_level if kind == "gpt2" else _sentencepiece)(file, vocabulary)
    _add_whole_tokens(tokenizer, tokens, _numbers(file, TYPES, tokens, default=1))
    named = {}
    for name, key in dict(bos="bos", eos="eos", unk="unknown", pad="padding").items():
        number = token_id(file, f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            named[f"{name}_token"] = tokens[number]
    bos, eos = named.get("bos_token"), named.get("eos_token")
    first = [bos] if bos and file.flag("tokenizer.ggml.add_bos_token", _begins(file)) else []
    last = [eos] if eos and file.flag("tokenizer.ggml.add_eos_token", False) else []
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1",
                  *(f"{t}:1" for t in last)],
            special_tokens=[(t, vocabulary[t]) for t in dict.fromkeys(first + last)],
        )  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.text("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    ).save_pretrained(folder)


def _tokens(file: GGUF) -> list[str]:
    tokens = file.metadata.get(TOKENS)
    if tokens is None:
        return []
    if not isinstance(tokens, list):
        raise file.wrong(TOKENS, tokens, "a list of texts")
    return tokens


def _vocabulary(file: GGUF, tokens: list[str]) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if vocabulary.setdefault(token, number) != number:
            raise ValueError(
                f"{file.path}: {TOKENS} has {token!r} twice, as {vocabulary[token]} and {number}"
            )
    return vocabulary


def token_id(file: GGUF, key: str) -> int | None:
    """The token that a key names, or None.

    Raises:
        ValueError: there is no such token.
    """
    number = file.whole(key, least=-1)
    if number in (None, -1, UNSET):
        return None
    count = len(_tokens(file))
    if count and number >= count:
        raise file.wrong(key, number, f"one of the {count} tokens")
    return number


def _numbers(file: GGUF, key: str, tokens: list[str], default: float) -> np.ndarray:
    """An array with a number for each token."""
    values = file.metadata.get(key)
    if values is None:
        return np.full(len(tokens), default)
    if not isinstance(values, np.ndarray):
        raise file.wrong(key, values, "an array of numbers")
    if len(values) != len(tokens):
        raise ValueError(
            f"{file.path}: {key} has {len(values)} numbers, but there are {len(tokens)} tokens"
        )
    return values


def _byte_level(file: GGUF, vocabulary: dict[str, int]) -> Tokenizer:
    rule = _rule(file)
    # Llama 3's vocabulary has words that its merges do not lead to.
    merges = _read_merges(file, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule in LLAMA3))
    tokenizer.decoder = decoders.ByteLevel()
    if rule in WORDS:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif rule in WORDS_AND_DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif rule in QWEN2:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _split(r"\p{N}")
    elif rule in LLAMA3:
        tokenizer.pre_tokenizer = _split(r"\p{N}{1,3}")
    else:
        raise ValueError(f"{file.path}: how tokenizer.ggml.pre {rule!r} splits text is not known")
    return tokenizer


def _read_merges(file: GGUF, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = file.metadata.get(MERGES)
    if not isinstance(merges, list) or not merges:
        raise file.wrong(MERGES, merges, "a list of texts, which a byte-level vocabulary needs")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if any(part not in vocabulary for part in (left, right, left + right)):
            raise ValueError(
                f"{file.path}: {MERGES}: {merge!r} does not join two tokens to a third"
            )
        pairs.append((left, right))
    return pairs


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = Regex(SPLIT.replace("DIGITS", digits))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(file: GGUF, vocabulary: dict[str, int]) -> Tokenizer:
    tokens = _tokens(file)
    unknown = tokens[token_id(file, "tokenizer.ggml.unknown_token_id") or 0]
    if SCORES not in file.metadata:
        raise ValueError(f"{file.path}: the metadata has no {SCORES}, which say what is joined")
    scores = _numbers(file, SCORES, tokens, default=0)
    if not np.isfinite(scores).all():
        raise ValueError(f"{file.path}: {SCORES} has numbers that are not finite")
    merges = _merges(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        steps + ([decoders.Strip(content=" ", left=1, right=0)] if prefix else [])
    )
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    # SentencePiece joins whichever neighbours make the token of the highest score.
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                pair = (vocabulary[left], vocabulary[right])
                ranked.append((-float(scores[number]), *pair, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _rule(file: GGUF) -> str:
    rule = file.text("tokenizer.ggml.pre")
    if rule is None and file.text("general.architecture") in ("qwen2", "qwen3"):
        return "qwen2"
    return rule or "(missing)"


def _begins(file: GGUF) -> bool:
    """Whether a text begins with a token of its own where no key says so."""
    return file.text("tokenizer.ggml.model") == "llama" or _rule(file) in LLAMA3


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: np.ndarray) -> None:
    # These are matched in the text before it is split into words.
    kinds = [CONTROL if t in ENDS else kind for t, kind in zip(tokens, types, strict=True)]
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        whole = [
            AddedToken(token, normalized=False, special=special)
            for token, number in zip(tokens, kinds, strict=True)
            if number == kind
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(whole)
