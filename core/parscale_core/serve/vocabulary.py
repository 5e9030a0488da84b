"""The bytes that a token stands for, by its entry in the vocabulary."""

import json
import re
from typing import Any

from parscale_core.engine import Piece

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Tokens as bytes and as text; no two of them read alike in one list.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend else ""
        self.of_bytes = "ByteLevel" in decoder
        self.of_spaces = "\\u2581" in decoder or "\u2581" in decoder
        self.added = set(tokenizer.added_tokens_decoder)

    def bytes(self, token: int) -> bytes:
        entry = self.tokenizer.convert_ids_to_tokens(token)
        if entry is None or token in self.added:
            return self.tokenizer.decode([token]).encode()
        if self.of_bytes and all(character in BYTE_OF for character in entry):
            return bytes(BYTE_OF[character] for character in entry)
        if self.of_spaces and (found := BYTE.fullmatch(entry)):
            return bytes([int(found[1], 16)])
        if self.of_spaces:
            return entry.replace("\u2581", " ").encode()
        return self.tokenizer.decode([token]).encode()

    def text(self, token: int) -> str:
        """Its text; of part of a character, its bytes, as OpenAI's completions write them."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def logprobs(self, pieces: list[Piece]) -> dict[str, Any]:
        """As OpenAI's chat completions have them, and token ids."""
        content = []
        for piece in pieces:
            tops = [self._entry(top.token, top.logprob) for top in piece.top_logprobs]
            content.append(self._entry(piece.token, piece.logprob) | {"top_logprobs": tops})
        return {"content": content}

    def old_logprobs(self, pieces: list[Piece], offset: int) -> dict[str, Any]:
        """As OpenAI's completions have them.

        Args:
            offset: characters of the answer before these pieces.
        """
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.text)
        return {
            "tokens": [self.text(piece.token) for piece in pieces if piece.token is not None],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [self._by_text(piece) for piece in pieces],
            "text_offset": offsets,
        }

    def streams(self, pieces: list[Piece]) -> list[dict[str, Any]]:
        """Each token with the weights of the P streams that gave it."""
        return [
            {
                "id": piece.token,
                "token": self.text(piece.token),
                "text": piece.text,
                "weights": [round(weight, 6) for weight in piece.stream_weights or ()],
            }
            for piece in pieces
            if piece.token is not None
        ]

    def _by_text(self, piece: Piece) -> dict[str, float]:
        found: dict[str, float] = {}
        for top in piece.top_logprobs:
            text = self.text(top.token)
            found[f"token_id:{top.token}" if text in found else text] = top.logprob
        return found

    def _entry(self, token: int | None, logprob: float | None) -> dict[str, Any]:
        assert token is not None
        data = self.bytes(token)
        return {"id": token, "token": self.text(token), "bytes": list(data), "logprob": logprob}


def _byte_of() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a character that can be seen (GPT-2's table)."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    table = {chr(byte): byte for byte in seen}
    return table | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _byte_of()
