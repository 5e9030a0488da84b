"""An engine that says what it is told: the server's part of an answer, without a model."""

from collections.abc import Callable
from typing import Any

from parscale_core.engine import Answer, Request, RequestState, check


class ScriptedEngine:
    """Answers each request with a text, a token at a time, while ``submit`` runs.

    Args:
        say: from a prompt's text to the answer's.
    """

    context_length, streams, drafts = 1 << 16, (1,), ()
    gives_stream_weights, name = True, "a script"

    def __init__(self, tokenizer: Any, say: Callable[[str], str]):
        self.tokenizer, self.say = tokenizer, say
        self.end_tokens = frozenset({tokenizer.eos_token_id})
        self.vocab_size = len(tokenizer)

    def submit(self, request: Request) -> Answer:
        check(request, self)
        state = RequestState(request, self.tokenizer, self.end_tokens, self.context_length)
        answer = Answer(state)
        said = self.say(self.tokenizer.decode(request.prompt))
        for token in [*self.tokenizer.encode(said), *self.end_tokens]:
            if state.finish_reason is None:
                answer.put(state.push(token))
        return answer

    def statistics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
