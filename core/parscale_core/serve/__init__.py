"""HTTP over any engine: OpenAI's API, Anthropic's, and a page to chat on.

``server`` listens, ``access`` says who may ask, ``app`` knows the paths. A request's way: ``body``
reads it, one of ``chat_completions``, ``completions``, ``responses`` and ``messages`` says what it
asks (``ask``, ``prompt``) and how its answer is written, and ``turn`` has the engine answer it.
"""
