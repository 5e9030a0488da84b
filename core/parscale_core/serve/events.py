"""Server-sent events."""

import json
from typing import Any

DONE = b"data: [DONE]\n\n"


def data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def named(value: dict[str, Any]) -> bytes:
    """An event that is called what its ``type`` says."""
    return f"event: {value['type']}\ndata: {json.dumps(value)}\n\n".encode()
