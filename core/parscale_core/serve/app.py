"""The paths of the server, and its OpenAPI document."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from parscale_core.serve.answer_json import AnswerJson
from parscale_core.serve.api_errors import RequestFailed
from parscale_core.serve.exchange import APIS, Exchange
from parscale_core.serve.metrics import CONTENT_TYPE
from parscale_core.serve.serving import Serving

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REFERENCE = "#/components/schemas/{model}"
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is not one that is answered here"},
    "5XX": {"description": "The server is stopping, or the answer took too long"},
}


def make_app(serving: Serving) -> FastAPI:
    app: FastAPI = FastAPIOffline(
        title="parscale", redoc_url=None, description="OpenAI's API and Anthropic's, with streams."
    )
    page = files("parscale_core.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, summary="A page to chat on")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health", summary="Whether the server answers")
    async def health() -> Response:
        status, word = serving.health()
        return AnswerJson({"status": word}, status)

    @app.get("/metrics", summary="For Prometheus")
    def metrics() -> Response:
        return Response(serving.metrics.exposition(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", summary="What a request's model may be")
    async def models() -> Response:
        data = [_model(serving, name) for name in serving.names.all]
        return AnswerJson({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}", summary="One of them", responses=ERRORS)
    async def model(name: str) -> Response:
        if name not in serving.names.all:
            serving.names.resolve(name)
        return AnswerJson(_model(serving, name))

    for path, api in APIS.items():
        schema = {"$ref": REFERENCE.format(model=api.schema.__name__)}
        content = {"application/json": {"schema": schema}}
        app.post(
            path,
            summary=api.schema.__doc__,
            responses=ERRORS,
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )(_answering(serving, path))
        if "completions" in path:
            app.post(path.removeprefix("/v1"), include_in_schema=False)(_answering(serving, path))

    @app.exception_handler(HTTPException)
    async def no_path(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        found = "takes another method" if error.status_code == 405 else "is nothing here"
        failure = RequestFailed(error.status_code, f"{path[:200]} {found}")
        return AnswerJson(failure.body(path), error.status_code, headers=error.headers)

    @app.exception_handler(RequestFailed)
    async def failed(request: Request, failure: RequestFailed) -> Response:
        return AnswerJson(failure.body(request.url.path), failure.status)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        failure = RequestFailed(500, "the server failed at this request")
        return AnswerJson(failure.body(request.url.path), failure.status)

    app.openapi = _document(app)  # type: ignore[method-assign]
    return app


def _answering(serving: Serving, path: str) -> Callable[..., Any]:
    async def answer(request: Request) -> Response:
        return Exchange(serving, path, request)

    return answer


def _model(serving: Serving, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": serving.created, "owned_by": "parscale"}


def _document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title, version="1", description=app.description, routes=app.routes
            )
            schemas: list[Any] = [(api.schema, "validation") for api in APIS.values()]
            _, definitions = models_json_schema(schemas, ref_template=REFERENCE)
            made.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = made
        return app.openapi_schema

    return document
