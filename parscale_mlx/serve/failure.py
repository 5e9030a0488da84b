"""Why a request gets no answer."""


class RequestFailed(BaseException):
    """Ends a request with an HTTP status.

    Like ``asyncio.CancelledError`` it is no ``Exception``: mlx-lm's handler would take any of those
    for a model that does not exist and answer 404.

    Attributes:
        status: 499 for a client that has hung up, as nginx has it.
        code: a word for programs, as OpenAI's ``error.code``.
    """

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    @property
    def kind(self) -> str:
        """OpenAI's ``error.type``."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return kinds.get(self.status, default)


class PromptError(ValueError):
    """A prompt that cannot be answered; raised on the generation thread, told to the client."""

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


HUNG_UP = 499
