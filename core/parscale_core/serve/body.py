"""Read what a request says: bytes, JSON, fields."""

import asyncio
import json
import math
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from parscale_core.error_text import one_line
from parscale_core.serve.api_errors import HUNG_UP, RequestFailed

Schema = TypeVar("Schema", bound=BaseModel)


async def read(request: Request, most: int, seconds: float) -> bytes:
    """A request's body.

    Args:
        most: bytes that it may have.
        seconds: for it to come.

    Raises:
        RequestFailed: it is too long, too short, or too late.
    """
    length = request.headers.get("content-length")
    if length is None and "transfer-encoding" not in request.headers:
        raise RequestFailed(411, "Content-Length header is required")
    too_long = RequestFailed(413, f"a request may have {most} bytes here at most")
    if length is not None and int(length) > most:
        raise too_long

    async def collect() -> bytes:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise too_long
        return bytes(data)

    try:
        data = await asyncio.wait_for(collect(), seconds)
    except asyncio.TimeoutError:
        raise RequestFailed(408, "the request's body did not come in time") from None
    except ClientDisconnect:
        raise RequestFailed(HUNG_UP, "the client has hung up") from None
    if length is not None and len(data) < int(length):
        raise RequestFailed(400, "the request's body is shorter than its Content-Length")
    return data


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object's fields; those that are null are left out.

    Raises:
        RequestFailed: it is not a JSON object.
    """
    try:
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        message = f"Invalid JSON in request body: {one_line(error)}"
        raise RequestFailed(400, message) from error
    if not isinstance(body, dict):
        raise RequestFailed(400, "the request body must be a JSON object")
    return {key: value for key, value in body.items() if value is not None}


def validate(schema: type[Schema], fields: dict[str, Any]) -> Schema:
    """The fields as a schema has them.

    Raises:
        RequestFailed: one is not what it should be; the message names it.
    """
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _explained(error, fields) from error


def _explained(error: ValidationError, fields: dict[str, Any]) -> RequestFailed:
    # Of several ways to read a value, the one that came furthest.
    worst = max(
        error.errors(include_url=False),
        key=lambda e: (len(_path(e["loc"], fields)), not e["type"].endswith("_type")),
    )
    path = _path(worst["loc"], fields)
    name = ".".join(map(str, path))
    message = one_line(worst["msg"])
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    if worst["type"] == "extra_forbidden":
        message = "is not a field that is known here"
    elif worst["type"] == "missing":
        message = "is required"
    message = message.replace("should be", "must be")
    param = str(path[0]) if path else None
    return RequestFailed(400, f"{name[:200]} {message[:300]}".strip(), None, param)


def _path(loc: tuple[int | str, ...], value: Any) -> list[int | str]:
    """The keys and indices of an error's place, without pydantic's words for ways to read."""
    path: list[int | str] = []
    for n, key in enumerate(loc):
        is_key = isinstance(value, dict) and isinstance(key, str) and key in value
        if is_key or (isinstance(value, list) and isinstance(key, int) and key < len(value)):
            value = value[key]
            path.append(key)
        elif n == len(loc) - 1 and isinstance(value, dict) and str(key).isidentifier():
            path.append(key)
    return path


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} is not a number here")
