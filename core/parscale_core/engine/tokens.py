"""What an engine's requests need to know of its model's tokens, made when it is first needed."""

import threading
from functools import cached_property

from llguidance import LLTokenizer

from parscale_core.engine.grammar import GrammarMatcher, grammar_tokenizer
from parscale_core.engine.protocol import Engine
from parscale_core.engine.request import Request
from parscale_core.engine.state import RequestState


class ModelTokens:
    """The tokens of one engine's model."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._lock = threading.Lock()

    def state(self, request: Request) -> RequestState:
        engine = self.engine
        return RequestState(request, engine.tokenizer, engine.end_tokens, engine.context_length)

    def matcher(self, request: Request) -> GrammarMatcher | None:
        """What says which tokens may come next, if a grammar does.

        Raises:
            ValueError: the grammar or the tokenizer cannot be used.
        """
        if request.grammar is None:
            return None
        with self._lock:
            vocabulary = self._vocabulary
        return GrammarMatcher(vocabulary, request.grammar, self.engine.vocab_size)

    @cached_property
    def spared(self) -> list[int]:
        """Tokens that XTC never leaves out: those that end a line or a text."""
        newline = self.engine.tokenizer.encode("\n", add_special_tokens=False)
        return sorted(self.engine.end_tokens | set(newline))

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        engine = self.engine
        return grammar_tokenizer(engine.tokenizer, engine.vocab_size, engine.end_tokens)
