"""Answers that follow a grammar: a JSON schema, a regular expression or a Lark grammar.

A grammar travels as llguidance's serialised form (text); each row of a batch has a matcher of its
own, which says which tokens may come next.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from parscale_core.error_text import one_line

NO_TOKEN = "grammar: this model has no token for what must come next"
# One line, as json.dumps writes it: free white space lets a model write blanks for ever.
_JSON_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def from_json_schema(schema: Mapping[str, Any] | bool | str) -> str:
    """The grammar of the JSON texts that a schema allows.

    Raises:
        ValueError: not a JSON schema, or it uses what cannot be followed exactly.
    """
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
    except ValueError as error:
        raise ValueError(f"JSON schema: not JSON: {error}") from error
    if parsed is True:
        parsed = {}
    if not isinstance(parsed, Mapping):
        raise ValueError("JSON schema: must be an object")
    if "x-guidance" in parsed:  # its own: how white space is written, and more
        raise ValueError("JSON schema: x-guidance is not a key of schemas")
    try:
        grammar = LLMatcher.grammar_from_json_schema(dict(parsed), overrides=_JSON_LAYOUT)
    except ValueError as error:
        raise ValueError(f"JSON schema: {one_line(error)}") from error
    return checked(grammar, "JSON schema")


def from_regex(regex: str) -> str:
    """The grammar of the texts that a regular expression matches as a whole.

    Raises:
        ValueError: it is not one, or looks around or back.
    """
    return checked(LLMatcher.grammar_from_regex(regex), "regular expression")


def from_lark(lark: str) -> str:
    """The grammar that a text in Lark's language (llguidance's variant of it) describes.

    Raises:
        ValueError: it cannot be read.
    """
    return checked(LLMatcher.grammar_from_lark(lark), "Lark grammar")


def from_text(text: str) -> str:
    """A Lark grammar if a line of the text begins a rule ``start``, else a regular expression.

    Raises:
        ValueError: it cannot be read as what it is.
    """
    if re.search(r"^\s*\??start\b[^:\n]*:", text, re.MULTILINE):
        return from_lark(text)
    return from_regex(text.removesuffix("\n").removesuffix("\r"))


def checked(grammar: str, what: str = "grammar") -> str:
    """A serialised grammar, unchanged.

    Raises:
        ValueError: it is not one that can be followed.
    """
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise ValueError(f"{what}: {one_line(messages[0])}")
    return grammar


def grammar_tokenizer(tokenizer: Any, vocab_size: int, end_tokens: Collection[int]) -> LLTokenizer:
    """What matchers know of a vocabulary; takes about a second, so make it once a model.

    Args:
        tokenizer: a transformers tokenizer over the tokenizers library.
        vocab_size: columns of the logits.

    Raises:
        ValueError: the tokenizer is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("grammar: needs a tokenizer that has a tokenizer.json")
    text = json.loads(backend.to_str())
    text["truncation"] = text["padding"] = None
    size = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
    try:
        return LLTokenizer(json.dumps(text), n_vocab=size, eos_token=sorted(end_tokens))
    except ValueError as error:
        raise ValueError(f"grammar: this tokenizer cannot be used: {one_line(error)}") from error


class GrammarMatcher:
    """Says which tokens may come next in one answer.

    Args:
        tokenizer: from ``grammar_tokenizer``.
        grammar: serialised.
        vocab_size: columns of the logits.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, vocab_size: int):
        self.matcher = LLMatcher(tokenizer, grammar, log_level=0)  # errors are raised here
        self.vocab_size = vocab_size
        self.consumed: list[int] = []
        self._check()

    def allowed(self, answer: Sequence[int]) -> np.ndarray | None:
        """Which tokens may follow an answer's tokens, bool [vocab_size].

        None where these tokens do not follow the grammar themselves, as drafts may not. Answers may
        be asked for in any order; one that goes on where the last ended costs least.

        Raises:
            ValueError: the grammar became too complex to follow, or no token can follow it.
        """
        common = 0
        for ours, theirs in zip(self.consumed, answer, strict=False):
            if ours != theirs:
                break
            common += 1
        if common < len(self.consumed):
            self.matcher.rollback(len(self.consumed) - common)
            del self.consumed[common:]
        new = list(answer[common:])
        if self.matcher.validate_tokens(new) < len(new):
            self._check()
            return None
        self.matcher.consume_tokens(new)
        self.consumed += new
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(bool)
        if not allowed.any() and not self.matcher.is_stopped():
            raise ValueError(NO_TOKEN)
        return allowed

    def _check(self) -> None:
        if self.matcher.is_error():
            error, _, _ = self.matcher.get_error().partition("<state>")
            is_stuck = error.startswith("NoExtension")
            raise ValueError(NO_TOKEN if is_stuck else f"grammar: {one_line(error)}")
