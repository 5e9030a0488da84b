"""An answer's text while its tokens come: the tokens decoded together, as far as that is final."""

import re
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer:
    """Decodes tokens one at a time; the texts joined are all tokens decoded together.

    What may still change is held back: the bytes of a character that is not complete, and, in
    vocabularies whose decoder falls back to bytes, a run of byte tokens (one wrong byte makes all
    of a run unreadable).

    Args:
        tokenizer: a transformers tokenizer. Spaces are never cleaned up and special tokens are
            text, whatever its settings: the text is for programs, too.
    """

    def __init__(self, tokenizer: Any):
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        self.tokenizer = tokenizer
        # Tokens whose text is out already, kept because some decoders drop a first space, and
        # the tokens held back.
        self.before: list[int] = []
        self.held: list[int] = []
        self.shown = 0

    def push(self, token: int) -> str:
        """Add a token; return the text that became final with it."""
        self.held.append(token)
        text = self._decode(self.before + self.held)
        if len(text) <= self.shown or text.endswith("\ufffd") or self._is_byte(token):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """The text of what was held back, at the end of an answer."""
        return self._take(self._decode(self.before + self.held)) if self.held else ""

    def _take(self, text: str) -> str:
        new = text[self.shown :]
        self.before, self.held = self.held, []
        self.shown = len(self._decode(self.before))
        return new

    def _decode(self, tokens: list[int]) -> str:
        if self.backend is not None:
            return self.backend.decode(tokens, skip_special_tokens=False)
        return self.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _is_byte(self, token: int) -> bool:
        source = self.backend.id_to_token if self.backend else self.tokenizer.convert_ids_to_tokens
        return _BYTE.fullmatch(source(token) or "") is not None
