"""What is asked of an engine, and what it answers piece by piece."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; temperature 0 is greedy decoding.

    Attributes:
        max_tokens: new tokens at most.
        temperature: of the softmax over the logits; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that together have this probability, (0, 1].
        top_k: sample from this many likeliest tokens; 0 for all.
        min_p: leave out tokens less likely than this share of the likeliest, [0, 1].
        xtc_probability, xtc_threshold: as mlx-lm's sampler of that name.
        repetition_penalty: divide the logits of recent tokens by this; 1 changes nothing.
        presence_penalty: subtract this from the logits of recent tokens.
        frequency_penalty: subtract this for each time that a token occurred recently.
        repetition_context, presence_context, frequency_context: how many recent tokens (prompt
            and answer) the penalty looks at.
        logit_bias: added to the logits, by token id.
        seed: of this request's own random numbers, any integer of 64 bits; None for another each
            time.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_context: int = 20
    presence_context: int = 20
    frequency_context: int = 20
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to answer. Nothing of it is shared with another request.

    Attributes:
        prompt: token ids, at least one.
        streams: P; None for the engine's default.
        sampling: how tokens are chosen.
        stop: the answer ends before the first of these texts.
        ignore_end: go on after end-of-text tokens.
        logprobs: None for none, else how many likeliest tokens to tell besides each chosen one
            (0 to 20). Log-probabilities are those of the model's own distribution, before
            penalties, bias, grammar and temperature.
        stream_weights: tell the P streams' weights of each token.
        grammar: an llguidance grammar (its serialised form, see ``parscale_core.engine.grammar``)
            that the answer must follow.
        draft: what drafts tokens in speculative decoding: a number of streams over the same
            backbone, "ngram" for the prompt's own text, "model" for the engine's draft model; None
            for no draft.
        num_draft_tokens: tokens to draft at a time.
        deadline: on ``time.monotonic()``'s clock; the answer ends with "timeout" after it.
    """

    prompt: Sequence[int]
    streams: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None
    stream_weights: bool = False
    grammar: str | None = None
    draft: int | Literal["ngram", "model"] | None = None
    num_draft_tokens: int = 3
    deadline: float | None = None


@dataclass(frozen=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Piece:
    """What one generated token adds to an answer.

    Attributes:
        token: its id; None on a last piece that ends an answer between tokens (it was cancelled, or
            its time was over, before a token came).
        text: the text that became final with it: empty where characters, or what may become a stop
            string, are incomplete. The texts of an answer, joined, are its tokens decoded together
            (up to a stop string, without end-of-text tokens).
        finish_reason: on an answer's last piece, None before.
        logprob: the token's own, where asked for.
        top_logprobs: the likeliest tokens, most likely first.
        stream_weights: P numbers that add up to 1, where asked for.
        drafted: the token came from a draft.
        cached_tokens: on an answer's first piece, tokens of the prompt that were not computed anew.
    """

    token: int | None
    text: str
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[Logprob, ...] = ()
    stream_weights: tuple[float, ...] | None = None
    drafted: bool = False
    cached_tokens: int = 0
