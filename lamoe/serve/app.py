"""The routes, and the ASGI application that holds them.

`guard.py` checks requests before they get here. The routes delegate to `completions.py`,
`prompts.py` and `service.py`.
"""

from __future__ import annotations

import base64
import difflib
import functools
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lamoe import __version__
from lamoe.engine.async_llm import AsyncLLM, EngineDead
from lamoe.engine.score import mean_state
from lamoe.serve import bodies, completions, responses, wire
from lamoe.serve.builders import token_text
from lamoe.serve.errors import ApiError, invalid_value, json_response
from lamoe.serve.guard import INTERNAL_ERROR, Guard
from lamoe.serve.prompts import (
    chat_prompt,
    check_ids,
    check_text,
    encode_texts,
    in_thread,
    need_tokenizer,
    tokenize_prompts,
)
from lamoe.serve.reply import Reply
from lamoe.serve.service import Service, engine_ended

PAGE = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; "
        "img-src 'self' data:; connect-src 'self'; font-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
MAX_INPUTS = 2048  # texts of a request for embeddings, as in OpenAI's API
INLINE_BYTES = 1 << 16  # larger bodies are parsed in a thread

STATUS_DESCRIPTIONS = {
    400: "a part of the request is not valid",
    401: "no valid API key",
    403: "the Host header names another server",
    404: "not found",
    408: "the request took too long",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the queue is full; see Retry-After",
    431: "the headers are too large",
    503: "loading, shutting down, or the engine has ended; see Retry-After",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe error statuses for /openapi.json, including those that every route can send."""
    return {
        status: {"model": responses.Error, "description": STATUS_DESCRIPTIONS[status]}
        for status in (401, 403, 431, 503, *statuses)
    }


POST_ERRORS = error_responses(400, 404, 408, 413, 415, 429)
EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": "with stream: true: objects with object *.chunk, then [DONE]",
        }
    }
}
router = APIRouter()


class _Route(APIRoute):
    """A route that reads its body with `bodies.parse`.

    FastAPI only documents the body; it would convert the JSON twice, in the event loop.
    """

    def get_route_handler(self):
        if self.body_field is None:
            return super().get_route_handler()
        model: Any = self.body_field.field_info.annotation
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            body = await _read(request, model)
            return await endpoint(body, request)

        return handle


async def _read(request: Request, model: type[bodies.Model]) -> bodies.Model:
    try:
        raw = b"".join([chunk async for chunk in request.stream()])
        if len(raw) <= INLINE_BYTES:
            return bodies.parse(raw, model)
        return await _service(request).body_work.run(bodies.parse, raw, model)
    finally:
        request.state.release_body()


router.route_class = _Route


def _service(request: Request) -> Service:
    return request.app.state.service


# ---- generation ----------------------------------------------------------------------------------
@router.post(
    "/v1/completions",
    responses=POST_ERRORS | {200: {"model": responses.Completion, "content": EVENTS}},
)
async def create_completion(body: wire.CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts."""
    state = request.state
    return await completions.complete(
        _service(request), body, state.id, state.log, state.cache_salt
    )


@router.post(
    "/v1/chat/completions",
    responses=POST_ERRORS | {200: {"model": responses.ChatCompletion, "content": EVENTS}},
)
async def create_chat_completion(body: wire.ChatRequest, request: Request) -> Response:
    """Continue a conversation with the assistant's reply."""
    state = request.state
    return await completions.chat(_service(request), body, state.id, state.log, state.cache_salt)


@router.post("/v1/embeddings", responses=POST_ERRORS | {200: {"model": responses.Embeddings}})
async def create_embedding(body: wire.EmbeddingRequest, request: Request) -> Response:
    """Return the mean of the model's final normed hidden states over all tokens of each text.

    The vectors are not scaled to length 1. The model was not trained to embed texts, so expect
    less of these vectors than of those of an embedding model.
    """
    service = _service(request)
    engine = service.ready()
    service.check_model(body.model)
    size = service.config.hidden_size
    if body.dimensions not in (None, size):
        raise ApiError(
            400,
            f"dimensions is {body.dimensions}; this model's embeddings have {size}; leave it out",
            "unsupported",
            "dimensions",
        )
    prompts = await tokenize_prompts(service, body.input, "input", MAX_INPUTS)
    service.admit(1)  # the texts are computed one after another
    return Reply(
        whole=lambda: _embed(service, engine, prompts, body.encoding_format == "base64"),
        close=lambda: service.release(1),
        disconnected=service.metrics.disconnected.inc,
        seconds=service.settings.request_timeout,
    )


async def _embed(
    service: Service, engine: AsyncLLM, prompts: list[list[int]], as_base64: bool
) -> dict[str, Any]:
    data = []
    try:
        for i, ids in enumerate(prompts):
            # Take the lock for each text, so that a long list does not block other requests.
            async with service.scoring:
                vector: list[float] | str = await mean_state(engine, ids)
            if as_base64:
                vector = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": i, "embedding": vector})
    except EngineDead:
        raise engine_ended() from None
    num_tokens = sum(map(len, prompts))
    return {
        "object": "list",
        "model": service.name,
        "data": data,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


# ---- text ----------------------------------------------------------------------------------------
@router.post("/tokenize", responses=POST_ERRORS | {200: {"model": responses.Tokenized}})
async def tokenize(body: wire.TokenizeRequest, request: Request) -> Response:
    """Return the token ids of a prompt, or of a conversation in the model's chat template."""
    service = _service(request)
    service.ready()
    service.check_model(body.model)
    tokenizer = need_tokenizer(service, "tokenize")
    if (body.prompt is None) == (body.messages is None):
        raise invalid_value("give one of prompt and messages", "prompt")
    if body.messages is not None:
        ids = await chat_prompt(
            service,
            body.messages,
            body.tools,
            body.add_generation_prompt,
            options=body.chat_template_kwargs,
        )
    else:
        bos = tokenizer.add_bos and body.add_special_tokens
        check_text(service, [body.prompt], "prompt")
        [ids] = await in_thread(
            service, "prompt", encode_texts, service, [body.prompt], "prompt", bos
        )
    strings = None
    if body.return_token_strs:
        strings = await in_thread(service, None, lambda: [token_text(tokenizer, t) for t in ids])
    return json_response(
        {
            "count": len(ids),
            "max_model_len": service.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
    )


@router.post("/detokenize", responses=POST_ERRORS | {200: {"model": responses.Detokenized}})
async def detokenize(body: wire.DetokenizeRequest, request: Request) -> Response:
    """Return the text of token ids, including special tokens."""
    service = _service(request)
    service.ready()
    service.check_model(body.model)
    tokenizer = need_tokenizer(service, "detokenize")
    if len(body.tokens) > service.max_model_len:
        raise ApiError(
            400,
            f"{len(body.tokens)} tokens are more than the context of this server, "
            f"{service.max_model_len}; send fewer at a time",
            "context_length_exceeded",
            "tokens",
        )
    check_ids(service, body.tokens, "tokens")
    text = await in_thread(service, "tokens", tokenizer.decode, body.tokens, skip_special=False)
    return json_response({"prompt": text})


@router.get(
    "/tokenizer_info", responses=error_responses(400) | {200: {"model": responses.TokenizerInfo}}
)
async def tokenizer_info(request: Request) -> Response:
    """Return the special tokens and the chat template, for lm-evaluation-harness."""
    service = _service(request)
    service.ready()
    tokenizer = need_tokenizer(service, "tokenizer_info")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    tokens = {
        f"{kind}_token": None if id is None else tokenizer.inner.id_to_token(id)
        for kind, id in ids.items()
    }
    return json_response(
        {**tokens, "add_bos_token": tokenizer.add_bos, "chat_template": tokenizer.chat_template}
    )


# ---- state of the server -------------------------------------------------------------------------
def _model_card(service: Service) -> dict[str, Any]:
    service.ready()
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "lamoe",
        "max_model_len": service.max_model_len,
    }


@router.get("/v1/models", responses=error_responses() | {200: {"model": responses.Models}})
async def list_models(request: Request) -> Response:
    """List the one model of this server."""
    return json_response({"object": "list", "data": [_model_card(_service(request))]})


@router.get(
    "/v1/models/{model:path}", responses=error_responses(404) | {200: {"model": responses.Model}}
)
async def retrieve_model(model: str, request: Request) -> Response:
    """Describe the model, if the name is right."""
    _service(request).check_model(model)
    return json_response(_model_card(_service(request)))


@router.get(
    "/health",
    responses={
        200: {"model": responses.Health},
        503: {"model": responses.Health},
        403: {"model": responses.Error},
        431: {"model": responses.Error},
    },
)
async def health(request: Request) -> Response:
    """Return 200 if requests are answered, or 503 during loading and shutdown. Needs no key."""
    service = _service(request)
    state = service.state
    if state == "ok" and service.engine is not None and not service.engine.alive:
        state = "failed"
    if state == "ok":
        return json_response({"status": state})
    return json_response({"status": state}, 503, {"Retry-After": "5"})


@router.get(
    "/metrics",
    responses=error_responses()
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Return metrics in Prometheus' text format."""
    service = _service(request)
    return Response(
        service.metrics.text(await service.stats()),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


@router.get("/lamoe/stats", responses=error_responses() | {200: {"model": responses.Stats}})
async def stats(request: Request) -> Response:
    """Return the state of the engine, with cache, sequences, speed, prefix hits and drafts."""
    return json_response(await _service(request).stats())


@router.get(
    "/lamoe/requests/{id}/experts",
    responses=error_responses(404) | {200: {"model": responses.Experts}},
)
async def experts(id: str, request: Request) -> Response:
    """Return how many tokens of a request each routed expert has computed so far.

    `id` is the x-request-id of a request that is running or has finished recently.
    """
    return json_response(await _service(request).experts(id))


# ---- the page ------------------------------------------------------------------------------------
@router.get("/", include_in_schema=False)
async def index() -> Response:
    return _page_file("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def page(name: str) -> Response:
    return _page_file(name)


def _page_file(name: str) -> Response:
    path = PAGE / name
    is_plain_name = path.name == name and not name.startswith(".")
    if not is_plain_name or path.suffix not in MEDIA_TYPES or not path.is_file():
        raise ApiError(404, "the page has no such file", "not_found")
    return Response(_content(path), media_type=MEDIA_TYPES[path.suffix], headers=PAGE_HEADERS)


@functools.lru_cache(64)
def _content(path: Path) -> bytes:
    """Read a file of the page once. FileResponse would read each piece of it in a thread."""
    return path.read_bytes()


# ---- the application -----------------------------------------------------------------------------
class _App(FastAPI):
    """FastAPI with a corrected /openapi.json (see `_openapi`)."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _openapi(self, bool(self.state.service.settings.api_keys()))
        return self.openapi_schema


def build(service: Service) -> Guard:
    """Build the ASGI application of a service."""
    key_note = "No key is needed."
    if service.settings.api_keys():
        key_note = "Every call except /health needs `Authorization: Bearer KEY`."
    app = _App(
        title="lamoe",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        description=f"DeepSeek-V2 models over the API that OpenAI defined. {key_note}",
    )
    app.state.service = service
    app.include_router(router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    return Guard(app, service.settings, service.metrics, check_route)


def check_route(method: str, path: str) -> None:
    """Raise a 404 error if there is no such path, or a 405 error if it has no such method."""
    methods = {m for r in _routes() if r.path_regex.match(path) for m in r.methods}
    if path == "/openapi.json":
        methods = {"GET"}
    if not methods:
        raise ApiError(404, f"there is no route {path[:100]}{_hint(path)}", "not_found")
    if method not in methods:
        allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        raise ApiError(
            405,
            f"{path[:100]} does not support the method {method[:20]}; it supports {allowed}",
            "method_not_allowed",
            headers={"Allow": allowed},
        )


def _routes() -> list[APIRoute]:
    return [route for route in router.routes if isinstance(route, APIRoute)]


OTHER_APIS = {
    "/v1/responses": "OpenAI's Responses API",
    "/v1/assistants": "OpenAI's Assistants API",
    "/v1/threads": "OpenAI's Assistants API",
    "/v1/messages": "Anthropic's API",
    "/api/chat": "Ollama's API",
    "/api/generate": "Ollama's API",
    "/api/tags": "Ollama's API",
}


def _hint(path: str) -> str:
    """Return how to correct an unknown path, as the end of a message."""
    for beginning, name in OTHER_APIS.items():
        if path.startswith(beginning):
            return f": {name} is not supported; use /v1/chat/completions"
    known = [route.path for route in _routes()]
    for right in sorted((p for p in known if p.startswith("/v1/")), key=len, reverse=True):
        end = right.removeprefix("/v1")
        if path.endswith(end) and path.count(end) > 1:
            return f"; the base URL must end with /v1, without {end}"
        if path.endswith(end) and "/v1/v1/" in path:
            return f"; the base URL has /v1 twice, send to {right}"
        if path.endswith(end):
            return f"; the API is under /v1, send to {right}"
    if path.startswith("/models/"):
        return f"; the API is under /v1, send to /v1{path[:100]}"
    close = difflib.get_close_matches(path[:100], known, 1, 0.75)
    return f"; did you mean {close[0]}?" if close else "; /openapi.json lists all routes"


async def _http_error(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    if not isinstance(e, ApiError):
        e = ApiError(e.status_code, str(e.detail), headers=e.headers)
    return e.response()


async def _unexpected_error(request: Request, e: Exception) -> Response:
    # Starlette raises the exception again after this, so the guard logs it.
    return INTERNAL_ERROR.response()


def _openapi(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    """Describe the API; correct FastAPI's description where this server differs."""
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # invalid requests get 400 here
    if needs_key:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        schema["paths"]["/health"]["get"]["security"] = []
    return schema
