"""The tokenizer that a GGUF file describes, as the ``tokenizer.json`` that transformers reads.

A GGUF file holds a vocabulary, merges and the *name* of the rule that splits text into words; the
rules themselves are in llama.cpp. Those of Llama- and Qwen2-family models are here.
"""

from pathlib import Path
from typing import Any

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

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

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


def save_tokenizer(file: Path, metadata: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer and chat template of a GGUF file; nothing where it has none.

    Raises:
        ValueError: its kind of vocabulary or its rule for splitting text is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in metadata:
        return
    if kind == "gpt2":
        tokenizer = _byte_level(file, metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise ValueError(f"{file}: tokenizer.ggml.model {kind!r} is not one of gpt2, llama")
    tokens = metadata["tokenizer.ggml.tokens"]
    _add_whole_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    named = {}
    for name, key in dict(bos="bos", eos="eos", unk="unknown", pad="padding").items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            named[f"{name}_token"] = tokens[number]
    if _starts_with_bos(metadata) and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    ).save_pretrained(folder)


def _byte_level(file: Path, metadata: dict[str, Any]) -> Tokenizer:
    vocabulary = {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    rule = _rule(metadata)
    # Llama 3's vocabulary has words that its merges do not lead to.
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
        raise ValueError(f"{file}: how tokenizer.ggml.pre {rule!r} splits text is not known")
    return tokenizer


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = Regex(SPLIT.replace("DIGITS", digits))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges(vocabulary, metadata["tokenizer.ggml.scores"])
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        steps + ([decoders.Strip(content=" ", left=1, right=0)] if prefix else [])
    )
    return tokenizer


def _merges(vocabulary: dict[str, int], scores) -> list[tuple[str, str]]:
    # SentencePiece joins whichever neighbours make the token of the highest score.
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                pair = (vocabulary[left], vocabulary[right])
                ranked.append((-float(scores[number]), *pair, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _rule(metadata: dict[str, Any]) -> str:
    rule = metadata.get("tokenizer.ggml.pre")
    if rule is None and metadata["general.architecture"] == "qwen2":
        return "qwen2"
    return rule or "(missing)"


def _starts_with_bos(metadata: dict[str, Any]) -> bool:
    usual = metadata["tokenizer.ggml.model"] == "llama" or _rule(metadata) in LLAMA3
    return bool(metadata.get("tokenizer.ggml.add_bos_token", usual))


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types) -> None:
    # These are matched in the text before it is split into words.
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        whole = [
            AddedToken(token, normalized=False, special=special)
            for token, number in zip(tokens, types, strict=False)
            if number == kind
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(whole)
