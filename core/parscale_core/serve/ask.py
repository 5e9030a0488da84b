"""From a request's fields to what the engine is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parscale_core.engine import Request, Sampling
from parscale_core.engine.grammar import from_json_schema
from parscale_core.serve.api_errors import RequestFailed
from parscale_core.serve.fields import Generation

MOST_ANSWERS = 128
OBJECT = {"type": "object"}  # the schema of any JSON object
ALL = 1 << 20  # tokens that a penalty looks back on, where a request says 0


@dataclass
class Ask:
    """What one HTTP request asks, whichever its API.

    Attributes:
        general: how to answer.
        prompts: token ids of each.
        n: answers to each.
        logprobs: likeliest tokens to tell, None for no logprobs.
        grammar: that the answers follow.
        limit: the field that says how many tokens an answer may have.
        tools: that the answers may call, as OpenAI's chat has them.
    """

    general: Generation
    prompts: list[list[int]]
    n: int = 1
    logprobs: int | None = None
    grammar: str | None = None
    limit: str = "max_tokens"
    tools: Sequence[dict[str, Any]] = ()


def json_grammar(schema: Mapping[str, Any], field: str) -> str:
    """The grammar of the JSON texts that a request's schema allows.

    Args:
        field: that has it, for errors.

    Raises:
        RequestFailed: it is no schema that can be followed.
    """
    try:
        return from_json_schema(schema)
    except ValueError as error:
        raise RequestFailed(400, f"{field}: {error}", None, field.partition(".")[0]) from error


def requests_of(ask: Ask, serving: Any, model: str, deadline: float) -> list[Request]:
    """What the engine is asked: each prompt's n answers, one prompt after the other.

    Raises:
        RequestFailed: a field is not what it should be; the message names it.
    """
    general, settings, engine = ask.general, serving.settings, serving.engine
    if ask.n * len(ask.prompts) > MOST_ANSWERS:
        raise RequestFailed(400, f"n: a request may have {MOST_ANSWERS} answers here", None, "n")
    for prompt in ask.prompts:
        _check_prompt(prompt, engine)
    if general.top_k >= engine.vocab_size:
        raise RequestFailed(400, f"top_k must be at most {engine.vocab_size - 1}", None, "top_k")
    streams = serving.names.streams[model]
    drafted = settings.num_draft_tokens
    if general.num_draft_tokens is not None:
        drafted = general.num_draft_tokens
    draft = serving.names.draft(general.draft_model, model, settings.draft) if drafted else None
    samplings = _samplings(ask, settings, engine.vocab_size)
    return [
        Request(
            prompt,
            streams=streams,
            sampling=sampling,
            stop=(general.stop,) if isinstance(general.stop, str) else tuple(general.stop),
            logprobs=ask.logprobs,
            stream_weights=general.stream_weights,
            grammar=ask.grammar,
            draft=draft,
            num_draft_tokens=max(1, drafted),
            deadline=deadline,
        )
        for prompt in ask.prompts
        for sampling in samplings
    ]


def _samplings(ask: Ask, settings: Any, vocabulary: int) -> list[Sampling]:
    general, most = ask.general, settings.max_tokens
    if general.max_tokens is not None and not 1 <= general.max_tokens <= most:
        message = f"{ask.limit} must be a whole number from 1 to {most}"
        raise RequestFailed(400, message, None, ask.limit)
    temperature = general.temperature
    fields = dict(
        max_tokens=general.max_tokens or most,
        temperature=settings.temperature if temperature is None else temperature,
        top_p=general.top_p,
        top_k=general.top_k,
        min_p=general.min_p,
        xtc_probability=general.xtc_probability,
        xtc_threshold=general.xtc_threshold,
        # To mlx-lm, 0 is no penalty.
        repetition_penalty=general.repetition_penalty or 1.0,
        presence_penalty=general.presence_penalty,
        frequency_penalty=general.frequency_penalty,
        repetition_context=general.repetition_context_size or ALL,
        presence_context=general.presence_context_size or ALL,
        frequency_context=general.frequency_context_size or ALL,
        logit_bias=_logit_bias(general.logit_bias or {}, vocabulary),
    )
    seeds = [None if general.seed is None else _seed(general.seed + k) for k in range(ask.n)]
    return [Sampling(**fields, seed=seed) for seed in seeds]  # type: ignore[arg-type]


def _seed(seed: int) -> int:
    """Answer k of a request has the seed of an answer by itself whose seed is greater by k."""
    return seed if seed < 2**64 else seed - 2**64


def _logit_bias(bias: dict[str, float], vocabulary: int) -> dict[int, float]:
    is_id = [key.isascii() and key.isdigit() and len(key) < 10 for key in bias]
    if not all(is_id) or any(int(key) >= vocabulary for key in bias):
        message = f"logit_bias must map token ids below {vocabulary} to numbers from -100 to 100"
        raise RequestFailed(400, message, None, "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _check_prompt(prompt: list[int], engine: Any) -> None:
    last, context = engine.vocab_size - 1, engine.context_length
    if not prompt:
        raise RequestFailed(400, "the prompt is empty", None, "prompt")
    if not 0 <= min(prompt) <= max(prompt) <= last:
        message = f"prompt must be text, or token ids from 0 to {last}"
        raise RequestFailed(400, message, None, "prompt")
    if context is not None and len(prompt) >= context:
        raise RequestFailed(
            400,
            f"the prompt has {len(prompt)} tokens; with the answer, this model takes {context}",
            "context_length_exceeded",
        )
