"""Why a request gets no answer, in each API's words."""

from typing import Any

HUNG_UP = 499  # as nginx has it
OPENAI = {401: "authentication_error", 429: "rate_limit_error"}
ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class RequestFailed(Exception):
    """Ends a request with an HTTP status.

    Attributes:
        code: a word for programs, as OpenAI's ``error.code``.
        param: the field that is wrong.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self, path: str) -> dict[str, Any]:
        """As the API of a path writes errors."""
        if path.startswith("/v1/messages"):
            default = "api_error" if self.status >= 500 else "invalid_request_error"
            kind = ANTHROPIC.get(self.status, default)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = OPENAI.get(self.status, default)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
