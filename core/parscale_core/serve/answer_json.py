"""JSON as it goes back to clients."""

import json
from typing import Any

from starlette.responses import JSONResponse


class AnswerJson(JSONResponse):
    """JSON in ASCII: what a client sent may hold half a surrogate pair, which UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()
