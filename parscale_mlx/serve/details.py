"""What an answer tells of its tokens besides their text: log probabilities and streams."""

from dataclasses import dataclass
from typing import Any

from parscale_mlx.taps import Piece

from mlx_lm.server import Response
from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass
class Token:
    """A generated token: as mlx-lm's server has it, and what it adds to the answer."""

    response: Response
    piece: Piece


def streams(tokens: list[Token], tokenizer: TokenizerWrapper) -> list[dict[str, Any]]:
    """Each token with the weights of the P streams that gave it."""
    return [
        {
            "id": token.response.token,
            "token": tokenizer.decode([token.response.token]),
            "text": token.piece.text,
            "weights": [round(weight, 6) for weight in token.piece.streams or []],
        }
        for token in tokens
    ]


def logprobs(tokens: list[Token], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """As OpenAI's chat completions have them, and token ids."""
    return {
        "content": [
            _entry(token.response.token, token.response.logprob, tokenizer)
            | {
                "top_logprobs": [
                    _entry(top["id"], top["logprob"], tokenizer) for top in _tops(token)
                ]
            }
            for token in _spoken(tokens, tokenizer)
        ]
    }


def old_logprobs(tokens: list[Token], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """As OpenAI's completions have them, where ``logprobs`` is a number."""
    spoken = _spoken(tokens, tokenizer)
    return {
        "tokens": [tokenizer.decode([token.response.token]) for token in spoken],
        "token_logprobs": [token.response.logprob for token in spoken],
        "top_logprobs": [
            {tokenizer.decode([top["id"]]): top["logprob"] for top in _tops(token)}
            for token in spoken
        ],
    }


def _entry(token: int, logprob: float, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"id": token, "token": text, "bytes": list(text.encode()), "logprob": logprob}


def _tops(token: Token) -> list[Any]:
    return sorted(token.response.top_tokens, key=lambda top: -top["logprob"])


def _spoken(tokens: list[Token], tokenizer: TokenizerWrapper) -> list[Token]:
    return [token for token in tokens if token.response.token not in tokenizer.eos_token_ids]
